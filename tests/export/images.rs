//! The image writer.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use spank_pyxis::squashfs::writer::{Attributes, Compression, Entry, Error, Options, Special, Writer};

use crate::support::{Image, noise, options, plain};
use crate::tree::{self, Content, Kind, Tree};

const COMPRESSIONS: [&str; 5] = ["gzip", "lzo", "xz", "lz4", "zstd"];

/// A bit of everything.
fn everything(writer: &mut Writer) {
    let mut with_xattrs = plain(0o640);
    with_xattrs.xattrs = vec![(b"user.a".to_vec(), b"1".to_vec()), (b"user.b".to_vec(), vec![0; 300])];
    writer.directory(b"/", plain(0o711)).unwrap();
    writer.file(b"usr/bin/tool", plain(0o4755), &mut &noise(1, 300_000)[..]).unwrap();
    writer.file(b"etc/empty", plain(0o600), &mut &b""[..]).unwrap();
    for number in 0..600 {
        let path = format!("many/file-{number:05}");
        writer.file(path.as_bytes(), plain(0o644), &mut path.as_bytes().repeat(number % 90).as_slice()).unwrap();
    }
    writer.file(b"exact", plain(0o400), &mut &noise(2, 4 * 131_072)[..]).unwrap();
    writer.file(b"xattrs", with_xattrs.clone(), &mut &b"x"[..]).unwrap();
    writer.directory(b"xattr-dir", with_xattrs).unwrap();
    writer.symlink(b"usr/link", plain(0o777), b"bin/tool").unwrap();
    writer.symlink(b"usr/long", plain(0o777), &b"x/".repeat(2000)).unwrap();
    writer.special(b"run/fifo", plain(0o622), Special::Fifo).unwrap();
    writer.special(b"run/tty", plain(0o620), Special::CharacterDevice { major: 4, minor: 64 }).unwrap();
    writer.special(b"run/disk", plain(0o660), Special::BlockDevice { major: 259, minor: 1 }).unwrap();
    writer.hard_link(b"a-tool", b"usr/bin/tool").unwrap();
    writer.hard_link(b"usr/fifo-2", b"run/fifo").unwrap();
    writer.directory(b"usr/bin", plain(0o700)).unwrap();
    let mut sparse = writer.begin_file(b"sparse", plain(0o644)).unwrap();
    sparse.write(b"head").unwrap();
    sparse.hole(3_333_333).unwrap();
    sparse.write(b"tail").unwrap();
    sparse.finish().unwrap();
}

#[track_caller]
fn check_everything(tree: &Tree) {
    assert_eq!(tree[&b""[..]].mode, 0o711);
    assert_eq!(tree[&b"usr/bin"[..]].mode, 0o700);
    assert_eq!(tree[&b"usr"[..]].mode, 0o755);
    assert_eq!(tree[&b"usr/bin/tool"[..]].mode, 0o4755);
    assert_eq!(tree[&b"usr/bin/tool"[..]].nlink, 2);
    assert_eq!(tree[&b"usr/bin/tool"[..]].same_as, b"a-tool");
    assert_eq!(tree[&b"usr/bin/tool"[..]].mtime, (1_700_000_000, 0));
    let content = |bytes: &[u8]| Kind::File { size: bytes.len() as u64, content: Content::of(bytes) };
    assert_eq!(tree[&b"usr/bin/tool"[..]].kind, content(&noise(1, 300_000)));
    assert_eq!(tree[&b"exact"[..]].kind, content(&noise(2, 4 * 131_072)));
    assert_eq!(tree[&b"many/file-00599"[..]].kind, content(&b"many/file-00599".repeat(599 % 90)));
    assert_eq!(tree.keys().filter(|path| path.starts_with(b"many/")).count(), 600);
    assert!(matches!(tree[&b"sparse"[..]].kind, Kind::File { size, .. } if size == 3_333_341));
    assert_eq!(tree[&b"xattrs"[..]].xattrs.len(), 2);
    assert_eq!(tree[&b"xattr-dir"[..]].xattrs[&b"user.a"[..]], b"1");
    assert_eq!(tree[&b"usr/link"[..]].kind, Kind::Symlink(b"bin/tool".to_vec()));
    assert_eq!(tree[&b"usr/long"[..]].kind, Kind::Symlink(b"x/".repeat(2000)));
    assert_eq!(tree[&b"usr/fifo-2"[..]].kind, Kind::Fifo);
    assert_eq!(tree[&b"usr/fifo-2"[..]].same_as, b"run/fifo");
    assert!(tree.values().all(|node| node.owner == (0, 0)));
}

