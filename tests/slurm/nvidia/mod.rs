//! NVIDIA's GPUs in containers, on a node that pretends to have some (behaviour reference, section 18).

mod compat;
mod fabric;
mod joining;
mod node;
mod parts;
mod services;
mod specifications;
mod wanting;

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use testbed::{process, wait};

use crate::Case;
use crate::world::{World, sorted};
pub use node::GpuBed;
use node::{VERSION, uuid};

/// The cases of this module and of those below it.
pub fn cases() -> Vec<Case> {
    [
        CASES,
        compat::CASES,
        fabric::CASES,
        joining::CASES,
        parts::CASES,
        services::CASES,
        specifications::CASES,
        wanting::CASES,
    ]
    .concat()
}

const CASES: &[Case] = &[
    ("a_cuda_image_gets_driver_and_gpus", cuda_image),
    ("visible_devices", visible_devices),
    ("capabilities", capabilities),
    ("requirements", requirements),
    ("a_job_sees_the_gpus_it_has", job_sees_its_own),
    ("a_device_cgroup_decides", device_cgroup),
    ("an_inventory_is_taken_once", inventory),
    ("an_upgraded_driver_is_noticed", upgraded),
    ("nothing_stays_in_named_containers", nothing_stays),
    ("commands_without_slurm", commands),
    ("without_a_driver", without_driver),
];

/// Where a Debian image has its libraries.
const LIBRARIES: &str = "/usr/lib/x86_64-linux-gnu";
const LIST: &str = "echo $(cd /dev && for node in nvidia*; do true 2>/dev/null <$node && echo $node; done)";

/// The cluster with GPUs, started by the first test that wants it.
fn gpus(world: &mut World) -> Result<&GpuBed> {
    if world.gpus.is_none() {
        world.gpus = Some(GpuBed::start()?);
    }
    world.gpus.as_ref().context("just made")
}

fn cuda_image(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    assert_eq!(gpus.sh(3, &[], LIST)?, "nvidia-uvm nvidia-uvm-tools nvidia0 nvidia1 nvidia2 nvidiactl");
    // The linker finds the driver, without ldconfig, and ldconfig lists it.
    assert_eq!(gpus.sh(1, &[], "cuda-program; nvidia-smi")?, "cuInit 0\nthe fake nvidia-smi");
    let listed = gpus.sh(1, &[], "ldconfig -p | grep -E 'libcuda|nvidia' | tr -d '\\t'")?;
    let line = |name: &str| format!("{name} (libc6,x86-64) => {LIBRARIES}/{name}");
    let names = ["libcuda.so", "libcuda.so.1", "libnvidia-ml.so.1", "libnvidia-nvvm.so.4"].map(line);
    for name in names {
        ensure!(listed.lines().any(|listed| listed == name), "{name}:\n{listed}");
    }
    ensure!(!listed.contains("glcore"), "{listed}");
    let script = "cd /proc/driver/nvidia && cat params version && ls gpus; touch x 2>&1 | grep -c denied;
                  cat /lib/firmware/nvidia/580.159.04/gsp_ga10x.bin; echo; grep -c nvidia /proc/mounts";
    let seen = gpus.sh(3, &[], script)?;
    let expected = format!(
        "RmLogonRC: 1\nModifyDeviceFiles: 0\nNVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {VERSION}  Release \
         Build\n0000:10:00.0\n0000:11:00.0\n0000:12:00.0\n"
    );
    ensure!(seen.starts_with(&expected), "{seen}");
    ensure!(seen.contains("\nfirmware\n"), "{seen}");
    Ok(())
}

