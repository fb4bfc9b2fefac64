//! The on-disk structures of squashfs 4.0 (kernel document filesystems/squashfs). Everything is little endian.
//!
//! ```text
//! superblock │ compressor options │ data blocks and fragments │ inode table │ directory table │ fragment table
//!            │ export table │ id table │ xattr table
//! ```
//!
//! Tables are *metadata blocks*: 16 bits of [`metadata header`](METADATA_UNCOMPRESSED), then at most [`METADATA`] bytes
//! when unpacked. The last four are reached through an array of 64-bit block addresses, which is what the superblock
//! points at.

use zerocopy::little_endian::{I16, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `SQUASHFS_MAGIC`, "hsqs".
pub const MAGIC: u32 = 0x7371_7368;
/// Major version; the minor one is 0.
pub const MAJOR: u16 = 4;
/// Unpacked bytes of every metadata block but the last of a table.
pub const METADATA: usize = 8192;
/// Smallest and largest block of file data, as powers of two.
pub const BLOCK_LOG: std::ops::RangeInclusive<u16> = 12..=20;
/// Most bytes of a file name.
pub const NAME_MAX: usize = 255;
/// Bit of a metadata block's header: stored as it is. The others are the bytes on disk.
pub const METADATA_UNCOMPRESSED: u16 = 1 << 15;
/// Bit of a data block's or fragment's size: stored as it is. The lower bits are the bytes on disk.
pub const DATA_UNCOMPRESSED: u32 = 1 << 24;
/// No fragment, no extended attributes.
pub const NONE_32: u32 = u32::MAX;
/// A table that is not there.
pub const NONE_64: u64 = u64::MAX;
/// What directory sizes count for `.` and `..`, which are not stored.
pub const DIRECTORY_EXTRA: u32 = 3;
/// Most entries behind one directory header.
pub const DIRECTORY_RUN: u32 = 256;

/// `struct squashfs_super_block`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: U32,
    /// Number of inodes.
    pub inodes: U32,
    /// Time it was made, seconds since 1970.
    pub made: U32,
    /// Bytes of a data block.
    pub block_size: U32,
    /// Entries of the fragment table.
    pub fragments: U32,
    /// [`Compressor`].
    pub compressor: U16,
    /// log2 of `block_size`.
    pub block_log: U16,
    /// `SQUASHFS_*` flags, none of which a reader has to know.
    pub flags: U16,
    /// Entries of the id table.
    pub ids: U16,
    /// [`MAJOR`].
    pub major: U16,
    /// 0.
    pub minor: U16,
    /// The root directory's inode: block and offset.
    pub root: U64,
    /// Bytes of the image; what follows is padding.
    pub bytes_used: U64,
    /// Addresses of the id table's blocks.
    pub id_table: U64,
    /// The [`XattrTable`], or [`NONE_64`].
    pub xattr_table: U64,
    /// First block of the inodes.
    pub inode_table: U64,
    /// First block of the directories.
    pub directory_table: U64,
    /// Addresses of the fragment table's blocks.
    pub fragment_table: U64,
    /// Addresses of the export table's blocks (inode number to inode), or [`NONE_64`].
    pub export_table: U64,
}

/// How blocks are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Compressor {
    /// zlib (RFC 1950).
    Gzip = 1,
    /// The format of the `lzma` command; no kernel reads it.
    Lzma = 2,
    /// LZO1X.
    Lzo = 3,
    /// xz, with a branch filter if that helps.
    Xz = 4,
    /// LZ4 blocks.
    Lz4 = 5,
    /// zstd frames (RFC 8878).
    Zstd = 6,
}

impl Compressor {
    /// The compressor with this number.
    pub fn new(number: u16) -> Option<Self> {
        [Self::Gzip, Self::Lzma, Self::Lzo, Self::Xz, Self::Lz4, Self::Zstd]
            .into_iter()
            .find(|compressor| *compressor as u16 == number)
    }

    /// As mksquashfs calls it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

/// Types of inodes: these, and the same + [`EXTENDED`] with more fields. Directory entries have the basic ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u16)]
pub enum FileType {
    /// Directory.
    Directory = 1,
    /// Regular file.
    Regular = 2,
    /// Symbolic link.
    Symlink = 3,
    /// Block device.
    Block = 4,
    /// Character device.
    Character = 5,
    /// Named pipe.
    Fifo = 6,
    /// Socket.
    Socket = 7,
}

/// Distance of the extended inode types from the basic ones.
pub const EXTENDED: u16 = 7;

impl FileType {
    /// The type with this basic number.
    pub fn new(number: u16) -> Option<Self> {
        use FileType::{Block, Character, Directory, Fifo, Regular, Socket, Symlink};
        [Directory, Regular, Symlink, Block, Character, Fifo, Socket].into_iter().find(|kind| *kind as u16 == number)
    }

    /// The type bits of `st_mode`.
    pub fn mode(self) -> u32 {
        match self {
            Self::Directory => 0o040000,
            Self::Regular => 0o100000,
            Self::Symlink => 0o120000,
            Self::Block => 0o060000,
            Self::Character => 0o020000,
            Self::Fifo => 0o010000,
            Self::Socket => 0o140000,
        }
    }
}

/// What every inode begins with (`struct squashfs_base_inode`).
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct InodeHeader {
    /// [`FileType`], or that + [`EXTENDED`].
    pub inode_type: U16,
    /// Permissions.
    pub mode: U16,
    /// Owner: index into the id table.
    pub uid: U16,
    /// Group: index into the id table.
    pub gid: U16,
    /// Modification time, seconds since 1970.
    pub mtime: U32,
    /// Number, from 1.
    pub number: U32,
}

/// What follows the header of a basic directory.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BasicDirectory {
    /// Block of the listing, relative to the directory table.
    pub block: U32,
    /// Number of names.
    pub nlink: U32,
    /// Bytes of the listing + [`DIRECTORY_EXTRA`].
    pub size: U16,
    /// Offset of the listing in its block.
    pub offset: U16,
    /// Number of the directory it is in.
    pub parent: U32,
}

