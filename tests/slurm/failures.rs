//! What users read when an image cannot be had: in a step, to the letter, with what to do next.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};
use testbed::proxy::Behaviour;
use testbed::{image, images, process, wait};

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("no_such_image_or_tag", no_such_image),
    ("no_such_host", no_such_host),
    ("no_credentials_and_wrong_ones", credentials),
    ("too_many_requests", too_many_requests),
    ("another_platform", another_platform),
    ("no_space", no_space),
    ("read_only_store", read_only_store),
    ("a_disk_beyond_the_watermark", crowded),
];

/// What follows `[ERROR]` when a step in `image` is refused.
fn reason(world: &World, image: &str) -> Result<String> {
    let image = format!("--container-image={image}");
    let error = world.refused(&["-w", "node1", &image], "pyxis: failed to import docker image: ")?;
    let reasons: Vec<&str> =
        error.lines().filter_map(|line| line.split_once("[ERROR] ")).map(|(_, text)| text).collect();
    ensure!(reasons.len() == 1, "not one reason: {error}");
    Ok(reasons[0].to_owned())
}

fn no_such_image(world: &mut World) -> Result<()> {
    let hub = world.bed.hub.host();
    for (image, name) in
        [("no-such-image", "docker.io/library/no-such-image:latest"), ("alpine:none", "docker.io/library/alpine:none")]
    {
        let expected = format!(
            "mirror {hub}: image {name} not found: {hub} has no such repository, tag or digest: check name and tag"
        );
        let reason = reason(world, image)?;
        ensure!(reason.contains(expected.split_once(": ").map_or("", |(_, text)| text)), "{reason}");
    }
    let image = format!("{}/library/alpine:none", world.proxy.host());
    let host = world.proxy.host();
    assert_eq!(
        reason(world, &image)?,
        format!("image {image} not found: {host} has no such repository, tag or digest: check name and tag")
    );
    Ok(())
}

fn no_such_host(world: &mut World) -> Result<()> {
    let expected = "registry.invalid: there is no such host: check the image name, and the DNS settings of this node";
    assert_eq!(reason(world, "registry.invalid/image")?, expected);
    Ok(())
}

fn credentials(world: &mut World) -> Result<()> {
    let host = world.private.host();
    let image = format!("{host}/team/private:wrong");
    let home = world.user(0).home.clone();
    for directory in [".config/enroot", ".docker"] {
        let _ = fs::remove_dir_all(home.join(directory));
    }
    let home = home.display();
    assert_eq!(
        reason(world, &image)?,
        format!(
            "{host} requires credentials for team/private, or has no such repository: no credentials found for it; check \
             the name, or run \"pyxis login {host}\"; tried {home}/.config/enroot/.credentials, {home}/.docker/config.json \
             and {home}/.config/containers/auth.json"
        )
    );
    assert_eq!(
        reason(world, &format!("me@{image}"))?,
        format!(
            "no password of user me for {host} found: run \"pyxis login {host} --username=me\"; tried \
             {home}/.config/enroot/.credentials, {home}/.docker/config.json and {home}/.config/containers/auth.json"
        )
    );
    let file = world.make_directory(0, ".docker")?.join("config.json");
    // somebody:wrong
    fs::write(&file, format!("{{\"auths\": {{\"{host}\": {{\"auth\": \"c29tZWJvZHk6d3Jvbmc=\"}}}}}}"))?;
    world.user(0).own(&file)?;
    let refused = reason(world, &image);
    fs::remove_file(&file)?;
    assert_eq!(
        refused?,
        format!(
            "{host} refuses the password of user somebody (from {home}/.docker/config.json): renew it with \"pyxis login \
             {host}\""
        )
    );
    // The command that was named is one that helps.
    let mut login = world.as_user(0, "sh");
    let program = world.bed.pyxis.executable.display();
    let script = format!(
        "printf %s \"$0\" | {program} --config {} login --username=somebody --password-stdin {host}",
        world.bed.pyxis.config.display()
    );
    process::run(login.args(["-c", &script]).arg(&world.private.accounts()[0].password), wait::DEADLINE)?.success()?;
    let result = world.sh(&[&format!("--container-image={image}")], "id -un");
    fs::remove_file(&file)?;
    assert_eq!(result?, "pyxis-test-1");
    Ok(())
}

fn too_many_requests(world: &mut World) -> Result<()> {
    let host = world.proxy.host();
    let image = format!("{host}/library/{}", world.new_image(1000)?);
    world.proxy.set(Behaviour::Answer("429 Too Many Requests\r\nRetry-After: 3600"));
    let refused = reason(world, &image);
    world.proxy.set(Behaviour::Pass);
    let expected = "allows no more requests for now: try again in 3600 s, log in, or configure a mirror";
    assert_eq!(refused?, format!("{host} {expected}"));
    Ok(())
}

fn another_platform(world: &mut World) -> Result<()> {
    world.have("s390x", |layout| {
        let name = images::busybox(&layout)?;
        let mut manifest = image::manifest(&layout)?;
        manifest["platform"]["architecture"] = "s390x".into();
        image::index(&layout, &[manifest])?;
        Ok(name)
    })?;
    let host = world.proxy.host();
    let reason = reason(world, &format!("{host}/library/s390x"))?;
    ensure!(reason.starts_with(&format!("image {host}/library/s390x:latest: no image for linux/")), "{reason}");
    ensure!(reason.ends_with(": there is one for linux/s390x; choose another tag, or nodes of that kind"), "{reason}");
    Ok(())
}

