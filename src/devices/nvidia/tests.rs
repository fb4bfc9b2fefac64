//! Whole plans, for hosts made of the files that a machine with H200s has, and expectations from the behaviour reference.

use std::os::unix::fs::symlink;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::driver::PROC;
use super::inventory::{Inventory, KnownGpu};
use super::*;
use crate::devices::edits::{Library, Origin};
use crate::devices::ldcache::{Cache, Entry};
use crate::mounts::entry::Action;

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

#[test]
fn a_cuda_image_gets_the_driver_and_all_gpus() {
    let node = Node::with_gpus();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
    assert_eq!(nodes(&edits), ["nvidiactl", "nvidia1", "nvidia0", "nvidia-uvm", "nvidia-uvm-tools"]);
    assert!(edits.device_nodes.iter().all(|node| node.path == node.host_path && !node.optional));
    let names: Vec<Vec<&str>> =
        edits.libraries.iter().map(|library| library.names.iter().map(String::as_str).collect()).collect();
    assert_eq!(
        names,
        [
            vec!["libcuda.so.580.159.04", "libcuda.so", "libcuda.so.1"],
            vec!["libnvidia-ml.so.580.159.04", "libnvidia-ml.so.1"],
            vec!["libnvidia-nvvm.so.580.159.04", "libnvidia-nvvm.so.4"],
        ]
    );
    assert_eq!(edits.libraries[0].path, PathBuf::from("/usr/local/nvidia/lib64/libcuda.so.580.159.04"));
    assert_eq!(
        targets(&edits),
        [
            "/proc/driver/nvidia",
            "/proc/driver/nvidia/gpus/0000:00:06.0",
            "/proc/driver/nvidia/gpus/0000:00:07.0",
            "/usr/bin/nvidia-smi",
            "/usr/bin/nvidia-cuda-mps-control",
            "/lib/firmware/nvidia/580.159.04/gsp_ga10x.bin",
            "/lib/firmware/nvidia/580.159.04/gsp_tu10x.bin",
        ]
    );
    let read_only = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    for mount in edits.mounts.iter().filter(|mount| matches!(mount.action, Action::Bind { .. })) {
        assert_eq!(mount.set & read_only, read_only, "{mount:?}");
    }
    assert_eq!((hidden(&edits), edits.gpu_numbers.len(), edits.notices.len()), (vec![], 0, 0));
}

#[test]
fn procfs_shows_the_chosen_gpus_only() {
    let edits = Node::with_gpus().plan(&["NVIDIA_VISIBLE_DEVICES=0"]);
    assert_eq!(targets(&edits)[..2], ["/proc/driver/nvidia", "/proc/driver/nvidia/gpus/0000:00:06.0"]);
    assert_eq!(targets(&edits).iter().filter(|target| target.contains("gpus")).count(), 1);
    let content = |name: &str| {
        let file = edits.files.iter().find(|file| file.path == Path::new(PROC).join(name)).unwrap();
        (String::from_utf8_lossy(&file.content).into_owned(), file.mode)
    };
    assert_eq!(content("params"), ("RmLogonRC: 1\nModifyDeviceFiles: 0\nDeviceFileMode: 438\n".into(), 0o444));
    assert!(content("version").0.contains(VERSION));
    assert_eq!(content("registry").0, "Binary: \"\"\n");
    assert_eq!(hidden(&edits), ["/dev/nvidia0"]);
}

