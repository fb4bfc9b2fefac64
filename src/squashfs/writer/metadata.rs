//! Metadata: a stream of blocks of 8 KiB, each compressed by itself, behind a header of two bytes.

use std::io;

use super::compress::Compressor;

/// Bytes of a block before compression.
pub const METADATA_BLOCK: usize = 8192;
/// In the header: the block is stored as it is.
const STORED: u16 = 1 << 15;

/// A place in a table: offset of a block as it is stored, and offset in the block as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Place {
    /// From the beginning of the table.
    pub block: u64,
    /// Below [`METADATA_BLOCK`].
    pub offset: u16,
}

impl Place {
    /// As inodes and extended attributes are referred to.
    pub fn reference(self) -> u64 {
        self.block << 16 | u64::from(self.offset)
    }
}

/// A table being written, in memory.
#[derive(Debug)]
pub struct Table {
    compressor: Option<Compressor>,
    stored: Vec<u8>,
    starts: Vec<u64>,
    current: Vec<u8>,
    scratch: Vec<u8>,
}

impl Table {
    /// An empty table, not compressed without `compressor`.
    pub fn new(compressor: Option<Compressor>) -> Self {
        Self {
            compressor,
            stored: Vec::new(),
            starts: Vec::new(),
            current: Vec::with_capacity(METADATA_BLOCK),
            scratch: Vec::new(),
        }
    }

    /// Where the next byte goes.
    pub fn place(&mut self) -> io::Result<Place> {
        if self.current.len() == METADATA_BLOCK {
            self.flush()?;
        }
        // Below 8192.
        Ok(Place { block: self.stored.len() as u64, offset: self.current.len() as u16 })
    }

    /// Appends `bytes`.
    pub fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            if self.current.len() == METADATA_BLOCK {
                self.flush()?;
            }
            let (now, later) = bytes.split_at(bytes.len().min(METADATA_BLOCK - self.current.len()));
            self.current.extend_from_slice(now);
            bytes = later;
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let smaller = match &mut self.compressor {
            Some(compressor) => compressor.compress(&self.current, &mut self.scratch)?,
            None => false,
        };
        let (bytes, flag) = if smaller { (&self.scratch, 0) } else { (&self.current, STORED) };
        self.starts.push(self.stored.len() as u64);
        // At most 8192.
        self.stored.extend_from_slice(&(bytes.len() as u16 | flag).to_le_bytes());
        self.stored.extend_from_slice(bytes);
        self.current.clear();
        Ok(())
    }

    /// The bytes of the table, and where in them its blocks begin.
    pub fn finish(mut self) -> io::Result<(Vec<u8>, Vec<u64>)> {
        if !self.current.is_empty() {
            self.flush()?;
        }
        Ok((self.stored, self.starts))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_where_the_bytes_are() {
        let mut table = Table::new(None);
        table.write(&[1; METADATA_BLOCK - 1]).unwrap();
        assert_eq!(table.place().unwrap(), Place { block: 0, offset: 8191 });
        table.write(&[2]).unwrap();
        assert_eq!(table.place().unwrap(), Place { block: 8194, offset: 0 });
        table.write(&[3; 5]).unwrap();
        assert_eq!(table.place().unwrap().reference(), 8194 << 16 | 5);
        let (bytes, starts) = table.finish().unwrap();
        assert_eq!(starts, [0, 8194]);
        assert_eq!(bytes.len(), 2 + 8192 + 2 + 5);
        assert_eq!(bytes[..2], [0x00, 0xa0]);
        assert_eq!(bytes[8194..], [0x05, 0x80, 3, 3, 3, 3, 3]);
    }
}
