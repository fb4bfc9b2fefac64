//! Devices appear in a container: planned and done by `devices`, for a container of a step's.

#![forbid(unsafe_code)]

use super::furnish::Outside;
use super::{InitError, Start};
use crate::devices::access::DeviceAccess;
use crate::devices::apply::{Future, Place, apply};
use crate::devices::edits::Hook;
use crate::devices::host::Host;
use crate::devices::nvidia::driver::Driver;
use crate::devices::nvidia::inventory::{self, Inventory};
use crate::devices::plan::{Inputs, plan};
use crate::devices::root::RootTraits;
use crate::hooks::workspace::Workspace;
use crate::mounts::rootdir::RootDir;
use crate::request::Environment;
use crate::task::UserMessage;

/// What is left to do when the mounts are done.
#[derive(Debug, Default)]
pub struct Appeared {
    /// For the container's environment.
    pub variables: Vec<(String, String)>,
    /// See [`ContainerEdits::gpu_numbers`](crate::devices::edits::ContainerEdits::gpu_numbers).
    pub gpu_numbers: Vec<(u32, u32)>,
    /// OCI hooks.
    pub hooks: Vec<Hook>,
    /// For the node's log.
    pub log: Vec<String>,
}

/// Plans the devices of the container below `root`, and lets them appear. `host` is the environment of what runs on the host
/// for the container, `container` the container's own; `refused` is what the cgroups keep the job from.
pub fn appear(
    start: &Start<'_>,
    root: RootDir<'_>,
    (host, container): (&Environment, &Environment),
    refused: &DeviceAccess,
    outside: &mut dyn Outside,
) -> Result<Appeared, InitError> {
    let traits = RootTraits::of(root);
    let node = Host::default();
    let inputs = Inputs {
        node: &node,
        request: start.request,
        host,
        container,
        job: start.environment,
        refused,
        settings: start.devices,
        image: root,
        root: &traits,
    };
    let edits =
        plan(&inputs, &mut || inventory(start, &node, outside)).map_err(|error| InitError::Other(error.to_string()))?;
    let say = &mut |message| outside.say(message);
    for notice in &edits.notices {
        say(UserMessage::Notice(format!("pyxis: {notice}")));
    }
    let request = start.request;
    let place = Place {
        root,
        traits: &traits,
        future: match (&request.name, &request.save) {
            (None, None) if !start.image_config.is_empty() => Future::Gone,
            (None, Some(_)) => Future::Saved,
            _ => Future::Kept { shared: start.root_is_shared },
        },
        cwd: &request.cwd,
        workshop: &Workspace::mount_point(start.runtime),
    };
    apply(&place, &edits, say).map_err(|error| InitError::Other(error.to_string()))?;
    Ok(Appeared { variables: edits.env, gpu_numbers: edits.gpu_numbers, hooks: edits.hooks, log: edits.log })
}

/// What NVML knows, if it was asked since something has changed, or else asked now.
fn inventory(start: &Start<'_>, node: &Host, outside: &mut dyn Outside) -> Result<Inventory, String> {
    let driver = Driver::read(node).ok_or("the NVIDIA driver is gone")?;
    let key = inventory::key(node, &driver);
    let kept = node.read(inventory::path(start.runtime), inventory::MAX_FILE).unwrap_or_default();
    if let Some(inventory) = Inventory::parse(&kept, &key) {
        return Ok(inventory);
    }
    let taken = outside.take_inventory(start)?;
    Inventory::parse(&taken, &key).ok_or_else(|| "NVML and the kernel say different things about the GPUs".into())
}
