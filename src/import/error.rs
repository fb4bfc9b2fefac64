//! What can be wrong with a layer.

use std::borrow::Cow;
use std::fmt::{self, Write};
use std::io;

use crate::erofs;
use crate::squashfs::reader;

/// Why a layer cannot be turned into an image. Renders as one line, whatever bytes the layer holds.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The stream failed: what it was given from (network, decompressor) says why.
    #[error("cannot read the layer: {0}")]
    Read(#[source] io::Error),
    /// The image could not be written: this machine's fault.
    #[error("cannot write the layer image: {0}")]
    Write(#[source] io::Error),
    /// The stream is no layer.
    #[error("malformed layer: {place}: {problem}")]
    Malformed {
        /// Which part of it.
        place: Place,
        /// What is wrong there.
        problem: Cow<'static, str>,
    },
    /// A squashfs image that cannot be read.
    #[error(transparent)]
    Squashfs(reader::Error),
    /// [`LayerLimits::max_bytes`](super::LayerLimits::max_bytes).
    #[error("the unpacked layer is larger than the limit allows")]
    TooLarge,
    /// [`LayerLimits::max_entries`](super::LayerLimits::max_entries).
    #[error("the layer has more files and directories than the limit allows")]
    TooManyEntries,
}

impl From<erofs::Error> for LayerError {
    fn from(error: erofs::Error) -> Self {
        match error {
            erofs::Error::Write(error) => Self::Write(error),
            erofs::Error::TooLarge => Self::TooLarge,
            erofs::Error::RootXattrs => Self::entry(b"/", error.to_string()),
        }
    }
}

impl LayerError {
    /// A problem with the entry called `name`.
    pub(super) fn entry(name: &[u8], problem: impl Into<Cow<'static, str>>) -> Self {
        Self::Malformed { place: Place::Entry(name.into()), problem: problem.into() }
    }

    /// A problem with the header that begins at `offset` of the stream.
    pub(super) fn header(offset: u64, problem: impl Into<Cow<'static, str>>) -> Self {
        Self::Malformed { place: Place::Header(offset), problem: problem.into() }
    }
}

/// A part of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// The entry with this name.
    Entry(Box<[u8]>),
    /// The tar header at this offset of the uncompressed stream.
    Header(u64),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry(name) => write!(f, "entry {}", Quoted(name)),
            Self::Header(offset) => write!(f, "header at byte {offset}"),
        }
    }
}

/// A name as it can be shown: quoted, without control characters, and cut if it is long.
#[derive(Debug)]
pub(super) struct Quoted<'a>(pub &'a [u8]);

/// Most bytes shown of a name.
const SHOWN: usize = 200;

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_char('"')?;
        for chunk in self.0[..self.0.len().min(SHOWN)].utf8_chunks() {
            write!(f, "{}{}", chunk.valid().escape_debug(), chunk.invalid().escape_ascii())?;
        }
        f.write_str(if self.0.len() > SHOWN { "…\"" } else { "\"" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_on_one_line() {
        assert_eq!(Quoted(b"a\nb\xff\x1b[31m\"\xc3\xa4").to_string(), r#""a\nb\xff\u{1b}[31m\"ä""#);
        assert_eq!(Quoted(&[b'x'; 300]).to_string().chars().count(), 203);
        let error = LayerError::entry(b"x", "is odd");
        assert_eq!(error.to_string(), "malformed layer: entry \"x\": is odd");
    }
}
