//! What only NVML knows about a node's GPUs: newest CUDA, product lines, compute capabilities, identifiers and order of the
//! parts of divided GPUs. Asking takes long (12 ms on an idle machine, seconds where a GPU has to be woken up), so it is asked
//! by a process of its own, once until something changes, and the answer is kept as a file, `PATH` below the runtime directory.

#![forbid(unsafe_code)]

use std::fmt::Write;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use nvml_wrapper::enum_wrappers::device::Brand;
use serde::{Deserialize, Serialize};

use super::driver::Driver;
use crate::cli;
use crate::devices::host::Host;
use crate::sys;
use crate::sys::command::{Stream, capture};
use crate::sys::nvml::{Nvml, NvmlGpu};

/// Name of the file.
const FILE: &str = "nvidia.json";
/// Most bytes of it.
pub const MAX_FILE: u64 = 1 << 20;
/// How long it may take: a GPU that has to be woken up takes some seconds.
pub const TIME: Duration = Duration::from_secs(20);
/// A new one after every boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The answer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Inventory {
    /// What it is the answer for ([`key`]).
    pub key: String,
    /// Newest version of CUDA that the driver has.
    pub cuda: Option<String>,
    /// The GPUs.
    pub gpus: Vec<KnownGpu>,
}

/// A GPU, as NVML knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownGpu {
    /// `/dev/nvidiaN`.
    pub minor: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product line, as requirements call it.
    pub brand: Option<String>,
    /// Compute capability.
    pub arch: Option<String>,
    /// Its parts, in NVML's order.
    pub instances: Vec<KnownInstance>,
}

/// A part of a GPU, as NVML knows it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownInstance {
    /// `MIG-…`.
    pub uuid: String,
    /// Number of the GPU instance.
    pub gpu_instance: u32,
    /// Number of the compute instance in it.
    pub compute_instance: u32,
}

/// Where the answer is kept.
pub fn path(runtime: &Path) -> PathBuf {
    runtime.join(FILE)
}

/// All that procfs shows of what an answer depends on: if it is the same, so is the answer.
pub fn key(host: &Host, driver: &Driver) -> String {
    let boot = host.read_text(BOOT_ID, 64).unwrap_or_default();
    let mut key = format!("{} {}", boot.trim(), driver.version);
    for gpu in &driver.gpus {
        // Into a string: it cannot fail.
        let _ = write!(key, " {}={}", gpu.bus, gpu.uuid.as_deref().unwrap_or("?"));
        for instance in &gpu.instances {
            let _ = write!(key, "/{}.{}", instance.gpu_instance, instance.compute_instance);
        }
    }
    key
}

impl Inventory {
    /// The answer in `bytes`, if it is one for `key`.
    pub fn parse(bytes: &[u8], key: &str) -> Option<Self> {
        let inventory: Self = serde_json::from_slice(bytes).ok()?;
        (inventory.key == key).then_some(inventory)
    }

    /// The GPU with that device node.
    pub fn gpu(&self, minor: u32) -> Option<&KnownGpu> {
        self.gpus.iter().find(|gpu| gpu.minor == minor)
    }
}

/// Asks NVML. The error is one line.
pub fn take(host: &Host) -> Result<Inventory, String> {
    let driver = Driver::read(host).ok_or("no NVIDIA driver is loaded")?;
    let nvml = Nvml::load()?;
    let gpus = nvml.gpus()?;
    let known = |gpu: NvmlGpu| KnownGpu {
        minor: gpu.minor,
        uuid: gpu.uuid,
        brand: gpu.brand.map(|name| brand(name).to_owned()),
        arch: gpu.compute_capability.map(|(major, minor)| format!("{major}.{minor}")),
        instances: gpu
            .instances
            .into_iter()
            .map(|(uuid, gpu_instance, compute_instance)| KnownInstance { uuid, gpu_instance, compute_instance })
            .collect(),
    };
    Ok(Inventory {
        key: key(host, &driver),
        cuda: nvml.cuda_version().map(|version| format!("{}.{}", version / 1000, version % 1000 / 10)),
        gpus: gpus.into_iter().map(known).collect(),
    })
}

/// Has a process of its own ask NVML, whose library is not to be trusted with this one; gives the answer.
pub fn take_elsewhere() -> Result<Vec<u8>, String> {
    let mut command = Command::new("/proc/self/exe");
    let length = usize::try_from(MAX_FILE).unwrap_or(usize::MAX);
    let captured = capture(command.arg0(cli::INVENTORY).env_clear(), Stream::Output, length, TIME)
        .map_err(|error| format!("the inventory of GPUs was not started: {}", sys::reason(error)))?;
    match captured.status {
        Some(status) if status.success() => Ok(captured.text),
        status => Err(failure(status.is_some(), &captured.text)),
    }
}

/// Why there is no answer, of a process that `has_ended` and said `text`: one line.
pub fn failure(has_ended: bool, text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    match (has_ended, text.trim()) {
        (false, _) => format!("NVML has not answered for {} s", TIME.as_secs()),
        (true, "") => "the inventory of GPUs has crashed".into(),
        (true, text) => super::wish::shown(text),
    }
}

/// What requirements call a product line.
fn brand(brand: Brand) -> &'static str {
    match brand {
        Brand::Unknown => "unknown",
        Brand::Quadro => "quadro",
        Brand::Tesla => "tesla",
        Brand::NVS => "nvs",
        Brand::GRID => "grid",
        Brand::GeForce => "geforce",
        Brand::Titan => "titan",
        Brand::VApps => "vapps",
        Brand::VPC => "vpc",
        Brand::VCS => "vcs",
        Brand::VWS => "vws",
        Brand::CloudGaming | Brand::VGaming => "cloudgaming",
        Brand::QuadroRTX => "quadrortx",
        Brand::NvidiaRTX => "nvidiartx",
        Brand::Nvidia => "nvidia",
        Brand::GeForceRTX => "geforcertx",
        Brand::TitanRTX => "titanrtx",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::nvidia::driver::{BusId, Gpu, Instance};

    #[test]
    fn the_key_follows_everything_that_matters() {
        let directory = tempfile::tempdir().unwrap();
        let host = Host::at(directory.path());
        let instance = Instance { gpu_instance: 1, compute_instance: 0, capabilities: [12, 13] };
        let bus = BusId::parse("06:00.0").unwrap();
        let gpu = Gpu { bus, directory: String::new(), uuid: None, minor: 0, instances: vec![instance] };
        let driver = Driver { version: "580.1".into(), gpus: vec![gpu] };
        let first = key(&host, &driver);
        assert_eq!(first, " 580.1 00000000:06:00.0=?/1.0");
        let mut other = driver.clone();
        other.gpus[0].instances.clear();
        let mut third = driver.clone();
        third.gpus[0].uuid = Some("GPU-x".into());
        for changed in [other, third, Driver { version: "580.2".into(), ..driver }] {
            assert_ne!(key(&host, &changed), first);
        }
        let inventory = Inventory { key: first.clone(), ..Inventory::default() };
        let bytes = serde_json::to_vec(&inventory).unwrap();
        assert_eq!(Inventory::parse(&bytes, &first), Some(inventory));
        assert_eq!(Inventory::parse(&bytes, "another"), None);
        assert_eq!(Inventory::parse(&bytes[1..], &first), None);
    }
}
