//! What files say, together and for themselves.

mod documents;
mod vendors;

use std::fs;
use std::path::{Path, PathBuf};

use proptest::prelude::*;

use super::document::{Document, Format};
use super::*;
use crate::devices::edits::{ContainerEdits, DeviceNode, HookStage, Link, Origin};
use crate::mounts::entry::{Action, Create};
use crate::mounts::rootdir::RootDir;
use crate::request::User;

fn user() -> User {
    User { uid: 1000, gid: 1000, groups: vec![1000, 44] }
}

/// A document of one device with `device` and `all` as edits, in JSON.
fn document(version: &str, device: &str, all: &str) -> String {
    format!(
        r#"{{"cdiVersion": "{version}", "kind": "vendor.com/device",
            "devices": [{{"name": "dev", "containerEdits": {device}}}], "containerEdits": {all}}}"#
    )
}

struct Directories(tempfile::TempDir);

impl Directories {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        for name in ["etc", "run"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        for (name, text) in files {
            fs::write(directory.path().join(name), text).unwrap();
        }
        Self(directory)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn load(&self) -> Registry {
        Registry::load(&[self.path("etc"), self.path("run"), self.path("missing")], None)
    }
}

fn device(kind: &str, names: &[&str], value: &str) -> String {
    let devices: Vec<String> = names
        .iter()
        .map(|name| {
            format!(r#"{{"name": "{name}", "containerEdits": {{"env": ["{}={value}"]}}}}"#, name.to_uppercase())
        })
        .collect();
    format!(
        r#"{{"cdiVersion": "0.6.0", "kind": "{kind}", "devices": [{}], "containerEdits": {{"env": ["ALL={value}"]}}}}"#,
        devices.join(", ")
    )
}

fn names(list: &[&str]) -> Vec<QualifiedName> {
    list.iter().map(|name| name.parse().unwrap()).collect()
}

fn env(edits: &ContainerEdits) -> Vec<String> {
    edits.env.iter().map(|(name, value)| format!("{name}={value}")).collect()
}

#[test]
fn the_later_directory_overrides_and_files_of_one_do_not() {
    let directories = Directories::new(&[
        ("etc/a.json", &device("v.com/d", &["one", "two", "three"], "etc-a")),
        ("etc/b.yaml", &device("v.com/d", &["two", "three", "four"], "etc-b")),
        ("etc/c.json", &device("v.com/d", &["two"], "etc-c")),
        ("run/x.json", &device("v.com/d", &["one", "three"], "run")),
        ("etc/README", "nothing"),
        ("etc/.hidden.json", "nothing"),
        ("etc/old.yml", "nothing"),
    ]);
    let registry = directories.load();
    assert_eq!(registry.problems, [""; 0]);
    let value = |name: &str| {
        registry
            .edits(&names(&[name]), &user(), None)
            .map(|edits| env(&edits).join(" "))
            .map_err(|error| error.to_string())
    };
    assert_eq!(value("v.com/d=one").unwrap(), "ALL=run ONE=run");
    // What two files of /etc disagree about, /run may settle.
    assert_eq!(value("v.com/d=three").unwrap(), "ALL=run THREE=run");
    assert_eq!(value("v.com/d=four").unwrap(), "ALL=etc-b FOUR=etc-b");
    let error = value("v.com/d=two").unwrap_err();
    for file in ["etc/a.json", "etc/b.yaml", "etc/c.json"] {
        assert!(error.contains(&directories.path(file).display().to_string()), "{error}");
    }
    assert_eq!(registry.conflicts().count(), 1);
    assert_eq!(registry.devices().count(), 3);
}

#[test]
fn edits_for_all_devices_of_a_file_come_once_and_first() {
    let directories = Directories::new(&[
        ("etc/a.json", &device("v.com/d", &["a", "b"], "1")),
        ("etc/b.json", &device("w.com/d", &["c"], "2")),
    ]);
    let wanted = names(&["v.com/d=b", "w.com/d=c", "v.com/d=a", "v.com/d=b"]);
    let edits = directories.load().edits(&wanted, &user(), None).unwrap();
    assert_eq!(env(&edits), ["ALL=1", "B=1", "ALL=2", "C=2", "A=1"]);
}

#[test]
fn names_that_match_nothing_say_what_there_is() {
    let directories = Directories::new(&[
        ("etc/a.json", &device("v.com/d", &["a", "b"], "1")),
        ("etc/b.json", &device("w.com/e", &["c"], "2")),
        ("run/bad.yaml", "kind: [\n"),
    ]);
    let registry = directories.load();
    let error = |name: &str| registry.edits(&names(&[name]), &user(), None).unwrap_err().to_string();
    let bad = directories.path("run/bad.yaml");
    let unknown = error("v.com/d=x");
    let beginning = format!(
        "there is no device v.com/d=x on this node: of v.com/d it has a, b; not understood: {}:",
        bad.display()
    );
    assert!(unknown.starts_with(&beginning) && !unknown.contains('\n'), "{unknown}");
    assert!(error("x.com/d=x").contains("it has devices of v.com/d, w.com/e; not understood"));
    let empty = Registry::load(&[], None).edits(&names(&["a/b=c"]), &user(), None).unwrap_err();
    assert_eq!(empty.to_string(), "there is no device a/b=c on this node: it has no CDI devices at all");
    let many: Vec<String> = (0..30).map(|number| format!("d{number:02}")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let directories = Directories::new(&[("etc/a.json", &device("v.com/d", &many, "1"))]);
    let error = directories.load().edits(&names(&["v.com/d=x"]), &user(), None).unwrap_err().to_string();
    assert!(error.ends_with("d19 and 10 more"), "{error}");
}

#[test]
fn files_of_other_vendors_are_not_parsed() {
    let directories =
        Directories::new(&[("etc/a.json", &device("v.com/d", &["a"], "1")), ("etc/b.yaml", "kind: nobody.com/x\n[")]);
    let registry = Registry::load(&[directories.path("etc")], Some(&["v.com"]));
    assert!(registry.problems.is_empty() && registry.has(&names(&["v.com/d=a"])[0]));
    assert_eq!(directories.load().problems.len(), 1);
}

/// What `/dev` has on every machine stands for devices.
#[test]
fn device_nodes_are_looked_at() {
    let plan = |nodes: &str| {
        let text = document("1.2.0", &format!(r#"{{"deviceNodes": [{nodes}]}}"#), "{}");
        let directories = Directories::new(&[("etc/a.json", &text)]);
        directories.load().edits(&names(&["vendor.com/device=dev"]), &user(), None).map_err(|error| error.to_string())
    };
    let node =
        |host_path: &str, path: &str, optional| DeviceNode { host_path: host_path.into(), path: path.into(), optional };
    let edits = plan(
        r#"{"path": "/dev/null"}, {"path": "/dev/x", "hostPath": "/dev/zero", "type": "u", "major": 1, "minor": 5}"#,
    );
    let edits = edits.unwrap();
    assert_eq!(edits.device_nodes, [node("/dev/null", "/dev/null", false), node("/dev/zero", "/dev/x", false)]);
    assert_eq!((edits.log, edits.notices), (vec![], vec![]));
    let stale = plan(r#"{"path": "/dev/null", "major": 234, "minor": 1}"#).unwrap();
    assert!(stale.log[0].ends_with("/dev/null is 1:3, not 234:1: the file is out of date"), "{:?}", stale.log);
    for (nodes, problem) in [
        (
            r#"{"path": "/dev/vanished"}"#,
            "there is no device node /dev/vanished: a kernel module is not loaded, or the file is out of date",
        ),
        (r#"{"path": "/dev/null", "type": "b"}"#, "/dev/null is a character device, and the type there is \"b\""),
        (r#"{"path": "/dev"}"#, "/dev is no device node"),
    ] {
        let error = plan(nodes).unwrap_err();
        assert!(error.starts_with("the device vendor.com/device=dev (/") && error.ends_with(problem), "{error}");
    }
    let edits = plan(r#"{"path": "/dev/card/zer*", "hostPath": "/dev/zer*"}, {"path": "/dev/nothing*"}"#).unwrap();
    assert_eq!(edits.device_nodes, [node("/dev/zero", "/dev/card/zero", true)]);
    let twice = plan(r#"{"path": "/dev/null"}, {"path": "/dev/null", "hostPath": "/dev/full"}"#).unwrap();
    assert_eq!(twice.device_nodes, [node("/dev/full", "/dev/null", false)]);
}

#[test]
fn mounts_hooks_groups_and_what_is_left_out() {
    let edits = r#"{
        "mounts": [
            {"hostPath": "/dev/null", "containerPath": "/opt/v/file", "options": ["ro", "nosuid", "nodev", "bind", "idmap"]},
            {"hostPath": "/", "containerPath": "/opt", "options": ["rw"]},
            {"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs", "options": ["size=1m"]}
        ],
        "hooks": [
            {"hookName": "createContainer", "path": "/bin/v", "args": ["v", "x"], "env": ["A=1"], "timeout": 3},
            {"hookName": "prestart", "path": "/bin/p"},
            {"hookName": "poststop", "path": "/bin/s"}
        ],
        "additionalGids": [0, 44, 999],
        "intelRdt": {"closID": "c"},
        "netDevices": [{"hostInterfaceName": "eth1", "name": "eth0"}]
    }"#;
    let directories = Directories::new(&[("etc/a.json", &document("1.1.0", edits, "{}"))]);
    let edits = directories.load().edits(&names(&["vendor.com/device=dev"]), &user(), None).unwrap();
    let targets: Vec<&str> = edits.mounts.iter().map(|entry| entry.target.as_str()).collect();
    assert_eq!(targets, ["/opt", "/t", "/opt/v/file"]);
    let actions: Vec<_> = edits.mounts.iter().map(|entry| (entry.action.clone(), entry.create)).collect();
    let tmpfs = Action::New { kind: "tmpfs".into(), data: vec!["size=1m".into()] };
    assert_eq!(
        actions,
        [
            (Action::Bind { recursive: true }, Create::Auto),
            (tmpfs, Create::Auto),
            (Action::Bind { recursive: false }, Create::Auto)
        ]
    );
    let stages: Vec<_> = edits.hooks.iter().map(|hook| (hook.stage, hook.path.to_str().unwrap())).collect();
    assert_eq!(stages, [(HookStage::CreateContainer, "/bin/v"), (HookStage::CreateRuntime, "/bin/p")]);
    assert_eq!((edits.hooks[0].timeout_seconds, edits.hooks[0].env.len()), (Some(3), 1));
    assert!(edits.hooks[0].origin.starts_with("vendor.com/device=dev (/"));
    assert_eq!(edits.notices.len(), 1, "{:?}", edits.notices);
    assert!(edits.notices[0].contains("\"eth1\" is not moved"));
    let log = edits.log.join("\n");
    for text in ["unknown option \"idmap\"", "poststop: /bin/s: not run", "intelRdt", "not in: 999"] {
        assert!(log.contains(text), "{text}: {log}");
    }
    let missing = r#"{"mounts": [{"hostPath": "/does/not/exist", "containerPath": "/x"}]}"#;
    let directories = Directories::new(&[("etc/a.json", &document("1.1.0", missing, "{}"))]);
    let error = directories.load().edits(&names(&["vendor.com/device=dev"]), &user(), None).unwrap_err().to_string();
    assert!(error.ends_with("there is no /does/not/exist to mount: the file is out of date"), "{error}");
}