#[test]
fn capabilities_choose_libraries_and_nodes() {
    let node = Node::with_gpus();
    node.write("/dev/nvidia-modeset", "");
    node.write("/dev/gdrdrv", "");
    let of = |capabilities: &str| {
        node.plan(&["NVIDIA_VISIBLE_DEVICES=0", &format!("NVIDIA_DRIVER_CAPABILITIES={capabilities}")])
    };
    let has = |edits: &ContainerEdits, names: &[&str]| names.iter().all(|name| library(edits, name).is_some());
    let utility = of("");
    assert_eq!(utility.libraries.len(), 1);
    assert!(has(&utility, &["libnvidia-ml"]));
    assert_eq!(nodes(&utility), ["nvidiactl", "nvidia1"]);
    let compute = of("compute");
    assert_eq!(compute.libraries.len(), 2);
    assert!(nodes(&compute).ends_with(&["nvidia-uvm", "nvidia-uvm-tools", "gdrdrv"]), "{:?}", nodes(&compute));
    let video = of("video");
    assert!(has(&video, &["libcuda", "libnvidia-encode"]));
    assert_eq!(
        library(&video, "libnvidia-opticalflow").unwrap().names,
        ["libnvidia-opticalflow.so.580.159.04", "libnvidia-opticalflow.so", "libnvidia-opticalflow.so.1"]
    );
    for (capability, has_modeset) in [("graphics", false), ("display", true)] {
        let edits = of(capability);
        let names = ["libGLX_nvidia.so.580.159.04", "libGLX_indirect.so.0", "libGLX_nvidia.so.0"];
        assert_eq!(library(&edits, "libGLX_nvidia").unwrap().names, names);
        assert_eq!(library(&edits, "libnvidia-glcore").unwrap().names, ["libnvidia-glcore.so.580.159.04"]);
        assert_eq!(nodes(&edits).contains(&"nvidia-modeset"), has_modeset);
        let profile = edits.files.last().unwrap();
        let content: serde_json::Value =
            serde_json::from_str(&String::from_utf8_lossy(&profile.content).replace("0x2]", "2]")).unwrap();
        assert_eq!(content["profiles"][0]["settings"][1], 2);
    }
}

#[test]
fn void_leaves_everything_alone_but_what_is_not_the_jobs() {
    let node = Node::with_gpus();
    for image in [&["NVIDIA_VISIBLE_DEVICES=void"][..], &["NVIDIA_VISIBLE_DEVICES="], &[]] {
        assert_eq!(node.plan(image), ContainerEdits::default());
    }
    let edits = node.plan_for(&["SLURM_STEP_GPUS=1"], &[], &[]).unwrap();
    assert_eq!(hidden(&edits), ["/dev/nvidia0"]);
    assert_eq!(edits.gpu_numbers, [(1, 0)]);
    assert!(edits.device_nodes.is_empty() && edits.mounts.is_empty());
}

#[test]
fn none_is_the_driver_without_gpus() {
    let edits = Node::with_gpus().plan(&["NVIDIA_VISIBLE_DEVICES=none", "NVIDIA_REQUIRE_CUDA=cuda>=99"]);
    assert_eq!(nodes(&edits), ["nvidiactl"]);
    assert_eq!(hidden(&edits), ["/dev/nvidia1", "/dev/nvidia0"]);
    assert!(library(&edits, "libnvidia-ml").is_some() && targets(&edits).contains(&"/usr/bin/nvidia-smi"));
}

#[test]
fn a_job_sees_what_it_has() {
    let node = Node::with_gpus();
    let image = ["NVIDIA_VISIBLE_DEVICES=all"];
    // By the device cgroup: Slurm counts what the job can open.
    let edits = node.plan_for(&[], &image, &[1]).unwrap();
    assert_eq!((nodes(&edits), hidden(&edits)), (vec!["nvidiactl", "nvidia0"], vec!["/dev/nvidia1"]));
    assert_eq!(edits.gpu_numbers, []);
    // By what Slurm says: it means device nodes.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=1"], &image, &[]).unwrap();
    assert_eq!((nodes(&edits), hidden(&edits)), (vec!["nvidiactl", "nvidia1"], vec!["/dev/nvidia0"]));
    assert_eq!(edits.gpu_numbers, [(1, 0)]);
    // Both: as outside.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=0,1"], &image, &[]).unwrap();
    assert_eq!((hidden(&edits).len(), edits.gpu_numbers), (0, vec![]));
    // Of both the user wants one.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=0,1", "NVIDIA_VISIBLE_DEVICES=1"], &image, &[]).unwrap();
    assert_eq!((hidden(&edits), edits.gpu_numbers.clone()), (vec!["/dev/nvidia1"], vec![(0, 0)]));
    // None.
    let edits = node.plan_for(&[], &image, &[0, 1]).unwrap();
    assert_eq!((nodes(&edits), hidden(&edits)), (vec!["nvidiactl"], vec!["/dev/nvidia1", "/dev/nvidia0"]));
    let error = node.plan_for(&["NVIDIA_VISIBLE_DEVICES=0"], &[], &[0, 1]).unwrap_err();
    assert_eq!(error, "nvidia-container-cli: device error: 0: unknown device; this job has no GPU on this node");
}

