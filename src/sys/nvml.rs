//! NVML, NVIDIA's management library, loaded at run time by `nvml-wrapper`: what an inventory takes of it. The numbers of
//! parts of GPUs are beyond that crate's safe functions, and are asked by its bindings.

use std::mem::ManuallyDrop;
use std::os::raw::c_uint;

use nvml_wrapper::enum_wrappers::device::Brand;
use nvml_wrapper::error::NvmlError;
use nvml_wrapper::{Device, Nvml as Library};

/// More GPUs and parts than any machine has.
const MAX_GPUS: u32 = 256;
const MAX_PARTS: u32 = 64;

/// The library, initialized. It stays so until the process ends: giving up the GPUs takes long, and the kernel does it anyway.
#[derive(Debug)]
pub struct Nvml(ManuallyDrop<Library>);

/// What it says of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmlGpu {
    /// `/dev/nvidiaN`.
    pub minor: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// Product line; none of those that the crate does not know.
    pub brand: Option<Brand>,
    /// Major and minor.
    pub compute_capability: Option<(i32, i32)>,
    /// Its parts: `MIG-…`, GPU instance, compute instance.
    pub instances: Vec<(String, u32, u32)>,
}

impl Nvml {
    /// Loads `libnvidia-ml.so.1` and initializes it. The error is one line.
    pub fn load() -> Result<Self, String> {
        let failed = |error| match error {
            NvmlError::LibloadingError(error) => format!("NVML cannot be loaded: {error}"),
            other => format!("NVML cannot be initialized: {other}"),
        };
        Library::init().map(|library| Self(ManuallyDrop::new(library))).map_err(failed)
    }

    /// Newest version of CUDA: 1000 × major + 10 × minor.
    pub fn cuda_version(&self) -> Option<i32> {
        self.0.sys_cuda_driver_version().ok()
    }

    /// All GPUs that this process can open.
    pub fn gpus(&self) -> Result<Vec<NvmlGpu>, String> {
        let number = self.0.device_count().map_err(|error| format!("NVML cannot count the GPUs: {error}"))?;
        let gpu = |index| {
            let gpu = self.0.device_by_index(index).and_then(|device| Self::gpu(&device));
            gpu.map_err(|error| format!("NVML on GPU {index}: {error}"))
        };
        (0..number.min(MAX_GPUS)).map(gpu).collect()
    }

    fn gpu(device: &Device<'_>) -> Result<NvmlGpu, NvmlError> {
        Ok(NvmlGpu {
            minor: device.minor_number()?,
            uuid: device.uuid()?,
            brand: device.brand().ok(),
            compute_capability: device.cuda_compute_capability().ok().map(|found| (found.major, found.minor)),
            instances: Self::parts(device),
        })
    }

    /// Those of a divided GPU.
    fn parts(device: &Device<'_>) -> Vec<(String, u32, u32)> {
        let mut parts = Vec::new();
        for index in 0..device.mig_device_count().unwrap_or(0).min(MAX_PARTS) {
            let part = match device.mig_device_by_index(index) {
                Ok(part) => part,
                // A place that no part is in.
                Err(NvmlError::NotFound) => continue,
                Err(_) => break,
            };
            if let (Ok(uuid), Some((gpu_instance, compute_instance))) = (part.uuid(), numbers(&part)) {
                parts.push((uuid, gpu_instance, compute_instance));
            }
        }
        parts
    }
}

/// GPU instance and compute instance.
fn numbers(part: &Device<'_>) -> Option<(u32, u32)> {
    let library = part.nvml().lib();
    let get = [&library.nvmlDeviceGetGpuInstanceId, &library.nvmlDeviceGetComputeInstanceId];
    let mut numbers = [0; 2];
    for (get, number) in get.into_iter().zip(&mut numbers) {
        let get = get.as_ref().ok()?;
        // SAFETY: the function writes one number; the handle is the library's, which `part` keeps initialized.
        (unsafe { get(part.handle(), std::ptr::from_mut::<c_uint>(number)) } == 0).then_some(())?;
    }
    let [gpu_instance, compute_instance] = numbers;
    Some((gpu_instance, compute_instance))
}
