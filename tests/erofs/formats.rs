//! Every format GNU tar writes, compared with what GNU tar reads.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use crate::support::{Image, as_in_an_image, create, unpacked};
use crate::tree;

/// A tree with a bit of everything that the format can hold.
fn fill(root: &Path, format: &str, sparse: bool) {
    let long = !matches!(format, "ustar" | "v7");
    let file = |name: &str, size: usize| {
        let bytes: Vec<u8> = (0..size).map(|at| (at / 7 % 251) as u8 + 1).collect();
        create(root.join(name)).write_all_at(&bytes, 0).unwrap();
    };
    for size in [0, 1, 511, 512, 513, 2000, 4031, 4032, 4033, 4095, 4096, 4097, 8192, 12_000, 1_234_567] {
        file(&format!("size-{size}"), size);
    }
    for mode in [0o000, 0o111, 0o600, 0o755, 0o4755, 0o2711, 0o070] {
        let name = format!("mode-{mode:o}");
        file(&name, 10);
        fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
        let name = format!("directory-{mode:o}");
        fs::create_dir(root.join(&name)).unwrap();
        fs::write(root.join(&name).join("inside"), &name).unwrap();
        fs::set_permissions(root.join(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    fs::create_dir(root.join("tmp")).unwrap();
    fs::set_permissions(root.join("tmp"), PermissionsExt::from_mode(0o1777)).unwrap();
    for name in ["ä ö", "new\nline", "tab\tquote\"backslash\\", "-", "~", "!", ".hidden", "..twice", "...", "a%b=c"] {
        file(name, 3);
    }
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"not utf-8 \xff\xfe")), b"x").unwrap();
    fs::create_dir_all(root.join("a/b/c/d/e")).unwrap();
    fs::write(root.join("a/b/c/d/e/f"), b"deep").unwrap();
    fs::hard_link(root.join("a/b/c/d/e/f"), root.join("a/again")).unwrap();
    fs::hard_link(root.join("a/again"), root.join("z-again")).unwrap();
    symlink("a/b", root.join("link")).unwrap();
    symlink("/absolute/../dangling", root.join("dangling")).unwrap();
    fs::hard_link(root.join("link"), root.join("link-again")).unwrap();
    if format != "v7" {
        let make = |name: &str, kind, device| {
            rustix::fs::mknodat(CWD, root.join(name), kind, Mode::from_raw_mode(0o640), device).unwrap();
        };
        make("fifo", FileType::Fifo, 0);
        make("a/fifo", FileType::Fifo, 0);
        make("null", FileType::CharacterDevice, rustix::fs::makedev(1, 3));
    }
    fs::create_dir(root.join("dev")).unwrap();
    fs::write(root.join("dev/inside"), b"x").unwrap();
    for length in if long { vec![98, 99, 100, 101, 200, 4000, 4094] } else { vec![98, 99] } {
        symlink("t/".repeat(length / 2), root.join(format!("link-{length}"))).unwrap();
    }
    if long {
        file(&"n".repeat(255), 5);
        for depth in [1, 2, 5] {
            let path = root.join(format!("{}/{}/", "p".repeat(120), "q".repeat(150)).repeat(depth));
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join("leaf"), b"leaf").unwrap();
            fs::hard_link(path.join("leaf"), root.join(format!("leaf-{depth}"))).unwrap();
        }
    }
    if format == "pax" {
        let set = |name: &str, key: &str, value: &[u8]| {
            rustix::fs::setxattr(root.join(name), key, value, XattrFlags::empty()).unwrap();
        };
        set("size-0", "user.empty", b"");
        set("size-1", "user.a", b"binary\0\n\xff");
        set("size-4032", "user.pushes.the.tail.out", &[b'x'; 100]);
        set("size-12000", "user.large", &[b'y'; 3000]);
        set("a", "user.on.a.directory", b"z");
        set("a", "user.%=", b"%3D");
        set("size-513", "trusted.not.kept", b"x");
        set("size-513", "security.not.kept", b"x");
    }
    let far = if sparse { 300 << 20 } else { 3 << 20 };
    for (name, size, pieces) in [
        ("sparse-hole", 1 << 20, &[][..]),
        ("sparse-start", 1 << 20, &[(0, 5000)]),
        ("sparse-end", (1 << 20) + 5, &[(1 << 20, 5)]),
        ("sparse-many", 4 << 20, &[(4096, 1), (100_000, 70_000), (1 << 20, 4096), ((4 << 20) - 9000, 300)]),
        ("sparse-far", far, &[(far - 10_000, 10)]),
    ] {
        let file = create(root.join(name));
        file.set_len(size).unwrap();
        for &(offset, length) in pieces {
            file.write_all_at(&vec![0xab; length], offset).unwrap();
        }
    }
    let times = [("size-0", 0, 0), ("size-1", 1_700_000_000, 123_456_789), ("size-511", 1, 999_999_999)];
    let early = [("size-512", -1, 500_000_000), ("size-513", -100_000, 0), ("size-2000", 1 << 33, 1)];
    for (name, tv_sec, tv_nsec) in times.into_iter().chain(early.into_iter().filter(|_| long)) {
        let time = Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: time, last_modification: time };
        rustix::fs::utimensat(CWD, root.join(name), &times, AtFlags::empty()).unwrap();
    }
}

/// `format`, and more options, separated by blanks.
fn compare(format: &str, options: &str) {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    fill(directory.path(), format, options.contains("--sparse"));
    let mut tar = Command::new("tar");
    tar.args(["--create", "--sort=name", "--directory"]).arg(directory.path());
    tar.arg(format!("--format={format}")).args(options.split(' ').filter(|option| !option.is_empty())).arg(".");
    let archive = tar.output().unwrap();
    assert!(archive.status.success(), "{}", String::from_utf8_lossy(&archive.stderr));
    let image = Image::new(&archive.stdout[..]);
    assert_eq!(image.summary.unpacked, archive.stdout.len() as u64);
    let judged = image.judged();
    tree::assert_same(&judged, &unpacked(&archive.stdout));
    if options.ends_with("--xattrs") {
        // No loss at all against the original, sub-second times included.
        let mut original = as_in_an_image(tree::read(directory.path()).unwrap());
        original.retain(|path, _| path != b"");
        tree::assert_same(&judged.into_iter().filter(|(path, _)| path != b"").collect(), &original);
    }
}

#[test]
fn gnu() {
    compare("gnu", "");
}

#[test]
fn gnu_sparse() {
    compare("gnu", "--sparse");
}

#[test]
fn old_gnu() {
    compare("oldgnu", "--sparse");
}

#[test]
fn pax() {
    compare("pax", "--xattrs");
}

#[test]
fn pax_sparse_0_0() {
    compare("pax", "--sparse --sparse-version=0.0 --xattrs");
}

#[test]
fn pax_sparse_0_1() {
    compare("pax", "--sparse --sparse-version=0.1 --xattrs");
}

#[test]
fn pax_sparse_1_0() {
    compare("pax", "--sparse --sparse-version=1.0 --xattrs");
}

#[test]
fn pax_with_a_global_header() {
    compare("pax", "--xattrs-include=user.* --pax-option=globexthdr.name=g,mtime=981173106.789");
}

#[test]
fn ustar() {
    compare("ustar", "");
}

#[test]
fn v7() {
    compare("v7", "");
}
