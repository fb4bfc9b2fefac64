//! NVIDIA's GPUs (behaviour reference, section 18): what a container gets of driver and devices, planned from what the host
//! has, what the job has and what the variables say. In place of `nvidia-container-cli` and enroot's `98-nvidia.sh`.
//!
//! * [`driver`]: the loaded driver and its GPUs, from procfs; [`inventory`]: what only NVML knows, asked rarely;
//! * [`allocation`]: which of the GPUs the job has;
//! * [`wish`]: what the variables say; [`require`]: what the image needs; [`select`]: which GPUs are meant;
//! * [`contents`]: libraries, programs, firmware; [`compat`]: CUDA of the image's own; [`nodes`]: device nodes and procfs.

#![forbid(unsafe_code)]

pub mod allocation;
pub mod by_cdi;
pub mod compat;
mod contents;
pub mod driver;
pub mod inventory;
mod nodes;
pub mod require;
pub mod select;
#[cfg(test)]
mod tests;
pub mod wish;

use std::path::Path;

use super::access::DeviceAccess;
use super::edits::{ContainerEdits, File};
use super::host::Host;
use crate::mounts::entry::MountEntry;
use crate::mounts::rootdir::RootDir;
use crate::request::{Environment, StepFacts};
use allocation::Allocation;
use compat::Compat;
use contents::Contents;
use driver::Driver;
use require::Facts;
use select::{Candidates, Chosen, TakeInventory};
use wish::{Source, Visible, Wish};

/// Sockets of the node's services for `utility`.
const SOCKETS: [&str; 2] = ["/run/nvidia-persistenced/socket", "/run/nvidia-fabricmanager/socket"];
/// Configuration and devices of GPUDirect Storage: path, what it is.
const STORAGE: [(&str, &str); 2] = [("/etc/cufile.json", "file"), ("/run/udev", "dir")];
/// For which GPUs OpenGL may be used.
const PROFILE: &str = "/etc/nvidia/nvidia-application-profiles-rc.d/10-container.conf";

/// What a container is planned for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// The node.
    pub host: &'a Host,
    /// The job's variables, with those of `enroot.conf` over them.
    pub variables: &'a Environment,
    /// The container's variables, before hooks.
    pub container: &'a Environment,
    /// The environment that the step began with, before any task's binding.
    pub job: &'a Environment,
    /// The step; none outside Slurm.
    pub step: Option<&'a StepFacts>,
    /// What a task of the job may not open.
    pub refused: &'a DeviceAccess,
    /// The image, if its own CUDA may be used.
    pub image: Option<RootDir<'a>>,
}

/// Why a container cannot have the GPUs it wants; each is one line, in the words of enroot's hook and tool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NvidiaError {
    /// In `NVIDIA_DRIVER_CAPABILITIES`.
    #[error("Unknown NVIDIA driver capability: {0}")]
    UnknownCapability(String),
    /// In `NVIDIA_VISIBLE_DEVICES`.
    #[error("nvidia-container-cli: device error: {device}: unknown device; {}", have(.available))]
    UnknownDevice {
        /// As it was written.
        device: String,
        /// What the job has.
        available: String,
    },
    /// A GPU is wanted by name, and there is no driver.
    #[error(
        "nvidia-container-cli: initialization error: no NVIDIA driver is loaded on this node, and the job wants \
         NVIDIA_VISIBLE_DEVICES={0}: ask Slurm for GPUs, or set it to void"
    )]
    NoDriver(String),
    /// In `NVIDIA_IMEX_CHANNELS`.
    #[error("nvidia-container-cli: device error: NVIDIA_IMEX_CHANNELS: {0}: unknown channel on this node")]
    UnknownChannel(String),
    /// A `NVIDIA_REQUIRE_*` that does not hold.
    #[error(
        "nvidia-container-cli: requirement error: unsatisfied condition: {text}, please update your driver to a newer \
         version, or use an earlier cuda container ({found}; NVIDIA_DISABLE_REQUIRE=1 starts it all the same)"
    )]
    Unsatisfied {
        /// The expression.
        text: String,
        /// What is there.
        found: String,
    },
    /// A `NVIDIA_REQUIRE_*` that is no expression.
    #[error("nvidia-container-cli: requirement error: invalid expression: {name}={text}")]
    InvalidRequirement {
        /// The variable.
        name: String,
        /// Its value.
        text: String,
    },
    /// A CDI specification that is older than the GPUs.
    #[error(
        "the CDI specification of nvidia.com/gpu has no device for {0}: it is out of date; nvidia-ctk cdi generate \
         makes a new one"
    )]
    NotDescribed(String),
    /// NVML was needed and does not answer.
    #[error("nvidia-container-cli: nvml error: {0}")]
    Nvml(String),
    /// The driver was upgraded, and the old one is still loaded.
    #[error(
        "nvidia-container-cli: initialization error: driver/library version mismatch: kernel module {loaded}, libraries \
         {installed}: the driver was upgraded while it was in use; reload its modules or reboot the node"
    )]
    Mismatch {
        /// Of the kernel module.
        loaded: String,
        /// Of the libraries.
        installed: String,
    },
}

