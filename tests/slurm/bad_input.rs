//! Images that lie or are broken: one line that names what is wrong, an exit code, and a store as it was.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::image::{Compression, ImageBuilder};
use testbed::images;

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("damaged_blob", damaged_blob),
    ("truncated_blob", truncated_blob),
    ("lying_diff_id", lying_diff_id),
    ("garbage_instead_of_a_layer", garbage_layer),
    ("garbage_instead_of_a_config", garbage_config),
    ("paths_that_escape", paths_that_escape),
    ("paths_below_links_and_files", paths_below),
    ("bomb", bomb),
    ("links_where_the_container_is_set_up", hostile_links),
    ("files_where_directories_should_be", hostile_files),
    ("configuration_of_the_image", hostile_config),
    ("nothing_is_evaluated", nothing_is_evaluated),
];

/// Everything in the stores of all nodes.
fn stores(world: &World) -> BTreeSet<PathBuf> {
    fn walk(directory: &Path, found: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            match entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                true => walk(&entry.path(), found),
                false => drop(found.insert(entry.path())),
            }
        }
    }
    let mut found = BTreeSet::new();
    for node in world.bed.cluster.nodes() {
        walk(&node.private("/var/lib/pyxis"), &mut found);
    }
    // Locks and records of who asked for what may come and go.
    found.retain(|path| path.components().any(|part| part.as_os_str() == "layers"));
    found
}

/// Runs a step in the image, which must fail, say `text` in one line of ours, and add nothing to the store.
fn harmless(world: &mut World, image: &str, text: &str) -> Result<()> {
    world.srun(&["-N2", IMAGE, "true"])?.success()?;
    let before = stores(world);
    let error = world.refused(&[&format!("--container-image={image}")], "pyxis: failed to import docker image: ")?;
    ensure!(error.contains(text), "does not say \"{text}\": {error}");
    let added: Vec<_> = stores(world).difference(&before).cloned().collect();
    ensure!(added.is_empty(), "added to the store: {added:?}");
    world.nodes_work()
}

/// The file of the largest blob of an image that was just pushed: its layer.
fn stored_layer(world: &World, image: &str) -> Result<PathBuf> {
    let root = world.bed.hub.storage().join("docker/registry/v2");
    let links = root.join(format!("repositories/library/{image}/_layers/sha256"));
    let blobs = fs::read_dir(&links)?.filter_map(|entry| {
        let name = entry.ok()?.file_name().into_string().ok()?;
        let blob = root.join(format!("blobs/sha256/{}/{name}/data", &name[..2]));
        Some((fs::metadata(&blob).ok()?.len(), blob))
    });
    Ok(blobs.max().context("no blob")?.1)
}

fn damaged_blob(world: &mut World) -> Result<()> {
    let image = world.new_image(100_000)?;
    let blob = stored_layer(world, &image)?;
    let mut bytes = fs::read(&blob)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&blob, bytes)?;
    harmless(world, &image, "digest")
}

fn truncated_blob(world: &mut World) -> Result<()> {
    let image = world.new_image(100_000)?;
    let blob = stored_layer(world, &image)?;
    let length = fs::metadata(&blob)?.len();
    fs::OpenOptions::new().write(true).open(&blob)?.set_len(length / 2)?;
    harmless(world, &image, "bytes")
}

/// Pushes an image whose one layer is this stream; `change` edits the finished config.
fn push(world: &mut World, name: &str, layer: &[u8], compression: Compression) -> Result<()> {
    let layout = world.directory(name)?;
    let image = ImageBuilder::new(&layout)?.layer_from_tar(layer, compression)?.finish("latest")?;
    world.bed.hub.push(&image, &format!("library/{name}:latest"))
}

fn lying_diff_id(world: &mut World) -> Result<()> {
    let layout = world.directory("liar")?;
    let tree = layout.join("tree");
    images::busybox_tree(&tree)?;
    let image = ImageBuilder::new(&layout)?
        .layer_from_tree(&tree, Compression::Gzip)?
        .with_diff_id(0, &format!("sha256:{}", "5".repeat(64)))
        .finish("latest")?;
    world.bed.hub.push(&image, "library/liar:latest")?;
    harmless(world, "liar", "image config names")
}

fn garbage_layer(world: &mut World) -> Result<()> {
    for (name, compression) in
        [("garbage-tar", Compression::None), ("garbage-gzip", Compression::Gzip), ("garbage-zstd", Compression::Zstd)]
    {
        push(world, name, &[0x5a; 10_000], compression)?;
        harmless(world, name, "tar")?;
    }
    Ok(())
}