/// A small ext4, mounted on node1 only, as the store of what `test` runs there.
fn with_small_store(world: &mut World, mebibytes: u64, test: impl FnOnce(&World, &Disk) -> Result<()>) -> Result<()> {
    let (image, place) = (world.bed.site.path("state/small.ext4"), world.bed.site.make_directory("state/small")?);
    fs::File::create(&image)?.set_len(mebibytes << 20)?;
    process::output_of(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&image))?;
    let disk = Disk { place: place.clone() };
    disk.run(world, "mount", &["-o", "loop", &image.display().to_string(), &place.display().to_string()])?;
    let store = format!("[store]\npath = \"{}\"\n", place.display());
    let usual = world.configuration();
    let result = world.bed.pyxis.configure(&format!("{usual}{store}")).and_then(|()| test(world, &disk));
    world.bed.pyxis.configure(&usual)?;
    disk.run(world, "umount", &[&place.display().to_string()])?;
    fs::remove_file(image)?;
    result
}

struct Disk {
    place: PathBuf,
}

impl Disk {
    fn run(&self, world: &World, program: &str, arguments: &[&str]) -> Result<()> {
        process::output_of(world.bed.cluster.nodes()[0].command(program).args(arguments)).map(drop)
    }
}

fn no_space(world: &mut World) -> Result<()> {
    let large = world.new_image(12 << 20)?;
    with_small_store(world, 16, |world, disk| {
        let before = reason(world, &large)?;
        let place = disk.place.display();
        let expected = format!("no space to import docker.io/library/{large}:latest: about ");
        ensure!(before.starts_with(&expected) && before.contains(&format!(" available in {place}, ")), "{before}");
        let advice = "and the rest is in use: free space there, or set store.path to a larger file system";
        ensure!(before.ends_with(advice), "{before}");
        let doctor = crate::pull::pyxis(world, &["doctor", &large])?;
        let line = doctor.stdout.lines().last().unwrap_or_default();
        ensure!(
            doctor.code() == 1 && line.starts_with("FAILED   space: ") && line.contains(&*place.to_string()),
            "{doctor}"
        );
        // What turns out on the way.
        let store = format!("[store]\npath = \"{place}\"\n[import]\nspace_factor = 0.1\n");
        world.bed.pyxis.configure(&(world.configuration() + &store))?;
        let during = reason(world, &large)?;
        ensure!(during.starts_with("layer sha256:") && during.contains(": No space left on device"), "{during}");
        let advice = ": make room in the layer store (pyxis gc), or give it a larger file system";
        ensure!(during.ends_with(advice), "{during}");
        Ok(())
    })?;
    world.nodes_work()
}

fn read_only_store(world: &mut World) -> Result<()> {
    let image = world.new_image(1000)?;
    with_small_store(world, 16, |world, disk| {
        let place = disk.place.display().to_string();
        // A step that fails has made the store.
        reason(world, "no-such-image")?;
        disk.run(world, "mount", &["-o", "remount,ro", &place])?;
        let reason = reason(world, &image)?;
        ensure!(reason.contains(&place) && reason.ends_with("the store must be writable to import images"), "{reason}");
        ensure!(reason.contains("Read-only file system"), "{reason}");
        Ok(())
    })?;
    world.nodes_work()
}

/// Images are gone as soon as they are not used: the log says why, and so do the administrator's commands.
fn crowded(world: &mut World) -> Result<()> {
    let usual = world.configuration();
    world.bed.pyxis.configure(&format!("{usual}[store]\nwatermarks = {{ high = \"1%\", low = \"0%\" }}\n"))?;
    let result = crowded_commands(world);
    world.bed.pyxis.configure(&usual)?;
    result
}

fn crowded_commands(world: &World) -> Result<()> {
    let line = "/var/lib/pyxis is beyond the high watermark (1%): images are removed as soon as no job uses them, and \
                imported again for the next one; free space there, or raise store.watermarks in pyxis.toml";
    let image = format!("--container-image={}", world.new_image(1000)?);
    let logged = || {
        let mut grep = Command::new("grep");
        Some(
            process::run(grep.args(["-rqF", line]).arg(world.bed.site.path("log")), wait::DEADLINE)
                .ok()?
                .status
                .success(),
        )
    };
    assert_eq!(world.sh(&["-w", "node1", &image], "id -un")?, "pyxis-test-1");
    wait::until("a line in slurmd's log", wait::DEADLINE, || logged().filter(|found| *found))?;
    let root = |arguments: &[&str]| {
        let mut command = world.bed.cluster.nodes()[0].command(&world.bed.pyxis.executable.display().to_string());
        process::run(command.arg("--config").arg(&world.bed.pyxis.config).args(arguments), wait::DEADLINE)
    };
    let pulled = root(&["pull", &world.new_image(1000)?])?.success()?;
    ensure!(pulled.stderr.contains(&format!("pyxis: the file system of {line}\n")), "{pulled}");
    let doctor = root(&["doctor"])?;
    ensure!(doctor.stdout.contains(&format!("warning  store: the file system of {line}")), "{doctor}");
    Ok(())
}
