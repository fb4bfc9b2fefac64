//! The images that tests and demo use, made here and nowhere else.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::unistd::mkfifo;
use serde_json::json;

use crate::image::{Compression, ImageBuilder};
use crate::process;

/// Images that take long to make are kept here between runs.
const CACHE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../target/testbed-cache");

/// Name of the distribution in the busybox image's `/etc/os-release`.
pub const PRETTY_NAME: &str = "Busybox of the pyxis testbed";

/// `PATH` as images usually have it.
pub const IMAGE_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Fills the new directory `tree` with a small system: a static busybox, a link for each of its commands, `/etc`.
pub fn busybox_tree(tree: &Path) -> Result<()> {
    for directory in ["bin", "etc", "root", "tmp", "usr/bin", "usr/local/bin", "var/lib"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    fs::set_permissions(tree.join("root"), fs::Permissions::from_mode(0o700))?;
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::copy("/bin/busybox", tree.join("bin/busybox")).context("busybox-static")?;
    for command in process::output_of(Command::new("/bin/busybox").arg("--list"))?.lines() {
        if command != "busybox" {
            symlink("busybox", tree.join("bin").join(command))?;
        }
    }
    symlink("../../bin/busybox", tree.join("usr/bin/env"))?;
    for (file, text) in [
        ("os-release", format!("ID=busybox\nPRETTY_NAME=\"{PRETTY_NAME}\"\n")),
        ("passwd", "root:x:0:0:root:/root:/bin/sh\nimageuser:x:4242:4242::/:/bin/sh\n".into()),
        ("group", "root:x:0:\nimagegroup:x:4242:\n".into()),
    ] {
        fs::write(tree.join("etc").join(file), text)?;
    }
    Ok(())
}

/// The small image that stands in for Docker Hub's `alpine`, as an OCI layout in the new directory `layout`. Gives
/// skopeo's name of it.
pub fn busybox(layout: &Path) -> Result<String> {
    let tree = layout.join("tree");
    busybox_tree(&tree)?;
    ImageBuilder::new(layout)?
        .config("Env", json!([IMAGE_PATH]))
        .config("Cmd", json!(["/bin/sh"]))
        .layer_from_tree(&tree, Compression::Gzip)?
        .finish("latest")
}

/// A distroless image: one static binary, `/busybox`, and nothing else. No shell, no `/etc/passwd`, not even `/tmp`.
pub fn distroless(layout: &Path) -> Result<String> {
    let tree = layout.join("tree");
    fs::create_dir_all(&tree)?;
    fs::copy("/bin/busybox", tree.join("busybox")).context("busybox-static")?;
    ImageBuilder::new(layout)?
        .config("Entrypoint", json!(["/busybox"]))
        .layer_from_tree(&tree, Compression::Zstd)?
        .finish("latest")
}

/// A minimal Debian, made from the machine's own package sources. Kept between runs.
pub fn debian() -> Result<String> {
    cached("debian-1", |layout| {
        let tar = layout.join("base.tar");
        let mut command = Command::new("mmdebstrap");
        command.args(["--variant=minbase", "--quiet", "--dpkgopt=path-exclude=/usr/share/doc/*"]);
        command.args(["--dpkgopt=path-exclude=/usr/share/locale/*", "bookworm"]).arg(&tar);
        command.args(package_sources());
        process::run(&mut command, std::time::Duration::from_secs(600))?.success()?;
        let image = ImageBuilder::new(layout)?
            .config("Env", json!([IMAGE_PATH]))
            .config("Cmd", json!(["bash"]))
            .layer_from_tar(File::open(&tar)?, Compression::Gzip)?;
        fs::remove_file(tar)?;
        image.finish("latest")
    })
}

/// The machine's own package sources, for mmdebstrap.
pub(crate) fn package_sources() -> Option<&'static Path> {
    let sources = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"].map(Path::new);
    sources.into_iter().find(|path| path.exists())
}

