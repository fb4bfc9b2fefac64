//! PAX extended headers (POSIX.1-2001, pax, "pax Extended Header"): records `LENGTH KEY=VALUE\n` that override fields of
//! the header block.

use std::collections::BTreeMap;

use super::sparse::{MAX_PIECES, RawExtent};
use crate::erofs::{XattrTooLong, Xattrs};

/// What the records of one extended header say, as far as a layer needs it. Owners are not among it: all files of a layer
/// image belong to 0:0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pax {
    /// `path`.
    pub path: Option<Vec<u8>>,
    /// `linkpath`.
    pub linkpath: Option<Vec<u8>>,
    /// `size`.
    pub size: Option<u64>,
    /// `mtime`: seconds and nanoseconds.
    pub mtime: Option<(i64, u32)>,
    /// `GNU.sparse.*`.
    pub sparse: PaxSparse,
    /// `SCHILY.xattr.user.*`, without that prefix.
    xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
}

/// The records that describe a sparse file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PaxSparse {
    /// `GNU.sparse.major`, `GNU.sparse.minor`.
    pub version: (Option<u64>, Option<u64>),
    /// `GNU.sparse.name`: the header's own name is made up.
    pub name: Option<Vec<u8>>,
    /// `GNU.sparse.realsize` or `GNU.sparse.size`.
    pub size: Option<u64>,
    /// Versions 0.0 and 0.1.
    pub pieces: Vec<RawExtent>,
    /// `GNU.sparse.offset` before its `GNU.sparse.numbytes`.
    offset: Option<u64>,
}

impl Pax {
    /// Reads the records of one extended header.
    pub fn parse(mut records: &[u8]) -> Result<Self, &'static str> {
        let mut pax = Self::default();
        while !records.is_empty() {
            let space = records.iter().take(20).position(|&byte| byte == b' ').ok_or("a record has no length")?;
            let length = decimal(&records[..space]).and_then(|length| usize::try_from(length).ok());
            let length = length.filter(|&length| length > space + 1 && length <= records.len());
            let (record, rest) = records.split_at(length.ok_or("a record has a wrong length")?);
            records = rest;
            let record = record[space + 1..].strip_suffix(b"\n").ok_or("a record has a wrong length")?;
            let equals = record.iter().position(|&byte| byte == b'=').ok_or("a record has no \"=\"")?;
            pax.set(&record[..equals], &record[equals + 1..])?;
        }
        Ok(pax)
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), &'static str> {
        let number = || decimal(value).ok_or("a record that is a number holds something else");
        match key {
            // An empty value takes an earlier one back.
            b"path" => self.path = Some(value.to_vec()).filter(|value| !value.is_empty()),
            b"linkpath" => self.linkpath = Some(value.to_vec()).filter(|value| !value.is_empty()),
            b"size" => self.size = if value.is_empty() { None } else { Some(number()?) },
            b"mtime" if value.is_empty() => self.mtime = None,
            b"mtime" => self.mtime = Some(time(value).ok_or("its modification time is no number")?),
            b"GNU.sparse.major" => self.sparse.version.0 = Some(number()?),
            b"GNU.sparse.minor" => self.sparse.version.1 = Some(number()?),
            b"GNU.sparse.name" => self.sparse.name = Some(value.to_vec()),
            b"GNU.sparse.realsize" | b"GNU.sparse.size" => self.sparse.size = Some(number()?),
            b"GNU.sparse.offset" => self.sparse.offset = Some(number()?),
            b"GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or("its sparse map has a length without an offset")?;
                self.sparse.pieces.push((offset, number()?));
            }
            b"GNU.sparse.map" => {
                let numbers: Option<Vec<u64>> =
                    value.split(|&byte| byte == b',').filter(|number| !number.is_empty()).map(decimal).collect();
                let (pairs, []) = numbers.as_deref().ok_or("its sparse map holds what is no number")?.as_chunks()
                else {
                    return Err("its sparse map has an offset without a length");
                };
                self.sparse.pieces = pairs.iter().map(|&[offset, length]| (offset, length)).collect();
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.").map(unescape)
                    && let Some(name) = name.strip_prefix(b"user.")
                {
                    if name.is_empty() || name.contains(&0) {
                        return Err("an extended attribute has an invalid name");
                    }
                    self.xattrs.insert(name.to_vec(), value.to_vec());
                }
            }
        }
        if self.sparse.pieces.len() > MAX_PIECES { Err("its sparse map is too long") } else { Ok(()) }
    }

    /// Takes the records of `newer` as well; they count more. What describes one sparse file is not for the next.
    pub fn update(&mut self, newer: Self) {
        self.path = newer.path.or(self.path.take());
        self.linkpath = newer.linkpath.or(self.linkpath.take());
        self.size = newer.size.or(self.size);
        self.mtime = newer.mtime.or(self.mtime);
        self.xattrs.extend(newer.xattrs);
    }

    /// The extended attributes, in the order of their names.
    pub fn xattrs(&self) -> Result<Xattrs, XattrTooLong> {
        let mut xattrs = Xattrs::default();
        self.xattrs.iter().try_for_each(|(name, value)| xattrs.push_user(name, value))?;
        Ok(xattrs)
    }
}

