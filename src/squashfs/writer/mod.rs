//! Writes squashfs images: for `--container-save`, `pyxis export` and `pyxis import`.
//!
//! A file's data goes to the image while it arrives; names and inodes are kept in memory and follow at the end:
//!
//! ```text
//! superblock │ data and fragment blocks … │ inodes │ directories │ fragments │ inode references │ owners │ xattrs
//! ```
//!
//! Blocks are compressed by a few threads, written in order, and only a few of them are in memory. Everything belongs to
//! root, as with `mksquashfs -all-root`: whoever uses the image maps that to himself.
//!
//! The same calls give the same bytes, except for the time in the superblock (see [`Options::time`]).

#![forbid(unsafe_code)]

mod blocks;
mod compress;
mod inodes;
mod metadata;
mod options;
mod pool;
mod tree;
mod xattr;

use std::fs::File;
use std::io::{self, Read};
use std::time::{SystemTime, UNIX_EPOCH};

use blocks::{BlockWriter, DataId};
pub use compress::Compression;
pub use options::{DEFAULT_OPTIONS, Options, OptionsError};
use tree::{Kind, Tree};

/// Bytes of the superblock.
const SUPERBLOCK: usize = 96;
/// Most bytes of a name.
pub const NAME_MAX: usize = 255;
/// Most bytes of a symbolic link's target: `PATH_MAX` less its NUL.
pub const SYMLINK_MAX: usize = 4095;

/// Why an image cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file behind the image, or a limit of the format.
    #[error("cannot write the squashfs image: {}", crate::sys::reason(.0))]
    Write(#[source] io::Error),
    /// What should have gone into the image.
    #[error("cannot read {}: {}", .0, crate::sys::reason(.1))]
    Read(String, #[source] io::Error),
    /// A path that no file system has: `..`, too long a name, a NUL.
    #[error("not a path in an image: {0}")]
    Path(String),
    /// Something else has this name, or a part of the path is no directory.
    #[error("{0} is already there")]
    Exists(String),
    /// A hard link to nothing, or to a directory.
    #[error("no file to link to: {0}")]
    NoTarget(String),
}

/// Names (`user.…`, `trusted.…`, `security.…`) and values of extended attributes.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// What every inode has. The owner is always 0:0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, 0 to 0o7777.
    pub mode: u16,
    /// Modification time, seconds since 1970. The format has no sign and 32 bits: other times become the nearest.
    pub mtime: i64,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// What is not a file, a directory or a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// A character device.
    CharacterDevice {
        /// 12 bits.
        major: u32,
        /// 20 bits.
        minor: u32,
    },
    /// A block device.
    BlockDevice {
        /// 12 bits.
        major: u32,
        /// 20 bits.
        minor: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket's name.
    Socket,
}

/// What a path stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// A directory, perhaps made on the way to something in it.
    Directory,
    /// Anything else.
    Other,
}

/// An image being written: entries may come in any order, each path once unless it is removed. Directories on the way are made, with mode 0755
/// until [`Writer::directory`] says otherwise. Paths are relative to the root, with or without `/` in front.
#[derive(Debug)]
pub struct Writer {
    blocks: BlockWriter,
    tree: Tree,
    options: Options,
    now: u32,
}

impl Writer {
    /// Begins an image in `file`, which must be empty.
    pub fn new(file: File, options: &Options) -> Result<Self, Error> {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let now = options.time.unwrap_or_else(|| u32::try_from(clock()).unwrap_or(u32::MAX));
        let mut header = vec![0; SUPERBLOCK];
        if let Some(stored) = options.compression.stored_options() {
            let mut table = metadata::Table::new(None);
            table.write(&stored).map_err(Error::Write)?;
            header.extend(table.finish().map_err(Error::Write)?.0);
        }
        let blocks = BlockWriter::new(file, &header, options).map_err(Error::Write)?;
        let root = Attributes { mode: 0o755, mtime: now.into(), xattrs: Vec::new() };
        Ok(Self { blocks, tree: Tree::new(root), options: options.clone(), now })
    }

    /// The time of the image, and of directories made on the way: seconds since 1970.
    pub fn time(&self) -> u32 {
        self.now
    }

    /// What `path` stands for so far.
    pub fn entry(&self, path: &[u8]) -> Option<Entry> {
        self.tree.find(path).map(|id| match self.tree.node(id).kind {
            Kind::Directory(_) => Entry::Directory,
            _ => Entry::Other,
        })
    }

    /// Adds a directory, or sets the attributes of one that is there.
    pub fn directory(&mut self, path: &[u8], attributes: Attributes) -> Result<(), Error> {
        self.tree.directory(path, attributes, self.now)
    }

