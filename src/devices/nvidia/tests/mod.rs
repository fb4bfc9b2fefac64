//! Whole plans, for hosts made of the files that a machine with H200s has, and expectations from the behaviour reference.

mod contents;
mod gpus;
mod obstacles;
mod specification;

use std::os::unix::fs::symlink;
use std::path::PathBuf;

use super::driver::PROC;
use super::inventory::{Inventory, KnownGpu};
use super::*;
use crate::devices::edits::Library;
use crate::devices::ldcache::{Cache, Entry};

const VERSION: &str = "580.159.04";
const UUIDS: [&str; 2] = ["GPU-4e7c61bb-d2ff-8a03-fd3c-f43e660581e9", "GPU-0b5f6a8c-1111-2222-3333-444455556666"];
/// As the machine's ldconfig lists them: name, file without the version or with another ending.
const NAMES: [(&str, &str); 9] = [
    ("libcuda.so.1", "libcuda"),
    ("libcuda.so", "libcuda"),
    ("libnvidia-ml.so.1", "libnvidia-ml"),
    ("libnvidia-ml.so", "libnvidia-ml"),
    ("libnvidia-nvvm.so.4", "libnvidia-nvvm"),
    ("libnvidia-glcore.so.580.159.04", "libnvidia-glcore"),
    ("libGLX_nvidia.so.0", "libGLX_nvidia"),
    ("libnvidia-encode.so.1", "libnvidia-encode"),
    ("libnvidia-opticalflow.so.1", "libnvidia-opticalflow"),
];

struct Node {
    directory: tempfile::TempDir,
}

impl Node {
    /// Without a driver.
    fn bare() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    /// With two GPUs, numbers 1 and 0 in the order of the bus, and the driver in a directory of its own.
    fn with_gpus() -> Self {
        let node = Self::bare();
        let version = format!("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}  Release Build\n");
        node.write(&format!("{PROC}/version"), &version);
        node.write(&format!("{PROC}/params"), "RmLogonRC: 1\nModifyDeviceFiles: 1\nDeviceFileMode: 438\n");
        node.write(&format!("{PROC}/registry"), "Binary: \"\"\n");
        for (place, minor) in [(6, 1), (7, 0)] {
            let directory = format!("0000:00:{place:02}.0");
            let uuid = UUIDS[minor];
            let text = format!(
                "GPU UUID: \t {uuid}\nBus Location: \t {directory}\nDevice Minor: \t {minor}\nGPU Excluded:\t No\n"
            );
            node.write(&format!("{PROC}/gpus/{directory}/information"), &text);
            // Of GPUs that could be divided, and are not.
            std::fs::create_dir_all(node.path(&format!("{PROC}/capabilities/gpu{minor}/mig"))).unwrap();
        }
        for name in ["nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"] {
            node.write(&format!("/dev/{name}"), "");
        }
        node.install(VERSION);
        node
    }

    fn install(&self, version: &str) {
        let directory = "/usr/local/nvidia/lib64";
        let mut entries: Vec<(String, String)> = vec![("libc.so.6".into(), "/usr/lib/libc.so.6".into())];
        for (name, library) in NAMES {
            let file = format!("{library}.so.{version}");
            self.write(&format!("{directory}/{file}"), "");
            if name != file {
                let _ = symlink(&file, self.path(&format!("{directory}/{name}")));
            }
            entries.push((name.into(), format!("{directory}/{name}")));
        }
        // Also where distributions have it.
        entries.push(("libcuda.so.1".into(), "/usr/lib/libcuda.so.1".into()));
        self.write("/usr/lib/libc.so.6", "");
        let _ = symlink("../local/nvidia/lib64/libcuda.so.1", self.path("/usr/lib/libcuda.so.1"));
        let flags = if cfg!(target_arch = "x86_64") { 0x303 } else { 0xa03 };
        let entry = |(name, path)| Entry { name, path, flags, os_version: 0, hwcap: 0 };
        let entries = entries.iter().map(|(name, path)| (name.as_bytes(), path.as_bytes())).map(entry).collect();
        self.write_bytes("/etc/ld.so.cache", &Cache { entries, ..Cache::default() }.to_bytes());
        for program in ["nvidia-smi", "nvidia-cuda-mps-control"] {
            self.write(&format!("/usr/local/nvidia/bin/{program}"), "");
        }
        for blob in ["gsp_ga10x.bin", "gsp_tu10x.bin", "other.bin"] {
            self.write(&format!("/lib/firmware/nvidia/{version}/{blob}"), "");
        }
    }

