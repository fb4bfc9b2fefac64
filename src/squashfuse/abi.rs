//! What the kernel and a FUSE server say to each other (`<linux/fuse.h>`, protocol 7.31 and later), as far as a read-only
//! file system needs it. Native byte order.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The protocol's version. Kernels from 5.4 on speak this one; later ones only add to it.
pub const MAJOR: u32 = 7;
/// See [`MAJOR`].
pub const MINOR: u32 = 31;
/// The number of the root directory.
pub const ROOT: u64 = 1;
/// Smallest buffer that the kernel writes a request into (`FUSE_MIN_READ_BUFFER`).
pub const MIN_READ_BUFFER: usize = 8192;

// Requests.
pub const LOOKUP: u32 = 1;
pub const FORGET: u32 = 2;
pub const GETATTR: u32 = 3;
pub const READLINK: u32 = 5;
pub const READ: u32 = 15;
pub const STATFS: u32 = 17;
pub const INIT: u32 = 26;
pub const READDIR: u32 = 28;
pub const INTERRUPT: u32 = 36;
pub const DESTROY: u32 = 38;
pub const BATCH_FORGET: u32 = 42;
pub const READDIRPLUS: u32 = 44;

// Flags of INIT, of which the kernel offers some and we take these.
/// Several reads of a file at once.
pub const ASYNC_READ: u32 = 1 << 0;
/// Attributes with the names of a directory.
pub const DO_READDIRPLUS: u32 = 1 << 13;
/// But only where they seem to be wanted.
pub const READDIRPLUS_AUTO: u32 = 1 << 14;
/// OPEN may answer ENOSYS: files need not be opened, and what was read stays in the page cache.
pub const NO_OPEN_SUPPORT: u32 = 1 << 17;
/// LOOKUP and READDIR of a directory at once.
pub const PARALLEL_DIROPS: u32 = 1 << 18;
/// `max_pages` counts.
pub const MAX_PAGES: u32 = 1 << 22;
/// Targets of links stay in the page cache.
pub const CACHE_SYMLINKS: u32 = 1 << 23;
/// OPENDIR may answer ENOSYS: listings stay in the page cache.
pub const NO_OPENDIR_SUPPORT: u32 = 1 << 24;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InHeader {
    pub len: u32,
    pub opcode: u32,
    pub unique: u64,
    pub node: u64,
    pub uid: u32,
    pub gid: u32,
    pub pid: u32,
    pub padding: u32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OutHeader {
    pub len: u32,
    /// 0, or an error number made negative.
    pub error: i32,
    pub unique: u64,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitIn {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
}

#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct InitOut {
    pub major: u32,
    pub minor: u32,
    pub max_readahead: u32,
    pub flags: u32,
    pub max_background: u16,
    pub congestion_threshold: u16,
    pub max_write: u32,
    pub time_gran: u32,
    pub max_pages: u16,
    pub map_alignment: u16,
    pub unused: [u32; 8],
}

#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub atime: u64,
    pub mtime: u64,
    pub ctime: u64,
    pub atime_nsec: u32,
    pub mtime_nsec: u32,
    pub ctime_nsec: u32,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
    pub block_size: u32,
    pub flags: u32,
}

/// Answers LOOKUP.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct EntryOut {
    /// 0: there is no such name, which may be remembered.
    pub node: u64,
    pub generation: u64,
    pub entry_valid: u64,
    pub attr_valid: u64,
    pub entry_valid_nsec: u32,
    pub attr_valid_nsec: u32,
    pub attr: Attr,
}

/// Answers GETATTR.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct AttrOut {
    pub attr_valid: u64,
    pub attr_valid_nsec: u32,
    pub padding: u32,
    pub attr: Attr,
}

/// READ, READDIR, READDIRPLUS.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ReadIn {
    pub handle: u64,
    pub offset: u64,
    pub size: u32,
    pub read_flags: u32,
    pub lock_owner: u64,
    pub flags: u32,
    pub padding: u32,
}

/// Answers STATFS.
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct StatfsOut {
    pub blocks: u64,
    pub blocks_free: u64,
    pub blocks_available: u64,
    pub files: u64,
    pub files_free: u64,
    pub block_size: u32,
    pub name_length: u32,
    pub fragment_size: u32,
    pub padding: u32,
    pub spare: [u32; 6],
}

/// In front of a name; behind it zeros up to the next multiple of 8.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Dirent {
    pub ino: u64,
    /// Where to go on behind this entry.
    pub offset: u64,
    pub name_length: u32,
    /// `DT_*`: the type bits of the mode, shifted.
    pub file_type: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structures_have_their_sizes() {
        assert_eq!(size_of::<InHeader>(), 40);
        assert_eq!(size_of::<OutHeader>(), 16);
        assert_eq!(size_of::<InitOut>(), 64);
        assert_eq!(size_of::<Attr>(), 88);
        assert_eq!(size_of::<EntryOut>(), 128);
        assert_eq!(size_of::<AttrOut>(), 104);
        assert_eq!(size_of::<ReadIn>(), 40);
        assert_eq!(size_of::<StatfsOut>(), 80);
        assert_eq!(size_of::<Dirent>(), 24);
    }
}
