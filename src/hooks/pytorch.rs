//! What `torch.distributed` reads from the environment, from what Slurm says (behaviour reference, section 17,
//! `50-slurm-pytorch`). The ranks are each task's own and set when it joins the container.

#![forbid(unsafe_code)]

use super::Hooks;
use super::hostlist::first_host;
use crate::config::HookSettings;
use crate::request::Environment;

/// The file in `hooks.d` by which an administrator of enroot's asks for this.
const FILE: &str = "50-slurm-pytorch.sh";

/// The first port of those that jobs use, and how many there are: above what the kernel gives to outgoing connections.
const PORTS: (u32, u32) = (61_000, 4536);

/// Whether the administrator, or the user, wants it: `hooks` is what is in their directories.
pub fn is_asked(settings: &HookSettings, hooks: &Hooks) -> bool {
    settings.slurm_pytorch || hooks.built_in.contains(&FILE)
}

/// Completes `container`, the environment of a container, from `task`, that of one of its tasks. Images without PyTorch
/// are left alone, and so is what the container has already.
pub fn complete(container: &mut Environment, task: &Environment) {
    if container.get("PYTORCH_VERSION").is_none() {
        return;
    }
    let number = |name| task.get_str(name)?.parse::<u32>().ok();
    if let Some(host) = task.get_str("SLURM_STEP_NODELIST").and_then(first_host) {
        container.set_default("MASTER_ADDR", host);
    }
    if let Some(job) = number("SLURM_JOB_ID") {
        container.set_default("MASTER_PORT", (PORTS.0 + job % PORTS.1).to_string());
    }
    if let Some(tasks) = task.get("SLURM_NTASKS") {
        container.set_default("WORLD_SIZE", tasks);
    }
    // Several processes on a node share its cores.
    if number("SLURM_STEP_NUM_TASKS") > number("SLURM_STEP_NUM_NODES") {
        container.set_default("OMP_NUM_THREADS", "1");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: [&str; 6] = [
        "SLURM_STEP_NODELIST=gpu[07-09,12],login",
        "SLURM_JOB_ID=4540",
        "SLURM_NTASKS=8",
        "SLURM_STEP_NUM_TASKS=8",
        "SLURM_STEP_NUM_NODES=4",
        "MASTER_ADDR=of-the-host",
    ];

    fn completed(container: &[&str], task: &[&str]) -> Vec<String> {
        let mut environment: Environment = container.iter().collect();
        complete(&mut environment, &task.iter().collect());
        let block = environment.to_block();
        block.split(|&byte| byte == 0).map(|string| String::from_utf8_lossy(string).into()).collect()
    }

    #[test]
    fn an_image_with_pytorch_learns_about_the_job() {
        let expected =
            ["PYTORCH_VERSION=2", "MASTER_ADDR=gpu07", "MASTER_PORT=61004", "WORLD_SIZE=8", "OMP_NUM_THREADS=1", ""];
        assert_eq!(completed(&["PYTORCH_VERSION=2"], &TASK), expected);
    }

    #[test]
    fn other_images_and_what_the_image_says_are_left_alone() {
        assert_eq!(completed(&["A=1"], &TASK), ["A=1", ""]);
        let own = ["PYTORCH_VERSION=2", "MASTER_ADDR=a", "MASTER_PORT=1", "WORLD_SIZE=2", "OMP_NUM_THREADS=3"];
        assert_eq!(completed(&own, &TASK)[..5], own);
    }

    #[test]
    fn one_task_on_each_node_has_all_cores() {
        let task = ["SLURM_STEP_NUM_TASKS=4", "SLURM_STEP_NUM_NODES=4"];
        assert_eq!(completed(&["PYTORCH_VERSION=2"], &task), ["PYTORCH_VERSION=2", ""]);
        assert_eq!(completed(&["PYTORCH_VERSION=2"], &[]), ["PYTORCH_VERSION=2", ""]);
    }
}