    fn path(&self, path: &str) -> PathBuf {
        self.directory.path().join(path.trim_start_matches('/'))
    }

    fn write(&self, path: &str, text: &str) {
        self.write_bytes(path, text.as_bytes());
    }

    fn write_bytes(&self, path: &str, content: &[u8]) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    /// Divides the GPU with that minor in two: capabilities 3 to 6.
    fn divide(&self, minor: u32) {
        for (path, number) in [("gi1", 3), ("gi1/ci0", 4), ("gi2", 5), ("gi2/ci0", 6)] {
            let path = format!("{PROC}/capabilities/gpu{minor}/mig/{path}/access");
            self.write(&path, &format!("DeviceFileMinor: {number}\nDeviceFileMode: 292\nDeviceFileModify: 1\n"));
            self.write(&format!("/dev/nvidia-caps/nvidia-cap{number}"), "");
        }
        for (name, number) in [("config", 1), ("monitor", 2)] {
            let text = format!("DeviceFileMinor: {number}\nDeviceFileMode: 256\n");
            self.write(&format!("{PROC}/capabilities/mig/{name}"), &text);
            self.write(&format!("/dev/nvidia-caps/nvidia-cap{number}"), "");
        }
    }

    fn plan_for(&self, job: &[&str], image: &[&str], refused: &[u32]) -> Result<ContainerEdits, String> {
        self.plan_in(job, image, refused, None, "nvidia")
    }

    /// With GPUs of the product line `brand`.
    fn plan_in(
        &self,
        job: &[&str],
        image: &[&str],
        refused: &[u32],
        root: Option<RootDir<'_>>,
        brand: &str,
    ) -> Result<ContainerEdits, String> {
        let job = job.iter().collect();
        let request = Request {
            host: &Host::at(self.directory.path().canonicalize().unwrap()),
            variables: &job,
            container: &image.iter().collect(),
            job: &job,
            step: Some(&StepFacts { job_id: 1, step_id: 0, local_tasks: 1, total_tasks: 1 }),
            refused: &refused.iter().map(|minor| format!("nvidia{minor}")).collect(),
            image: root,
        };
        plan(&request, &mut || Ok(inventory(brand))).map_err(|error| error.to_string())
    }

    fn plan(&self, image: &[&str]) -> ContainerEdits {
        self.plan_for(&[], image, &[]).unwrap()
    }
}

fn inventory(brand: &str) -> Inventory {
    let gpu = |minor: u32| KnownGpu {
        minor,
        uuid: UUIDS[minor as usize].into(),
        brand: Some(brand.into()),
        arch: Some("9.0".into()),
        instances: vec![],
    };
    Inventory { key: String::new(), cuda: Some("13.0".into()), gpus: [0, 1].map(gpu).into() }
}

fn nodes(edits: &ContainerEdits) -> Vec<&str> {
    edits.device_nodes.iter().map(|node| node.path.to_str().unwrap().strip_prefix("/dev/").unwrap()).collect()
}

fn hidden(edits: &ContainerEdits) -> Vec<&str> {
    edits.hidden.iter().map(|node| node.to_str().unwrap()).collect()
}

fn targets(edits: &ContainerEdits) -> Vec<&str> {
    edits.mounts.iter().map(|mount| mount.target.as_str()).collect()
}

fn library<'a>(edits: &'a ContainerEdits, name: &str) -> Option<&'a Library> {
    edits.libraries.iter().find(|library| library.names[0].starts_with(&format!("{name}.so.")))
}
