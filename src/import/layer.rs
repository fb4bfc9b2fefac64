//! What the entries of an OCI layer mean (image-spec, layer.md), applied to a tree in memory while the content of files
//! goes straight to the image.
//!
//! * Whiteouts and opaque directories are written as overlayfs has them (kernel document filesystems/overlayfs): a
//!   character device 0:0, and the attribute `trusted.overlay.opaque`. Whiteouts concern lower layers only: of `.wh.X` and
//!   `X` in one layer `X` stays, and a directory `X` becomes opaque. In an opaque directory they have nothing to hide and
//!   are left out. Other directories that hold some are marked: overlayfs would show them where nothing is below.
//! * Of two entries with one path the later counts; of two directories the later one's attributes.
//! * Left out: devices, everything in `/dev`, and the bookkeeping of aufs (`.wh..wh.*`). Hard links to files among the
//!   latter two work.
//! * Everything belongs to 0:0, and the owner may read everything, and enter and change directories: in a container with
//!   one user that user owns all. Of extended attributes only those of users (`user.`) are kept.
//! * Directories that are only implied have mode 0755 and time 0.
//!
//! Symbolic links of the layer on the way to an entry are followed ([`parents`](super::parents)). An entry whose path has
//! `..`, or that lies below something other than a directory (a file, say), is an error that names it. No entry can do harm: there is no file system that a path could lead out of.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;

use super::error::{LayerError, Quoted};
use super::parents::ParentLinks;
use super::path::{Name, components};
use super::tar::{Archive, Entry, Kind};
use crate::erofs::{Attributes, Directory, DirectoryId, InodeId, SYMLINK_MAX, Target, Writer};

/// Bounds on what a layer may make us do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerLimits {
    /// Most bytes of the uncompressed tar stream; and, but for 1 MiB, of the image (sparse files may take more in the image
    /// than in the stream).
    pub max_bytes: u64,
    /// Most entries of the stream, together with the directories that they imply.
    pub max_entries: u64,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// Bytes of the uncompressed tar stream.
    pub unpacked: u64,
    /// Bytes of the image.
    pub image: u64,
    /// Entries of the stream, together with the directories that they imply.
    pub entries: u64,
}

/// How much larger an image may be than its stream.
const IMAGE_SLACK: u64 = 1 << 20;
/// Most bytes of extended attributes of directories: they are kept in memory.
const MAX_DIRECTORY_XATTRS: usize = 16 << 20;

/// Reads a layer's tar stream to its very end and writes its image to `out`, an empty file open for reading and writing.
/// On failure the content of `out` is undefined. Nothing is synced.
///
/// `out` is written with `O_DIRECT` where that is possible; its flags are the same afterwards. Reads may be as large as
/// 1 MiB: content goes from `tar` straight into the buffer it is written from. The same stream gives the same bytes.
/// Memory is bounded by the number of entries and the length of their names (about 140 bytes an entry), not by content.
pub fn write_layer(tar: impl Read, out: &File, limits: &LayerLimits) -> Result<LayerSummary, LayerError> {
    let mut archive = Archive::new(tar, limits.max_bytes);
    let mut layer = Layer::new(out, limits)?;
    let mut links = ParentLinks::default();
    while let Some(mut entry) = archive.next()? {
        links.apply(&mut entry);
        layer.apply(&entry, |buffer| archive.read(buffer))?;
    }
    layer.leave_out();
    let entries = layer.entries;
    let image = layer.writer.finish(&layer.directories)?;
    Ok(LayerSummary { unpacked: archive.position(), image, entries })
}

/// A layer that is being read.
#[derive(Debug)]
struct Layer<'a> {
    writer: Writer<'a>,
    directories: Vec<Directory>,
    opaque: BTreeSet<DirectoryId>,
    /// The one inode behind all whiteouts.
    whiteout: Option<InodeId>,
    entries: u64,
    max_entries: u64,
    directory_xattrs: usize,
}

