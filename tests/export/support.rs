//! Images and their judges.

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::UnmountFlags;
use spank_pyxis::squashfs::reader;
use spank_pyxis::squashfs::writer::{Attributes, Options, Writer};
use tempfile::{NamedTempFile, TempDir};

use crate::contents;
use crate::tree::{self, Tree};

/// Attributes without anything special.
pub fn plain(mode: u16) -> Attributes {
    Attributes { mode, mtime: 1_700_000_000, xattrs: Vec::new() }
}

/// Options as text, one thread more than needed to have several.
#[track_caller]
pub fn options(text: &str) -> Options {
    let (options, unknown) = Options::parse(text).unwrap();
    assert!(unknown.is_empty(), "{unknown:?}");
    Options { threads: 3, time: Some(1_800_000_000), ..options }
}

/// An image in a file.
#[derive(Debug)]
pub struct Image(pub NamedTempFile);

impl Image {
    /// What `fill` writes.
    #[track_caller]
    pub fn new(options: &Options, fill: impl FnOnce(&mut Writer)) -> Self {
        let file = NamedTempFile::new().unwrap();
        let mut writer = Writer::new(file.reopen().unwrap(), options).unwrap();
        fill(&mut writer);
        writer.finish().unwrap();
        Self(file)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.path()).unwrap()
    }

    /// What unsquashfs says about it.
    pub fn listing(&self, option: &str) -> String {
        let output = run(Command::new("unsquashfs").args([option]).arg(self.path()));
        String::from_utf8(output).unwrap()
    }

    /// What unsquashfs unpacks. It stores no link counts of its own.
    #[track_caller]
    pub fn unpacked(&self) -> Tree {
        let directory = TempDir::new_in("/var/tmp").unwrap();
        run(Command::new("unsquashfs")
            .args(["-no-progress", "-user-xattrs", "-dest"])
            .arg(directory.path().join("root"))
            .arg(self.path()));
        tree::read(&directory.path().join("root")).unwrap()
    }

    /// Mounts it.
    #[track_caller]
    pub fn mount(&self) -> Mounted {
        let directory = TempDir::new().unwrap();
        run(Command::new("mount").args(["-t", "squashfs", "-o", "ro,loop"]).arg(self.path()).arg(directory.path()));
        Mounted(directory)
    }

    /// What our own reader finds in it.
    #[track_caller]
    pub fn read(&self) -> Tree {
        let image = reader::Image::open(self.0.reopen().unwrap()).unwrap();
        contents::read(&image).unwrap()
    }

    /// What all of them find in it.
    #[track_caller]
    pub fn judged(&self) -> Tree {
        let mounted = tree::read(&self.mount().path()).unwrap();
        tree::assert_same(&self.unpacked(), &mounted);
        tree::assert_same(&self.read(), &mounted);
        mounted
    }
}

/// A mounted image; gone when dropped.
#[derive(Debug)]
pub struct Mounted(TempDir);

impl Mounted {
    pub fn path(&self) -> PathBuf {
        self.0.path().to_owned()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(self.0.path(), UnmountFlags::DETACH);
    }
}

/// Runs a command that must succeed.
#[track_caller]
pub fn run(command: &mut Command) -> Vec<u8> {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; apt-get install squashfs-tools mount"));
    assert!(
        output.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    output.stdout
}

/// Bytes that compress a little.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        bytes.extend_from_slice(&state.to_be_bytes()[..5]);
        bytes.extend_from_slice(b"abc");
    }
    bytes.truncate(length);
    bytes
}