/// An image of four layers, together `bytes` unpacked, that compresses about as well as programs do: large libraries
/// and many small files. Kept between runs.
pub fn large(bytes: u64) -> Result<String> {
    cached(&format!("large-{bytes}-1"), |layout| {
        let mut image = ImageBuilder::new(layout)?.config("Env", json!([IMAGE_PATH]));
        let base = layout.join("tree");
        busybox_tree(&base)?;
        image = image.layer_from_tree(&base, Compression::Gzip)?;
        fs::remove_dir_all(&base)?;
        let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
        for layer in 0..3 {
            let tree = layout.join("tree");
            let mut left = bytes / 3;
            for number in 0.. {
                // A tenth of the bytes in small files, as in a tree of Python packages.
                let size = if number % 400 == 0 { left.min(96 << 20) } else { left.min(24 << 10) };
                if size == 0 {
                    break;
                }
                let directory = tree.join(format!("opt/layer{layer}/part{}", number / 200));
                fs::create_dir_all(&directory)?;
                noise.write(&mut File::create(directory.join(format!("file{number}")))?, size)?;
                left -= size;
            }
            image = image.layer_from_tree(&tree, Compression::Gzip)?;
            fs::remove_dir_all(&tree)?;
        }
        image.finish("latest")
    })
}

/// An image of at least `bytes` unpacked, made of what is installed on this machine: programs, documentation, a
/// compiler, libraries, a layer each. Kept between runs.
pub fn installed(bytes: u64) -> Result<String> {
    cached(&format!("installed-{bytes}-1"), |layout| {
        let toolchain = process::output_of(Command::new("rustc").args(["--print", "sysroot"]))?;
        let mut image = ImageBuilder::new(layout)?.config("Env", json!([IMAGE_PATH]));
        let mut size = 0;
        for tree in ["/usr/bin", "/usr/share", toolchain.trim(), "/usr/local", "/usr/lib"] {
            if size < bytes {
                let usage = process::output_of(Command::new("du").args(["--summarize", "--bytes", tree]))?;
                size += usage.split_whitespace().next().and_then(|text| text.parse::<u64>().ok()).unwrap_or(0);
                image = image.layer_from_tree(Path::new(tree), Compression::Gzip)?;
            }
        }
        image.finish("latest")
    })
}

/// The trees of three layers that have everything a layer can hold: whiteouts of files and directories, an opaque
/// directory, hard links, symbolic links, long names, holes, extended attributes, fifos, device nodes, odd modes and
/// owners, empty files and a directory with `entries` entries. Made in the new directory `directory`.
pub fn feature_trees(directory: &Path, entries: usize) -> Result<[PathBuf; 3]> {
    let trees = ["base", "changes", "crowd"].map(|name| directory.join(name));
    busybox_tree(&trees[0])?;
    feature_base(&trees[0])?;
    feature_changes(&trees[1])?;
    feature_crowd(&trees[2], entries)?;
    Ok(trees)
}

/// The image with these layers, compressed as `compressions` say, as an OCI layout in the new directory `layout`.
pub fn features(layout: &Path, trees: &[PathBuf; 3], compressions: [Compression; 3]) -> Result<String> {
    let image = ImageBuilder::new(layout)?.config("Env", json!([IMAGE_PATH]));
    trees
        .iter()
        .zip(compressions)
        .try_fold(image, |image, (tree, how)| image.layer_from_tree(tree, how))?
        .finish("latest")
}

