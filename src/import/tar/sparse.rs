//! Maps of sparse files: GNU's old one in headers, and the PAX versions 0.0, 0.1 and 1.0 (GNU tar manual, "Storing Sparse
//! Files").

use crate::erofs::Extent;

/// Most pieces of a sparse file: 16 MiB of memory.
pub const MAX_PIECES: usize = 1 << 20;

/// Offset and length, unchecked.
pub type RawExtent = (u64, u64);

/// Checks a map and brings it into the form that [`erofs`](crate::erofs) takes: pieces in order, apart from each other,
/// not empty, within `size`, and of `stored` bytes altogether.
pub fn extents(pieces: &[RawExtent], size: u64, stored: u64) -> Result<Vec<Extent>, &'static str> {
    if i64::try_from(size).is_err() {
        return Err("its size is beyond what a file can have");
    }
    let mut extents: Vec<Extent> = Vec::with_capacity(pieces.len());
    let (mut end, mut total) = (0, 0_u64);
    for &(offset, length) in pieces {
        let piece_end =
            offset.checked_add(length).filter(|&end| end <= size).ok_or("its sparse map exceeds its size")?;
        if offset < end {
            return Err("its sparse map is not in order");
        }
        match extents.last_mut() {
            _ if length == 0 => {}
            Some(last) if last.offset + last.length == offset => last.length += length,
            _ => extents.push(Extent { offset, length }),
        }
        end = piece_end;
        // Pieces do not overlap: the sum is at most `size`.
        total += length;
    }
    if total == stored { Ok(extents) } else { Err("its sparse map does not fit its data") }
}

/// Reads the map at the start of a PAX 1.0 sparse file: decimal numbers, one a line, first how many pieces follow. Fed
/// with one byte after the other.
#[derive(Debug, Default)]
pub struct MapReader {
    number: Option<u64>,
    count: Option<usize>,
    offset: Option<u64>,
    pieces: Vec<RawExtent>,
}

impl MapReader {
    /// Takes one byte; `true` when the map is complete. What follows in the block is padding.
    pub fn push(&mut self, byte: u8) -> Result<bool, &'static str> {
        const BAD: &str = "its sparse map holds what is no number";
        if byte != b'\n' {
            let digit = char::from(byte).to_digit(10).ok_or(BAD)?;
            let number = self.number.unwrap_or(0).checked_mul(10).and_then(|number| number.checked_add(digit.into()));
            self.number = Some(number.ok_or(BAD)?);
            return Ok(false);
        }
        let number = self.number.take().ok_or(BAD)?;
        match (self.count, self.offset.take()) {
            (None, _) => {
                let count = usize::try_from(number).ok().filter(|&count| count <= MAX_PIECES);
                self.count = Some(count.ok_or("its sparse map is too long")?);
            }
            (_, None) => self.offset = Some(number),
            (_, Some(offset)) => self.pieces.push((offset, number)),
        }
        Ok(self.offset.is_none() && self.count == Some(self.pieces.len()))
    }

    /// The map.
    pub fn pieces(&self) -> &[RawExtent] {
        &self.pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_are_checked() {
        let extent = |offset, length| Extent { offset, length };
        assert_eq!(
            extents(&[(0, 5), (5, 5), (20, 0), (20, 1), (30, 0)], 30, 11),
            Ok(vec![extent(0, 10), extent(20, 1)])
        );
        assert_eq!(extents(&[], 30, 0), Ok(vec![]));
        for (pieces, size, stored) in [
            (&[(0, 31)][..], 30, 31),
            (&[(u64::MAX, 2)], 30, 2),
            (&[(10, 5), (12, 5)], 30, 10),
            (&[(10, 5), (0, 5)], 30, 10),
            (&[(10, 5)], 30, 6),
            (&[(10, 5)], 1 << 63, 5),
        ] {
            assert!(extents(pieces, size, stored).is_err(), "{pieces:?}");
        }
    }

    fn read(text: &[u8]) -> Option<Vec<RawExtent>> {
        let mut map = MapReader::default();
        for &byte in text {
            if map.push(byte).ok()? {
                return Some(map.pieces);
            }
        }
        None
    }

    #[test]
    fn maps_of_version_1_0() {
        assert_eq!(read(b"0\n"), Some(vec![]));
        assert_eq!(read(b"2\n0\n5\n7\n1\n\0\0"), Some(vec![(0, 5), (7, 1)]));
        for bad in [&b"\n"[..], b"x\n", b"1\n2\n", b"1\n\n", b"1048577\n", b"99999999999999999999\n", b"-1\n"] {
            assert_eq!(read(bad), None, "{}", bad.escape_ascii());
        }
    }
}