impl<'a> Layer<'a> {
    fn new(out: &'a File, limits: &LayerLimits) -> Result<Self, LayerError> {
        let writer = Writer::new(out, limits.max_bytes.saturating_add(IMAGE_SLACK))?;
        let mut layer = Self {
            writer,
            directories: Vec::new(),
            opaque: BTreeSet::new(),
            whiteout: None,
            entries: 0,
            max_entries: limits.max_entries.min(u32::MAX.into()),
            directory_xattrs: 0,
        };
        layer.new_directory(DirectoryId::ROOT);
        Ok(layer)
    }

    /// Applies one entry; `read` delivers its content.
    fn apply(
        &mut self,
        entry: &Entry,
        read: impl FnMut(&mut [u8]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let problem = |problem: &'static str| LayerError::entry(&entry.path, problem);
        self.count()?;
        let components = components(&entry.path).map_err(problem)?;
        let Some((name, parents)) = components.split_last() else {
            return match entry.kind {
                Kind::Directory => self.set_attributes(DirectoryId::ROOT, entry),
                _ => Err(problem("the root of the layer can only be a directory")),
            };
        };
        let parent = self.parent(entry, parents)?;
        match Name::new(name).map_err(problem)? {
            Name::Opaque => {
                self.opaque.insert(parent);
                Ok(())
            }
            Name::Whiteout(hidden) => self.hide(parent, hidden),
            Name::Plain | Name::Aufs => self.add(parent, name, entry, read),
        }
    }

    /// The directory with this path, made where it is missing.
    fn parent(&mut self, entry: &Entry, components: &[&[u8]]) -> Result<DirectoryId, LayerError> {
        let mut directory = DirectoryId::ROOT;
        for (depth, &name) in components.iter().enumerate() {
            directory = match self.directories[directory.index()].entries.get(name).copied() {
                Some(Target::Directory(id)) => id,
                Some(target) if !self.is_whiteout(target) => {
                    let above = components[..=depth].join(&b'/');
                    let problem = format!("it is below {}, which is not a directory", Quoted(&above));
                    return Err(LayerError::entry(&entry.path, problem));
                }
                _ if matches!(Name::new(name), Ok(Name::Plain | Name::Aufs)) => {
                    self.count()?;
                    self.add_directory(directory, name)
                }
                _ => return Err(LayerError::entry(&entry.path, "it is below a whiteout")),
            };
        }
        Ok(directory)
    }

    /// Adds what is no whiteout.
    fn add(
        &mut self,
        parent: DirectoryId,
        name: &[u8],
        entry: &Entry,
        read: impl FnMut(&mut [u8]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let attributes = || attributes(entry);
        let target = match &entry.kind {
            Kind::Directory => {
                let directory = match self.directories[parent.index()].entries.get(name) {
                    Some(Target::Directory(id)) => *id,
                    _ => self.add_directory(parent, name),
                };
                return self.set_attributes(directory, entry);
            }
            Kind::File { size } => Target::Inode(self.writer.file(&attributes(), *size, read)?),
            Kind::Sparse { size, extents } => {
                Target::Inode(self.writer.sparse_file(&attributes(), *size, extents, read)?)
            }
            Kind::Symlink { target } => match target.len() {
                1..=SYMLINK_MAX if !target.contains(&0) => Target::Inode(self.writer.symlink(&attributes(), target)?),
                _ => {
                    return Err(LayerError::entry(
                        &entry.path,
                        "a symbolic link to an empty, too long or invalid path",
                    ));
                }
            },
            Kind::Fifo => Target::Inode(self.writer.fifo(&attributes())?),
            Kind::HardLink { target } => self.hard_link(entry, target)?,
            Kind::Device => Target::Nothing,
        };
        self.directories[parent.index()].entries.insert(name.into(), target);
        Ok(())
    }

    /// A new directory in place of what has its name. What was there (a whiteout, or an earlier file) hid what lower layers
    /// have.
    fn add_directory(&mut self, parent: DirectoryId, name: &[u8]) -> DirectoryId {
        let id = self.new_directory(parent);
        if self.directories[parent.index()].entries.insert(name.into(), Target::Directory(id)).is_some() {
            self.opaque.insert(id);
        }
        id
    }

    fn new_directory(&mut self, parent: DirectoryId) -> DirectoryId {
        // `max_entries` keeps this within 32 bits.
        let id = DirectoryId(self.directories.len() as u32);
        let attributes = Attributes { mode: 0o755, ..Attributes::default() };
        self.directories.push(Directory { attributes, parent, entries: Default::default() });
        id
    }

    fn set_attributes(&mut self, directory: DirectoryId, entry: &Entry) -> Result<(), LayerError> {
        self.directory_xattrs += entry.xattrs.size();
        if self.directory_xattrs > MAX_DIRECTORY_XATTRS {
            return Err(LayerError::entry(&entry.path, "too many extended attributes of directories"));
        }
        self.directories[directory.index()].attributes = attributes(entry);
        Ok(())
    }

    /// What the earlier entry `target` is.
    fn hard_link(&self, entry: &Entry, target: &[u8]) -> Result<Target, LayerError> {
        let problem =
            |problem: &str| LayerError::entry(&entry.path, format!("hard link to {}, {problem}", Quoted(target)));
        let components = components(target).map_err(|_| problem("which is no valid path"))?;
        let mut found = Target::Directory(DirectoryId::ROOT);
        for name in components {
            let entries = match found {
                Target::Directory(id) => &self.directories[id.index()].entries,
                _ => return Err(problem("which is below something other than a directory")),
            };
            found = match entries.get(name) {
                Some(target) if !self.is_whiteout(*target) => *target,
                _ => return Err(problem("which is not among the entries before it")),
            };
        }
        match found {
            Target::Directory(_) => Err(problem("which is a directory")),
            target => Ok(target),
        }
    }

    /// Adds a whiteout for `name`.
    fn hide(&mut self, parent: DirectoryId, name: &[u8]) -> Result<(), LayerError> {
        match self.directories[parent.index()].entries.get(name) {
            Some(Target::Directory(id)) => {
                self.opaque.insert(*id);
            }
            Some(Target::Inode(_)) => {}
            Some(Target::Nothing) | None => {
                let whiteout = match self.whiteout {
                    Some(whiteout) => whiteout,
                    None => *self.whiteout.insert(self.writer.whiteout()?),
                };
                self.directories[parent.index()].entries.insert(name.into(), Target::Inode(whiteout));
            }
        }
        Ok(())
    }

    fn is_whiteout(&self, target: Target) -> bool {
        self.whiteout.is_some_and(|whiteout| target == Target::Inode(whiteout))
    }

    /// One more entry.
    fn count(&mut self) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.max_entries { Err(LayerError::TooManyEntries) } else { Ok(()) }
    }

    /// Takes out of the tree what the image does not show, and marks opaque directories.
    fn leave_out(&mut self) {
        if let Some(Target::Directory(dev)) = self.directories[0].entries.get(&b"dev"[..]).copied() {
            self.directories[dev.index()].entries.clear();
            self.opaque.remove(&dev);
        }
        let whiteout = self.whiteout.map(Target::Inode);
        let mut stack = vec![(DirectoryId::ROOT, false)];
        while let Some((id, below_opaque)) = stack.pop() {
            let directory = &mut self.directories[id.index()];
            let opaque = self.opaque.contains(&id);
            if opaque {
                directory.attributes.xattrs.push_overlay_opaque();
            }
            directory.entries.retain(|name, target| match *target {
                target if Some(target) == whiteout => !opaque && !below_opaque,
                _ => !matches!(Name::new(name), Ok(Name::Aufs)),
            });
            if whiteout.is_some() && directory.entries.values().any(|target| Some(*target) == whiteout) {
                directory.attributes.xattrs.push_overlay_whiteouts();
            }
            stack.extend(directory.entries.values().filter_map(|target| match target {
                Target::Directory(id) => Some((*id, opaque || below_opaque)),
                _ => None,
            }));
        }
    }
}

/// The attributes of an entry's inode.
pub(super) fn attributes(entry: &Entry) -> Attributes {
    let mode = match entry.kind {
        Kind::Directory => entry.mode | 0o700,
        Kind::Symlink { .. } => 0o777,
        _ if entry.mode & 0o111 != 0 => entry.mode | 0o500,
        _ => entry.mode | 0o400,
    };
    Attributes { mode, mtime: entry.mtime.0, mtime_nsec: entry.mtime.1, xattrs: entry.xattrs.clone() }
}

#[cfg(test)]
mod tests;
