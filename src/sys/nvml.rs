//! NVML, NVIDIA's management library, loaded at run time: the dozen functions that an inventory takes (NVML API reference).

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;

const LIBRARY: &CStr = c"libnvidia-ml.so.1";
const SUCCESS: c_int = 0;
/// What a divided GPU is asked for a part that it does not have.
const NOT_FOUND: c_int = 6;
/// More GPUs and parts than any machine has.
const MAX_GPUS: c_uint = 256;
const MAX_PARTS: c_uint = 64;
/// `NVML_DEVICE_UUID_V2_BUFFER_SIZE`.
const UUID_LENGTH: usize = 96;

/// `nvmlDevice_t`.
type Device = *mut c_void;
type Init = unsafe extern "C" fn() -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;
type GetNumber = unsafe extern "C" fn(*mut c_uint) -> c_int;
type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type GetHandle = unsafe extern "C" fn(c_uint, *mut Device) -> c_int;
type GetText = unsafe extern "C" fn(Device, *mut c_char, c_uint) -> c_int;
type GetDeviceNumber = unsafe extern "C" fn(Device, *mut c_uint) -> c_int;
type GetPair = unsafe extern "C" fn(Device, *mut c_int, *mut c_int) -> c_int;
type GetPart = unsafe extern "C" fn(Device, c_uint, *mut Device) -> c_int;

/// The library, initialized. It stays loaded until the process ends.
#[derive(Debug)]
pub struct Nvml {
    handle: *mut c_void,
}

/// What it says of a GPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvmlGpu {
    /// `/dev/nvidiaN`.
    pub minor: u32,
    /// `GPU-…`.
    pub uuid: String,
    /// `nvmlBrandType_t`.
    pub brand: Option<u32>,
    /// Major and minor.
    pub compute_capability: Option<(i32, i32)>,
    /// Its parts: `MIG-…`, GPU instance, compute instance.
    pub instances: Vec<(String, u32, u32)>,
}

/// A function of the library, as a value of the type `$type`; none if this release does not have it.
macro_rules! function {
    ($nvml:expr, $name:literal, $type:ty) => {{
        // SAFETY: the handle is of a library that stays loaded, and the name is a C string.
        let address = unsafe { libc::dlsym($nvml.handle, $name.as_ptr()) };
        // SAFETY: the library's function of that name has this type; `None` is the null pointer.
        unsafe { std::mem::transmute::<*mut c_void, Option<$type>>(address) }
    }};
}