fn have(available: &str) -> String {
    match available.is_empty() {
        true => "this job has no GPU on this node".into(),
        false => format!("this job has {available}"),
    }
}

/// What the container gets. `take` asks NVML, if that cannot be avoided.
pub fn plan(request: &Request<'_>, take: &mut TakeInventory<'_>) -> Result<ContainerEdits, NvidiaError> {
    let host = request.host;
    let Some(driver) = Driver::read(host) else { return without_driver(request) };
    let allocation = Allocation::of(host, &driver, request.step, request.job, request.refused);
    let mut edits = ContainerEdits::default();
    if wish::visible(request.variables, request.container).0 == Visible::Nothing {
        return Ok(hide_others(request));
    }
    let wish = Wish::read(request.variables, request.container)?;
    let mut candidates = Candidates::new(&driver, &allocation);
    let chosen = match &wish.visible {
        Visible::Devices(words) => candidates.choose(words, take)?,
        Visible::Nothing | Visible::DriverOnly => Vec::new(),
    };
    check_requirements(&mut edits, &driver, &wish, &chosen, &mut candidates, take)?;
    nodes::plan(&mut edits, host, &driver, &wish, &chosen)?;
    nodes::plan_proc(&mut edits, host, &wish, &chosen);
    add_contents(&mut edits, host, &driver, &wish, !chosen.is_empty())?;
    if wish.capabilities.compute && !chosen.is_empty() {
        prefer_newer_cuda(&mut edits, request, &driver, &chosen, &mut candidates, take);
    }
    add_services(&mut edits, host, &wish);
    if wish.capabilities.graphics || wish.capabilities.display {
        edits.files.push(profile(&chosen));
    }
    if !chosen.is_empty() {
        let visible: Vec<u32> = chosen.iter().map(|one| one.gpu.minor).collect();
        edits.gpu_numbers = numbers(&driver, &allocation, &visible);
    }
    Ok(edits)
}

/// For a container that nothing is added to: GPUs of other jobs are hidden.
pub fn hide_others(request: &Request<'_>) -> ContainerEdits {
    let host = request.host;
    let mut edits = ContainerEdits::default();
    let Some(driver) = Driver::read(host) else { return edits };
    let allocation = Allocation::of(host, &driver, request.step, request.job, request.refused);
    let own: Vec<u32> = driver.gpus.iter().filter(|gpu| allocation.has(gpu)).map(|gpu| gpu.minor).collect();
    let others = driver.gpus.iter().filter(|gpu| !allocation.has(gpu));
    nodes::hide_gpus(&mut edits, host, others);
    edits.gpu_numbers = numbers(&driver, &allocation, &own);
    edits
}

/// The GPUs of a container that gets driver and devices by a CDI specification.
#[derive(Debug)]
pub struct Selection {
    /// What hides the others, and says what they are called.
    pub edits: ContainerEdits,
    /// For each GPU, or part of one, a device node that no other has.
    pub nodes: Vec<String>,
}

/// Which GPUs of the job's the variables mean, or `all` of them. `None` if there are none, or none are wanted.
pub fn select(
    request: &Request<'_>,
    all: bool,
    take: &mut TakeInventory<'_>,
) -> Result<Option<Selection>, NvidiaError> {
    let host = request.host;
    let Some(driver) = Driver::read(host) else { return Ok(None) };
    let words = match wish::visible(request.variables, request.container).0 {
        _ if all => vec!["all".to_owned()],
        Visible::Devices(words) => words,
        Visible::Nothing | Visible::DriverOnly => return Ok(None),
    };
    let allocation = Allocation::of(host, &driver, request.step, request.job, request.refused);
    let mut candidates = Candidates::new(&driver, &allocation);
    let chosen = candidates.choose(&words, take)?;
    let mut edits = ContainerEdits::default();
    let wish = Wish::read(request.variables, request.container)?;
    check_requirements(&mut edits, &driver, &wish, &chosen, &mut candidates, take)?;
    nodes::hide(&mut edits, host, &driver, &chosen);
    let visible: Vec<u32> = chosen.iter().map(|one| one.gpu.minor).collect();
    edits.gpu_numbers = numbers(&driver, &allocation, &visible);
    let of = |one: &Chosen<'_>| match one.instances.as_slice() {
        [] => vec![one.gpu.node()],
        instances => instances.iter().flat_map(|instance| instance.nodes().into_iter().next_back()).collect(),
    };
    Ok(Some(Selection { edits, nodes: chosen.iter().flat_map(of).collect() }))
}

