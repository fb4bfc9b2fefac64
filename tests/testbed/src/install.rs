//! The plugin and the executable under test: installed as `make install` does it, or by a package.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};

use crate::process;
use crate::registry::Registry;
use crate::site::Site;
use crate::users;

/// What to install.
#[derive(Debug, Clone)]
pub struct Build {
    /// The `pyxis` executable.
    pub executable: PathBuf,
    /// The plugin.
    pub plugin: PathBuf,
}

impl Build {
    /// The build that `executable` (Cargo's `CARGO_BIN_EXE_pyxis`) belongs to.
    pub fn of(executable: &str) -> Self {
        let executable = PathBuf::from(executable);
        // Cargo puts what was built only as a dependency of a test into `deps`, and nowhere else.
        let directory = executable.parent().unwrap_or(Path::new("."));
        Self { plugin: directory.join("deps/libspank_pyxis.so"), executable }
    }
}

/// Whether what is under test is the package that is installed on this machine, and not what has been built along with
/// the tests.
pub fn is_package() -> bool {
    std::env::var_os("PYXIS_TEST_PACKAGE").is_some()
}

/// Pyxis, installed in a site where every user can reach it.
#[derive(Debug)]
pub struct Installation {
    /// The executable.
    pub executable: PathBuf,
    /// The plugin.
    pub plugin: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// The line for `plugstack.conf`.
    pub plugstack: String,
}

impl Installation {
    /// Installs `build` in `site`, unless the package is. Docker Hub is what the registry `hub` holds.
    pub fn create(site: &Site, build: &Build, hub: &Registry) -> Result<Self> {
        let installation = match is_package() {
            true => Self::of_package(site),
            false => Self::of_build(site, build)?,
        };
        installation.configure(&hub_mirror(&hub.host()))?;
        Ok(installation)
    }

    fn of_build(site: &Site, build: &Build) -> Result<Self> {
        users::ensure_service_user()?;
        let prefix = site.path("install");
        let mut make = Command::new("make");
        make.arg("--directory").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).args(["--silent", "install"]);
        for (name, value) in [("PREFIX", &prefix), ("PLUGIN", &build.plugin), ("EXECUTABLE", &build.executable)] {
            make.arg(format!("{name}={}", value.display()));
        }
        process::output_of(make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL")).context("make install")?;
        let config = prefix.join("etc/pyxis/pyxis.toml");
        Ok(Self {
            executable: prefix.join("bin/pyxis"),
            plugin: prefix.join("lib/spank-pyxis/spank_pyxis.so"),
            plugstack: format!("include {}/share/pyxis/*\n", prefix.display()),
            config,
        })
    }

    /// A second testbed of the same process has a configuration of its own.
    fn of_package(site: &Site) -> Self {
        static IS_CONFIGURED: AtomicBool = AtomicBool::new(false);
        let plugin = PathBuf::from("/usr/lib/spank-pyxis/spank_pyxis.so");
        let (config, plugstack) = if IS_CONFIGURED.swap(true, Ordering::Relaxed) {
            let config = site.path("etc/pyxis.toml");
            let line = format!("required {} config={}\n", plugin.display(), config.display());
            (config, line)
        } else {
            ("/etc/pyxis/pyxis.toml".into(), "include /usr/share/pyxis/*\n".into())
        };
        Self { executable: "/usr/bin/pyxis".into(), plugin, config, plugstack }
    }

    /// Replaces the configuration file.
    pub fn configure(&self, toml: &str) -> Result<()> {
        std::fs::write(&self.config, toml).with_context(|| self.config.display().to_string())
    }
}

/// The configuration that makes the plain-HTTP registry at `host` a mirror of Docker Hub.
pub fn hub_mirror(host: &str) -> String {
    format!("[registry.\"docker.io\"]\nmirrors = [{{ location = \"{host}\", insecure = true }}]\n")
}
