//! Container init: the process that builds a container around itself, as the job's user, and then keeps it alive.
//!
//! Forked by the broker. It is root for as long as it takes to attach the root filesystem in a mount namespace; everything
//! that comes from the user or from the image happens after it has become the user for good. Afterwards it is a paused
//! process without capabilities that holds the namespaces, for tasks that join late, and the leases of the layers, and
//! ends when the life pipe hangs up. It runs no user code and is no rank's child.

pub mod alone;
pub mod attach;
mod devices;
mod entrypoint;
mod environment;
mod furnish;
mod hook_variables;
mod oci_hooks;
mod plan;
mod pmix;
pub mod protocol;
mod site;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::Pid;
use rustix::thread::{CapabilitySet, LinkNameSpaceType, UnshareFlags};

use crate::config::{ContainerSettings, HookSettings};
use crate::devices::access::DeviceAccess;
use crate::devices::host::Host;
use crate::devices::nvidia::inventory;
use crate::devices::settings::DeviceSettings;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::mounts::rootdir::RootDir;
use crate::namespaces;
use crate::request::{Environment, StepRequest};
use crate::rootfs::identity::HostUser;
use crate::rootfs::{cgroups, overlay, squashfuse};
use crate::store::LeasedLayer;
use crate::sys::channel::Channel;
use crate::sys::mount::{
    Attributes, MountError, attach_at, attach_changed, clone_tree, set_attributes, set_attributes_at,
};
use crate::sys::process::{
    become_user_keeping, block_all_signals, close_all_but, die_with_parent, exit_now, set_capabilities,
};
use crate::sys::{self, memfile};
use crate::task::UserMessage;
use crate::task::protocol::{Entrypoint, MAX_MEMORY_FILE};
use crate::unpacked::furnishing;
use entrypoint::Probe;
use furnish::{Furnished, Furnisher, Outside};
use protocol::{FromInit, ToInit};
use site::Site;

/// What init knows from the beginning.
#[derive(Debug)]
pub struct Start<'a> {
    /// What the user asked for.
    pub request: &'a StepRequest,
    /// The job's environment.
    pub environment: &'a Environment,
    /// The image's config, not yet parsed: that is done as the user. Empty for a root filesystem that has none, and which
    /// files of enroot's describe (`/etc/rc`).
    pub image_config: &'a [u8],
    /// Digest of the image's manifest, if it has one.
    pub image_digest: Option<Digest>,
    /// The site's defaults.
    pub settings: &'a ContainerSettings,
    /// `/etc/enroot`.
    pub sysconf: &'a Path,
    /// Bounds of hooks.
    pub hooks: &'a HookSettings,
    /// What of the node's hardware appears.
    pub devices: &'a DeviceSettings,
    /// Whether other containers may have the same root filesystem.
    pub root_is_shared: bool,
    /// `/run/pyxis`.
    pub runtime: &'a Path,
    /// The process that forked this one.
    pub broker: Pid,
    /// The leading task.
    pub leader: i32,
}

