//! Images that users have on the node: OCI layouts, archives, and what docker and podman hold. Made by other tools, opened
//! by nobody but their user.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use testbed::docker::Docker;
use testbed::{images, process};

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("layouts_and_archives", layouts_and_archives),
    ("several_images_in_one_file", several_images),
    ("docker", docker),
    ("podman", podman),
    ("a_file_that_is_no_image", no_image),
    ("an_archive_that_lies", lies),
    ("another_users_file", another_user),
];

/// A directory of user 0's, and in it the layout that the archives are made from. Only he may look into it.
fn files(world: &World) -> Result<PathBuf> {
    let directory = world.make_directory(0, "work/sources")?;
    if !directory.join("layout").exists() {
        images::busybox(&directory.join("layout"))?;
        fs::remove_dir_all(directory.join("layout/tree"))?;
    }
    own(world, &directory)?;
    Ok(directory)
}

fn own(world: &World, directory: &Path) -> Result<()> {
    let user = world.user(0);
    let owner = format!("{}:{}", user.uid, user.gid);
    process::output_of(Command::new("chown").args(["--recursive", "--no-dereference", &owner]).arg(directory))?;
    process::output_of(Command::new("chmod").args(["-R", "go="]).arg(directory)).map(drop)
}

/// `skopeo copy` as user 0. Archives are not written over.
fn skopeo(world: &World, directory: &Path, from: &str, to: &str) -> Result<()> {
    let _ = fs::remove_file(directory.join(to.split(':').nth(1).unwrap_or_default()));
    let mut command = world.as_user(0, "skopeo");
    command.args(["copy", "--quiet", "--insecure-policy", from, to]).current_dir(directory);
    process::output_of(&mut command).map(drop)
}

/// Runs in the image, from `directory`. Gives what the step said besides its output.
fn runs(world: &World, directory: &Path, image: &str, options: &[&str]) -> Result<String> {
    let chdir = format!("--chdir={}", directory.display());
    let image = format!("--container-image={image}");
    let arguments = [&[&*chdir, &*image], options, &["sh", "-c", ". /etc/os-release && echo $ID"]].concat();
    let output = world.srun(&arguments)?.success()?;
    ensure!(output.stdout == "busybox\n", "{output}");
    Ok(output.stderr)
}

fn layouts_and_archives(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    skopeo(world, &directory, "oci:layout:latest", "oci-archive:oci.tar:latest")?;
    skopeo(world, &directory, "oci:layout:latest", "docker-archive:docker.tar:testing:1")?;
    let compress = |from: &str, program: &str| {
        process::output_of(world.as_user(0, program).args(["-kf", from]).current_dir(&directory))
    };
    compress("docker.tar", "gzip")?;
    compress("oci.tar", "gzip")?;
    for image in [
        "./layout",
        "oci:./layout",
        "oci:./layout:latest",
        "./oci.tar",
        "oci-archive:oci.tar",
        "oci-archive:./oci.tar:latest",
        "./oci.tar.gz",
        "./docker.tar",
        "docker-archive:docker.tar",
        "docker-archive:docker.tar:testing:1",
        "docker-archive:docker.tar:docker.io/library/testing:1",
        "docker-archive:docker.tar:@0",
        "./docker.tar.gz",
        &directory.join("docker.tar").display().to_string(),
        &format!("oci:{}:latest", directory.join("layout").display()),
    ] {
        let said = runs(world, &directory, image, &[])?;
        ensure!(said.is_empty(), "{image}: {said}");
    }

    // What umoci makes: every node reads it for itself.
    let umoci = |arguments: &[&str]| {
        process::output_of(world.as_user(0, "umoci").args(arguments).current_dir(&directory)).map(drop)
    };
    let _ = fs::remove_dir_all(directory.join("umoci"));
    let _ = fs::remove_dir_all(directory.join("tree"));
    images::busybox_tree(&directory.join("tree"))?;
    own(world, &directory)?;
    umoci(&["init", "--layout", "umoci"])?;
    umoci(&["new", "--image", "umoci:mine"])?;
    umoci(&["insert", "--rootless", "--image", "umoci:mine", "tree", "/"])?;
    umoci(&["config", "--image", "umoci:mine", "--config.env", images::IMAGE_PATH])?;
    let chdir = format!("--chdir={}", directory.display());
    let output =
        world.srun(&["-N2", &chdir, "--container-image=oci:./umoci:mine", "cat", "/etc/os-release"])?.success()?;
    assert_eq!(output.stdout.matches("ID=busybox").count(), 2, "{output}");
    Ok(())
}