fn visible_devices(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let visible = |value: &str| gpus.sh(3, &[("NVIDIA_VISIBLE_DEVICES", value)], LIST);
    let with = |nodes: &str| format!("nvidia-uvm nvidia-uvm-tools {nodes}nvidiactl");
    for (value, nodes) in [
        ("all", "nvidia0 nvidia1 nvidia2 "),
        ("none", ""),
        ("0", "nvidia0 "),
        ("2,1", "nvidia1 nvidia2 "),
        (&uuid(1), "nvidia1 "),
        (&uuid(1).to_lowercase(), "nvidia1 "),
        ("GPU-2e7c", "nvidia2 "),
        ("00000000:12:00.0", "nvidia2 "),
    ] {
        assert_eq!(visible(value)?, with(nodes), "{value}");
    }
    // Nothing at all is done: the host's /dev as it is.
    for value in ["", "void"] {
        let script = format!("{LIST}; cuda-program; ls /usr/bin/nvidia-smi 2>&1 | grep -c 'No such'");
        let seen = gpus.srun(
            &[("NVIDIA_VISIBLE_DEVICES", value)],
            &["--gpus-per-node=3", "--container-image=cuda", "sh", "-c", &script],
        )?;
        ensure!(seen.stdout.starts_with(&with("nvidia0 nvidia1 nvidia2 ")), "{seen}");
        ensure!(seen.stdout.contains("libcuda.so.1: cannot open") && seen.stdout.ends_with("\n1\n"), "{seen}");
    }
    for value in ["3", "GPU-7", "MIG-1", "0,nonsense"] {
        let output =
            gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", value)], &["--gpus-per-node=3", "--container-image=cuda", "true"])?;
        let word = value.rsplit(',').next().unwrap_or(value);
        let text =
            format!("[ERROR] nvidia-container-cli: device error: {word}: unknown device; this job has 0 (GPU-0e7c");
        ensure!(!output.status.success() && output.stderr.contains(&text), "{output}");
    }
    Ok(())
}

fn capabilities(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let list = format!("ls {LIBRARIES} | grep {VERSION} | sed 's/.so.*//' | xargs");
    let with = |value: &str| gpus.sh(1, &[("NVIDIA_DRIVER_CAPABILITIES", value)], &list);
    assert_eq!(with("")?, "libnvidia-ml");
    assert_eq!(with("utility")?, "libnvidia-ml");
    assert_eq!(with("compute")?, "libcuda libnvidia-nvvm");
    assert_eq!(with("all")?, "libcuda libnvidia-glcore libnvidia-ml libnvidia-nvvm");
    let output = gpus.srun(
        &[("NVIDIA_DRIVER_CAPABILITIES", "compute,ngx")],
        &["--gpus-per-node=1", "--container-image=cuda", "true"],
    )?;
    let text = "[ERROR] Unknown NVIDIA driver capability: ngx";
    ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
    Ok(())
}

fn requirements(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let arguments = ["--gpus-per-node=1", "--container-image=cuda", "echo", "started"];
    let with = |variables: &[(&str, &str)]| gpus.srun(variables, &arguments);
    let required = ("NVIDIA_REQUIRE_CUDA", "cuda>=13.1 brand=tesla,driver>=535");
    let output = with(&[required])?;
    let text = "[ERROR] nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.1 brand=tesla,driver>=535, \
                please update your driver to a newer version, or use an earlier cuda container";
    ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
    ensure!(output.stderr.contains("CUDA 13.0, driver 580.159.04, brand nvidia, arch 9.0"), "{output}");
    for variables in [
        &[required, ("NVIDIA_DISABLE_REQUIRE", "1")][..],
        &[("NVIDIA_REQUIRE_CUDA", "cuda>=13.1 brand=nvidia,driver>=580")],
        &[],
    ] {
        assert_eq!(with(variables)?.success()?.stdout, "started\n");
    }
    Ok(())
}

