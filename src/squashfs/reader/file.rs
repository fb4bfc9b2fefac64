//! Contents of regular files.

use std::sync::{Mutex, PoisonError};

use zerocopy::little_endian::U32;

use super::format::DATA_UNCOMPRESSED;
use super::inode::{Content, FileContent, Inode};
use super::metadata::{Cursor, Position};
use super::{Error, Image};

/// Blocks between two remembered places of a file's list of blocks.
const STEP: u64 = 1024;
/// Most extents that [`Image::data_extents`] tells apart.
const MAX_EXTENTS: usize = 1 << 16;

/// A regular file, open for reading. Finding a block means adding up the sizes of those before it; this remembers how far
/// that has come (about 40 bytes for each 1024 blocks), so keep it while a file is read.
#[derive(Debug)]
pub struct File {
    content: FileContent,
    /// Number of data blocks, without the fragment.
    blocks: u64,
    places: Mutex<Places>,
}

/// Where a block is listed, and where its data is.
#[derive(Debug, Clone, Copy)]
struct Place {
    block: u64,
    listed: Position,
    address: u64,
}

#[derive(Debug)]
struct Places {
    /// Every [`STEP`]th, from 0 on.
    known: Vec<Place>,
    /// The one behind the last that was asked for.
    last: Place,
}

impl File {
    /// Bytes of the file.
    pub fn size(&self) -> u64 {
        self.content.size
    }
}

impl Image {
    /// Opens a regular file.
    pub fn file(&self, inode: &Inode) -> Result<File, Error> {
        let Content::File(content) = &inode.content else {
            return Err(Error::damaged("inode", inode.reference.number(), "not a regular file"));
        };
        let block_size = u64::from(self.block_size());
        let blocks = match content.fragment {
            Some(_) => content.size / block_size,
            None => content.size.div_ceil(block_size),
        };
        let first = Place { block: 0, listed: content.blocks, address: content.start };
        let places = Mutex::new(Places { known: vec![first], last: first });
        Ok(File { content: content.clone(), blocks, places })
    }

    /// Reads from byte `offset` of the file on, as much as there is and `to` holds, and says how much.
    pub fn read_at(&self, file: &File, offset: u64, to: &mut [u8]) -> Result<usize, Error> {
        let Some(available) = file.content.size.checked_sub(offset) else { return Ok(0) };
        let wanted = usize::try_from(available).unwrap_or(usize::MAX).min(to.len());
        let mut rest = to.get_mut(..wanted).unwrap_or_default();
        let block_size = u64::from(self.block_size());
        let mut at = offset;
        let mut list = None;
        while !rest.is_empty() {
            let (block, skip) = (at / block_size, (at % block_size) as usize);
            // At most a block: it fits.
            let length = (file.content.size - block * block_size).min(block_size) as usize;
            let now = rest.len().min(length - skip);
            let (slice, behind) = rest.split_at_mut_checked(now).unwrap_or_default();
            if block < file.blocks {
                let list = match &mut list {
                    Some(list) => list,
                    None => list.insert(self.list(file, block)?),
                };
                let (address, size) = list.next()?;
                self.read_block(address, size, length, skip, slice)?;
            } else {
                self.read_fragment(file, length, skip, slice)?;
            }
            (at, rest) = (at + now as u64, behind);
        }
        if let Some(list) = list {
            list.remember();
        }
        Ok(wanted)
    }

    /// Copies what is from `skip` on in a data block that unpacks to `length` bytes.
    fn read_block(&self, address: u64, size: u32, length: usize, skip: usize, to: &mut [u8]) -> Result<(), Error> {
        let wrong = || Error::damaged("data block", address, "it does not have the size that its file has");
        if size & !DATA_UNCOMPRESSED == 0 {
            to.fill(0);
            return Ok(());
        }
        // Who reads whole blocks does not read them again soon.
        if to.len() == length && !self.is_cached(address, size) {
            return match self.unpack(address, size, to)? == length {
                true => Ok(()),
                false => Err(wrong()),
            };
        }
        let block = self.data_block(address, size)?;
        match block.get(skip..skip + to.len()) {
            Some(part) if block.len() == length => to.copy_from_slice(part),
            _ => return Err(wrong()),
        }
        Ok(())
    }

