//! Images that are not whole.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::path::Path;

use proptest::prelude::*;
use spank_pyxis::import::{LayerLimits, write_squashfs};
use spank_pyxis::squashfs::reader::{Error, Image};

use crate::reader;
use crate::support::{Source, noise, read, text};

fn image_of(bytes: &[u8]) -> Result<Image, Error> {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    Image::open(file)
}

fn refusal(bytes: &[u8]) -> String {
    let error = image_of(bytes).unwrap_err().to_string();
    assert!(!error.contains('\n') && error.len() < 300, "{error:?}");
    error
}

fn sample(options: &[&str]) -> Vec<u8> {
    let source = Source::new();
    source.file("a", text(9000));
    source.file("b", [text(3000), vec![0; 9000], noise(300)].concat());
    source.directory("d");
    source.file("d/c", "small");
    std::os::unix::fs::symlink("target", source.path("link")).unwrap();
    std::fs::read(source.pack(&[&["-b", "4096", "-nopad"], options].concat())).unwrap()
}

#[test]
fn what_is_no_image() {
    let image = sample(&[]);
    assert_eq!(refusal(b""), "not a squashfs image");
    assert_eq!(refusal(b"hsqs"), "not a squashfs image");
    assert_eq!(refusal(&noise(100_000)), "not a squashfs image");
    assert_eq!(refusal(&vec![0; 100_000]), "not a squashfs image");
    assert_eq!(
        refusal(&image[..image.len() - 1]),
        format!("truncated: {} of {} bytes are there: copy it anew", image.len() - 1, image.len())
    );
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = image.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        refusal(&image)
    };
    assert_eq!(changed(0, b"sqsh"), "not a squashfs image");
    assert_eq!(
        changed(28, &[3, 0, 1, 0]),
        "squashfs version 3.1, of which only 4.0 is known: make it anew with mksquashfs"
    );
    assert_eq!(changed(20, &[7, 0]), "compressed by a method that is not known (number 7)");
    assert_eq!(changed(12, &[0, 0, 0, 1]), "damaged squashfs image: superblock at byte 12: an impossible block size");
    assert_eq!(changed(22, &[33]), "damaged squashfs image: superblock at byte 12: an impossible block size");
    for table in [48, 64, 72] {
        assert!(changed(table, &[0xff; 8]).starts_with("damaged squashfs image: "));
    }
    let directory = Image::open(File::open(Path::new("/")).unwrap()).unwrap_err();
    assert_eq!(directory.to_string(), "cannot read the image: Is a directory");
}

#[test]
fn a_directory_inside_itself() {
    let source = Source::new();
    source.directory("d");
    source.directory("d/e");
    source.file("d/e/f", "x");
    let mut image = std::fs::read(source.pack(&["-noI", "-noId", "-nopad"])).unwrap();
    // The listing of `e` begins with a header and an entry for `f`: let it name `e`'s parent `d`.
    let number = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
    let listing = number(72) as usize + 2;
    let entry = |at: usize| u16::from_le_bytes(image[at..at + 2].try_into().unwrap());
    let (e_to_f, d_to_e, root_to_d) = (listing + 12, listing + 21 + 12, listing + 42 + 12);
    assert!(entry(e_to_f) == 0 && image[e_to_f + 8] == b'f' && image[root_to_d + 8] == b'd', "another layout");
    assert_eq!(image[d_to_e + 8], b'e');
    let d = entry(root_to_d).to_le_bytes();
    image[e_to_f..e_to_f + 2].copy_from_slice(&d);
    let error = read_all(&image).unwrap_err().to_string();
    assert!(error.ends_with("it is in two places"), "{error}");
}

/// Turns it into a layer, if that is possible.
fn convert(bytes: &[u8]) {
    let Ok(image) = image_of(bytes) else { return };
    let limits = LayerLimits { max_bytes: 4 << 20, max_entries: 10_000 };
    let out = tempfile::tempfile().unwrap();
    match write_squashfs(&image, &out, &limits, |_| {}) {
        Ok(converted) => {
            assert_eq!(out.metadata().unwrap().len(), converted.image);
            let mut written = Vec::new();
            let mut out = out;
            out.rewind().unwrap();
            out.read_to_end(&mut written).unwrap();
            reader::read(&written).unwrap();
        }
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
}

/// Everything, without looking at it.
fn read_all(bytes: &[u8]) -> Result<(), Error> {
    let image = image_of(bytes)?;
    let mut buffer = vec![0; 10_000];
    for visit in image.walk(10_000)? {
        let inode = visit?.inode;
        let _ = image.xattrs(&inode);
        if let Ok(file) = image.file(&inode)
            && file.size() < 1 << 24
        {
            let mut at = 0;
            while let Ok(read @ 1..) = image.read_at(&file, at, &mut buffer) {
                at += read as u64;
            }
            let _ = image.data_extents(&file);
        }
        let _ = image.read_link(&inode);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]
    /// Nothing panics, hangs or takes memory, whatever bytes change; every refusal is one line.
    #[test]
    fn changed_bytes(changes in prop::collection::vec(
        (any::<prop::sample::Index>(), any::<u8>(), prop::sample::select(vec![0_u8, 1, 0x7f, 0x80, 0xff])), 1..4),
        tail in any::<bool>())
    {
        thread_local! {
            static SAMPLES: Vec<Vec<u8>> = ["gzip", "lzma", "lzo", "xz", "lz4", "zstd"]
                .iter()
                .map(|name| sample(&["-comp", name]))
                .chain([sample(&["-noI", "-noId", "-noD", "-noF"])])
                .collect();
        }
        SAMPLES.with(|samples| {
            for sample in samples {
                let mut image = sample.clone();
                for (at, xor, value) in &changes {
                    // Tables are at the end: more is to be broken there.
                    let from = if tail { image.len() / 2 } else { 0 };
                    let at = from + at.index(image.len() - from);
                    image[at] = if *xor == 0 { *value } else { image[at] ^ xor };
                }
                convert(&image);
                if let Err(error) = read_all(&image) {
                    assert!(!error.to_string().contains('\n'));
                }
            }
        });
    }
}

#[test]
fn the_samples_are_whole() {
    for options in [&["-comp", "xz"][..], &["-noI", "-noD"]] {
        let image = sample(options);
        read(&image_of(&image).unwrap()).unwrap();
        read_all(&image).unwrap();
    }
}
