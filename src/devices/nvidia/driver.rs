//! What the kernel's NVIDIA driver says about itself and its devices in procfs (the driver's README, "procfs interface"; MIG
//! user guide, "Device nodes and capabilities"). Far faster than NVML, and enough for most containers.

#![forbid(unsafe_code)]

use std::fmt;

use crate::devices::host::Host;

/// The driver's directory.
pub const PROC: &str = "/proc/driver/nvidia";
/// Most bytes of one of its files.
pub const MAX_FILE: u64 = 64 << 10;
/// More GPUs and instances than any machine has.
const MAX_GPUS: usize = 256;
const MAX_INSTANCES: usize = 64;

/// The driver that is loaded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Driver {
    /// As it ends the names of its libraries.
    pub version: String,
    /// In the order of their places on the bus, which is NVML's. Those that the administrator has excluded are not there.
    pub gpus: Vec<Gpu>,
}

/// A GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Gpu {
    /// Its place.
    pub bus: BusId,
    /// The name of its directory below `/proc/driver/nvidia/gpus`.
    pub directory: String,
    /// `GPU-…`, in lower case; `None` if it has not been woken up since the driver was loaded, by drivers that do not know
    /// it before.
    pub uuid: Option<String>,
    /// `/dev/nvidiaN`.
    pub minor: u32,
    /// Its compute instances, if it is divided (multi-instance GPU).
    pub instances: Vec<Instance>,
}

/// A compute instance of a GPU: a "MIG device".
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    /// Number of the GPU instance.
    pub gpu_instance: u32,
    /// Number of the compute instance in it.
    pub compute_instance: u32,
    /// The `/dev/nvidia-caps/nvidia-capN` of both, by which access is given: of the GPU instance, of the compute instance.
    pub capabilities: [u32; 2],
}

/// A place on the PCI bus. Its order is that in which NVML counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BusId {
    domain: u32,
    bus: u8,
    device: u8,
    function: u8,
}

impl BusId {
    /// `[DOMAIN:]BUS:DEVICE[.FUNCTION]`, in hexadecimal digits, of which the domain may have any number.
    pub fn parse(text: &str) -> Option<Self> {
        let (rest, function) = text.split_once('.').unwrap_or((text, "0"));
        let mut parts = rest.rsplit(':');
        let (device, bus) = (parts.next()?, parts.next()?);
        let domain = parts.next().unwrap_or("0");
        let hexadecimal = |text: &str| match text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            true => u32::from_str_radix(text, 16).ok(),
            false => None,
        };
        let byte = |text| u8::try_from(hexadecimal(text)?).ok();
        if parts.next().is_some() {
            return None;
        }
        Some(Self { domain: hexadecimal(domain)?, bus: byte(bus)?, device: byte(device)?, function: byte(function)? })
    }
}

impl fmt::Display for BusId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08x}:{:02x}:{:02x}.{:x}", self.domain, self.bus, self.device, self.function)
    }
}

impl Driver {
    /// The driver of `host`; `None`, after one failed open, if there is none.
    pub fn read(host: &Host) -> Option<Self> {
        let version = parse_version(&host.read_text(format!("{PROC}/version"), MAX_FILE).ok()?)?;
        let gpus = format!("{PROC}/gpus");
        let mut gpus: Vec<Gpu> = host
            .names(&gpus)
            .into_iter()
            .take(MAX_GPUS)
            .filter_map(|directory| {
                let text = host.read_text(format!("{gpus}/{directory}/information"), MAX_FILE).ok()?;
                let mut gpu = Gpu::parse(&text, directory)?;
                gpu.find_instances(host);
                Some(gpu)
            })
            .collect();
        gpus.sort_by_key(|gpu| gpu.bus);
        Some(Self { version, gpus })
    }
}

/// The version in `/proc/driver/nvidia/version`.
pub fn parse_version(text: &str) -> Option<String> {
    let line = text.lines().find_map(|line| line.strip_prefix("NVRM version:"))?;
    line.split_whitespace().find(|word| is_version(word)).map(str::to_owned)
}

/// Numbers with dots between them.
pub fn is_version(word: &str) -> bool {
    let is_number = |part: &str| (1..=6).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit());
    word.contains('.') && word.len() <= 32 && word.split('.').all(is_number)
}

impl Gpu {
    /// From its file `information`; `None` for one that is excluded, or has no device node.
    pub fn parse(text: &str, directory: String) -> Option<Self> {
        let field = |wanted: &str| {
            let mut fields = text.lines().filter_map(|line| line.split_once(':'));
            fields.find(|(name, _)| name.trim().eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim())
        };
        if field("GPU Excluded").is_some_and(|excluded| excluded.eq_ignore_ascii_case("yes")) {
            return None;
        }
        let bus = BusId::parse(field("Bus Location").unwrap_or(&directory))?;
        let uuid = field("GPU UUID").map(str::to_ascii_lowercase);
        let uuid =
            uuid.and_then(|uuid| Some(format!("GPU-{}", uuid.strip_prefix("gpu-").filter(|rest| is_uuid(rest))?)));
        let minor = field("Device Minor")?.parse().ok()?;
        Some(Self { bus, directory, uuid, minor, instances: Vec::new() })
    }