    /// Adds a regular file with everything that `content` has.
    pub fn file(&mut self, path: &[u8], attributes: Attributes, content: &mut dyn Read) -> Result<(), Error> {
        let mut file = self.begin_file(path, attributes)?;
        loop {
            match content.read(file.space()?) {
                Ok(0) => return file.finish(),
                Ok(count) => file.advance(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Read(text(path), error)),
            }
        }
    }

    /// Adds a regular file that is filled piece by piece.
    pub fn begin_file(&mut self, path: &[u8], attributes: Attributes) -> Result<FileWriter<'_>, Error> {
        let data = self.blocks.begin().map_err(Error::Write)?;
        self.tree.add(path, attributes, Kind::File(data), self.now)?;
        Ok(FileWriter { blocks: &mut self.blocks, data, block: Vec::new(), used: 0 })
    }

    /// Adds a symbolic link.
    pub fn symlink(&mut self, path: &[u8], attributes: Attributes, target: &[u8]) -> Result<(), Error> {
        if target.is_empty() || target.len() > SYMLINK_MAX {
            return Err(Error::Path(text(target)));
        }
        self.tree.add(path, attributes, Kind::Symlink(target.into()), self.now).map(drop)
    }

    /// Adds a device, a named pipe or a socket.
    pub fn special(&mut self, path: &[u8], attributes: Attributes, special: Special) -> Result<(), Error> {
        self.tree.add(path, attributes, Kind::Special(special), self.now).map(drop)
    }

    /// Gives what is at `target`, no directory, the name `path`, too.
    pub fn hard_link(&mut self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        self.tree.link(path, target, self.now)
    }

    /// Removes what is at `path`, with everything below. Data that was written stays in the image, without a name.
    pub fn remove(&mut self, path: &[u8]) {
        self.tree.remove(path);
    }

    /// Writes the rest. The file is complete, but not synchronised with the disk.
    pub fn finish(self) -> Result<File, Error> {
        let blocks = self.blocks.finish().map_err(Error::Write)?;
        inodes::finish(blocks, self.tree, &self.options, self.now).map_err(Error::Write)
    }
}

/// A regular file being filled; it has to be finished.
#[derive(Debug)]
#[must_use]
pub struct FileWriter<'a> {
    blocks: &'a mut BlockWriter,
    data: DataId,
    /// Empty, or of a block's length.
    block: Vec<u8>,
    used: usize,
}

impl FileWriter<'_> {
    /// Room for the next bytes, at least one: to be filled from its beginning, then [`FileWriter::advance`].
    pub fn space(&mut self) -> Result<&mut [u8], Error> {
        let size = self.blocks.block_size();
        if self.used == size {
            self.flush()?;
        }
        if self.block.is_empty() {
            self.block = self.blocks.buffer();
            self.block.resize(size, 0);
        }
        Ok(&mut self.block[self.used..])
    }

    /// The first `count` bytes of [`FileWriter::space`] are filled.
    pub fn advance(&mut self, count: usize) {
        self.used = (self.used + count).min(self.block.len());
    }

    /// Appends `bytes`.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            let space = self.space()?;
            let (now, later) = bytes.split_at(bytes.len().min(space.len()));
            space[..now.len()].copy_from_slice(now);
            let count = now.len();
            self.advance(count);
            bytes = later;
        }
        Ok(())
    }

    /// Appends `count` zeros, without writing whole blocks of them.
    pub fn hole(&mut self, mut count: u64) -> Result<(), Error> {
        let size = self.blocks.block_size();
        // Up to the end of this block, whole blocks, the rest.
        if self.used > 0 {
            count -= self.zeros(count.min((size - self.used) as u64))?;
        }
        if count >= size as u64 {
            if self.used > 0 {
                self.flush()?;
            }
            self.blocks.holes(self.data, count / size as u64).map_err(Error::Write)?;
            count %= size as u64;
        }
        self.zeros(count).map(drop)
    }

    /// Appends fewer zeros than a block has bytes.
    fn zeros(&mut self, count: u64) -> Result<u64, Error> {
        let mut left = usize::try_from(count).unwrap_or(usize::MAX);
        while left > 0 {
            let space = self.space()?;
            let length = left.min(space.len());
            space[..length].fill(0);
            self.advance(length);
            left -= length;
        }
        Ok(count)
    }

    fn flush(&mut self) -> Result<(), Error> {
        let mut block = std::mem::take(&mut self.block);
        block.truncate(self.used);
        self.used = 0;
        self.blocks.block(self.data, block).map_err(Error::Write)
    }

    /// The file is complete.
    pub fn finish(mut self) -> Result<(), Error> {
        if self.used == self.blocks.block_size() {
            self.flush()?;
        }
        let mut rest = std::mem::take(&mut self.block);
        rest.truncate(self.used);
        self.blocks.end(self.data, rest).map_err(Error::Write)
    }
}

/// For messages.
fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(path).escape_debug().to_string()
}
