//! From the layers of an image to one tree, in one pass, topmost layer first: for `pyxis import` and `pyxis load`, which
//! mount nothing.
//!
//! What a layer above has is known when a layer is read, so what is hidden is skipped: nothing is written that another
//! layer replaces. The meaning of entries is that of the layer images (module [`layer`](super::layer)). Where several
//! layers have a directory, the uppermost one that describes it decides its attributes; one that only implies it, by
//! something in it, does not.
//!
//! A hard link to a file that is hidden, or left out, is the one thing that a single pass cannot do: its layer is read
//! again for that file ([`Merge::links`]).

mod links;
#[cfg(test)]
mod tests;
mod tree;

use std::io::Read;

use super::error::LayerError;
use super::layer::{LayerLimits, attributes};
use super::parents::ParentLinks;
use super::path::{Name, components};
use super::tar::{Archive, Entry, Kind};
use crate::erofs::{Attributes, Extent, SYMLINK_MAX};
use links::{Links, Place};
use tree::{DirectoryId, Found, Layer, Slot, Tree};

/// Most links on the way to a file that is put into the tree.
const MAX_LINKS: u32 = 40;

/// Where the merged tree goes. Paths have no `/` in front. Directories come before what is in them, and nothing is made
/// where something is.
pub trait Sink {
    /// Makes a directory; its attributes follow at the end.
    fn directory(&mut self, path: &[u8]) -> Result<(), LayerError>;
    /// Makes a file.
    fn file(&mut self, path: &[u8], attributes: &Attributes, content: Content<'_>) -> Result<(), LayerError>;
    /// Makes a symbolic link.
    fn symlink(&mut self, path: &[u8], attributes: &Attributes, target: &[u8]) -> Result<(), LayerError>;
    /// Makes a named pipe.
    fn fifo(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError>;
    /// Gives what is at `existing`, no directory, another name.
    fn link(&mut self, existing: &[u8], path: &[u8]) -> Result<(), LayerError>;
    /// Removes what is at `path`, with everything below.
    fn remove(&mut self, path: &[u8]) -> Result<(), LayerError>;
    /// Sets the attributes of a directory, when all is in it. The empty path is the root.
    fn attributes(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError>;
}

/// What is in a file.
pub struct Content<'a> {
    /// Bytes of the file.
    pub size: u64,
    /// Where it has data, in order; what [`Content::read`] gives is only that.
    pub extents: &'a [Extent],
    /// Fills a buffer with the data that comes next.
    pub read: &'a mut dyn FnMut(&mut [u8]) -> Result<(), LayerError>,
}

impl std::fmt::Debug for Content<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Content").field("size", &self.size).finish_non_exhaustive()
    }
}

/// A tree being merged.
#[derive(Debug)]
pub struct Merge<S> {
    sink: S,
    tree: Tree,
    links: Links,
    /// The layer being read, 0 for the topmost.
    layer: Layer,
    /// The number of its entry at hand, from 1.
    number: u64,
    /// What the present layer hides from the ones below: applied when it has been read.
    opaque: Vec<DirectoryId>,
    whiteouts: Vec<(DirectoryId, Box<[u8]>)>,
    limits: LayerLimits,
    entries: u64,
}

impl<S: Sink> Merge<S> {
    /// A tree with nothing in it. `limits` bound each stream and all entries together.
    pub fn new(sink: S, limits: LayerLimits) -> Self {
        Self {
            sink,
            tree: Tree::new(),
            links: Links::default(),
            layer: 0,
            number: 0,
            opaque: Vec::new(),
            whiteouts: Vec::new(),
            limits,
            entries: 0,
        }
    }

    /// Adds the next lower layer, whose tar stream is read to its very end. If this gives `true`, the same stream has to be
    /// given to [`Merge::links`] before the next layer.
    pub fn layer(&mut self, tar: impl Read) -> Result<bool, LayerError> {
        let mut archive = Archive::new(tar, self.limits.max_bytes);
        self.number = 0;
        let mut links = ParentLinks::default();
        while let Some(mut entry) = archive.next()? {
            links.apply(&mut entry);
            self.number += 1;
            self.apply(&entry, &mut |buffer| archive.read(buffer))?;
        }
        for directory in self.opaque.drain(..) {
            self.tree.close(directory);
        }
        for (directory, name) in self.whiteouts.drain(..) {
            self.tree.hide(directory, name, self.layer);
        }
        self.links.end_of_stream();
        let again = !self.links.is_empty();
        if !again {
            self.layer += 1;
        }
        Ok(again)
    }

