//! The plan of all devices of a container: what each kind of device needs, one after the other.

#![forbid(unsafe_code)]

use super::access::DeviceAccess;
use super::edits::ContainerEdits;
use super::host::Host;
use super::infiniband::{self, Device};
use super::nvidia::by_cdi::{self, Way};
use super::nvidia::select::TakeInventory;
use super::root::RootTraits;
use super::settings::DeviceSettings;
use super::{cdi, extras, gres, nvidia, verbs};
use crate::mounts::rootdir::RootDir;
use crate::request::{Environment, StepRequest};

/// What a plan is made from.
#[derive(Debug, Clone, Copy)]
pub struct Inputs<'a> {
    /// The files of the node.
    pub node: &'a Host,
    /// What the user asked for.
    pub request: &'a StepRequest,
    /// The leading task's environment, with the settings of `enroot.conf`: what runs on the host for the container has it.
    pub host: &'a Environment,
    /// The container's environment so far: the image's, `environ.d`, `--container-env`, the site's hooks.
    pub container: &'a Environment,
    /// The environment that the step began with: what Slurm says of its resources, before any task's binding.
    pub job: &'a Environment,
    /// The device nodes that the job's cgroup refuses to the leading task.
    pub refused: &'a DeviceAccess,
    /// The site's configuration.
    pub settings: &'a DeviceSettings,
    /// The root filesystem, to look for what it has.
    pub image: RootDir<'a>,
    /// Where things go in it.
    pub root: &'a RootTraits,
}

impl<'a> Inputs<'a> {
    /// The value of a variable that says what devices are wanted: the job's or the site's if it exists, even if it is empty,
    /// else the container's (behaviour reference, section 18.1).
    pub fn variable(&self, name: &str) -> Option<&'a [u8]> {
        self.host.get(name).or_else(|| self.container.get(name))
    }

    /// The image, if its own CUDA may be used: it is for glibc.
    fn image_with_cuda(&self) -> Option<RootDir<'a>> {
        (self.settings.cuda_compat && !self.root.is_musl).then_some(self.image)
    }

    fn nvidia(&self) -> nvidia::Request<'a> {
        nvidia::Request {
            host: self.node,
            variables: self.host,
            container: self.container,
            job: self.job,
            step: self.request.step.as_ref(),
            refused: self.refused,
            image: self.image_with_cuda(),
        }
    }
}

/// Which InfiniBand devices a container wants.
pub const INFINIBAND: &str = "MELLANOX_VISIBLE_DEVICES";
/// Which GPUs.
pub const GPUS: &str = "NVIDIA_VISIBLE_DEVICES";

/// Why a container cannot have the devices that it asks for: one line that says it all.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct DeviceError(pub String);

/// What the devices of one container need. `take_inventory` asks NVML, which takes long: only if it cannot be avoided.
pub fn plan(inputs: &Inputs<'_>, take_inventory: &mut TakeInventory<'_>) -> Result<ContainerEdits, DeviceError> {
    let (request, settings) = (inputs.request, inputs.settings);
    let mut variables = Vec::new();
    if settings.sharp {
        variables.extend(extras::sharp(inputs.host, inputs.variable(INFINIBAND), inputs.container));
    }
    if settings.mig_config && extras::may_divide(inputs.variable(GPUS)) {
        variables.push(("NVIDIA_MIG_CONFIG_DEVICES".to_owned(), "all".to_owned()));
    }
    let mut container = inputs.container.clone();
    for (name, value) in &variables {
        container.set(name.as_str(), value.as_str());
    }
    let inputs = &Inputs { container: &container, ..*inputs };
    let step = gres::Step { id: request.step.as_ref().map(|facts| facts.step_id), variables: inputs.job };
    let asked = gres::wanted(&request.devices, &settings.gres, step).map_err(failed)?;
    let directories = &settings.cdi_directories;
    let way = by_cdi::choose(&inputs.nvidia(), directories, &asked, take_inventory).map_err(failed)?;
    let (mut edits, names, registry) = match way {
        Way::Cdi { names, edits, registry } => (*edits, names, registry),
        Way::Native(note) => {
            let mut edits = nvidia::plan(&inputs.nvidia(), take_inventory).map_err(failed)?;
            edits.log.extend(note);
            (edits, asked, None)
        }
    };
    edits.extend(cdi::plan(directories, registry, &names, &request.user, inputs.image_with_cuda()).map_err(failed)?);
    if settings.infiniband {
        edits.extend(fabric(inputs)?);
    }
    edits.env.extend(variables);
    Ok(edits)
}

fn fabric(inputs: &Inputs<'_>) -> Result<ContainerEdits, DeviceError> {
    let wanted = inputs.variable(INFINIBAND);
    if infiniband::is_nothing(wanted) {
        return Ok(ContainerEdits::default());
    }
    let all = Device::all(inputs.node);
    let chosen = infiniband::choose(&all, wanted).map_err(failed)?;
    let mut edits = infiniband::plan(inputs.node, &all, &chosen);
    verbs::add(&mut edits, inputs.node, inputs.image, inputs.root, &chosen);
    Ok(edits)
}

fn failed(error: impl std::fmt::Display) -> DeviceError {
    DeviceError(error.to_string())
}
