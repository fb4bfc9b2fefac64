//! The packages that `packaging/build` makes: what is in them, what lintian and rpmlint say, and their life on Debian 12,
//! 13 and sid, each in a folder of its own (`tests/releases/enter`).

#![forbid(unsafe_code)]

mod contents;
mod lifecycle;
mod slinky;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;
use std::time::Duration;

use testbed::install::Build;
use testbed::process;

/// Longest time to make packages or a Debian, on a busy machine.
const LONG: Duration = Duration::from_secs(1800);

/// Packages of two versions, of what has been built along with these tests.
struct Packages {
    directory: PathBuf,
}

impl Packages {
    fn deb(&self, version: &str) -> PathBuf {
        let architecture = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
        self.directory.join(format!("pyxis_{version}-1_{architecture}.deb"))
    }

    fn rpm(&self) -> PathBuf {
        self.directory.join(format!("pyxis-{NEW}-1.{}.rpm", std::env::consts::ARCH))
    }
}

const OLD: &str = "0.0.1";
const NEW: &str = env!("CARGO_PKG_VERSION");

static PACKAGES: LazyLock<Packages> = LazyLock::new(|| {
    // In the tree, which the folders see.
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("packaging");
    let _ = std::fs::remove_dir_all(&directory);
    std::fs::create_dir_all(&directory).unwrap();
    let build = Build::of(env!("CARGO_BIN_EXE_pyxis"));
    let [plugin, executable] = [(&build.plugin, "plugin"), (&build.executable, "executable")].map(|(file, name)| {
        let stripped = directory.join(name);
        process::output_of(Command::new("strip").arg("-o").arg(&stripped).arg(file)).unwrap();
        stripped
    });
    package(&["deb"], &plugin, &executable, &directory, &[("VERSION", OLD)]);
    package(&["deb", "rpm"], &plugin, &executable, &directory, &[]);
    Packages { directory }
});

/// Makes packages of `plugin` and `executable` in `output`.
fn package(kinds: &[&str], plugin: &Path, executable: &Path, output: &Path, variables: &[(&str, &str)]) {
    let mut build = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/build"));
    build.args(kinds).env("PLUGIN", plugin).env("EXECUTABLE", executable).env("OUTPUT", output);
    build.env("GENERATOR", env!("CARGO_BIN_EXE_pyxis")).envs(variables.iter().copied()).env_remove("MAKEFLAGS");
    run(&mut build);
}

/// Standard output of a command that succeeds.
fn run(command: &mut Command) -> String {
    process::run(command, LONG).and_then(process::Output::success).unwrap_or_else(|error| panic!("{error:#}")).stdout
}
