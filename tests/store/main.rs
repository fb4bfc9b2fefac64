//! The layer store and imports into it: several processes, several users, hostile importers, full and read-only disks.
//!
//! No kernel is faked: the tests run as root on real file systems, with real locks and processes. What is not real, except
//! in `real`, is the importer at the other end of the broker's channel.

mod acquire;
mod command;
mod disk;
mod fake;
mod hostile;
mod local;
mod policy;
mod processes;
mod random;
mod real;

use std::fs;
use std::io;
use std::path::Path;

use spank_pyxis::broker::import::{
    AcquireRequest, AcquiredImage, ImportError, ImportEvent, ImportSettings, StartImporter, acquire_through,
};
use spank_pyxis::image::digest::Digest;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::request::{Environment, User};
use spank_pyxis::store::{Goal, PinnedMounts, Store, Watermark, Watermarks};
use tempfile::TempDir;

/// A node without mounts.
#[derive(Debug)]
pub struct NoMounts;

impl PinnedMounts for NoMounts {
    fn release(&self, _: &Digest) -> io::Result<()> {
        Ok(())
    }
}

/// A store in a directory of its own.
#[derive(Debug)]
pub struct Site {
    pub directory: TempDir,
    pub store: Store,
    pub settings: ImportSettings,
}

pub fn site() -> Site {
    assert!(rustix::process::geteuid().is_root(), "the store's tests must run as root");
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    Site { directory, store, settings: settings() }
}

/// Never collects by itself.
pub fn settings() -> ImportSettings {
    let all = Watermark::Bytes(u64::MAX);
    ImportSettings { watermarks: Watermarks { high: all, low: all }, ..ImportSettings::default() }
}

impl Site {
    pub fn acquire(&self, importer: &dyn StartImporter, uid: u32, image: &str) -> Result<AcquiredImage, ImportError> {
        self.acquire_with(importer, uid, image, &mut |_| {})
    }

    pub fn acquire_with(
        &self,
        importer: &dyn StartImporter,
        uid: u32,
        image: &str,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<AcquiredImage, ImportError> {
        let user = User { uid, gid: uid, groups: vec![] };
        let reference = ImageReference::parse(image).unwrap();
        let environment = Environment::default();
        let request = AcquireRequest { user: &user, reference: &reference, environment: &environment };
        acquire_through(importer, &self.store, &self.settings, request, &NoMounts, &[], events)
    }

    /// Names of the layers in the store.
    pub fn layers(&self) -> Vec<String> {
        names(&self.store.path().join("layers/sha256"))
    }

    /// What killed processes left is gone after a collection.
    pub fn assert_tidy_after_collection(&self) {
        self.store.collect(Goal::Available(0), &NoMounts, false).unwrap();
        self.assert_tidy();
    }

    /// Nothing is half done: no temporary file, no lock.
    pub fn assert_tidy(&self) {
        let mut directories = vec![self.store.path().to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).unwrap() {
                let entry = entry.unwrap();
                assert!(!entry.file_name().to_string_lossy().starts_with(".tmp-"), "{:?}", entry.path());
                if entry.file_type().unwrap().is_dir() {
                    directories.push(entry.path());
                }
            }
        }
        assert!(names(&self.store.path().join("locks")).is_empty());
    }
}

pub fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