fn garbage_config(world: &mut World) -> Result<()> {
    let layout = world.directory("garbage-config")?;
    let tree = layout.join("tree");
    images::busybox_tree(&tree)?;
    let image = ImageBuilder::new(&layout)?
        .config("Env", json!({ "not": ["a", "list"] }))
        .layer_from_tree(&tree, Compression::Gzip)?
        .finish("latest")?;
    world.bed.hub.push(&image, "library/garbage-config:latest")?;
    harmless(world, "garbage-config", "config")
}

/// One entry of a ustar archive (POSIX.1-1988), padded to whole blocks.
fn entry(name: &str, kind: u8, link: &str, data: &[u8]) -> Vec<u8> {
    let mut header = vec![0; 512];
    let mut field = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
    field(0, name.as_bytes());
    field(100, b"0000755\0");
    field(108, b"0000000\0");
    field(116, b"0000000\0");
    field(124, format!("{:011o}\0", data.len()).as_bytes());
    field(136, b"00000000000\0");
    field(148, b"        ");
    field(156, &[kind]);
    field(157, link.as_bytes());
    field(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    header.extend_from_slice(data);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

/// A step with an image that may be refused or tamed, but touches nothing outside itself.
fn tamed(world: &mut World, name: &str, entries: &[Vec<u8>]) -> Result<()> {
    let outside = Path::new("/pyxis-escaped");
    let layer = [entries.concat(), vec![0; 1024]].concat();
    push(world, name, &layer, Compression::Gzip)?;
    world.srun(&["-w", "node1", &format!("--container-image={name}"), "true"])?;
    ensure!(!outside.exists(), "{name} wrote to {}", outside.display());
    for node in world.bed.cluster.nodes() {
        ensure!(!node.private("/var/lib/pyxis").join("pyxis-escaped").exists());
    }
    world.nodes_work()
}

fn paths_that_escape(world: &mut World) -> Result<()> {
    for (name, path) in [
        ("dotdot", "../../../../../../../../pyxis-escaped"),
        ("absolute", "/pyxis-escaped"),
        ("dotdot-inside", "usr/../../../../../../../../../pyxis-escaped"),
    ] {
        tamed(world, name, &[entry(path, b'0', "", b"escaped\n")])?;
        tamed(world, &format!("{name}-link"), &[entry("x", b'1', path, b""), entry("y", b'2', path, b"")])?;
    }
    Ok(())
}

fn paths_below(world: &mut World) -> Result<()> {
    let below_link = [entry("link", b'2', "/", b""), entry("link/pyxis-escaped", b'0', "", b"escaped\n")];
    tamed(world, "below-link", &below_link)?;
    let below_file = [entry("file", b'0', "", b"x"), entry("file/pyxis-escaped", b'0', "", b"escaped\n")];
    tamed(world, "below-file", &below_file)
}

/// A layer beyond the configured bound.
fn bomb(world: &mut World) -> Result<()> {
    let mut layer = entry("zeroes", b'0', "", b"");
    // 64 MiB in a few kilobytes.
    let size = 64 << 20;
    layer[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
    layer[148..156].copy_from_slice(b"        ");
    let sum: u32 = layer.iter().map(|&byte| u32::from(byte)).sum();
    layer[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    layer.resize(512 + size + 1024, 0);
    push(world, "bomb", &layer, Compression::Gzip)?;
    let bounded = world.configuration() + "[import]\nmax_layer_bytes = 33554432\n";
    world.bed.pyxis.configure(&bounded)?;
    let result = harmless(world, "bomb", "import.max_layer_bytes");
    world.bed.pyxis.configure(&world.configuration())?;
    result
}

/// What a container start creates, writes or mounts on, of which the image may make links.
const TOUCHED: [&str; 12] = [
    "etc",
    "etc/passwd",
    "etc/group",
    "etc/hosts",
    "etc/resolv.conf",
    "etc/localtime",
    "proc",
    "sys",
    "dev",
    "tmp",
    "var",
    "home",
];

/// Pushes a small system in which `change` was made.
fn push_tree(world: &mut World, name: &str, change: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let layout = world.directory(name)?;
    let tree = layout.join("tree");
    images::busybox_tree(&tree)?;
    change(&tree)?;
    let image = ImageBuilder::new(&layout)?
        .config("Env", json!([images::IMAGE_PATH]))
        .layer_from_tree(&tree, Compression::Gzip)?
        .finish("latest")?;
    fs::remove_dir_all(tree)?;
    world.bed.hub.push(&image, &format!("library/{name}:latest"))
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(kind) if kind.is_dir() => Ok(fs::remove_dir_all(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
        Err(_) => Ok(()),
    }
}

/// Links that lead out of the image, to a directory in which the user may write: nothing is written there.
fn hostile_links(world: &mut World) -> Result<()> {
    let outside = world.make_directory(0, "work/outside")?;
    let before = fs::read_dir(&outside)?.count();
    for (number, path) in TOUCHED.iter().enumerate() {
        for (kind, prefix) in [("absolute", ""), ("relative", "../../../../../.."), ("proc", "/proc/1/root")] {
            let name = format!("link{number}-{kind}");
            push_tree(world, &name, |tree| {
                let link = tree.join(path);
                remove(&link)?;
                Ok(std::os::unix::fs::symlink(format!("{prefix}{}", outside.display()), link)?)
            })?;
            let image = format!("--container-image={name}");
            // It may fail, and it may run: both inside.
            world.srun(&["-w", "node1", &image, "--container-remap-root", "--container-mount-home", "true"])?;
            ensure!(fs::read_dir(&outside)?.count() == before, "{name} wrote into {}", outside.display());
        }
    }
    world.nodes_work()
}

fn hostile_files(world: &mut World) -> Result<()> {
    for (number, path) in TOUCHED.iter().enumerate() {
        let name = format!("file{number}");
        push_tree(world, &name, |tree| {
            let place = tree.join(path);
            // A directory becomes a file, a file a directory.
            let file = !path.contains('/');
            remove(&place)?;
            let made =
                if file { fs::write(place, "in the way\n") } else { fs::create_dir_all(place.join("in/the/way")) };
            made.map_err(Into::into)
        })?;
        let output = world.srun(&["-w", "node1", &format!("--container-image={name}"), "true"])?;
        ensure!(output.status.success() || output.stderr.contains("pyxis: "), "{path}: {output}");
    }
    world.nodes_work()
}

fn hostile_config(world: &mut World) -> Result<()> {
    for (number, (field, value)) in [
        ("WorkingDir", json!("../../../../../../tmp")),
        ("WorkingDir", json!("/proc/1/root/tmp/pyxis-workdir")),
        ("Env", json!(["NOEQUALS", "=x", "A B=c", "LD_PRELOAD=/nowhere.so", "X=line\nbreak", "PATH=/bin"])),
        (
            "Volumes",
            json!({ "../../../tmp/pyxis-volume": {}, "relative": {}, "/": {}, "/proc": {}, "/etc/passwd": {} }),
        ),
        ("User", json!("root")),
    ]
    .into_iter()
    .enumerate()
    {
        let layout = world.directory(&format!("config{number}"))?;
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        let image = ImageBuilder::new(&layout)?
            .config(field, value)
            .layer_from_tree(&tree, Compression::Zstd)?
            .finish("latest")?;
        world.bed.hub.push(&image, &format!("library/config{number}:latest"))?;
        let output = world.srun(&["-w", "node1", &format!("--container-image=config{number}"), "/bin/id", "-u"])?;
        match output.status.success() {
            true => assert_eq!(output.stdout.trim(), world.user(0).uid.to_string(), "{field}"),
            false => ensure!(output.stderr.contains("pyxis: "), "{field}: {output}"),
        }
        for path in ["/tmp/pyxis-workdir", "/tmp/pyxis-volume"] {
            ensure!(!Path::new(path).exists(), "{field} made {path}");
        }
    }
    world.nodes_work()
}

/// No shell sees what a user typed.
fn nothing_is_evaluated(world: &mut World) -> Result<()> {
    let work = world.make_directory(0, "work/literal")?;
    let odd = "$(touch evaluated)`touch evaluated`\"'$HOME;%s\\040";
    fs::create_dir_all(work.join(odd))?;
    let options = [format!("--container-mounts=./{odd}:/{odd}"), format!("--container-env=ODD={odd}")];
    let chdir = format!("--chdir={}", work.display());
    let seen = world
        .sh(&[&chdir, &options[0], &options[1]], "echo \"$ODD\"; ls -d /*touch*; ls /evaluated 2>/dev/null; true")?;
    assert_eq!(seen, format!("{odd}\n/{odd}"));
    ensure!(!work.join("evaluated").exists());
    Ok(())
}
