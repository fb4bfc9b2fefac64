//! Decompression of a blob, whose first bytes tell how it is compressed: media types have been wrong before, and both
//! digests are checked whatever they say.

#![forbid(unsafe_code)]

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

/// Largest zstd window, as a power of two: 64 MiB, which is what other container engines take, too.
const MAX_WINDOW_LOG: u32 = 26;

/// The tar stream of a blob.
pub struct Inflate<R: BufRead>(Format<R>);

enum Format<R: BufRead> {
    Plain(R),
    /// RFC 1952, also with several members.
    Gzip(Box<MultiGzDecoder<R>>),
    /// RFC 8878, also with several frames.
    Zstd(Box<zstd::stream::read::Decoder<'static, R>>),
}

impl<R: BufRead> std::fmt::Debug for Inflate<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl<R: BufRead> Inflate<R> {
    /// Looks at the first bytes of `blob`, the first buffer of which is longer than any signature unless the blob is
    /// shorter.
    pub fn new(mut blob: R) -> io::Result<Self> {
        let format = match blob.fill_buf()? {
            [0x1f, 0x8b, ..] => Format::Gzip(Box::new(MultiGzDecoder::new(blob))),
            // A frame, or a skippable frame, which is how seekable streams begin.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
                let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
                decoder.window_log_max(MAX_WINDOW_LOG)?;
                Format::Zstd(Box::new(decoder))
            }
            _ => Format::Plain(blob),
        };
        Ok(Self(format))
    }

    /// The name of the compression.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Format::Plain(_) => "uncompressed",
            Format::Gzip(_) => "gzip",
            Format::Zstd(_) => "zstd",
        }
    }
}

impl<R: BufRead> Read for Inflate<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        match &mut self.0 {
            Format::Plain(blob) => blob.read(to),
            Format::Gzip(decoder) => decoder.read(to),
            Format::Zstd(decoder) => decoder.read(to),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;
    use proptest::prelude::*;

    use super::*;

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn inflated(blob: &[u8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        Inflate::new(blob)?.read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    #[test]
    fn every_format_gives_the_stream() {
        let (first, second) = (vec![7; 300_000], b"second".to_vec());
        let both = [first.clone(), second.clone()].concat();
        let zstd = |bytes: &[u8]| zstd::encode_all(bytes, 1).unwrap();
        let skippable = [&[0x5a, 0x2a, 0x4d, 0x18, 2, 0, 0, 0, 9, 9][..], &zstd(&both)].concat();
        for blob in [
            both.clone(),
            gzip(&both),
            zstd(&both),
            [gzip(&first), gzip(&second)].concat(),
            [gzip(&first), gzip(b""), gzip(&second)].concat(),
            [zstd(&first), zstd(&second)].concat(),
            skippable,
        ] {
            assert!(inflated(&blob).unwrap() == both);
        }
        assert_eq!(inflated(b"").unwrap(), b"");
    }

    #[test]
    fn cut_and_damaged_streams_fail() {
        for blob in [gzip(&[7; 1000]), zstd::encode_all(&[7; 1000][..], 1).unwrap()] {
            assert!(inflated(&blob[..blob.len() - 1]).is_err());
            let mut damaged = blob.clone();
            damaged.push(1);
            assert!(inflated(&damaged).is_err());
        }
    }

    #[test]
    fn a_huge_window_is_refused() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(27).unwrap();
        encoder.write_all(b"small").unwrap();
        let error = inflated(&encoder.finish().unwrap()).unwrap_err();
        assert!(error.to_string().contains("memory"), "{error}");
    }

    proptest! {
        #[test]
        fn never_panics(signature in prop::sample::select(vec![vec![], vec![0x1f, 0x8b, 8], vec![0x28, 0xb5, 0x2f, 0xfd]]),
                        rest in any::<Vec<u8>>()) {
            let _ = inflated(&[signature, rest].concat());
        }
    }
}