/// Without a device cgroup: what Slurm says counts, and is said in the container's numbers.
fn job_sees_its_own(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let opened = format!("{LIST}; nvidia=$(ls /proc/driver/nvidia/gpus | xargs); echo $nvidia $CUDA_VISIBLE_DEVICES");
    let step = |gpus_per_task: &str, tasks: &str, script: &str| -> Result<String> {
        let arguments = [tasks, gpus_per_task, "--container-image=cuda", "sh", "-c", script];
        Ok(gpus.srun(&[], &arguments)?.success()?.stdout)
    };
    let one = step("--gpus-per-node=1", "-n1", &opened)?;
    assert_eq!(one, "nvidia-uvm nvidia-uvm-tools nvidia0 nvidiactl\n0000:10:00.0 0\n");
    // Two steps at once have different GPUs, both of which are number 0 where they are seen.
    let mut pair = gpus.at_once(2, "cuda", &[], &format!("{LIST}; echo at $CUDA_VISIBLE_DEVICES"))?;
    pair.sort_unstable();
    let of = |gpu: &str| format!("nvidia-uvm nvidia-uvm-tools {gpu} nvidiactl\nat 0");
    assert_eq!(pair, ["nvidia0", "nvidia1"].map(of));
    // Who has bound GPUs to tasks, and has none.
    step("--gpu-bind=none", "-n1", "true")?;
    // Every task its own.
    let tasks = step("--gpus-per-task=1", "-n2", "echo $CUDA_VISIBLE_DEVICES $(ls /proc/driver/nvidia/gpus | wc -l)")?;
    assert_eq!(sorted(&tasks), ["0 2", "1 2"]);
    // A job that has asked for none, with an image that would take all, and one that wants nothing.
    assert_eq!(step("--container-readonly", "-n1", LIST)?, "nvidia-uvm nvidia-uvm-tools nvidiactl\n");
    let output = gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", "void")], &["--container-image=cuda", "sh", "-c", LIST])?;
    assert_eq!(output.success()?.stdout, "nvidia-uvm nvidia-uvm-tools nvidiactl\n");
    let output = gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", "0")], &["--container-image=cuda", "true"])?;
    let text = "device error: 0: unknown device; this job has no GPU on this node";
    ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
    // A batch script has the job's.
    let script = format!("#!/bin/sh\n#SBATCH --gpus=2\n#SBATCH --container-image=cuda\n{LIST}\n");
    let file = gpus.bed.cluster.user(0).home.join("work/gpus.sh");
    fs::write(&file, script)?;
    let log = file.with_extension("log");
    let mut command = gpus.bed.cluster.command(0, "sbatch", ["--wait", "--output"]);
    process::run(command.arg(&log).arg(&file), wait::DEADLINE * 2)?.success()?;
    let text = fs::read_to_string(log)?;
    ensure!(text.ends_with("nvidia-uvm nvidia-uvm-tools nvidia0 nvidia1 nvidiactl\n"), "{text}");
    Ok(())
}

/// With Slurm's own: numbers are what the job counts.
fn device_cgroup(world: &mut World) -> Result<()> {
    gpus(world)?;
    with_device_cgroup(world.gpus.as_mut().context("just made")?, constrained)
}

/// Runs `test` while Slurm keeps jobs from devices that it has not given them; it reads its configuration again, before and
/// after.
fn with_device_cgroup(gpus: &mut GpuBed, test: impl FnOnce(&GpuBed) -> Result<()>) -> Result<()> {
    let site = gpus.bed.cluster.config().parent().context("a file")?.to_owned();
    fs::write(
        site.join("cgroup.conf"),
        "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nConstrainDevices=yes\n",
    )?;
    let restart = |gpus: &mut GpuBed, extra: &str| -> Result<()> {
        gpus.bed.cluster.reconfigure(extra)?;
        let site = &gpus.bed.site;
        for node in gpus.bed.cluster.nodes_mut() {
            node.stop_slurmd();
            node.start_slurmd(site)?;
        }
        gpus.bed.cluster.wait_until_idle()
    };
    restart(gpus, "TaskPlugin=task/cgroup\n")?;
    let checked = test(gpus);
    restart(gpus, "")?;
    checked
}