    /// Reads the layer again, for the files that hard links need.
    pub fn links(&mut self, tar: impl Read) -> Result<(), LayerError> {
        let mut archive = Archive::new(tar, self.limits.max_bytes);
        let mut number = 0;
        let mut links = ParentLinks::default();
        while let Some(mut entry) = archive.next()? {
            links.apply(&mut entry);
            number += 1;
            let Ok(components) = components(&entry.path) else { continue };
            if matches!(entry.kind, Kind::Directory | Kind::HardLink { .. }) {
                continue;
            }
            let path = components.join(&b'/');
            let places = self.links.take(&path, number, |place| self.tree.is_pending(&place.path, &path));
            if let Some((first, rest)) = places.split_first() {
                for place in places.iter().filter(|place| place.made) {
                    self.clear(place.directory, &place.name, &place.path)?;
                }
                let slot = self.create(&first.path, &entry, &mut |buffer| archive.read(buffer))?;
                for place in rest {
                    if !matches!(slot, Slot::Nothing(_)) {
                        self.sink.link(&first.path, &place.path)?;
                    }
                    self.tree.set(place.directory, &place.name, slot.clone());
                }
                self.tree.set(first.directory, &first.name, slot);
            }
        }
        for (path, target) in self.links.finish() {
            if self.tree.is_pending(&path, &target) {
                return Err(links::no_target(&path, &target));
            }
        }
        self.layer += 1;
        Ok(())
    }

    /// Puts a file of our own into the tree, in place of what is there, all layers having been added. Links on the way to
    /// it are followed, within the tree.
    pub fn put(&mut self, path: &[u8], mode: u16, content: &[u8]) -> Result<(), LayerError> {
        let (directory, parent, name) = self.place(path)?;
        let path = tree::join(&parent, name);
        self.clear(directory, name, &path)?;
        let attributes = Attributes { mode, ..Attributes::default() };
        let mut rest = content;
        let mut read = |buffer: &mut [u8]| {
            let (now, later) = rest.split_at(buffer.len().min(rest.len()));
            buffer[..now.len()].copy_from_slice(now);
            rest = later;
            Ok(())
        };
        let size = content.len() as u64;
        let extents = [Extent { offset: 0, length: size }];
        let extents = if size > 0 { &extents[..] } else { &[] };
        self.sink.file(&path, &attributes, Content { size, extents, read: &mut read })?;
        self.tree.set(directory, name, Slot::File(self.layer));
        Ok(())
    }

    /// Makes the directory `path`, with its parents, if nothing is there.
    pub fn ensure_directory(&mut self, path: &[u8]) -> Result<(), LayerError> {
        let below = [path, b"/x"].concat();
        self.place(&below).map(drop)
    }

    /// All is there: sets the attributes of the directories.
    pub fn finish(mut self) -> Result<S, LayerError> {
        let sink = &mut self.sink;
        self.tree.each_directory(|path, attributes| sink.attributes(path, attributes))?;
        Ok(self.sink)
    }

