//! Ordinary users, and commands run as one of them.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::User;

use crate::process;

/// The service identity of the importer.
pub const SERVICE_USER: &str = "pyxis";

/// An ordinary user of the machine.
#[derive(Debug, Clone)]
pub struct TestUser {
    /// Login name.
    pub name: String,
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Home directory.
    pub home: PathBuf,
}

impl TestUser {
    /// The user `pyxis-test-NUMBER`, who is created if he does not exist.
    pub fn get(number: usize) -> Result<Self> {
        let name = format!("pyxis-test-{number}");
        let user = ensure(&name, &["--create-home", "--key", "HOME_MODE=0755", "--shell", "/bin/bash"])?;
        Ok(Self { name, uid: user.uid.as_raw(), gid: user.gid.as_raw(), home: user.dir })
    }

    /// A command that runs as this user in the home directory, with the environment of a fresh login and nothing else.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("setpriv");
        command
            .args(["--reuid", &self.uid.to_string(), "--regid", &self.gid.to_string(), "--init-groups", "--"])
            .arg(program)
            .env_clear()
            .env("HOME", &self.home)
            .env("USER", &self.name)
            .env("LOGNAME", &self.name)
            .env("SHELL", "/bin/bash")
            .env("PATH", "/usr/local/bin:/usr/bin:/bin")
            .current_dir(&self.home);
        command
    }

    /// Makes `path` this user's.
    pub fn own(&self, path: &Path) -> Result<()> {
        std::os::unix::fs::lchown(path, Some(self.uid), Some(self.gid)).with_context(|| path.display().to_string())
    }
}

/// Creates the service identity of the importer if it does not exist.
pub fn ensure_service_user() -> Result<()> {
    ensure(
        SERVICE_USER,
        &["--system", "--no-create-home", "--home-dir", "/nonexistent", "--shell", "/usr/sbin/nologin"],
    )
    .map(drop)
}

fn ensure(name: &str, options: &[&str]) -> Result<User> {
    if let Some(user) = User::from_name(name)? {
        return Ok(user);
    }
    process::output_of(Command::new("/usr/sbin/useradd").args(options).arg(name))?;
    User::from_name(name)?.with_context(|| format!("useradd did not create {name}"))
}
