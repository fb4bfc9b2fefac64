//! The names of an image, in memory.

use std::collections::BTreeMap;

use super::blocks::DataId;
use super::{Attributes, Error, NAME_MAX, Special, text};

/// An inode: an index into the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NodeId(u32);

impl NodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// The entries of a directory, in the order in which they are stored.
pub type Entries = BTreeMap<Box<[u8]>, NodeId>;

/// What an inode is.
#[derive(Debug)]
pub enum Kind {
    /// A directory.
    Directory(Entries),
    /// A regular file.
    File(DataId),
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// Anything else.
    Special(Special),
}

/// An inode.
#[derive(Debug)]
pub struct Node {
    /// Permissions, time, extended attributes.
    pub attributes: Attributes,
    /// What it is.
    pub kind: Kind,
    /// Names of it; 1 for a directory.
    pub links: u32,
}

/// All inodes of an image.
#[derive(Debug)]
pub struct Tree {
    nodes: Vec<Node>,
}

impl Tree {
    /// A tree with a root directory only.
    pub fn new(root: Attributes) -> Self {
        Self { nodes: vec![Node { attributes: root, kind: Kind::Directory(Entries::new()), links: 1 }] }
    }

    /// The inode.
    pub fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id.index()]
    }

    /// Number of inodes.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The inode at `path`.
    pub fn find(&self, path: &[u8]) -> Option<NodeId> {
        components(path).try_fold(NodeId::ROOT, |id, name| match &self.node(id).kind {
            Kind::Directory(entries) => entries.get(name).copied(),
            _ => None,
        })
    }

    /// Adds an inode at `path`, where nothing may be.
    pub fn add(&mut self, path: &[u8], attributes: Attributes, kind: Kind, now: u32) -> Result<NodeId, Error> {
        let (parent, name) = self.place(path, now)?;
        let id = self.new_node(attributes, kind)?;
        self.name(parent, name, id);
        Ok(id)
    }

    /// Adds a directory, or gives the one that is there these attributes.
    pub fn directory(&mut self, path: &[u8], attributes: Attributes, now: u32) -> Result<(), Error> {
        match self.find(path) {
            Some(id) if matches!(self.node(id).kind, Kind::Directory(_)) => {
                self.nodes[id.index()].attributes = attributes;
                Ok(())
            }
            _ => self.add(path, attributes, Kind::Directory(Entries::new()), now).map(drop),
        }
    }

    /// Gives the inode at `target` another name.
    pub fn link(&mut self, path: &[u8], target: &[u8], now: u32) -> Result<(), Error> {
        let id = self.find(target).filter(|id| !matches!(self.node(*id).kind, Kind::Directory(_)));
        let id = id.ok_or_else(|| Error::NoTarget(text(target)))?;
        let (parent, name) = self.place(path, now)?;
        self.name(parent, name, id);
        self.nodes[id.index()].links += 1;
        Ok(())
    }

    /// Takes the name `path` away, and all names below.
    pub fn remove(&mut self, path: &[u8]) {
        let mut names = components(path).peekable();
        let mut directory = NodeId::ROOT;
        let mut gone = Vec::new();
        while let Some(name) = names.next() {
            let Kind::Directory(entries) = &mut self.nodes[directory.index()].kind else { return };
            if names.peek().is_none() {
                gone.extend(entries.remove(name));
            } else if let Some(&id) = entries.get(name) {
                directory = id;
            } else {
                return;
            }
        }
        while let Some(id) = gone.pop() {
            let node = &mut self.nodes[id.index()];
            node.links -= 1;
            if let Kind::Directory(entries) = &mut node.kind {
                gone.extend(std::mem::take(entries).into_values());
            }
        }
    }

    /// The directory that `path` is in, made if it is missing, and the last name of `path`, which is free in it.
    fn place<'a>(&mut self, path: &'a [u8], now: u32) -> Result<(NodeId, &'a [u8]), Error> {
        let invalid = |name: &[u8]| name == b".." || name.len() > NAME_MAX || name.contains(&0);
        if components(path).any(invalid) {
            return Err(Error::Path(text(path)));
        }
        let mut names = components(path);
        let Some(mut name) = names.next() else { return Err(Error::Exists("/".into())) };
        let mut parent = NodeId::ROOT;
        for next in names {
            parent = match self.child(parent, name, path)? {
                Some(id) => id,
                None => {
                    let attributes = Attributes { mode: 0o755, mtime: now.into(), xattrs: Vec::new() };
                    let id = self.new_node(attributes, Kind::Directory(Entries::new()))?;
                    self.name(parent, name, id);
                    id
                }
            };
            name = next;
        }
        match self.child(parent, name, path)? {
            Some(_) => Err(Error::Exists(text(path))),
            None => Ok((parent, name)),
        }
    }

    /// The entry `name` of `parent`, which has to be a directory.
    fn child(&self, parent: NodeId, name: &[u8], path: &[u8]) -> Result<Option<NodeId>, Error> {
        match &self.node(parent).kind {
            Kind::Directory(entries) => Ok(entries.get(name).copied()),
            _ => Err(Error::Exists(text(path))),
        }
    }

    fn new_node(&mut self, attributes: Attributes, kind: Kind) -> Result<NodeId, Error> {
        // Inode numbers begin with 1.
        let id = u32::try_from(self.nodes.len()).ok().filter(|id| *id < u32::MAX - 1);
        let id = id.ok_or_else(|| Error::Write(std::io::Error::other("too many files")))?;
        self.nodes.push(Node { attributes, kind, links: 1 });
        Ok(NodeId(id))
    }

    fn name(&mut self, parent: NodeId, name: &[u8], id: NodeId) {
        if let Kind::Directory(entries) = &mut self.nodes[parent.index()].kind {
            entries.insert(name.into(), id);
        }
    }
}

/// The names in a path.
fn components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|&byte| byte == b'/').filter(|name| !name.is_empty() && *name != b".")
}
