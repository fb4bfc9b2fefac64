//! The members of a tar archive that can be read from anywhere: where each one's content is.
//!
//! Names are only ever compared, never opened.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::Part;
use crate::import::LayerError;
use crate::import::tar::{self, Kind};
use crate::importer::failure::Failure;

/// Most members: an image of the most layers, in docker's old form, has a few thousand.
const MAX_MEMBERS: usize = 100_000;
/// Most bytes of all names.
const MAX_NAMES: usize = 16 << 20;
/// Most links to follow from a member's name to its content.
const MAX_LINKS: usize = 8;
/// Members up to this length are read past, not jumped over.
const NEAR: u64 = 64 << 10;

/// An archive and where its members are.
#[derive(Debug)]
pub(super) struct Archive {
    file: Arc<File>,
    members: HashMap<Vec<u8>, Member>,
}

#[derive(Debug, Clone)]
enum Member {
    File {
        position: u64,
        size: u64,
    },
    /// Another member, by its whole name.
    Link(Vec<u8>),
}

/// Reads a file from a position on.
struct FileFrom {
    file: Arc<File>,
    position: u64,
}

impl Archive {
    /// Reads the headers of `file`.
    pub fn read(file: File) -> Result<Self, Failure> {
        let file = Arc::new(file);
        let length = file.metadata().map_err(|error| unreadable(&error))?.len();
        let from = |position| FileFrom { file: Arc::clone(&file), position };
        let mut tar = tar::Archive::new(from(0), u64::MAX);
        let mut members = HashMap::new();
        let mut names = 0;
        while let Some(entry) = tar.next().map_err(malformed)? {
            names += entry.path.len();
            if members.len() >= MAX_MEMBERS || names > MAX_NAMES {
                return Err(Failure::bad("it has too many members for the archive of an image"));
            }
            let Some(name) = whole_name(&entry.path, b"") else { continue };
            let member = match entry.kind {
                Kind::File { size } => {
                    let position = tar.position();
                    if position.checked_add(size).is_none_or(|end| end > length) {
                        return Err(Failure::bad("the archive is cut off: copy it again"));
                    }
                    if size > NEAR {
                        tar.skip_to(from);
                    }
                    Member::File { position, size }
                }
                Kind::Symlink { target } => {
                    let parent = name.iter().rposition(|&byte| byte == b'/').and_then(|end| name.get(..end));
                    match whole_name(&target, parent.unwrap_or_default()) {
                        Some(target) => Member::Link(target),
                        None => continue,
                    }
                }
                Kind::HardLink { target } => match whole_name(&target, b"") {
                    Some(target) => Member::Link(target),
                    None => continue,
                },
                _ => continue,
            };
            // As when unpacked, the last of several counts.
            members.insert(name, member);
        }
        Ok(Self { file, members })
    }

    /// The content of a member, or of the one that it is a link to.
    pub fn open(&self, path: &str) -> Result<Part, Failure> {
        let mut name = whole_name(path.as_bytes(), b"").unwrap_or_default();
        for _ in 0..=MAX_LINKS {
            match self.members.get(&name) {
                Some(Member::File { position, size }) => {
                    return Ok(Part { file: Arc::clone(&self.file), position: *position, left: *size });
                }
                Some(Member::Link(target)) => name.clone_from(target),
                None => break,
            }
        }
        let shown: String = path.chars().take(200).flat_map(char::escape_debug).collect();
        Err(Failure::bad(&format!("the archive has no file {shown}")))
    }
}

/// The name of a member in one form, as seen from `directory`; `None` if it leads out of the archive.
fn whole_name(path: &[u8], directory: &[u8]) -> Option<Vec<u8>> {
    let base = if path.starts_with(b"/") { b"" } else { directory };
    let mut parts: Vec<&[u8]> = Vec::new();
    for part in base.split(|&byte| byte == b'/').chain(path.split(|&byte| byte == b'/')) {
        match part {
            b"" | b"." => {}
            b".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join(&b'/'))
}

fn malformed(error: LayerError) -> Failure {
    match error {
        LayerError::Malformed { place, problem } => Failure::bad(&format!("malformed archive: {place}: {problem}")),
        LayerError::Read(error) => unreadable(&error),
        other => Failure::bad(&other.to_string()),
    }
}

fn unreadable(error: &io::Error) -> Failure {
    Failure::bad(&format!("cannot read it: {}", crate::sys::reason(error)))
}

impl Read for FileFrom {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buffer, self.position)?;
        self.position += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_one_form() {
        for (path, directory, expected) in [
            ("./a//b/", "", Some("a/b")),
            ("../c/layer.tar", "b", Some("c/layer.tar")),
            ("/c", "b", Some("c")),
            ("x", "a/b", Some("a/b/x")),
            ("../../etc/passwd", "a", None),
            ("..", "", None),
        ] {
            let name = whole_name(path.as_bytes(), directory.as_bytes());
            assert_eq!(name.as_deref(), expected.map(str::as_bytes), "{path}");
        }
    }
}