#[test]
fn every_compression_holds_everything() {
    for compression in COMPRESSIONS {
        let image = Image::new(&options(&format!("-comp {compression}")), everything);
        check_everything(&image.judged());
        let about = image.listing("-stat");
        assert!(about.contains(&format!("Compression {compression}")), "{about}");
        assert!(about.contains("Filesystem is exportable via NFS"), "{about}");
        let listing = image.listing("-lls");
        let devices: Vec<Vec<&str>> = listing
            .lines()
            .filter(|line| line.starts_with(['b', 'c']))
            .map(|line| line.split_ascii_whitespace().collect())
            .collect();
        assert_eq!(devices[0][..4], ["brw-rw----", "root/root", "259,", "1"]);
        assert_eq!(devices[1][..4], ["crw--w----", "root/root", "4,", "64"]);
    }
}

/// unsquashfs prints large numbers wrong.
#[test]
fn devices_have_the_kernels_numbers() {
    let image = Image::new(&Options::default(), |writer| {
        writer.special(b"c", plain(0o600), Special::CharacterDevice { major: 4000, minor: 300_000 }).unwrap();
        writer.special(b"b", plain(0o600), Special::BlockDevice { major: 259, minor: 256 }).unwrap();
    });
    let mounted = image.mount();
    let device = |name: &str| {
        let device = std::fs::symlink_metadata(mounted.path().join(name)).unwrap().rdev();
        (rustix::fs::major(device), rustix::fs::minor(device))
    };
    assert_eq!(device("c"), (4000, 300_000));
    assert_eq!(device("b"), (259, 256));
}

#[test]
fn every_option_leaves_the_content_alone() {
    for text in [
        "-comp lzo -noD -exit-on-error",
        "-comp zstd -Xcompression-level 1 -b 1M",
        "-comp zstd -b 4K",
        "-comp gzip -Xcompression-level 1 -no-fragments",
        "-comp lz4 -always-use-fragments -no-exports",
        "-comp gzip -noI -noF -noX -noId",
        "-comp xz -b 4K -no-sparse",
        "-comp gzip -no-compression -nopad",
    ] {
        // Written out, the holes would take long.
        let image = Image::new(&options(text), |writer| {
            if !text.contains("-no-sparse") {
                everything(writer);
            } else {
                writer.file(b"zeros", plain(0o600), &mut std::io::repeat(0).take(100_000)).unwrap();
            }
        });
        // A loop device has whole sectors only.
        let judged = if text.contains("-nopad") { image.unpacked() } else { image.judged() };
        if !text.contains("-no-sparse") {
            check_everything(&judged);
        }
        assert_eq!(image.bytes().len().is_multiple_of(4096), !text.contains("-nopad"), "{text}");
    }
    let without = Image::new(&options("-no-xattrs"), everything).judged();
    assert!(without.values().all(|node| node.xattrs.is_empty()));
}

#[test]
fn one_thread_and_many_write_the_same_bytes() {
    let base = options("-comp zstd -Xcompression-level 1");
    let images: Vec<Vec<u8>> =
        [1, 2, 5].map(|threads| Image::new(&Options { threads, ..base.clone() }, everything).bytes()).into();
    assert_eq!(images[0], images[1]);
    assert_eq!(images[0], images[2]);
}

#[test]
fn zeros_take_no_room() {
    let image = Image::new(&options("-comp gzip -noD -noF"), |writer| {
        writer.file(b"zeros", plain(0o600), &mut std::io::repeat(0).take(10 << 20)).unwrap();
        let mut hole = writer.begin_file(b"hole", plain(0o600)).unwrap();
        hole.hole(1 << 40).unwrap();
        hole.finish().unwrap();
    });
    // A terabyte of holes is a list of its blocks.
    assert!(image.bytes().len() < 1 << 20, "{}", image.bytes().len());
    let mounted = image.mount();
    assert_eq!(std::fs::metadata(mounted.path().join("hole")).unwrap().len(), 1 << 40);
    assert_eq!(std::fs::read(mounted.path().join("zeros")).unwrap(), vec![0; 10 << 20]);
}

