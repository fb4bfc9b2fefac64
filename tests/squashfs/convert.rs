//! Squashfs images as layers, judged by `fsck.erofs`, by our own reader of layers, and by the kernel.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat};
use rustix::mount::MountAttrFlags;
use spank_pyxis::image::digest::Digest;
use spank_pyxis::import::{LayerError, LayerLimits, write_squashfs};
use spank_pyxis::sys::loopdev;
use tempfile::NamedTempFile;

use crate::reader;
use crate::support::{Source, noise, open, run, text, whole_seconds};
use crate::tree::{self, Kind, Tree};

const LIMITS: LayerLimits = LayerLimits { max_bytes: 1 << 30, max_entries: 200_000 };

/// Everything that can be in an image.
fn source() -> Source {
    let source = Source::new();
    for size in [0, 1, 4095, 4096, 4097, 100_000, 300_000, 3 << 20] {
        source.file(&format!("text-{size}"), text(size));
    }
    source.directory("d");
    for number in 0..2000 {
        source.file(&format!("d/{number}"), noise(number % 700));
    }
    source.file("d/program", noise(50_000));
    for (name, mode) in [("d/program", 0o4111), ("d/1", 0o000), ("d", 0o1555)] {
        std::fs::set_permissions(source.path(name), PermissionsExt::from_mode(mode)).unwrap();
    }
    std::fs::hard_link(source.path("text-100000"), source.path("d/link")).unwrap();
    std::fs::hard_link(source.path("text-0"), source.path("empty too")).unwrap();
    symlink("../".repeat(1300), source.path("link")).unwrap();
    let sparse = File::create(source.path("sparse")).unwrap();
    sparse.set_len(300 << 20).unwrap();
    for at in [0, 100 << 20, (300 << 20) - 5] {
        sparse.write_all_at(b"data!", at).unwrap();
    }
    File::create(source.path("hole")).unwrap().set_len(3 << 20).unwrap();
    mknodat(CWD, source.path("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    mknodat(CWD, source.path("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3)).unwrap();
    mknodat(CWD, source.path("socket"), FileType::Socket, Mode::RUSR, 0).unwrap();
    source.directory("dev");
    source.file("dev/file", "x");
    source.file(".wh.no-whiteout", "x");
    for (name, key) in [("d", "user.a"), ("d/7", "user.b"), ("d/7", "trusted.c"), ("d/8", "security.d")] {
        rustix::fs::setxattr(source.path(name), key, &text(100), XattrFlags::empty()).unwrap();
    }
    source
}

struct Layer {
    file: NamedTempFile,
    content: Digest,
}

fn convert(image: &Path, limits: &LayerLimits) -> Result<Layer, LayerError> {
    let file = NamedTempFile::new_in("/var/tmp").unwrap();
    let mut bytes = 0;
    let converted = write_squashfs(&open(image), file.as_file(), limits, |more| bytes += more)?;
    assert_eq!(file.as_file().metadata().unwrap().len(), converted.image);
    assert_eq!(bytes, converted.unpacked);
    Ok(Layer { file, content: converted.content })
}

fn bytes(layer: &Layer) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut file = layer.file.as_file();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

/// What a layer has of a tree: owners, the owner's permissions, no devices, an empty `/dev`.
fn as_a_layer(mut tree: Tree) -> Tree {
    tree.retain(|path, node| !path.starts_with(b"dev/") && !matches!(node.kind, Kind::Device | Kind::Whiteout));
    for node in tree.values_mut() {
        node.owner = (0, 0);
        node.mode |= match node.kind {
            Kind::Directory => 0o700,
            Kind::Symlink(_) => 0o777,
            _ if node.mode & 0o111 != 0 => 0o500,
            _ => 0o400,
        };
        node.xattrs.retain(|name, _| name.starts_with(b"user."));
    }
    tree
}

#[test]
fn everything_is_there() {
    let source = source();
    let layer = convert(&source.pack(&["-comp", "zstd", "-Xcompression-level", "1"]), &LIMITS).unwrap();
    let expected = as_a_layer(source.tree());
    tree::assert_same(&whole_seconds(reader::read(&bytes(&layer)).unwrap()), &expected);
    run(Command::new("fsck.erofs").arg("--extract").arg(layer.file.path()));
    let mount = loopdev::mount(layer.file.as_file().as_fd(), "erofs", MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap();
    let mounted = tree::read(Path::new(&format!("/proc/self/fd/{}", mount.as_raw_fd()))).unwrap();
    tree::assert_same(&mounted, &expected);
}

#[test]
fn the_same_content_is_the_same_layer() {
    let source = source();
    let first = convert(&source.pack(&["-comp", "lz4", "-b", "131072"]), &LIMITS).unwrap();
    for options in [
        &["-comp", "gzip", "-Xcompression-level", "1", "-b", "131072", "-no-fragments"][..],
        &["-noI", "-noD", "-noF", "-b", "131072", "-all-root"],
    ] {
        let other = convert(&source.pack(options), &LIMITS).unwrap();
        assert_eq!(other.content, first.content);
        assert!(bytes(&other) == bytes(&first));
    }
    // One bit more.
    std::fs::set_permissions(source.path("d/9"), PermissionsExt::from_mode(0o777)).unwrap();
    assert_ne!(convert(&source.pack(&["-comp", "lz4"]), &LIMITS).unwrap().content, first.content);
}

#[test]
fn limits_hold() {
    let source = source();
    let image = source.pack(&["-comp", "lz4"]);
    let limits = |max_bytes, max_entries| LayerLimits { max_bytes, max_entries };
    assert!(matches!(convert(&image, &limits(1 << 20, 10_000)), Err(LayerError::TooLarge)));
    assert!(matches!(convert(&image, &limits(1 << 30, 100)), Err(LayerError::TooManyEntries)));
    let full = File::open("/dev/null").unwrap();
    assert!(matches!(write_squashfs(&open(&image), &full, &LIMITS, |_| {}), Err(LayerError::Write(_))));
}
