//! What the site and the user have configured for every container in enroot's files, read as the user, and what follows
//! from it together with the options and our own configuration.

use std::path::PathBuf;

use super::{InitError, Start};
use crate::enroot::conf::{EnrootConf, Identity, of_job};
use crate::request::{Environment, Unshare};
use crate::rootfs::identity::HostUser;

/// Each is what the option says, else the job's environment or `enroot.conf`, else `pyxis.toml`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choices {
    /// `--container-remap-root`.
    pub remap_root: bool,
    /// `--container-writable`.
    pub writable: bool,
    /// `--container-mount-home`.
    pub mount_home: bool,
    /// Whether `/dev` is the container's own: the administrator's or the user's wish, or due to an IPC namespace.
    pub restrict_dev: bool,
    /// `--container-unshare`, and what the administrator unshares for everybody.
    pub unshare: Unshare,
}

/// The settings that hold for a container.
#[derive(Debug)]
pub struct Site {
    /// `enroot.conf`, evaluated.
    pub conf: EnrootConf,
    /// What follows.
    pub choices: Choices,
    /// `ENROOT_CONFIG_PATH`.
    pub user_directory: PathBuf,
}

impl Site {
    /// Evaluates the settings. The caller is the user already.
    pub fn load(start: &Start<'_>, host: &HostUser) -> Result<Self, InitError> {
        let user = &start.request.user;
        let identity = Identity {
            uid: user.uid,
            gid: user.gid,
            name: host.name.clone(),
            group: host.group.clone(),
            home: host.home.clone(),
            cwd: start.request.cwd.clone(),
        };
        let conf = EnrootConf::load(start.sysconf, &of_job(start.environment), &identity)
            .map_err(|error| InitError::Other(error.to_string()))?;
        let (request, settings) = (start.request, start.settings);
        let unshare = Unshare {
            net: request.unshare.net || conf.unshare("net"),
            ipc: request.unshare.ipc || conf.unshare("ipc"),
            uts: request.unshare.uts || conf.unshare("uts"),
        };
        let choices = Choices {
            remap_root: request.remap_root.or_else(|| conf.remap_root()).unwrap_or(settings.remap_root),
            writable: request.writable.or_else(|| conf.rootfs_writable()).unwrap_or(settings.writable),
            mount_home: request.mount_home.or_else(|| conf.mount_home()).unwrap_or(settings.mount_home),
            restrict_dev: unshare.ipc || settings.restrict_dev || conf.restrict_dev(),
            unshare,
        };
        let user_directory = start.request.cwd.join(conf.config_path());
        Ok(Self { conf, choices, user_directory })
    }

    /// The environment of what runs on the host for the container (behaviour reference, sections 7.1 and 17): `task`'s,
    /// the settings, and what enroot's hooks are told. `rootfs` is where the container's root can be reached.
    pub fn hook_environment(&self, start: &Start<'_>, task: &Environment, rootfs: &str) -> Environment {
        let mut environment = self.conf.environment_over(of_job(task));
        let user = &start.request.user;
        environment.set("SLURM_JOB_UID", user.uid.to_string());
        environment.set("SLURM_JOB_GID", user.gid.to_string());
        environment.set("PYXIS_RUNTIME_PATH", start.runtime.to_string_lossy().as_bytes());
        environment.set("PYXIS_VERSION", env!("CARGO_PKG_VERSION"));
        for (name, on) in [
            ("ENROOT_REMAP_ROOT", self.choices.remap_root),
            ("ENROOT_ROOTFS_WRITABLE", self.choices.writable),
            ("ENROOT_MOUNT_HOME", self.choices.mount_home),
            ("ENROOT_UNSHARE_NET", self.choices.unshare.net),
            ("ENROOT_UNSHARE_IPC", self.choices.unshare.ipc),
            ("ENROOT_UNSHARE_UTS", self.choices.unshare.uts),
        ] {
            match on {
                true => environment.set(name, "y"),
                false => environment.remove(name),
            }
        }
        for (name, path) in [
            ("ENROOT_SYSCONF_PATH", start.sysconf.to_owned()),
            ("ENROOT_CONFIG_PATH", self.user_directory.clone()),
            ("ENROOT_CACHE_PATH", self.conf.cache_path()),
            ("ENROOT_DATA_PATH", self.conf.data_path()),
            ("ENROOT_TEMP_PATH", self.conf.temp_path()),
        ] {
            environment.set(name, path.to_string_lossy().as_bytes());
        }
        environment.set("ENROOT_ROOTFS", rootfs);
        environment.set("ENROOT_PID", rustix::process::getpid().as_raw_nonzero().to_string());
        environment
    }
}
