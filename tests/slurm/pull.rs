//! `pyxis pull`, and what root sees with `inspect` and `doctor`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::proxy::Behaviour;
use testbed::registry::Account;
use testbed::{Output, Running, images, process, wait};

use crate::Case;
use crate::shape::shape;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("pull_fills_the_store", fills_the_store),
    ("pull_brings_several_images_at_once", at_once),
    ("pull_says_what_failed", says_what_failed),
    ("pull_is_for_root", for_root),
    ("pull_obeys_the_policy", policy),
    ("root_has_credentials_too", roots_own),
    ("names_mean_the_same_everywhere", names),
    ("what_programs_read", schemas),
];

/// Runs `pyxis ARGUMENTS` as root on node1.
pub fn pyxis(world: &World, arguments: &[&str]) -> Result<Output> {
    let program = world.bed.pyxis.executable.display().to_string();
    let mut command = world.bed.cluster.nodes()[0].command(&program);
    command.arg("--config").arg(&world.bed.pyxis.config).args(arguments);
    process::run(&mut command, wait::DEADLINE)
}

fn json(output: &Output) -> Result<Value> {
    Ok(serde_json::from_str(&output.stdout)?)
}

fn fills_the_store(world: &mut World) -> Result<()> {
    let usual = world.configuration();
    // However full the machine is: what nothing uses stays.
    let store = "[store]\nwatermarks = { high = \"100%\", low = \"99%\" }\n";
    world.bed.pyxis.configure(&format!("{usual}{store}"))?;
    let result = pull_and_look(world);
    world.bed.pyxis.configure(&usual)?;
    result
}

fn pull_and_look(world: &World) -> Result<()> {
    let images = [world.new_image(1 << 20)?, world.new_image(1 << 20)?, world.new_image(1 << 20)?];
    let names: Vec<&str> = images.iter().map(String::as_str).collect();
    let before = json(&pyxis(world, &["inspect", "--json", names[0]])?.success()?)?;
    assert_eq!(before["layers"][0]["stored"], json!(false));
    let pulled = pyxis(world, &[&["pull", "--json"], &names[..]].concat())?.success()?;
    let report = json(&pulled)?;
    for (at, name) in names.iter().enumerate() {
        let digest = world.bed.hub.digest(&format!("library/{name}"))?;
        assert_eq!((&report[at]["image"], &report[at]["digest"]), (&json!(name), &json!(digest)));
        assert_eq!((&report[at]["downloaded"], &report[at]["error"]), (&report[at]["layers"], &Value::Null));
        for line in ["importing", "imported"] {
            ensure!(pulled.stderr.contains(&format!("pyxis: {line} docker image: {name}\n")), "{pulled}");
        }
    }
    let after = json(&pyxis(world, &["inspect", "--json", names[0]])?.success()?)?;
    assert_eq!(after["layers"][0]["stored"], json!(true));
    // Nothing is left to download, for root and for a user, who is asked for all the same.
    for options in [&["pull", "--json"][..], &["pull", "--json", "--user", "pyxis-test-1"]] {
        let report = json(&pyxis(world, &[options, &names[..1]].concat())?.success()?)?;
        assert_eq!((&report[0]["downloaded"], &report[0]["bytes"]), (&json!(0), &json!(0)));
    }
    let image = format!("--container-image={}", names[1]);
    assert_eq!(world.sh(&["-w", "node1", &image], "wc -c </payload")?, (1 << 20).to_string());
    let checks = json(&pyxis(world, &["doctor", "--json", names[0]])?.success()?)?;
    let space = checks.as_array().and_then(|checks| checks.last().cloned()).unwrap_or_default();
    assert_eq!((&space["name"], &space["status"]), (&json!("space"), &json!("ok")));
    Ok(())
}

/// None of them waits for another one that gets nowhere.
fn at_once(world: &mut World) -> Result<()> {
    let host = world.proxy.host();
    let mut images = Vec::new();
    for _ in 0..2 {
        images.push(format!("{host}/library/{}", world.new_image(100_000)?));
    }
    let before = world.proxy.connections();
    world.proxy.set(Behaviour::StallAfter(0));
    let program = world.bed.pyxis.executable.display().to_string();
    let mut command = world.bed.cluster.nodes()[0].command(&program);
    command.arg("--config").arg(&world.bed.pyxis.config).arg("pull").args(&images);
    let running = Running::start(&mut command)?;
    let both = || (world.proxy.connections() >= before + 2).then_some(());
    let asked = wait::until("both images to be asked for", wait::DEADLINE, both);
    world.proxy.set(Behaviour::Pass);
    let output = running.wait(wait::DEADLINE)?.success()?;
    asked?;
    assert_eq!(output.stdout.lines().count(), 2, "{output}");
    Ok(())
}

