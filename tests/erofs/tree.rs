//! A file tree as plain data, so that an image, its mount and an unpacked archive can be compared.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;

/// By path without leading slash; the root is the empty path.
pub type Tree = BTreeMap<Vec<u8>, Node>;

/// A file, directory, link, …
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub kind: Kind,
    pub mode: u32,
    pub owner: (u32, u32),
    pub mtime: (i64, u32),
    pub nlink: u64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path with the same inode.
    pub same_as: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    File {
        size: u64,
        content: u64,
    },
    Directory,
    Symlink(Vec<u8>),
    Fifo,
    /// A character device 0:0.
    Whiteout,
    Device,
}

/// Hash of content, holes skipped: of all blocks that are not zeros, and their numbers.
#[derive(Debug, Default)]
pub struct Content(DefaultHasher);

impl Content {
    pub const BLOCK: u64 = 4096;

    /// `block` is whole but for the last one of the file.
    pub fn block(&mut self, number: u64, block: &[u8]) {
        if block.iter().any(|&byte| byte != 0) {
            (number, block).hash(&mut self.0);
        }
    }

    pub fn finish(&self) -> u64 {
        self.0.finish()
    }

    pub fn of(bytes: &[u8]) -> u64 {
        let mut content = Self::default();
        for (block, number) in bytes.chunks(Self::BLOCK as usize).zip(0..) {
            content.block(number, block);
        }
        content.finish()
    }

    fn of_file(file: &File) -> io::Result<u64> {
        use rustix::fs::{SeekFrom, seek};
        let mut content = Self::default();
        let mut at = 0;
        let mut buffer = vec![0; file.metadata()?.len().next_multiple_of(Self::BLOCK).min(1 << 20) as usize];
        while let Ok(data) = seek(file, SeekFrom::Data(at)) {
            let end = seek(file, SeekFrom::Hole(data))?;
            at = data / Self::BLOCK * Self::BLOCK;
            while at < end {
                let length = file.read_at(&mut buffer, at)?;
                if length == 0 {
                    break;
                }
                let whole =
                    if length == buffer.len() { length } else { length.next_multiple_of(4096).min(buffer.len()) };
                for (block, number) in buffer[..length].chunks(Self::BLOCK as usize).zip(at / Self::BLOCK..) {
                    content.block(number, block);
                }
                at += whole as u64;
            }
        }
        Ok(content.finish())
    }
}

/// Everything below `root`.
pub fn read(root: &Path) -> io::Result<Tree> {
    let mut tree = Tree::new();
    let mut inodes = HashMap::new();
    let mut pending = vec![(root.join("."), Vec::new())];
    while let Some((file, path)) = pending.pop() {
        let metadata = if path.is_empty() { file.metadata()? } else { file.symlink_metadata()? };
        let file_type = metadata.file_type();
        let kind = if file_type.is_dir() {
            for entry in file.read_dir()? {
                let name = entry?.file_name();
                let child = if path.is_empty() { Vec::new() } else { [&path[..], b"/"].concat() };
                pending.push((file.join(&name), [&child[..], name.as_bytes()].concat()));
            }
            Kind::Directory
        } else if file_type.is_symlink() {
            Kind::Symlink(file.read_link()?.as_os_str().as_bytes().to_vec())
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else if file_type.is_file() {
            Kind::File { size: metadata.len(), content: Content::of_file(&File::open(&file)?)? }
        } else if metadata.rdev() == 0 && file_type.is_char_device() {
            Kind::Whiteout
        } else {
            Kind::Device
        };
        let node = Node {
            xattrs: xattrs(&file, &kind)?,
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
            nlink: metadata.nlink(),
            same_as: Vec::new(),
            kind,
        };
        inodes.insert(path.clone(), (metadata.dev(), metadata.ino()));
        tree.insert(path, node);
    }
    link(&mut tree, &inodes);
    Ok(tree)
}

/// Fills in `same_as`.
pub fn link<I: Copy + Eq + Hash>(tree: &mut Tree, inodes: &HashMap<Vec<u8>, I>) {
    let mut first = HashMap::new();
    for (path, node) in tree {
        node.same_as.clone_from(first.entry(inodes[path]).or_insert_with(|| path.clone()));
    }
}

/// `user.*`, and what overlayfs marks directories with.
fn xattrs(path: &Path, kind: &Kind) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    if matches!(kind, Kind::File { .. } | Kind::Directory) {
        let mut names = vec![0; 65536];
        let length = match rustix::fs::llistxattr(path, &mut names) {
            // A squashfs image without any.
            Err(rustix::io::Errno::OPNOTSUPP) => 0,
            length => length?,
        };
        for name in names[..length].split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let mut value = vec![0; 65536];
            let length = rustix::fs::lgetxattr(path, std::ffi::CString::new(name)?, &mut value)?;
            xattrs.insert(name.to_vec(), value[..length].to_vec());
        }
    }
    Ok(xattrs)
}

/// Fails with the first few differences.
#[track_caller]
pub fn assert_same(left: &Tree, right: &Tree) {
    let paths = left.keys().chain(right.keys().filter(|path| !left.contains_key(*path)));
    let different: Vec<String> = paths
        .filter(|path| left.get(*path) != right.get(*path))
        .take(5)
        .map(|path| format!("{}:\n  {:?}\n  {:?}", path.escape_ascii(), left.get(path), right.get(path)))
        .collect();
    assert!(different.is_empty(), "{}", different.join("\n"));
}