/// What follows the header of an extended directory; then `index` of [`DirectoryIndex`] with names.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedDirectory {
    /// Number of names.
    pub nlink: U32,
    /// Bytes of the listing + [`DIRECTORY_EXTRA`].
    pub size: U32,
    /// Block of the listing, relative to the directory table.
    pub block: U32,
    /// Number of the directory it is in.
    pub parent: U32,
    /// Entries of the index.
    pub index: U16,
    /// Offset of the listing in its block.
    pub offset: U16,
    /// Extended attributes, or [`NONE_32`].
    pub xattr: U32,
}

/// An entry of a directory's index: a place of the listing where a header is, and the first name behind it.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirectoryIndex {
    /// Bytes of the listing before it.
    pub position: U32,
    /// Its block, relative to the directory table.
    pub block: U32,
    /// Bytes of the name less 1; the name follows.
    pub name_size: U32,
}

/// What follows the header of a basic file; then the sizes of its blocks, [`U32`] each.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct BasicFile {
    /// Address of the first data block.
    pub start: U32,
    /// Fragment with the end of the file, or [`NONE_32`].
    pub fragment: U32,
    /// Offset in the unpacked fragment.
    pub offset: U32,
    /// Bytes of the file.
    pub size: U32,
}

/// What follows the header of an extended file; then the sizes of its blocks, [`U32`] each.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ExtendedFile {
    /// Address of the first data block.
    pub start: U64,
    /// Bytes of the file.
    pub size: U64,
    /// Bytes in holes (their blocks have size 0).
    pub sparse: U64,
    /// Number of names.
    pub nlink: U32,
    /// Fragment with the end of the file, or [`NONE_32`].
    pub fragment: U32,
    /// Offset in the unpacked fragment.
    pub offset: U32,
    /// Extended attributes, or [`NONE_32`].
    pub xattr: U32,
}

/// What follows the header of a symbolic link; then the target, and if extended the attributes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Symlink {
    /// Number of names.
    pub nlink: U32,
    /// Bytes of the target.
    pub size: U32,
}

/// What follows the header of a device; if extended, then the attributes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Device {
    /// Number of names.
    pub nlink: U32,
    /// Major and minor number as `new_encode_dev()` packs them.
    pub number: U32,
}

/// In front of a run of [`DirectoryEntry`], all of inodes in one metadata block.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirectoryHeader {
    /// Entries less 1.
    pub count: U32,
    /// Block of the inodes, relative to the inode table.
    pub block: U32,
    /// What the numbers of the entries are relative to.
    pub number: U32,
}

/// An entry of a listing; the name follows.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct DirectoryEntry {
    /// Offset of the inode in its block.
    pub offset: U16,
    /// Its number less the header's.
    pub number: I16,
    /// [`FileType`].
    pub file_type: U16,
    /// Bytes of the name less 1.
    pub name_size: U16,
}

/// An entry of the fragment table.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Fragment {
    /// Address.
    pub start: U64,
    /// Bytes on disk, [`DATA_UNCOMPRESSED`].
    pub size: U32,
    /// 0.
    pub unused: U32,
}

/// What the superblock's `xattr_table` points at; the addresses of the blocks of [`XattrId`] follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrTable {
    /// First block of the attributes.
    pub start: U64,
    /// Entries of the table.
    pub ids: U32,
    /// 0.
    pub unused: U32,
}

/// The attributes of an inode.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrId {
    /// Block, relative to [`XattrTable::start`], and offset.
    pub reference: U64,
    /// Number of attributes.
    pub count: U32,
    /// Bytes that they take in memory.
    pub size: U32,
}

/// An attribute; the name follows, then [`U32`] bytes of the value, then the value.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Prefix of the name (0 user, 1 trusted, 2 security), and [`XATTR_ELSEWHERE`].
    pub prefix: U16,
    /// Bytes of the name without its prefix.
    pub name_size: U16,
}

/// The value is a reference, block and offset, to where the value is.
pub const XATTR_ELSEWHERE: u16 = 0x100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_their_sizes() {
        assert_eq!(size_of::<SuperBlock>(), 96);
        assert_eq!(size_of::<InodeHeader>(), 16);
        assert_eq!(size_of::<BasicDirectory>(), 16);
        assert_eq!(size_of::<ExtendedDirectory>(), 24);
        assert_eq!(size_of::<DirectoryIndex>(), 12);
        assert_eq!(size_of::<BasicFile>(), 16);
        assert_eq!(size_of::<ExtendedFile>(), 40);
        assert_eq!(size_of::<DirectoryHeader>(), 12);
        assert_eq!(size_of::<DirectoryEntry>(), 8);
        assert_eq!(size_of::<Fragment>(), 16);
        assert_eq!(size_of::<XattrTable>(), 16);
        assert_eq!(size_of::<XattrId>(), 16);
        assert_eq!(size_of::<XattrEntry>(), 4);
        assert_eq!(u32::from_le_bytes(*b"hsqs"), MAGIC);
    }
}