    /// Whether there are parts of it. A GPU that could be divided, and is not, has a directory for them, too.
    pub fn is_divided(&self) -> bool {
        !self.instances.is_empty()
    }

    /// Its device node.
    pub fn node(&self) -> String {
        format!("/dev/nvidia{}", self.minor)
    }

    /// Its directory of capabilities, which only a divided GPU has.
    pub fn capabilities(&self) -> String {
        format!("{PROC}/capabilities/gpu{}/mig", self.minor)
    }

    fn find_instances(&mut self, host: &Host) {
        let directory = self.capabilities();
        let numbered = |names: Vec<String>, prefix: &str| -> Vec<(u32, String)> {
            let mut found: Vec<_> = names
                .into_iter()
                .filter_map(|name| Some((name.strip_prefix(prefix)?.parse().ok()?, name)))
                .take(MAX_INSTANCES)
                .collect();
            found.sort_unstable();
            found
        };
        let gpu_instances = numbered(host.names(&directory), "gi");
        let minor = |path: &str| parse_minor(&host.read_text(path, MAX_FILE).ok()?);
        for (gpu_instance, name) in gpu_instances {
            let directory = format!("{directory}/{name}");
            let Some(of_gpu_instance) = minor(&format!("{directory}/access")) else { continue };
            for (compute_instance, name) in numbered(host.names(&directory), "ci") {
                if let Some(of_compute_instance) = minor(&format!("{directory}/{name}/access")) {
                    let capabilities = [of_gpu_instance, of_compute_instance];
                    self.instances.push(Instance { gpu_instance, compute_instance, capabilities });
                }
            }
        }
    }
}

impl Instance {
    /// The device nodes that give access to it.
    pub fn nodes(&self) -> [String; 2] {
        self.capabilities.map(capability_node)
    }
}

/// The device node that stands for a capability.
pub fn capability_node(minor: u32) -> String {
    format!("/dev/nvidia-caps/nvidia-cap{minor}")
}

/// The number of a capability's device node, in the file that is called like the capability.
pub fn parse_minor(text: &str) -> Option<u32> {
    let value = text.lines().find_map(|line| line.strip_prefix("DeviceFileMinor:"))?;
    value.trim().parse().ok()
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36 && text.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const INFORMATION: &str = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 41\nGPU UUID: \t \
        GPU-4e7c61bb-d2ff-8a03-fd3c-f43e660581e9\nVideo BIOS: \t 96.00.a5.00.1a\nBus Type: \t PCIe\nDMA Size: \t 52 bits\n\
        Bus Location: \t 0000:00:06.0\nDevice Minor: \t 0\nGPU Firmware: \t 580.159.04\nGPU Excluded:\t No\n";

    #[test]
    fn versions_of_both_kernel_modules() {
        let open = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (nixbld@)  \n\
            GCC version:  gcc version 15.3.0 (GCC) \n";
        assert_eq!(parse_version(open).as_deref(), Some("580.159.04"));
        let closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n";
        assert_eq!(parse_version(closed).as_deref(), Some("535.104.05"));
        assert_eq!(parse_version("GCC version: 15.3.0"), None);
        assert_eq!(parse_version("NVRM version: NVIDIA UNIX"), None);
    }

    #[test]
    fn a_gpu() {
        let gpu = Gpu::parse(INFORMATION, "0000:00:06.0".into()).unwrap();
        assert_eq!(gpu.uuid.as_deref(), Some("GPU-4e7c61bb-d2ff-8a03-fd3c-f43e660581e9"));
        assert_eq!((gpu.minor, gpu.bus.to_string().as_str()), (0, "00000000:00:06.0"));
        let asleep =
            INFORMATION.replace("4e7c61bb-d2ff-8a03-fd3c-f43e660581e9", "????????-????-????-????-????????????");
        assert_eq!(Gpu::parse(&asleep, "0000:00:06.0".into()).unwrap().uuid, None);
        assert_eq!(Gpu::parse(&INFORMATION.replace("Excluded:\t No", "Excluded:\t Yes"), String::new()), None);
    }

    #[test]
    fn bus_ids_in_all_lengths() {
        let id = BusId::parse("0000:c1:00.0").unwrap();
        for text in ["00000000:C1:00.0", "c1:00.0", "c1:00", "0:c1:0.0"] {
            assert_eq!(BusId::parse(text), Some(id), "{text}");
        }
        for text in ["", "0", "1:2:3:4", "0000:g1:00.0", "0000:+1:00.0", "0000:100:00.0", "GPU-c1:00.0"] {
            assert_eq!(BusId::parse(text), None, "{text}");
        }
        assert!(BusId::parse("0001:01:00.0") > BusId::parse("0000:c1:00.0"));
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(text in "\\PC{0,60}|(GPU UUID|Device Minor|Bus Location|GPU Excluded|DeviceFileMinor):[ \t0-9a-f:.-]{0,40}\n?") {
            let _ = (parse_version(&text), Gpu::parse(&text, text.clone()), parse_minor(&text));
        }

        #[test]
        fn bus_ids_round_trip(domain: u32, bus: u8, device: u8, function: u8) {
            let id = BusId { domain, bus, device, function };
            prop_assert_eq!(BusId::parse(&id.to_string()), Some(id));
        }
    }
}
