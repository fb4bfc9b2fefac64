//! Every compression and block size.

use spank_pyxis::squashfs::reader::Compressor;

use crate::support::{Source, mounted, noise, read, text, unpacked};
use crate::tree;

/// Files around the sizes at which something changes, for blocks of 4096, 131072 and 1 MiB.
fn files() -> Source {
    let source = Source::new();
    for size in [0, 1, 4095, 4096, 4097, 12_305, 131_071, 131_072, 131_073, 393_233, (1 << 20) + 1] {
        source.file(&format!("text-{size}"), text(size));
        source.file(&format!("noise-{size}"), noise(size));
    }
    let mixed = [noise(200_000), vec![0; 300_000], text(200_000), vec![0; 100_001]].concat();
    source.file("mixed", mixed);
    source
}

#[test]
fn every_compression() {
    let source = files();
    for (name, options, kernel) in [
        ("gzip", &["-Xcompression-level", "1"][..], true),
        ("gzip", &["-Xwindow-size", "9", "-Xstrategy", "default,filtered,huffman_only,run_length_encoded,fixed"], true),
        ("lzma", &[], false),
        ("lzo", &[], true),
        ("lzo", &["-Xalgorithm", "lzo1x_1"], true),
        ("lzo", &["-Xalgorithm", "lzo1x_1_15"], true),
        ("xz", &[], true),
        ("xz", &["-Xbcj", "x86,arm,armthumb,powerpc,sparc,ia64", "-Xdict-size", "50%"], true),
        ("lz4", &[], true),
        ("lz4", &["-Xhc"], true),
        ("zstd", &["-Xcompression-level", "1"], true),
        ("zstd", &["-Xcompression-level", "19"], true),
    ] {
        let path = source.pack(&[&["-comp", name], options].concat());
        let image = crate::support::open(&path);
        assert_eq!(image.compressor().name(), name);
        let ours = read(&image).unwrap();
        tree::assert_same(&ours, &source.tree());
        let judge = if kernel { mounted(&path) } else { unpacked(&path) };
        tree::assert_same(&ours, &judge);
    }
}

/// Branch filters change only machine code: some has to be there.
#[test]
fn machine_code() {
    let source = Source::new();
    let mut program = std::fs::read(std::env::current_exe().unwrap()).unwrap();
    program.truncate(2 << 20);
    source.file("program", program);
    for compression in ["xz", "lzo", "zstd"] {
        let options = if compression == "xz" { &["-Xbcj", "x86"][..] } else { &["-Xcompression-level", "3"] };
        source.round_trip(&[&["-comp", compression], options].concat());
    }
}

#[test]
fn every_block_size() {
    let source = files();
    for log in [12, 13, 16, 17, 20] {
        let image = source.round_trip(&["-comp", "zstd", "-Xcompression-level", "1", "-b", &(1 << log).to_string()]);
        assert_eq!((image.block_size(), image.compressor()), (1 << log, Compressor::Zstd));
    }
}

#[test]
fn every_way_of_storing() {
    let source = files();
    let lz4 = ["-comp", "lz4"];
    for options in [
        &["-noI", "-noId", "-noD", "-noF", "-noX"][..],
        &["-noD"],
        &["-noF"],
        &["-noI"],
        &["-no-fragments"],
        &["-always-use-fragments"],
        &["-no-duplicates"],
        &["-no-exports", "-no-xattrs"],
        &["-nopad"],
        &["-no-sparse"],
        &["-tailends", "-b", "8192"],
    ] {
        source.round_trip(&[&lz4, options].concat());
    }
}
