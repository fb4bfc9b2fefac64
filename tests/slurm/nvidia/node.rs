//! A cluster of one node with three GPUs that are none: what the driver shows in procfs, device nodes of other devices,
//! libraries with nothing but a SONAME in a directory of the driver's own, and an NVML that knows the rest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::json;
use testbed::allocation::Allocation;
use testbed::image::{Compression, ImageBuilder};
use testbed::install::Build;
use testbed::{ClusterOptions, Output, Running, Testbed, images, process, wait};

pub const VERSION: &str = "580.159.04";
/// What can be opened instead of GPUs: zero, full, random.
const NUMBERS: [u32; 3] = [5, 7, 8];

/// Capabilities: of the last GPU's two instances, and of dividing GPUs.
const PARTS: [(&str, u32); 6] = [
    ("gpu2/mig/gi1/access", 21),
    ("gpu2/mig/gi1/ci0/access", 22),
    ("gpu2/mig/gi2/access", 30),
    ("gpu2/mig/gi2/ci0/access", 31),
    ("mig/config", 1),
    ("mig/monitor", 2),
];

/// SONAMEs.
const LIBRARIES: [(&str, &str); 4] = [
    ("libcuda", "libcuda.so.1"),
    ("libnvidia-ml", "libnvidia-ml.so.1"),
    ("libnvidia-nvvm", "libnvidia-nvvm.so.4"),
    ("libnvidia-glcore", "libnvidia-glcore.so.580.159.04"),
];

