//! The environment of a task (behaviour reference, section 7.2): Slurm's, with the container's laid over it.

use super::{Container, JoinOptions};
use crate::request::{ContainerEnv, Environment};

/// Variables of the host that mean nothing inside an image, unless `--container-env` names them.
const HOST_LOCALE: [&str; 3] = ["LANG", "LANGUAGE", "LC_ALL"];

/// What Slurm and the MPI launchers set differently for each task: never what the container has got from the task that
/// started it.
const PER_TASK: [&str; 6] = ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_TASK_PID", "PMIX_RANK", "PMI_RANK", "PMI_FD"];

/// In which Slurm tells programs the task's GPUs, by number.
const GPU_LISTS: [&str; 2] = ["CUDA_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL"];

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
        for name in GPU_LISTS {
            let translated = task.get_str(name).and_then(|list| translate(list, &self.gpu_numbers));
            if let (Some(translated), true) = (translated, environment.get(name) == task.get(name)) {
                environment.set(name, translated);
            }
        }
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

/// A list of GPUs by the container's numbers; `None` if it is not one of numbers, or nothing changes. GPUs that the container
/// does not see are left out.
fn translate(list: &str, numbers: &[(u32, u32)]) -> Option<String> {
    if numbers.is_empty() {
        return None;
    }
    let slurms: Vec<u32> = list.split(',').map(|number| number.trim().parse().ok()).collect::<Option<_>>()?;
    let known = |slurms: &u32| numbers.iter().find(|(from, _)| from == slurms).map(|(_, to)| to.to_string());
    Some(slurms.iter().filter_map(known).collect::<Vec<_>>().join(","))
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

    #[test]
    fn gpus_are_called_what_the_container_calls_them() {
        let numbers = [(2, 0), (5, 1)];
        for (list, expected) in [
            ("2,5", Some("0,1")),
            ("5", Some("1")),
            ("5,2", Some("1,0")),
            ("3,2", Some("0")),
            ("3", Some("")),
            ("GPU-abc", None),
            ("MIG-x,2", None),
            ("NoDevFiles", None),
        ] {
            assert_eq!(translate(list, &numbers).as_deref(), expected, "{list}");
        }
        assert_eq!(translate("2,5", &[]), None);
        let mut container = Container::new(1, "/".into(), false, Environment::default());
        container.gpu_numbers = numbers.to_vec();
        let task: Environment = ["CUDA_VISIBLE_DEVICES=5", "GPU_DEVICE_ORDINAL=5"].iter().collect();
        let seen = container.task_environment(&task, &JoinOptions::default());
        assert_eq!(seen.get_str("CUDA_VISIBLE_DEVICES"), Some("1"));
        assert_eq!(seen.get_str("GPU_DEVICE_ORDINAL"), Some("1"));
        // What the image says about it, is its own.
        container.environment.set("CUDA_VISIBLE_DEVICES", "0");
        let seen = container.task_environment(&task, &JoinOptions::default());
        assert_eq!(seen.get_str("CUDA_VISIBLE_DEVICES"), Some("0"));
    }
}
