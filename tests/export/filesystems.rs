//! Exported root filesystems.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Timespec, Timestamps, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use spank_pyxis::enroot::generated;
use spank_pyxis::export::target::{NewFile, Target};
use spank_pyxis::export::{self, ExportError};
use spank_pyxis::image::config::ImageConfig;
use tempfile::TempDir;

use crate::support::{Image, options};
use crate::tree::{self, Content, Kind, Tree};

/// Exports `root` to a file in `directory`.
fn export(root: &Path, directory: &TempDir) -> Result<Image, ExportError> {
    let path = directory.path().join("image.sqsh");
    let file: NewFile = Target::open(&path)?.create()?;
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
    export::write(root.as_fd(), &file, &options("-comp zstd -Xcompression-level 1"), &[])?;
    file.publish()?;
    let image = tempfile::NamedTempFile::new().unwrap();
    fs::copy(&path, image.path()).unwrap();
    Ok(Image(image))
}

/// What an image can hold of a tree.
fn expected(root: &Path) -> Tree {
    let mut tree = tree::read(root).unwrap();
    for node in tree.values_mut() {
        node.owner = (0, 0);
        node.mtime.1 = 0;
    }
    tree
}

#[track_caller]
fn exported(root: &Path) -> Tree {
    export(root, &TempDir::new().unwrap()).unwrap().judged()
}