/// The functions that the inventory needs. Breaks while `/run/pyxis/nvml-broken` is there. While the last GPU is divided, NVML
/// counts its parts in an order of its own, with a gap.
const NVML: &str = r#"
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static int order[5] = {0, 1, 2, 3, 4};
static const char *uuids[5] = {UUIDS, "MIG-1f6b7b9a-5a77-5e6e-b3c8-a1ddf5d9b3ad", "MIG-2f6b7b9a-5a77-5e6e-b3c8-a1ddf5d9b3ad"};
static int divided(void) { return access("/proc/driver/nvidia/capabilities/gpu2/mig/gi1", F_OK) == 0; }
int nvmlInit_v2(void) { return access("/run/pyxis/nvml-broken", F_OK) == 0 ? 999 : 0; }
const char *nvmlErrorString(int error) { return error == 999 ? "Unknown Error" : "Not Supported"; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 13000; return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 3; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = &order[index]; return 0; }
int nvmlDeviceGetMinorNumber(void *device, unsigned *minor) { *minor = *(int *)device; return 0; }
int nvmlDeviceGetUUID(void *device, char *text, unsigned length) { snprintf(text, length, "%s", uuids[*(int *)device]); return 0; }
int nvmlDeviceGetBrand(void *device, unsigned *brand) { *brand = 14; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetMaxMigDeviceCount(void *device, unsigned *count) { *count = 7; return 0; }
int nvmlDeviceGetMigDeviceHandleByIndex(void *device, unsigned index, void **part) {
    if (*(int *)device != 2 || !divided()) return 3;
    if (index != 0 && index != 2) return 6;
    *part = &order[index == 0 ? 4 : 3];
    return 0;
}
int nvmlDeviceGetGpuInstanceId(void *part, unsigned *id) { *id = *(int *)part - 2; return 0; }
int nvmlDeviceGetComputeInstanceId(void *part, unsigned *id) { *id = 0; return 0; }
"#;

/// Does what every CUDA program does first.
const PROGRAM: &str = r#"
#include <dlfcn.h>
#include <stdio.h>
int main(void) {
    void *library = dlopen("libcuda.so.1", RTLD_NOW);
    int (*init)(unsigned) = library ? (int (*)(unsigned))dlsym(library, "cuInit") : 0;
    if (!init) { puts(dlerror()); return 1; }
    printf("cuInit %d\n", init(0));
    return 0;
}
"#;

/// Gives the node a `/dev` with GPUs, the driver's procfs, its libraries in the linker's cache, its firmware.
const SETUP: &str = r#"
    set -e
    cd "$1"
    mkdir -p dev-new && mount -t tmpfs -o mode=755 tmpfs dev-new
    for node in null zero full random urandom tty fuse ptmx; do cp -a /dev/$node dev-new/; done
    for link in fd stdin stdout stderr; do cp -P /dev/$link dev-new/; done
    mkdir dev-new/pts dev-new/shm
    mount --rbind /dev/pts dev-new/pts && mount --rbind /dev/shm dev-new/shm
    cp -a devices/* dev-new/
    mount --rbind dev-new /dev
    mount -t tmpfs -o mode=755 tmpfs /proc/driver
    cp -a proc/* /proc/driver/
    mount --bind ld.so.cache /etc/ld.so.cache
    mount --bind firmware-path /sys/module/firmware_class/parameters/path
"#;

/// The cluster and its image, `cuda`.
pub struct GpuBed {
    pub bed: Testbed,
}

pub fn uuid(minor: usize) -> String {
    format!("GPU-{minor}e7c61bb-d2ff-8a03-fd3c-f43e660581e9")
}

impl GpuBed {
    pub fn start() -> Result<Self> {
        let name = format!("gpus-{}", std::process::id());
        let options = ClusterOptions { nodes: 1, gpus: NUMBERS.len(), ..ClusterOptions::default() };
        let bed = Testbed::start(&name, &Build::of(env!("CARGO_BIN_EXE_pyxis")), &options)?;
        let driver = bed.site.make_directory("driver")?;
        make_driver(&driver)?;
        let node = &bed.cluster.nodes()[0];
        process::output_of(node.command("sh").args(["-c", SETUP, "setup"]).arg(&driver))?;
        let image = make_image(&bed.site.make_directory("state/cuda")?)?;
        bed.hub.push(&image, "library/cuda:latest")?;
        Ok(Self { bed })
    }

    /// Runs `srun ARGUMENTS` as user 0 with these variables.
    pub fn srun(&self, variables: &[(&str, &str)], arguments: &[&str]) -> Result<Output> {
        let mut command = self.bed.cluster.command(0, "srun", arguments);
        process::run(command.envs(variables.iter().copied()), wait::DEADLINE * 2)
    }

    /// A shell script in a container of the image, in a step with `gpus` GPUs. Gives what it writes.
    pub fn sh(&self, gpus: usize, variables: &[(&str, &str)], script: &str) -> Result<String> {
        let gpus = format!("--gpus-per-node={gpus}");
        let output = self.srun(variables, &[&gpus, "--container-image=cuda", "sh", "-c", script])?;
        Ok(output.success()?.stdout.trim_end().to_owned())
    }

    /// The same in each of `count` steps of one job with a GPU each, all of which run when they are asked.
    pub fn at_once(&self, count: usize, image: &str, variables: &[(&str, &str)], script: &str) -> Result<Vec<String>> {
        let job = Allocation::new(&self.bed.cluster, &[&format!("-n{count}"), &format!("--gpus={count}")])?;
        let image = format!("--container-image={image}");
        let begin = |_| {
            let mut step = job.srun(["--exact", "-n1", "--gpus=1", &image, "sh", "-c", &waiting(script)]);
            Running::start(step.envs(variables.iter().copied()).stdin(Stdio::piped()))
        };
        let mut steps = (0..count).map(begin).collect::<Result<Vec<_>>>()?;
        steps.iter_mut().try_for_each(|step| step.wait_for_text("last\n", wait::DEADLINE * 2))?;
        steps.into_iter().map(end).collect()
    }

    /// A shell script on the node, as root.
    pub fn on_node(&self, script: &str) -> Result<String> {
        let node = &self.bed.cluster.nodes()[0];
        process::output_of(node.command("sh").args(["-ec", script, "node"]).arg(self.bed.site.path("driver")))
    }

    /// The node's runtime directory, from outside.
    pub fn runtime(&self) -> PathBuf {
        self.bed.cluster.nodes()[0].private("/run/pyxis")
    }
}

/// A script that goes on when its input ends, after its last line, `last`.
pub fn waiting(script: &str) -> String {
    format!("{script}; echo last; cat")
}

/// Lets a step with such a script go on. Gives what it has written before.
pub fn end(mut step: Running) -> Result<String> {
    step.write_stdin(b"")?;
    let output = step.wait(wait::DEADLINE)?.success()?;
    Ok(output.stdout.trim_end().trim_end_matches("last").trim_end().to_owned())
}

pub fn compile(source: &str, output: &Path, arguments: &[&str]) -> Result<()> {
    let file = output.with_extension("c");
    fs::write(&file, source)?;
    process::output_of(
        Command::new("gcc").args(["-o".as_ref(), output.as_os_str(), file.as_os_str()]).args(arguments),
    )?;
    fs::remove_file(file).map_err(Into::into)
}

pub fn write(path: &Path, text: &str) -> Result<()> {
    fs::create_dir_all(path.parent().context("a file")?)?;
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// Everything that [`SETUP`] puts into place.
fn make_driver(directory: &Path) -> Result<()> {
    let proc = directory.join("proc/nvidia");
    let version = format!("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}  Release Build\n");
    write(&proc.join("version"), &version)?;
    write(&proc.join("params"), "RmLogonRC: 1\nModifyDeviceFiles: 1\n")?;
    write(&proc.join("registry"), "Binary: \"\"\n")?;
    let devices = directory.join("devices");
    fs::create_dir_all(&devices)?;
    for (minor, number) in NUMBERS.into_iter().enumerate() {
        let place = format!("0000:{:02x}:00.0", 0x10 + minor);
        let text = format!(
            "Model: \t\t Fake\nGPU UUID: \t {}\nBus Location: \t {place}\nDevice Minor: \t {minor}\nGPU Excluded:\t No\n",
            uuid(minor)
        );
        write(&proc.join("gpus").join(place).join("information"), &text)?;
        mknod(&devices.join(format!("nvidia{minor}")), number)?;
    }
    for node in ["nvidiactl", "nvidia-uvm", "nvidia-uvm-tools"] {
        mknod(&devices.join(node), 3)?;
    }
    // The parts of the last GPU, to be put into place by tests.
    let parts = directory.join("mig");
    for (path, number) in PARTS {
        write(&parts.join(path), &format!("DeviceFileMinor: {number}\nDeviceFileMode: 292\nDeviceFileModify: 1\n"))?;
        let node = directory.join(format!("mig-nodes/nvidia-cap{number}"));
        fs::create_dir_all(node.parent().context("a file")?)?;
        // Nobody's: opening it fails in another way than opening what is hidden.
        process::output_of(Command::new("mknod").arg("--mode=444").arg(node).args(["c", "240", &number.to_string()]))?;
    }
    let libraries = directory.join("lib64");
    fs::create_dir_all(&libraries)?;
    let uuids: Vec<String> = (0..NUMBERS.len()).map(|minor| format!("\"{}\"", uuid(minor))).collect();
    for (library, soname) in LIBRARIES {
        let source = match library {
            "libnvidia-ml" => NVML.replace("UUIDS", &uuids.join(", ")),
            _ => "int cuInit(unsigned flags) { return flags; }\n".into(),
        };
        let soname = format!("-Wl,-soname,{soname}");
        compile(&source, &libraries.join(format!("{library}.so.{VERSION}")), &["-shared", "-fPIC", &soname])?;
    }
    write(&directory.join("bin/nvidia-smi"), "#!/bin/sh\necho the fake nvidia-smi\n")?;
    fs::set_permissions(directory.join("bin/nvidia-smi"), fs::Permissions::from_mode(0o755))?;
    write(&directory.join(format!("firmware/nvidia/{VERSION}/gsp_ga10x.bin")), "firmware")?;
    write(&directory.join("firmware-path"), &format!("{}/firmware\n", directory.display()))?;
    let conf = directory.join("ld.so.conf");
    write(&conf, &format!("include /etc/ld.so.conf\n{}\n", libraries.display()))?;
    let cache = directory.join("ld.so.cache");
    process::output_of(Command::new("ldconfig").arg("-f").arg(conf).arg("-C").arg(cache)).map(drop)
}

fn mknod(path: &Path, minor: u32) -> Result<()> {
    process::output_of(Command::new("mknod").arg("--mode=666").arg(path).args(["c", "1", &minor.to_string()])).map(drop)
}

/// As CUDA images are, but small: a Debian by its name, ldconfig, a C library and the program.
pub fn make_image(layout: &Path) -> Result<String> {
    make_image_with(layout, |_| Ok(()))
}

/// The same with more in it.
pub fn make_image_with(layout: &Path, add: impl FnOnce(&Path) -> Result<()>) -> Result<String> {
    let tree = layout.join("tree");
    images::busybox_tree(&tree)?;
    write(&tree.join("etc/debian_version"), "12.0\n")?;
    for path in ["usr/lib/x86_64-linux-gnu", "lib64", "lib/x86_64-linux-gnu", "usr/sbin"] {
        fs::create_dir_all(tree.join(path))?;
    }
    fs::copy("/sbin/ldconfig", tree.join("usr/sbin/ldconfig"))?;
    for file in ["lib64/ld-linux-x86-64.so.2", "lib/x86_64-linux-gnu/libc.so.6"] {
        fs::copy(Path::new("/").join(file), tree.join(file)).with_context(|| file.to_owned())?;
    }
    compile(PROGRAM, &tree.join("bin/cuda-program"), &[])?;
    add(&tree)?;
    let environment = [
        images::IMAGE_PATH,
        "NVIDIA_VISIBLE_DEVICES=all",
        "NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        "NVIDIA_REQUIRE_CUDA=cuda>=12.4 brand=tesla,driver>=535,driver<536",
    ];
    ImageBuilder::new(layout)?
        .config("Env", json!(environment))
        .layer_from_tree(&tree, Compression::Gzip)?
        .finish("latest")
}