    /// The directory that `path` leads to, with its path in the tree, and the last name. What is missing is made; what is
    /// in the way and no directory goes.
    fn place<'p>(&mut self, path: &'p [u8]) -> Result<(DirectoryId, Vec<u8>, &'p [u8]), LayerError> {
        let problem = |problem: &'static str| LayerError::entry(path, problem);
        let components = components(path).map_err(problem)?;
        let Some((name, parents)) = components.split_last() else { return Err(problem("the root is no file")) };
        let mut left: Vec<Vec<u8>> = parents.iter().rev().map(|part| part.to_vec()).collect();
        let (mut directory, mut at) = (DirectoryId::ROOT, Vec::new());
        let mut links = 0;
        while let Some(part) = left.pop() {
            match &*part {
                b"" | b"." => continue,
                b".." => {
                    directory = self.tree.parent(directory);
                    at.truncate(at.iter().rposition(|&byte| byte == b'/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = tree::join(&at, &part);
            match self.tree.slot(directory, &part) {
                Some(Slot::Directory(id)) => (directory, at) = (*id, next),
                Some(Slot::Symlink(_, target)) => {
                    links += 1;
                    if links > MAX_LINKS || left.len() > 4096 {
                        return Err(problem("too many levels of symbolic links"));
                    }
                    if target.starts_with(b"/") {
                        (directory, at) = (DirectoryId::ROOT, Vec::new());
                    }
                    left.extend(target.split(|&byte| byte == b'/').rev().map(<[u8]>::to_vec));
                }
                _ => {
                    if components_too_long(&next) {
                        return Err(problem("its path is too long"));
                    }
                    self.clear(directory, &part, &next)?;
                    directory = self.make_directory(directory, &part, &next)?;
                    at = next;
                }
            }
        }
        Ok((directory, at, name))
    }

    /// Removes what has this name.
    fn clear(&mut self, directory: DirectoryId, name: &[u8], path: &[u8]) -> Result<(), LayerError> {
        match self.tree.slot(directory, name) {
            None | Some(Slot::Nothing(_) | Slot::Pending(_)) => {}
            Some(_) => self.sink.remove(path)?,
        }
        self.tree.remove(directory, name);
        Ok(())
    }

    /// Applies one entry; `read` delivers its content.
    fn apply(
        &mut self,
        entry: &Entry,
        read: &mut dyn FnMut(&mut [u8]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        let problem = |problem: &'static str| LayerError::entry(&entry.path, problem);
        self.count()?;
        let components = components(&entry.path).map_err(problem)?;
        let Some((name, parents)) = components.split_last() else {
            return match entry.kind {
                Kind::Directory => {
                    self.tree.set_attributes(DirectoryId::ROOT, attributes(entry), self.layer);
                    Ok(())
                }
                _ => Err(problem("the root of the layer can only be a directory")),
            };
        };
        let mut left_out = components.len() > 1 && components[0] == b"dev";
        for parent in parents {
            match Name::new(parent).map_err(problem)? {
                Name::Plain => {}
                Name::Aufs => left_out = true,
                Name::Opaque | Name::Whiteout(_) => return Err(problem("it is below a whiteout")),
            }
        }
        let name = match Name::new(name).map_err(problem)? {
            Name::Plain => Some(*name),
            Name::Aufs => None,
            Name::Opaque | Name::Whiteout(_) if left_out => return Ok(()),
            Name::Opaque => {
                let directory = self.enter(entry, parents)?;
                self.opaque.extend(directory);
                return Ok(());
            }
            Name::Whiteout(hidden) => {
                let directory = self.enter(entry, parents)?;
                self.whiteouts.extend(directory.map(|directory| (directory, hidden.into())));
                return Ok(());
            }
        };
        let path = components.join(&b'/');
        match name {
            Some(name) if !left_out => match self.enter(entry, parents)? {
                Some(directory) => self.add(directory, name, path, entry, read),
                None => self.skip(path, entry),
            },
            _ => self.skip(path, entry),
        }
    }

    /// The directory with this path, made where it is missing; none if an upper layer hides it.
    fn enter(&mut self, entry: &Entry, parents: &[&[u8]]) -> Result<Option<DirectoryId>, LayerError> {
        let mut directory = DirectoryId::ROOT;
        for (depth, name) in parents.iter().enumerate() {
            if self.tree.is_closed(directory) {
                return Ok(None);
            }
            let above = || parents[..=depth].join(&b'/');
            directory = match self.tree.find(directory, name, self.layer) {
                Found::Directory(id) => id,
                Found::Hidden => return Ok(None),
                Found::Mine => {
                    let above = above();
                    let problem = format!("it is below {}, which is not a directory", super::error::Quoted(&above));
                    return Err(LayerError::entry(&entry.path, problem));
                }
                Found::Gone => {
                    self.count()?;
                    let id = self.make_directory(directory, name, &above())?;
                    // What was there hid the directory that lower layers may have.
                    self.tree.set_attributes(id, tree::implied(), self.layer);
                    self.opaque.push(id);
                    id
                }
                Found::Free => {
                    self.count()?;
                    self.make_directory(directory, name, &above())?
                }
            };
        }
        Ok(Some(directory).filter(|directory| !self.tree.is_closed(*directory)))
    }

    fn make_directory(&mut self, parent: DirectoryId, name: &[u8], path: &[u8]) -> Result<DirectoryId, LayerError> {
        self.sink.directory(path)?;
        Ok(self.tree.add_directory(parent, name, self.layer))
    }

    /// Adds what no whiteout and not left out is.
    fn add(
        &mut self,
        parent: DirectoryId,
        name: &[u8],
        path: Vec<u8>,
        entry: &Entry,
        read: &mut dyn FnMut(&mut [u8]) -> Result<(), LayerError>,
    ) -> Result<(), LayerError> {
        if let Kind::HardLink { target } = &entry.kind
            && let Ok(names) = components(target)
            && self.links.follow(names.join(&b'/'), self.number).0 == path
        {
            // To itself.
            return Ok(());
        }
        let found = self.tree.find(parent, name, self.layer);
        if matches!(entry.kind, Kind::Directory) {
            let id = match found {
                Found::Hidden => return Ok(()),
                Found::Directory(id) => id,
                Found::Free => self.make_directory(parent, name, &path)?,
                Found::Mine | Found::Gone => {
                    // What was there hid what lower layers have.
                    self.clear(parent, name, &path)?;
                    let id = self.make_directory(parent, name, &path)?;
                    self.opaque.push(id);
                    id
                }
            };
            self.tree.set_attributes(id, attributes(entry), self.layer);
            return Ok(());
        }
        match found {
            Found::Hidden => return self.skip(path, entry),
            Found::Directory(id) if !self.tree.is_of(id, self.layer) => {
                // An upper layer has a directory here: it shows nothing of this layer's earlier ones, or of lower layers.
                for path in self.tree.purge(id, &path, self.layer) {
                    self.sink.remove(&path)?;
                }
                self.opaque.push(id);
                return self.skip(path, entry);
            }
            Found::Directory(_) | Found::Mine | Found::Gone => self.clear(parent, name, &path)?,
            Found::Free => {}
        }
        let slot = match &entry.kind {
            Kind::HardLink { target } => self.hard_link(parent, name, &path, entry, target)?,
            _ => self.create(&path, entry, read)?,
        };
        self.tree.set(parent, name, slot);
        Ok(())
    }

    /// Makes a file, symbolic link or pipe. Directories and hard links are not for this.
    fn create(
        &mut self,
        path: &[u8],
        entry: &Entry,
        read: &mut dyn FnMut(&mut [u8]) -> Result<(), LayerError>,
    ) -> Result<Slot, LayerError> {
        let attributes = attributes(entry);
        match &entry.kind {
            Kind::File { size } => {
                let extents = [Extent { offset: 0, length: *size }];
                let extents = if *size > 0 { &extents[..] } else { &[] };
                self.sink.file(path, &attributes, Content { size: *size, extents, read })?;
            }
            Kind::Sparse { size, extents } => {
                self.sink.file(path, &attributes, Content { size: *size, extents, read })?;
            }
            Kind::Symlink { target } => {
                if !(1..=SYMLINK_MAX).contains(&target.len()) || target.contains(&0) {
                    let problem = "a symbolic link to an empty, too long or invalid path";
                    return Err(LayerError::entry(&entry.path, problem));
                }
                self.sink.symlink(path, &attributes, target)?;
                return Ok(Slot::Symlink(self.layer, target.as_slice().into()));
            }
            Kind::Fifo => self.sink.fifo(path, &attributes)?,
            Kind::Device => return Ok(Slot::Nothing(self.layer)),
            Kind::Directory | Kind::HardLink { .. } => return Ok(Slot::Nothing(self.layer)),
        }
        Ok(Slot::File(self.layer))
    }

    /// Gives an earlier entry of this layer another name, now or later.
    fn hard_link(
        &mut self,
        parent: DirectoryId,
        name: &[u8],
        path: &[u8],
        entry: &Entry,
        target: &[u8],
    ) -> Result<Slot, LayerError> {
        let names = components(target).map_err(|_| links::no_target(&entry.path, target))?;
        let (target, number) = self.links.follow(names.join(&b'/'), self.number);
        let place = Place { directory: parent, name: name.into(), path: path.into(), number, made: false };
        match self.tree.lookup(&target, self.layer) {
            Some(slot @ (Slot::File(_) | Slot::Symlink(..))) => {
                let slot = slot.clone();
                self.sink.link(&target, path)?;
                Ok(slot)
            }
            Some(Slot::Nothing(layer)) => Ok(Slot::Nothing(*layer)),
            Some(Slot::Pending(of)) => {
                let of = of.clone();
                self.links.add_second(&of, &target, place);
                Ok(Slot::Pending(of))
            }
            Some(Slot::Directory(_)) => Err(LayerError::entry(&entry.path, "a hard link to a directory")),
            // Hidden or left out, or not there at all: then the second reading finds that out.
            None => {
                self.links.add(&target, place);
                Ok(Slot::Pending(target.into()))
            }
        }
    }

    /// An entry that the merged tree does not have.
    fn skip(&mut self, path: Vec<u8>, entry: &Entry) -> Result<(), LayerError> {
        let target = match &entry.kind {
            Kind::HardLink { target } => components(target).ok().map(|names| names.join(&b'/')),
            _ => None,
        };
        self.links.skipped(path, target, self.number);
        Ok(())
    }

    /// One more entry.
    fn count(&mut self) -> Result<(), LayerError> {
        self.entries += 1;
        if self.entries > self.limits.max_entries { Err(LayerError::TooManyEntries) } else { Ok(()) }
    }
}

fn components_too_long(path: &[u8]) -> bool {
    components(path).is_err()
}
