//! Joining a container: `setns`, working directory, seccomp (behaviour reference, sections 6.4 and 8).

use rustix::process::{Pid, PidfdFlags};
use rustix::thread::ThreadNameSpaceType;
use serde::{Deserialize, Serialize};

use crate::request::{ContainerEnv, Environment};
use crate::sys;

/// A running container, as a task needs to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    init: i32,
    workdir: String,
    /// Init is in a cgroup namespace of the container's.
    cgroup_namespace: bool,
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
}

impl Container {
    /// The container whose init has process id `init`.
    pub(super) fn new(init: i32, workdir: String, cgroup_namespace: bool, environment: Environment) -> Self {
        Self { init, workdir, cgroup_namespace, environment, entered: false }
    }

    /// Working directory of a task inside the container: what was asked for, else the image's.
    pub fn workdir<'a>(&'a self, options: &'a JoinOptions) -> &'a str {
        options.workdir.as_deref().unwrap_or(&self.workdir)
    }

    /// Moves the calling, single-threaded task into the container's namespaces, changes to its working directory and
    /// installs the seccomp filter. The error is one line for the user, without the `pyxis: ` prefix.
    pub fn join(&self, options: &JoinOptions) -> Result<(), String> {
        let init = Pid::from_raw(self.init).ok_or("couldn't get container namespaces: no container init")?;
        let init = rustix::process::pidfd_open(init, PidfdFlags::empty()).map_err(|error| {
            format!("couldn't get container namespaces: container init has ended: {}", sys::reason(error))
        })?;
        let mut namespaces = ThreadNameSpaceType::MOUNT;
        if !self.entered {
            namespaces |= ThreadNameSpaceType::USER;
            namespaces.set(ThreadNameSpaceType::CONTROL_GROUP, self.cgroup_namespace);
        }
        rustix::thread::move_into_thread_name_spaces(std::os::fd::AsFd::as_fd(&init), namespaces)
            .map_err(|error| format!("couldn't join container namespaces: {}", sys::reason(error)))?;
        let workdir = self.workdir(options);
        rustix::process::chdir(workdir)
            .map_err(|error| format!("couldn't chdir to {workdir}: {}", sys::reason(error)))?;
        super::seccomp::fake_ownership()
            .load()
            .map_err(|error| format!("seccomp filter failed: {}", sys::reason(error)))
    }
}
