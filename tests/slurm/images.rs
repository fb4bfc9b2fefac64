//! Images: how they are named, and what becomes of everything a layer can hold.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::image::{self, Compression, ImageBuilder};
use testbed::{images, process, wait};

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("names_of_docker_hub", names),
    ("names_of_a_registry", registry_names),
    ("digests", digests),
    ("pull_policy_and_digest", pull_policy),
    ("index_with_platforms", index),
    ("everything_in_a_layer", everything_in_a_layer),
    ("distroless", distroless),
    ("image_without_layers_of_its_own", many_layers),
];

fn distribution(world: &World, image: &str) -> Result<String> {
    world.sh(&[&format!("--container-image={image}")], ". /etc/os-release && echo $ID")
}

fn names(world: &mut World) -> Result<()> {
    for name in [
        "alpine",
        "alpine:latest",
        "docker.io/alpine",
        "docker.io#alpine",
        "docker.io/library/alpine",
        "library/alpine",
    ] {
        assert_eq!(distribution(world, name)?, "busybox", "{name}");
    }
    let output = world.srun(&["--container-image=docker://alpine:latest", "true"])?.success()?;
    ensure!(output.stderr.contains("pyxis: importing docker image: docker://alpine:latest\n"), "{output}");
    Ok(())
}

fn registry_names(world: &mut World) -> Result<()> {
    let host = world.bed.hub.host();
    for separator in ["/", "#"] {
        assert_eq!(distribution(world, &format!("{host}{separator}library/alpine:latest"))?, "busybox");
    }
    Ok(())
}

fn digests(world: &mut World) -> Result<()> {
    let digest = world.bed.hub.digest("library/alpine")?;
    assert_eq!(distribution(world, &format!("alpine@{digest}"))?, "busybox");
    // The digest counts, not the tag.
    assert_eq!(distribution(world, &format!("alpine:no-such-tag@{digest}"))?, "busybox");
    Ok(())
}

/// Which image it is stands in the environment, and when a tag that has moved is looked at again is up to the user.
fn pull_policy(world: &mut World) -> Result<()> {
    let name = world.new_image(1000)?;
    let hub = &world.bed.hub;
    let digest = || hub.digest(&format!("library/{name}"));
    let run = |options: &[&str]| {
        let image = format!("--container-image={name}");
        world.sh(&[&[&*image], options].concat(), "echo $PYXIS_IMAGE_DIGEST")
    };
    let old = digest()?;
    assert_eq!(run(&["-N2"])?, format!("{old}\n{old}"));
    let other = world.new_image(1001)?;
    hub.push(&hub.transport(&format!("library/{other}")), &format!("library/{name}"))?;
    let new = digest()?;
    ensure!(old != new, "the tag has not moved");
    for policy in ["never", "missing", "recent"] {
        assert_eq!(run(&["-N1", &format!("--container-pull={policy}")])?, old, "{policy}");
    }
    assert_eq!(run(&["-N2", "--container-pull=always"])?, format!("{new}\n{new}"));
    assert_eq!(run(&["-N1"])?, new);
    let absent = format!("--container-image={}", world.new_image(1002)?);
    let error = world.refused(&[&absent, "--container-pull=never"], "pyxis: failed to import docker image: ")?;
    let never = "the registry is not to be asked (--container-pull=never), and ";
    ensure!(error.contains(never), "{error}");
    // By the environment, and by the configuration, which an option overrules.
    let mut variable = world.bed.cluster.command(0, "srun", [&absent, "true"]);
    let output = process::run(variable.env("PYXIS_CONTAINER_PULL", "never"), wait::DEADLINE)?;
    ensure!(!output.status.success() && output.stderr.contains(never), "{output}");
    world.bed.pyxis.configure(&(world.configuration() + "[store]\npull = \"never\"\n"))?;
    let (refused, asked) =
        (world.refused(&[&absent], never), world.srun(&[&absent, "--container-pull=recent", "true"]));
    world.bed.pyxis.configure(&world.configuration())?;
    refused?;
    asked?.success().map(drop)
}

/// An index with this platform among others: the right one is chosen, also when it is not the first.
fn index(world: &mut World) -> Result<()> {
    have_index(world)?;
    assert_eq!(world.sh(&["--container-image=index"], "cat /platform")?, "this one");
    Ok(())
}

/// Docker Hub, as the nodes see it, has `library/index`.
pub fn have_index(world: &mut World) -> Result<()> {
    world.have("index", |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        fs::write(tree.join("platform"), "this one\n")?;
        let mine = ImageBuilder::new(&layout)?
            .config("Env", json!([images::IMAGE_PATH]))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")?;
        fs::write(tree.join("platform"), "another\n")?;
        let other_layout = layout.join("other");
        ImageBuilder::new(&other_layout)?.layer_from_tree(&tree, Compression::Gzip)?.finish("latest")?;
        let (mut other, mut own) = (image::manifest(&other_layout)?, image::manifest(&layout)?);
        for blob in fs::read_dir(other_layout.join("blobs/sha256"))? {
            let blob = blob?;
            fs::rename(blob.path(), layout.join("blobs/sha256").join(blob.file_name()))?;
        }
        for (descriptor, architecture) in [(&mut other, "s390x"), (&mut own, image::architecture())] {
            descriptor["platform"] = json!({ "os": "linux", "architecture": architecture });
            descriptor["annotations"] = json!({});
        }
        image::index(&layout, &[other, own])?;
        Ok(mine)
    })
}

/// Entries of the largest directory.
const ENTRIES: usize = 5_000;