/// Lookups go through the directory's index, which only large ones have.
#[test]
fn large_directories_are_searched_and_listed() {
    let names: Vec<String> = (0..12_000).map(|number| format!("{:x}-{number}", number * 7919 % 40_009)).collect();
    let image = Image::new(&options("-comp lz4"), |writer| {
        for name in &names {
            writer.file(format!("d/{name}").as_bytes(), plain(0o600), &mut &b""[..]).unwrap();
        }
        writer.directory(b"d/e/f", plain(0o755)).unwrap();
    });
    let mounted = image.mount();
    let directory = mounted.path().join("d");
    assert_eq!(directory.read_dir().unwrap().count(), names.len() + 1);
    for name in names.iter().step_by(37) {
        assert!(directory.join(name).metadata().unwrap().is_file(), "{name}");
    }
    assert!(!directory.join("0").exists());
    assert!(!directory.join("zzz").exists());
    assert!(directory.join("e/f").is_dir());
}

#[test]
fn times_are_those_of_the_files_up_to_the_epoch_given() {
    let times = [(-5, 0), (0, 0), (1 << 31, 1 << 31), (i64::MAX, u32::MAX), (1_700_000_000, 1_700_000_000)];
    let write = |time: Option<u32>| {
        let options = Options { time, ..options("-comp gzip") };
        Image::new(&options, |writer| {
            for (mtime, _) in times {
                writer.directory(mtime.to_string().as_bytes(), Attributes { mtime, ..plain(0o700) }).unwrap();
            }
        })
    };
    let tree = write(Some(u32::MAX)).judged();
    for (mtime, stored) in times {
        assert_eq!(tree[mtime.to_string().as_bytes()].mtime, (stored.into(), 0), "{mtime}");
    }
    let image = write(Some(1_700_000_000));
    assert!(image.listing("-stat").contains("Nov 14"), "{}", image.listing("-stat"));
    assert!(image.judged().values().all(|node| node.mtime.0 <= 1_700_000_000));
    assert_eq!(image.bytes(), write(Some(1_700_000_000)).bytes());
    write(None).judged();
}

#[test]
fn what_cannot_be_added_is_refused() {
    Image::new(&Options::default(), |writer| {
        writer.file(b"a/file", plain(0o600), &mut &b"x"[..]).unwrap();
        let mut file = |path: &[u8]| writer.file(path, plain(0o600), &mut &b""[..]).unwrap_err();
        assert!(matches!(file(b"a/file"), Error::Exists(path) if path == "a/file"));
        assert!(matches!(file(b"a/file/b"), Error::Exists(_)));
        assert!(matches!(file(b"a"), Error::Exists(_)));
        assert!(matches!(file(b"/"), Error::Exists(_)));
        assert!(matches!(file(b"a/../b"), Error::Path(_)));
        assert!(matches!(file(&[b'x'; 256]), Error::Path(_)));
        assert!(matches!(file(b"a\0b"), Error::Path(_)));
        assert!(matches!(writer.hard_link(b"b", b"none").unwrap_err(), Error::NoTarget(_)));
        assert!(matches!(writer.hard_link(b"b", b"a").unwrap_err(), Error::NoTarget(_)));
        assert!(matches!(writer.symlink(b"b", plain(0o777), b"").unwrap_err(), Error::Path(_)));
        assert!(matches!(writer.directory(b"a/file", plain(0o700)).unwrap_err(), Error::Exists(_)));
        assert_eq!(writer.entry(b"/a"), Some(Entry::Directory));
        assert_eq!(writer.entry(b"a/file"), Some(Entry::Other));
        assert_eq!((writer.entry(b"b"), writer.entry(b"a/file/x")), (None, None));
    });
}

#[test]
fn a_full_disk_is_an_error() {
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut writer = Writer::new(full, &options("-comp gzip -noD")).unwrap();
    let written =
        (0..64).try_for_each(|n| writer.file(format!("{n}").as_bytes(), plain(0o600), &mut &noise(n, 100_000)[..]));
    let error = written.and_then(|()| writer.finish().map(drop)).unwrap_err();
    assert_eq!(error.to_string(), "cannot write the squashfs image: No space left on device");
}

