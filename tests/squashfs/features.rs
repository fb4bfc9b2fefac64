//! What can be in an image.

use std::fs::{File, FileTimes};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use rustix::fs::{CWD, FileType, Mode, XattrFlags, makedev, mknodat};
use spank_pyxis::squashfs::reader::InodeRef;

use crate::support::{Source, mounted, noise, open, read, run, text, unpacked};
use crate::tree;

#[test]
fn files_of_every_type() {
    let source = Source::new();
    let file = source.file("file", "content");
    std::fs::set_permissions(&file, PermissionsExt::from_mode(0o4751)).unwrap();
    std::os::unix::fs::chown(&file, Some(12345), Some(70_000)).unwrap();
    source.directory("sticky");
    std::fs::set_permissions(source.path("sticky"), PermissionsExt::from_mode(0o1777)).unwrap();
    symlink("file", source.path("link")).unwrap();
    symlink("../".repeat(1300), source.path("long link")).unwrap();
    for (name, kind, device) in [
        ("fifo", FileType::Fifo, 0),
        ("socket", FileType::Socket, 0),
        ("null", FileType::CharacterDevice, makedev(1, 3)),
        ("whiteout", FileType::CharacterDevice, 0),
        ("disk", FileType::BlockDevice, makedev(259, 70_000)),
    ] {
        mknodat(CWD, source.path(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
    }
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(3_000_000_000);
    File::open(&file).unwrap().set_times(FileTimes::new().set_modified(long_ago)).unwrap();

    let path = source.pack(&[]);
    let image = open(&path);
    let ours = read(&image).unwrap();
    tree::assert_same(&ours, &source.tree());
    tree::assert_same(&ours, &mounted(&path));
    tree::assert_same(&ours, &unpacked(&path));
    let root = image.inode(image.root()).unwrap();
    let entry = image.lookup(&root, b"disk").unwrap().unwrap();
    assert_eq!(image.inode(entry.inode).unwrap().device(), Some((259, 70_000)));
    // 7 of the 10 are no directories, and none of them is a file or a link.
    for name in [&b"disk"[..], b"fifo", b"link", b"sticky"] {
        let inode = image.inode(image.lookup(&root, name).unwrap().unwrap().inode).unwrap();
        assert!(image.file(&inode).is_err());
        assert_eq!(image.read_dir(&inode).is_ok(), name == b"sticky");
        assert_eq!(image.read_link(&inode).is_ok(), name == b"link");
    }
}

#[test]
fn hard_links_are_one_inode() {
    let source = Source::new();
    let file = source.file("a", text(300_000));
    source.directory("d");
    for name in ["b", "d/c"] {
        std::fs::hard_link(&file, source.path(name)).unwrap();
    }
    source.file("a copy of a", text(300_000));
    source.round_trip(&[]);
}

#[test]
fn holes() {
    let source = Source::new();
    let sparse = File::create(source.path("sparse")).unwrap();
    sparse.set_len(500 << 20).unwrap();
    for at in [0, 1 << 20, (300 << 20) + 4096, (500 << 20) - 5] {
        sparse.write_all_at(b"data!", at).unwrap();
    }
    File::create(source.path("hole")).unwrap().set_len(3 << 20).unwrap();
    let image = source.round_trip(&[]);
    let root = image.inode(image.root()).unwrap();
    let inode = image.inode(image.lookup(&root, b"sparse").unwrap().unwrap().inode).unwrap();
    let file = image.file(&inode).unwrap();
    let block = u64::from(image.block_size());
    assert!(inode.is_sparse());
    assert_eq!(
        image.data_extents(&file).unwrap(),
        [0, 1 << 20, 300 << 20, (500 << 20) - block].map(|offset| (offset, block))
    );
    let mut bytes = [1; 10];
    assert_eq!(image.read_at(&file, (1 << 20) - 3, &mut bytes), Ok(10));
    assert_eq!(&bytes, b"\0\0\0data!\0\0");
    assert_eq!(image.read_at(&file, (500 << 20) - 7, &mut bytes), Ok(7));
    assert_eq!(&bytes[..7], b"\0\0data!");
    assert_eq!(image.read_at(&file, u64::MAX, &mut bytes), Ok(0));
}

#[test]
fn extended_attributes() {
    let source = Source::new();
    source.directory("d");
    for number in 0..700 {
        source.file(&format!("f{number}"), "");
    }
    let set = |name: &str, key: &str, value: &[u8]| {
        rustix::fs::setxattr(source.path(name), key, value, XattrFlags::empty()).unwrap();
    };
    for number in 0..700 {
        set(&format!("f{number}"), "user.number", number.to_string().as_bytes());
        // A long value that many share is stored once.
        set(&format!("f{number}"), "user.same", &[7; 400]);
    }
    set("f0", "user.empty", b"");
    set("f0", "trusted.x", b"\0\xff");
    set("d", "user.large", &text(3000));
    set("d", "security.capability", &hex(b"0100000200200000000000000000000000000000"));
    source.round_trip(&[]);
}

fn hex(digits: &[u8]) -> Vec<u8> {
    let digit = |byte: u8| (byte as char).to_digit(16).unwrap() as u8;
    digits.chunks(2).map(|pair| digit(pair[0]) << 4 | digit(pair[1])).collect()
}

#[test]
fn a_directory_of_100_000_entries() {
    let source = Source::new();
    source.directory("many");
    for number in 0..100_000 {
        File::create(source.path(&format!("many/a file with number {number}"))).unwrap();
    }
    let image = source.round_trip(&["-comp", "lz4"]);
    let root = image.inode(image.root()).unwrap();
    let many = image.inode(image.lookup(&root, b"many").unwrap().unwrap().inode).unwrap();
    for entry in image.read_dir(&many).unwrap().step_by(997) {
        let entry = entry.unwrap();
        assert_eq!(image.lookup(&many, &entry.name).unwrap().unwrap(), entry);
        assert_eq!(image.lookup(&many, &[&entry.name[..], b"x"].concat()).unwrap(), None);
    }
    for name in [&b""[..], b"a", b"\xff", &[b'a'; 1000]] {
        assert_eq!(image.lookup(&many, name).unwrap(), None);
    }
}

#[test]
fn deep_and_wide() {
    let source = Source::new();
    let mut path = String::from("d");
    for _ in 0..400 {
        source.directory(&path);
        path += "/d";
    }
    for number in 0..300 {
        source.directory(&format!("e{number}"));
        for file in 0..number % 7 {
            source.file(&format!("e{number}/{file}"), noise(file * 100));
        }
    }
    let image = source.round_trip(&["-b", "4096"]);
    assert!(image.walk(100).unwrap().any(|visit| visit.is_err()));
}

#[test]
fn reads_at_any_place_and_from_many_threads() {
    let source = Source::new();
    let content = [noise(1_000_000), text(5_000_000), vec![0; 500_000], text(12_345)].concat();
    source.file("file", &content);
    let image = source.round_trip(&["-b", "4096", "-comp", "lz4"]);
    let root = image.inode(image.root()).unwrap();
    let inode = image.inode(image.lookup(&root, b"file").unwrap().unwrap().inode).unwrap();
    let file = image.file(&inode).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4_u64 {
            let (image, file, content) = (&image, &file, &content);
            scope.spawn(move || {
                let mut state = 88_172_645_463_325_252 + thread;
                let mut random = |below: usize| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    (state % below as u64) as usize
                };
                for _ in 0..500 {
                    let (at, length) = (random(content.len() + 100), random(40_000));
                    let mut bytes = vec![1; length];
                    let read = image.read_at(file, at as u64, &mut bytes).unwrap();
                    let end = content.len().min(at + length);
                    assert!(bytes[..read] == content[at.min(end)..end]);
                }
            });
        }
    });
}

#[test]
fn an_image_that_mksquashfs_appended_to() {
    let source = Source::new();
    source.file("a", text(10_000));
    let image = source.pack(&[]);
    source.file("b", text(20_000));
    let more = source.path("b");
    run(std::process::Command::new("mksquashfs").arg(more).arg(&image).args(["-no-progress", "-quiet"]));
    tree::assert_same(&read(&open(&image)).unwrap(), &mounted(&image));
}

#[test]
fn any_number_is_a_safe_reference() {
    let source = Source::new();
    source.file("a", text(10_000));
    let image = open(&source.pack(&[]));
    for number in [1, 0xffff, 1 << 16, 1 << 47, u64::MAX] {
        let error = image.inode(InodeRef::new(number)).unwrap_err().to_string();
        assert!(error.starts_with("damaged squashfs image: "), "{error}");
    }
}