#[test]
fn everything_in_a_root_is_in_the_image() {
    let root = TempDir::new_in("/var/tmp").unwrap();
    let path = |name: &str| root.path().join(name);
    fs::create_dir_all(path("usr/lib/deep")).unwrap();
    fs::write(path("usr/lib/deep/file"), "content").unwrap();
    fs::write(path("usr/lib/empty"), "").unwrap();
    let large: Vec<u8> = (0..300_001_u32).map(|at| (at / 3) as u8).collect();
    fs::write(path("large"), &large).unwrap();
    let holes = fs::File::create(path("holes")).unwrap();
    holes.set_len(30 << 20).unwrap();
    holes.write_all_at(b"middle", 10 << 20).unwrap();
    fs::hard_link(path("large"), path("usr/large")).unwrap();
    symlink("/absolute", path("link")).unwrap();
    fs::hard_link(path("link"), path("usr/link")).unwrap();
    symlink("usr", path("lib")).unwrap();
    rustix::fs::mknodat(CWD, path("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    let device = rustix::fs::makedev(1, 3);
    rustix::fs::mknodat(CWD, path("null"), FileType::CharacterDevice, Mode::from_raw_mode(0o666), device).unwrap();
    drop(UnixListener::bind(path("socket")).unwrap());
    for (name, mode) in [("usr", 0o711), ("large", 0o6755), ("usr/lib/empty", 0o400), ("usr/lib/deep/file", 0)] {
        fs::set_permissions(path(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    rustix::fs::setxattr(path("large"), "user.note", b"value", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(path("usr"), "user.empty", b"", XattrFlags::empty()).unwrap();
    rustix::fs::setxattr(path("usr"), "trusted.secret", b"x", XattrFlags::empty()).unwrap();
    let time = Timespec { tv_sec: 1_234_567_890, tv_nsec: 5 };
    let times = Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(CWD, path("link"), &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
    rustix::fs::chownat(CWD, path("large"), Some(rustix::fs::Uid::from_raw(12)), None, AtFlags::empty()).unwrap();

    let mut expected = expected(root.path());
    expected.get_mut(&b"usr"[..]).unwrap().xattrs.remove(&b"trusted.secret"[..]);
    // Changing the owner has cleared them.
    assert_eq!(expected[&b"large"[..]].mode, 0o755);
    let exported = exported(root.path());
    tree::assert_same(&expected, &exported);
    assert_eq!(exported[&b"usr/link"[..]].same_as, b"link");
}

#[test]
fn what_belongs_to_one_container_is_left_out() {
    let root = TempDir::new_in("/var/tmp").unwrap();
    let path = |name: &str| root.path().join(name);
    for directory in ["dev/pts", "stub/inside", "opt/stub", "opt/dev", "mounted", "dir/.enroot"] {
        fs::create_dir_all(path(directory)).unwrap();
    }
    for name in ["dev/file", "stub/inside/file", ".lock", ".enroot", "opt/empty-stub", "opt/.lock", "opt/dev/file"] {
        fs::write(path(name), "").unwrap();
    }
    fs::write(path("opt/full"), "x").unwrap();
    for name in ["stub", "opt/stub", "opt/empty-stub", "opt/full"] {
        fs::set_permissions(path(name), fs::Permissions::from_mode(0o0)).unwrap();
    }
    rustix::mount::mount("tmpfs", path("mounted"), "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(path("mounted/file"), "x").unwrap();
    fs::write(path("bound"), "below").unwrap();
    rustix::mount::mount_bind(path("opt/full"), path("bound")).unwrap();
    let exported = std::panic::catch_unwind(|| exported(root.path()));
    for name in ["mounted", "bound"] {
        rustix::mount::unmount(path(name), UnmountFlags::DETACH).unwrap();
    }
    let names: BTreeSet<String> = exported.unwrap().into_keys().map(|path| String::from_utf8(path).unwrap()).collect();
    let expected = ["", "dev", "dir", "dir/.enroot", "opt", "opt/.lock", "opt/dev", "opt/dev/file", "opt/full"];
    assert_eq!(names, expected.map(str::to_owned).into());
}

#[test]
fn start_files_take_the_place_of_others() {
    let root = TempDir::new_in("/var/tmp").unwrap();
    let path = |name: &str| root.path().join(name);
    let image = ImageConfig { env: vec!["A=1".into()], ..ImageConfig::default() };
    let start = generated::files(&image, None);
    let export = || {
        let directory = TempDir::new().unwrap();
        let file = Target::open(&directory.path().join("x")).unwrap().create().unwrap();
        let fd = rustix::fs::open(root.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        export::write(fd.as_fd(), &file, &options("-comp lz4"), &start).unwrap();
        file.publish().unwrap();
        let image = tempfile::NamedTempFile::new().unwrap();
        fs::copy(directory.path().join("x"), image.path()).unwrap();
        Image(image).judged()
    };
    let content = |text: &str| Kind::File { size: text.len() as u64, content: Content::of(text.as_bytes()) };
    // No /etc at all.
    assert_eq!(export()[&b"etc/environment"[..]].kind, content("A=1\n"));
    // Whatever the image has there.
    fs::create_dir_all(path("etc/rc.local/d")).unwrap();
    fs::write(path("etc/environment"), "B=2\n").unwrap();
    fs::write(path("etc/other"), "other").unwrap();
    fs::set_permissions(path("etc"), fs::Permissions::from_mode(0o711)).unwrap();
    let tree = export();
    assert_eq!(tree[&b"etc/environment"[..]].kind, content("A=1\n"));
    assert_eq!(tree[&b"etc/rc.local"[..]].kind, content(&start[1].content));
    assert_eq!((tree[&b"etc"[..]].mode, tree.contains_key(&b"etc/other"[..])), (0o711, true));
    // Users may have changed what a container was made with.
    fs::write(path("etc/rc"), "mine\n").unwrap();
    let tree = export();
    assert_eq!(tree[&b"etc/rc"[..]].kind, content("mine\n"));
    assert_eq!(tree[&b"etc/environment"[..]].kind, content("B=2\n"));
    // Whoever has another kind of /etc knows why.
    fs::rename(path("etc"), path("real")).unwrap();
    symlink("real", path("etc")).unwrap();
    assert_eq!(export()[&b"etc"[..]].kind, Kind::Symlink(b"real".to_vec()));
}

#[test]
fn a_directory_below_a_file_system_of_its_own_can_be_exported() {
    let root = TempDir::new().unwrap();
    rustix::mount::mount("tmpfs", root.path(), "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir(root.path().join("root")).unwrap();
    fs::write(root.path().join("root/file"), "x").unwrap();
    let exported = std::panic::catch_unwind(|| exported(&root.path().join("root")));
    rustix::mount::unmount(root.path(), UnmountFlags::DETACH).unwrap();
    assert_eq!(exported.unwrap().len(), 2);
}

#[test]
fn deep_trees_and_odd_names_are_no_trouble() {
    let root = TempDir::new_in("/var/tmp").unwrap();
    let mut directory = rustix::fs::open(root.path(), OFlags::PATH, Mode::empty()).unwrap();
    // Deeper than any path may be long.
    for _ in 0..300 {
        let name = "d".repeat(40);
        rustix::fs::mkdirat(&directory, &name, Mode::from_raw_mode(0o755)).unwrap();
        directory = rustix::fs::openat(&directory, &name, OFlags::PATH, Mode::empty()).unwrap();
    }
    let names = [&b"new\nline"[..], b"\xff\xfe", b"-rf", b" ", b"a\\b", &[b'n'; 255]];
    for name in names {
        fs::write(root.path().join(std::ffi::OsStr::from_bytes(name)), name).unwrap();
    }
    let image = export(root.path(), &TempDir::new().unwrap()).unwrap();
    let mounted = image.mount();
    for name in names {
        assert_eq!(fs::read(mounted.path().join(std::ffi::OsStr::from_bytes(name))).unwrap(), name);
    }
    let mut directory = rustix::fs::open(mounted.path(), OFlags::PATH, Mode::empty()).unwrap();
    for _ in 0..300 {
        directory = rustix::fs::openat(&directory, "d".repeat(40), OFlags::PATH, Mode::empty()).unwrap();
    }
}

#[test]
fn what_cannot_be_read_is_named_and_nothing_is_left() {
    let root = TempDir::new_in("/var/tmp").unwrap();
    fs::write(root.path().join("file"), "x").unwrap();
    let target = TempDir::new().unwrap();
    fs::write(target.path().join("image.sqsh"), "old").unwrap();
    // Nobody but root may read it, and a thread's privileges are its own.
    fs::set_permissions(root.path().join("file"), fs::Permissions::from_mode(0o200)).unwrap();
    let result = std::thread::scope(|scope| {
        let unprivileged = || {
            spank_pyxis::sys::process::set_capabilities(rustix::thread::CapabilitySet::empty()).unwrap();
            export(root.path(), &target).map(drop)
        };
        scope.spawn(unprivileged).join().unwrap()
    });
    assert_eq!(result.unwrap_err().to_string(), "cannot read /file in the container: Permission denied");
    assert_eq!(fs::read_dir(target.path()).unwrap().count(), 1);
    assert_eq!(fs::read(target.path().join("image.sqsh")).unwrap(), b"old");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]

    #[test]
    fn any_tree_comes_out_as_it_was(
        files in proptest::collection::vec(
            ("[a-c](/[a-d]{1,2}){0,3}", 0u8..5, 1u32..0o1000, proptest::collection::vec((0u64..400_000, 1usize..9000), 0..4)),
            0..30,
        ),
    ) {
        let root = TempDir::new_in("/var/tmp").unwrap();
        let mut first = None;
        for (name, kind, mode, pieces) in files {
            let path = root.path().join(&name);
            if fs::create_dir_all(path.parent().unwrap()).is_err() || path.symlink_metadata().is_ok() {
                continue;
            }
            match (kind, &first) {
                (0, _) => fs::create_dir(&path).unwrap(),
                (1, _) => symlink(&name, &path).unwrap(),
                (2, Some(first)) => fs::hard_link(first, &path).unwrap(),
                _ => {
                    let file = fs::File::create(&path).unwrap();
                    for (at, length) in pieces {
                        file.write_all_at(&vec![at as u8; length], at).unwrap();
                    }
                    file.set_permissions(fs::Permissions::from_mode(mode)).unwrap();
                    first = Some(path);
                }
            }
        }
        let image = export(root.path(), &TempDir::new().unwrap()).unwrap();
        let mounted = tree::read(&image.mount().path()).unwrap();
        tree::assert_same(&expected(root.path()), &mounted);
        prop_assert!(mounted.values().all(|node| node.kind != Kind::Whiteout));
    }
}
