//! The names of the merged tree, and what lower layers cannot add to it.

use std::collections::BTreeMap;

use crate::erofs::Attributes;

/// A layer: 0 is the topmost.
pub type Layer = usize;

/// A directory of the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DirectoryId(usize);

impl DirectoryId {
    pub const ROOT: Self = Self(0);
}

/// What a name stands for, and which layer it is from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Slot {
    Directory(DirectoryId),
    /// A regular file or a pipe.
    File(Layer),
    /// With its target.
    Symlink(Layer, Box<[u8]>),
    /// Nothing, and lower layers do not change that: a whiteout, or a device.
    Nothing(Layer),
    /// A hard link of the present layer to the file with this path, which is not there yet.
    Pending(Box<[u8]>),
}

/// What an entry of a layer finds under its name.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// Nothing.
    Free,
    /// A directory.
    Directory(DirectoryId),
    /// An earlier entry of the same layer, no directory.
    Mine,
    /// An earlier entry of the same layer that is not shown.
    Gone,
    /// What an upper layer has there, or has removed.
    Hidden,
}

#[derive(Debug)]
struct Directory {
    parent: DirectoryId,
    entries: BTreeMap<Box<[u8]>, Slot>,
    /// The layer that had it first.
    layer: Layer,
    /// From the uppermost layer that has any.
    attributes: Option<(Layer, Attributes)>,
    /// Lower layers add nothing.
    closed: bool,
}

/// The tree.
#[derive(Debug)]
pub struct Tree {
    directories: Vec<Directory>,
}

impl Tree {
    pub fn new() -> Self {
        let mut tree = Self { directories: Vec::new() };
        tree.push(DirectoryId::ROOT, 0);
        tree
    }

    fn push(&mut self, parent: DirectoryId, layer: Layer) -> DirectoryId {
        let id = DirectoryId(self.directories.len());
        self.directories.push(Directory { parent, entries: BTreeMap::new(), layer, attributes: None, closed: false });
        id
    }

    fn get(&self, id: DirectoryId) -> &Directory {
        // Ids come from this tree, which forgets no directory.
        &self.directories[id.0]
    }

    fn get_mut(&mut self, id: DirectoryId) -> &mut Directory {
        &mut self.directories[id.0]
    }

    pub fn parent(&self, id: DirectoryId) -> DirectoryId {
        self.get(id).parent
    }

    pub fn slot(&self, id: DirectoryId, name: &[u8]) -> Option<&Slot> {
        self.get(id).entries.get(name)
    }

    pub fn set(&mut self, id: DirectoryId, name: &[u8], slot: Slot) {
        self.get_mut(id).entries.insert(name.into(), slot);
    }

    pub fn remove(&mut self, id: DirectoryId, name: &[u8]) {
        self.get_mut(id).entries.remove(name);
    }

    /// What an entry called `name` of `layer` finds in `id`.
    pub fn find(&self, id: DirectoryId, name: &[u8], layer: Layer) -> Found {
        match self.slot(id, name) {
            None if self.is_closed(id) => Found::Hidden,
            None => Found::Free,
            Some(Slot::Directory(id)) => Found::Directory(*id),
            Some(Slot::Pending(_)) => Found::Mine,
            Some(Slot::File(of) | Slot::Symlink(of, _)) if *of == layer => Found::Mine,
            Some(Slot::Nothing(of)) if *of == layer => Found::Gone,
            Some(_) => Found::Hidden,
        }
    }

    /// What `layer` has at `path`, if that is shown.
    pub fn lookup(&self, path: &[u8], layer: Layer) -> Option<&Slot> {
        let mut slot: Option<&Slot> = None;
        let mut directory = DirectoryId::ROOT;
        for name in path.split(|&byte| byte == b'/') {
            if let Some(found) = slot {
                let Slot::Directory(id) = found else { return None };
                directory = *id;
            }
            slot = Some(self.slot(directory, name)?);
        }
        slot.filter(|slot| match slot {
            Slot::Directory(id) => self.get(*id).layer == layer,
            Slot::File(of) | Slot::Symlink(of, _) | Slot::Nothing(of) => *of == layer,
            Slot::Pending(_) => true,
        })
    }

