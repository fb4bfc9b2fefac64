//! The on-disk structures of EROFS, as far as a layer image uses them (kernel document filesystems/erofs, section
//! "On-disk details"). Everything is little endian.
//!
//! ```text
//! byte 0                unused
//! byte 1024             superblock (128 bytes)
//! byte 1152             root directory inode: node 36
//! block 1 …             data blocks, and metadata blocks with inodes, extended attributes and inline tails
//! ```
//!
//! Inodes are addressed by *nid*, their byte offset in the image divided by 32 (the metadata area begins at block 0).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Bytes of a block: the unit of data addresses. The only size that every kernel with EROFS knows.
pub const BLOCK: usize = 4096;
/// log2 of [`BLOCK`].
pub const BLOCK_BITS: u8 = 12;
/// Granularity of inode addresses.
pub const SLOT: usize = 32;
/// Offset of the superblock.
pub const SUPER_OFFSET: usize = 1024;
/// Offset of the root inode: right behind the superblock, because its nid has 16 bits only.
pub const ROOT_OFFSET: usize = SUPER_OFFSET + size_of::<SuperBlock>();
/// Bytes of an extended inode, the only kind written: the compact one has no time stamp.
pub const INODE: usize = size_of::<Inode>();
/// Most bytes of a file name.
pub const NAME_MAX: usize = 255;
/// Most blocks of an image: addresses have 32 bits, and the last one means "hole".
pub const MAX_BLOCKS: u64 = u32::MAX as u64;

/// `EROFS_SUPER_MAGIC_V1`.
pub const MAGIC: u32 = 0xe0f5_e1e2;
/// `EROFS_FEATURE_COMPAT_SB_CHKSUM`: the superblock carries a checksum.
pub const COMPAT_SB_CHKSUM: u32 = 0x1;
/// `EROFS_FEATURE_COMPAT_MTIME`: the time stamp is the modification time.
pub const COMPAT_MTIME: u32 = 0x2;
/// `EROFS_FEATURE_INCOMPAT_CHUNKED_FILE` (Linux 5.15): set only for a layer with sparse files.
pub const INCOMPAT_CHUNKED_FILE: u32 = 0x4;

/// Inode data layouts (bits 1 to 3 of `i_format`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum Layout {
    /// Whole blocks, the last one padded.
    FlatPlain = 0,
    /// Whole blocks; what does not fill the last one follows the inode.
    FlatInline = 2,
    /// Chunks, each with a block address of its own or none.
    ChunkBased = 4,
}

impl Layout {
    /// `i_format` of an extended inode with this layout.
    pub fn format(self) -> U16 {
        U16::new((self as u16) << 1 | 1)
    }
}

/// File types of directory entries (`FT_*`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FileType {
    /// Regular file.
    Regular = 1,
    /// Directory.
    Directory = 2,
    /// Character device: overlay's whiteouts.
    Character = 3,
    /// Named pipe.
    Fifo = 5,
    /// Symbolic link.
    Symlink = 7,
}

impl FileType {
    /// The type bits of `i_mode`.
    pub fn mode(self) -> u16 {
        match self {
            Self::Regular => 0o100000,
            Self::Directory => 0o040000,
            Self::Character => 0o020000,
            Self::Fifo => 0o010000,
            Self::Symlink => 0o120000,
        }
    }
}

/// `struct erofs_super_block`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct SuperBlock {
    /// [`MAGIC`].
    pub magic: U32,
    /// CRC-32C of block 0 from the superblock on, computed with 0 here.
    pub checksum: U32,
    /// Features a reader may ignore.
    pub feature_compat: U32,
    /// [`BLOCK_BITS`].
    pub blkszbits: u8,
    /// 0: no extension slots.
    pub sb_extslots: u8,
    /// Node of the root directory.
    pub root_nid: U16,
    /// Number of inodes.
    pub inos: U64,
    /// 0: the same layer gives the same bytes, whenever it is written.
    pub build_time: U64,
    /// 0.
    pub build_time_nsec: U32,
    /// Blocks of the image.
    pub blocks: U32,
    /// 0: nids count from the start of the image.
    pub meta_blkaddr: U32,
    /// 0: no shared extended attributes.
    pub xattr_blkaddr: U32,
    /// See [`super::Writer`].
    pub uuid: [u8; 16],
    /// Empty.
    pub volume_name: [u8; 16],
    /// Features a reader must know.
    pub feature_incompat: U32,
    /// Compression, further devices, directory block size, attribute prefixes, packed files: all unused.
    pub unused: [u8; 44],
}

