//! A container engine with images of its own: Debian's `dockerd`, without networks.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;
use nix::sys::signal::Signal;
use serde_json::json;

use crate::process::{self, Daemon};
use crate::site::Site;
use crate::users::TestUser;
use crate::wait;

/// A running daemon. Ended when dropped.
#[derive(Debug)]
pub struct Docker {
    socket: PathBuf,
    daemon: Daemon,
}

impl Docker {
    /// Starts a daemon that `user`, and nobody else but root, may talk to.
    pub fn start(site: &Site, user: &TestUser) -> Result<Self> {
        let directory = site.make_directory("state/docker")?;
        let socket = directory.join("docker.sock");
        let config = json!({
            "hosts": [format!("unix://{}", socket.display())],
            "group": user.gid.to_string(),
            "data-root": directory.join("data"),
            "exec-root": directory.join("exec"),
            "pidfile": directory.join("pid"),
            "storage-driver": "vfs",
            "bridge": "none",
            "iptables": false,
            "ip6tables": false,
        });
        let config = site.write("etc/docker.json", config.to_string())?;
        // In namespaces of its own: whatever it starts and mounts ends with it.
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--"]);
        command.arg("dockerd").arg("--config-file").arg(config).env_clear();
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        let daemon = site.daemon("docker", &mut command)?;
        let mut docker = Self { socket, daemon };
        wait::until("docker", wait::DEADLINE, || match docker.daemon.check() {
            Err(error) => Some(Err(error)),
            Ok(()) => process::output_of(docker.command().arg("version")).ok().map(|_| Ok(())),
        })??;
        Ok(docker)
    }

    /// `DOCKER_HOST` for it.
    pub fn host(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// Loads an archive of images.
    pub fn load(&self, archive: &Path) -> Result<()> {
        process::output_of(self.command().args(["load", "--input"]).arg(archive)).map(drop)
    }

    /// Root's `docker`.
    pub fn command(&self) -> Command {
        let mut command = Command::new("docker");
        command.env("DOCKER_HOST", self.host()).env("HOME", "/root");
        command
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        self.daemon.stop(Signal::SIGTERM);
    }
}
