//! The devices that the files of all directories describe, by name. A file that cannot be used takes nothing from the
//! others, and a name that two files of one directory have is good for nobody (CDI specification, "Error handling"; in a
//! later directory it overrides).

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use super::document::{Device, Document, Format};
use super::name::{Kind, QualifiedName};
use super::planner::Planner;
use crate::devices::edits::ContainerEdits;
use crate::enroot::{files_in, read_file};
use crate::mounts::rootdir::RootDir;
use crate::request::User;
use crate::sys;

/// Where vendors and administrators put their files; the later directory overrides.
pub const DIRECTORIES: [&str; 2] = ["/etc/cdi", "/var/run/cdi"];
/// Most bytes of one file.
const MAX_FILE: u64 = 16 << 20;
/// Most files of one directory.
const MAX_FILES: usize = 1000;
/// Most names that a message shows.
const MAX_SHOWN: usize = 20;

/// Everything that is described on this node.
#[derive(Debug, Default)]
pub struct Registry {
    files: Vec<Specification>,
    devices: BTreeMap<QualifiedName, Entry>,
    /// A line for each file or directory that cannot be used.
    pub problems: Vec<String>,
}

/// One file.
#[derive(Debug)]
pub(super) struct Specification {
    /// Where it is.
    pub path: PathBuf,
    /// What it says.
    pub document: Document,
}

#[derive(Debug)]
enum Entry {
    /// In which file, the how many'th there.
    Device(usize, usize),
    /// In these files of one directory.
    Conflict(BTreeSet<PathBuf>),
}

/// A device that cannot be given to a container.
#[derive(Debug, thiserror::Error)]
pub enum CdiError {
    /// No file has it.
    #[error("there is no device {name} on this node: {known}{}", listed("; not understood: ", .problems))]
    Unknown {
        /// What was asked for.
        name: QualifiedName,
        /// What there is.
        known: String,
        /// Files that might have it.
        problems: Vec<String>,
    },
    /// Two files of one directory have it.
    #[error("the device {name} is in more than one file, so that nobody knows which one counts: {files}")]
    Conflict {
        /// What was asked for.
        name: QualifiedName,
        /// The files.
        files: String,
    },
    /// What the file says cannot be done.
    #[error("the device {name} ({}): {problem}", .file.display())]
    Unusable {
        /// What was asked for.
        name: QualifiedName,
        /// The file.
        file: PathBuf,
        /// Why not.
        problem: String,
    },
}

/// What a container of `user` gets with the devices `names`, by the files of `directories`. `registry` is what was read of
/// those of their vendors, if anything; `image` is the image, if its own CUDA may be used.
pub fn plan(
    directories: &[PathBuf],
    registry: Option<Registry>,
    names: &[QualifiedName],
    user: &User,
    image: Option<RootDir<'_>>,
) -> Result<ContainerEdits, CdiError> {
    if names.is_empty() {
        return Ok(ContainerEdits::default());
    }
    let vendors: Vec<&str> = names.iter().map(|name| name.kind.vendor()).collect();
    let registry = registry.unwrap_or_else(|| Registry::load(directories, Some(&vendors)));
    let mut edits = match registry.edits(names, user, image) {
        // What there is instead is in other files.
        Err(CdiError::Unknown { .. }) => Registry::load(directories, None).edits(names, user, image)?,
        other => other?,
    };
    edits.log.extend(registry.problems.iter().map(|problem| format!("not understood: {problem}")));
    Ok(edits)
}

fn listed(before: &str, lines: &[String]) -> String {
    if lines.is_empty() { String::new() } else { format!("{before}{}", lines.join("; ")) }
}

impl Registry {
    /// Reads the files of `directories`, of which the last one counts most. With `vendors` only the files that name one of
    /// these: the others need not be parsed.
    pub fn load(directories: &[PathBuf], vendors: Option<&[&str]>) -> Self {
        let mut registry = Self::default();
        for directory in directories {
            let mut own: BTreeMap<QualifiedName, Entry> = BTreeMap::new();
            for (path, format) in registry.files_of(directory) {
                match read(&path, format, vendors) {
                    Ok(Some((kind, document))) => registry.add(&mut own, path, kind, document),
                    Ok(None) => {}
                    Err(problem) => registry.problems.push(format!("{}{problem}", path.display())),
                }
            }
            registry.devices.extend(own);
        }
        registry
    }

    fn files_of(&mut self, directory: &Path) -> Vec<(PathBuf, Format)> {
        let mut files = Vec::new();
        for (extension, format) in [("json", Format::Json), ("yaml", Format::Yaml)] {
            match files_in(directory, extension, MAX_FILES) {
                Ok(found) => files.extend(found.into_iter().map(|path| (path, format))),
                Err((path, error)) => self.problems.push(format!("{}: {}", path.display(), sys::reason(error))),
            }
        }
        files.sort_by(|(one, _), (other, _)| one.cmp(other));
        files
    }

    fn add(&mut self, own: &mut BTreeMap<QualifiedName, Entry>, path: PathBuf, kind: Kind, document: Document) {
        let file = self.files.len();
        for (index, device) in document.devices.iter().enumerate() {
            // The document has been judged: its names are names.
            let Ok(name) = QualifiedName::new(kind.clone(), &device.name) else { continue };
            let entry = match own.remove(&name) {
                None => Entry::Device(file, index),
                Some(Entry::Device(other, _)) => {
                    let other = self.files.get(other).map(|specification| specification.path.clone());
                    Entry::Conflict(other.into_iter().chain([path.clone()]).collect())
                }
                Some(Entry::Conflict(mut files)) => {
                    files.insert(path.clone());
                    Entry::Conflict(files)
                }
            };
            own.insert(name, entry);
        }
        self.files.push(Specification { path, document });
    }