impl PaxSparse {
    /// Whether the records describe a sparse file at all.
    pub fn is_some(&self) -> bool {
        *self != Self::default()
    }
}

/// A number without sign.
fn decimal(text: &[u8]) -> Option<u64> {
    std::str::from_utf8(text).ok().filter(|text| !text.starts_with('+'))?.parse().ok()
}

/// Seconds with an optional fraction; digits beyond the nanoseconds are cut off.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let fraction = parts.next().unwrap_or_default();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanoseconds = digits.fold(0, |value, digit| value * 10 + u32::from(digit - b'0'));
    // The fraction counts upwards from the second below.
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

/// GNU tar writes `=` and `%` in the names of extended attributes as `%3D` and `%25`.
fn unescape(name: &[u8]) -> Vec<u8> {
    let mut unescaped = Vec::with_capacity(name.len());
    let mut rest = name;
    while let [first, later @ ..] = rest {
        let (byte, later) = match rest {
            [b'%', b'3', b'D', later @ ..] => (b'=', later),
            [b'%', b'2', b'5', later @ ..] => (b'%', later),
            _ => (*first, later),
        };
        unescaped.push(byte);
        rest = later;
    }
    unescaped
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let body = key.len() + value.len() + 3;
        let length = (1..).find(|length| length.to_string().len() + body == *length).unwrap();
        [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
    }

    #[test]
    fn records_are_read() {
        let records = [
            record("path", b"a\nb"),
            record("linkpath", b"x=y"),
            record("size", b"123"),
            record("mtime", b"-1.25"),
            record("SCHILY.xattr.user.a%3Db%25", b"v\0\n"),
            record("SCHILY.xattr.user.empty", b""),
            record("SCHILY.xattr.security.capability", b"no"),
            record("comment", b"no"),
        ]
        .concat();
        let pax = Pax::parse(&records).unwrap();
        assert_eq!(pax.path.as_deref(), Some(&b"a\nb"[..]));
        assert_eq!(pax.linkpath.as_deref(), Some(&b"x=y"[..]));
        assert_eq!((pax.size, pax.mtime), (Some(123), Some((-2, 750_000_000))));
        let expected = [(b"a=b%".to_vec(), b"v\0\n".to_vec()), (b"empty".to_vec(), vec![])];
        assert_eq!(pax.xattrs.into_iter().collect::<Vec<_>>(), expected);
    }

    #[test]
    fn times() {
        for (text, time) in [
            ("0", Some((0, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("-0.000000001", Some((-1, 999_999_999))),
            ("-3", Some((-3, 0))),
            ("1.", Some((1, 0))),
            (".5", None),
            ("1.x", None),
            ("", None),
            ("+1", None),
            ("9223372036854775808", None),
        ] {
            assert_eq!(super::time(text.as_bytes()), time, "{text}");
        }
    }

    #[test]
    fn malformed_records_are_refused() {
        for records in [
            &b"x"[..],
            b"5 a=b",
            b"6 a=bc",
            b"3 \n",
            b"4 a\n",
            b"99 a=b\n",
            b"0 a=b\n",
            b"18446744073709551616 a=b\n",
            b"                     ",
            b"11 size=-1\n",
            b"24 GNU.sparse.numbytes=1\n",
            b"20 GNU.sparse.map=1\n",
            b"22 SCHILY.xattr.user.=a\n",
        ] {
            assert!(Pax::parse(records).is_err(), "{}", records.escape_ascii());
        }
    }

    #[test]
    fn newer_records_count_more() {
        let mut pax = Pax::parse(&[record("path", b"old"), record("mtime", b"1")].concat()).unwrap();
        pax.update(Pax::parse(&record("path", b"new")).unwrap());
        assert_eq!((pax.path.as_deref(), pax.mtime), (Some(&b"new"[..]), Some((1, 0))));
        for i in 0..10 {
            pax.update(Pax::parse(&record(&format!("SCHILY.xattr.user.{i}"), &[b'x'; 10_000])).unwrap());
            assert_eq!(pax.xattrs().is_ok(), i < 6);
        }
    }
}
