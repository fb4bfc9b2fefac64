//! The whole image: superblock, owners, caches.

use std::sync::Arc;

use zerocopy::little_endian::U32;
use zerocopy::{FromZeros, IntoBytes};

use super::Error;
use super::cache::Cache;
use super::decompress::Decompressor;
use super::format::{BLOCK_LOG, Compressor, DATA_UNCOMPRESSED, Fragment, MAGIC, MAJOR, METADATA, NONE_64, SuperBlock};
use super::inode::InodeRef;
use super::metadata::{Blocks, Position};

/// Bytes of unpacked data blocks that are kept.
const CACHED_DATA: usize = 32 << 20;

/// A squashfs image, open for reading. Memory: at most 40 MiB of cached blocks, and a block for each thread that reads.
#[derive(Debug)]
pub struct Image {
    superblock: SuperBlock,
    compressor: Compressor,
    pub(super) blocks: Blocks,
    /// Owners by index.
    ids: Vec<U32>,
    /// By address and size word.
    data: Cache<(u64, u32), Vec<u8>>,
}

impl Image {
    /// Opens the image in `file`, which need not have a name; reads only by position. Fails unless it is a whole squashfs
    /// image, as far as its superblock tells.
    pub fn open(file: std::fs::File) -> Result<Self, Error> {
        Self::open_at(file, 0)
    }

    /// The same for an image that begins at byte `start` of the file.
    pub fn open_at(file: std::fs::File, start: u64) -> Result<Self, Error> {
        use std::os::unix::fs::FileExt;
        let mut superblock = SuperBlock::new_zeroed();
        let mut read = 0;
        while let Some(rest) = superblock.as_mut_bytes().get_mut(read..).filter(|rest| !rest.is_empty()) {
            match file.read_at(rest, start.saturating_add(read as u64))? {
                0 => return Err(Error::NotSquashfs),
                more => read += more,
            }
        }
        if superblock.magic.get() != MAGIC {
            return Err(Error::NotSquashfs);
        }
        let (major, minor) = (superblock.major.get(), superblock.minor.get());
        if (major, minor) != (MAJOR, 0) {
            return Err(Error::Version { major, minor });
        }
        let number = superblock.compressor.get();
        let compressor = Compressor::new(number).ok_or(Error::Compressor(number))?;
        let log = superblock.block_log.get();
        if !BLOCK_LOG.contains(&log) || superblock.block_size.get() != 1 << log {
            return Err(Error::damaged("superblock", 12, "an impossible block size"));
        }
        let (actual, expected) = (file.metadata()?.len().saturating_sub(start), superblock.bytes_used.get());
        if actual < expected {
            return Err(Error::Truncated { expected, actual });
        }
        let tables = [&superblock.inode_table, &superblock.directory_table, &superblock.id_table];
        if tables.iter().any(|table| table.get() >= expected) {
            return Err(Error::damaged("superblock", 48, "a table behind the end"));
        }
        let blocks = Blocks::new(file, start, expected, Decompressor::new(compressor));
        let ids = read_ids(&blocks, &superblock)?;
        let data = Cache::new(CACHED_DATA >> log);
        let image = Self { superblock, compressor, blocks, ids, data };
        match image.inode(image.root())?.is_directory() {
            true => Ok(image),
            false => Err(Error::damaged("superblock", 32, "the root is no directory")),
        }
    }

    /// The root directory.
    pub fn root(&self) -> InodeRef {
        InodeRef::new(self.superblock.root.get())
    }

    /// Number of inodes, as the image says.
    pub fn inodes(&self) -> u32 {
        self.superblock.inodes.get()
    }

    /// Bytes of a data block: the unit in which files are compressed.
    pub fn block_size(&self) -> u32 {
        self.superblock.block_size.get()
    }

    /// When it was made, seconds since 1970.
    pub fn made(&self) -> u32 {
        self.superblock.made.get()
    }

    /// How it is compressed.
    pub fn compressor(&self) -> Compressor {
        self.compressor
    }

    /// Bytes of the image, without what may follow it in the file.
    pub fn size(&self) -> u64 {
        self.blocks.size
    }

    pub(super) fn superblock(&self) -> &SuperBlock {
        &self.superblock
    }

    pub(super) fn id(&self, index: u16) -> Option<u32> {
        self.ids.get(usize::from(index)).map(|id| id.get())
    }

    /// Where the inodes, relative to their table, are.
    pub(super) fn inode_position(&self, reference: u64) -> Position {
        Position::new(self.superblock.inode_table.get(), reference)
    }

    pub(super) fn fragment(&self, index: u32) -> Result<Fragment, Error> {
        let table = self.superblock.fragment_table.get();
        if index >= self.superblock.fragments.get() || table == NONE_64 {
            return Err(Error::damaged("fragment table", table, "a fragment that does not exist"));
        }
        self.blocks.table_entry("fragment table", table, index.into())
    }

    /// The data block or fragment at `at` with this size word, unpacked and kept.
    pub(super) fn data_block(&self, at: u64, size: u32) -> Result<Arc<Vec<u8>>, Error> {
        self.data.get((at, size), || {
            let mut bytes = vec![0; self.block_size() as usize];
            let size = self.unpack(at, size, &mut bytes)?;
            bytes.truncate(size);
            Ok(bytes)
        })
    }

    /// Whether [`Image::data_block`] would have nothing to do.
    pub(super) fn is_cached(&self, at: u64, size: u32) -> bool {
        self.data.contains((at, size))
    }

    /// Unpacks the data block or fragment at `at` with this size word to `to`, which is a block at most.
    pub(super) fn unpack(&self, at: u64, size: u32, to: &mut [u8]) -> Result<usize, Error> {
        const PART: &str = "data block";
        let stored = (size & !DATA_UNCOMPRESSED) as usize;
        if stored == 0 || stored > self.block_size() as usize {
            return Err(Error::damaged(PART, at, "a block of impossible size"));
        }
        if size & DATA_UNCOMPRESSED != 0 {
            let to = to.get_mut(..stored).ok_or(Error::damaged(PART, at, "more bytes than expected"))?;
            self.blocks.read(PART, at, to)?;
            return Ok(stored);
        }
        let mut bytes = vec![0; stored];
        self.blocks.read(PART, at, &mut bytes)?;
        let unpacked = self.blocks.decompressor.decompress(&bytes, to);
        unpacked.ok_or(Error::damaged(PART, at, "it cannot be decompressed"))
    }
}

fn read_ids(blocks: &Blocks, superblock: &SuperBlock) -> Result<Vec<U32>, Error> {
    const PART: &str = "id table";
    let (table, count) = (superblock.id_table.get(), usize::from(superblock.ids.get()));
    let mut ids = vec![U32::ZERO; count];
    for (number, chunk) in ids.chunks_mut(METADATA / size_of::<U32>()).enumerate() {
        let mut block = [0; 8];
        blocks.read(PART, table.saturating_add(8 * number as u64), &mut block)?;
        let position = Position { block: u64::from_le_bytes(block), offset: 0 };
        blocks.cursor(PART, position).read_exact(chunk.as_mut_bytes())?;
    }
    Ok(ids)
}
