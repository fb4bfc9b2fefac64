//! Divided GPUs (multi-instance GPU), and who keeps whom from them.

use std::fs;

use anyhow::{Result, ensure};
use testbed::process;

use super::node::{GpuBed, compile, uuid};
use super::{LIST, gpus, with_device_cgroup};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("parts_of_a_divided_gpu", parts),
    ("a_device_cgroup_decides_on_parts", constrained_parts),
    ("a_device_program_decides", device_program),
];

/// Which capabilities can be opened: what is hidden is refused, and what is not has no driver.
const OPENED: &str = "for number in 1 2 21 22 30 31; do
        cat /dev/nvidia-caps/nvidia-cap$number 2>&1 | grep -q 'No such device' && echo -n \"$number \"
    done; find /proc/driver/nvidia/capabilities -type f 2>/dev/null | sed 's,.*capabilities/,,' | sort | xargs";
const FIRST: &str = "MIG-1f6b7b9a-5a77-5e6e-b3c8-a1ddf5d9b3ad";

/// Divides the last GPU in two.
fn divide(gpus: &GpuBed) -> Result<()> {
    gpus.on_node("rm -rf /proc/driver/nvidia/capabilities /dev/nvidia-caps; cp -a $1/mig /proc/driver/nvidia/capabilities; cp -a $1/mig-nodes /dev/nvidia-caps").map(drop)
}

fn undivide(gpus: &GpuBed) -> Result<()> {
    gpus.on_node("rm -r /proc/driver/nvidia/capabilities /dev/nvidia-caps").map(drop)
}

/// The nodes of GPUs that can be opened.
const GPUS: &str = "echo $(cd /dev && for node in nvidia?; do true 2>/dev/null <$node && echo $node; done)";

fn parts(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    divide(gpus)?;
    let result = named_parts(gpus);
    undivide(gpus)?;
    result?;
    // Nobody remembers the parts.
    let output =
        gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", FIRST)], &["--gpus-per-node=3", "--container-image=cuda", "true"])?;
    ensure!(!output.status.success() && output.stderr.contains("unknown device"), "{output}");
    Ok(())
}

fn named_parts(gpus: &GpuBed) -> Result<()> {
    let visible = |value: &str, variables: &[(&str, &str)]| {
        gpus.sh(3, &[variables, &[("NVIDIA_VISIBLE_DEVICES", value)]].concat(), &format!("{GPUS}; {OPENED}"))
    };
    let first = "21 22 gpu2/mig/gi1/access gpu2/mig/gi1/ci0/access";
    let second = "30 31 gpu2/mig/gi2/access gpu2/mig/gi2/ci0/access";
    // By identifier, by NVML's numbers, whose order is its own, and as old drivers called them.
    for (value, expected) in [
        (FIRST, first),
        (&FIRST.to_lowercase(), first),
        ("2:1", first),
        ("2:0", second),
        (&format!("MIG-{}/2/0", uuid(2)), second),
    ] {
        let seen = visible(value, &[])?;
        // Others are not hidden: they mean nothing where there is no access.
        assert_eq!(seen, format!("nvidia2\n1 2 {expected}"), "{value}");
    }
    let all = visible("2", &[])?;
    ensure!(all.starts_with("nvidia2\n1 2 21 22 30 31 "), "{all}");
    assert_eq!(visible("0", &[])?, "nvidia0\n1 2");
    let monitor = visible("2:0", &[("NVIDIA_MIG_MONITOR_DEVICES", "all")])?;
    ensure!(monitor.ends_with(&format!("{second} mig/monitor")), "{monitor}");
    // To divide GPUs is for root; who has whole ones may see how, where the administrator says so.
    let configuration = testbed::install::hub_mirror(&gpus.bed.hub.host());
    gpus.bed.pyxis.configure(&format!("{configuration}[devices]\nmig_config = true\n"))?;
    let script = format!("{OPENED}; echo $NVIDIA_MIG_CONFIG_DEVICES");
    let of = |value: &str| gpus.sh(3, &[("NVIDIA_VISIBLE_DEVICES", value)], &script);
    let (whole, part) = (of("0"), of("2:1"));
    gpus.bed.pyxis.configure(&configuration)?;
    assert_eq!(whole?, "1 2 mig/config\nall");
    assert_eq!(part?, format!("1 2 {first}"));
    let known = fs::read_to_string(gpus.runtime().join("nvidia.json"))?;
    ensure!(known.contains(FIRST), "{known}");
    let arguments = ["--gpus-per-node=3", "--container-image=cuda", "true"];
    for value in ["MIG-9f6b7b9a-5a77-5e6e-b3c8-a1ddf5d9b3ad", "2:2"] {
        let output = gpus.srun(&[("NVIDIA_VISIBLE_DEVICES", value)], &arguments)?;
        let text = format!("device error: {value}: unknown device; this job has 0 (GPU-");
        ensure!(!output.status.success() && output.stderr.contains(&text), "{output}");
    }
    Ok(())
}