#[test]
fn parts_of_gpus() {
    let node = Node::with_gpus();
    node.divide(0);
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=1:1", "NVIDIA_MIG_MONITOR_DEVICES=all"]);
    assert_eq!(nodes(&edits)[..2], ["nvidiactl", "nvidia0"]);
    assert_eq!(nodes(&edits)[2..], ["nvidia-caps/nvidia-cap5", "nvidia-caps/nvidia-cap6", "nvidia-caps/nvidia-cap2"]);
    assert_eq!(hidden(&edits), ["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap3", "/dev/nvidia-caps/nvidia-cap4"]);
    let mig = "/proc/driver/nvidia/capabilities/gpu0/mig";
    let capabilities: Vec<&str> =
        targets(&edits).into_iter().filter(|target| target.contains("capabilities")).collect();
    assert_eq!(
        capabilities,
        [
            format!("{mig}/gi2/access"),
            format!("{mig}/gi2/ci0/access"),
            "/proc/driver/nvidia/capabilities/mig/monitor".into()
        ]
    );
    // Slurm's numbers of parts are nobody else's.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=5"], &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap();
    assert_eq!(edits.device_nodes.len(), 3 + 4);
}

/// An image for a newer CUDA than the driver's.
#[test]
fn the_newer_cuda_counts() {
    let node = Node::with_gpus();
    let image = tempfile::tempdir().unwrap();
    let directory = image.path().join("usr/local/cuda/compat");
    std::fs::create_dir_all(&directory).unwrap();
    let root = std::fs::File::open(image.path()).unwrap();
    let root = RootDir::new(std::os::fd::AsFd::as_fd(&root));
    let plan = |capabilities: &str, devices: &str, brand: &str| {
        let image = [format!("NVIDIA_VISIBLE_DEVICES={devices}"), format!("NVIDIA_DRIVER_CAPABILITIES={capabilities}")];
        node.plan_in(&[], &image.each_ref().map(String::as_str), &[], Some(root), brand).unwrap()
    };
    let of_image = |edits: &ContainerEdits| edits.libraries.iter().filter(|one| one.origin == Origin::Image).count();
    for (version, newer) in [("580.999.99", false), ("575.57.08", false), ("590.44.01", true)] {
        let file = directory.join(format!("libcuda.so.{version}"));
        std::fs::write(&file, "").unwrap();
        let edits = plan("compute,utility", "all", "tesla");
        assert_eq!((of_image(&edits), edits.log.len()), (usize::from(newer), usize::from(newer)), "{version}");
        if newer {
            assert_eq!(edits.libraries[0].names, ["libcuda.so.580.159.04"]);
            assert!(edits.log[0].contains("driver 590.44.01"), "{edits:?}");
            // GPUs that refuse it, and containers without CUDA or GPUs.
            let consumer = plan("compute", "all", "geforcertx");
            assert_eq!((of_image(&consumer), consumer.log.len()), (0, 1));
            assert_eq!(of_image(&plan("utility", "all", "tesla")) + of_image(&plan("compute", "none", "tesla")), 0);
        }
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn requirements() {
    let node = Node::with_gpus();
    let plan = |requirement: &str| {
        let requirement = format!("NVIDIA_REQUIRE_CUDA={requirement}");
        node.plan_for(&[], &["NVIDIA_VISIBLE_DEVICES=all", &requirement], &[])
    };
    assert!(plan("cuda>=13.0 brand=tesla,driver>=535,driver<536").is_ok());
    assert!(plan("brand=nvidia,arch>=9.0").is_ok());
    assert_eq!(
        plan("cuda>=13.1 brand=tesla,driver>=535").unwrap_err(),
        "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.1 brand=tesla,driver>=535, please update \
         your driver to a newer version, or use an earlier cuda container (this node has CUDA 13.0, driver 580.159.04, brand \
         nvidia, arch 9.0; NVIDIA_DISABLE_REQUIRE=1 starts it all the same)"
    );
    let job = ["NVIDIA_DISABLE_REQUIRE=1"];
    assert!(node.plan_for(&job, &["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99"], &[]).is_ok());
}

#[test]
fn an_nvml_that_does_not_answer_is_said_and_no_obstacle() {
    let node = Node::with_gpus();
    let job = Environment::default();
    let image = ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99"].iter().collect();
    let request = Request {
        host: &Host::at(node.directory.path()),
        variables: &job,
        container: &image,
        job: &job,
        step: None,
        refused: &DeviceAccess::default(),
        image: None,
    };
    let edits = plan(&request, &mut || Err("nvmlInit: Unknown Error".into())).unwrap();
    assert!(edits.notices[0].ends_with("was not checked: nvmlInit: Unknown Error"), "{:?}", edits.notices);
    let image = ["NVIDIA_VISIBLE_DEVICES=MIG-4"].iter().collect();
    node.divide(0);
    let request = Request { container: &image, ..request };
    let error = plan(&request, &mut || Err("nvmlInit: Unknown Error".into())).unwrap_err();
    assert_eq!(error.to_string(), "nvidia-container-cli: nvml error: MIG-4: nvmlInit: Unknown Error");
}

#[test]
fn a_driver_that_was_upgraded_while_loaded() {
    let node = Node::with_gpus();
    node.install("585.10.01");
    for file in std::fs::read_dir(node.path("/usr/local/nvidia/lib64")).unwrap() {
        let path = file.unwrap().path();
        if path.to_str().unwrap().contains(VERSION) {
            std::fs::remove_file(path).unwrap();
        } else if path.is_symlink() {
            let name = path.file_name().unwrap().to_str().unwrap().split_once(".so").unwrap().0;
            std::fs::remove_file(&path).unwrap();
            symlink(format!("{name}.so.585.10.01"), &path).unwrap();
        }
    }
    let error = node.plan_for(&[], &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap_err();
    assert!(error.contains("version mismatch: kernel module 580.159.04, libraries 585.10.01:"), "{error}");
    // Nothing of it concerns a job without GPUs.
    assert!(node.plan_for(&[], &["NVIDIA_VISIBLE_DEVICES=all"], &[0, 1]).is_ok());
    std::fs::remove_file(node.path("/etc/ld.so.cache")).unwrap();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all"]);
    assert!(edits.notices[0].contains("run ldconfig there"), "{:?}", edits.notices);
}

#[test]
fn services_channels_storage() {
    let node = Node::with_gpus();
    let directory = node.path("/run/nvidia-persistenced");
    std::fs::create_dir_all(&directory).unwrap();
    let _socket = UnixListener::bind(directory.join("socket")).unwrap();
    for path in ["/tmp/nvidia-mps/control", "/etc/cufile.json", "/dev/nvidia-fs0", "/dev/nvidia-fs1", "/dev/nvidia-fsx"]
    {
        node.write(path, "");
    }
    for channel in ["channel0", "channel1", "other"] {
        node.write(&format!("/dev/nvidia-caps-imex-channels/{channel}"), "");
    }
    for switch in ["nvidia-nvswitchctl", "nvidia-nvswitch0"] {
        node.write(&format!("/dev/{switch}"), "");
    }
    let all = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
    let services = ["/dev/nvidia-caps-imex-channels", "/run/nvidia-persistenced/socket", "/tmp/nvidia-mps"];
    let has: Vec<&str> = targets(&all).into_iter().filter(|target| services.contains(target)).collect();
    assert_eq!(has, services);
    assert!(!nodes(&all).iter().any(|node| node.contains("-fs") || node.contains("nvswitch")));
    let job = ["NVIDIA_GDS=enabled", "NVIDIA_NVSWITCH=enabled", "NVIDIA_IMEX_CHANNELS=1"];
    let some = node.plan_for(&job, &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap();
    assert_eq!(
        nodes(&some)[3..],
        ["nvidia-nvswitchctl", "nvidia-nvswitch0", "nvidia-fs0", "nvidia-fs1", "nvidia-caps-imex-channels/channel1"]
    );
    assert_eq!(hidden(&some), ["/dev/nvidia-caps-imex-channels/channel0"]);
    assert!(targets(&some).contains(&"/etc/cufile.json") && !targets(&some).contains(&"/tmp/nvidia-mps"));
    let error = node.plan_for(&["NVIDIA_IMEX_CHANNELS=7"], &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap_err();
    assert!(error.ends_with("NVIDIA_IMEX_CHANNELS: 7: unknown channel on this node"), "{error}");
}

#[test]
fn what_is_missing_on_the_node_is_said() {
    let node = Node::with_gpus();
    for name in ["nvidia-uvm", "nvidia0"] {
        std::fs::remove_file(node.path(&format!("/dev/{name}"))).unwrap();
    }
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute"]);
    assert!(edits.notices[0].contains("/dev/nvidia0 is missing"), "{:?}", edits.notices);
    assert!(edits.notices[1].contains("nvidia_uvm is not loaded"), "{:?}", edits.notices);
    assert_eq!(nodes(&edits), ["nvidiactl", "nvidia1", "nvidia-uvm-tools"]);
    // Libraries that the linker's cache has.
    let node = Node::with_gpus();
    let library = node.path(&format!("/usr/local/nvidia/lib64/libcuda.so.{VERSION}"));
    std::fs::remove_file(library).unwrap();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
    assert_eq!((edits.notices.len(), edits.libraries.len()), (1, 2), "{edits:?}");
    let text = "NVIDIA: libraries in this node's /etc/ld.so.cache are gone, and programs will not find them: /usr/l";
    assert!(
        edits.notices[0].starts_with(text) && edits.notices[0].contains("/libcuda.so.1; install the driver's"),
        "{:?}",
        edits.notices
    );
    // What is not wanted is not missed.
    assert_eq!(node.plan(&["NVIDIA_VISIBLE_DEVICES=all"]).notices, [""; 0]);
}

#[test]
fn without_a_driver_images_start_and_wishes_fail() {
    let node = Node::bare();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=whatever"]);
    let notices = edits.notices.clone();
    assert_eq!(edits, ContainerEdits { notices, ..ContainerEdits::default() });
    assert!(edits.notices[0].starts_with("no NVIDIA driver is loaded on this node"), "{:?}", edits.notices);
    for value in ["", "void", "none", "all"] {
        let job = format!("NVIDIA_VISIBLE_DEVICES={value}");
        assert_eq!(node.plan_for(&[&job], &["NVIDIA_VISIBLE_DEVICES=all"], &[]), Ok(ContainerEdits::default()));
    }
    let error = node.plan_for(&["NVIDIA_VISIBLE_DEVICES=0"], &[], &[]).unwrap_err();
    assert!(error.contains("no NVIDIA driver is loaded on this node"), "{error}");
}

/// A specification of both GPUs, by number and by identifier, and of what is not one.
fn specification(nodes: &[(&str, &str)]) -> tempfile::TempDir {
    let device = |(name, node): &(&str, &str)| serde_json::json!({"name": name, "containerEdits": {"deviceNodes": [{"path": node}]}});
    let devices: Vec<_> = nodes.iter().map(device).collect();
    let text = serde_json::json!({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices});
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("nvidia.json"), text.to_string()).unwrap();
    directory
}

#[test]
fn a_specification_takes_the_place_of_our_search() {
    use by_cdi::Way;
    let node = Node::with_gpus();
    let nodes = [
        ("0", "/dev/nvidia1"),
        ("1", "/dev/nvidia0"),
        (UUIDS[1], "/dev/nvidia1"),
        (UUIDS[0], "/dev/nvidia0"),
        ("all", "/dev/nvidia0"),
    ];
    let directory = specification(&nodes);
    let choose = |variables: &[&str], names: &[&str], directory: &Path| {
        let host = Host::at(node.directory.path());
        let variables: Environment = variables.iter().collect();
        let names: Vec<_> = names.iter().map(|name| name.parse().unwrap()).collect();
        let request = Request {
            host: &host,
            variables: &variables,
            container: &Environment::default(),
            job: &variables,
            step: Some(&StepFacts { job_id: 1, step_id: 0, local_tasks: 1, total_tasks: 1 }),
            refused: &DeviceAccess::default(),
            image: None,
        };
        match by_cdi::choose(&request, &[directory.to_owned()], &names, &mut || Err("NVML is not asked".into())) {
            Ok(Way::Cdi { names, edits, .. }) => {
                let names = names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
                let hidden = edits.hidden.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
                format!("{} hides {}", names.join(" "), hidden.join(" "))
            }
            Ok(Way::Native(note)) => format!("native{}", note.map(|note| format!(": {note}")).unwrap_or_default()),
            Err(error) => error.to_string(),
        }
    };
    let with = |variables: &[&str], names: &[&str]| choose(variables, names, directory.path());
    // NVML's order is that of the bus, where number 1 comes first.
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=all"], &[]), "nvidia.com/gpu=0 nvidia.com/gpu=1 hides ");
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=0"], &[]), "nvidia.com/gpu=0 hides /dev/nvidia0");
    let given = "SLURM_STEP_GPUS=0";
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=all", given], &[]), "nvidia.com/gpu=1 hides /dev/nvidia1");
    // Not wanted, and wanted by name: then also without the variable.
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=void"], &[]), "native");
    assert_eq!(with(&[given], &["v.com/x=1", "nvidia.com/gpu=all"]), "v.com/x=1 nvidia.com/gpu=1 hides /dev/nvidia1");
    assert_eq!(with(&[given], &["nvidia.com/gpu=0"]), "nvidia.com/gpu=0 hides /dev/nvidia1");
    assert_eq!(with(&["SLURM_STEP_GPUS=NoDevFiles"], &["nvidia.com/gpu=all"]), " hides /dev/nvidia1 /dev/nvidia0");
    // Without one, or with one that is too old.
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(choose(&["NVIDIA_VISIBLE_DEVICES=all"], &[], empty.path()), "native");
    let old = specification(&nodes[1..2]);
    let note = choose(&["NVIDIA_VISIBLE_DEVICES=all"], &[], old.path());
    assert!(
        note.starts_with("native: the CDI specification of nvidia.com/gpu has no device for /dev/nvidia1"),
        "{note}"
    );
    let error = choose(&[], &["nvidia.com/gpu=all"], old.path());
    assert!(error.starts_with("the CDI specification of nvidia.com/gpu has no device for /dev/nvidia1"), "{error}");
}

/// Three GPUs with the minors 0, 1, 2, in a node that Slurm manages.
#[test]
fn a_step_that_joins_has_the_containers_numbers() {
    let gpu = |minor: u32| driver::Gpu {
        bus: driver::BusId::parse(&format!("{minor}:0.0")).unwrap(),
        directory: String::new(),
        uuid: None,
        minor,
        instances: vec![],
    };
    let driver = Driver { version: String::new(), gpus: (0..3).map(gpu).collect() };
    let joining = |own: &str, refused: &[u32], shown: &[u32]| {
        let refused = refused.iter().map(|minor| format!("nvidia{minor}")).collect();
        let job = [format!("SLURM_STEP_GPUS={own}")].iter().collect();
        let step = StepFacts { job_id: 1, step_id: 1, local_tasks: 1, total_tasks: 1 };
        let allocation = Allocation::of(&Host::at("/nonexistent"), &driver, Some(&step), &job, &refused);
        numbers_of_joining(&driver, &allocation, shown)
    };
    // Slurm's numbers are those of the nodes, and the container counts what it has.
    assert_eq!(joining("1", &[], &[1, 2]), (vec![(1, 0)], None));
    assert_eq!(joining("0,1", &[], &[0, 1]), (vec![], None));
    let (numbers, text) = joining("0,2", &[], &[1, 2]);
    assert_eq!(numbers, [(2, 1)]);
    let expected = "the running container has the GPUs of the step that made it, and not /dev/nvidia0 of this step";
    assert_eq!(text.as_deref(), Some(expected));
    // With a device cgroup both count what they can open.
    assert_eq!(joining("1", &[0, 2], &[0, 1]), (vec![], None));
    assert_eq!(joining("1,2", &[0], &[0, 2]).0, [(1, 0)]);
    // Without GPUs of Slurm's there is nothing to say.
    let nobody =
        Allocation::of(&Host::at("/nonexistent"), &driver, None, &Environment::default(), &DeviceAccess::default());
    assert_eq!(numbers_of_joining(&driver, &nobody, &[0]), (vec![], None));
}
