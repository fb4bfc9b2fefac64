//! Images for the tests of this binary.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::MountAttrFlags;
use spank_pyxis::squashfs::reader::Image;
use spank_pyxis::sys::loopdev;
use tempfile::TempDir;

pub use crate::contents::read;
use crate::tree::{self, Tree};

pub const INSTALL: &str = "apt-get install squashfs-tools";

/// A directory to be packed, on a file system with extended attributes and holes, and the images of it.
#[derive(Debug)]
pub struct Source {
    root: TempDir,
    images: TempDir,
}

impl Source {
    pub fn new() -> Self {
        let directory = || tempfile::tempdir_in("/var/tmp").unwrap();
        Self { root: directory(), images: directory() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn file(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, content).unwrap();
        path
    }

    pub fn directory(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir(&path).unwrap();
        path
    }

    pub fn tree(&self) -> Tree {
        whole_seconds(tree::read(self.root.path()).unwrap())
    }

    /// Packs it with mksquashfs and these options.
    #[track_caller]
    pub fn pack(&self, options: &[&str]) -> PathBuf {
        let image = self.images.path().join("x.sqsh");
        let fixed = ["-noappend", "-no-progress", "-quiet", "-processors", "2"];
        run(Command::new("mksquashfs").arg(self.root.path()).arg(&image).args(fixed).args(options));
        image
    }

    /// Packs it; what we read is what was packed.
    #[track_caller]
    pub fn round_trip(&self, options: &[&str]) -> Image {
        let image = open(&self.pack(options));
        tree::assert_same(&read(&image).unwrap(), &self.tree());
        image
    }
}

pub fn open(path: &Path) -> Image {
    Image::open(File::open(path).unwrap()).unwrap()
}

/// Bytes that compress, but not to nothing.
pub fn text(bytes: usize) -> Vec<u8> {
    let mut state = 12345_u32;
    let mut word = || {
        state = state.wrapping_mul(1_103_515_245).wrapping_add(12345);
        (state >> 16) as u8 & 15
    };
    (0..bytes).map(|_| b'a' + word()).collect()
}

/// Bytes that do not compress.
pub fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut byte = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..bytes).map(|_| byte()).collect()
}

/// Squashfs keeps no fractions.
pub fn whole_seconds(mut tree: Tree) -> Tree {
    for node in tree.values_mut() {
        node.mtime.1 = 0;
    }
    tree
}

/// What the kernel finds in an image.
pub fn mounted(image: &Path) -> Tree {
    assert!(rustix::process::geteuid().is_root(), "this test mounts file systems: run it as root");
    let file = File::open(image).unwrap();
    let mount = loopdev::mount(file.as_fd(), "squashfs", MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap();
    tree::read(Path::new(&format!("/proc/self/fd/{}", mount.as_raw_fd()))).unwrap()
}

/// What unsquashfs makes of an image.
pub fn unpacked(image: &Path) -> Tree {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let target = directory.path().join("root");
    run(Command::new("unsquashfs").args(["-no-progress", "-quiet", "-dest"]).arg(&target).arg(image));
    tree::read(&target).unwrap()
}

/// Runs a command that must succeed.
#[track_caller]
pub fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; {INSTALL}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}
