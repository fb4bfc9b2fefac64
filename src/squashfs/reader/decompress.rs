//! Decompression of blocks, which are small and of a known largest size: into a buffer of that size, with no window or
//! dictionary larger than a block could have used.

use std::io::Read;
use std::sync::{Mutex, PoisonError};

use flate2::{Decompress, FlushDecompress, Status};
use lzma_rust2::{LzmaReader, XzReader};

use super::format::Compressor;

/// Most memory of an xz or lzma decoder, KiB. Dictionaries are at most as large as a block: 1 MiB.
const LZMA_MEMORY: u32 = 4096;

/// Decompresses blocks of one image. The states of decoders that are expensive to make are kept for the next block.
#[derive(Debug)]
pub struct Decompressor {
    compressor: Compressor,
    idle: Mutex<Vec<Decoder>>,
}

enum Decoder {
    Gzip(Decompress),
    Zstd(zstd::bulk::Decompressor<'static>),
    Stateless,
}

impl std::fmt::Debug for Decoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Decoder")
    }
}

impl Decompressor {
    pub fn new(compressor: Compressor) -> Self {
        Self { compressor, idle: Mutex::default() }
    }

    /// Decompresses `from`, a whole block, and says how many bytes of `to` it takes. `None` if it is no such block or needs
    /// more.
    pub fn decompress(&self, from: &[u8], to: &mut [u8]) -> Option<usize> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut decoder = match idle {
            Some(decoder) => decoder,
            None => Decoder::new(self.compressor)?,
        };
        let size = decoder.decompress(self.compressor, from, to);
        // After a failure its state is uncertain.
        if size.is_some() {
            self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(decoder);
        }
        size
    }
}

impl Decoder {
    fn new(compressor: Compressor) -> Option<Self> {
        Some(match compressor {
            Compressor::Gzip => Self::Gzip(Decompress::new(true)),
            Compressor::Zstd => Self::Zstd(zstd::bulk::Decompressor::new().ok()?),
            Compressor::Lzma | Compressor::Lzo | Compressor::Xz | Compressor::Lz4 => Self::Stateless,
        })
    }

    fn decompress(&mut self, compressor: Compressor, from: &[u8], to: &mut [u8]) -> Option<usize> {
        match (self, compressor) {
            (Self::Gzip(decoder), _) => {
                decoder.reset(true);
                match decoder.decompress(from, to, FlushDecompress::Finish) {
                    Ok(Status::StreamEnd) => usize::try_from(decoder.total_out()).ok(),
                    _ => None,
                }
            }
            (Self::Zstd(decoder), _) => decoder.decompress_to_buffer(from, to).ok(),
            (_, Compressor::Lzo) => lzokay::decompress::decompress(from, to).ok(),
            (_, Compressor::Lz4) => lz4_flex::block::decompress_into(from, to).ok(),
            (_, Compressor::Xz) => read_all(XzReader::new_mem_limit(from, false, LZMA_MEMORY), to),
            (_, Compressor::Lzma) => read_all(LzmaReader::new_mem_limit(from, LZMA_MEMORY, None).ok()?, to),
            (Self::Stateless, Compressor::Gzip | Compressor::Zstd) => None,
        }
    }
}

/// Reads `from` to its end, which has to come within `to`.
fn read_all(mut from: impl Read, to: &mut [u8]) -> Option<usize> {
    let mut size = 0;
    while let Some(rest) = to.get_mut(size..).filter(|rest| !rest.is_empty()) {
        match from.read(rest).ok()? {
            0 => return Some(size),
            read => size += read,
        }
    }
    (from.read(&mut [0]).ok()? == 0).then_some(size)
}