fn several_images(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    let _ = fs::remove_dir_all(directory.join("several"));
    for tag in ["one", "two"] {
        skopeo(world, &directory, "oci:layout:latest", &format!("oci:several:{tag}"))?;
    }
    runs(world, &directory, "oci:./several:two", &[])?;
    let image = |name: &str| format!("--container-image=oci:{}{name}", directory.join("several").display());
    world.refused(&[&image("")], "there are several images (one, two): say which one")?;
    world.refused(&[&image(":three")], "no image called \"three\": there is one, two")?;
    Ok(())
}

fn docker(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    skopeo(world, &directory, "oci:layout:latest", "docker-archive:docker.tar:testing:1")?;
    let engine = Docker::start(&world.bed.site, world.user(0))?;
    engine.load(&directory.join("docker.tar"))?;
    let host = format!("--export=ALL,DOCKER_HOST={}", engine.host());
    // The second time the engine has only been asked whether it is still the same image.
    for _ in 0..2 {
        let said = runs(world, &directory, "dockerd://testing:1", &[&host])?;
        let lines =
            "pyxis: importing docker image: dockerd://testing:1\npyxis: imported docker image: dockerd://testing:1\n";
        assert_eq!(said, lines);
    }
    // What is not there is pulled: not from this daemon, which has no network.
    let error = world.refused(
        &[&host, "--container-image=dockerd://no.such.registry.invalid/x:1"],
        "pyxis: failed to import docker image: dockerd://no.such.registry.invalid/x:1",
    )?;
    ensure!(error.contains("[ERROR] docker pull no.such.registry.invalid/x:1 failed: "), "{error}");
    // Another user has no access to the daemon.
    let image = "--container-image=dockerd://testing:1";
    let mut command = world.bed.cluster.command(1, "srun", [&*host, image, "true"]);
    let output = process::run(&mut command, testbed::wait::DEADLINE * 2)?;
    ensure!(!output.status.success() && output.stderr.contains("permission denied"), "{output}");
    drop(engine);
    let error = world.refused(&[&host, image], "pyxis: failed to import docker image: dockerd://testing:1")?;
    ensure!(error.contains("Cannot connect to the Docker daemon"), "{error}");
    Ok(())
}

fn podman(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    skopeo(world, &directory, "oci:layout:latest", "docker-archive:docker.tar:testing:1")?;
    // Rootless, on whatever file system the home directory is.
    let config = world.make_directory(0, ".config/containers")?;
    fs::write(
        config.join("storage.conf"),
        "[storage]\ndriver = \"vfs\"\n[storage.options.vfs]\nignore_chown_errors = \"true\"\n",
    )?;
    own(world, &config)?;
    // On the machine in a PID namespace of its own, with which ends what podman leaves running; on the node another place
    // for what it notes about that.
    let place = |name: &str| world.make_directory(0, &format!("work/{name}"));
    let (own_place, node_place) = (place("run")?, place("run-node")?);
    let podman = |arguments: &[&str]| {
        let as_user = world.as_user(0, "podman");
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command.arg(as_user.get_program()).args(as_user.get_args()).args(arguments).current_dir(&directory).env_clear();
        command.envs(as_user.get_envs().filter_map(|(name, value)| Some((name, value?))));
        process::output_of(command.env("XDG_RUNTIME_DIR", &own_place))
    };
    podman(&["load", "--quiet", "--input", "docker.tar"])?;
    let export = format!("--export=ALL,XDG_RUNTIME_DIR={}", node_place.display());
    for image in ["podman://testing:1", "podman://docker.io/library/testing:1"] {
        let said = runs(world, &directory, image, &[&export])?;
        assert_eq!(said, format!("pyxis: importing docker image: {image}\npyxis: imported docker image: {image}\n"));
    }
    let error = world.refused(
        &[&export, "--container-image=podman://localhost:1/none"],
        "failed to import docker image: podman://localhost:1/none",
    )?;
    ensure!(error.contains("[ERROR] podman pull localhost:1/none failed: "), "{error}");
    podman(&["system", "reset", "--force"]).map(drop)
}