/// What the second layer changes, and what stays.
fn feature_base(tree: &Path) -> Result<()> {
    for directory in ["gone-directory/below", "opaque/below", "kept", "replaced-by-file", "dev", "long"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    for file in ["gone-file", "gone-directory/below/file", "opaque/old", "opaque/below/old", "kept/file", "changed"] {
        fs::write(tree.join(file), format!("lower {file}\n"))?;
    }
    fs::write(tree.join("empty"), "")?;
    fs::write(tree.join("replaced-by-file/old"), "old\n")?;
    fs::write(tree.join("replaced-by-directory"), "old\n")?;
    fs::write(tree.join("link-a"), "linked\n")?;
    fs::hard_link(tree.join("link-a"), tree.join("link-b"))?;
    fs::hard_link(tree.join("link-a"), tree.join("kept/link-c"))?;
    symlink("kept/file", tree.join("symlink"))?;
    symlink("/nowhere/at all", tree.join("dangling"))?;
    symlink("../".repeat(300) + "end", tree.join("long/symlink"))?;
    fs::write(tree.join("long").join("n".repeat(255)), "long name\n")?;
    let deep = (0..12).fold(tree.join("long"), |path, level| path.join(format!("{level}").repeat(60)));
    fs::create_dir_all(&deep)?;
    fs::write(deep.join("file"), "deep\n")?;
    fs::write(tree.join("name with blanks,\tand\nmore \u{e9}\u{4e2d}"), "odd name\n")?;
    let mut sparse = File::create(tree.join("sparse"))?;
    for offset in [5 << 20, 64 << 20] {
        sparse.seek(SeekFrom::Start(offset))?;
        sparse.write_all(b"island")?;
    }
    sparse.set_len(80 << 20)?;
    mkfifo(&tree.join("fifo"), Mode::from_bits_truncate(0o640))?;
    mknod(&tree.join("dev/null"), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, 3))?;
    let mut attribute = Command::new("setfattr");
    attribute.args(["--name=user.testbed", "--value=attribute of a file"]).arg(tree.join("kept/file"));
    process::output_of(&mut attribute)?;
    for (file, mode) in [("setuid", 0o4755), ("setgid", 0o2755), ("no-mode", 0), ("write-only", 0o200)] {
        fs::write(tree.join(file), "mode\n")?;
        fs::set_permissions(tree.join(file), fs::Permissions::from_mode(mode))?;
    }
    fs::write(tree.join("owned"), "by somebody\n")?;
    lchown(tree.join("owned"), Some(123_456), Some(654_321))?;
    let old = File::open(tree.join("kept"))?;
    old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::new(86_400, 123_456_789))?;
    Ok(())
}

fn feature_changes(tree: &Path) -> Result<()> {
    for directory in ["opaque", "replaced-by-directory", "new"] {
        fs::create_dir_all(tree.join(directory))?;
    }
    for whiteout in [".wh.gone-file", ".wh.gone-directory", "opaque/.wh..wh..opq"] {
        fs::write(tree.join(whiteout), "")?;
    }
    fs::write(tree.join("opaque/new"), "new\n")?;
    fs::write(tree.join("replaced-by-directory/file"), "new\n")?;
    fs::write(tree.join("replaced-by-file"), "new\n")?;
    fs::write(tree.join("changed"), "upper\n")?;
    fs::write(tree.join("new/file"), "new\n")?;
    Ok(())
}

fn feature_crowd(tree: &Path, entries: usize) -> Result<()> {
    fs::create_dir_all(tree.join("crowd"))?;
    for number in 0..entries {
        File::create(tree.join(format!("crowd/entry{number}")))?;
    }
    Ok(())
}

/// Makes an image with `make` in a directory of the cache, unless it is there.
pub(crate) fn cached(name: &str, make: impl FnOnce(&Path) -> Result<String>) -> Result<String> {
    let layout = PathBuf::from(CACHE).join(name);
    if !layout.exists() {
        let unfinished = layout.with_extension(format!("{}.tmp", std::process::id()));
        fs::create_dir_all(&unfinished).with_context(|| unfinished.display().to_string())?;
        let made = make(&unfinished).with_context(|| format!("cannot make the image {name}"));
        if made.is_err() || fs::rename(&unfinished, &layout).is_err() {
            // Somebody else was faster, or it did not work.
            fs::remove_dir_all(&unfinished)?;
        }
        made?;
    }
    Ok(format!("oci:{}:latest", layout.canonicalize()?.display()))
}

/// Reproducible bytes that compress to about a half: a xorshift generator's, with repeats.
struct Noise(u64);

impl Noise {
    fn write(&mut self, file: &mut File, size: u64) -> Result<()> {
        let mut source = self.take(size);
        std::io::copy(&mut source, file)?;
        Ok(())
    }
}

impl Read for &mut Noise {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        for chunk in buffer.chunks_mut(32) {
            let random = chunk.len().min(16);
            for word in chunk[..random].chunks_mut(8) {
                self.0 ^= self.0 << 13;
                self.0 ^= self.0 >> 7;
                self.0 ^= self.0 << 17;
                word.copy_from_slice(&self.0.to_le_bytes()[..word.len()]);
            }
            if let Some(rest) = chunk.get_mut(16..) {
                rest.fill(b"\0machine code\0\x48\x89"[(self.0 % 8) as usize]);
            }
        }
        Ok(buffer.len())
    }
}
