//! Container init: the process that builds a container around itself, as the job's user, and then keeps it alive.
//!
//! Forked by the broker. It is root for as long as it takes to attach the root filesystem in a mount namespace; everything
//! that comes from the user or from the image happens after it has become the user for good. Afterwards it is a paused
//! process without capabilities that holds the namespaces, for tasks that join late, and the leases of the layers, and
//! ends when the life pipe hangs up. It runs no user code and is no rank's child.

mod plan;
pub mod protocol;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, UnmountFlags};
use rustix::process::Pid;
use rustix::thread::{CapabilitySet, LinkNameSpaceType, UnshareFlags};

use crate::config::ContainerSettings;
use crate::image::config::ImageConfig;
use crate::mounts::apply::{apply, missing_sources};
use crate::mounts::rootdir::RootDir;
use crate::mounts::unshared;
use crate::namespaces;
use crate::request::{Environment, StepRequest};
use crate::rootfs::identity::HostUser;
use crate::rootfs::{adapt, cgroups, identity, overlay};
use crate::store::LeasedLayer;
use crate::sys::channel::Channel;
use crate::sys::mount::{Attributes, attach, attach_at, clone_tree, set_attributes};
use crate::sys::process::{
    become_user_keeping, block_all_signals, close_all_but, die_with_parent, exit_now, set_capabilities,
};
use crate::sys::{self, memfile};
use crate::task::UserMessage;
use plan::Plan;
use protocol::{FromInit, ToInit};

/// What init knows from the beginning.
#[derive(Debug)]
pub struct Start<'a> {
    /// What the user asked for.
    pub request: &'a StepRequest,
    /// The job's environment.
    pub environment: &'a Environment,
    /// The image's config, not yet parsed: that is done as the user.
    pub image_config: &'a [u8],
    /// The site's defaults.
    pub settings: &'a ContainerSettings,
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
    /// Mounts whose source is not there, in pyxis's words.
    #[error("--container-mounts: source path does not exist: {}", .0.display())]
    MissingSource(PathBuf),
    /// The broker has ended, and with it the reason to go on.
    #[error("the broker has ended")]
    Abandoned,
}

fn step<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> InitError {
    move |error| InitError::Step { what, cause: error.into() }
}

/// Builds the container, says so, and keeps it until `life` hangs up. Never returns.
pub fn run(start: &Start<'_>, channel: Channel<FromInit, ToInit>, life: OwnedFd, leases: Vec<LeasedLayer>) -> ! {
    // The step's signals are for its tasks.
    block_all_signals();
    let _ = rustix::thread::set_name(c"pyxis-init");
    // The user may trace this process later: it has nothing of the broker's but what it needs. The standard streams are
    // the task's own until the end.
    let mut kept = vec![channel.as_fd(), life.as_fd()];
    kept.extend(leases.iter().map(|layer| layer.file.as_fd()));
    kept.extend([rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()]);
    let built = close_all_but(&kept).map_err(step("close descriptors")).and_then(|()| build(start, &channel)).and_then(
        |ready| {
            forget_the_outside().map_err(step("standard streams"))?;
            channel
                .send(&FromInit::Ready { workdir: ready.workdir }, &[ready.environment.as_fd()])
                .map_err(|_| InitError::Abandoned)
        },
    );
    match built {
        Ok(()) => {
            drop(channel);
            pause(&life);
            drop(leases);
            exit_now(0)
        }
        Err(error) => {
            let _ = channel.send(&FromInit::Failed { messages: messages(&error) }, &[]);
            exit_now(1)
        }
    }
}

fn messages(error: &InitError) -> Vec<UserMessage> {
    match error {
        InitError::MissingSource(_) => vec![UserMessage::error(error)],
        _ => vec![
            UserMessage::error("container start failed with error code: 1"),
            UserMessage::error("printing enroot log file:"),
            UserMessage::error(format!("    [ERROR] {error}")),
        ],
    }
}

struct Ready {
    workdir: String,
    environment: File,
}