fn says_what_failed(world: &mut World) -> Result<()> {
    let output = pyxis(world, &["pull", "--json", "no-such-image", "alpine", "--parallel=1"])?;
    assert_eq!(output.code(), 1);
    let report = json(&output)?;
    ensure!(report[0]["error"].as_str().is_some_and(|error| error.contains("not found")), "{output}");
    ensure!(report[1]["error"].is_null() && report[1]["digest"].is_string(), "{output}");
    ensure!(output.stderr.contains("pyxis: failed to import docker image: no-such-image: "), "{output}");
    // A user's credentials, not root's.
    let private = format!("{}/team/private:users", world.private.host());
    let output = pyxis(world, &["pull", "--user=pyxis-test-2", &private])?;
    ensure!(output.code() == 1 && output.stderr.contains("pyxis-test-2/"), "{output}");
    for image in ["./x.sqsh", "Not An Image"] {
        let output = pyxis(world, &["pull", image])?;
        ensure!(output.code() == 1 && output.stderr.lines().count() == 1, "{output}");
    }
    Ok(())
}

fn for_root(world: &mut World) -> Result<()> {
    let mut command = world.user(0).command(&world.bed.pyxis.executable);
    command.arg("--config").arg(&world.bed.pyxis.config).args(["pull", "alpine"]);
    let output = process::run(&mut command, wait::DEADLINE)?;
    ensure!(output.code() == 1 && output.stderr.lines().count() == 1, "{output}");
    ensure!(output.stderr.contains("which is root's") && output.stderr.contains("pyxis import"), "{output}");
    Ok(())
}

fn policy(world: &mut World) -> Result<()> {
    let usual = world.configuration();
    let rules = "[[policy]]\naction = \"deny\"\nrepository = [\"library/alpine\"]\nuser = [\"root\"]\n";
    world.bed.pyxis.configure(&format!("{usual}{rules}"))?;
    let pulled = pyxis(world, &["pull", "alpine"]);
    let others = pyxis(world, &["pull", "--user=pyxis-test-1", "alpine"]);
    let doctor = pyxis(world, &["doctor", "alpine"]);
    world.bed.pyxis.configure(&usual)?;
    let (pulled, doctor) = (pulled?, doctor?);
    let why = "image docker.io/library/alpine:latest is denied by rule 1 of this site's policy";
    ensure!(pulled.code() == 1 && pulled.stderr.contains(why), "{pulled}");
    ensure!(doctor.code() == 1 && doctor.stdout.contains(&format!("FAILED   policy: {why}; ")), "{doctor}");
    others?.success().map(drop)
}

/// `inspect` and `doctor` ask with the credentials of who types them: also root's, which the asking process cannot read.
fn roots_own(world: &mut World) -> Result<()> {
    let Account { user, password } = world.private.accounts()[0].clone();
    let (host, image) = (world.private.host(), format!("{}/team/private:root", world.private.host()));
    let directory = world.bed.site.make_directory("etc/root-docker")?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    let program = world.bed.pyxis.executable.display().to_string();
    let root = |arguments: &[&str]| {
        let mut command = world.bed.cluster.nodes()[0].command(&program);
        command.arg("--config").arg(&world.bed.pyxis.config).env("DOCKER_CONFIG", &directory).args(arguments);
        process::run(&mut command, wait::DEADLINE)
    };
    let without = root(&["inspect", "--json", &image])?;
    ensure!(without.code() == 1 && without.stderr.contains("no credentials found"), "{without}");
    let doctor = root(&["doctor", &image])?;
    ensure!(doctor.stdout.contains("FAILED   credentials: ") && doctor.stdout.contains("pyxis login"), "{doctor}");
    let config = directory.join("config.json");
    fs::write(&config, json!({"auths": {&host: {"username": user, "password": password}}}).to_string())?;
    fs::set_permissions(&config, fs::Permissions::from_mode(0o600))?;
    let inspected = json(&root(&["inspect", "--json", &image])?.success()?)?;
    assert_eq!(inspected["origin"], json!(format!("{host}/team/private")));
    let doctor = root(&["doctor", &image])?.success()?;
    ensure!(doctor.stdout.contains("ok       credentials: the registry accepts what it was given\n"), "{doctor}");
    Ok(())
}

