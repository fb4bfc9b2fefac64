//! Steps that join a running container: it has the GPUs of the step that made it.

use std::fs;

use anyhow::{Result, ensure};
use testbed::{Output, process, wait};

use super::node::GpuBed;
use super::{gpus, with_device_cgroup};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[("a_step_that_joins_counts_as_the_container_does", joining)];

/// A job of three GPUs: a step has the first one, another one the others in a container, which a third step with `gpus` joins.
fn job(gpus: &GpuBed, name: &str, third: &str) -> Result<Output> {
    let home = gpus.bed.cluster.user(0).home.join("work");
    let script = format!(
        "cd {home}; rm -f {name}.up {name}.end {name}.one; mkfifo {name}.up {name}.end {name}.one
         srun --exact -n1 --gpus=1 sh -c 'echo one >{name}.one; cat {name}.end' || echo >{name}.one &
         cat {name}.one
         srun --exact -n1 --gpus=2 --container-image=cuda --container-name={name} --container-mounts={home} --container-workdir={home} \
             sh -c 'echo made $CUDA_VISIBLE_DEVICES $(ls /proc/driver/nvidia/gpus); echo up >{name}.up; cat {name}.end' || echo >{name}.up &
         cat {name}.up
         srun --overlap -n1 {third} --container-name={name}:exec sh -c 'echo joined $CUDA_VISIBLE_DEVICES'
         echo end >{name}.end; echo end >{name}.end; wait",
        home = home.display()
    );
    let mut command = gpus.bed.cluster.command(0, "salloc", ["-n4", "--gpus=3", "sh", "-c", &script]);
    process::run(&mut command, wait::DEADLINE * 2)?.success()
}

fn joining(world: &mut World) -> Result<()> {
    world.make_directory(0, "work")?;
    gpus(world)?;
    let gpus = world.gpus.as_mut().expect("just made");
    let says = |output: &Output, joined: &str, notice: Option<&str>| -> Result<()> {
        ensure!(output.stdout.contains("made 0,1 0000:11:00.0 0000:12:00.0\n"), "{output}");
        ensure!(output.stdout.contains(&format!("joined {joined}\n")), "{output}");
        let said: Vec<_> = output.stderr.lines().filter(|line| line.contains("/dev/nvidia")).collect();
        let expected = notice.map(|node| {
            format!("pyxis: the running container has the GPUs of the step that made it, and not {node} of this step")
        });
        assert_eq!(said, expected.iter().collect::<Vec<_>>(), "{output}");
        Ok(())
    };
    // Slurm's numbers are those of the device nodes.
    says(&job(gpus, "joined", "--gpus=3")?, "0,1", Some("/dev/nvidia0"))?;
    // It counts what the job has, and so does the container.
    with_device_cgroup(gpus, |gpus| says(&job(gpus, "joined-cgroup", "--gpus=3")?, "0,1", Some("/dev/nvidia0")))?;
    for name in ["joined", "joined-cgroup"] {
        for end in ["up", "end", "one"] {
            let _ = fs::remove_file(gpus.bed.cluster.user(0).home.join(format!("work/{name}.{end}")));
        }
    }
    Ok(())
}