fn no_image(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    fs::write(directory.join("text"), "some text\n")?;
    fs::create_dir_all(directory.join("empty"))?;
    own(world, &directory)?;
    let chdir = format!("--chdir={}", directory.display());
    for (image, reason) in [
        ("./none.tar", "No such file or directory: ./none.tar"),
        ("./", "No such file or directory: ./ (it is a directory"),
        ("./empty", "No such file or directory: ./empty (it is a directory"),
        ("/dev/urandom", "No such file or directory: /dev/urandom"),
        ("/dev/null", "No such file or directory: /dev/null"),
        ("/etc/shadow", "cannot open /etc/shadow: Permission denied"),
        ("./text", "Invalid image format: ./text"),
        ("oci:./text/x:latest", "No such file or directory: ./text/x"),
        ("docker-archive:text", "Invalid image format: text"),
    ] {
        let error = world.refused(
            &[&chdir, &format!("--container-image={image}")],
            &format!("pyxis: failed to create container filesystem for image: {image}\n"),
        )?;
        ensure!(error.contains(&format!("pyxis:     [ERROR] {reason}")), "{error}");
    }
    for (image, reason) in [
        ("dockerd://", "Invalid image reference: dockerd://"),
        ("dockerd://a@b", "Invalid image reference: dockerd://a@b"),
        ("oci-archive:", "Invalid image reference: oci-archive:"),
    ] {
        world.refused(&[&format!("--container-image={image}")], reason)?;
    }
    Ok(())
}

fn lies(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    skopeo(world, &directory, "oci:layout:latest", "oci-archive:oci.tar:latest")?;
    let good = fs::read(directory.join("oci.tar"))?;
    let chdir = format!("--chdir={}", directory.display());
    let refused = |name: &str, bytes: &[u8], reason: &str| {
        fs::write(directory.join(name), bytes)?;
        own(world, &directory)?;
        let error = world.refused(&[&chdir, &format!("--container-image=./{name}")], "[ERROR] ")?;
        ensure!(error.contains(reason) && error.matches("[ERROR]").count() == 1, "{name}: {error}");
        Ok(())
    };
    refused("cut.tar", &good[..good.len() / 2], "cut off")?;
    refused("empty.tar", &[0; 1024], "Invalid image format")?;
    let mut damaged = good.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 1;
    refused("damaged.tar", &damaged, "it was damaged on its way")?;
    // A layout whose blob is somebody else's file.
    process::output_of(Command::new("cp").args(["-r", "layout", "linked"]).current_dir(&directory))?;
    let blobs = fs::read_dir(directory.join("linked/blobs/sha256"))?.collect::<Result<Vec<_>, _>>()?;
    let largest = blobs.into_iter().max_by_key(|blob| blob.metadata().map_or(0, |data| data.len()));
    let largest = largest.map(|blob| blob.path()).unwrap_or_default();
    fs::remove_file(&largest)?;
    std::os::unix::fs::symlink("/etc/hostname", &largest)?;
    own(world, &directory)?;
    let error = world.refused(&[&chdir, "--container-image=./linked"], "[ERROR] ")?;
    ensure!(error.contains("leads out of the layout"), "{error}");
    fs::remove_dir_all(directory.join("linked"))?;
    world.nodes_work()
}

fn another_user(world: &mut World) -> Result<()> {
    let directory = files(world)?;
    skopeo(world, &directory, "oci:layout:latest", "oci-archive:oci.tar:latest")?;
    let image = format!("--container-image={}", directory.join("oci.tar").display());
    world.srun(&[&image, "true"])?.success()?;
    // What user 0 has shown is nothing to user 1.
    let mut command = world.bed.cluster.command(1, "srun", [&*image, "true"]);
    let output = process::run(&mut command, testbed::wait::DEADLINE * 2)?;
    ensure!(!output.status.success() && output.stderr.contains("Permission denied"), "{output}");
    Ok(())
}
