//! What packaging/slinky says: the images can be built, and the values fit them and each other.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use testbed::{Site, images};

use crate::{NEW, PACKAGES, run};

const SLINKY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/slinky");

fn read(name: &str) -> String {
    fs::read_to_string(Path::new(SLINKY).join(name)).unwrap()
}

fn yaml(name: &str) -> Value {
    serde_saphyr::from_str(&read(name)).unwrap()
}

/// A checkout in which `make packages` has been run, as far as an image build looks at it.
fn context(site: &Site) -> PathBuf {
    let context = site.make_directory("state/context").unwrap();
    let packages = site.make_directory("state/context/target/packages").unwrap();
    fs::copy(PACKAGES.deb(NEW), packages.join(PACKAGES.deb(NEW).file_name().unwrap())).unwrap();
    let mut copy = Command::new("cp");
    copy.args(["--recursive", "--parents", "packaging/slinky"]).arg(&context).current_dir(env!("CARGO_MANIFEST_DIR"));
    run(&mut copy);
    context
}

/// The only layer of the Debian image: by far its largest blob.
fn debian() -> PathBuf {
    let layout = images::debian().unwrap();
    let layout = layout.trim_start_matches("oci:").trim_end_matches(":latest");
    let blobs = fs::read_dir(Path::new(layout).join("blobs/sha256")).unwrap().map(|entry| entry.unwrap());
    blobs.max_by_key(|blob| blob.metadata().unwrap().len()).unwrap().path()
}

/// On a Debian in the place of the operator's images, without a network.
#[test]
fn the_images_can_be_built() {
    let site = Site::create(&format!("slinky-{}", std::process::id())).unwrap();
    let context = context(&site);
    let podman = |arguments: &[&str]| {
        // What it mounts in its storage is gone when it ends.
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--", "podman", "--root"])
            .arg(site.path("state/podman"))
            .args(["--runtime=runc", "--cgroup-manager=cgroupfs"]);
        run(command.args(arguments).current_dir(&context))
    };
    let imported = podman(&["import", "--quiet", &debian().display().to_string()]);
    let base = imported.trim();
    let limits = ["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000"];
    for target in ["slurmd-pyxis", "login-pyxis"] {
        let bases = ["SLURMD_BASE", "LOGIN_BASE"].map(|name| format!("--build-arg={name}={base}"));
        let mut arguments =
            vec!["build", "--quiet", "--pull=never", "--network=none", "--file=packaging/slinky/Containerfile"];
        arguments.extend(bases.iter().map(String::as_str).chain(limits));
        arguments.extend(["--target", target, "."]);
        let image = podman(&arguments);
        let script =
            "cat /usr/share/pyxis/*; stat -c %U:%a /var/lib/pyxis; getent passwd pyxis | cut -d: -f1; enroot version";
        let mut arguments = vec!["run", "--rm", "--network=none", "--log-driver=none"];
        arguments.extend(limits.into_iter().chain([image.trim(), "sh", "-c", script]));
        let said = podman(&arguments);
        let lines: Vec<_> = said.lines().filter(|line| !line.starts_with('#')).collect();
        assert!(lines[0].starts_with("required /usr/lib/spank-pyxis/spank_pyxis.so"), "{said}");
        assert_eq!(lines[1..3], ["root:711", "pyxis"], "{said}");
    }
}

/// The value of a variable in the bake file or an argument in the Containerfile.
fn default<'a>(text: &'a str, name: &str) -> &'a str {
    let at = text.find(name).unwrap();
    text[at..]
        .split(['"', '=', '\n'])
        .map(str::trim)
        .find(|part| part.contains("26.") || part.contains("ubuntu"))
        .unwrap()
}

#[test]
fn values_fit_the_images_and_each_other() {
    let values = yaml("values.yaml");
    // Without the glob slurmctld would not start.
    assert_eq!(values["configFiles"]["plugstack.conf"], "include /usr/share/pyxis/*\n");
    let bake = read("docker-bake.hcl");
    let tag = format!("{}-{}", default(&bake, "SLURM_VERSION"), default(&bake, "\"FLAVOR\""));
    let containerfile = read("Containerfile");
    for (image, argument, name) in [
        (&values["loginsets"]["slinky"]["login"], "LOGIN_BASE", "login-pyxis"),
        (&values["nodesets"]["slinky"]["slurmd"], "SLURMD_BASE", "slurmd-pyxis"),
    ] {
        assert_eq!(image["image"]["tag"], tag.as_str());
        assert!(image["image"]["repository"].as_str().unwrap().ends_with(name));
        assert!(
            containerfile.contains(&format!(":{tag}\n"))
                && containerfile.contains(&format!("FROM ${{{argument}}} AS {name}\n"))
        );
        assert!(bake.contains(&format!("\"{name}\"")));
    }
    // No privilege is asked for.
    assert!(!read("values.yaml").contains("privileged"));
    let nodes = &values["nodesets"]["slinky"];
    let names = |list: &Value| -> Vec<String> {
        list.as_array().unwrap().iter().map(|entry| entry["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&nodes["slurmd"]["volumeMounts"]), names(&nodes["podSpec"]["volumes"]));
    let config = yaml("config.yaml");
    assert_eq!(nodes["podSpec"]["volumes"][1]["configMap"]["name"], config["metadata"]["name"]);
    // What it mounts is a configuration.
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), config["data"]["pyxis.toml"].as_str().unwrap()).unwrap();
    spank_pyxis::config::Config::load(file.path()).unwrap();
}
