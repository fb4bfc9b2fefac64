//! The rules of the specification, and documents of the form that `nvidia-ctk cdi generate` and `amd-ctk cdi generate`
//! write.

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

const ENV: &str = r#"{"env": ["A=1"]}"#;

fn judge(text: &str) -> Result<(), String> {
    let json = Document::parse(text.as_bytes(), Format::Json).map(|_| ()).map_err(|error| error.to_string());
    // JSON is YAML, and both judge alike.
    let yaml = Document::parse(text.as_bytes(), Format::Yaml).map(|_| ()).map_err(|error| error.to_string());
    assert_eq!(json.is_ok(), yaml.is_ok(), "{text}: {json:?} {yaml:?}");
    json
}

#[test]
fn edits_that_are_valid() {
    for edits in [
        ENV,
        r#"{"deviceNodes": [{"path": "/dev/null"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/null", "type": "c"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/null", "type": "b", "permissions": "rwm"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/null", "permissions": "none"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/x", "type": "u", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0}]}"#,
        r#"{"mounts": [{"hostPath": "/dev/ctl", "containerPath": "/dev/ctl"}]}"#,
        r#"{"mounts": [{"hostPath": "/dev/ctl", "containerPath": "/dev/ctl", "options": ["ro", "rbind"]}]}"#,
        r#"{"hooks": [{"hookName": "prestart", "path": "/bin/h", "args": ["-v"], "env": ["V=1"]}]}"#,
        r#"{"hooks": [{"hookName": "createRuntime", "path": "/bin/h"}, {"hookName": "createContainer", "path": "/h"}]}"#,
        r#"{"hooks": [{"hookName": "startContainer", "path": "/bin/h", "timeout": 5}]}"#,
        r#"{"hooks": [{"hookName": "poststart", "path": "/bin/h"}, {"hookName": "poststop", "path": "/bin/h"}]}"#,
        r#"{"env": ["EMPTY="], "mounts": null}"#,
    ] {
        assert_eq!(judge(&document("0.3.0", edits, "{}")), Ok(()), "{edits}");
        assert_eq!(judge(&document("1.1.0", ENV, edits)), Ok(()), "{edits}");
    }
}