fn constrained(gpus: &GpuBed) -> Result<()> {
    let script = format!("{LIST}; echo at $CUDA_VISIBLE_DEVICES $(ls /proc/driver/nvidia/gpus)");
    let mut pair = gpus.at_once(2, "cuda", &[], &script)?;
    pair.sort_unstable();
    let of = |(gpu, place): (&str, u8)| format!("nvidia-uvm nvidia-uvm-tools {gpu} nvidiactl\nat 0 0000:{place}:00.0");
    assert_eq!(pair, [("nvidia0", 10), ("nvidia1", 11)].map(of));
    // Who asks for number 0 gets the first that the job has, whichever it is.
    let visible = [("NVIDIA_VISIBLE_DEVICES", "1")];
    let seen = gpus.sh(2, &visible, "echo $CUDA_VISIBLE_DEVICES $(ls /proc/driver/nvidia/gpus)")?;
    assert_eq!(seen, "0 0000:11:00.0");
    assert_eq!(gpus.sh(0, &[], LIST)?, "nvidia-uvm nvidia-uvm-tools nvidiactl");
    // Tasks with a cgroup each share the container of whichever starts it.
    let script = "cd /dev && echo $(for node in nvidia?; do true 2>/dev/null <$node && echo $node; done)";
    let both =
        gpus.srun(&[], &["-n2", "--gpus-per-task=1", "--container-image=cuda", "sh", "-c", script])?.success()?;
    let union: std::collections::BTreeSet<&str> = both.stdout.split_whitespace().collect();
    assert_eq!(union.into_iter().collect::<Vec<_>>(), ["nvidia0", "nvidia1"], "{both}");
    ensure!(both.stdout.lines().all(|line| !line.is_empty()), "{both}");
    Ok(())
}

fn inventory(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let file = gpus.runtime().join("nvidia.json");
    let _ = fs::remove_file(&file);
    let start = || gpus.sh(1, &[], "echo started");
    assert_eq!(start()?, "started");
    let first = fs::metadata(&file)?;
    ensure!(first.uid() == 0 && first.mode() & 0o777 == 0o644, "{first:?}");
    let text = fs::read_to_string(&file)?;
    ensure!(text.contains(&uuid(2)) && text.contains("\"cuda\":\"13.0\""), "{text}");
    start()?;
    assert_eq!(fs::metadata(&file)?.ino(), first.ino());
    // Of another boot, or damaged.
    for text in [text.replace(VERSION, "1.2"), text[1..].to_owned()] {
        fs::write(&file, text)?;
        start()?;
        ensure!(fs::read_to_string(&file)?.contains(VERSION));
    }
    // An NVML that fails is said, and no reason to fail.
    fs::remove_file(&file)?;
    let broken = gpus.runtime().join("nvml-broken");
    fs::write(&broken, "")?;
    let output = gpus.srun(&[], &["--gpus-per-node=1", "--container-image=cuda", "echo", "started"]);
    fs::remove_file(broken)?;
    let output = output?.success()?;
    let text = "pyxis: NVIDIA: whether the GPUs are what the image requires was not checked: NVML cannot be \
                initialized: an internal driver error occurred\n";
    ensure!(output.stdout == "started\n" && output.stderr.contains(text), "{output}");
    ensure!(!file.exists());
    Ok(())
}

fn upgraded(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let node = &gpus.bed.cluster.nodes()[0];
    let version = |text: &str| {
        let file = "/proc/driver/nvidia/version";
        process::output_of(node.command("sed").args(["-i", &format!("s/{text}/"), file]))
    };
    version(&format!("{VERSION}/570.1.2"))?;
    let arguments = ["--gpus-per-node=1", "--container-image=cuda", "true"];
    let output = gpus.srun(&[("NVIDIA_DISABLE_REQUIRE", "1")], &arguments);
    version(&format!("570.1.2/{VERSION}"))?;
    let output = output?;
    let text = "driver/library version mismatch: kernel module 570.1.2, libraries 580.159.04: the driver was upgraded";
    ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
    Ok(())
}

