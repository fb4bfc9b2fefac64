//! The compressions of squashfs, one block at a time.

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use flate2::{Compress, FlushCompress, Status};
use lzma_rust2::{CheckType, LzmaOptions, XzOptions, XzWriter};

/// A compression, by the name mksquashfs has for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `gzip`: zlib streams.
    Gzip,
    /// `lzo`: LZO1X.
    Lzo,
    /// `xz`
    Xz,
    /// `lz4`
    Lz4,
    /// `zstd`
    Zstd,
}

impl Compression {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Gzip, Self::Lzo, Self::Xz, Self::Lz4, Self::Zstd];

    /// The number in the superblock.
    pub(super) fn id(self) -> u16 {
        match self {
            Self::Gzip => 1,
            Self::Lzo => 3,
            Self::Xz => 4,
            Self::Lz4 => 5,
            Self::Zstd => 6,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Lzo => "lzo",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }

    /// The levels that `-Xcompression-level` takes, and the one without it.
    pub(super) fn levels(self) -> Option<(std::ops::RangeInclusive<u32>, u32)> {
        match self {
            Self::Gzip => Some((1..=9, 9)),
            Self::Zstd => Some((1..=22, 15)),
            // Another algorithm with other levels than mksquashfs has.
            Self::Lzo => Some((1..=9, 8)),
            Self::Xz | Self::Lz4 => None,
        }
    }

    /// The content of the compressor's options in the image, without which the kernel refuses it.
    pub(super) fn stored_options(self) -> Option<[u8; 8]> {
        // Version 1 of the legacy block format, no flags.
        (self == Self::Lz4).then_some([1, 0, 0, 0, 0, 0, 0, 0])
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Compression {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        Self::ALL.into_iter().find(|compression| compression.name() == name).ok_or(())
    }
}

/// Compresses blocks. Each thread has its own.
pub(super) struct Compressor(Kind);

enum Kind {
    Gzip(Compress),
    Lzo(Box<lzokay::compress::Dict>),
    Xz(XzOptions),
    Lz4,
    Zstd(zstd::bulk::Compressor<'static>),
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compressor").finish_non_exhaustive()
    }
}

impl Compressor {
    /// For blocks of at most `block_size` bytes. `level` is one of the compression's.
    pub fn new(compression: Compression, level: u32, block_size: usize) -> io::Result<Self> {
        Ok(Self(match compression {
            Compression::Gzip => Kind::Gzip(Compress::new(flate2::Compression::new(level), true)),
            Compression::Lzo => Kind::Lzo(lzokay::compress::Dict::new()),
            Compression::Xz => {
                // The kernel checks no other sum, and has a dictionary of one block.
                let dict_size = u32::try_from(block_size).unwrap_or(u32::MAX).max(8192);
                let lzma_options = LzmaOptions { dict_size, ..LzmaOptions::with_preset(6) };
                Kind::Xz(XzOptions { lzma_options, check_type: CheckType::Crc32, ..XzOptions::default() })
            }
            Compression::Lz4 => Kind::Lz4,
            Compression::Zstd => Kind::Zstd(zstd::bulk::Compressor::new(level.cast_signed())?),
        }))
    }

    /// Compresses `input` into `output`, whose content is replaced; `false` if that does not make it smaller.
    pub fn compress(&mut self, input: &[u8], output: &mut Vec<u8>) -> io::Result<bool> {
        output.clear();
        match &mut self.0 {
            Kind::Gzip(stream) => {
                stream.reset();
                output.reserve(input.len());
                // More than the input is of no interest: a stream that does not end is too long.
                let status = stream.compress_vec(input, output, FlushCompress::Finish).map_err(io::Error::other)?;
                if status != Status::StreamEnd {
                    return Ok(false);
                }
            }
            Kind::Lzo(dictionary) => {
                output.resize(lzokay::compress::compress_worst_size(input.len()), 0);
                let length = lzokay::compress::compress_no_alloc(input, output, dictionary)
                    .map_err(|error| io::Error::other(format!("lzo: {error:?}")))?;
                output.truncate(length);
            }
            Kind::Xz(options) => {
                let mut writer = XzWriter::new(std::mem::take(output), options.clone()).map_err(io::Error::other)?;
                writer.write_all(input)?;
                *output = writer.finish().map_err(io::Error::other)?;
            }
            Kind::Lz4 => {
                output.resize(lz4_flex::block::get_maximum_output_size(input.len()), 0);
                let length = lz4_flex::block::compress_into(input, output).map_err(io::Error::other)?;
                output.truncate(length);
            }
            Kind::Zstd(context) => {
                output.reserve(zstd::zstd_safe::compress_bound(input.len()));
                context.compress_to_buffer(input, output)?;
            }
        }
        Ok(output.len() < input.len())
    }
}
