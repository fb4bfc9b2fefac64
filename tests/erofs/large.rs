//! Sizes and numbers at which fields overflow, and the promise that equal layers give equal bytes.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};

use spank_pyxis::import::write_layer;

use crate::archive::{Archive, Header};
use crate::support::{Image, LIMITS};

#[test]
fn a_directory_of_100_000_entries() {
    let name = |number: usize| format!("many/{}-{number}", "name".repeat(number % 20));
    let mut archive = Archive::default();
    for number in 0..100_000 {
        archive = match number % 10 {
            0 => archive.directory(&name(number)),
            1 => archive.symlink(&name(number), "target"),
            2 => archive.hard_link(&name(number), &name(number - 1)),
            _ => archive.file(&name(number), format!("content {number}").as_bytes()),
        };
    }
    let image = Image::new(&archive.end()[..]);
    image.fsck();
    assert_eq!(image.tree().len(), 100_002);
    let mount = image.mount();
    assert_eq!(fs::read_dir(mount.path().join("many")).unwrap().count(), 100_000);
    for number in (0..100_000).step_by(997).chain([99_999]) {
        let path = mount.path().join(name(number));
        match number % 10 {
            0 => assert!(path.is_dir()),
            1 | 2 => assert_eq!(path.read_link().unwrap().to_str(), Some("target")),
            _ => assert_eq!(fs::read_to_string(path).unwrap(), format!("content {number}")),
        }
    }
    assert!(!mount.path().join("many/none").exists());
}

/// An archive with one file of `size` bytes, made as it is read.
fn one_file(size: u64, at: impl Fn(u64) -> u8) -> impl Read {
    struct Content<F>(u64, u64, F);
    impl<F: Fn(u64) -> u8> Read for Content<F> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let length = (self.1 - self.0).min(buffer.len() as u64) as usize;
            for (bytes, block) in buffer[..length].chunks_mut(4096).zip(0..) {
                bytes.fill((self.2)(self.0 + block * 4096));
            }
            self.0 += length as u64;
            Ok(length)
        }
    }
    io::Cursor::new(Header::new(b"file", b'0', size).done())
        .chain(Content(0, size, at))
        .chain(io::repeat(0).take(size.next_multiple_of(512) - size + 1024))
}

#[test]
fn a_file_of_more_than_4_gib() {
    let size = (4 << 30) + 5000;
    let image = Image::new(one_file(size, |at| (at >> 30) as u8 + 1));
    assert_eq!(image.summary.image, (size / 4096 + 2) * 4096);
    let mount = image.mount();
    let file = File::open(mount.path().join("file")).unwrap();
    assert_eq!(file.metadata().unwrap().len(), size);
    let mut bytes = [0; 4];
    for (offset, value) in [(0, 1), (1 << 31, 3), ((4 << 30) - 4, 4), ((4 << 30) + 4996, 5)] {
        file.read_exact_at(&mut bytes, offset).unwrap();
        assert_eq!(bytes, [value; 4], "at {offset}");
    }
}

#[test]
fn sparse_files_of_many_gib() {
    let sparse = |path: &str, size: u64, pieces: &[(u64, &[u8])]| {
        let map: Vec<String> = pieces.iter().map(|(offset, data)| format!("{offset},{}", data.len())).collect();
        let (size, map) = (size.to_string(), map.join(","));
        let records = [("GNU.sparse.size", size.as_bytes()), ("GNU.sparse.map", map.as_bytes())];
        let data: Vec<u8> = pieces.iter().flat_map(|(_, data)| data.to_vec()).collect();
        Archive::default().pax(b'x', &records).file(path, &data)
    };
    let (tib, last) = (1_u64 << 40, i64::MAX as u64);
    let archive = sparse("hole", 20 * tib, &[])
        .append(&sparse("ends", 3 << 30, &[(0, b"first"), ((3 << 30) - 4, b"last")]))
        .append(&sparse("middle", tib + 1, &[(tib / 2 + 5, b"middle")]))
        .append(&sparse("full", 5000, &[(0, &[1; 5000])]))
        .append(&sparse("largest", last, &[]));
    let image = Image::new(&archive.end()[..]);
    assert!(image.summary.image < 16 << 20, "{:?}", image.summary);
    let mount = image.mount();
    let check = |path: &str, size: u64, pieces: &[(u64, &[u8])]| {
        let file = File::open(mount.path().join(path)).unwrap();
        assert_eq!(file.metadata().unwrap().len(), size);
        for &(offset, expected) in pieces {
            let mut bytes = vec![0xff; expected.len()];
            file.read_exact_at(&mut bytes, offset).unwrap();
            assert_eq!(bytes, expected, "{path} at {offset}");
        }
    };
    check("hole", 20 * tib, &[(0, &[0; 10]), (20 * tib - 10, &[0; 10])]);
    check("ends", 3 << 30, &[(0, b"first\0"), (1 << 30, &[0; 9000]), ((3 << 30) - 6, b"\0\0last")]);
    check("middle", tib + 1, &[(0, b"\0"), (tib / 2 + 4, b"\0middle\0"), (tib, b"\0")]);
    check("full", 5000, &[(0, &[1; 5000])]);
    check("largest", last, &[(0, b"\0"), (last - 1, b"\0")]);
}

#[test]
fn many_links() {
    let archive = (0..20_000).fold(Archive::default().file("first", b"x"), |archive, number| {
        let archive = archive.hard_link(&format!("first-{number}"), "first");
        archive.file(&format!("a{number}"), b"y").hard_link(&format!("b{number}"), &format!("a{number}"))
    });
    let image = Image::new(&archive.end()[..]);
    image.fsck();
    let mount = image.mount();
    for (name, links) in [("first", 20_001), ("first-19999", 20_001), ("a0", 2), ("b19999", 2)] {
        assert_eq!(fs::metadata(mount.path().join(name)).unwrap().nlink(), links);
    }
    assert_eq!(image.tree().len(), 60_002);
}

/// Gives a few bytes at a time.
struct Trickle<'a>(&'a [u8], usize);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.1 = self.1 * 5 % 1021 + 1;
        let length = self.1.min(buffer.len());
        self.0.read(&mut buffer[..length])
    }
}

#[test]
fn equal_layers_are_equal_bytes() {
    let archive = (0..3000_u32).fold(Archive::default(), |archive, number| match number % 7 {
        0 => archive.directory(&format!("{}/{number}", number % 10)),
        1 => archive.symlink(&format!("{}/{number}", number % 10), "x"),
        _ => archive.file(&format!("{}/{number}", number % 10), &vec![number as u8; (number * 37 % 9000) as usize]),
    });
    let archive = archive.end();
    let bytes = Image::new(&archive[..]).bytes();
    assert!(bytes == Image::new(Trickle(&archive, 1)).bytes());

    // Written past the page cache: offsets, lengths and memory are aligned.
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = directory.path().join("direct");
    let flags = rustix::fs::OFlags::DIRECT.bits() as i32;
    let direct = File::options().read(true).write(true).create_new(true).custom_flags(flags).open(&path).unwrap();
    write_layer(&archive[..], &direct, &LIMITS).unwrap();
    assert!(bytes == fs::read(path).unwrap());

    // Another layer is another file system to overlayfs.
    let uuid = |bytes: &[u8]| bytes[1024 + 48..1024 + 64].to_vec();
    assert_ne!(uuid(&bytes), [0; 16]);
    let other = Image::new(&Archive::default().file("a", b"x").end()[..]).bytes();
    assert_ne!(uuid(&bytes), uuid(&other));
}
