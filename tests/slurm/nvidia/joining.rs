//! Steps that join a running container: it has the GPUs of the step that made it.

use std::process::Stdio;

use anyhow::{Result, ensure};
use testbed::allocation::Allocation;
use testbed::{Running, process, wait};

use super::node::{GpuBed, end, waiting};
use super::{gpus, with_device_cgroup};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[("a_step_that_joins_counts_as_the_container_does", joining)];

fn joining(world: &mut World) -> Result<()> {
    gpus(world)?;
    let gpus = world.gpus.as_mut().expect("just made");
    // Slurm's numbers are those of the device nodes.
    joins(gpus)?;
    // It counts what the job has, and so does the container.
    with_device_cgroup(gpus, joins)
}

/// In a job of three GPUs a step has the first one, another one the others in a container, and a third step, which has all,
/// joins that.
fn joins(gpus: &GpuBed) -> Result<()> {
    let job = Allocation::new(&gpus.bed.cluster, &["-n3", "--gpus=3"])?;
    let begin = |options: &[&str], script: &str| -> Result<Running> {
        let script = waiting(script);
        let arguments = [&["--exact", "-n1"], options, &["sh", "-c", &script]].concat();
        let mut step = Running::start(job.srun(arguments).stdin(Stdio::piped()))?;
        step.wait_for_text("last\n", wait::DEADLINE * 2)?;
        Ok(step)
    };
    let first = begin(&["--gpus=1"], "echo $CUDA_VISIBLE_DEVICES")?;
    let seen = "echo $CUDA_VISIBLE_DEVICES $(ls /proc/driver/nvidia/gpus)";
    let second = begin(&["--gpus=2", "--container-image=cuda", "--container-name=joined"], seen)?;
    let arguments = ["--overlap", "-n1", "--gpus=3", "--container-name=joined:exec", "sh", "-c", seen];
    let third = process::run(&mut job.srun(arguments), wait::DEADLINE * 2)?.success()?;
    assert_eq!((end(second)?.as_str(), end(first)?.as_str()), ("0,1 0000:11:00.0 0000:12:00.0", "0"));
    assert_eq!(third.stdout, "0,1 0000:11:00.0 0000:12:00.0\n", "{third}");
    let said: Vec<_> = third.stderr.lines().filter(|line| line.contains("/dev/nvidia")).collect();
    let notice =
        "pyxis: the running container has the GPUs of the step that made it, and not /dev/nvidia0 of this step";
    ensure!(said == [notice], "{third}");
    Ok(())
}
