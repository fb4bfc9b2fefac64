//! Extended attributes: names and values in one table, and an index that inodes refer to.

use std::collections::HashMap;
use std::io;

use super::metadata::Table;

/// What an inode without extended attributes refers to.
pub const NO_XATTRS: u32 = u32::MAX;

/// Prefixes that squashfs knows, by their number.
const PREFIXES: [&[u8]; 3] = [b"user.", b"trusted.", b"security."];

/// The extended attributes of an image. Equal sets are stored once.
#[derive(Debug)]
pub struct XattrTable {
    pairs: Table,
    /// Reference to the first pair, number of pairs, bytes of all of them.
    sets: Vec<(u64, u32, u32)>,
    known: HashMap<Vec<u8>, u32>,
}

impl XattrTable {
    /// An empty table.
    pub fn new(pairs: Table) -> Self {
        Self { pairs, sets: Vec::new(), known: HashMap::new() }
    }

    /// The number of this set of attributes. Names in other name spaces than squashfs has are left out.
    pub fn add(&mut self, xattrs: &[(Vec<u8>, Vec<u8>)]) -> io::Result<u32> {
        let (mut bytes, mut count, mut size) = (Vec::new(), 0, 0);
        for (name, value) in xattrs {
            let known =
                PREFIXES.iter().zip(0u16..).find_map(|(prefix, number)| Some((name.strip_prefix(*prefix)?, number)));
            let Some((suffix, number)) = known else { continue };
            let too_long = |_| io::Error::other("an extended attribute is too long");
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(&u16::try_from(suffix.len()).map_err(too_long)?.to_le_bytes());
            bytes.extend_from_slice(suffix);
            bytes.extend_from_slice(&u32::try_from(value.len()).map_err(too_long)?.to_le_bytes());
            bytes.extend_from_slice(value);
            count += 1;
            // What listxattr(2) would take, which is how the kernel uses it.
            size += name.len() as u32 + 1;
        }
        if count == 0 {
            return Ok(NO_XATTRS);
        }
        if let Some(&number) = self.known.get(&bytes) {
            return Ok(number);
        }
        let reference = self.pairs.place()?.reference();
        self.pairs.write(&bytes)?;
        let number = self.sets.len() as u32;
        self.sets.push((reference, count, size));
        self.known.insert(bytes, number);
        Ok(number)
    }

    /// Pairs, then index, as they go to offset `start` of the image; and where in them the header is. `None` if there is
    /// nothing.
    pub fn finish(self, mut index: Table, start: u64) -> io::Result<Option<(Vec<u8>, u64)>> {
        if self.sets.is_empty() {
            return Ok(None);
        }
        let (mut bytes, _) = self.pairs.finish()?;
        for (reference, count, size) in &self.sets {
            index.write(&reference.to_le_bytes())?;
            index.write(&count.to_le_bytes())?;
            index.write(&size.to_le_bytes())?;
        }
        let (blocks, starts) = index.finish()?;
        let first = start + bytes.len() as u64;
        bytes.extend_from_slice(&blocks);
        let header = bytes.len() as u64;
        bytes.extend_from_slice(&start.to_le_bytes());
        bytes.extend_from_slice(&(self.sets.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&0u32.to_le_bytes());
        for offset in starts {
            bytes.extend_from_slice(&(first + offset).to_le_bytes());
        }
        Ok(Some((bytes, header)))
    }
}
