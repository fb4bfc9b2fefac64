//! Layer images: writes a file tree as one EROFS image (kernel document filesystems/erofs), for `import`.
//!
//! The image is uncompressed, has blocks of 4096 bytes, and is written in one pass while the files arrive:
//!
//! ```text
//! block 0   superblock, root inode                                        written last
//! block 1   data of file a │ data of file b │ inodes of a, b, c … │ data of file d │ …
//!           inodes of the other directories │ directory blocks
//! ```
//!
//! A file's whole blocks go to the output as they are read. What is left of it, its *tail*, lies behind its inode in a
//! metadata block where it fits (`FLAT_INLINE`); a few metadata blocks are open at a time, and each inode goes where it
//! leaves the least room. Only what directories need is kept in memory: names, and 16 bytes for each inode.
//!
//! The same calls give the same bytes, on every machine at every time.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io;

mod chunks;
mod directory;
mod format;
mod output;
pub mod owner;
mod plan;
mod writer;
mod xattr;

pub use chunks::Extent;
pub use format::NAME_MAX;
pub use writer::Writer;
pub use xattr::{XattrTooLong, Xattrs};

/// Most bytes of a symbolic link's target: `PATH_MAX` less its NUL.
pub const SYMLINK_MAX: usize = 4095;

/// Why an image cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file behind the image.
    #[error("cannot write the layer image: {0}")]
    Write(#[source] io::Error),
    /// The limit given to [`Writer::new`].
    #[error("the layer image becomes too large")]
    TooLarge,
    /// The root inode shares a block with the superblock.
    #[error("the root directory has more extended attributes than its inode has room for")]
    RootXattrs,
}

/// What every inode has. The owner is always 0:0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits, 0 to 0o7777.
    pub mode: u16,
    /// Modification time, seconds since 1970.
    pub mtime: i64,
    /// Nanoseconds, 0 to 999,999,999.
    pub mtime_nsec: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// An inode that is no directory, already given to the writer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InodeId(u32);

/// A directory: an index into the slice given to [`Writer::finish`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DirectoryId(pub u32);

impl DirectoryId {
    /// The root directory.
    pub const ROOT: Self = Self(0);

    /// As an index.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// What a name stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A directory.
    Directory(DirectoryId),
    /// Anything else.
    Inode(InodeId),
    /// Nothing: the name is taken but not written.
    Nothing,
}

/// A directory. Each but the root has one name, in its parent.
#[derive(Debug, Clone)]
pub struct Directory {
    /// Permissions, time, extended attributes.
    pub attributes: Attributes,
    /// The directory it is in; the root is its own parent.
    pub parent: DirectoryId,
    /// Names of 1 to [`NAME_MAX`] bytes without `/` and NUL, other than `.` and `..`.
    pub entries: BTreeMap<Box<[u8]>, Target>,
}
