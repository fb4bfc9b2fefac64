//! Furnishing the root filesystem, in enroot's order (behaviour reference, section 14): what mounts for every container,
//! the image's adaptation to user and host, then, with the task's environment, what mounts after the hooks.

use std::borrow::Cow;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::devices::{self, Appeared};
use super::environment::{FromHost, image_file};
use super::oci_hooks::{Furnishing, OciHooks};
use super::plan::{self, Plan};
use super::pmix;
use super::site::Site;
use super::{InitError, Start, step};
use crate::devices::access::DeviceAccess;
use crate::devices::edits::Hook;
use crate::devices::private;
use crate::enroot::{environ, generated, mounts};
use crate::hooks::workspace::Workspace;
use crate::hooks::{self, Call};
use crate::image::config::ImageConfig;
use crate::mounts::apply::{apply, missing_sources};
use crate::mounts::entry::MountEntry;
use crate::mounts::fstab::{self, Fstab, Pass};
use crate::mounts::rootdir::RootDir;
use crate::mounts::unshared;
use crate::request::{Environment, ImageSource};
use crate::rootfs::identity::{HostUser, Login};
use crate::rootfs::{adapt, identity, overlay};
use crate::sys;
use crate::sys::mount::{attach, clone_tree};
use crate::task::UserMessage;

/// Who a container is furnished for, as far as that matters.
pub trait Outside {
    /// Tells the user, or the log.
    fn say(&mut self, message: UserMessage);
    /// Puts this process where the programs it is about to start belong.
    fn enter_task_cgroup(&mut self) -> Result<(), InitError>;
    /// Has NVML asked ([`crate::devices::nvidia::inventory`]); the error is one line.
    fn take_inventory(&mut self, start: &Start<'_>) -> Result<Vec<u8>, String>;
}

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
    more_hooks: Vec<PathBuf>,
    environment: Environment,
    hook_variables: Environment,
    /// OCI hooks that the devices want.
    device_hooks: Vec<Hook>,
    oci_hooks: OciHooks,
    /// Of the container, unless something else gives them a value.
    variables: Vec<(&'static str, Vec<u8>)>,
    gpu_numbers: Vec<(u32, u32)>,
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
        let variable = |name: &str| variables.get(name).map(<[u8]>::to_owned);
        let mut fstab = match image_file(start, RootDir::new(root.as_fd()), "/etc/fstab", fstab::MAX_FILE)? {
            Some(text) => Fstab::parse(&String::from_utf8_lossy(&text), "the image's /etc/fstab", Some(&variable))
                .map_err(|error| InitError::Log(vec![error.to_string()]))?,
            None => Fstab::default(),
        };
        fstab.extend(mounts::read(start.sysconf, &site.user_directory, &variable).map_err(other)?);
        log.append(&mut fstab.warnings);
        Ok(Self {
            start,
            site,
            image,
            host,
            plan,
            root,
            fstab,
            more_hooks: Vec::new(),
            environment: Environment::default(),
            hook_variables: Environment::default(),
            device_hooks: Vec::new(),
            oci_hooks: OciHooks::default(),
            variables: Vec::new(),
            gpu_numbers: Vec::new(),
            log,
        })
    }

    /// Adds mounts and hooks of the command line, which come last.
    pub fn add(&mut self, fstab: Fstab, hooks: Vec<PathBuf>) {
        self.fstab.extend(fstab);
        self.log.append(&mut self.fstab.warnings);
        self.more_hooks.extend(hooks);
    }

    /// The root filesystem as it is now.
    pub fn root(&self) -> RootDir<'_> {
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

    /// What takes the task's environment: the container's own, the hooks, and then the remaining mounts, the image's, the
    /// site's and the user's.
    pub fn with_the_task(
        &mut self,
        task: &Environment,
        refused: &DeviceAccess,
        outside: &mut dyn Outside,
    ) -> Result<(), InitError> {
        self.variables = pmix::share(self.start, self.root(), task, &mut |message| outside.say(message));
        let host = self.site.hook_environment(self.start, task, &rootfs(self.start));
        let from_host = FromHost::read(self.start, self.site, host.clone())?;
        self.environment = from_host.with_image(self.start, self.image, self.root(), &self.plan, task)?;
        self.log.extend(from_host.log);
        let mut hooks = hooks::find(self.start.sysconf, &self.site.user_directory).map_err(other)?;
        if hooks::pytorch::is_asked(self.start.hooks, &hooks) {
            hooks::pytorch::complete(&mut self.environment, task);
        }
        self.log.extend(hooks.skipped);
        hooks.programs.append(&mut self.more_hooks);
        if !hooks.programs.is_empty() {
            outside.enter_task_cgroup()?;
            self.run_hooks(&hooks.programs, host.clone())?;
        }
        self.let_devices_appear(&host, refused, outside)?;
        for volume in self.plan.volumes() {
            keep_writable(self.root(), volume).map_err(|errno| {
                other(format!("cannot mount the image's volume {}: {}", volume.display(), sys::reason(errno)))
            })?;
        }
        let entries: Vec<MountEntry> = self.fstab.of(Pass::AfterHooks).cloned().collect();
        self.mount(&entries)?;
        let entries = std::mem::take(&mut self.plan.user_mounts);
        self.mount(&entries)?;
        self.run_oci_hooks(&host, outside)
    }

