//! A second container init: for a step that joins a container which runs already (behaviour reference, section 6.4).
//!
//! It moves into the container's namespaces and changes nothing there: no mount, no file, no hook. Environment and working
//! directory are computed from the image, and prepared by its entrypoint if that is asked for, as for the first step. Then
//! it pauses like any container init, and so the namespaces outlive the step that made them for as long as this step's
//! tasks may join.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{Mode, OFlags, StatVfsMountFlags};
use rustix::process::DumpableBehavior;
use rustix::thread::{CapabilitySet, ThreadNameSpaceType};

use super::entrypoint::{self, Probe};
use super::environment::FromHost;
use super::plan::{self, Plan};
use super::protocol::{FromInit, ToInit};
use super::site::Site;
use super::{InitError, Ready, Start, begin, hook_variables, stay, step};
use crate::container::running::Instance;
use crate::devices::host::Host;
use crate::devices::nvidia;
use crate::devices::nvidia::allocation::Allocation;
use crate::devices::nvidia::driver::Driver;
use crate::hooks;
use crate::image::config::ImageConfig;
use crate::mounts::rootdir::RootDir;
use crate::namespaces::running::enter_all;
use crate::rootfs::identity::{self, HostUser};
use crate::store::LeasedLayer;
use crate::sys::channel::Channel;
use crate::sys::memfile;
use crate::sys::process::{become_user_keeping, die_with_parent};
use crate::task::UserMessage;

/// What it knows from the beginning.
#[derive(Debug)]
pub struct Attach<'a> {
    /// As for any init.
    pub start: &'a Start<'a>,
    /// The running container.
    pub instance: &'a Instance,
    /// Its init.
    pub pidfd: &'a OwnedFd,
}

/// Joins the container, says so, and keeps it until `life` hangs up. Never returns.
pub fn run(attach: &Attach<'_>, channel: Channel<FromInit, ToInit>, life: &OwnedFd, leases: Vec<LeasedLayer>) -> ! {
    let ready = begin(&channel, life, &leases, &[attach.pidfd.as_fd()]).and_then(|()| join(attach, &channel));
    stay(ready, channel, life, leases)
}

fn join(attach: &Attach<'_>, channel: &Channel<FromInit, ToInit>) -> Result<Ready, InitError> {
    let Attach { start, instance, pidfd } = attach;
    let Start { request, environment: job, broker, .. } = **start;
    die_with_parent(broker).map_err(step("container init"))?;
    let host = HostUser::look_up(&request.user, job);
    become_user_keeping(&request.user, CapabilitySet::SYS_ADMIN).map_err(step("become the job's user"))?;
    // Its step may be over although it still runs: what this step asks for is another container then.
    if instance.is_ending() {
        return Err(InitError::Gone);
    }
    let site = Site::load(start, &host)?;
    let variables = site.hook_environment(start, job, "/");
    let from_host = FromHost::read(start, &site, variables)?;
    let hooks = hooks::find(start.sysconf, &site.user_directory).map_err(step("hooks.d"))?;
    let hook_variables = hook_variables::of(instance.pid());
    let mut choices = site.choices;
    let gpus = allocated_gpus(start, channel)?;
    let namespaces = match enter_all(instance.pid(), pidfd.as_fd()) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::ENOENT)) => return Err(InitError::Gone),
        other => other.map_err(step("join the running container"))?,
    };
    // The changes of identity have cleared both; tasks join this process.
    rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(step("container init"))?;
    die_with_parent(broker).map_err(step("container init"))?;

    let other = |error: &dyn std::fmt::Display| InitError::Other(error.to_string());
    let image = ImageConfig::of_root(start.image_config).map_err(|error| other(&error))?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open("/", flags, Mode::empty()).map_err(step("the container's root directory"))?;
    choices.remap_root = rustix::process::geteuid().is_root();
    let root = RootDir::new(root.as_fd());
    let login =
        identity::look_up_inside(root, &request.user, &host, choices.remap_root).map_err(step("/etc/passwd"))?;
    let plan = Plan::new(request, job, &image, &host, choices).map_err(|error| other(&error))?;
    let mut environment = from_host.with_image(start, &image, root, &plan, job)?;
    if hooks::pytorch::is_asked(start.hooks, &hooks) {
        hooks::pytorch::complete(&mut environment, job);
    }
    for (name, value) in hook_variables.iter() {
        environment.set(name, value);
    }
    plan.add_login_defaults(&mut environment, &login);
    let image_or_rc = (!start.image_config.is_empty()).then_some(&image);
    let entrypoint = entrypoint::plan(start, image_or_rc, &site.conf, root);
    Ok(Ready {
        workdir: plan::workdir(&image),
        environment: memfile::sealed("pyxis-environment", &environment.to_block()).map_err(step("environment"))?,
        entrypoint: Probe::of(entrypoint).map_err(step("entrypoint"))?,
        cgroup_namespace: Some(namespaces.contains(ThreadNameSpaceType::CONTROL_GROUP)),
        hook_variables: hook_variables::keep(&hook_variables).map_err(step("environment"))?,
        gpu_numbers: gpus.map_or_else(Vec::new, |gpus| gpu_numbers(&gpus, channel)),
    })
}

/// The node's GPUs, and which of them this step has; `None` if it has none of Slurm's.
fn allocated_gpus(
    start: &Start<'_>,
    channel: &Channel<FromInit, ToInit>,
) -> Result<Option<(Driver, Allocation)>, InitError> {
    let node = Host::default();
    let Some(driver) = Driver::read(&node) else { return Ok(None) };
    channel.send(&FromInit::WantDevices, &[]).map_err(|_| InitError::Abandoned)?;
    let Some((ToInit::Devices { devices }, _)) = channel.receive().map_err(step("broker"))? else {
        return Err(InitError::Abandoned);
    };
    let allocation = Allocation::of(&node, &driver, start.request.step.as_ref(), start.environment, &devices);
    Ok(Some((driver, allocation)))
}

/// The container, which this process is in, has the GPUs of the step that made it, and Slurm's numbers are this step's. For
/// GPUs of this step's that the container does not show, a line says so.
fn gpu_numbers((driver, allocation): &(Driver, Allocation), channel: &Channel<FromInit, ToInit>) -> Vec<(u32, u32)> {
    let is_shown = |node: &str| {
        let hidden = |mount: rustix::fs::StatVfs| mount.f_flag.contains(StatVfsMountFlags::NODEV);
        rustix::fs::statvfs(node).is_ok_and(|mount| !hidden(mount))
    };
    let shown: Vec<u32> = driver.gpus.iter().filter(|gpu| is_shown(&gpu.node())).map(|gpu| gpu.minor).collect();
    let (numbers, missing) = nvidia::numbers_of_joining(driver, allocation, &shown);
    if let Some(text) = missing {
        // Who cannot be told has ended, and so will this process.
        let _ = channel.send(&FromInit::Say(UserMessage::Notice(format!("pyxis: {text}"))), &[]);
    }
    numbers
}