/// Why a container cannot be built.
#[derive(Debug, thiserror::Error)]
enum InitError {
    /// A step that fails only if the kernel or the host refuses it.
    #[error("{what}: {}", sys::reason(.cause))]
    Step { what: &'static str, cause: io::Error },
    /// The image or a mount: the text says it all.
    #[error("{0}")]
    Other(String),
    /// Lines that are complete as they are: of `enroot-mount`, of a hook.
    #[error("{}", .0.join("\n"))]
    Log(Vec<String>),
    /// Mounts whose source is not there, in pyxis's words.
    #[error("--container-mounts: source path does not exist: {}", .0.display())]
    MissingSource(PathBuf),
    /// The running container that was to be joined has ended.
    #[error("the container has ended")]
    Gone,
    /// The broker has ended, and with it the reason to go on.
    #[error("the broker has ended")]
    Abandoned,
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> InitError {
    move |error| InitError::Step { what, cause: error.into() }
}

/// Builds the container, says so, and keeps it until `life` hangs up. Never returns.
pub fn run(start: &Start<'_>, channel: Channel<FromInit, ToInit>, life: &OwnedFd, leases: Vec<LeasedLayer>) -> ! {
    let ready = begin(&channel, life, &leases, &[]).and_then(|()| build(start, &channel));
    stay(ready, channel, life, leases)
}

/// What every container init does first: it keeps nothing of the broker's but these descriptors.
fn begin(
    channel: &Channel<FromInit, ToInit>,
    life: &OwnedFd,
    leases: &[LeasedLayer],
    also: &[BorrowedFd<'_>],
) -> Result<(), InitError> {
    // The step's signals are for its tasks.
    block_all_signals();
    let _ = rustix::thread::set_name(c"pyxis-init");
    // The user may trace this process later: it has nothing of the broker's but what it needs. The standard streams are
    // the task's own until the end.
    let mut kept = vec![channel.as_fd(), life.as_fd()];
    kept.extend(leases.iter().map(|layer| layer.file.as_fd()));
    kept.extend([rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()]);
    kept.extend(also);
    close_all_but(&kept).map_err(step("close descriptors"))
}

/// Says that the container can be joined, and keeps it until `life` hangs up.
fn stay(
    ready: Result<Ready, InitError>,
    channel: Channel<FromInit, ToInit>,
    life: &OwnedFd,
    leases: Vec<LeasedLayer>,
) -> ! {
    let told =
        ready.and_then(|Ready { workdir, environment, entrypoint, cgroup_namespace, hook_variables, gpu_numbers }| {
            forget_the_outside().map_err(step("standard streams"))?;
            let (entrypoint, probe) = entrypoint.unzip();
            let mut descriptors = vec![environment.as_fd()];
            descriptors.extend(probe.as_ref().map(|probe| probe.report.as_fd()));
            channel
                .send(&FromInit::Ready { workdir, entrypoint, cgroup_namespace, gpu_numbers }, &descriptors)
                .map_err(|_| InitError::Abandoned)?;
            Ok((probe, hook_variables))
        });
    match told {
        Ok(kept) => {
            drop(channel);
            pause(life);
            drop((leases, kept));
            exit_now(0)
        }
        Err(InitError::Gone) => {
            let _ = channel.send(&FromInit::Gone, &[]);
            exit_now(1)
        }
        Err(error) => {
            let _ = channel.send(&FromInit::Failed { messages: messages(&error) }, &[]);
            exit_now(1)
        }
    }
}

fn messages(error: &InitError) -> Vec<UserMessage> {
    let log = match error {
        InitError::MissingSource(_) => return vec![UserMessage::error(error)],
        InitError::Log(lines) => lines.clone(),
        _ => vec![format!("[ERROR] {error}")],
    };
    ["container start failed with error code: 1".to_owned(), "printing enroot log file:".to_owned()]
        .into_iter()
        .chain(log.into_iter().map(|line| format!("    {line}")))
        .map(UserMessage::error)
        .collect()
}

struct Ready {
    workdir: String,
    environment: File,
    entrypoint: Option<(Entrypoint, Probe)>,
    /// See [`FromInit::Ready`].
    cgroup_namespace: Option<bool>,
    /// Kept for steps that join later: hooks do not run for them.
    hook_variables: Option<File>,
    /// See [`FromInit::Ready`].
    gpu_numbers: Vec<(u32, u32)>,
}

fn build(start: &Start<'_>, channel: &Channel<FromInit, ToInit>) -> Result<Ready, InitError> {
    let request = start.request;

    // As root: the overlay is attached in a mount namespace, so that the copy of it in the user's own one is locked:
    // nosuid, nodev and the like cannot be taken off even by a remapped root.
    die_with_parent(start.broker).map_err(step("container init"))?;
    // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("mount namespace"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("mount propagation"))?;
    let host = HostUser::look_up(&request.user, start.environment);
    let root = receive_root(channel)?;
    let attached = overlay::attach_point(start.runtime);
    if let Root::Mount(overlay) = &root {
        attach_at(overlay.as_fd(), &attached).map_err(step("attach the root filesystem"))?;
        // That of a running container may have been made read-only there.
        let writable = Attributes { clear: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
        set_attributes(overlay.as_fd(), &writable).map_err(step("attach the root filesystem"))?;
    }
    rustix::process::chdir(&attached).map_err(step("enter the root filesystem"))?;

    // From here on as the user, in namespaces of his own. To map root's uid, if he is root, takes one capability more
    // (user_namespaces(7)).
    let mut kept = CapabilitySet::SYS_ADMIN;
    kept.set(CapabilitySet::SETFCAP, request.user.uid == 0);
    become_user_keeping(&request.user, kept).map_err(step("become the job's user"))?;
    let site = Site::load(start, &host)?;
    namespaces::enter_container(&request.user, site.choices.remap_root).map_err(step("user namespace"))?;
    namespaces::unshare(site.choices.unshare).map_err(|(what, cause)| InitError::Step { what, cause })?;
    // Changing the uid has cleared it.
    die_with_parent(start.broker).map_err(step("container init"))?;
    channel.send(&FromInit::Started, &[]).map_err(|_| InitError::Abandoned)?;

    let mut hardened = Attributes::default();
    let (root, lock) = match root {
        // A locked mount cannot become the root; a bind of it on itself can.
        Root::Mount(_) => {
            (clone_tree(CWD.as_fd(), Path::new("."), false).map_err(step("bind the root filesystem"))?, None)
        }
        Root::Squashfuse => (mount_over_fuse(start, channel, site.choices.remap_root)?, None),
        Root::Tree(path) => {
            hardened.set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
            bind_tree(&path)?
        }
    };
    let harden = || set_attributes(root.as_fd(), &hardened);
    attach_changed(root.as_fd(), harden, || attach_at(root.as_fd(), Path::new(".")))
        .map_err(step("bind the root filesystem"))?;
    rustix::process::fchdir(&root).map_err(step("enter the root filesystem"))?;

    let image = ImageConfig::of_root(start.image_config).map_err(|error| InitError::Other(error.to_string()))?;
    let mut furnisher = Furnisher::new(start, &site, &image, &host, root)?;
    let login = furnisher.before_the_task()?;
    // From here on with the task's environment, and the task is in its cgroups.
    let proceed = receive_proceed(channel)?;
    furnisher.with_the_task(&proceed.environment, &proceed.devices, &mut &*channel)?;
    let Furnished { environment, hook_variables, gpu_numbers, oci_hooks, root, log } = furnisher.finish(&login);
    drop(lock);
    for line in log {
        let line = UserMessage::Log(format!("pyxis: {line}"));
        channel.send(&FromInit::Say(line), &[]).map_err(|_| InitError::Abandoned)?;
    }
    rustix::process::fchdir(&root).map_err(step("enter the root filesystem"))?;
    pivot().map_err(step("pivot_root"))?;
    let image_or_rc = (!start.image_config.is_empty()).then_some(&image);
    if image_or_rc.is_none() && !request.entrypoint {
        entrypoint::override_rc_local(RootDir::new(root.as_fd()))
            .map_err(|error| InitError::Other(error.to_string()))?;
    }
    let entrypoint = entrypoint::plan(start, image_or_rc, &site.conf, RootDir::new(root.as_fd()));

    // Inside the cgroup namespace the task's cgroup would be the root, and the step's out of sight.
    cgroups::show_own_subtree(start.leader, request.step.is_some());
    if let Some(namespace) = proceed.cgroup_namespace {
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ControlGroup))
            .map_err(step("cgroup namespace"))?;
    }
    if !site.choices.writable {
        let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
        set_attributes_at(Path::new("/"), &attributes).map_err(step("make the root filesystem read-only"))?;
    }
    for line in oci_hooks.start(start, &environment)? {
        let line = UserMessage::Log(format!("pyxis: {line}"));
        channel.send(&FromInit::Say(line), &[]).map_err(|_| InitError::Abandoned)?;
    }
    let environment = memfile::sealed("pyxis-environment", &environment.to_block()).map_err(step("environment"))?;
    let entrypoint = Probe::of(entrypoint).map_err(step("entrypoint"))?;
    let hook_variables = hook_variables::keep(&hook_variables).map_err(step("environment"))?;
    Ok(Ready {
        workdir: plan::workdir(&image),
        environment,
        entrypoint,
        cgroup_namespace: None,
        hook_variables,
        gpu_numbers,
    })
}

/// Where the root filesystem comes from.
enum Root {
    /// The broker has mounted it.
    Mount(OwnedFd),
    /// It is to be made in the user's namespaces, over a FUSE server.
    Squashfuse,
    /// It is a directory of the user's.
    Tree(PathBuf),
}

fn receive_root(channel: &Channel<FromInit, ToInit>) -> Result<Root, InitError> {
    match channel.receive().map_err(step("broker"))? {
        Some((ToInit::Root, mut descriptors)) => descriptors.pop().map(Root::Mount).ok_or(InitError::Abandoned),
        Some((ToInit::Squashfuse, _)) => Ok(Root::Squashfuse),
        Some((ToInit::Tree { path }, _)) => Ok(Root::Tree(path)),
        _ => Err(InitError::Abandoned),
    }
}

/// As the user, in his namespaces: he gets nothing that he does not have. With the lock that keeps others from furnishing
/// it at the same time.
fn bind_tree(path: &Path) -> Result<(OwnedFd, Option<OwnedFd>), InitError> {
    let lock = furnishing::lock(path).map_err(|reason| InitError::Other(reason.into()))?;
    clone_tree(CWD.as_fd(), path, true)
        .map(|tree| (tree, lock))
        .map_err(|errno| InitError::Other(format!("cannot use {}: {}", path.display(), sys::reason(errno))))
}

fn mount_over_fuse(
    start: &Start<'_>,
    channel: &Channel<FromInit, ToInit>,
    remap_root: bool,
) -> Result<OwnedFd, InitError> {
    let user = &start.request.user;
    let owner = if remap_root { (0, 0) } else { (user.uid, user.gid) };
    let size = start.settings.scratch_size.as_deref();
    squashfuse::mount(owner, size, &overlay::attach_point(start.runtime), |device| {
        channel.send(&FromInit::Squashfuse { owner }, &[device.as_fd()]).map_err(|_| InitError::Abandoned)
    })
}

impl From<MountError> for InitError {
    fn from(error: MountError) -> Self {
        Self::Other(format!("cannot make the root filesystem: {error}"))
    }
}

/// Makes the working directory the root of the namespace and lets go of everything else.
fn pivot() -> io::Result<()> {
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

/// A step's task, behind the broker.
impl Outside for &Channel<FromInit, ToInit> {
    fn say(&mut self, message: UserMessage) {
        // Who cannot be told has ended, and so will this process.
        let _ = self.send(&FromInit::Say(message), &[]);
    }

    /// Has the broker move this process to the task's cgroups: to do that itself it lacks the right. Takes some
    /// milliseconds.
    fn enter_task_cgroup(&mut self) -> Result<(), InitError> {
        self.send(&FromInit::WantTaskCgroup, &[]).map_err(|_| InitError::Abandoned)?;
        match self.receive().map_err(step("broker"))? {
            Some((ToInit::InTaskCgroup, _)) => Ok(()),
            _ => Err(InitError::Abandoned),
        }
    }

    fn take_inventory(&mut self, start: &Start<'_>) -> Result<Vec<u8>, String> {
        self.send(&FromInit::WantInventory, &[]).map_err(sys::reason)?;
        match self.receive().map_err(sys::reason)? {
            Some((ToInit::Inventory { problem: None }, _)) => {
                Host::default().read(inventory::path(start.runtime), inventory::MAX_FILE).map_err(sys::reason)
            }
            Some((ToInit::Inventory { problem: Some(problem) }, _)) => Err(problem),
            _ => Err("the broker has ended".into()),
        }
    }
}

/// What the leading task sends when it is in its cgroups.
struct Proceed {
    environment: Environment,
    /// What the cgroups keep it from.
    devices: DeviceAccess,
    cgroup_namespace: Option<OwnedFd>,
}

fn receive_proceed(channel: &Channel<FromInit, ToInit>) -> Result<Proceed, InitError> {
    let Some((ToInit::Proceed { cgroup_namespace, devices }, descriptors)) =
        channel.receive().map_err(step("broker"))?
    else {
        return Err(InitError::Abandoned);
    };
    let mut descriptors = descriptors.into_iter();
    let file = descriptors.next().ok_or(InitError::Abandoned)?;
    let block = memfile::read_all(file, MAX_MEMORY_FILE).map_err(step("task environment"))?;
    Ok(Proceed {
        environment: Environment::from_block(&block),
        devices,
        cgroup_namespace: descriptors.next().filter(|_| cgroup_namespace),
    })
}

/// Holds neither a capability, nor the step's output, nor the broker's life any more.
fn forget_the_outside() -> io::Result<()> {
    set_capabilities(CapabilitySet::empty())?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .or_else(|_| rustix::fs::memfd_create("null", rustix::fs::MemfdFlags::CLOEXEC))?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::process::set_parent_process_death_signal(None)?;
    Ok(())
}

/// Until nobody holds the write end of the life pipe.
fn pause(life: &OwnedFd) {
    loop {
        let mut descriptors = [PollFd::new(life, PollFlags::empty())];
        match rustix::event::poll(&mut descriptors, None) {
            Err(rustix::io::Errno::INTR) => {}
            _ if descriptors[0].revents().is_empty() => {}
            _ => return,
        }
    }
}
