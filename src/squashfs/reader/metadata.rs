//! Metadata blocks, and reading across them.

use std::os::unix::fs::FileExt;
use std::sync::Arc;

use zerocopy::{FromBytes, IntoBytes};

use super::Error;
use super::cache::Cache;
use super::decompress::Decompressor;
use super::format::{METADATA, METADATA_UNCOMPRESSED};

/// Metadata blocks that are kept: 8 MiB.
const CACHED: usize = 1024;

/// The bytes of an image, and its metadata.
#[derive(Debug)]
pub(super) struct Blocks {
    file: std::fs::File,
    /// Where in the file the image begins.
    start: u64,
    /// Bytes of the image: nothing behind them is read.
    pub size: u64,
    pub decompressor: Decompressor,
    metadata: Cache<u64, MetadataBlock>,
}

/// An unpacked metadata block.
#[derive(Debug)]
struct MetadataBlock {
    bytes: Vec<u8>,
    /// Where the next one begins.
    next: u64,
}

/// A place in the metadata: where a block begins, and how far into what it unpacks to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Position {
    pub block: u64,
    pub offset: usize,
}

impl Position {
    /// A reference of the image, relative to a table: the block in the upper 48 bits, the offset in the lower 16.
    pub fn new(table: u64, reference: u64) -> Self {
        Self { block: table.saturating_add(reference >> 16), offset: (reference & 0xffff) as usize }
    }
}

impl Blocks {
    pub fn new(file: std::fs::File, start: u64, size: u64, decompressor: Decompressor) -> Self {
        Self { file, start, size, decompressor, metadata: Cache::new(CACHED) }
    }

    /// Fills `to` from byte `at` of the image.
    pub fn read(&self, part: &'static str, at: u64, to: &mut [u8]) -> Result<(), Error> {
        match at.checked_add(to.len() as u64) {
            Some(end) if end <= self.size => Ok(self.file.read_exact_at(to, self.start.saturating_add(at))?),
            _ => Err(Error::damaged(part, at, "it reaches beyond the end")),
        }
    }

    /// The block at `at`.
    fn metadata(&self, part: &'static str, at: u64) -> Result<Arc<MetadataBlock>, Error> {
        self.metadata.get(at, || {
            let mut header = [0; 2];
            self.read(part, at, &mut header)?;
            let header = u16::from_le_bytes(header);
            let size = usize::from(header & !METADATA_UNCOMPRESSED);
            if size == 0 || size > METADATA {
                return Err(Error::damaged(part, at, "a block of impossible size"));
            }
            let mut stored = [0; METADATA];
            let stored = &mut stored[..size];
            self.read(part, at.saturating_add(2), stored)?;
            let bytes = if header & METADATA_UNCOMPRESSED != 0 {
                stored.to_vec()
            } else {
                let mut bytes = vec![0; METADATA];
                let size = self.decompressor.decompress(stored, &mut bytes);
                bytes.truncate(size.ok_or(Error::damaged(part, at, "it cannot be decompressed"))?);
                bytes.shrink_to_fit();
                bytes
            };
            if bytes.is_empty() {
                return Err(Error::damaged(part, at, "an empty block"));
            }
            Ok(MetadataBlock { bytes, next: at.saturating_add(2 + size as u64) })
        })
    }

    /// Reads metadata from `position` on, as part of `part`, which is for messages.
    pub fn cursor(&self, part: &'static str, position: Position) -> Cursor<'_> {
        Cursor { blocks: self, part, position, current: None }
    }

    /// Entry `index` of a table that is reached through the array of addresses at `table`.
    pub fn table_entry<T: FromBytes + IntoBytes>(
        &self,
        part: &'static str,
        table: u64,
        index: u64,
    ) -> Result<T, Error> {
        let byte = index.saturating_mul(size_of::<T>() as u64);
        let mut block = [0; 8];
        self.read(part, table.saturating_add(byte / METADATA as u64 * 8), &mut block)?;
        let offset = (byte % METADATA as u64) as usize;
        self.cursor(part, Position { block: u64::from_le_bytes(block), offset }).read()
    }
}

/// Reads metadata, from one block into the next.
#[derive(Debug, Clone)]
pub(super) struct Cursor<'a> {
    blocks: &'a Blocks,
    part: &'static str,
    position: Position,
    current: Option<(u64, Arc<MetadataBlock>)>,
}

impl Cursor<'_> {
    pub fn position(&self) -> Position {
        self.position
    }

    /// A problem with what is at the cursor.
    pub fn damaged(&self, problem: &'static str) -> Error {
        Error::damaged(self.part, self.position.block, problem)
    }

    /// The next structure.
    pub fn read<T: FromBytes + IntoBytes>(&mut self) -> Result<T, Error> {
        let mut value = T::new_zeroed();
        self.read_exact(value.as_mut_bytes())?;
        Ok(value)
    }

    /// Fills `to`.
    pub fn read_exact(&mut self, mut to: &mut [u8]) -> Result<(), Error> {
        while !to.is_empty() {
            let taken = self.chunk(to.len(), |bytes| {
                if let Some((now, _)) = to.split_at_mut_checked(bytes.len()) {
                    now.copy_from_slice(bytes);
                }
            })?;
            to = to.get_mut(taken..).unwrap_or_default();
        }
        Ok(())
    }

    /// Passes over `count` bytes.
    pub fn skip(&mut self, mut count: u64) -> Result<(), Error> {
        while count > 0 {
            let most = usize::try_from(count).unwrap_or(METADATA);
            count -= self.chunk(most, |_| {})? as u64;
        }
        Ok(())
    }

    /// Gives `take` at least 1 and at most `most` bytes, which is not 0, and moves behind them.
    fn chunk(&mut self, most: usize, take: impl FnOnce(&[u8])) -> Result<usize, Error> {
        loop {
            let at = self.position.block;
            let block = match &self.current {
                Some((current, block)) if *current == at => block,
                _ => &self.current.insert((at, self.blocks.metadata(self.part, at)?)).1,
            };
            let rest = block.bytes.get(self.position.offset..).unwrap_or_default();
            if rest.is_empty() {
                // A block has a byte at least, so this comes to an end with the image.
                if self.position.offset > block.bytes.len() {
                    return Err(self.damaged("an offset beyond its block"));
                }
                self.position = Position { block: block.next, offset: 0 };
                continue;
            }
            let now = rest.get(..most).unwrap_or(rest);
            take(now);
            self.position.offset += now.len();
            return Ok(now.len());
        }
    }
}
