//! The plugin and the executable under test, installed as `make install` does it.

use std::path::{Path, PathBuf};
use std::process::Command;

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
    /// Installs `build` in `site`. Docker Hub is what the registry `hub` holds.
    pub fn create(site: &Site, build: &Build, hub: &Registry) -> Result<Self> {
        users::ensure_service_user()?;
        let prefix = site.path("install");
        let mut make = Command::new("make");
        make.arg("--directory").arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).args(["--silent", "install"]);
        for (name, value) in [("PREFIX", &prefix), ("PLUGIN", &build.plugin), ("EXECUTABLE", &build.executable)] {
            make.arg(format!("{name}={}", value.display()));
        }
        process::output_of(make.env_remove("MAKEFLAGS").env_remove("MAKELEVEL")).context("make install")?;
        let config = prefix.join("etc/pyxis/pyxis.toml");
        let installation = Self {
            executable: prefix.join("bin/pyxis"),
            plugin: prefix.join("lib/spank-pyxis/spank_pyxis.so"),
            plugstack: format!("include {}/share/pyxis/*\n", prefix.display()),
            config,
        };
        installation.configure(&hub_mirror(&hub.host()))?;
        Ok(installation)
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
