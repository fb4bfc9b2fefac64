//! `pyxis gc`, as an administrator runs it.

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::{Value, json};
use spank_pyxis::store::Store;

use crate::fake::{FakeImporter, Registries, Repository, digest};
use crate::site;

/// Where the command keeps its mounts. Unmounted when dropped.
struct Runtime(PathBuf);

impl Drop for Runtime {
    fn drop(&mut self) {
        for mount in ["mounts/layers", "mounts"] {
            let _ = Command::new("umount").arg("--lazy").arg(self.0.join(mount)).output();
        }
    }
}

#[test]
fn gc_says_what_it_does() {
    let site = site();
    let registries = Registries::new([
        ("host.example/one", Repository::with("gzip", &["one"])),
        ("host.example/two", Repository::with("gzip", &["two"])),
    ]);
    let importer = FakeImporter::honest(&registries);
    drop(site.acquire(&importer, 1001, "host.example/one").unwrap());
    let used = site.acquire(&importer, 1001, "host.example/two").unwrap();
    let config = site.directory.path().join("pyxis.toml");
    let runtime = Runtime(site.directory.path().join("run"));
    let containers = site.directory.path().join("containers");
    let text = format!(
        "[store]\npath = {:?}\n[runtime]\npath = {:?}\n[container]\npath = {containers:?}\n",
        site.store.path(),
        runtime.0
    );
    std::fs::write(&config, text).unwrap();
    let gc = |arguments: &[&str]| -> Output {
        Command::new(env!("CARGO_BIN_EXE_pyxis"))
            .arg("--config")
            .arg(&config)
            .arg("gc")
            .args(arguments)
            .output()
            .unwrap()
    };
    let stdout = |output: &Output| String::from_utf8(output.stdout.clone()).unwrap();

    let planned = gc(&["--all", "--dry-run"]);
    assert!(planned.status.success());
    assert_eq!(
        stdout(&planned),
        "would remove 1 layer, free 12.0 KiB\nkept 1 layer with 12.0 KiB; in use: 1 that should go\n"
    );
    assert_eq!(site.layers().len(), 2);
    let done = gc(&["--all", "--json"]);
    assert!(done.status.success());
    let report: Value = serde_json::from_str(&stdout(&done)).unwrap();
    assert_eq!(report["removed"], json!([digest("one").to_string()]));
    assert_eq!((&report["freed_bytes"], &report["in_use_layers"]), (&json!(12288), &json!(1)));
    assert_eq!(site.layers(), [digest("two").hex()]);
    drop(used);

    std::fs::write(site.store.path().join("version.new"), "7\n").unwrap();
    std::fs::rename(site.store.path().join("version.new"), site.store.path().join("version")).unwrap();
    let refused = gc(&[]);
    assert!(!refused.status.success());
    let error = String::from_utf8(refused.stderr).unwrap();
    assert!(error.contains("has version \"7\"") && error.lines().count() == 1, "{error}");
    assert!(Store::open(site.store.path()).is_err());
}
