//! The environment of a task (behaviour reference, section 7.2): Slurm's, with the container's laid over it.

use super::{Container, JoinOptions};
use crate::request::{ContainerEnv, Environment};

/// Variables of the host that mean nothing inside an image, unless `--container-env` names them.
const HOST_LOCALE: [&str; 3] = ["LANG", "LANGUAGE", "LC_ALL"];

/// What Slurm and the MPI launchers set differently for each task: never what the container has got from the task that
/// started it.
const PER_TASK: [&str; 6] = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_TASK_PID", "PMIX_RANK", "PMI_RANK", "PMI_FD"];

impl Container {
    /// The task's environment inside the container: `task` is what Slurm made for it.
    ///
    /// The container wins over the host for everything it defines, except what `--container-env` names and the host
    /// has; `NAME=VALUE` of `--container-env` wins over both.
    pub fn task_environment(&self, task: &Environment, options: &JoinOptions) -> Environment {
        let kept = |name: &[u8]| {
            options.container_env.iter().any(|item| match item {
                ContainerEnv::FromHost(kept) => kept.as_bytes() == name,
                ContainerEnv::Set(..) => false,
            })
        };
        let mut environment = task.clone();
        for name in HOST_LOCALE {
            if !kept(name.as_bytes()) {
                environment.remove(name);
            }
        }
        for (name, value) in self.environment.iter() {
            let per_task = PER_TASK.iter().any(|other| other.as_bytes() == name);
            if !((per_task || kept(name)) && task.iter().any(|(host, _)| host == name)) {
                environment.set(name, value);
            }
        }
        for item in &options.container_env {
            if let ContainerEnv::Set(name, value) = item {
                environment.set(name.as_str(), value.as_str());
            }
        }
        environment.set("PWD", self.workdir(options));
        // What torch.distributed reads, from Slurm's per-task variables: the image's would be the same in every task.
        if environment.get("PYTORCH_VERSION").is_some() {
            for (name, source) in [("RANK", "SLURM_PROCID"), ("LOCAL_RANK", "SLURM_LOCALID")] {
                if let Some(value) = task.get(source) {
                    environment.set(name, value);
                }
            }
        }
        environment
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn merged(container: &[&str], task: &[&str], container_env: &[ContainerEnv]) -> Vec<String> {
        let container = Container::new(1, "/work".into(), false, container.iter().collect());
        let options = JoinOptions { container_env: container_env.to_vec(), workdir: None, ..JoinOptions::default() };
        let environment = container.task_environment(&task.iter().collect(), &options);
        let mut strings: Vec<String> = environment
            .iter()
            .map(|(name, value)| format!("{}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
            .filter(|string| string != "PWD=/work")
            .collect();
        strings.sort();
        strings
    }

    fn host(name: &str) -> ContainerEnv {
        ContainerEnv::FromHost(name.into())
    }

    #[test]
    fn the_image_wins_except_over_what_container_env_names() {
        assert_eq!(merged(&["PATH=/img"], &["PATH=/host", "A=1"], &[]), ["A=1", "PATH=/img"]);
        assert_eq!(merged(&["PATH=/img"], &["PATH=/host"], &[host("PATH")]), ["PATH=/host"]);
        assert_eq!(merged(&["X=img"], &["A=1"], &[host("X")]), ["A=1", "X=img"]);
        let set = ContainerEnv::Set("X".into(), "mine".into());
        assert_eq!(merged(&["X=img"], &["X=host"], &[set]), ["X=mine"]);
    }

    #[test]
    fn locales_of_the_host_are_dropped_unless_named() {
        assert_eq!(merged(&[], &["LANG=de", "LC_ALL=C", "LC_TIME=C", "TERM=x"], &[]), ["LC_TIME=C", "TERM=x"]);
        assert_eq!(merged(&["LANG=C.UTF-8"], &["LANG=de"], &[host("LANG")]), ["LANG=de"]);
        assert_eq!(merged(&["LANG=C.UTF-8"], &["LANG=de"], &[]), ["LANG=C.UTF-8"]);
    }

    #[test]
    fn what_differs_between_tasks_stays_theirs() {
        assert_eq!(
            merged(&["SLURM_PROCID=0", "SLURM_NTASKS=9"], &["SLURM_PROCID=3"], &[]),
            ["SLURM_NTASKS=9", "SLURM_PROCID=3"]
        );
        assert_eq!(merged(&["PMI_RANK=0"], &["A=1"], &[]), ["A=1", "PMI_RANK=0"]);
    }

    #[test]
    fn multi_line_host_values_survive() {
        assert_eq!(merged(&["A=1"], &["F=() {\n x\n}"], &[]), ["A=1", "F=() {\n x\n}"]);
    }

    #[test]
    fn pytorch_ranks_come_from_slurm() {
        let task = ["SLURM_PROCID=3", "SLURM_LOCALID=1", "RANK=9"];
        assert!(merged(&["PYTORCH_VERSION=2"], &task, &[]).contains(&"RANK=3".to_owned()));
        assert!(merged(&["PYTORCH_VERSION=2"], &task, &[]).contains(&"LOCAL_RANK=1".to_owned()));
        assert!(merged(&[], &task, &[]).contains(&"RANK=9".to_owned()));
    }
}