/// Short names, `*.DOMAIN` and `HOST/PATH`: in a step, and for each command.
fn names(world: &mut World) -> Result<()> {
    let usual = world.configuration();
    let hub = world.bed.hub.host();
    let tables = format!(
        "[short_names]\nsearch = [\"{hub}/nothing\", \"reg.example.test/team\"]\n\
         aliases = {{ tool = \"x.example.test/library/alpine\" }}\n\
         [registry.\"*.example.test\"]\nmirrors = [{{ location = \"{hub}\", insecure = true }}]\n\
         [registry.\"reg.example.test/team\"]\nlocation = \"{hub}/elsewhere\"\ninsecure = true\n"
    );
    let image = images::busybox(&world.directory("elsewhere")?)?;
    world.bed.hub.push(&image, "elsewhere/searched:1")?;
    world.bed.pyxis.configure(&format!("{usual}{tables}"))?;
    let result = names_of(world, &hub);
    world.bed.pyxis.configure(&usual)?;
    result
}

fn names_of(world: &World, hub: &str) -> Result<()> {
    for (typed, full, repository) in [
        ("tool", "x.example.test/library/alpine:latest", "library/alpine"),
        ("y.example.test/library/alpine", "y.example.test/library/alpine:latest", "library/alpine"),
        ("reg.example.test/team/searched:1", "reg.example.test/team/searched:1", "elsewhere/searched"),
        // The first place has no such image.
        ("searched:1", "reg.example.test/team/searched:1", "elsewhere/searched"),
    ] {
        let origin = format!("{hub}/{repository}");
        let inspected = json(&pyxis(world, &["inspect", "--json", typed])?.success()?)?;
        assert_eq!((&inspected["image"], &inspected["origin"]), (&json!(full), &json!(origin)), "{typed}");
        let digest = inspected["digests"].as_array().and_then(|all| all.last()?.as_str().map(str::to_owned));
        let digest = digest.unwrap_or_default();
        let checks = json(&pyxis(world, &["doctor", "--json", typed])?.success()?)?;
        let found = json!(format!("{digest} from {origin}"));
        let checks = checks.as_array().cloned().unwrap_or_default();
        ensure!(checks.iter().any(|check| check["name"] == "manifest" && check["detail"] == found), "{checks:?}");
        let pulled = json(&pyxis(world, &["pull", "--json", typed])?.success()?)?;
        assert_eq!(pulled[0]["digest"], json!(digest), "{typed}");
        let option = format!("--container-image={typed}");
        for nodes in ["-N1", "-N2"] {
            let seen = world.sh(&[nodes, &option], "echo $PYXIS_IMAGE_DIGEST")?;
            ensure!(seen.lines().all(|line| line == digest), "{typed}: {seen}");
        }
    }
    Ok(())
}

fn schemas(world: &mut World) -> Result<()> {
    let output = pyxis(world, &["pull", "--json", "alpine", "no-such-image"])?;
    let outcome = |digest: &str, error: &str| {
        format!(
            "{{image: string, digest: {digest}, layers: number, downloaded: number, bytes: number, error: {error}}}"
        )
    };
    assert_eq!(shape(&output.stdout), format!("[{} | {}]", outcome("string", "null"), outcome("null", "string")));
    let output = pyxis(world, &["gc", "--json", "--dry-run"])?.success()?;
    let fields = "freed_bytes: number, kept_layers: number, kept_bytes: number, in_use_layers: number, \
                  removed_records: number, problems: []}";
    let shape_of_gc = shape(&output.stdout);
    let removed = ["{removed: [], ", "{removed: [string], "].map(|start| format!("{start}{fields}"));
    ensure!(removed.contains(&shape_of_gc), "{shape_of_gc}");
    let output = pyxis(world, &["inspect", "--json", "alpine"])?.success()?;
    ensure!(shape(&output.stdout).contains("layers: [{blob: string, diff_id: string, bytes: number, stored: bool}]"));
    let output = pyxis(world, &["pull", "--json", "--user", "no-such-user", "alpine"])?;
    assert_eq!((output.code(), shape(&output.stdout)), (1, "{error: string}".into()));
    Ok(())
}
