//! Images for the tests of this binary.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::MountAttrFlags;
use spank_pyxis::squashfs::reader::{self, FileType, Image, Inode};
use spank_pyxis::sys::loopdev;
use tempfile::TempDir;

use crate::tree::{self, Content, Kind, Node, Tree};

pub const INSTALL: &str = "apt-get install squashfs-tools";
pub const LIMIT: u64 = 1_000_000;

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

/// All that is in an image.
pub fn read(image: &Image) -> Result<Tree, reader::Error> {
    let (mut tree, mut inodes) = (Tree::new(), HashMap::new());
    let root = image.inode(image.root())?;
    inodes.insert(Vec::new(), root.reference);
    tree.insert(Vec::new(), node(image, &root)?);
    let mut names: Vec<Box<[u8]>> = Vec::new();
    for visit in image.walk(LIMIT)? {
        let visit = visit?;
        names.truncate(visit.depth);
        names.push(visit.entry.name);
        assert_eq!(visit.entry.number, visit.inode.number);
        assert_eq!(visit.entry.file_type, visit.inode.file_type());
        let path = names.join(&b'/');
        inodes.insert(path.clone(), visit.inode.reference);
        tree.insert(path, node(image, &visit.inode)?);
    }
    tree::link(&mut tree, &inodes);
    Ok(tree)
}

fn node(image: &Image, inode: &Inode) -> Result<Node, reader::Error> {
    let kind = match inode.file_type() {
        FileType::Regular => Kind::File { size: inode.size(), content: content(image, inode)? },
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink(image.read_link(inode)?),
        FileType::Fifo => Kind::Fifo,
        FileType::Character if inode.device() == Some((0, 0)) => Kind::Whiteout,
        FileType::Character | FileType::Block | FileType::Socket => Kind::Device,
    };
    let xattrs = match kind {
        Kind::File { .. } | Kind::Directory => image.xattrs(inode)?,
        _ => Vec::new(),
    };
    Ok(Node {
        kind,
        mode: inode.permissions.into(),
        owner: (inode.uid, inode.gid),
        mtime: (inode.mtime.into(), 0),
        nlink: inode.nlink.into(),
        xattrs: xattrs.into_iter().map(|xattr| (xattr.name, xattr.value)).collect(),
        same_as: Vec::new(),
    })
}

/// The content, read in odd pieces; what is in no extent must be zeros.
fn content(image: &Image, inode: &Inode) -> Result<u64, reader::Error> {
    let file = image.file(inode)?;
    let mut content = Content::default();
    let mut buffer = vec![0; (37 * Content::BLOCK).min(file.size() + 1) as usize];
    for (offset, length) in image.data_extents(&file)? {
        let mut at = offset;
        while at < offset + length {
            let wanted = buffer.len().min((offset + length - at) as usize);
            let read = image.read_at(&file, at, &mut buffer[..wanted])?;
            assert_eq!(read, wanted);
            for (block, number) in buffer[..read].chunks(Content::BLOCK as usize).zip(at / Content::BLOCK..) {
                content.block(number, block);
            }
            at += read as u64;
        }
    }
    assert_eq!(image.read_at(&file, file.size(), &mut buffer)?, 0);
    Ok(content.finish())
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
