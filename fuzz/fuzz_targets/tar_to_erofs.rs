//! Any bytes as a layer: refused with one line, or written as an image that the tests' own reader finds sound.
//!
//! Checksums of headers are made right, so that the fuzzer gets past them.
#![no_main]

use std::fs::File;
use std::io::{Read, Seek};

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use spank_pyxis::import::{LayerLimits, write_layer};

#[path = "../../tests/erofs/reader.rs"]
mod reader;
#[allow(dead_code, reason = "the tests also read directories")]
#[path = "../../tests/erofs/tree.rs"]
mod tree;

/// Gives each block that has `ustar` where headers have it the right checksum.
fn mend(archive: &mut [u8]) {
    for header in archive.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fn write(archive: &[u8]) -> Option<Vec<u8>> {
    let mut image = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    let limits = LayerLimits { max_bytes: 4 << 20, max_entries: 10_000 };
    match write_layer(archive, &image, &limits) {
        Ok(summary) => {
            assert_eq!(summary.unpacked, archive.len() as u64);
            let mut bytes = Vec::new();
            image.rewind().unwrap();
            image.read_to_end(&mut bytes).unwrap();
            assert_eq!(summary.image, bytes.len() as u64);
            Some(bytes)
        }
        Err(error) => {
            let line = error.to_string();
            assert!(line.len() < 1500 && !line.contains('\n'), "{line:?}");
            None
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut archive = bytes.to_vec();
    mend(&mut archive);
    if let Some(image) = write(&archive) {
        reader::read(&image).unwrap();
        assert_eq!(write(&archive), Some(image), "not deterministic");
    }
});