/// Slurm gives parts by device files that several have (gres.conf(5), `MultipleFiles`).
fn constrained_parts(world: &mut World) -> Result<()> {
    gpus(world)?;
    let gpus = world.gpus.as_mut().expect("just made");
    let conf = gpus.bed.cluster.config().with_file_name("gres.conf");
    let before = fs::read_to_string(&conf)?;
    let own = "Name=gpu MultipleFiles=/dev/nvidia0,/dev/nvidia1\n\
               Name=gpu MultipleFiles=/dev/nvidia2,/dev/nvidia-caps/nvidia-cap21,/dev/nvidia-caps/nvidia-cap22\n\
               Name=gpu MultipleFiles=/dev/nvidia2,/dev/nvidia-caps/nvidia-cap30,/dev/nvidia-caps/nvidia-cap31\n";
    fs::write(&conf, own)?;
    // Device files have to be there when slurmd starts.
    divide(gpus)?;
    let result = with_device_cgroup(gpus, |gpus| {
        let visible = [("NVIDIA_VISIBLE_DEVICES", "all")];
        let mut seen = gpus.at_once(3, "cuda", &visible, &format!("{GPUS}; {OPENED}"))?;
        seen.sort_unstable();
        let expected = [
            // Of whole GPUs.
            "nvidia0 nvidia1\n1 2",
            "nvidia2\n1 2 21 22 gpu2/mig/gi1/access gpu2/mig/gi1/ci0/access",
            "nvidia2\n1 2 30 31 gpu2/mig/gi2/access gpu2/mig/gi2/ci0/access",
        ];
        assert_eq!(seen, expected);
        Ok(())
    });
    fs::write(&conf, before)?;
    undivide(gpus)?;
    // What Slurm knew of the node's GPUs is what it knows again.
    let again = with_device_cgroup(gpus, |_| Ok(()));
    result.and(again)
}

/// A program of the kind that version 2 of cgroups has for devices, which denies one: made by hand, as this machine's Slurm
/// uses version 1.
const DENY: &str = r#"
#include <fcntl.h>
#include <linux/bpf.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>
static void fail(const char *what) { perror(what); exit(1); }
int main(int argc, char **argv) {
    /* 1:7, which stands for nvidia1 */
    struct bpf_insn program[] = {
        {.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = 2, .src_reg = 1, .off = 4},
        {.code = BPF_JMP | BPF_JNE | BPF_K, .dst_reg = 2, .imm = 1, .off = 4},
        {.code = BPF_LDX | BPF_MEM | BPF_W, .dst_reg = 2, .src_reg = 1, .off = 8},
        {.code = BPF_JMP | BPF_JNE | BPF_K, .dst_reg = 2, .imm = 7, .off = 2},
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 0},
        {.code = BPF_JMP | BPF_EXIT},
        {.code = BPF_ALU64 | BPF_MOV | BPF_K, .dst_reg = 0, .imm = 1},
        {.code = BPF_JMP | BPF_EXIT},
    };
    union bpf_attr attr;
    memset(&attr, 0, sizeof attr);
    attr.prog_type = BPF_PROG_TYPE_CGROUP_DEVICE;
    attr.insns = (unsigned long)program;
    attr.insn_cnt = sizeof program / sizeof *program;
    attr.license = (unsigned long)"GPL";
    int loaded = syscall(__NR_bpf, BPF_PROG_LOAD, &attr, sizeof attr);
    if (loaded < 0) fail("BPF_PROG_LOAD");
    int cgroup = open(argv[1], O_RDONLY | O_DIRECTORY);
    if (cgroup < 0) fail(argv[1]);
    memset(&attr, 0, sizeof attr);
    attr.target_fd = cgroup;
    attr.attach_bpf_fd = loaded;
    attr.attach_type = BPF_CGROUP_DEVICE;
    if (syscall(__NR_bpf, BPF_PROG_ATTACH, &attr, sizeof attr) < 0) fail("BPF_PROG_ATTACH");
    int procs = openat(cgroup, "cgroup.procs", O_WRONLY);
    if (procs < 0 || write(procs, "0", 1) != 1) fail("cgroup.procs");
    execvp(argv[2], argv + 2);
    fail(argv[2]);
}
"#;

fn device_program(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let deny = gpus.bed.site.path("driver/deny");
    compile(DENY, &deny, &[])?;
    let unified = fs::read_to_string("/proc/self/mounts")?;
    let unified = unified.lines().find_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
        [_, path, "cgroup2", ..] => Some(path.to_owned()),
        _ => None,
    });
    let Some(unified) = unified else {
        anyhow::bail!("version 2 of cgroups is not mounted: mount -t cgroup2 none /mnt")
    };
    let cgroup = format!("{unified}/pyxis-test-{}", std::process::id());
    fs::create_dir(&cgroup)?;
    let (pyxis, node) = (&gpus.bed.pyxis, &gpus.bed.cluster.nodes()[0]);
    let inside = |arguments: &[&str]| {
        let mut command = node.command(&deny.display().to_string());
        command.arg(&cgroup).arg(&pyxis.executable).arg("--config").arg(&pyxis.config).args(arguments);
        process::output_of(&mut command)
    };
    let seen = inside(&["devices", "--json", "--env", "NVIDIA_VISIBLE_DEVICES=all"]).and_then(|text| {
        let report: serde_json::Value = serde_json::from_str(&text)?;
        let allowed: Vec<_> =
            report["node"]["gpus"].as_array().into_iter().flatten().map(|gpu| gpu["allowed"].as_bool()).collect();
        assert_eq!(allowed, [Some(true), Some(false), Some(true)], "{text}");
        let reason = &report["container"]["reasons"][0];
        assert_eq!(reason, "the job has the GPUs that its device cgroup lets it open");
        inside(&["run", "--user", &gpus.bed.cluster.user(0).name, "cuda", "sh", "-c", LIST])
    });
    // As soon as the processes in it have ended.
    testbed::wait::until("an empty cgroup", testbed::wait::DEADLINE, || fs::remove_dir(&cgroup).is_ok().then_some(()))?;
    assert_eq!(seen?, "nvidia-uvm nvidia-uvm-tools nvidia0 nvidia2 nvidiactl\n");
    Ok(())
}
