//! What an existing enroot installation has configured, in enroot's own formats: `/etc/enroot` of the administrator and
//! `~/.config/enroot` of the user (behaviour reference, sections 10 and 16.1).
//!
//! Read by container init and by the commands people type, always as the user; the broker never looks at any of it.

pub mod conf;
pub mod environ;
pub mod generated;
pub mod mounts;
pub mod script;
pub mod substitute;

use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

/// `PATH` of what runs on the host for a container: hooks and the shell of a configuration.
pub const HOST_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The content of the regular file `path`, at most `limit` bytes, and what it is; `None` if it does not exist. Never
/// waits: a FIFO in its place is an error.
pub(crate) fn read_file(path: &Path, limit: u64) -> io::Result<Option<(Vec<u8>, Metadata)>> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        other => File::from(other?),
    };
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let mut content = Vec::new();
    file.take(limit + 1).read_to_end(&mut content)?;
    if content.len() as u64 > limit {
        return Err(io::Error::other(format!("more than {limit} bytes")));
    }
    Ok(Some((content, metadata)))
}

/// The files `*.EXTENSION` of `directory`, sorted by name; none if it does not exist. At most `limit`, more are an error.
pub(crate) fn files_in(directory: &Path, extension: &str, limit: usize) -> Result<Vec<PathBuf>, (PathBuf, io::Error)> {
    let failed = |cause| (directory.to_owned(), cause);
    let entries = match std::fs::read_dir(directory) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        other => other.map_err(failed)?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(failed)?.path();
        // As a glob: hidden files do not match.
        let hidden = path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"."));
        if path.extension() == Some(OsStr::new(extension)) && !hidden {
            if files.len() == limit {
                return Err(failed(io::Error::other(format!("more than {limit} files"))));
            }
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

pub(crate) fn os(bytes: &[u8]) -> &OsStr {
    OsStr::from_bytes(bytes)
}