/// What `i_u` of an [`Inode`] says about the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Address {
    /// Nothing outside the inode.
    None,
    /// First block of a flat file.
    Block(u32),
    /// log2 of the chunk size in blocks.
    ChunkBits(u8),
}

impl Address {
    /// The on-disk value.
    pub fn encode(self) -> U32 {
        match self {
            Self::None => U32::ZERO,
            Self::Block(block) => U32::new(block),
            Self::ChunkBits(bits) => U32::new(bits.into()),
        }
    }
}

/// A hole in the block map of a chunk-based file (`EROFS_NULL_ADDR`).
pub const HOLE: U32 = U32::MAX_VALUE;

/// `struct erofs_inode_extended`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Inode {
    /// [`Layout::format`].
    pub format: U16,
    /// 0, or 1 + (bytes of the attribute entries) / 4.
    pub xattr_icount: U16,
    /// Type and permissions.
    pub mode: U16,
    /// 0.
    pub reserved: U16,
    /// Bytes of the content.
    pub size: U64,
    /// [`Address::encode`]; for a character device its number.
    pub u: U32,
    /// A serial number; only 32-bit tools look at it.
    pub ino: U32,
    /// 0: the idmapped mount shows the job's user.
    pub uid: U32,
    /// 0.
    pub gid: U32,
    /// Seconds since 1970, two's complement.
    pub mtime: U64,
    /// Nanoseconds, 0 to 999,999,999.
    pub mtime_nsec: U32,
    /// Number of names.
    pub nlink: U32,
    /// 0.
    pub reserved2: [u8; 16],
}

/// `struct erofs_xattr_ibody_header`, in front of an inode's attribute entries.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrHeader {
    /// 0: no name filter (a feature of its own).
    pub name_filter: U32,
    /// 0: no shared attributes.
    pub shared_count: u8,
    /// 0.
    pub reserved: [u8; 7],
}

/// `struct erofs_xattr_entry`; name and value follow, padded to 4 bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct XattrEntry {
    /// Bytes of the name without its prefix.
    pub name_len: u8,
    /// The prefix: [`XATTR_USER`] or [`XATTR_TRUSTED`].
    pub name_index: u8,
    /// Bytes of the value.
    pub value_size: U16,
}

/// `EROFS_XATTR_INDEX_USER`.
pub const XATTR_USER: u8 = 1;
/// `EROFS_XATTR_INDEX_TRUSTED`.
pub const XATTR_TRUSTED: u8 = 4;

/// `struct erofs_dirent`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Dirent {
    /// The inode.
    pub nid: U64,
    /// Offset of the name in its directory block.
    pub nameoff: U16,
    /// [`FileType`].
    pub file_type: u8,
    /// 0.
    pub reserved: u8,
}

/// CRC-32C (Castagnoli) over `bytes`, as the kernel's `crc32c(~0, …)` computes it: no final inversion.
pub fn crc32c(bytes: &[u8]) -> u32 {
    bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_their_sizes() {
        assert_eq!(size_of::<SuperBlock>(), 128);
        assert_eq!(INODE, 64);
        assert_eq!(size_of::<XattrHeader>(), 12);
        assert_eq!(size_of::<XattrEntry>(), 4);
        assert_eq!(size_of::<Dirent>(), 12);
        assert_eq!(ROOT_OFFSET / SLOT, 36);
    }

    #[test]
    fn crc32c_has_its_check_value() {
        // The catalogue's check value is the inverted one.
        assert_eq!(!crc32c(b"123456789"), 0xe306_9283);
    }
}
