//! Any bytes as a squashfs image: refused with one line, or read through without a panic, a hang or much memory.
#![no_main]

use std::fs::File;
use std::io::Write;

use libfuzzer_sys::fuzz_target;
use rustix::fs::{MemfdFlags, memfd_create};
use spank_pyxis::squashfs::reader::{Error, Image};

/// Larger files only repeat what smaller ones show.
const MAX_FILE: u64 = 1 << 20;

fn read(bytes: &[u8]) -> Result<(), Error> {
    let mut file = File::from(memfd_create("image", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    let image = Image::open(file)?;
    let mut buffer = vec![0; 10_000];
    let mut left = 8 * MAX_FILE;
    let root = image.inode(image.root())?;
    for visit in image.walk(1000)? {
        let visit = visit?;
        let inode = &visit.inode;
        if visit.depth == 0 {
            let _ = image.lookup(&root, &visit.entry.name);
        }
        let _ = (image.xattrs(inode), image.read_link(inode));
        if let Ok(file) = image.file(inode)
            && file.size() <= MAX_FILE
        {
            let _ = image.data_extents(&file);
            let mut at = 0;
            while left > 0
                && let Ok(read @ 1..) = image.read_at(&file, at, &mut buffer)
            {
                at += read as u64;
                left = left.saturating_sub(read as u64);
            }
        }
    }
    Ok(())
}

fuzz_target!(|bytes: &[u8]| {
    if let Err(error) = read(bytes) {
        let line = error.to_string();
        assert!(line.len() < 300 && !line.contains('\n'), "{line:?}");
    }
});
