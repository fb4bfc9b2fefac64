//! Sparse files: how to cut one into chunks, so that block map and data together take the least room.

use super::format::{BLOCK, BLOCK_BITS};

/// Most chunks of a file: a block map of 4 MiB.
const MAX_CHUNKS: u64 = 1 << 20;
/// Most bits of a chunk's size in blocks (the format's field has five).
const MAX_CHUNK_BITS: u8 = 31;

/// A piece of a sparse file that holds data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes, at least one.
    pub length: u64,
}

/// A sparse file cut into chunks of one size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunks {
    /// log2 of the chunk size in blocks.
    pub bits: u8,
    /// Chunks of the file, holes included.
    pub count: u64,
    /// Blocks of the chunks that are no holes.
    pub blocks: u64,
    /// Bytes of the file.
    size: u64,
}

impl Chunks {
    /// Cuts a file of `size` bytes with data in `extents`, which are in order, do not overlap and end within the file.
    /// `None` if it has too many chunks however it is cut.
    pub fn plan(size: u64, extents: &[Extent]) -> Option<Self> {
        (0..=MAX_CHUNK_BITS)
            .map(|bits| {
                let chunks = Self { bits, count: 0, blocks: 0, size };
                Self { count: size.div_ceil(chunks.bytes()), ..chunks }
            })
            .filter(|chunks| chunks.count <= MAX_CHUNKS)
            .map(|chunks| Self { blocks: chunks.runs(extents).map(|run| run.blocks).sum(), ..chunks })
            .min_by_key(|chunks| chunks.blocks * BLOCK as u64 + chunks.count * 4)
    }

    /// Bytes of a chunk.
    pub fn bytes(&self) -> u64 {
        1 << (self.bits + BLOCK_BITS)
    }

    /// The chunks with data, neighbours together.
    pub fn runs<'e>(&self, extents: &'e [Extent]) -> impl Iterator<Item = Run<'e>> + use<'e> {
        let (bytes, size) = (self.bytes(), self.size);
        let mut rest = extents;
        std::iter::from_fn(move || {
            let head = rest.first()?;
            let first = head.offset / bytes;
            let mut last = first;
            let count = rest
                .iter()
                .take_while(|extent| {
                    let near = extent.offset / bytes <= last + 1;
                    last = if near { (extent.offset + extent.length - 1) / bytes } else { last };
                    near
                })
                .count();
            let (extents, later) = rest.split_at(count);
            rest = later;
            // The last chunk of a file ends with the file's last block.
            let end = ((last + 1).saturating_mul(bytes)).min(size.next_multiple_of(BLOCK as u64));
            Some(Run { first, last, extents, blocks: (end - first * bytes) / BLOCK as u64 })
        })
    }
}

/// Chunks in a row that hold data.
#[derive(Debug)]
pub struct Run<'e> {
    /// Number of the first chunk.
    pub first: u64,
    /// Number of the last chunk.
    pub last: u64,
    /// The data in them.
    pub extents: &'e [Extent],
    /// Blocks of the run.
    pub blocks: u64,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn extent(offset: u64, length: u64) -> Extent {
        Extent { offset, length }
    }

    #[test]
    fn a_hole_takes_one_chunk() {
        let chunks = Chunks::plan(1 << 40, &[]).unwrap();
        assert_eq!((chunks.count, chunks.blocks), (1, 0));
        let chunks = Chunks::plan(i64::MAX as u64, &[]).unwrap();
        assert_eq!((chunks.count, chunks.blocks), (1 << 20, 0));
    }

    #[test]
    fn scattered_data_takes_small_chunks() {
        let extents: Vec<Extent> = (0..100).map(|i| extent(i << 20, 1)).collect();
        let chunks = Chunks::plan(100 << 20, &extents).unwrap();
        assert_eq!((chunks.bits, chunks.blocks), (0, 100));
    }

    #[test]
    fn the_last_chunk_ends_with_the_file() {
        let chunks = Chunks::plan(10 << 30, &[extent((10 << 30) - 5, 5)]).unwrap();
        let run = chunks.runs(&[extent((10 << 30) - 5, 5)]).next().map(|run| (run.last, run.blocks)).unwrap();
        assert_eq!(run, (chunks.count - 1, chunks.blocks));
    }

    proptest! {
        #[test]
        fn runs_cover_the_data(pieces in prop::collection::vec((0_u64..100_000, 1_u64..20_000), 0..50), hole in 0_u64..100_000) {
            let mut extents = Vec::new();
            let mut at = 0;
            for (gap, length) in pieces {
                extents.push(extent(at + gap, length));
                at += gap + length;
            }
            let size = at + hole;
            let chunks = Chunks::plan(size, &extents).unwrap();
            let (mut covered, mut end) = (0, 0);
            for run in chunks.runs(&extents) {
                prop_assert!(run.first * chunks.bytes() >= end);
                end = run.first * chunks.bytes() + run.blocks * BLOCK as u64;
                prop_assert!(run.last < chunks.count && end <= size.next_multiple_of(BLOCK as u64));
                for extent in run.extents {
                    prop_assert!(extent.offset >= run.first * chunks.bytes() && extent.offset + extent.length <= end);
                    covered += 1;
                }
            }
            prop_assert_eq!(covered, extents.len());
        }
    }
}
