//! GPUs by CDI specifications, of the form that the vendors' tools write, in steps to which Slurm has given GPUs.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::images;

use super::node::{GpuBed, VERSION, uuid};
use super::{LIBRARIES, LIST, gpus};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("a_specification_takes_the_place_of_the_search", nvidia),
    ("amd_gpus_are_what_slurm_has_given", amd),
    ("a_specification_that_is_out_of_date", out_of_date),
];

/// Runs `test` with the file in a directory of specifications, and more settings.
fn with_specification(
    gpus: &GpuBed,
    name: &str,
    text: &str,
    more: &str,
    test: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let directory = gpus.bed.site.path("etc/cdi");
    fs::create_dir_all(&directory)?;
    fs::write(directory.join(name), text)?;
    let configuration = testbed::install::hub_mirror(&gpus.bed.hub.host());
    gpus.bed.pyxis.configure(&format!("{configuration}[devices]\ncdi_directories = [{directory:?}]\n{more}"))?;
    let result = test();
    gpus.bed.pyxis.configure(&configuration)?;
    fs::remove_dir_all(directory)?;
    result
}

fn hook(arguments: &[&str]) -> Value {
    let arguments = [&["nvidia-cdi-hook"], arguments].concat();
    json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": arguments, "env": ["NVIDIA_CTK_DEBUG=false"]})
}

/// Of the fake driver, as `nvidia-ctk cdi generate` (1.18) describes one: a device by number and by UUID, and all of them.
fn nvidia_ctk(gpus: &GpuBed, minors: &[usize]) -> Value {
    let driver = gpus.bed.site.path("driver");
    let nodes = |minors: &[usize]| -> Vec<Value> {
        minors.iter().map(|minor| json!({"path": format!("/dev/nvidia{minor}"), "permissions": "rw"})).collect()
    };
    let named = |name: String, minors: &[usize]| json!({"name": name, "containerEdits": {"deviceNodes": nodes(minors), "additionalGids": [0]}});
    let mut devices = Vec::new();
    for &minor in minors {
        devices.push(named(minor.to_string(), &[minor]));
        devices.push(named(uuid(minor), &[minor]));
    }
    devices.push(named("all".into(), minors));
    let bind = |from: String, to: String| json!({"hostPath": driver.join(from), "containerPath": to, "options": ["ro", "nosuid", "nodev", "rbind", "rprivate"]});
    let library = |name: &str| bind(format!("lib64/{name}.so.{VERSION}"), format!("/usr/lib64/{name}.so.{VERSION}"));
    let link = format!("libcuda.so.{VERSION}::/usr/lib64/libcuda.so.1");
    json!({
        "cdiVersion": "0.7.0", "kind": "nvidia.com/gpu", "devices": devices,
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [
                {"path": "/dev/nvidia-uvm", "permissions": "rw"}, {"path": "/dev/nvidiactl", "permissions": "rw"}
            ],
            "hooks": [
                hook(&["create-symlinks", "--link", &link]),
                hook(&["create-symlinks", "--link", "libcuda.so.1::/usr/lib64/libcuda.so"]),
                hook(&["enable-cuda-compat", &format!("--host-driver-version={VERSION}")]),
                hook(&["update-ldcache", "--folder", "/usr/lib64"]),
                hook(&["disable-device-node-modification"])
            ],
            "mounts": [library("libcuda"), library("libnvidia-ml"), bind("bin/nvidia-smi".into(), "/usr/bin/nvidia-smi".into())]
        }
    })
}

fn nvidia(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let file = nvidia_ctk(gpus, &[0, 1, 2]);
    with_specification(gpus, "nvidia.json", &file.to_string(), "", || {
        let script = format!(
            "{LIST}; cuda-program; nvidia-smi; echo $NVIDIA_VISIBLE_DEVICES; ls {LIBRARIES} | grep -E 'cuda|nvidia' | xargs; \
             grep Modify /proc/driver/nvidia/params"
        );
        let of = |nodes: &str| {
            format!(
                "nvidia-uvm nvidia-uvm-tools {nodes} nvidiactl\ncuInit 0\nthe fake nvidia-smi\nvoid\n\
                 libcuda.so libcuda.so.1 libcuda.so.{VERSION} libnvidia-ml.so.1 libnvidia-ml.so.{VERSION}\nModifyDeviceFiles: 0"
            )
        };
        // Nothing that the native search finds: the specification has no libnvidia-nvvm. The linker's names are those of the
        // libraries themselves.
        assert_eq!(gpus.sh(2, &[], &script)?, of("nvidia0 nvidia1"));
        assert_eq!(gpus.sh(3, &[("NVIDIA_VISIBLE_DEVICES", &uuid(2))], &script)?, of("nvidia2"));
        // Who asks for all of the node's has asked for all of his own.
        let arguments = [
            "--gpus-per-node=1",
            "--container-image=cuda",
            "--container-device=nvidia.com/gpu=all",
            "sh",
            "-c",
            &script,
        ];
        let seen = gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", "void")], &arguments)?.success()?.stdout;
        assert_eq!(seen.trim_end(), of("nvidia0"));
        Ok(())
    })
}