    /// The names of all devices, and the file of each.
    pub fn devices(&self) -> impl Iterator<Item = (&QualifiedName, &Path)> {
        self.devices.iter().filter_map(|(name, entry)| match entry {
            Entry::Device(file, _) => Some((name, self.files.get(*file)?.path.as_path())),
            Entry::Conflict(_) => None,
        })
    }

    /// Names that more than one file has, in a line each.
    pub fn conflicts(&self) -> impl Iterator<Item = String> {
        self.devices.iter().filter_map(|(name, entry)| match entry {
            Entry::Device(..) => None,
            Entry::Conflict(files) => Some(format!("{name}: in more than one file: {}", joined(files))),
        })
    }

    /// Whether there is any device of this kind.
    pub fn has_kind(&self, kind: &Kind) -> bool {
        self.devices.keys().any(|name| name.kind == *kind)
    }

    /// Whether there is this device.
    pub fn has(&self, name: &QualifiedName) -> bool {
        self.devices.contains_key(name)
    }

    /// The device of `kind` to which the host's device node `path` belongs, and no other device's: what stands for all
    /// devices, or for what they share, is none.
    pub fn device_of_node(&self, kind: &Kind, path: &Path) -> Option<QualifiedName> {
        let mut best: Option<(usize, &QualifiedName)> = None;
        for (name, entry) in &self.devices {
            let Entry::Device(file, index) = entry else { continue };
            let Some(device) = self.device(*file, *index).filter(|_| name.kind == *kind) else { continue };
            let nodes = &device.container_edits.device_nodes;
            let fewer = best.is_none_or(|(count, _)| nodes.len() < count);
            if fewer && name.name() != "all" && nodes.iter().any(|node| Path::new(node.source()) == path) {
                best = Some((nodes.len(), name));
            }
        }
        best.map(|(_, name)| name.clone())
    }

    fn device(&self, file: usize, index: usize) -> Option<&Device> {
        self.files.get(file)?.document.devices.get(index)
    }

    /// What a container gets that has the devices `names`, of the user `user`: the edits of each device in this order, and
    /// before the first one of each file what the file says for all.
    pub fn edits(
        &self,
        names: &[QualifiedName],
        user: &User,
        image: Option<RootDir<'_>>,
    ) -> Result<ContainerEdits, CdiError> {
        let mut planner = Planner::default();
        let (mut files, mut seen) = (BTreeSet::new(), BTreeSet::new());
        for name in names.iter().filter(|name| seen.insert(*name)) {
            let (file, index) = match self.devices.get(name) {
                Some(Entry::Device(file, index)) => (*file, *index),
                Some(Entry::Conflict(files)) => {
                    return Err(CdiError::Conflict { name: name.clone(), files: joined(files) });
                }
                None => return Err(self.unknown(name)),
            };
            let (Some(specification), Some(device)) = (self.files.get(file), self.device(file, index)) else {
                return Err(self.unknown(name));
            };
            let unusable =
                |problem| CdiError::Unusable { name: name.clone(), file: specification.path.clone(), problem };
            let Specification { path, document } = specification;
            let mut add = |edits| planner.add(edits, document.has_patterns(), name, path).map_err(unusable);
            if files.insert(file) {
                add(&document.container_edits)?;
            }
            add(&device.container_edits)?;
        }
        Ok(planner.finish(user, image))
    }

    fn unknown(&self, name: &QualifiedName) -> CdiError {
        let of_kind: Vec<String> =
            self.devices.keys().filter(|other| other.kind == name.kind).map(|other| other.name().to_owned()).collect();
        let known = if self.devices.is_empty() {
            "it has no CDI devices at all".to_owned()
        } else if of_kind.is_empty() {
            let kinds: BTreeSet<&Kind> = self.devices.keys().map(|other| &other.kind).collect();
            format!("it has devices of {}", shortened(kinds.into_iter().map(Kind::to_string)))
        } else {
            format!("of {} it has {}", name.kind, shortened(of_kind.into_iter()))
        };
        CdiError::Unknown { name: name.clone(), known, problems: self.problems.clone() }
    }
}

fn read(path: &Path, format: Format, vendors: Option<&[&str]>) -> Result<Option<(Kind, Document)>, String> {
    let content = read_file(path, MAX_FILE).map_err(|error: io::Error| format!(": {}", sys::reason(error)))?;
    // Removed meanwhile: tools replace their files.
    let Some((content, _)) = content else { return Ok(None) };
    let mentions = |vendor: &&str| content.windows(vendor.len().max(1)).any(|bytes| bytes == vendor.as_bytes());
    if vendors.is_some_and(|vendors| !vendors.iter().any(mentions)) {
        return Ok(None);
    }
    Document::parse(&content, format).map(Some).map_err(|error| error.to_string())
}

fn joined(files: &BTreeSet<PathBuf>) -> String {
    files.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

fn shortened(names: impl ExactSizeIterator<Item = String>) -> String {
    let left_out = names.len().saturating_sub(MAX_SHOWN);
    let shown = names.take(MAX_SHOWN).collect::<Vec<_>>().join(", ");
    if left_out == 0 { shown } else { format!("{shown} and {left_out} more") }
}
