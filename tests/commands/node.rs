//! `pyxis doctor --node`: what breaks a node is seen, one thing at a time, and weighed rightly. Each test has a node of its
//! own, in a mount namespace in which parts of the host may be replaced.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use spank_pyxis::store::Store;
use tempfile::TempDir;
use testbed::install::Build;

const HEALTHY: i32 = 0;
const DEGRADED: i32 = 3;
const UNUSABLE: i32 = 4;

struct Node {
    directory: TempDir,
    /// What a shell does before the check, in a mount namespace that goes with it.
    before: String,
    /// Lines of the configuration.
    config: String,
}

/// What was found, by the name of the check: the status and the whole check.
type Found = BTreeMap<String, (String, Value)>;

impl Node {
    fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount file systems: run them as root");
        let directory = tempfile::Builder::new().prefix("pyxis-node-").tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let build = Build::of(env!("CARGO_BIN_EXE_pyxis"));
        let path = |name: &str| directory.path().join(name);
        for (from, to, mode) in [(&build.executable, "pyxis", 0o755), (&build.plugin, "spank_pyxis.so", 0o644)] {
            fs::copy(from, path(to)).unwrap();
            fs::set_permissions(path(to), fs::Permissions::from_mode(mode)).unwrap();
        }
        Store::open(&path("store")).unwrap();
        fs::create_dir(path("containers")).unwrap();
        fs::create_dir(path("run")).unwrap();
        fs::create_dir(path("cdi")).unwrap();
        fs::write(path("slurm.conf"), "ClusterName=x\n").unwrap();
        fs::write(path("plugstack.conf"), format!("include {}/plugstack.d/*\n", directory.path().display())).unwrap();
        fs::create_dir(path("plugstack.d")).unwrap();
        let root = directory.path().display();
        let line = format!("required {root}/spank_pyxis.so executable={root}/pyxis config={root}/pyxis.toml\n");
        fs::write(path("plugstack.d/pyxis.conf"), line).unwrap();
        let config = format!(
            "store.path = \"{root}/store\"\nruntime.path = \"{root}/run\"\ncontainer.path = \"{root}/containers\"\n\
             devices.cdi_directories = [\"{root}/cdi\"]\nimport.user = \"daemon\"\n"
        );
        Self { directory, before: String::new(), config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn command(&self, program: &[&str]) -> Command {
        let config = self.path("pyxis.toml");
        if !config.exists() {
            fs::write(&config, &self.config).unwrap();
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]).arg(format!("set -e; {}\nexec \"$@\"", self.before)).arg("sh");
        command.args(program).arg(self.path("pyxis")).arg("--config").arg(config).args(["doctor", "--node"]);
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("SLURM_CONF", self.path("slurm.conf"));
        command.current_dir("/");
        command
    }

    /// The exit status and what was found, by root.
    fn check(&self) -> (i32, Found) {
        self.check_through(&[])
    }

    fn check_through(&self, program: &[&str]) -> (i32, Found) {
        let output = self.command(program).arg("--json").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let report: Value = serde_json::from_str(&text)
            .unwrap_or_else(|_| panic!("{}{text}{}", output.status, String::from_utf8_lossy(&output.stderr)));
        let found = report["checks"].as_array().unwrap().iter().map(|check| {
            let word = |key: &str| check[key].as_str().unwrap().to_owned();
            (word("name"), (word("status"), check.clone()))
        });
        let code = output.status.code().unwrap();
        let word = match code {
            HEALTHY => "healthy",
            DEGRADED => "degraded",
            UNUSABLE => "unusable",
            other => panic!("exit status {other}: {report}"),
        };
        assert_eq!(report["health"], word, "{report}");
        (code, found.collect())
    }

    /// Only `name` is wrong, with a text that contains `text`.
    #[track_caller]
    fn has_one_problem(&self, code: i32, name: &str, text: &str) {
        let (found_code, found) = self.check();
        let wrong: Vec<&String> = found
            .iter()
            .filter(|(_, (status, _))| status == "warning" || status == "failed")
            .map(|(name, _)| name)
            .collect();
        assert_eq!(wrong, [name], "{found:#?}");
        assert!(found[name].1.to_string().contains(text), "{:?}", found[name]);
        assert_eq!(found_code, code, "{found:#?}");
    }
}