    /// Whether `path` waits for the file that its layer has at `target`.
    pub fn is_pending(&self, path: &[u8], target: &[u8]) -> bool {
        // Only what the present layer has is pending.
        matches!(self.lookup(path, Layer::MAX), Some(Slot::Pending(of)) if **of == *target)
    }

    /// Adds a directory in place of what has its name.
    pub fn add_directory(&mut self, parent: DirectoryId, name: &[u8], layer: Layer) -> DirectoryId {
        let id = self.push(parent, layer);
        self.set(parent, name, Slot::Directory(id));
        id
    }

    /// Whether the directory is new with `layer`.
    pub fn is_of(&self, id: DirectoryId, layer: Layer) -> bool {
        self.get(id).layer == layer
    }

    pub fn is_closed(&self, id: DirectoryId) -> bool {
        self.get(id).closed
    }

    /// Lower layers add nothing to the directory.
    pub fn close(&mut self, id: DirectoryId) {
        self.get_mut(id).closed = true;
    }

    /// Lower layers' `name` is not shown.
    pub fn hide(&mut self, id: DirectoryId, name: Box<[u8]>, layer: Layer) {
        match self.slot(id, &name) {
            Some(Slot::Directory(below)) => {
                let below = *below;
                self.close(below);
                // Those of lower layers are of another directory.
                self.get_mut(below).attributes.get_or_insert_with(|| (layer, implied()));
            }
            Some(_) => {}
            None => {
                self.get_mut(id).entries.insert(name, Slot::Nothing(layer));
            }
        }
    }

    /// Sets the attributes, unless those of an upper layer are known. Of one layer's the last ones count.
    pub fn set_attributes(&mut self, id: DirectoryId, attributes: Attributes, layer: Layer) {
        let directory = self.get_mut(id);
        if directory.attributes.as_ref().is_none_or(|(of, _)| *of == layer) {
            directory.attributes = Some((layer, attributes));
        }
    }

    /// `layer` has no directory any more at `path`, which is `id`: forgets what it has added there, and says where that is.
    pub fn purge(&mut self, id: DirectoryId, path: &[u8], layer: Layer) -> Vec<Vec<u8>> {
        let mut gone = Vec::new();
        let mut left = vec![(id, path.to_vec())];
        let top = id;
        while let Some((id, path)) = left.pop() {
            let mut below = Vec::new();
            let attributes = &mut self.get_mut(id).attributes;
            attributes.take_if(|(of, _)| *of == layer);
            if id == top {
                // Those of lower layers are of another directory.
                attributes.get_or_insert_with(|| (layer, implied()));
            }
            let mut entries = std::mem::take(&mut self.get_mut(id).entries);
            entries.retain(|name, slot| {
                let shown = match slot {
                    Slot::Directory(id) if !self.is_of(*id, layer) => {
                        below.push((*id, join(&path, name)));
                        return true;
                    }
                    Slot::File(of) | Slot::Symlink(of, _) | Slot::Nothing(of) if *of != layer => return true,
                    Slot::Directory(_) | Slot::File(_) | Slot::Symlink(..) => true,
                    Slot::Nothing(_) | Slot::Pending(_) => false,
                };
                if shown {
                    gone.push(join(&path, name));
                }
                false
            });
            self.get_mut(id).entries = entries;
            left.extend(below);
        }
        gone
    }

    /// Calls `with` for each directory, the root first, until it fails.
    pub fn each_directory<E>(&self, mut with: impl FnMut(&[u8], &Attributes) -> Result<(), E>) -> Result<(), E> {
        let implied = implied();
        let mut left = vec![(DirectoryId::ROOT, Vec::new())];
        while let Some((id, path)) = left.pop() {
            let directory = self.get(id);
            with(&path, directory.attributes.as_ref().map_or(&implied, |(_, attributes)| attributes))?;
            left.extend(directory.entries.iter().filter_map(|(name, slot)| match slot {
                Slot::Directory(id) => Some((*id, join(&path, name))),
                _ => None,
            }));
        }
        Ok(())
    }
}

/// The attributes of a directory that no layer describes.
pub fn implied() -> Attributes {
    Attributes { mode: 0o755, ..Attributes::default() }
}

/// `directory/name`; the root is the empty path.
pub fn join(directory: &[u8], name: &[u8]) -> Vec<u8> {
    match directory.is_empty() {
        true => name.to_vec(),
        false => [directory, b"/", name].concat(),
    }
}