fn nothing_stays(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let named = |options: &[&str], script: &str| -> Result<String> {
        let arguments = [&["--container-name=gpus", "--container-writable"], options, &["sh", "-c", script]].concat();
        Ok(gpus.srun(&[], &arguments)?.success()?.stdout)
    };
    assert_eq!(named(&["--gpus-per-node=1", "--container-image=cuda"], "cuda-program")?, "cuInit 0\n");
    let find = "find /usr /lib /etc /bin -name '*nvidia*' -o -name 'libcuda*' -o -name 'gsp*' 2>/dev/null | xargs";
    let mut command = gpus.bed.cluster.command(0, "srun", ["--container-name=gpus", "sh", "-c", find]);
    let output = process::run(command.env("NVIDIA_VISIBLE_DEVICES", "void"), wait::DEADLINE)?.success()?;
    assert_eq!(output.stdout.trim(), "");
    assert_eq!(named(&["--gpus-per-node=1"], "cuda-program")?, "cuInit 0\n");
    let mut remove = gpus.bed.cluster.command(0, "srun", ["true"]);
    process::run(&mut remove, wait::DEADLINE)?.success().map(drop)
}

/// As root through the broker, and as a user who has nobody to ask.
fn commands(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let (pyxis, node) = (&gpus.bed.pyxis, &gpus.bed.cluster.nodes()[0]);
    let config = ["--config".as_ref(), pyxis.config.as_os_str()];
    let user = gpus.bed.cluster.user(0);
    let script = format!("cuda-program; {LIST}");
    let expected = "cuInit 0\nnvidia-uvm nvidia-uvm-tools nvidia1 nvidiactl\n";
    let _ = fs::remove_file(gpus.runtime().join("nvidia.json"));
    let mut run = node.command(&pyxis.executable.display().to_string());
    run.args(config).args(["run", "--user", &user.name, "cuda", "sh", "-c", &script]);
    assert_eq!(process::output_of(run.env("NVIDIA_VISIBLE_DEVICES", "1"))?, expected);
    let as_user = |arguments: &[&str]| {
        let mut command = node.command("setpriv");
        command.args(["--reuid", &user.name, "--regid", &user.gid.to_string(), "--init-groups", "--"]);
        command.arg(&pyxis.executable).args(config).args(arguments);
        command.env("HOME", &user.home).env("NVIDIA_VISIBLE_DEVICES", "1");
        process::run(&mut command, wait::DEADLINE * 2)?.success()
    };
    let file = user.home.join("work/cuda.sqsh").display().to_string();
    as_user(&["import", "--output", &file, "docker://cuda"])?;
    as_user(&["create", "--force", "--name", "cuda", &file])?;
    let started = as_user(&["start", "cuda", "sh", "-c", &script]);
    as_user(&["remove", "--force", "cuda"])?;
    assert_eq!(started?.stdout, expected);
    Ok(())
}

/// On the nodes of the other cluster.
fn without_driver(world: &mut World) -> Result<()> {
    let image = node::make_image(&world.directory("cuda")?)?;
    world.bed.hub.push(&image, "library/cuda:latest")?;
    let run = |value: Option<&str>| {
        let mut command = world.bed.cluster.command(0, "srun", ["--container-image=cuda", "echo", "started"]);
        process::run(command.envs(value.map(|value| ("NVIDIA_VISIBLE_DEVICES", value))), wait::DEADLINE)
    };
    // What else is said than that the image is imported.
    let said = |value| -> Result<String> {
        let output = run(value)?.success()?;
        ensure!(output.stdout == "started\n", "{output}");
        Ok(output
            .stderr
            .lines()
            .filter(|line| !line.contains("ed docker image: cuda") && !line.contains("importing"))
            .collect())
    };
    let text = "pyxis: no NVIDIA driver is loaded on this node: the container starts without the GPUs that its image would \
                use (NVIDIA_VISIBLE_DEVICES=all)";
    assert_eq!(said(None)?, text);
    for value in ["void", "none", "", "all"] {
        assert_eq!(said(Some(value))?, "", "{value}");
    }
    let output = run(Some("0"))?;
    ensure!(!output.status.success() && output.stderr.contains("no NVIDIA driver is loaded on this node"), "{output}");
    Ok(())
}
