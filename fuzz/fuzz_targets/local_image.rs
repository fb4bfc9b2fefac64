//! Any bytes as an archive of an image: refused with one line, or an image whose layers can be read to their end.
//!
//! Checksums of headers are made right, so that the fuzzer gets past them.
#![no_main]

use std::fs::File;
use std::io::Write;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use spank_pyxis::image::platform::Platform;
use spank_pyxis::importer::local::find;
use spank_pyxis::importer::protocol::Report;
use spank_pyxis::source::SourceForm;

/// Gives each block that has `ustar` where headers have it the right checksum.
fn mend(archive: &mut [u8]) {
    for header in archive.chunks_exact_mut(512).filter(|block| &block[257..262] == b"ustar") {
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut bytes = bytes.to_vec();
    mend(&mut bytes);
    let mut file = File::from(memfd_create("archive", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(&bytes).unwrap();
    let platform = Platform { os: "linux".into(), architecture: "amd64".into(), variant: None };
    match find((SourceForm::Archive, file.into(), None), None, None, "x", &platform) {
        Ok(image) => {
            for index in 0..image.layers.len() {
                if let Ok(mut blob) = image.blob(index) {
                    let read = std::io::copy(&mut blob, &mut std::io::sink()).unwrap();
                    assert_eq!(read, image.layers[index].size);
                }
            }
        }
        Err(failure) => match failure.report() {
            Report::Failed { message, .. } => assert!(!message.contains('\n') && !message.is_empty()),
            other => panic!("{other:?}"),
        },
    }
});
