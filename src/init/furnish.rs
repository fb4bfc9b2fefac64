//! Furnishing the root filesystem, in enroot's order (behaviour reference, section 14): what mounts for every container,
//! the image's adaptation to user and host, then, with the task's environment, what mounts after the hooks.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::plan::{self, Plan};
use super::pmix;
use super::site::Site;
use super::{InitError, Start, step};
use crate::devices::private;
use crate::enroot::{generated, mounts};
use crate::image::config::ImageConfig;
use crate::mounts::apply::{apply, missing_sources};
use crate::mounts::entry::MountEntry;
use crate::mounts::fstab::{Fstab, Pass};
use crate::mounts::rootdir::RootDir;
use crate::mounts::unshared;
use crate::request::{Environment, ImageSource};
use crate::rootfs::identity::{HostUser, Login};
use crate::rootfs::{adapt, identity, overlay};
use crate::sys;
use crate::sys::mount::{attach, clone_tree};
use crate::task::UserMessage;

/// A container's root filesystem while it is being furnished.
#[derive(Debug)]
pub struct Furnisher<'a> {
    start: &'a Start<'a>,
    site: &'a Site,
    image: &'a ImageConfig,
    host: &'a HostUser,
    plan: Plan,
    root: OwnedFd,
    fstab: Fstab,
    /// Of the container, unless the image has them.
    variables: Vec<(&'static str, Vec<u8>)>,
    /// For the node's log.
    log: Vec<String>,
}

fn other(error: impl ToString) -> InitError {
    InitError::Other(error.to_string())
}

impl<'a> Furnisher<'a> {
    /// Plans everything that can be planned without the task's environment, and fails at once for a mount that cannot be.
    pub fn new(
        start: &'a Start<'a>,
        site: &'a Site,
        image: &'a ImageConfig,
        host: &'a HostUser,
        root: OwnedFd,
    ) -> Result<Self, InitError> {
        let plan = Plan::new(start.request, start.environment, image, host, site.choices).map_err(other)?;
        if let Some(path) = missing_sources(&plan.user_mounts).into_iter().next() {
            return Err(InitError::MissingSource(path));
        }
        let mut log = site.conf.warnings.clone();
        let variables = site.hook_environment(start, start.environment, &rootfs(start));
        let mut fstab =
            mounts::read(start.sysconf, &site.user_directory, &|name| text(&variables, name)).map_err(other)?;
        log.append(&mut fstab.warnings);
        Ok(Self { start, site, image, host, plan, root, fstab, variables: Vec::new(), log })
    }

    fn root(&self) -> RootDir<'_> {
        RootDir::new(self.root.as_fd())
    }

    /// What needs no task: the mounts before the hooks, names, time zone.
    pub fn before_the_task(&mut self) -> Result<Login, InitError> {
        let entries: Vec<MountEntry> = self.fstab.of(Pass::BeforeHooks).cloned().collect();
        self.mount(&entries)?;
        let choices = self.site.choices;
        if choices.unshare.net {
            unshared::mount_sysfs(self.root()).map_err(other)?;
        }
        if choices.restrict_dev {
            private::mount(self.root(), choices.unshare.ipc).map_err(other)?;
        }
        let remap_root = self.site.choices.remap_root;
        let login = identity::write(self.root(), &self.start.request.user, self.host, remap_root)
            .map_err(step("/etc/passwd"))?;
        adapt::copy_time_zone(self.root()).map_err(step("/etc/localtime"))?;
        if remap_root {
            adapt::let_apt_stay_root(self.root()).map_err(step("/etc/apt/apt.conf.d/enroot"))?;
        }
        let workdir = plan::workdir(self.image);
        adapt::make_working_directory(self.root(), &workdir).map_err(|errno| {
            other(format!("cannot make the image's working directory {workdir}: {}", sys::reason(errno)))
        })?;
        let request = self.start.request;
        let kept = request.save.is_some() || request.name.is_some();
        if kept && !self.start.image_config.is_empty() {
            let source = request.image.as_ref().map(|image| match image {
                ImageSource::Registry { reference, .. } => format!("docker://{reference}"),
                ImageSource::Local { typed, .. } => typed.clone(),
                ImageSource::File(path) => path.display().to_string(),
            });
            generated::write(self.root(), self.image, source.as_deref()).map_err(step("/etc/rc"))?;
        }
        let home = self.plan.home_mount.take();
        self.mount(home.as_slice())?;
        Ok(login)
    }

    /// What needs the task's environment, and what comes after it: the remaining mounts, the image's, the site's and the
    /// user's.
    pub fn with_the_task(&mut self, task: &Environment, say: &mut dyn FnMut(UserMessage)) -> Result<(), InitError> {
        self.variables = pmix::share(self.start, self.root(), task, say);
        for volume in self.plan.volumes() {
            keep_writable(self.root(), volume).map_err(|errno| {
                other(format!("cannot mount the image's volume {}: {}", volume.display(), sys::reason(errno)))
            })?;
        }
        let entries: Vec<MountEntry> = self.fstab.of(Pass::AfterHooks).cloned().collect();
        self.mount(&entries)?;
        let entries = std::mem::take(&mut self.plan.user_mounts);
        self.mount(&entries)
    }

    fn mount(&mut self, entries: &[MountEntry]) -> Result<(), InitError> {
        for entry in entries {
            let tolerated = apply(self.root(), &self.start.request.cwd, entry)
                .map_err(|error| InitError::Log(vec![error.to_string()]))?;
            self.log.extend(tolerated.map(|error| error.to_string()));
            if Path::new(&entry.target).components().all(|part| matches!(part, std::path::Component::RootDir)) {
                self.enter_topmost();
            }
        }
        Ok(())
    }

    /// What was mounted on `/` is what the task shall see: go there.
    fn enter_topmost(&mut self) {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if let Ok(root) = rustix::fs::open(overlay::attach_point(self.start.runtime), flags, Mode::empty()) {
            self.root = root;
        }
    }

    /// The container's environment, its root, and what is to be logged.
    pub fn finish(self, login: &Login) -> (Environment, OwnedFd, Vec<String>) {
        let mut environment = self.plan.environment(self.image, login);
        for (name, value) in self.variables {
            environment.set_default(name, value);
        }
        (environment, self.root, self.log)
    }
}

/// Where the root filesystem can be reached before it is the root.
fn rootfs(start: &Start<'_>) -> String {
    overlay::attach_point(start.runtime).to_string_lossy().into_owned()
}

fn text(environment: &Environment, name: &str) -> Option<String> {
    environment.get(name).map(|value| String::from_utf8_lossy(value).into_owned())
}

/// Binds `volume` on itself: a mount of its own does not become read-only with the root.
fn keep_writable(root: RootDir<'_>, volume: &Path) -> Result<(), Errno> {
    let directory = root.directory(volume)?;
    let mount = clone_tree(directory.as_fd(), Path::new(""), false)?;
    attach(mount.as_fd(), directory.as_fd())
}
