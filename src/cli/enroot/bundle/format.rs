//! The form of a bundle: this executable, the squashfs image, what the bundle is (JSON), and a trailer by which the
//! executable finds the other two in its own file.
//!
//! ```text
//! executable | zeros to a whole page | image | about | MAGIC, start of image, start of about (u64, little-endian)
//! ```

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

const MAGIC: [u8; 16] = *b"pyxis bundle 1\n\0";
const TRAILER: usize = MAGIC.len() + 16;
/// Where an image begins: at a multiple of this.
const PAGE: u64 = 4096;
/// Most bytes of [`About`].
const MAX_ABOUT: u64 = 64 << 10;

/// What a bundle says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct About {
    /// Its name: that of the image.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// Where to unpack it, if not in a directory of its name.
    pub target: Option<String>,
    /// SHA-256 of the image, in hexadecimal.
    pub checksum: Option<String>,
}

/// A bundle that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    pub about: About,
    /// Where in the file the image begins, and how long it is.
    pub start: u64,
    pub size: u64,
}

/// Bytes between an executable of `length` bytes and the image.
pub fn padding(length: u64) -> u64 {
    length.next_multiple_of(PAGE) - length
}

/// Writes what follows the image, which is from `start` to `end`.
pub fn finish(output: &mut impl Write, about: &About, start: u64, end: u64) -> io::Result<()> {
    let text = serde_json::to_vec(about)?;
    if text.len() as u64 > MAX_ABOUT {
        return Err(io::Error::other("the description is too long"));
    }
    output.write_all(&text)?;
    output.write_all(&MAGIC)?;
    output.write_all(&start.to_le_bytes())?;
    output.write_all(&end.to_le_bytes())
}

/// What is in `file`, if it is a bundle.
pub fn read(file: &File) -> io::Result<Option<Bundle>> {
    let Some(about_end) = file.metadata()?.len().checked_sub(TRAILER as u64) else { return Ok(None) };
    let mut trailer = [0; TRAILER];
    file.read_exact_at(&mut trailer, about_end)?;
    let Some(rest) = trailer.strip_prefix(&MAGIC) else { return Ok(None) };
    let number = |from: usize| {
        let bytes = rest.get(from..from + 8).and_then(|bytes| bytes.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    };
    let (start, end) = (number(0), number(8));
    let damaged = || io::Error::other("the bundle is damaged");
    let length = about_end.checked_sub(end).filter(|&length| length <= MAX_ABOUT).ok_or_else(damaged)?;
    let size = end.checked_sub(start).ok_or_else(damaged)?;
    let mut text = vec![0; usize::try_from(length).map_err(|_| damaged())?];
    file.read_exact_at(&mut text, end)?;
    Ok(Some(Bundle { about: serde_json::from_slice(&text).map_err(|_| damaged())?, start, size }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn about() -> About {
        About { name: "x".into(), description: Some("it's".into()), target: None, checksum: None }
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn what_is_written_is_found() {
        let mut bytes = vec![1; 10];
        bytes.resize(10 + usize::try_from(padding(10)).unwrap(), 0);
        bytes.extend([7; 100]);
        finish(&mut bytes, &about(), 4096, 4196).unwrap();
        let bundle = read(&file(&bytes)).unwrap().unwrap();
        assert_eq!(bundle, Bundle { about: about(), start: 4096, size: 100 });
        bytes.pop();
        assert_eq!(read(&file(&bytes)).unwrap(), None);
        assert_eq!(read(&file(b"short")).unwrap(), None);
        let long = About { name: "x".repeat(100_000), ..about() };
        assert!(finish(&mut Vec::new(), &long, 0, 0).is_err());
    }

    proptest! {
        #[test]
        fn damage_is_noticed(start in any::<u64>(), end in any::<u64>(), text in "[{}a-z\":]{0,40}") {
            let bytes = [text.as_bytes(), &MAGIC, &start.to_le_bytes(), &end.to_le_bytes()].concat();
            let _ = read(&file(&bytes));
        }
    }
}
