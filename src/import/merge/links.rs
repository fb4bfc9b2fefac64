//! Hard links to files that the merged tree does not have: which file of the present layer they need, and where it goes.

use std::collections::{HashMap, HashSet};

use super::super::error::{LayerError, Quoted};
use super::tree::DirectoryId;

/// A name that waits for its file.
#[derive(Debug, Clone)]
pub struct Place {
    pub directory: DirectoryId,
    pub name: Box<[u8]>,
    pub path: Vec<u8>,
    /// Number of the link among the layer's entries: what comes after it is not meant.
    pub number: u64,
    /// Whether it has a file. A later entry of the same path may still replace it.
    pub made: bool,
}

/// What the present layer's links need.
#[derive(Debug, Default)]
pub struct Links {
    /// Links that were skipped themselves: path to what [`Links::follow`] gives.
    skipped: HashMap<Vec<u8>, (Vec<u8>, u64)>,
    /// Path in the layer to the names that it is to have, in the order in which they came.
    wanted: HashMap<Vec<u8>, Vec<Place>>,
}

impl Links {
    /// What is hidden at `path`, the entry `number`, is a link to `target`, or no link.
    pub fn skipped(&mut self, path: Vec<u8>, target: Option<Vec<u8>>, number: u64) {
        match target.map(|target| self.follow(target, number)) {
            // The file itself.
            Some((target, _)) if target == path => {}
            Some(found) => drop(self.skipped.insert(path, found)),
            None => drop(self.skipped.remove(&path)),
        }
    }

    /// What the entry `number`, a link to `target`, is: the path of a file, and before which entry it was that.
    pub fn follow(&self, target: Vec<u8>, number: u64) -> (Vec<u8>, u64) {
        match self.skipped.get(&target) {
            Some((target, number)) => (target.clone(), *number),
            None => (target, number),
        }
    }

    /// `path` is to have the file that the layer has at `target`.
    pub fn add(&mut self, target: &[u8], place: Place) {
        self.wanted.entry(target.to_vec()).or_default().push(place);
    }

    /// `place` is to have what the place at `other` is to have, which is the file at `target`.
    pub fn add_second(&mut self, target: &[u8], other: &[u8], mut place: Place) {
        let places = self.wanted.entry(target.to_vec()).or_default();
        // The latest at that path: it has replaced the others.
        if let Some(first) = places.iter().rev().find(|place| place.path == other) {
            place.number = first.number;
        }
        places.push(place);
    }

    /// The layer has been read.
    pub fn end_of_stream(&mut self) {
        self.skipped.clear();
        for places in self.wanted.values_mut() {
            // Of links with one path only the last is there.
            let mut seen = HashSet::new();
            places.reverse();
            places.retain(|place| seen.insert(place.path.clone()));
            places.reverse();
        }
    }

    /// Whether nothing is wanted.
    pub fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// The names that the layer's entry `number`, a file at `path`, is to have. They have it from now on. Names that do not
    /// wait any more are forgotten.
    pub fn take(&mut self, path: &[u8], number: u64, waits: impl Fn(&Place) -> bool) -> Vec<Place> {
        let Some(places) = self.wanted.get_mut(path) else { return Vec::new() };
        places.retain(|place| place.made || waits(place));
        let meant = places.iter_mut().filter(|place| place.number > number);
        meant.map(|place| Place { made: std::mem::replace(&mut place.made, true), ..place.clone() }).collect()
    }

    /// Forgets everything. What has no file: paths and the targets that they wanted.
    pub fn finish(&mut self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let left = |(target, places): (Vec<u8>, Vec<Place>)| {
            let left = places.into_iter().filter(|place| !place.made);
            left.map(move |place| (place.path, target.clone())).collect::<Vec<_>>()
        };
        self.wanted.drain().flat_map(left).collect()
    }
}

/// A link to nothing.
pub fn no_target(path: &[u8], target: &[u8]) -> LayerError {
    let problem = format!("hard link to {}, which is not among the entries before it", Quoted(target));
    LayerError::entry(path, problem)
}
