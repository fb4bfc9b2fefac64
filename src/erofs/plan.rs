//! Where inodes go: the search for room, and the places of all directories.

use super::directory::{blocks, listing};
use super::format::{BLOCK, INODE, ROOT_OFFSET, SLOT};
use super::{Directory, DirectoryId, Error};

/// Metadata blocks that are open at the same time. Tails of a few KiB leave gaps that only later, smaller ones fill.
pub const OPEN_BLOCKS: usize = 16;

/// The fullest block that has room for `length` bytes.
pub fn best_fit(used: impl Iterator<Item = usize>, length: usize) -> Option<usize> {
    used.enumerate().filter(|(_, used)| used + length <= BLOCK).max_by_key(|(_, used)| *used).map(|(index, _)| index)
}

/// Where each directory goes, computed before the first is written: they refer to each other.
#[derive(Debug)]
pub struct Plan {
    /// In the order given; the root first.
    pub places: Vec<Place>,
    /// By directory, in slots.
    pub nids: Vec<u64>,
    /// Blocks of inodes and of entries.
    metadata_blocks: u64,
    data_blocks: u64,
}

/// Where one directory goes.
#[derive(Debug)]
pub struct Place {
    pub id: DirectoryId,
    pub nid: u64,
    /// Bytes of inode, attributes and inline entries.
    pub length: usize,
    /// Bytes of the entries.
    pub size: u64,
    /// Blocks outside the metadata, and the first of them.
    pub outside: u64,
    pub data: u32,
    /// Whether the last block lies behind the inode.
    pub inline: bool,
}

impl Plan {
    /// Places the directories `order`, the root first, from block `base` on.
    pub fn new(directories: &[Directory], order: &[DirectoryId], base: u32) -> Result<Self, Error> {
        let mut places = Vec::with_capacity(order.len());
        let mut nids = vec![0; directories.len()];
        let mut open: Vec<(u64, usize)> = Vec::new();
        let mut next = u64::from(base);
        let mut data_blocks = 0;
        for &id in order {
            let directory = &directories[id.index()];
            let listing = listing(id, directory);
            let (count, last) = blocks(&listing).fold((0_u64, 0), |(count, _), (_, used)| (count + 1, used));
            let size = count.saturating_sub(1) * BLOCK as u64 + last as u64;
            let start = INODE + directory.attributes.xattrs.size();
            let room = if id == DirectoryId::ROOT { BLOCK - ROOT_OFFSET } else { BLOCK };
            let inline = start + last <= room && last < BLOCK;
            let length = if inline { start + last } else { start };
            let offset = if id == DirectoryId::ROOT {
                if length > room {
                    return Err(Error::RootXattrs);
                }
                ROOT_OFFSET as u64
            } else if length > BLOCK {
                let block = next;
                next += length.div_ceil(BLOCK) as u64;
                block * BLOCK as u64
            } else {
                let index = match best_fit(open.iter().map(|&(_, used)| used), length) {
                    Some(index) => index,
                    None => {
                        if open.len() == OPEN_BLOCKS
                            && let Some(fullest) = (0..open.len()).max_by_key(|&index| open[index].1)
                        {
                            open.swap_remove(fullest);
                        }
                        open.push((next, 0));
                        next += 1;
                        open.len() - 1
                    }
                };
                let (block, used) = &mut open[index];
                let offset = *block * BLOCK as u64 + *used as u64;
                *used = (*used + length).next_multiple_of(SLOT);
                offset
            };
            let nid = offset / SLOT as u64;
            nids[id.index()] = nid;
            let outside = count - u64::from(inline);
            places.push(Place { id, nid, length, size, outside, data: 0, inline });
            data_blocks += outside;
        }
        // Addresses beyond 32 bits are refused before anything is written.
        let mut data = next;
        for place in &mut places {
            place.data = u32::try_from(data).map_err(|_| Error::TooLarge)?;
            data += place.outside;
        }
        Ok(Self { places, nids, metadata_blocks: next - u64::from(base), data_blocks })
    }

    /// Blocks to write.
    pub fn blocks(&self) -> u64 {
        self.metadata_blocks + self.data_blocks
    }
}