    /// Copies what is from `skip` on of the `length` bytes of the end of the file.
    fn read_fragment(&self, file: &File, length: usize, skip: usize, to: &mut [u8]) -> Result<(), Error> {
        let Some((index, offset)) = file.content.fragment else {
            return Err(Error::damaged("inode", file.content.start, "a file without its end"));
        };
        let fragment = self.fragment(index)?;
        let (address, offset) = (fragment.start.get(), offset as usize);
        let block = self.data_block(address, fragment.size.get())?;
        let end = offset.checked_add(length).and_then(|end| block.get(offset..end));
        match end.and_then(|end| end.get(skip..skip + to.len())) {
            Some(part) => to.copy_from_slice(part),
            None => return Err(Error::damaged("fragment", address, "the end of a file reaches behind it")),
        }
        Ok(())
    }

    /// Where a file has data, in blocks: offsets and lengths, in order; the rest is holes. A file with too many holes to be
    /// worth it is all data.
    pub fn data_extents(&self, file: &File) -> Result<Vec<(u64, u64)>, Error> {
        let (size, block_size) = (file.content.size, u64::from(self.block_size()));
        let mut extents: Vec<(u64, u64)> = Vec::new();
        let mut add = |start: u64, end: u64| match extents.last_mut() {
            Some((offset, length)) if *offset + *length == start => *length += end - start,
            _ => extents.push((start, end - start)),
        };
        let mut list = self.list(file, 0)?;
        for block in 0..file.blocks {
            if list.next()?.1 & !DATA_UNCOMPRESSED != 0 {
                add(block * block_size, ((block + 1).saturating_mul(block_size)).min(size));
            }
        }
        if file.blocks * block_size < size {
            add(file.blocks * block_size, size);
        }
        Ok(if extents.len() > MAX_EXTENTS { vec![(0, size)] } else { extents })
    }

    /// The list of a file's blocks from `block` on.
    fn list<'a>(&'a self, file: &'a File, block: u64) -> Result<BlockList<'a>, Error> {
        let start = {
            let places = file.places.lock().unwrap_or_else(PoisonError::into_inner);
            let known = usize::try_from(block / STEP).unwrap_or(usize::MAX).min(places.known.len() - 1);
            let known = places.known.get(known).copied().unwrap_or(places.last);
            if places.last.block > known.block && places.last.block <= block { places.last } else { known }
        };
        let cursor = self.blocks.cursor("list of blocks", start.listed);
        let mut list = BlockList { file, cursor, block: start.block, address: start.address };
        while list.block < block {
            list.next()?;
        }
        Ok(list)
    }
}

/// Goes through the sizes of a file's blocks.
struct BlockList<'a> {
    file: &'a File,
    cursor: Cursor<'a>,
    block: u64,
    address: u64,
}

impl BlockList<'_> {
    /// Address and size word of the next block.
    fn next(&mut self) -> Result<(u64, u32), Error> {
        let size = self.cursor.read::<U32>()?.get();
        let address = self.address;
        let bytes = u64::from(size & !DATA_UNCOMPRESSED);
        self.address = address.checked_add(bytes).ok_or_else(|| self.cursor.damaged("an impossible size"))?;
        self.block += 1;
        if self.block.is_multiple_of(STEP) {
            let place = self.place();
            let mut places = self.file.places.lock().unwrap_or_else(PoisonError::into_inner);
            if places.known.len() as u64 == self.block / STEP {
                places.known.push(place);
            }
        }
        Ok((address, size))
    }

    fn place(&self) -> Place {
        Place { block: self.block, listed: self.cursor.position(), address: self.address }
    }

    /// Lets the next reader go on from here.
    fn remember(self) {
        self.file.places.lock().unwrap_or_else(PoisonError::into_inner).last = self.place();
    }
}