    /// When everything is mounted, as runtimes have it.
    fn run_oci_hooks(&mut self, host: &Environment, outside: &mut dyn Outside) -> Result<(), InitError> {
        let (mut hooks, log) = OciHooks::find(self.start, self.image, std::mem::take(&mut self.device_hooks))?;
        self.log.extend(log);
        if hooks.is_empty() {
            return Ok(());
        }
        outside.enter_task_cgroup()?;
        let choices = self.site.choices;
        let container = Furnishing {
            root: &rootfs(self.start),
            is_readonly: !choices.writable,
            remap_root: choices.remap_root,
            environment: &self.environment,
            host,
        };
        let said = hooks.create(self.start, self.image, container)?;
        self.log.extend(said);
        // A hook may have mounted a new root.
        self.enter_topmost();
        self.oci_hooks = hooks;
        Ok(())
    }

    fn run_hooks(&mut self, programs: &[PathBuf], mut environment: Environment) -> Result<(), InitError> {
        let before = environ::to_lines(&self.environment);
        let workspace = Workspace::create(self.start.runtime, &before).map_err(step("hooks"))?;
        workspace.announce(&mut environment);
        let time = Duration::from_secs(self.start.hooks.timeout_seconds.into());
        let calls: Vec<Call<'_>> = programs
            .iter()
            .map(|program| Call {
                program: program.clone(),
                arguments: Vec::new(),
                environment: Cow::Borrowed(&environment),
                input: Vec::new(),
                time,
                limit: "[hooks] timeout_seconds",
                name: program.display().to_string(),
            })
            .collect();
        let said = hooks::run(&calls, &self.start.request.cwd).map_err(|error| {
            InitError::Log(error.log.into_iter().chain([format!("[ERROR] {}", error.reason)]).collect())
        })?;
        self.log.extend(said);
        // A hook may have mounted a new root.
        self.enter_topmost();
        let after = workspace.environ().map_err(step("the hooks' ENROOT_ENVIRON"))?;
        let changed = environ::after_hooks(&self.environment, &before, &after);
        let set = self.environment.changes_to(&changed).filter_map(|(name, value)| Some([name, b"=", value?].concat()));
        self.hook_variables = set.collect();
        self.environment = changed;
        let lines = workspace.mounts().map_err(step("the hooks' ENROOT_MOUNTS"))?;
        let fstab = Fstab::parse(&String::from_utf8_lossy(&lines), "ENROOT_MOUNTS", None)
            .map_err(|error| InitError::Log(vec![error.to_string()]))?;
        self.log.extend(fstab.warnings.iter().cloned());
        self.log.extend(
            fstab
                .of(Pass::BeforeHooks)
                .map(|entry| format!("ENROOT_MOUNTS: never mounted: {}: it is too late for the pass -1", entry.target)),
        );
        let entries: Vec<MountEntry> = fstab.of(Pass::AfterHooks).cloned().collect();
        self.mount(&entries)
    }

    /// After the hooks, which may say what devices are wanted.
    fn let_devices_appear(
        &mut self,
        host: &Environment,
        refused: &DeviceAccess,
        outside: &mut dyn Outside,
    ) -> Result<(), InitError> {
        let environments = (host, &self.environment);
        let Appeared { variables, gpu_numbers, hooks, log } =
            devices::appear(self.start, self.root(), environments, refused, outside)?;
        self.gpu_numbers = gpu_numbers;
        for (name, value) in variables {
            self.environment.set(name.as_str(), value.as_str());
            self.hook_variables.set(name, value);
        }
        self.device_hooks = hooks;
        self.log.extend(log);
        Ok(())
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

    /// What has become of it.
    pub fn finish(mut self, login: &Login) -> Furnished {
        for (name, value) in self.variables {
            self.environment.set_default(name, value);
        }
        self.plan.add_login_defaults(&mut self.environment, login);
        Furnished {
            environment: self.environment,
            hook_variables: self.hook_variables,
            gpu_numbers: self.gpu_numbers,
            oci_hooks: self.oci_hooks,
            root: self.root,
            log: self.log,
        }
    }
}

/// A root filesystem that is ready.
#[derive(Debug)]
pub struct Furnished {
    /// The container's environment.
    pub environment: Environment,
    /// What of it the hooks and the devices have set.
    pub hook_variables: Environment,
    /// See [`ContainerEdits::gpu_numbers`](crate::devices::edits::ContainerEdits::gpu_numbers).
    pub gpu_numbers: Vec<(u32, u32)>,
    /// OCI hooks: some run when its root is the root.
    pub oci_hooks: OciHooks,
    /// Its root.
    pub root: OwnedFd,
    /// For the node's log.
    pub log: Vec<String>,
}

/// Where the root filesystem can be reached before it is the root.
fn rootfs(start: &Start<'_>) -> String {
    overlay::attach_point(start.runtime).to_string_lossy().into_owned()
}

/// Binds `volume` on itself: a mount of its own does not become read-only with the root.
fn keep_writable(root: RootDir<'_>, volume: &Path) -> Result<(), Errno> {
    let directory = root.directory(volume)?;
    let mount = clone_tree(directory.as_fd(), Path::new(""), false)?;
    attach(mount.as_fd(), directory.as_fd())
}
