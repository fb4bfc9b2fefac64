//! What the leading task and the broker say to each other.
//!
//! ```text
//! broker → Say …, Progress …                           at any time
//!          leader → LaunchedFrom (perhaps), Arrived
//! broker → Started                                     container init is in its namespaces
//!          leader → Proceed (+ environment, cgroup namespace)
//! broker → Ready (+ the container's environment)       or Failed
//! ```
//!
//! A container that runs already is `Ready` without having `Started`.
//!
//! The broker is the only holder of the leader's socket: if it dies, the leader sees end of file.

use serde::{Deserialize, Serialize};

use crate::devices::access::DeviceAccess;

/// Descriptors a broker finds open when it starts.
pub mod descriptors {
    /// The channel to the leading task.
    pub const CHANNEL: i32 = 3;
    /// The read end of the life pipe.
    pub const LIFE: i32 = 4;
    /// Memory file with the request as JSON.
    pub const REQUEST: i32 = 5;
    /// Memory file with the job's environment block.
    pub const ENVIRONMENT: i32 = 6;
    /// The first one that is none of these.
    pub const END: i32 = 7;
}

/// Most bytes of an environment or a request: far above `ARG_MAX` of execve(2), far below a machine's memory.
pub const MAX_MEMORY_FILE: u64 = 64 << 20;

/// What a container start may say to the user while it runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserMessage {
    /// A line the user sees as it is (`slurm_spank_log`).
    Notice(String),
    /// A line of an error (`slurm_error`).
    Error(String),
    /// For the log of the node only (`slurm_info`).
    Log(String),
}

/// What the leading task runs in the container before anybody joins it (`task/entrypoint.rs`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entrypoint {
    /// What to execute, a path inside the container or a name to be looked for in its `PATH`.
    pub program: String,
    /// Its arguments, `argv[0]` included; the last ones are what it has to execute.
    pub words: Vec<String>,
    /// How long it may take.
    pub timeout_seconds: u32,
    /// The image's entrypoint was asked for.
    pub requested: bool,
    /// Show what it has printed although all is well.
    pub show_output: bool,
}

/// From the broker to the leading task.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToLeader {
    /// Pass this on.
    Say(UserMessage),
    /// How far the import is, in one line.
    Progress {
        /// The line.
        line: String,
        /// Whether it is time for a line in an output that keeps every line.
        due: bool,
    },
    /// Container init runs in its user namespace.
    Started {
        /// Its process id.
        init: i32,
    },
    /// What is the task kept from? It is asked by a step that joins a running container, on a node with GPUs.
    WantDevices,
    /// The container can be joined. Descriptors: a memory file with the container's environment block and, if there is
    /// an entrypoint to run first, the pipe on which its probe reports.
    Ready {
        /// Process id of container init.
        init: i32,
        /// Working directory of the image, inside the container.
        workdir: String,
        /// What to run first. The broker goes on watching the step meanwhile, until the task hangs up.
        entrypoint: Option<Entrypoint>,
        /// Whether init is in a cgroup namespace of the container's, if the leader has not made it.
        #[serde(default)]
        cgroup_namespace: Option<bool>,
        /// What Slurm calls GPUs, and what they are called in the container, where that differs.
        #[serde(default)]
        gpu_numbers: Vec<(u32, u32)>,
    },
    /// The start failed; why has been said.
    Failed,
}

/// From the leading task to the broker.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToBroker {
    /// Where the step was launched from: the address at which the node reaches `srun`. Before `Arrived`, if the request says
    /// that nodes agree there on what the image's tag means.
    LaunchedFrom {
        /// `SLURM_LAUNCH_NODE_IPADDR`.
        address: String,
    },
    /// The task waits in `task_init`: it is in its cgroups.
    Arrived,
    /// The task is in its cgroups and has its environment. Descriptors: a memory file with that environment and, if
    /// `cgroup_namespace`, a cgroup namespace rooted at the task's cgroup, owned by the container's user namespace.
    Proceed {
        /// Whether the second descriptor is there.
        cgroup_namespace: bool,
        /// What the cgroups keep the task from.
        #[serde(default)]
        devices: DeviceAccess,
    },
    /// The answer to [`ToLeader::WantDevices`].
    Devices {
        /// What the cgroups keep the task from.
        devices: DeviceAccess,
    },
}
