//! What commands say in JSON: programs depend on each field, on its type, and on where errors are. `pull` and `gc`, which are
//! root's, are in `tests/slurm/pull.rs`.

use std::process::Stdio;

use testbed::process::{self, Output};
use testbed::registry::{Account, RegistryOptions};
use testbed::{images, wait};

use crate::shape::shape;
use crate::world::World;

fn run(world: &World, arguments: &[&str]) -> Output {
    process::run(&mut world.pyxis(arguments), wait::DEADLINE).unwrap()
}

const CONFIG: &str =
    "{user: string, env: [string], entrypoint: [], cmd: [string], working_dir: string, volumes: [], labels: {}}";

fn inspection(origin: &str, digests: &str, layers: &str, config: &str) -> String {
    let root = if layers == "[]" { "[]" } else { "[string]" };
    format!(
        "{{image: string, form: string, origin: {origin}, digests: {digests}, os: string, architecture: string, \
         bytes: number, layers: {layers}, root: {root}, config: {config}, warnings: []}}"
    )
}

#[test]
fn inspect() {
    let world = World::new("json-inspect");
    world.push_busybox();
    let layers = "[{blob: string, diff_id: string, bytes: number, stored: null}]";
    let name = format!("{}/busybox", world.registry.host());
    let output = run(&world, &["inspect", "--json", &name]).success().unwrap();
    assert_eq!(shape(&output.stdout), inspection("string", "[string]", layers, CONFIG));
    let tree = world.site.path("tree");
    images::busybox_tree(&tree).unwrap();
    let file = world.home.join("x.sqsh");
    let mut squash = std::process::Command::new("mksquashfs");
    process::output_of(squash.arg(&tree).arg(&file).args(["-quiet", "-no-progress"])).unwrap();
    let output = run(&world, &["inspect", "--json", "./x.sqsh"]).success().unwrap();
    assert_eq!(shape(&output.stdout), inspection("null", "[]", "[]", "null"));
}

#[test]
fn doctor_and_devices() {
    let world = World::new("json-doctor");
    let checks = "[{name: string, status: string, detail: string, remedy: string}]";
    for arguments in [&["doctor", "--json"][..], &["doctor", "--json", "no-such-host.invalid/x"]] {
        assert_eq!(shape(&run(&world, arguments).stdout), checks, "{arguments:?}");
    }
    let output = run(&world, &["devices", "--json"]).success().unwrap();
    let shape = shape(&output.stdout);
    for (name, field) in [
        ("node", "{node: {nvidia_driver: "),
        ("gpus", ", gpus: ["),
        ("infiniband", "], infiniband: ["),
        ("cdi_directories", "], cdi_directories: [string], cdi_devices: ["),
        ("cdi_problems", "], cdi_problems: ["),
        ("container", "]}, container: {image: null, variables: ["),
        ("reasons", "], reasons: ["),
        ("library_directory", "], library_directory: string, error: null, device_nodes: ["),
    ] {
        assert!(shape.contains(field), "{name}: {shape}");
    }
    let end = ["hidden", "libraries", "mounts", "files", "links", "env", "hooks", "notices", "log"];
    let mut rest = shape.split_once("device_nodes: ").unwrap().1;
    for name in end {
        rest = rest.split_once(&format!("], {name}: [")).unwrap_or_else(|| panic!("{name}: {shape}")).1;
    }
    assert!(rest.ends_with("]}}"), "{shape}");
}

#[test]
fn login_and_logout() {
    let accounts = vec![Account { user: "somebody".into(), password: "secret".into() }];
    let world = World::with_registry("json-login", RegistryOptions { accounts, ..RegistryOptions::default() });
    let host = world.registry.host();
    let mut login = world.pyxis(&["login", "--json", "-u", "somebody", "--password-stdin", &host]);
    let mut child = login.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), b"secret").unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert_eq!(shape(&text), "{registry: string, user: string, checked: bool, kept_in: string}");
    let output = run(&world, &["logout", "--json", &host]).success().unwrap();
    assert_eq!(shape(&output.stdout), "{registry: string, removed: bool, kept_in: string}");
}

/// What a command cannot do it says in JSON as well as in words.
#[test]
fn errors() {
    let world = World::new("json-errors");
    std::fs::write(world.home.join("bad.toml"), "nonsense = 1").unwrap();
    let bad = ["--config", "bad.toml"];
    for arguments in [
        &["inspect", "--json", "Not An Image"][..],
        &["inspect", "--json", "./missing"],
        &["pull", "--json", "alpine"],
        &["gc", "--json"],
        &["login", "--json", "--password-stdin", "x.io"],
        &["logout", "--json", "a/b"],
        &[bad[0], bad[1], "inspect", "--json", "alpine"],
        &[bad[0], bad[1], "doctor", "--json", "alpine"],
        &[bad[0], bad[1], "devices", "--json"],
    ] {
        let output = run(&world, arguments);
        assert_eq!((output.code(), shape(&output.stdout)), (1, "{error: string}".into()), "{arguments:?}: {output}");
        let said: serde_json::Value = serde_json::from_str(&output.stdout).unwrap();
        let line = format!("pyxis: {}\n", said["error"].as_str().unwrap());
        assert_eq!(output.stderr, line, "{arguments:?}");
    }
}