fn amd(world: &mut World) -> Result<()> {
    let layout = world.directory("amd")?;
    let gpus = gpus(world)?;
    gpus.bed.hub.push(&images::busybox(&layout)?, "library/rocm:latest")?;
    gpus.on_node(
        "mkdir -p /dev/dri; mknod -m 666 /dev/kfd c 1 3; for n in 0 1 2; do
        mknod -m 666 /dev/dri/card$n c 1 5; mknod -m 666 /dev/dri/renderD$((128 + n)) c 1 8; done",
    )?;
    // As amd-ctk writes it: the whole device node, though it is the host's.
    let node = |path: String, minor: u32| json!({"path": path, "type": "c", "major": 1, "minor": minor, "fileMode": 432, "permissions": "rwm", "uid": 0, "gid": 44});
    let nodes = |index: u32| {
        vec![node(format!("/dev/dri/card{index}"), 5), node(format!("/dev/dri/renderD{}", 128 + index), 8)]
    };
    let kfd = || node("/dev/kfd".into(), 3);
    let device = |name: String, nodes: Vec<Value>| json!({"name": name, "containerEdits": {"deviceNodes": nodes}});
    let each = (0..3).map(|index| device(index.to_string(), [nodes(index), vec![kfd()]].concat()));
    let all = device("all".into(), (0..3).flat_map(nodes).chain([kfd()]).collect());
    let devices: Vec<Value> = each.chain([all]).collect();
    let file = json!({"cdiVersion": "0.6.0", "kind": "amd.com/gpu", "devices": devices, "containerEdits": {}});
    let mapping = "[devices.gres]\ngpu = \"amd.com/gpu={index}\"\n";
    let result = with_specification(gpus, "amd.json", &file.to_string(), mapping, || {
        let step = |count: u32, options: &[&str]| -> Result<String> {
            let count = format!("--gpus-per-node={count}");
            let script = ["sh", "-c", "cd /dev; ls kfd dri/* 2>/dev/null | xargs"];
            let arguments = [&[count.as_str(), "--container-image=rocm"], options, &script].concat();
            Ok(gpus.srun(&[("ENROOT_RESTRICT_DEV", "y")], &arguments)?.success()?.stdout)
        };
        assert_eq!(step(0, &[])?, "\n");
        assert_eq!(step(1, &[])?, "dri/card0 dri/renderD128 kfd\n");
        let two = "dri/card0 dri/card1 dri/renderD128 dri/renderD129 kfd\n";
        assert_eq!(step(2, &[])?, two);
        assert_eq!(step(2, &["--container-device=amd.com/gpu=all"])?, two);
        // Steps at once have different ones.
        let restricted = [("ENROOT_RESTRICT_DEV", "y")];
        let mut pair = gpus.at_once(2, "rocm", &restricted, "ls /dev/dri | grep render")?;
        pair.sort_unstable();
        assert_eq!(pair, ["renderD128", "renderD129"]);
        // And the administrator sees it beforehand.
        let node = gpus.bed.cluster.nodes().first().context("a node")?;
        let mut command = node.command(&gpus.bed.pyxis.executable.display().to_string());
        command.arg("--config").arg(&gpus.bed.pyxis.config).args(["devices", "--json", "--gres", "gpu:1"]);
        let report: Value = serde_json::from_str(&testbed::process::output_of(&mut command)?)?;
        let expected = ["/dev/dri/card1", "/dev/dri/renderD129", "/dev/kfd"].map(|path| json!([path, path]));
        assert_eq!(report["container"]["device_nodes"], json!(expected));
        Ok(())
    });
    gpus.on_node("rm -r /dev/kfd /dev/dri")?;
    result
}

/// A GPU that it does not know, and libraries of another driver: what is there is used, and what is not is said.
fn out_of_date(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let mut file = nvidia_ctk(gpus, &[0]);
    let arguments = ["--gpus-per-node=2", "--container-image=cuda", "sh", "-c", LIST];
    with_specification(gpus, "nvidia.json", &file.to_string(), "", || {
        // The search knows both.
        let output = gpus.srun(&[], &arguments)?.success()?;
        assert_eq!(output.stdout, "nvidia-uvm nvidia-uvm-tools nvidia0 nvidia1 nvidiactl\n");
        let asked = [&["--container-device=nvidia.com/gpu=all"], &arguments[..]].concat();
        let output = gpus.srun(&[], &asked)?;
        let text = "the CDI specification of nvidia.com/gpu has no device for /dev/nvidia1: it is out of date";
        ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
        Ok(())
    })?;
    let old = file["containerEdits"]["mounts"][0]["hostPath"].as_str().context("a path")?.replace(VERSION, "570.1");
    file["containerEdits"]["mounts"][0]["hostPath"] = json!(old);
    with_specification(gpus, "nvidia.json", &file.to_string(), "", || {
        let output = gpus.srun(&[], &["--gpus-per-node=1", "--container-image=cuda", "true"])?;
        let text = format!("there is no {old} to mount: the file is out of date");
        ensure!(!output.status.success() && output.stderr.contains(&text), "{output}");
        Ok(())
    })
}
