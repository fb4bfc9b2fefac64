//! `pyxis inspect` and `pyxis doctor IMAGE`, as an ordinary user types them.

use std::process::Command;

use serde_json::{Value, json};
use testbed::process::{self, Output};
use testbed::{image, images, wait};

use crate::world::World;

fn run(world: &World, arguments: &[&str]) -> Output {
    process::run(&mut world.pyxis(arguments), wait::DEADLINE).unwrap()
}

fn inspect(world: &World, image: &str) -> Value {
    serde_json::from_str(&run(world, &["inspect", "--json", image]).success().unwrap().stdout).unwrap()
}

#[test]
fn registry_layout_and_archive_hold_the_same_image() {
    let world = World::new("inspect");
    world.push_busybox();
    let name = format!("{}/busybox", world.registry.host());
    let found = inspect(&world, &name);
    let digest = world.registry.digest("busybox").unwrap();
    assert_eq!(found["form"], "registry");
    assert_eq!(found["image"], json!(format!("{name}:latest")));
    assert_eq!(found["origin"], json!(name));
    assert_eq!(found["digests"], json!([digest]));
    assert_eq!((&found["os"], found["layers"][0]["stored"].is_null()), (&json!("linux"), true));
    assert_eq!(found["root"][0], found["layers"][0]["diff_id"]);
    assert_eq!(found["config"]["env"], json!([images::IMAGE_PATH]));
    // Skopeo's idea of it.
    let mut judge = Command::new("skopeo");
    judge.args(["inspect", "--tls-verify=false", &world.registry.transport("busybox")]);
    let judged: Value = serde_json::from_str(&process::output_of(&mut judge).unwrap()).unwrap();
    assert_eq!(found["layers"][0]["blob"], judged["Layers"][0]);
    assert_eq!((&found["os"], &found["architecture"]), (&judged["Os"], &judged["Architecture"]));

    for (form, transport, path) in [
        ("layout", "oci:", "layout"),
        ("archive", "oci-archive:", "oci.tar"),
        ("archive", "docker-archive:", "docker.tar"),
    ] {
        let at = world.home.join(path);
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "--src-tls-verify=false", &world.registry.transport("busybox")]);
        process::output_of(copy.arg(format!("{transport}{}:busybox:latest", at.display()))).unwrap();
        process::output_of(Command::new("chmod").args(["-R", "a+rX"]).arg(&at)).unwrap();
        let local = inspect(&world, &at.display().to_string());
        assert_eq!(local["form"], form, "{path}");
        assert_eq!((&local["root"], &local["config"]), (&found["root"], &found["config"]), "{path}");
        assert_eq!(local["origin"], Value::Null);
    }
    let tree = world.site.path("tree");
    images::busybox_tree(&tree).unwrap();
    let file = world.home.join("x.sqsh");
    process::output_of(Command::new("mksquashfs").arg(&tree).arg(&file).args(["-quiet", "-no-progress"])).unwrap();
    let squashfs = inspect(&world, "./x.sqsh");
    assert_eq!((&squashfs["form"], &squashfs["config"]), (&json!("squashfs"), &Value::Null));
    assert_eq!(squashfs["bytes"], json!(file.metadata().unwrap().len()));

    let text = run(&world, &["inspect", &name]).success().unwrap().stdout;
    assert!(text.contains(&format!("digest      {digest}\n")) && text.contains("platform    linux/"), "{text}");
}

#[test]
fn what_cannot_be_inspected_is_one_line() {
    let world = World::new("inspect-errors");
    std::fs::write(world.home.join("text"), "no image").unwrap();
    let missing = format!("{}/no/such", world.registry.host());
    for (image, reason) in [
        (&*missing, "not found"),
        ("./missing", "No such file or directory: ./missing"),
        ("./text", "Invalid image format: ./text"),
        ("Not An Image", "Invalid image reference"),
    ] {
        let output = run(&world, &["inspect", image]);
        assert_eq!((output.code(), &*output.stdout), (1, ""), "{output}");
        assert!(output.stderr.lines().count() == 1 && output.stderr.contains(reason), "{output}");
    }
}

/// Name and status of every check.
fn doctor(world: &World, image: &str) -> (i32, Vec<(String, String)>, Vec<Value>) {
    let output = run(world, &["doctor", "--json", image]);
    let checks: Vec<Value> = serde_json::from_str(&output.stdout).unwrap_or_else(|_| panic!("{output}"));
    let text = |check: &Value, key: &str| check[key].as_str().unwrap().to_owned();
    let summary = checks.iter().map(|check| (text(check, "name"), text(check, "status"))).collect();
    (output.code(), summary, checks)
}