/// An image with everything a layer can hold.
pub fn have_features(world: &mut World) -> Result<()> {
    let compressions = [Compression::Gzip, Compression::Zstd, Compression::None];
    world.have("features", |directory| {
        let trees = images::feature_trees(&directory.join("trees"), ENTRIES)?;
        // For umoci, who knows no zstd.
        images::features(&directory.join("judged"), &trees, [Compression::Gzip; 3])?;
        images::features(&directory.join("layout"), &trees, compressions)
    })
}

/// The container's files against umoci's idea of the same image, compared by GNU tar.
fn everything_in_a_layer(world: &mut World) -> Result<()> {
    have_features(world)?;
    let directory = world.directory("features")?;
    let bundle = directory.join("bundle");
    let mut unpack = Command::new("umoci");
    unpack.args(["unpack", "--image", &format!("{}:latest", directory.join("judged").display())]).arg(&bundle);
    process::output_of(&mut unpack)?;
    let rootfs = bundle.join("rootfs");

    // What the container itself mounts or writes is left out.
    let own = ["dev", "etc", "proc", "sys", "tmp", "var", "root", "home", "run", "mnt"];
    let mut parts: Vec<String> = fs::read_dir(&rootfs)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !own.contains(&name.as_str()))
        .collect();
    parts.sort();
    let work = world.make_directory(0, "work/features")?;
    // Nothing more and nothing less at the top, and everything below it in an archive.
    let script = format!(
        "cd / && ls -1A | grep -vE '^({})$' | wc -l && tar -cf /out/archive {}",
        own.join("|"),
        parts.iter().map(|name| format!("'./{name}'")).collect::<Vec<_>>().join(" ")
    );
    let mount = format!("--container-mounts={}:/out", work.display());
    let options = ["--container-image=features", "--container-remap-root", "--container-writable", &mount];
    // `/out` is one more.
    assert_eq!(world.sh(&options, &script)?, (parts.len() + 1).to_string());

    let archive = work.join("archive");
    let listing = process::output_of(Command::new("tar").arg("-tf").arg(&archive))?;
    let mut find = Command::new("find");
    let expected = process::output_of(find.args(&parts).args(["-printf", "./%p%y\\n"]).current_dir(&rootfs))?;
    // Directories end in a slash; line breaks in names are shown as tar shows them.
    let expected: BTreeSet<_> = expected
        .replace(",\tand\nmore", ",\\tand\\nmore")
        .lines()
        .map(|line| line.strip_suffix('d').map_or_else(|| line[..line.len() - 1].into(), |name| format!("{name}/")))
        .collect();
    let listed: BTreeSet<String> = listing.lines().map(str::to_owned).collect();
    // The host's time zone is the container's, too.
    let zone = |name: &&String| name.starts_with("./usr/share/");
    let differing: Vec<_> = listed.symmetric_difference(&expected).filter(|name| !zone(name)).collect();
    ensure!(differing.is_empty(), "in one of the two only: {differing:?}");
    let mut compare = Command::new("tar");
    compare.args(["--compare", "--numeric-owner", "--exclude=./usr/share", "-f"]).arg(&archive).current_dir(&rootfs);
    let output = process::run(&mut compare, wait::DEADLINE)?;
    // Files belong to the user, who can read all of them.
    let intended =
        ["./owned: Uid differs", "./owned: Gid differs", "./no-mode: Mode differs", "./write-only: Mode differs"];
    let differences: Vec<_> = output.stdout.lines().filter(|line| !intended.contains(line)).collect();
    ensure!(differences.is_empty(), "{}\n{}", differences.join("\n"), output.stderr);
    fs::remove_file(archive)?;
    assert_eq!(
        world.sh(&["--container-image=features"], "stat -c %a /no-mode /write-only /setuid; cat /no-mode")?,
        "400\n600\n4755\nmode"
    );
    Ok(())
}

/// One static binary: no shell, no `/etc`, no `/proc` to mount on.
fn distroless(world: &mut World) -> Result<()> {
    world.have("distroless", |layout| images::distroless(&layout))?;
    let image = "--container-image=distroless";
    let output = world.srun(&[image, "/busybox", "id", "-u"])?.success()?;
    assert_eq!(output.stdout.trim(), world.user(0).uid.to_string());
    let output = world.srun(&[image, "--container-remap-root", "-n2", "-N1", "/busybox", "id", "-un"])?.success()?;
    assert_eq!(output.stdout, "root\nroot\n");
    let output = world.srun(&[image, "/busybox", "ls", "/"])?.success()?;
    ensure!(!output.stdout.contains("bin"), "{output}");
    let output = world.srun(&[image, "sh", "-c", "true"])?;
    ensure!(!output.status.success() && output.stderr.contains("No such file or directory"), "{output}");
    Ok(())
}

/// More layers than there are workers, each with a file of its own and a change to a common one.
fn many_layers(world: &mut World) -> Result<()> {
    const LAYERS: usize = 40;
    world.have("layers", |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        let mut image = ImageBuilder::new(&layout)?.layer_from_tree(&tree, Compression::Zstd)?;
        for number in 0..LAYERS {
            let tree = layout.join(format!("tree{number}"));
            fs::create_dir_all(tree.join("layers"))?;
            fs::write(tree.join(format!("layers/{number}")), "")?;
            fs::write(tree.join("layers/last"), format!("{number}\n"))?;
            let how = [Compression::None, Compression::Gzip, Compression::Zstd][number % 3];
            image = image.layer_from_tree(&tree, how)?;
        }
        image.finish("latest")
    })?;
    let seen = world.sh(&["--container-image=layers"], "cat /layers/last; ls /layers | wc -l")?;
    assert_eq!(seen, format!("{}\n{}", LAYERS - 1, LAYERS + 1));
    Ok(())
}
