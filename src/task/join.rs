//! Joining a container: `setns`, working directory, seccomp (behaviour reference, sections 6.4 and 8).

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use rustix::process::{Pid, PidfdFlags};
use rustix::thread::ThreadNameSpaceType;
use serde::{Deserialize, Serialize};

use super::entrypoint::Prepared;
use crate::request::{ContainerEnv, Environment, Unshare};
use crate::sys;

/// A running container, as a task needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub(super) init: i32,
    workdir: String,
    /// Init is in a cgroup namespace of the container's.
    cgroup_namespace: bool,
    /// What Slurm calls GPUs, and what they are called in the container, where that differs.
    pub(super) gpu_numbers: Vec<(u32, u32)>,
    /// Travels beside the JSON: it need not be UTF-8.
    #[serde(skip)]
    pub(super) environment: Environment,
    /// The calling task is in the user and cgroup namespaces already: true in the leader, which made the latter.
    #[serde(skip)]
    pub(super) entered: bool,
}

/// How a task joins.
#[derive(Debug, Clone, Default)]
pub struct JoinOptions {
    /// `--container-env` of the request.
    pub container_env: Vec<ContainerEnv>,
    /// `--container-workdir` of the request.
    pub workdir: Option<String>,
    /// `--container-unshare` of the request.
    pub unshare: Unshare,
}

/// A kind of namespace a task may join: as the kernel, `/proc/PID/ns` and users call it.
type Kind = (ThreadNameSpaceType, &'static str, &'static str);

/// In the order in which the tasks of pyxis join.
const KINDS: [Kind; 6] = [
    (ThreadNameSpaceType::USER, "user", "user"),
    (ThreadNameSpaceType::CONTROL_GROUP, "cgroup", "cgroup"),
    (ThreadNameSpaceType::MOUNT, "mnt", "mount"),
    (ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION, "ipc", "IPC"),
    (ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME, "uts", "UTS"),
    (ThreadNameSpaceType::NETWORK, "net", "network"),
];

impl Container {
    /// The container whose init has process id `init`.
    pub(super) fn new(init: i32, workdir: String, cgroup_namespace: bool, environment: Environment) -> Self {
        Self { init, workdir, cgroup_namespace, gpu_numbers: Vec::new(), environment, entered: false }
    }

    /// This container after its entrypoint has run.
    pub(super) fn prepared(self, prepared: Prepared) -> Self {
        Self { environment: prepared.environment, workdir: prepared.workdir, ..self }
    }

    /// Working directory of a task inside the container: what was asked for, else the image's.
    pub fn workdir<'a>(&'a self, options: &'a JoinOptions) -> &'a str {
        options.workdir.as_deref().unwrap_or(&self.workdir)
    }

    /// The container's own environment, before a task's is merged with it.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// Its root directory, to be looked at from outside by the container's user.
    pub fn root(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root", self.init))
    }

    /// Moves the calling, single-threaded task into the container's namespaces, changes to its working directory and
    /// installs the seccomp filter. The error is one line for the user, without the `pyxis: ` prefix.
    pub fn join(&self, options: &JoinOptions) -> Result<(), String> {
        let init = Pid::from_raw(self.init).ok_or("couldn't get container namespaces: no container init")?;
        let init = rustix::process::pidfd_open(init, PidfdFlags::empty()).map_err(|error| {
            format!("couldn't get container namespaces: container init has ended: {}", sys::reason(error))
        })?;
        let mut namespaces = ThreadNameSpaceType::MOUNT | self.own_namespaces(options.unshare)?;
        if !self.entered {
            namespaces |= ThreadNameSpaceType::USER;
            namespaces.set(ThreadNameSpaceType::CONTROL_GROUP, self.cgroup_namespace);
        }
        join_all(init.as_fd(), namespaces)?;
        let workdir = self.workdir(options);
        rustix::process::chdir(workdir)
            .map_err(|error| format!("couldn't chdir to {workdir}: {}", sys::reason(error)))?;
        super::seccomp::fake_ownership()
            .load()
            .map_err(|error| format!("seccomp filter failed: {}", sys::reason(error)))
    }

    /// Which of the namespaces that a container may or may not have it has: those that are not the caller's. Fails if
    /// it lacks a `wanted` one: it was started by another step then.
    fn own_namespaces(&self, wanted: Unshare) -> Result<ThreadNameSpaceType, String> {
        let mut own = ThreadNameSpaceType::empty();
        for (kind, file, name) in KINDS {
            let wanted = match file {
                "net" => wanted.net,
                "ipc" => wanted.ipc,
                "uts" => wanted.uts,
                _ => continue,
            };
            let id = |process: &str| {
                let path = format!("/proc/{process}/ns/{file}");
                rustix::fs::stat(path)
                    .map(|status| (status.st_dev, status.st_ino))
                    .map_err(|error| format!("unable to open {name} namespace file: {}", sys::reason(error)))
            };
            if id(&self.init.to_string())? != id("self")? {
                own |= kind;
            } else if wanted {
                return Err(format!(
                    "error: --container-unshare={file} requested but the container is not in a separate {name} namespace"
                ));
            }
        }
        Ok(own)
    }
}

/// setns(2). All at once, and if that fails one after the other, to say which one it is.
fn join_all(init: BorrowedFd<'_>, namespaces: ThreadNameSpaceType) -> Result<(), String> {
    if rustix::thread::move_into_thread_name_spaces(init, namespaces).is_ok() {
        return Ok(());
    }
    for (kind, _, name) in KINDS.into_iter().filter(|(kind, ..)| namespaces.contains(*kind)) {
        rustix::thread::move_into_thread_name_spaces(init, kind)
            .map_err(|error| format!("couldn't join {name} namespace: {}", sys::reason(error)))?;
    }
    Ok(())
}