#[derive(Debug, Clone)]
enum Action {
    File { seed: u64, length: usize, hole: Option<u64> },
    Directory,
    Symlink(String),
    Fifo,
    Link(usize),
}

fn actions() -> impl Strategy<Value = Vec<(String, u16, Action)>> {
    let action = prop_oneof![
        4 => (any::<u64>(), prop_oneof![0usize..200, 4000usize..4200, 0usize..40_000], proptest::option::of(0u64..50_000))
            .prop_map(|(seed, length, hole)| Action::File { seed, length, hole }),
        1 => Just(Action::Directory),
        1 => "[a-c/.]{1,20}".prop_map(Action::Symlink),
        1 => Just(Action::Fifo),
        2 => any::<usize>().prop_map(Action::Link),
    ];
    proptest::collection::vec(("[a-e](/[a-eä]{1,3}){0,4}", 0u16..0o10000, action), 0..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_is_what_the_kernel_finds(
        actions in actions(),
        compression in 0usize..5,
        fragments in any::<bool>(),
    ) {
        let mut options = options(&format!("-comp {} -b 4K", COMPRESSIONS[compression]));
        options.fragments = fragments;
        prop_assert_eq!(Compression::ALL.len(), COMPRESSIONS.len());
        let mut files: BTreeMap<String, Kind> = BTreeMap::new();
        let mut modes = BTreeMap::new();
        let image = Image::new(&options, |writer| {
            for (path, mode, action) in actions {
                let taken = writer.entry(path.as_bytes());
                let attributes = plain(mode);
                let (added, kind) = match action {
                    Action::File { seed, length, hole } => {
                        let bytes = noise(seed, length);
                        let (head, tail) = bytes.split_at(length / 2);
                        let all = [head, &vec![0; hole.unwrap_or(0) as usize], tail].concat();
                        let kind = Kind::File { size: all.len() as u64, content: Content::of(&all) };
                        let added = match hole {
                            None => writer.file(path.as_bytes(), attributes, &mut &bytes[..]),
                            Some(hole) => writer.begin_file(path.as_bytes(), attributes).and_then(|mut file| {
                                file.write(head)?;
                                file.hole(hole)?;
                                file.write(tail)?;
                                file.finish()
                            }),
                        };
                        (added, kind)
                    }
                    Action::Directory => (writer.directory(path.as_bytes(), attributes), Kind::Directory),
                    Action::Symlink(target) => {
                        let kind = Kind::Symlink(target.clone().into_bytes());
                        (writer.symlink(path.as_bytes(), plain(0o777), target.as_bytes()), kind)
                    }
                    Action::Fifo => (writer.special(path.as_bytes(), attributes, Special::Fifo), Kind::Fifo),
                    Action::Link(index) => {
                        let Some((target, kind)) = files.iter().nth(index % files.len().max(1)) else { continue };
                        let (target, kind) = (target.clone(), kind.clone());
                        let added = writer.hard_link(path.as_bytes(), target.as_bytes());
                        if added.is_ok() {
                            files.insert(path, kind);
                        }
                        continue;
                    }
                };
                match added {
                    Ok(()) if kind == Kind::Directory => {
                        modes.insert(path, mode);
                    }
                    Ok(()) => {
                        assert_eq!(taken, None);
                        if !matches!(kind, Kind::Symlink(_)) {
                            modes.insert(path.clone(), mode);
                        }
                        files.insert(path, kind);
                    }
                    Err(error) => assert!(matches!(error, Error::Exists(_)), "{error}"),
                }
            }
        });
        let mounted = tree::read(&image.mount().path()).unwrap();
        let found: BTreeMap<&[u8], &Kind> =
            mounted.iter().filter(|(_, node)| node.kind != Kind::Directory).map(|(path, node)| (&path[..], &node.kind)).collect();
        let expected: BTreeMap<&[u8], &Kind> = files.iter().map(|(path, kind)| (path.as_bytes(), kind)).collect();
        prop_assert_eq!(found, expected);
        for (path, mode) in modes {
            prop_assert_eq!(mounted[path.as_bytes()].mode, u32::from(mode), "{}", path);
        }
        tree::assert_same(&image.unpacked(), &mounted);
        tree::assert_same(&image.read(), &mounted);
    }
}
