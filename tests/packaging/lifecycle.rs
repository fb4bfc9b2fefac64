//! Installed, upgraded, removed and purged by dpkg, beside a Slurm that runs steps.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::{NEW, OLD, PACKAGES, run};

/// Output of a command in a Debian of this release.
pub fn enter(suite: &str, command: &[&str], arguments: &[&Path]) -> String {
    let mut enter = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/releases/enter"));
    run(enter.arg(suite).args(command).args(arguments))
}

fn life(suite: &str) {
    let tree = Path::new(env!("CARGO_MANIFEST_DIR"));
    let script = tree.join("tests/packaging/lifecycle.sh");
    let [old, new] = [OLD, NEW].map(|version| PACKAGES.deb(version));
    let testbed = PathBuf::from(env!("CARGO_BIN_EXE_pyxis")).with_file_name("testbed");
    assert!(testbed.exists(), "{} is missing: cargo build --package testbed", testbed.display());
    let output = enter(suite, &[&script.display().to_string()], &[&old, &new, &testbed]);
    assert!(output.ends_with("a whole life\n"), "{output}");
}

#[test]
fn on_debian_12() {
    life("bookworm");
}

#[test]
fn on_debian_13() {
    life("trixie");
}

/// `tests/releases/run sid` runs it: what may be missing in sid on some day must not fail everybody's tests.
#[test]
#[ignore = "tests/releases/run sid"]
fn on_debian_sid() {
    life("sid");
}
