//! A tree of files as plain data, to compare what different programs make of one image.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use testbed::process::output_of;

/// What is at a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    pub mode: u32,
    pub mtime: i64,
    pub kind: Kind,
    /// `user.` attributes.
    pub xattrs: String,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    Directory,
    /// Content, and the first path of the same file.
    File(Vec<u8>, String),
    Symlink(Vec<u8>),
    Fifo,
    Device,
}

pub type Tree = BTreeMap<String, Node>;

/// Reads everything below `root`.
pub fn read(root: &Path) -> Tree {
    let (mut tree, mut first) = (Tree::new(), BTreeMap::new());
    let mut left = vec![String::new()];
    while let Some(path) = left.pop() {
        let full = root.join(&path);
        let metadata = fs::symlink_metadata(&full).unwrap();
        let file_type = metadata.file_type();
        let kind = if file_type.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                left.push(if path.is_empty() { name } else { format!("{path}/{name}") });
            }
            Kind::Directory
        } else if file_type.is_symlink() {
            Kind::Symlink(fs::read_link(&full).unwrap().into_os_string().into_vec())
        } else if file_type.is_file() {
            Kind::File(fs::read(&full).unwrap(), String::new())
        } else if file_type.is_fifo() {
            Kind::Fifo
        } else {
            Kind::Device
        };
        let xattrs = match kind {
            Kind::File(..) | Kind::Directory => attributes(&full),
            _ => String::new(),
        };
        let names: &mut Vec<String> = first.entry((metadata.dev(), metadata.ino())).or_default();
        names.push(path.clone());
        tree.insert(path, Node { mode: metadata.mode() & 0o7777, mtime: metadata.mtime(), kind, xattrs });
    }
    for mut names in first.into_values() {
        names.sort();
        for name in &names {
            if let Some(Node { kind: Kind::File(_, same), .. }) = tree.get_mut(name) {
                same.clone_from(&names[0]);
            }
        }
    }
    tree
}

fn attributes(path: &Path) -> String {
    let mut command = Command::new("getfattr");
    command.args(["--dump", "--no-dereference", "--absolute-names", "--match=^user\\."]).arg(path);
    let text = output_of(&mut command).unwrap();
    text.lines().filter(|line| line.starts_with("user.") && !line.starts_with("user.rootlesscontainers")).collect()
}

/// What `umoci unpack` makes of the image `layout:tag`.
pub fn umoci(image: &str, bundle: &Path) -> Tree {
    let name = image.strip_prefix("oci:").unwrap();
    output_of(Command::new("umoci").args(["unpack", "--image", name]).arg(bundle)).unwrap();
    read(&bundle.join("rootfs"))
}

/// A tree as an unpacked image of ours should be: without devices and what is in `/dev`, readable for its owner, with the
/// files that are generated.
pub fn as_imported(mut tree: Tree, setuid: bool) -> Tree {
    tree.retain(|path, node| !path.starts_with("dev/") && node.kind != Kind::Device);
    for node in tree.values_mut() {
        match node.kind {
            Kind::Directory => node.mode |= 0o700,
            Kind::Symlink(_) => node.mode = 0o777,
            _ if node.mode & 0o111 != 0 => node.mode |= 0o500,
            _ => node.mode |= 0o400,
        }
        if !setuid {
            node.mode &= 0o1777;
        }
    }
    tree
}

/// The paths of the files that an import generates.
pub const GENERATED: [&str; 4] = ["etc/environment", "etc/fstab", "etc/rc", "etc/rc.local"];

/// Fails with the first difference.
#[track_caller]
pub fn assert_same(actual: &Tree, expected: &Tree) {
    let paths =
        |tree: &Tree| tree.keys().filter(|path| !GENERATED.contains(&path.as_str())).cloned().collect::<Vec<_>>();
    assert_eq!(paths(actual), paths(expected));
    for path in paths(actual) {
        let (actual, expected) = (&actual[&path], &expected[&path]);
        let same = actual.kind == expected.kind
            && actual.mode == expected.mode
            && actual.xattrs == expected.xattrs
            // The generated files are newer than the image.
            && (actual.mtime == expected.mtime || path == "etc" || matches!(actual.kind, Kind::Symlink(_)));
        let short = |node: &Node| format!("{:.200}", format!("{node:?}"));
        assert!(same, "{path}: {} instead of {}", short(actual), short(expected));
    }
}