/// On a node without the driver an image that would like GPUs starts all the same; who names some does not get far.
fn without_driver(request: &Request<'_>) -> Result<ContainerEdits, NvidiaError> {
    let mut edits = ContainerEdits::default();
    let (visible, source) = wish::visible(request.variables, request.container);
    let Visible::Devices(words) = visible else { return Ok(edits) };
    let list = wish::shown(&words.join(","));
    if source == Source::Job && words.iter().any(|word| word != "all") {
        return Err(NvidiaError::NoDriver(list));
    }
    if source == Source::Container {
        edits.notices.push(format!(
            "no NVIDIA driver is loaded on this node: the container starts without the GPUs that its image would \
             use (NVIDIA_VISIBLE_DEVICES={list})"
        ));
    }
    Ok(edits)
}

/// Without a GPU nothing is required.
fn check_requirements(
    edits: &mut ContainerEdits,
    driver: &Driver,
    wish: &Wish,
    chosen: &[Chosen<'_>],
    candidates: &mut Candidates<'_>,
    take: &mut TakeInventory<'_>,
) -> Result<(), NvidiaError> {
    if chosen.is_empty() || wish.requirements.is_empty() {
        return Ok(());
    }
    let mut inventory = None;
    if wish.requirements.iter().any(require::Requirement::needs_inventory) {
        match candidates.inventory(take) {
            Ok(taken) => inventory = Some(taken),
            Err(reason) => edits
                .notices
                .push(format!("NVIDIA: whether the GPUs are what the image requires was not checked: {reason}")),
        }
    }
    for one in chosen {
        let known = inventory.and_then(|inventory| inventory.gpu(one.gpu.minor));
        let facts = Facts {
            driver: Some(&driver.version),
            cuda: inventory.and_then(|inventory| inventory.cuda.as_deref()),
            brand: known.and_then(|gpu| gpu.brand.as_deref()),
            arch: known.and_then(|gpu| gpu.arch.as_deref()),
        };
        if let Some(requirement) = wish.requirements.iter().find(|requirement| !requirement.holds(&facts)) {
            let known = [("CUDA", facts.cuda), ("driver", facts.driver), ("brand", facts.brand), ("arch", facts.arch)];
            let found: Vec<String> =
                known.into_iter().filter_map(|(name, value)| Some(format!("{name} {}", value?))).collect();
            let found = format!("this node has {}", found.join(", "));
            return Err(NvidiaError::Unsatisfied { text: wish::shown(&requirement.text), found });
        }
    }
    Ok(())
}

fn add_contents(
    edits: &mut ContainerEdits,
    host: &Host,
    driver: &Driver,
    wish: &Wish,
    has_gpus: bool,
) -> Result<(), NvidiaError> {
    let contents = Contents::find(host, &driver.version, wish.capabilities);
    if contents.libraries.is_empty() && has_gpus && !contents.other_versions.is_empty() {
        let installed = contents.other_versions.join(", ");
        return Err(NvidiaError::Mismatch { loaded: driver.version.clone(), installed });
    }
    if has_gpus && !contents.vanished.is_empty() {
        let paths: Vec<String> = contents.vanished.values().map(|path| path.display().to_string()).collect();
        let paths = wish::shown(&paths.join(", "));
        edits.notices.push(format!(
            "NVIDIA: libraries in this node's /etc/ld.so.cache are gone, and programs will not find them: {paths}; install \
             the driver's libraries again, or run ldconfig there"
        ));
    } else if contents.libraries.is_empty() && has_gpus {
        edits.notices.push(format!(
            "NVIDIA: this node's /etc/ld.so.cache has no library of the driver {}, without which programs find no \
             GPU: install them and run ldconfig there",
            driver.version
        ));
    }
    edits.libraries.extend(contents.libraries);
    edits.mounts.extend(contents.programs);
    edits.mounts.extend(contents.firmware);
    Ok(())
}

/// Has the image's CUDA used if it is newer than the driver's, and the GPUs are such that it can be.
fn prefer_newer_cuda(
    edits: &mut ContainerEdits,
    request: &Request<'_>,
    driver: &Driver,
    chosen: &[Chosen<'_>],
    candidates: &mut Candidates<'_>,
    take: &mut TakeInventory<'_>,
) {
    let Some(compat) = request.image.and_then(|image| Compat::find(image, &driver.version)) else { return };
    let inventory = candidates.inventory(take).ok();
    let brands = chosen.iter().filter_map(|one| inventory?.gpu(one.gpu.minor)?.brand.as_deref());
    if let Some(brand) = brands.into_iter().find(|brand| compat::is_useless_for(brand)) {
        edits.log.push(format!("NVIDIA: the image's CUDA is newer than the node's, and not for GPUs like {brand}"));
        return;
    }
    edits.log.push(compat.describe(&driver.version));
    compat.replace(&mut edits.libraries);
}

fn add_services(edits: &mut ContainerEdits, host: &Host, wish: &Wish) {
    let mut bind = |path: &str, create: &str, access: &str| {
        let create = format!("x-create={create}");
        let options = [create.as_str(), "bind", access, "nosuid", "nodev", "noexec", "private"];
        edits.mounts.extend(MountEntry::new(path, path, options.into_iter()));
    };
    if wish.capabilities.utility {
        for socket in SOCKETS.into_iter().filter(|socket| host.is_socket(socket)) {
            bind(socket, "file", "rw");
        }
    }
    if wish.capabilities.compute && host.is_directory(&wish.mps_directory) {
        bind(&wish.mps_directory, "dir", "rw");
    }
    if wish.storage {
        for (path, kind) in STORAGE.into_iter().filter(|(path, _)| host.exists(path)) {
            bind(path, kind, "ro");
        }
    }
}

/// Tells OpenGL which GPUs there are: it does not look at device nodes.
fn profile(chosen: &[Chosen<'_>]) -> File {
    let mask = chosen.iter().filter(|one| one.gpu.minor < 64).fold(0_u64, |mask, one| mask | 1 << one.gpu.minor);
    let content = format!(
        "{{\"profiles\": [{{\"name\": \"_container_\", \"settings\": [\"EGLVisibleDGPUDevices\", {mask:#x}]}}],\n\
         \"rules\": [{{\"pattern\": [], \"profile\": \"_container_\"}}]}}\n"
    );
    File { path: Path::new(PROFILE).into(), mode: 0o444, content: content.into_bytes() }
}

/// See [`ContainerEdits::gpu_numbers`]: for a container that sees the GPUs with the minors `visible`, in this order. What the
/// job sees outside, too, is called the same; and where Slurm gives no GPUs, the numbers are not Slurm's.
fn numbers(driver: &Driver, allocation: &Allocation, visible: &[u32]) -> Vec<(u32, u32)> {
    let outside = driver.gpus.iter().filter(|gpu| allocation.may_open(gpu)).count();
    if visible.len() == outside || !allocation.is_slurms() {
        return Vec::new();
    }
    let own = driver.gpus.iter().filter(|gpu| allocation.has(gpu));
    own.filter_map(|gpu| {
        let position = visible.iter().position(|minor| *minor == gpu.minor)?;
        Some((allocation.slurms_number(driver, gpu)?, u32::try_from(position).ok()?))
    })
    .collect()
}

/// The same for a step that joins a container that runs already and shows the GPUs with the minors `shown`; and a line about
/// those of the step's that it does not show.
pub fn numbers_of_joining(
    driver: &Driver,
    allocation: &Allocation,
    shown: &[u32],
) -> (Vec<(u32, u32)>, Option<String>) {
    if !allocation.is_slurms() || driver.gpus.iter().any(driver::Gpu::is_divided) {
        return (Vec::new(), None);
    }
    let own = driver.gpus.iter().filter(|gpu| allocation.has(gpu));
    let (there, missing): (Vec<_>, Vec<_>) = own.partition(|gpu| shown.contains(&gpu.minor));
    // What the cgroup refuses is not counted.
    let counted: Vec<u32> = driver
        .gpus
        .iter()
        .filter(|gpu| shown.contains(&gpu.minor) && allocation.may_open(gpu))
        .map(|gpu| gpu.minor)
        .collect();
    let number = |gpu: &&driver::Gpu| {
        let position = counted.iter().position(|minor| *minor == gpu.minor)?;
        Some((allocation.slurms_number(driver, gpu)?, u32::try_from(position).ok()?))
    };
    let mut numbers: Vec<(u32, u32)> = there.iter().filter_map(number).collect();
    if missing.is_empty() && numbers.iter().all(|(slurms, containers)| slurms == containers) {
        numbers.clear();
    }
    let names: Vec<String> = missing.iter().map(|gpu| gpu.node()).collect();
    let text = (!missing.is_empty()).then(|| {
        let names = names.join(", ");
        format!("the running container has the GPUs of the step that made it, and not {names} of this step")
    });
    (numbers, text)
}