#[test]
fn a_healthy_node_is_one() {
    let node = Node::new();
    let (code, found) = node.check();
    assert_eq!(code, HEALTHY, "{found:#?}");
    assert!(found.values().all(|(status, _)| status == "ok"), "{found:#?}");
    let text = node.command(&[]).output().unwrap();
    let text = String::from_utf8(text.stdout).unwrap();
    assert_eq!(text.lines().count(), found.len() + 1);
    assert_eq!(text.lines().last(), Some("healthy"));
    // It leaves nothing behind.
    assert_eq!(fs::read_dir(node.path("run")).unwrap().count(), 0);
    assert_eq!(fs::read_dir(node.path("containers")).unwrap().count(), 0);
    // As for root, who is asked nothing more: with an image there is nothing to say.
    let both = node.command(&[]).arg("alpine").output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}

#[test]
fn what_a_user_cannot_see_is_unknown() {
    let node = Node::new();
    let (code, found) =
        node.check_through(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"]);
    assert_eq!(code, HEALTHY, "{found:#?}");
    for name in ["store", "store locks", "leftovers", "root filesystem", "named containers"] {
        assert_eq!(found[name].0, "unknown", "{found:#?}");
    }
    assert_eq!(found["plugin"].0, "ok", "{found:#?}");
}

#[test]
fn a_node_that_was_just_installed_is_healthy() {
    let node = Node::new();
    for name in ["store", "run", "containers"] {
        fs::remove_dir_all(node.path(name)).unwrap();
    }
    assert_eq!(node.check().0, HEALTHY);
    assert!(!node.path("store").exists() && !node.path("containers").exists());
}

#[test]
fn the_configuration() {
    let mut node = Node::new();
    node.config += "[store\n";
    let (code, found) = node.check();
    assert_eq!((code, found["configuration"].0.as_str()), (UNUSABLE, "failed"), "{found:#?}");
}

/// As on a file system whose server is gone: who opens this FIFO waits.
#[test]
fn what_hangs_does_not_hang_the_check() {
    let node = Node::new();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        node.path("pyxis.toml"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    node.has_one_problem(UNUSABLE, "configuration", "no answer within 2 s");
}

#[test]
fn the_import_account() {
    for (user, code, text) in [("no-such-account", DEGRADED, "useradd"), ("root", UNUSABLE, "as root")] {
        let mut node = Node::new();
        node.config = node.config.replace("daemon", user);
        node.has_one_problem(code, "import account", text);
    }
}

#[test]
fn the_store() {
    let node = Node::new();
    chown(node.path("store"), Some(1), None).unwrap();
    let (code, found) = node.check();
    assert_eq!((code, found["store"].0.as_str()), (UNUSABLE, "failed"), "{found:#?}");
    assert!(found["store"].1.to_string().contains("belongs to uid 1"), "{found:#?}");

    let mut node = Node::new();
    node.before = format!("mount --bind {0} {0}; mount -o remount,bind,ro {0}", node.path("store").display());
    node.has_one_problem(DEGRADED, "store", "read-only");

    let mut node = Node::new();
    node.config += "store.watermarks = { high = \"0%\", low = \"0%\" }\n";
    node.has_one_problem(DEGRADED, "store", "pyxis gc");

    let node = Node::new();
    fs::remove_dir_all(node.path("store")).unwrap();
    fs::create_dir(node.path("store")).unwrap();
    fs::write(node.path("store/thesis.tex"), "").unwrap();
    let (code, found) = node.check();
    assert_eq!((code, found["store"].0.as_str()), (UNUSABLE, "failed"), "{found:#?}");
}

#[test]
fn leftovers_of_killed_imports() {
    let node = Node::new();
    fs::write(node.path("store/layers/sha256/.tmp-1"), "x").unwrap();
    fs::write(node.path("store/locks").join("0".repeat(64)), "").unwrap();
    node.has_one_problem(DEGRADED, "leftovers", "2 things");
    // What somebody writes at this moment is none.
    let file = File::open(node.path("store/layers/sha256/.tmp-1")).unwrap();
    rustix::fs::flock(&file, rustix::fs::FlockOperation::LockShared).unwrap();
    node.has_one_problem(DEGRADED, "leftovers", "1 thing ");
}

#[test]
fn the_runtime_directory() {
    let node = Node::new();
    fs::set_permissions(node.path("run"), fs::Permissions::from_mode(0o777)).unwrap();
    node.has_one_problem(UNUSABLE, "runtime directory", "mode 777");
}

#[test]
fn mounts_that_stay() {
    let mut node = Node::new();
    let root = node.path("run/root");
    node.before = format!("mkdir {0}; mount -t tmpfs stale {0}", root.display());
    node.has_one_problem(DEGRADED, "stale mounts", root.to_str().unwrap());
}

#[test]
fn user_namespaces() {
    for (limit, code) in [("0", UNUSABLE), ("10", DEGRADED)] {
        let mut node = Node::new();
        let fake = node.path("limit");
        fs::write(&fake, limit).unwrap();
        node.before = format!("mount --bind {} /proc/sys/user/max_user_namespaces", fake.display());
        node.has_one_problem(code, "user namespaces", "user.max_user_namespaces");
    }
}

/// A kernel that mounts nothing: no capability for it.
#[test]
fn the_root_filesystem() {
    let node = Node::new();
    let (code, found) = node.check_through(&["setpriv", "--bounding-set=-sys_admin"]);
    assert_eq!((code, found["root filesystem"].0.as_str()), (UNUSABLE, "failed"), "{found:#?}");
}

/// A file system that overlayfs takes no upper layers from.
#[test]
fn named_containers() {
    let mut node = Node::new();
    let containers = node.path("containers");
    let (lower, upper, work) = (node.path("l"), node.path("u"), node.path("w"));
    for directory in [&lower, &upper, &work] {
        fs::create_dir(directory).unwrap();
    }
    node.before = format!(
        "mount -t overlay x -o lowerdir={},upperdir={},workdir={} {}",
        lower.display(),
        upper.display(),
        work.display(),
        containers.display()
    );
    node.has_one_problem(DEGRADED, "named containers", "container.path");
}

#[test]
fn fuse() {
    let mut node = Node::new();
    node.config += "squashfs.mode = \"fuse\"\n";
    node.before = "mount --bind /dev/loop-control /dev/fuse".into();
    node.has_one_problem(DEGRADED, "FUSE", "squashfs.mode");
}

#[test]
fn certificates() {
    let mut node = Node::new();
    node.config += "import.environment = { SSL_CERT_FILE = \"/nonexistent\", SSL_CERT_DIR = \"/nonexistent\" }\n";
    node.has_one_problem(DEGRADED, "certificates", "ca-certificates");
}

#[test]
fn devices() {
    let node = Node::new();
    fs::write(node.path("cdi/vendor.json"), "no JSON").unwrap();
    node.has_one_problem(DEGRADED, "devices", "vendor.json");
}

#[test]
fn the_plugin() {
    let line = |node: &Node| fs::read_to_string(node.path("plugstack.d/pyxis.conf")).unwrap();
    let rewrite = |node: &Node, text: String| fs::write(node.path("plugstack.d/pyxis.conf"), text).unwrap();

    let node = Node::new();
    rewrite(&node, "# nothing\n".into());
    node.has_one_problem(UNUSABLE, "plugin", "include /usr/share/pyxis/*");

    let node = Node::new();
    fs::write(node.path("plugstack.d/second"), line(&node)).unwrap();
    node.has_one_problem(DEGRADED, "plugin", "twice");

    let node = Node::new();
    fs::set_permissions(node.path("spank_pyxis.so"), fs::Permissions::from_mode(0o666)).unwrap();
    node.has_one_problem(UNUSABLE, "plugin", "can be changed by others");

    let node = Node::new();
    fs::write(node.path("spank_pyxis.so"), "no ELF file").unwrap();
    node.has_one_problem(UNUSABLE, "plugin", "cannot be loaded");

    let node = Node::new();
    rewrite(&node, line(&node).replace("config=", "konfig="));
    node.has_one_problem(UNUSABLE, "plugin", "unknown configuration option: konfig=");

    let node = Node::new();
    rewrite(&node, line(&node).replace("/pyxis config", "/nothing config"));
    node.has_one_problem(UNUSABLE, "plugin", "No such file or directory");

    let node = Node::new();
    rewrite(&node, line(&node).replace("pyxis.toml", "other.toml"));
    node.has_one_problem(DEGRADED, "plugin", "other.toml");
}

/// A release that is not known yet, and one that is too old.
#[test]
fn the_release_of_slurm() {
    for (release, code, text) in [("97.05.1", DEGRADED, "newer"), ("20.02.7", UNUSABLE, "older than 20.11")] {
        let mut node = Node::new();
        let fake = node.path("slurmd");
        fs::write(&fake, format!("#!/bin/sh\necho slurm {release}\n")).unwrap();
        fs::set_permissions(&fake, fs::Permissions::from_mode(0o755)).unwrap();
        node.before = format!("mount --bind {} /usr/sbin/slurmd", fake.display());
        node.has_one_problem(code, "Slurm", text);
    }
}