#[test]
fn edits_that_are_not() {
    for (edits, problem) in [
        (r#"{"env": [""]}"#, "env: \"\" is no NAME=VALUE"),
        (r#"{"env": ["=foo"]}"#, "env: \"=foo\" is no NAME=VALUE"),
        (r#"{"env": ["FOOBAR"]}"#, "env: \"FOOBAR\" is no NAME=VALUE"),
        (r#"{"deviceNodes": [{"path": ""}]}"#, "device node \"\": must be an absolute path"),
        (r#"{"deviceNodes": [{"path": "dev/null"}]}"#, "device node \"dev/null\": must be an absolute path"),
        (r#"{"deviceNodes": [{"path": "/dev/x", "type": "f"}]}"#, "device node /dev/x: unknown type \"f\""),
        (
            r#"{"deviceNodes": [{"path": "/dev/x", "permissions": "to land"}]}"#,
            "device node /dev/x: unknown permissions \"to land\"",
        ),
        (r#"{"deviceNodes": [{"path": "/dev/x", "major": -1}]}"#, "device node /dev/x: negative number -1:0"),
        (
            r#"{"mounts": [{"hostPath": "", "containerPath": "/dev/ctl"}]}"#,
            "mount of \"\" at \"/dev/ctl\": must be absolute paths",
        ),
        (
            r#"{"mounts": [{"hostPath": "/dev/ctl", "containerPath": ""}]}"#,
            "mount of \"/dev/ctl\" at \"\": must be absolute paths",
        ),
        (r#"{"hooks": [{"hookName": "prestart", "path": ""}]}"#, "hook prestart: \"\" must be an absolute path"),
        (r#"{"hooks": [{"hookName": "misCreate", "path": "/h"}]}"#, "unknown hook \"misCreate\""),
        (r#"{"hooks": [{"hookName": "poststart", "path": "/h", "env": ["=v"]}]}"#, "hook: \"=v\" is no NAME=VALUE"),
        (
            r#"{"hooks": [{"hookName": "poststop", "path": "/h", "timeout": 0}]}"#,
            "hook poststop: timeout must be at least 1",
        ),
    ] {
        assert_eq!(judge(&document("0.6.0", edits, "{}")), Err(format!(": the device \"dev\": {problem}")), "{edits}");
        assert_eq!(judge(&document("0.6.0", ENV, edits)), Err(format!(": containerEdits: {problem}")), "{edits}");
    }
}

#[test]
fn features_and_the_versions_that_have_them() {
    let node = r#"{"deviceNodes": [{"path": "/dev/x", "hostPath": "/dev/y"}]}"#;
    let typed = r#"{"mounts": [{"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs"}]}"#;
    let wildcard = r#"{"deviceNodes": [{"path": "/dev/dri/card*"}]}"#;
    for (first, edits) in [
        ("0.4.0", typed),
        ("0.5.0", node),
        ("0.7.0", r#"{"intelRdt": {"closID": "c"}}"#),
        ("0.7.0", r#"{"additionalGids": [44]}"#),
        ("0.7.0", r#"{"additionalGIDs": [44]}"#),
        ("1.1.0", r#"{"netDevices": [{"hostInterfaceName": "eth1", "name": "eth0"}]}"#),
        ("1.1.0", r#"{"intelRdt": {"schemata": ["L3:0=f"]}}"#),
        ("1.1.0", r#"{"intelRdt": {"enableMonitoring": true}}"#),
        ("1.2.0", r#"{"deviceCgroupRules": [{"type": "c", "major": 226, "minor": -1, "permissions": "rw"}]}"#),
    ] {
        let versions = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "1.2.0"];
        for version in versions {
            for text in [document(version, edits, "{}"), document(version, ENV, edits)] {
                let judged = judge(&text);
                assert_eq!(judged.is_ok(), version >= first, "{version}: {edits}: {judged:?}");
                assert!(judged.err().is_none_or(|error| error.contains(&format!("needs cdiVersion {first}"))));
            }
        }
    }
    let changed = |from: &str, to: &str| judge(&document("0.5.0", ENV, "{}").replace(from, to));
    assert_eq!(changed("dev\"", "0\""), Ok(()));
    assert!(changed("\"0.5.0\"", "\"0.4.0\"").is_ok());
    let digit = document("0.4.0", ENV, "{}").replace("\"dev\"", "\"0\"");
    assert_eq!(
        judge(&digit).unwrap_err(),
        ": a device name that begins with a digit needs cdiVersion 0.5.0, and it says 0.4.0"
    );
    assert!(changed("com/device", "com/device.sub").unwrap_err().contains("a dot in the class needs cdiVersion 0.6.0"));
    assert!(
        changed("\"devices\"", "\"annotations\": {\"a\": \"b\"}, \"devices\"").unwrap_err().contains("annotations")
    );
    assert!(changed("\"name\"", "\"annotations\": {\"a\": \"b\"}, \"name\"").unwrap_err().contains("annotations"));
    let old = r#"{"intelRdt": {"enableCMT": true}}"#;
    assert_eq!(judge(&document("1.0.0", old, "{}")), Ok(()));
    assert!(judge(&document("1.1.0", old, "{}")).unwrap_err().contains("gone since cdiVersion 1.1.0"));
    // Before, the characters have no meaning.
    assert_eq!(judge(&document("1.1.0", wildcard, "{}")), Ok(()));
    for (path, problem) in [
        (r#""path": "/dev/*/card""#, "only the last element of a path may be a pattern"),
        (r#""path": "/dev/card*", "hostPath": "/x/render*""#, "path and hostPath must end with the same pattern"),
        (r#""path": "/dev/card*", "type": "c""#, "a pattern goes without type, major and minor"),
    ] {
        let text = document("1.2.0", &format!(r#"{{"deviceNodes": [{{{path}}}]}}"#), "{}");
        assert!(judge(&text).unwrap_err().ends_with(problem), "{path}");
    }
}

#[test]
fn documents_that_are_none() {
    let change = |from: &str, to: &str| judge(&document("0.6.0", ENV, "{}").replace(from, to)).unwrap_err();
    for version in ["", "0.1.0", "0.2.0", "0.6.1", "2.0.0", "latest"] {
        assert!(change("\"0.6.0\"", &format!("{version:?}")).contains("known are 0.3.0 to 1.2.0"), "{version}");
    }
    assert!(change("vendor.com/device", "vendor.com").contains("is no kind of devices"));
    assert!(change("vendor.com/device", "vendor.com/d/e").contains("the class \"d/e\""));
    assert!(change("\"dev\"", "\"-dev\"").contains("must begin with a letter or digit"));
    assert!(change(ENV, "{}").ends_with("the device \"dev\" has no containerEdits"));
    let twice = document("0.6.0", ENV, "{}")
        .replace("\"devices\": [", "\"devices\": [{\"name\": \"dev\", \"containerEdits\": {\"env\": [\"A=1\"]}}, ");
    assert!(judge(&twice).unwrap_err().ends_with("the device \"dev\" is there twice"));
    let none = r#"{"cdiVersion": "0.6.0", "kind": "v.com/d", "devices": []}"#;
    assert_eq!(judge(none).unwrap_err(), ": devices: it has none");
    assert!(change("\"kind\"", "\"kined\"").contains("unknown field `kined`"));
    assert!(change("containerEdits\": {}", "containerEdits\": 7").starts_with(":2:"));
}

#[test]
fn malformed_files_are_named_with_the_place() {
    let place = |text: &str, format| Document::parse(text.as_bytes(), format).unwrap_err().to_string();
    assert_eq!(place("{\n  \"kind\": 7}", Format::Json), ":2:11: invalid type: integer `7`, expected a string");
    let yaml = "cdiVersion: 0.6.0\nkind: v.com/d\ndevices:\n  - name: [a\n";
    let error = place(yaml, Format::Yaml);
    assert!(error.starts_with(":4:") || error.starts_with(":5:"), "{error}");
    let unknown = "cdiVersion: 0.6.0\nkind: v.com/d\nnodes: 1\n";
    let error = place(unknown, Format::Yaml);
    assert!(error.starts_with(":3:1: ") && error.contains("nodes") && !error.contains('\n'), "{error}");
    let deep = "[".repeat(100_000);
    for format in [Format::Json, Format::Yaml] {
        assert!(!place(&deep, format).contains('\n'));
        assert!(!place("", format).is_empty());
    }
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
    assert_eq!(edits.additional_gids, [44]);
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

/// The form of `nvidia-ctk cdi generate`, with a driver in a directory of ours.
fn nvidia(driver: &Path) -> String {
    let driver = driver.display();
    format!(
        r#"---
cdiVersion: 0.5.0
kind: nvidia.com/gpu
devices:
  - name: "0"
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia0
          hostPath: /dev/zero
          fileMode: 438
          permissions: rw
      hooks:
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, create-symlinks, --link, ../card0::/dev/dri/by-path/pci-0000:04:00.0-card]
          env: [NVIDIA_CTK_DEBUG=false]
        - hookName: createContainer
          path: /usr/bin/nvidia-cdi-hook
          args: [nvidia-cdi-hook, chmod, --mode, "755", --path, /dev/dri]
  - name: GPU-11111111-2222-3333-4444-555555555555
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia0
          hostPath: /dev/zero
  - name: all
    containerEdits:
      deviceNodes:
        - path: /dev/nvidia0
          hostPath: /dev/zero
        - path: /dev/nvidia1
          hostPath: /dev/full
containerEdits:
  env:
    - NVIDIA_VISIBLE_DEVICES=void
  deviceNodes:
    - path: /dev/nvidiactl
      hostPath: /dev/null
  hooks:
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args:
        - nvidia-cdi-hook
        - create-symlinks
        - --link
        - libcuda.so.1::/usr/lib64/libcuda.so
        - --link
        - libcuda.so.550.54.15::/usr/lib64/libcuda.so.1
        - --link
        - ../libnvidia-allocator.so.1::/usr/lib64/gbm/nvidia-drm_gbm.so
      env: [NVIDIA_CTK_DEBUG=false]
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args: [nvidia-cdi-hook, enable-cuda-compat, --host-driver-version=550.54.15]
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args: [nvidia-cdi-hook, update-ldcache, --folder, /usr/lib64, --folder, /usr/lib]
    - hookName: createContainer
      path: /usr/bin/nvidia-cdi-hook
      args: [nvidia-cdi-hook, disable-device-node-modification]
  mounts:
    - hostPath: {driver}/libcuda.so.550.54.15
      containerPath: /usr/lib64/libcuda.so.550.54.15
      options: &options
        - ro
        - nosuid
        - nodev
        - rbind
        - rprivate
    - hostPath: {driver}/libcuda32.so
      containerPath: /usr/lib/libcuda.so.550.54.15
      options: *options
    - hostPath: {driver}/nvidia-smi
      containerPath: /usr/bin/nvidia-smi
      options: *options
"#
    )
}

#[test]
fn what_nvidia_ctk_writes() {
    let driver = tempfile::tempdir().unwrap();
    for (name, class) in [("libcuda.so.550.54.15", 2), ("libcuda32.so", 1), ("nvidia-smi", 2)] {
        fs::write(driver.path().join(name), [0x7f, b'E', b'L', b'F', class, 1]).unwrap();
    }
    let directories = Directories::new(&[("etc/nvidia.yaml", &nvidia(driver.path()))]);
    let registry = directories.load();
    assert_eq!(registry.problems, [""; 0]);
    let edits = registry.edits(&names(&["nvidia.com/gpu=0"]), &user(), None).unwrap();
    let nodes: Vec<_> = edits.device_nodes.iter().map(|node| node.path.to_str().unwrap()).collect();
    assert_eq!(nodes, ["/dev/nvidiactl", "/dev/nvidia0"]);
    let libraries: Vec<_> = edits
        .libraries
        .iter()
        .map(|library| (library.path.file_name().unwrap().to_str().unwrap(), library.is_32_bit, &library.names[..]))
        .collect();
    assert_eq!(
        libraries,
        [
            (
                "libcuda.so.550.54.15",
                false,
                &["libcuda.so.550.54.15".to_owned(), "libcuda.so.1".into(), "libcuda.so".into()][..]
            ),
            ("libcuda32.so", true, &["libcuda.so.550.54.15".to_owned()][..]),
        ]
    );
    let targets: Vec<_> = edits.mounts.iter().map(|mount| mount.target.as_str()).collect();
    assert_eq!(targets, ["/usr/bin/nvidia-smi"]);
    assert_eq!(edits.mounts[0].set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV);
    let link = |path: &str, target: &str| Link { path: path.into(), target: target.into() };
    assert_eq!(
        edits.links,
        [
            link("/usr/lib64/gbm/nvidia-drm_gbm.so", "../libnvidia-allocator.so.1"),
            link("/dev/dri/by-path/pci-0000:04:00.0-card", "../card0"),
        ]
    );
    // Nothing of it runs.
    assert_eq!(edits.hooks, []);
    assert_eq!(env(&edits), ["NVIDIA_VISIBLE_DEVICES=void"]);
    let kind: Kind = "nvidia.com/gpu".parse().unwrap();
    assert_eq!(registry.device_of_node(&kind, Path::new("/dev/zero")), names(&["nvidia.com/gpu=0"]).pop());
    assert_eq!(registry.device_of_node(&kind, Path::new("/dev/full")), None);
    assert!(registry.has_kind(&kind) && !registry.has_kind(&"nvidia.com/mig".parse().unwrap()));
    // An image with a newer CUDA of its own.
    let image = tempfile::tempdir().unwrap();
    let compat = image.path().join("usr/local/cuda/compat");
    fs::create_dir_all(&compat).unwrap();
    fs::write(compat.join("libcuda.so.560.35.05"), "").unwrap();
    let root = fs::File::open(image.path()).unwrap();
    let root = RootDir::new(std::os::fd::AsFd::as_fd(&root));
    let edits = registry.edits(&names(&["nvidia.com/gpu=0"]), &user(), Some(root)).unwrap();
    let own: Vec<_> = edits.libraries.iter().filter(|library| library.origin == Origin::Image).collect();
    assert_eq!(own.len(), 1);
    assert_eq!(own[0].names, ["libcuda.so.560.35.05", "libcuda.so", "libcuda.so.1"]);
    assert_eq!(edits.libraries[0].names, ["libcuda.so.550.54.15"]);
}

/// The form of `amd-ctk cdi generate`: everything in one line, and every number there.
#[test]
fn what_amd_ctk_writes() {
    let node = |path: &str, host: &str, minor: u32| {
        format!(
            r#"{{"path":"{path}","hostPath":"{host}","type":"c","major":1,"minor":{minor},"fileMode":432,"permissions":"rwm","uid":0,"gid":44}}"#
        )
    };
    let (card, kfd) = (node("/dev/dri/card1", "/dev/zero", 5), node("/dev/kfd", "/dev/null", 3));
    let text = format!(
        r#"{{"cdiVersion":"0.6.0","kind":"amd.com/gpu","devices":[{{"name":"0","containerEdits":{{"deviceNodes":[{card},{kfd}]}}}},{{"name":"all","containerEdits":{{"deviceNodes":[{card},{kfd}]}}}}],"containerEdits":{{}}}}"#
    );
    let directories = Directories::new(&[("run/amd.json", &text)]);
    let registry = directories.load();
    let edits = registry.edits(&names(&["amd.com/gpu=0"]), &user(), None).unwrap();
    let nodes: Vec<_> = edits.device_nodes.iter().map(|node| node.path.to_str().unwrap()).collect();
    assert_eq!((nodes, edits.log), (vec!["/dev/dri/card1", "/dev/kfd"], vec![]));
}

proptest! {
    #[test]
    fn nothing_panics_and_every_error_is_one_line(text in "(cdiVersion|kind|devices|name|env|: |- |\\[|\\]|\\{|\\}|\"|,|0\\.5\\.0|v/c|A=1|\n|  ){0,40}") {
        for format in [Format::Json, Format::Yaml] {
            if let Err(error) = Document::parse(text.as_bytes(), format) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