#[test]
fn the_doctor_says_which_step_fails() {
    let world = World::new("doctor-image");
    world.push_busybox();
    let host = world.registry.host();
    let failed = |image: &str| {
        let (code, summary, checks) = doctor(&world, image);
        let last = checks.last().unwrap().clone();
        let names: Vec<String> = summary.into_iter().map(|(name, _)| name).collect();
        assert_eq!((code, &last["status"]), (1, &json!("failed")), "{image}: {checks:?}");
        (names, last)
    };
    let (code, summary, checks) = doctor(&world, &format!("{host}/busybox"));
    assert_eq!(code, 0, "{checks:?}");
    let names: Vec<&str> = summary.iter().map(|(name, _)| &**name).collect();
    let expected = ["name", "policy", "registry", "DNS", "connection", "credentials", "manifest", "platform", "space"];
    assert_eq!(names, expected);
    // An ordinary user cannot look at the store.
    assert_eq!(summary.last().unwrap().1, "warning");

    assert_eq!(failed("Not An Image").0, ["name"]);
    let (names, last) = failed(&format!("{host}/no/such"));
    assert_eq!(names.last().unwrap(), "manifest");
    assert!(last["detail"].as_str().unwrap().contains("not found"), "{last}");
    let (names, last) = failed("no-such-host.invalid/x");
    assert_eq!(names.last().unwrap(), "DNS");
    assert!(last["remedy"].as_str().unwrap().contains("resolv.conf"), "{last}");
    let port = testbed::cluster::free_ports(1).unwrap()[0];
    let (names, last) = failed(&format!("localhost:{port}/x"));
    assert_eq!(names.last().unwrap(), "connection");
    assert!(last["detail"].as_str().unwrap().contains("connection refused"), "{last}");
    let layout = world.site.path("s390x");
    let name = images::busybox(&layout).unwrap();
    let mut manifest = image::manifest(&layout).unwrap();
    manifest["platform"]["architecture"] = "s390x".into();
    image::index(&layout, &[manifest]).unwrap();
    world.registry.push(&name, "s390x:latest").unwrap();
    let (names, last) = failed(&format!("{host}/s390x"));
    assert_eq!(names.last().unwrap(), "platform");
    assert!(last["detail"].as_str().unwrap().contains("there is one for linux/s390x"), "{last}");
    // A mirror that does not answer is told, and is no failure.
    let mirrors = format!("mirrors = [{{ location = \"localhost:{port}\", insecure = true }}]");
    let table = format!("[registry.\"{host}\"]\ninsecure = true\n{mirrors}\n");
    std::fs::write(world.home.join("pyxis.toml"), table).unwrap();
    let output = run(&world, &["--config", "pyxis.toml", "doctor", &format!("{host}/busybox")]);
    let mirror = format!("ok       mirror: localhost:{port}/busybox\n");
    let told = format!("warning  connection: localhost:{port}: connection refused");
    assert!(output.stdout.contains(&mirror) && output.stdout.contains(&told), "{output}");
    assert!(output.code() == 0 && output.stdout.contains(" manifest: "), "{output}");
}

#[test]
fn the_doctor_knows_credentials_and_certificates() {
    use testbed::registry::{Account, Registry, RegistryOptions};
    let account = Account { user: "somebody".into(), password: "secret".into() };
    let world = World::with_registry(
        "doctor-private",
        RegistryOptions { accounts: vec![account], ..RegistryOptions::default() },
    );
    let (code, summary, checks) = doctor(&world, &format!("{}/busybox", world.registry.host()));
    assert_eq!((code, &*summary.last().unwrap().0), (1, "credentials"), "{checks:?}");
    assert!(checks.last().unwrap()["remedy"].as_str().unwrap().contains("pyxis login"), "{checks:?}");
    let tls = Registry::start(&world.site, "tls", RegistryOptions { tls: true, ..RegistryOptions::default() }).unwrap();
    let mut command = world.pyxis(&["doctor", "--json", &format!("{}/busybox", tls.host())]);
    command.env_remove("ENROOT_ALLOW_HTTP");
    let output = process::run(&mut command, wait::DEADLINE).unwrap();
    let checks: Vec<Value> = serde_json::from_str(&output.stdout).unwrap();
    assert_eq!(checks.last().unwrap()["name"], "TLS", "{output}");
}

#[test]
fn the_doctor_follows_short_names() {
    let world = World::new("doctor-names");
    world.push_busybox();
    let host = world.registry.host();
    let tables = format!(
        "[short_names]\nsearch = [\"{host}/nothing\", \"{host}\"]\naliases = {{ tool = \"x.example.test/busybox\" }}\n\
         [registry.\"*.example.test\"]\nmirrors = [{{ location = \"{host}\", insecure = true }}]\n[registry.\"{host}\"]\ninsecure = true\n"
    );
    std::fs::write(world.home.join("pyxis.toml"), tables).unwrap();
    let doctor = |image: &str| {
        let output = run(&world, &["--config", "pyxis.toml", "doctor", image]);
        (output.code(), output.stdout + &output.stderr)
    };
    let (code, text) = doctor("tool");
    assert!(code == 0 && text.contains("short name: means x.example.test/busybox:latest here\n"), "{text}");
    let digest = world.registry.digest("busybox").unwrap();
    let found = format!("manifest: {digest} from {host}/busybox\n");
    assert!(text.contains(&found), "{text}");
    // The first place has no such image, and that is no failure.
    let (code, text) = doctor("busybox");
    let means = format!("short name: means {host}/nothing/busybox:latest, else {host}/busybox:latest here\n");
    assert!(code == 0 && text.contains(&means) && text.contains("warning  manifest: "), "{text}");
    assert!(text.contains(&found) && !text.contains("FAILED"), "{text}");
    let (code, text) = doctor("no-such-image");
    assert!(
        code == 1 && text.matches("FAILED").count() == 1 && text.matches("warning  manifest").count() == 1,
        "{text}"
    );
}