fn build(start: &Start<'_>, channel: &Channel<FromInit, ToInit>) -> Result<Ready, InitError> {
    let request = start.request;
    let remap_root = request.remap_root.unwrap_or(start.settings.remap_root);
    let writable = request.writable.unwrap_or(start.settings.writable);

    // As root: the overlay is attached in a mount namespace, so that the copy of it in the user's own one is locked:
    // nosuid, nodev and the like cannot be taken off even by a remapped root.
    die_with_parent(start.broker).map_err(step("container init"))?;
    // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("mount namespace"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(step("mount propagation"))?;
    let host = HostUser::look_up(&request.user, start.environment);
    let overlay = receive_root(channel)?;
    let attached = overlay::attach_point(start.runtime);
    attach_at(overlay.as_fd(), &attached).map_err(step("attach the root filesystem"))?;
    drop(overlay);
    rustix::process::chdir(&attached).map_err(step("enter the root filesystem"))?;

    // From here on as the user, in namespaces of his own. To map root's uid, if he is root, takes one capability more
    // (user_namespaces(7)).
    let mut kept = CapabilitySet::SYS_ADMIN;
    kept.set(CapabilitySet::SETFCAP, request.user.uid == 0);
    become_user_keeping(&request.user, kept).map_err(step("become the job's user"))?;
    namespaces::enter_container(&request.user, remap_root).map_err(step("user namespace"))?;
    namespaces::unshare(request.unshare).map_err(|(what, cause)| InitError::Step { what, cause })?;
    // Changing the uid has cleared it.
    die_with_parent(start.broker).map_err(step("container init"))?;
    channel.send(&FromInit::Started, &[]).map_err(|_| InitError::Abandoned)?;

    // A locked mount cannot become the root; a bind of it on itself can.
    let root = clone_tree(CWD.as_fd(), Path::new("."), false).map_err(step("bind the root filesystem"))?;
    attach_at(root.as_fd(), Path::new(".")).map_err(step("bind the root filesystem"))?;
    rustix::process::fchdir(&root).map_err(step("enter the root filesystem"))?;

    let image = ImageConfig::parse(start.image_config).map_err(|error| InitError::Other(error.to_string()))?;
    let environment = furnish(start, RootDir::new(root.as_fd()), &image, &host, remap_root)?;
    pivot().map_err(step("pivot_root"))?;

    // The task is in its cgroups now.
    join_cgroup_namespace(channel)?;
    cgroups::show_own_subtree(start.leader, request.step.is_some());
    if !writable {
        let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
        set_attributes(root.as_fd(), &attributes).map_err(step("make the root filesystem read-only"))?;
    }
    let environment = memfile::sealed("pyxis-environment", &environment.to_block()).map_err(step("environment"))?;
    Ok(Ready { workdir: plan::workdir(&image), environment })
}

fn receive_root(channel: &Channel<FromInit, ToInit>) -> Result<OwnedFd, InitError> {
    match channel.receive().map_err(step("broker"))? {
        Some((ToInit::Root, mut descriptors)) => descriptors.pop().ok_or(InitError::Abandoned),
        _ => Err(InitError::Abandoned),
    }
}

/// Puts into the root filesystem what this container needs, and works out its environment.
fn furnish(
    start: &Start<'_>,
    root: RootDir<'_>,
    image: &ImageConfig,
    host: &HostUser,
    remap_root: bool,
) -> Result<Environment, InitError> {
    let plan = Plan::new(start.request, start.environment, start.settings, image, host, remap_root)
        .map_err(|error| InitError::Other(error.to_string()))?;
    if let Some(path) = missing_sources(&plan.user_mounts).into_iter().next() {
        return Err(InitError::MissingSource(path));
    }
    let mount_all = |entries: &[_]| {
        entries
            .iter()
            .try_for_each(|entry| apply(root, &start.request.cwd, entry))
            .map_err(|error| InitError::Other(error.to_string()))
    };
    mount_all(&plan.default_mounts)?;
    unshared::mount(root, start.request.unshare).map_err(|error| InitError::Other(error.to_string()))?;
    let login = identity::write(root, &start.request.user, host, remap_root).map_err(step("/etc/passwd"))?;
    adapt::copy_time_zone(root).map_err(step("/etc/localtime"))?;
    if remap_root {
        adapt::let_apt_stay_root(root).map_err(step("/etc/apt/apt.conf.d/enroot"))?;
    }
    let workdir = plan::workdir(image);
    adapt::make_working_directory(root, &workdir).map_err(|errno| {
        InitError::Other(format!("cannot make the image's working directory {workdir}: {}", sys::reason(errno)))
    })?;
    for volume in plan.volumes() {
        keep_writable(root, volume).map_err(|errno| {
            InitError::Other(format!("cannot mount the image's volume {}: {}", volume.display(), sys::reason(errno)))
        })?;
    }
    mount_all(&plan.user_mounts)?;
    Ok(plan.environment(image, &login))
}

/// Binds `volume` on itself: a mount of its own does not become read-only with the root.
fn keep_writable(root: RootDir<'_>, volume: &Path) -> Result<(), Errno> {
    let directory = root.directory(volume)?;
    let mount = clone_tree(directory.as_fd(), Path::new(""), false)?;
    attach(mount.as_fd(), directory.as_fd())
}

/// Makes the working directory the root of the namespace and lets go of everything else.
fn pivot() -> io::Result<()> {
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir("/")?)
}

fn join_cgroup_namespace(channel: &Channel<FromInit, ToInit>) -> Result<(), InitError> {
    let Some((ToInit::Proceed { cgroup_namespace }, mut descriptors)) = channel.receive().map_err(step("broker"))?
    else {
        return Err(InitError::Abandoned);
    };
    if cgroup_namespace {
        let namespace = descriptors.pop().ok_or(InitError::Abandoned)?;
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ControlGroup))
            .map_err(step("cgroup namespace"))?;
    }
    Ok(())
}

/// Holds neither the step's output nor the broker's life any more.
fn forget_the_outside() -> io::Result<()> {
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .or_else(|_| rustix::fs::memfd_create("null", rustix::fs::MemfdFlags::CLOEXEC))?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    rustix::process::set_parent_process_death_signal(None)?;
    Ok(())
}

/// Without a capability, until nobody holds the write end of the life pipe.
fn pause(life: &OwnedFd) {
    let _ = set_capabilities(CapabilitySet::empty());
    loop {
        let mut descriptors = [PollFd::new(life, PollFlags::empty())];
        match rustix::event::poll(&mut descriptors, None) {
            Err(rustix::io::Errno::INTR) => {}
            _ if descriptors[0].revents().is_empty() => {}
            _ => return,
        }
    }
}
