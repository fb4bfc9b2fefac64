//! Walking through a whole image.

use std::collections::HashSet;

use super::directory::Entries;
use super::inode::{Inode, InodeRef};
use super::{Entry, Error, Image};

/// Deepest nesting of directories: what `PATH_MAX` allows.
const MAX_DEPTH: usize = 2048;

/// Goes through everything below the root, each directory before what is in it. A directory that is in two places, so
/// also one that is inside itself, is an error. Memory: 16 bytes for each directory, an open listing for each level.
#[derive(Debug)]
pub struct Walk<'a> {
    image: &'a Image,
    /// The listings from the root down to where we are.
    open: Vec<Entries<'a>>,
    /// A directory that was just visited, and comes next.
    enter: Option<Inode>,
    seen: HashSet<InodeRef>,
    left: u64,
    limit: u64,
}

/// What [`Walk`] comes to.
#[derive(Debug, Clone)]
pub struct Visit {
    /// How many directories it is below the root: 0 for what is in the root.
    pub depth: usize,
    /// Its name and type.
    pub entry: Entry,
    /// What it is.
    pub inode: Inode,
}

impl Image {
    /// Walks through the image; more than `limit` names are an error.
    pub fn walk(&self, limit: u64) -> Result<Walk<'_>, Error> {
        let root = self.inode(self.root())?;
        let seen = HashSet::from([root.reference]);
        Ok(Walk { image: self, open: Vec::new(), enter: Some(root), seen, left: limit, limit })
    }
}

impl Walk<'_> {
    fn step(&mut self) -> Result<Option<Visit>, Error> {
        if let Some(directory) = self.enter.take() {
            if self.open.len() >= MAX_DEPTH {
                return Err(Error::damaged("directory", directory.reference.number(), "too deep"));
            }
            self.open.push(self.image.read_dir(&directory)?);
        }
        let entry = loop {
            let Some(entries) = self.open.last_mut() else { return Ok(None) };
            match entries.next() {
                Some(entry) => break entry?,
                None => self.open.pop(),
            };
        };
        self.left = self.left.checked_sub(1).ok_or(Error::TooManyEntries(self.limit))?;
        let inode = self.image.inode(entry.inode)?;
        if inode.is_directory() {
            if !self.seen.insert(inode.reference) {
                return Err(Error::damaged("directory", inode.reference.number(), "it is in two places"));
            }
            self.enter = Some(inode.clone());
        }
        Ok(Some(Visit { depth: self.open.len() - 1, entry, inode }))
    }
}

impl Iterator for Walk<'_> {
    type Item = Result<Visit, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        let visit = self.step().transpose();
        if matches!(visit, Some(Err(_))) {
            self.open.clear();
            self.enter = None;
        }
        visit
    }
}
