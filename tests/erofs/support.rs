//! Images, mounts and archives for the tests of this binary, which run as root.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use spank_pyxis::import::{LayerError, LayerLimits, LayerSummary, write_layer};
use spank_pyxis::sys::{loopdev, mount::FsContext};
use tempfile::NamedTempFile;

use crate::tree::Tree;
use crate::{reader, tree};

pub const LIMITS: LayerLimits = LayerLimits { max_bytes: 1 << 40, max_entries: 1_000_000 };

/// A layer image in a file.
#[derive(Debug)]
pub struct Image {
    pub file: NamedTempFile,
    pub summary: LayerSummary,
}

impl Image {
    /// Of a layer that must be fine.
    #[track_caller]
    pub fn new(tar: impl Read) -> Self {
        Self::try_new(tar, &LIMITS).unwrap()
    }

    pub fn try_new(tar: impl Read, limits: &LayerLimits) -> Result<Self, LayerError> {
        let file = NamedTempFile::new().unwrap();
        let summary = write_layer(tar, file.as_file(), limits)?;
        assert_eq!(file.as_file().metadata().unwrap().len(), summary.image);
        Ok(Self { file, summary })
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut file = self.file.as_file();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    }

    /// What our own reader finds in it.
    #[track_caller]
    pub fn tree(&self) -> Tree {
        reader::read(&self.bytes()).unwrap()
    }

    /// Asks `fsck.erofs`, which also reads all content.
    #[track_caller]
    pub fn fsck(&self) {
        run(Command::new("fsck.erofs").arg("--extract").arg(self.file.path()), "apt-get install erofs-utils");
    }

    /// Mounts it, as layers are mounted.
    pub fn mount(&self) -> Mounted {
        assert!(rustix::process::geteuid().is_root(), "this test mounts file systems: run it as root");
        let mount = || {
            let context = FsContext::open("erofs")?;
            context.set("source", self.file.path().to_str().unwrap())?;
            context.flag("directio")?;
            context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
        };
        let mount = mount().or_else(|error| match error.errno() {
            Some(Errno::NOTBLK | Errno::INVAL) => {
                loopdev::mount(self.file.as_file().as_fd(), "erofs", MountAttrFlags::MOUNT_ATTR_RDONLY)
            }
            _ => Err(error),
        });
        Mounted(mount.unwrap())
    }

    /// What the kernel finds in it, after `fsck.erofs` and our own reader agreed with the kernel.
    #[track_caller]
    pub fn judged(&self) -> Tree {
        self.fsck();
        let mounted = tree::read(&self.mount().path()).unwrap();
        tree::assert_same(&self.tree(), &mounted);
        mounted
    }
}

/// A detached mount; gone when dropped.
#[derive(Debug)]
pub struct Mounted(pub OwnedFd);

impl Mounted {
    pub fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// Runs a command that must succeed.
#[track_caller]
pub fn run(command: &mut Command, install: &str) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}; {install}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// What GNU tar makes of an archive, as it would look in an image.
#[track_caller]
pub fn unpacked(archive: &[u8]) -> Tree {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    unpack(archive, directory.path());
    as_in_an_image(tree::read(directory.path()).unwrap())
}

/// Unpacks an archive with GNU tar.
#[track_caller]
pub fn unpack(archive: &[u8], directory: &Path) {
    let mut tar = Command::new("tar")
        .args(["--extract", "--preserve-permissions", "--same-owner", "--numeric-owner", "--delay-directory-restore"])
        .arg("--warning=no-timestamp")
        .args(["--xattrs", "--xattrs-include=user.*", "--directory"])
        .arg(directory)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    tar.stdin.take().unwrap().write_all(archive).unwrap();
    assert!(tar.wait().unwrap().success());
}

/// Creates a file, and gives it back to be filled.
pub fn create(path: PathBuf) -> File {
    File::create_new(path).unwrap()
}

/// What an unpacked layer looks like in an image: owners, the owner's permissions, no devices, an empty `/dev`.
pub fn as_in_an_image(mut tree: Tree) -> Tree {
    tree.retain(|path, node| {
        !path.starts_with(b"dev/") && !matches!(node.kind, tree::Kind::Device | tree::Kind::Whiteout)
    });
    for node in tree.values_mut() {
        node.owner = (0, 0);
        node.mode |= match node.kind {
            tree::Kind::Directory => 0o700,
            tree::Kind::Symlink(_) => 0o777,
            _ if node.mode & 0o111 != 0 => 0o500,
            _ => 0o400,
        };
        node.xattrs.retain(|name, _| name.starts_with(b"user."));
    }
    tree
}
