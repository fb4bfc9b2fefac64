//! The 512-byte header block in all its dialects: v7, ustar (POSIX.1-1988), GNU and star.

use super::sparse::RawExtent;

/// Bytes of a block: headers, and what data is padded to.
pub const BLOCK: usize = 512;

/// A header block with a correct checksum.
#[derive(Debug, Clone, Copy)]
pub struct Header<'a>(&'a [u8; BLOCK]);

/// Why a header block is unusable.
pub type Problem = &'static str;

impl<'a> Header<'a> {
    /// Checks the checksum: the sum of all bytes, the field itself taken as spaces. Historic writers summed signed bytes.
    pub fn new(block: &'a [u8; BLOCK]) -> Result<Self, Problem> {
        let header = Self(block);
        let expected = number(&block[148..156]).ok_or("its checksum is no number; is this a tar archive?")?;
        let others = || block[..148].iter().chain(&block[156..]);
        let unsigned = others().map(|&byte| i64::from(byte)).sum::<i64>() + 8 * 32;
        let signed = others().map(|&byte| i64::from(byte.cast_signed())).sum::<i64>() + 8 * 32;
        if expected == unsigned || expected == signed {
            Ok(header)
        } else {
            Err("its checksum is wrong; is this a tar archive?")
        }
    }

    /// The kind of entry.
    pub fn typeflag(&self) -> u8 {
        self.0[156]
    }

    /// The name, joined with its prefix where the dialect has one.
    pub fn path(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match (&self.0[257..263], &self.0[508..512]) {
            (b"ustar\0", b"tar\0") => text(&self.0[345..476]),
            (b"ustar\0", _) => text(&self.0[345..500]),
            _ => b"",
        };
        if prefix.is_empty() { name.to_vec() } else { [prefix, b"/", name].concat() }
    }

    /// Target of a link.
    pub fn link(&self) -> &'a [u8] {
        text(&self.0[157..257])
    }

    /// Permission bits; other bits are dropped.
    pub fn mode(&self) -> Result<u16, Problem> {
        number(&self.0[100..108]).map(|mode| (mode & 0o7777) as u16).ok_or("its mode is no number")
    }

    /// Bytes that follow the header.
    pub fn size(&self) -> Result<u64, Problem> {
        let size = number(&self.0[124..136]).ok_or("its size is no number")?;
        u64::try_from(size).map_err(|_| "its size is negative")
    }

    /// Seconds since 1970.
    pub fn mtime(&self) -> Result<i64, Problem> {
        number(&self.0[136..148]).ok_or("its modification time is no number")
    }

    /// GNU type `S`: the pieces of the sparse file, whether an extension block follows, and the file's size.
    pub fn gnu_sparse(&self) -> Result<(Vec<RawExtent>, bool, u64), Problem> {
        let size = number(&self.0[483..495]).and_then(|size| u64::try_from(size).ok());
        Ok((sparse_pieces(&self.0[386..482])?, self.0[482] != 0, size.ok_or("its real size is no number")?))
    }
}

/// The pieces in an extension block of a GNU sparse file, and whether another one follows.
pub fn sparse_extension(block: &[u8; BLOCK]) -> Result<(Vec<RawExtent>, bool), Problem> {
    Ok((sparse_pieces(&block[..504])?, block[504] != 0))
}

/// Offsets and lengths in fields of 12 bytes; the first empty one ends the list.
fn sparse_pieces(fields: &[u8]) -> Result<Vec<RawExtent>, Problem> {
    let field = |field: &[u8]| number(field).and_then(|value| u64::try_from(value).ok());
    fields
        .chunks_exact(24)
        .take_while(|piece| piece[0] != 0)
        .map(|piece| field(&piece[..12]).zip(field(&piece[12..])).ok_or("its sparse map holds what is no number"))
        .collect()
}

/// A text field: up to its first NUL.
pub fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// A numeric field: octal digits between spaces or NULs (none at all is 0), or GNU's base-256, a big-endian two's
/// complement number marked by the highest bit.
pub fn number(field: &[u8]) -> Option<i64> {
    if let [first @ 0x80..=0xff, rest @ ..] = field {
        // Seven bits of the first byte count, the uppermost is the sign.
        let first = i128::from((first << 1).cast_signed() >> 1);
        let value = rest.iter().try_fold(first, |value, &byte| value.checked_mul(256)?.checked_add(byte.into()))?;
        return value.try_into().ok();
    }
    let start = field.iter().position(|&byte| byte != b' ' && byte != 0).unwrap_or(field.len());
    let digits = text(&field[start..]).trim_ascii_end();
    digits.iter().try_fold(0_i64, |value, &digit| match digit {
        b'0'..=b'7' => value.checked_mul(8)?.checked_add((digit - b'0').into()),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"  644 \0", Some(0o644)),
            (b"\0\0\0\0", Some(0)),
            (b"    ", Some(0)),
            (b"77777777777 ", Some(0o77777777777)),
            (b"644\0junk", Some(0o644)),
            (b"64x", None),
            (b"-1", None),
            (b"8", None),
            (b"\x80\0\0\0\0\0\0\0\0\0\x01\x02", Some(258)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xc0\0\0\0\0\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(number(field), value, "{}", field.escape_ascii());
        }
    }
}