impl Nvml {
    /// Loads and initializes the library. The error is one line.
    pub fn load() -> Result<Self, String> {
        // SAFETY: the name is a C string; the library's initializers are those of the driver of this machine.
        let handle = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW) };
        if handle.is_null() {
            return Err(format!("{}: {}", LIBRARY.to_string_lossy(), load_error()));
        }
        let nvml = Self { handle };
        let init = function!(nvml, c"nvmlInit_v2", Init).ok_or("libnvidia-ml.so.1: it has no nvmlInit_v2")?;
        // SAFETY: takes nothing.
        nvml.check("nvmlInit", unsafe { init() })?;
        Ok(nvml)
    }

    fn check(&self, what: &str, result: c_int) -> Result<(), String> {
        if result == SUCCESS {
            return Ok(());
        }
        let text = function!(self, c"nvmlErrorString", ErrorString)
            // SAFETY: takes any number, and gives a constant string, or nothing.
            .map(|describe| unsafe { describe(result) })
            .filter(|text| !text.is_null())
            // SAFETY: not null, and ended by a NUL byte as every string of the library's.
            .map(|text| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
        Err(format!("{what}: {}", text.unwrap_or_else(|| format!("error {result}"))))
    }

    /// Newest version of CUDA: 1000 × major + 10 × minor.
    pub fn cuda_version(&self) -> Option<i32> {
        let get = function!(self, c"nvmlSystemGetCudaDriverVersion_v2", GetVersion)
            .or_else(|| function!(self, c"nvmlSystemGetCudaDriverVersion", GetVersion))?;
        let mut version = 0;
        // SAFETY: it writes one number.
        (unsafe { get(&mut version) } == SUCCESS).then_some(version)
    }

    /// All GPUs that this process can open.
    pub fn gpus(&self) -> Result<Vec<NvmlGpu>, String> {
        let missing = "libnvidia-ml.so.1: it is too old";
        let count = function!(self, c"nvmlDeviceGetCount_v2", GetNumber).ok_or(missing)?;
        let handle = function!(self, c"nvmlDeviceGetHandleByIndex_v2", GetHandle).ok_or(missing)?;
        let mut number = 0;
        // SAFETY: it writes one number.
        self.check("nvmlDeviceGetCount", unsafe { count(&mut number) })?;
        let mut gpus = Vec::new();
        for index in 0..number.min(MAX_GPUS) {
            let mut device = ptr::null_mut();
            // SAFETY: it writes one handle.
            self.check(&format!("GPU {index}"), unsafe { handle(index, &mut device) })?;
            gpus.push(self.gpu(device, index)?);
        }
        Ok(gpus)
    }

    fn gpu(&self, device: Device, index: u32) -> Result<NvmlGpu, String> {
        let named = |what: Option<_>| what.ok_or_else(|| format!("GPU {index}: it does not tell its name"));
        let capability = function!(self, c"nvmlDeviceGetCudaComputeCapability", GetPair).and_then(|get| {
            let (mut major, mut minor) = (0, 0);
            // SAFETY: it writes two numbers; the handle is the library's.
            (unsafe { get(device, &mut major, &mut minor) } == SUCCESS).then_some((major, minor))
        });
        Ok(NvmlGpu {
            minor: named(self.number(function!(self, c"nvmlDeviceGetMinorNumber", GetDeviceNumber), device))?,
            uuid: self.uuid(device).ok_or_else(|| format!("GPU {index}: it does not tell its UUID"))?,
            brand: self.number(function!(self, c"nvmlDeviceGetBrand", GetDeviceNumber), device),
            compute_capability: capability,
            instances: self.parts(device),
        })
    }

    fn number(&self, get: Option<GetDeviceNumber>, device: Device) -> Option<u32> {
        let mut number = 0;
        // SAFETY: it writes one number; the handle is the library's.
        (unsafe { get?(device, &mut number) } == SUCCESS).then_some(number)
    }

    fn uuid(&self, device: Device) -> Option<String> {
        let get = function!(self, c"nvmlDeviceGetUUID", GetText)?;
        let mut text = [0 as c_char; UUID_LENGTH];
        // SAFETY: it writes a string, at most as long as it is told; the handle is the library's.
        if unsafe { get(device, text.as_mut_ptr(), UUID_LENGTH as c_uint) } != SUCCESS {
            return None;
        }
        let bytes: Vec<u8> = text.iter().take_while(|&&byte| byte != 0).map(|&byte| byte as u8).collect();
        String::from_utf8(bytes).ok()
    }

    /// Those of a divided GPU.
    fn parts(&self, device: Device) -> Vec<(String, u32, u32)> {
        let most = self.number(function!(self, c"nvmlDeviceGetMaxMigDeviceCount", GetDeviceNumber), device);
        let Some(handle) = function!(self, c"nvmlDeviceGetMigDeviceHandleByIndex", GetPart) else { return Vec::new() };
        let mut parts = Vec::new();
        for index in 0..most.unwrap_or(0).min(MAX_PARTS) {
            let mut part = ptr::null_mut();
            // SAFETY: it writes one handle; the first one is the library's.
            match unsafe { handle(device, index, &mut part) } {
                SUCCESS => {}
                NOT_FOUND => continue,
                _ => break,
            }
            let gpu_instance = self.number(function!(self, c"nvmlDeviceGetGpuInstanceId", GetDeviceNumber), part);
            let compute_instance =
                self.number(function!(self, c"nvmlDeviceGetComputeInstanceId", GetDeviceNumber), part);
            if let (Some(uuid), Some(gpu), Some(compute)) = (self.uuid(part), gpu_instance, compute_instance) {
                parts.push((uuid, gpu, compute));
            }
        }
        parts
    }
}

fn load_error() -> String {
    // SAFETY: gives the last error of this thread as a string that stays until the next call, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "it cannot be loaded".into();
    }
    // SAFETY: not null, and ended by a NUL byte.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
