//! Layers stacked by overlayfs, compared with umoci, which applies them one after the other.

use std::fs;
use std::os::fd::AsFd;
use std::process::Command;

use rustix::mount::{MountAttrFlags, UnmountFlags};
use spank_pyxis::sys::mount::{FsContext, attach_at};

use crate::archive::Archive;
use crate::support::{Image, Mounted, as_in_an_image, run};
use crate::tree::{self, Tree};

/// Mounts attached below a directory, where any kernel's overlayfs takes them from.
#[derive(Debug)]
struct Attached(tempfile::TempDir);

impl Attached {
    fn new(images: &[Image]) -> Self {
        let attached = Self(tempfile::tempdir().unwrap());
        for (number, image) in images.iter().enumerate() {
            let path = attached.0.path().join(number.to_string());
            fs::create_dir(&path).unwrap();
            attach_at(image.mount().0.as_fd(), &path).unwrap();
        }
        attached
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.0.path()).into_iter().flatten().flatten() {
            let _ = rustix::mount::unmount(entry.path(), UnmountFlags::DETACH);
        }
    }
}

/// What overlayfs makes of the layers, the lowest first.
fn stacked(layers: &[Vec<u8>]) -> Tree {
    let images: Vec<Image> = layers.iter().map(|layer| Image::new(&layer[..])).collect();
    let attached = Attached::new(&images);
    let lower: Vec<String> =
        (0..images.len()).rev().map(|number| format!("{}/{number}", attached.0.path().display())).collect();
    let context = FsContext::open("overlay").unwrap();
    context.set("lowerdir", &lower.join(":")).unwrap();
    let mount = Mounted(context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap());
    tree::read(&mount.path()).unwrap()
}

/// What umoci makes of the layers.
fn unpacked(layers: &[Vec<u8>]) -> Tree {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let umoci = |arguments: &[&str]| {
        let image = format!("{}/image:test", directory.path().display());
        let mut command = Command::new("umoci");
        command.args(arguments.iter().map(|argument| if *argument == "IMAGE" { &image } else { *argument }));
        run(command.current_dir(directory.path()), "apt-get install umoci");
    };
    umoci(&["init", "--layout", "image"]);
    umoci(&["new", "--image", "IMAGE"]);
    for layer in layers {
        fs::write(directory.path().join("layer.tar"), layer).unwrap();
        umoci(&["raw", "add-layer", "--image", "IMAGE", "layer.tar"]);
    }
    umoci(&["unpack", "--image", "IMAGE", "bundle"]);
    as_in_an_image(tree::read(&directory.path().join("bundle/rootfs")).unwrap())
}

/// Without what differs for good reason: link counts (overlayfs says 1 for directories, and counts names that an upper
/// layer hides), and the mark of opaque directories, which only the layer shows.
fn comparable(mut tree: Tree) -> Tree {
    for node in tree.values_mut() {
        node.xattrs.retain(|name, _| name.starts_with(b"user."));
        node.nlink = 0;
    }
    tree
}

#[track_caller]
fn compare(layers: &[Archive]) -> Tree {
    let layers: Vec<Vec<u8>> =
        layers.iter().map(|layer| Archive::default().directory("./").append(layer).end()).collect();
    let stacked = comparable(stacked(&layers));
    tree::assert_same(&stacked, &comparable(unpacked(&layers)));
    stacked
}

fn base() -> Archive {
    let mut archive = Archive::default();
    for directory in ["a", "a/b", "a/b/c", "d", "e", "f"] {
        archive = archive.directory(directory);
        for number in 0..3 {
            archive = archive.file(&format!("{directory}/{number}"), format!("{directory} {number}").as_bytes());
        }
    }
    archive.symlink("s", "a/b").hard_link("h", "a/b/0").entry("p", b'6', "", 0o600, b"")
}

#[test]
fn whiteouts() {
    let upper = Archive::default()
        .directory("a")
        .file("a/.wh.0", b"")
        .file("a/.wh.b", b"")
        .file("a/.wh.never", b"")
        .file(".wh.d", b"")
        .file(".wh.s", b"")
        .file(".wh.h", b"")
        .directory("f")
        .file("f/.wh.1", b"");
    let tree = compare(&[base(), upper]);
    assert!(!tree.contains_key(&b"a/0"[..]) && !tree.contains_key(&b"a/b/0"[..]) && tree.contains_key(&b"f/0"[..]));
}

#[test]
fn opaque_directories() {
    let upper = Archive::default()
        .directory("a")
        .file("a/.wh..wh..opq", b"")
        .file("a/new", b"x")
        .directory("d")
        .directory("d/b")
        .file("d/.wh..wh..opq", b"");
    let tree = compare(&[base(), upper]);
    assert!(!tree.contains_key(&b"a/b"[..]) && tree.contains_key(&b"a/new"[..]));
}

#[test]
fn replacements() {
    let upper = Archive::default()
        .file("a", b"a file for a directory")
        .directory("s")
        .file("s/x", b"a directory for a link")
        .symlink("d", "e")
        .entry("e", b'5', "", 0o700, b"")
        .file("e/1", b"new content")
        .directory("p")
        .file("h", b"no link any more");
    compare(&[base(), upper]);
}

#[test]
fn whiteouts_beside_what_they_hide() {
    let upper = Archive::default()
        .file(".wh.a", b"")
        .directory("a")
        .file("a/only", b"x")
        .directory("d")
        .file("d/.wh.1", b"")
        .file("d/1", b"back again");
    let tree = compare(&[base(), upper]);
    assert!(!tree.contains_key(&b"a/b"[..]) && tree.contains_key(&b"d/1"[..]));
}

#[test]
fn many_layers() {
    let layers = [
        base(),
        Archive::default().file(".wh.a", b"").directory("d").file("d/4", b"4"),
        Archive::default().directory("a").directory("a/b").file("a/b/back", b"x").directory("d").file("d/.wh.0", b""),
        Archive::default().directory("d").file("d/.wh..wh..opq", b"").file("d/5", b"5"),
        Archive::default().directory("d").file("d/0", b"again").directory("a").file("a/.wh.b", b""),
    ];
    compare(&layers);
}

#[test]
fn content() {
    let archive = (0..200_u32).fold(Archive::default(), |archive, number| {
        let size = number * number % 9000;
        archive.file(&number.to_string(), &vec![number as u8; size as usize])
    });
    compare(&[archive, Archive::default().file("new", b"x")]);
}

/// A directory that only one layer has is shown by overlayfs as it is, unless it is told to look for whiteouts.
#[test]
fn whiteouts_that_hide_nothing() {
    let upper = Archive::default()
        .directory("new")
        .file("new/.wh.never", b"")
        .file("new/x", b"")
        .directory("new/sub")
        .file("new/sub/.wh.never", b"");
    compare(&[base(), upper.clone()]);
    compare(&[upper, base()]);
}
