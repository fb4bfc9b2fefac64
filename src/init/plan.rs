//! What goes into a container, computed from the request, the site's settings and the image: plain data.

use std::path::Path;

use super::site::Choices;
use crate::image::config::ImageConfig;
use crate::mounts::entry::{InvalidEntry, MountEntry};
use crate::request::{Environment, StepRequest};
use crate::rootfs::identity::{HostUser, Login};

/// What execvp(3) would search without `PATH`, as container tools have it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The mounts of one container and what its environment is made from.
#[derive(Debug)]
pub struct Plan {
    /// The home directory, if it is to be mounted.
    pub home_mount: Option<MountEntry>,
    /// Batch script and `--container-mounts`, in order: the last mounts of all.
    pub user_mounts: Vec<MountEntry>,
    volumes: Vec<String>,
    /// `HOME`, if it is the host's.
    home: Option<String>,
    user_name: String,
}

impl Plan {
    /// Plans a container.
    pub fn new(
        request: &StepRequest,
        environment: &Environment,
        image: &ImageConfig,
        host: &HostUser,
        choices: Choices,
    ) -> Result<Self, InvalidEntry> {
        let mut user_mounts = Vec::new();
        let (mut home, mut home_mount) = (None, None);
        if choices.mount_home {
            let source = environment.get_str("HOME").unwrap_or(&host.home);
            let target = if choices.remap_root { "/root" } else { source };
            let options = ["x-create=dir", "rbind", "rw", "nosuid"];
            home_mount = Some(MountEntry::new(source, target, options.into_iter())?);
            home = Some(target.to_owned());
        }
        if let Some(script) = &request.batch_script {
            let script = script.to_string_lossy();
            let options = ["x-create=file", "bind", "ro", "nosuid", "nodev", "private"];
            user_mounts.push(MountEntry::new(&script, &script, options.into_iter())?);
        }
        for spec in &request.mounts {
            user_mounts.push(MountEntry::try_from(spec)?);
        }
        Ok(Self { home_mount, user_mounts, volumes: image.volumes.clone(), home, user_name: host.name.clone() })
    }

    /// The image's volumes: they stay writable when the root becomes read-only.
    pub fn volumes(&self) -> impl Iterator<Item = &Path> {
        self.volumes.iter().map(Path::new).filter(|volume| *volume != Path::new("/"))
    }

    /// `HOME`, if it is the host's.
    pub fn add_home(&self, environment: &mut Environment) {
        if let Some(home) = &self.home {
            environment.set("HOME", home.as_str());
        }
    }

    /// What a login would set, for what is not set (behaviour reference, section 16.3).
    pub fn add_login_defaults(&self, environment: &mut Environment, login: &Login) {
        environment.set_default("HOME", login.home.as_str());
        environment.set_default("USER", login.user.as_str());
        environment.set_default("LOGNAME", self.user_name.as_str());
        environment.set_default("SHELL", login.shell.as_str());
        environment.set_default("PATH", DEFAULT_PATH);
    }
}

/// The image's working directory, `/` if it names none or a relative one.
pub fn workdir(image: &ImageConfig) -> String {
    match image.working_dir.starts_with('/') {
        true => image.working_dir.clone(),
        false => "/".to_owned(),
    }
}
