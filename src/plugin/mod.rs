//! The SPANK plugin: what runs inside Slurm's own processes (spank(8)).
//!
//! Mapped into every `srun`, `sbatch`, `salloc`, `slurmd` and `slurmstepd` of the cluster, as root in the last two, so it
//! does as little as possible: it registers the options and parses them, collects the step's facts, starts `pyxis`, joins
//! the container and sets the environment. No thread, no global subscriber, no signal handler, no `atexit`; no panic
//! crosses into C ([`hooks`]).
//!
//! One file for each SPANK context that has work:
//!
//! | context | process | file |
//! |---|---|---|
//! | local | `srun` | [`local`] |
//! | allocator | `sbatch`, `salloc`, `scrontab`, `scrun` | [`allocator`] |
//! | remote | `slurmstepd` and the tasks it forks | [`remote`] |
//! | slurmd | `slurmd` | [`slurmd`] |
//! | job script | `slurmstepd spank epilog` | [`job_script`] |
//!
//! Rules that hold in all of them (they follow from Slurm's behaviour in releases 20.11 to 26.05):
//!
//! * A hook returns 0 or -1: before 25.05 a positive value is logged and the job runs on, outside the container.
//! * On a node nothing fails before the task: a failing `init` or `user_init` drains the node. Errors are remembered and
//!   told from `task_init`, where the user sees them.
//! * A hook may run twice, because the plugin is listed twice or because Slurm says an option twice.

pub mod allocator;
pub mod handle;
pub mod hooks;
pub mod job_script;
pub mod local;
pub mod log;
pub mod remote;
pub mod slurmd;
pub mod state;
mod submit;
pub mod symbols;
pub mod version;

#[cfg(test)]
mod tests;

use crate::options::table::OptionSpec;
use crate::request::Environment;
use crate::task::UserMessage;

/// Where the plugin is loaded (`spank_context(3)`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `srun`.
    Local,
    /// `slurmstepd`.
    Remote,
    /// `sbatch`, `salloc`, `scrontab`, `scrun`.
    Allocator,
    /// `slurmd`.
    Slurmd,
    /// Prolog and epilog.
    JobScript,
    /// Slurm does not know, or says something newer than this list.
    Unknown,
}

/// A number that Slurm knows about the step or the task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// User id of the job.
    Uid,
    /// Primary group id of the job.
    Gid,
    /// Job id.
    JobId,
    /// Step id; values from 0xfffffff0 are special steps.
    StepId,
    /// Nodes of the step.
    Nodes,
    /// Tasks of the step on this node.
    LocalTasks,
    /// Tasks of the whole step.
    TotalTasks,
    /// Number of the task on this node.
    TaskId,
}

impl Item {
    /// For messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Uid => "user id",
            Self::Gid => "group id",
            Self::JobId => "id",
            Self::StepId => "step id",
            Self::Nodes => "node count",
            Self::LocalTasks => "local task count",
            Self::TotalTasks => "total task count",
            Self::TaskId => "task id",
        }
    }
}

/// Why Slurm did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpankError {
    /// The function answered with an error; Slurm's text for it.
    #[error("{0}")]
    Refused(String),
    /// The process we are in does not have the function.
    #[error("this Slurm has no {0}()")]
    Missing(&'static str),
    /// A name or value with a NUL inside.
    #[error("contains a NUL character")]
    Nul,
}

/// What Slurm offers to a running hook: the seam between Slurm and the plugin's logic.
pub trait Spank {
    /// Where the plugin is loaded.
    fn context(&self) -> Context;

    /// Registers an option; only during `init`.
    fn register(&mut self, option: &'static OptionSpec) -> Result<(), SpankError>;

    /// A number about the step or the task.
    fn number(&self, item: Item) -> Result<u32, SpankError>;

    /// Supplementary groups of the job's user.
    fn groups(&self) -> Result<Vec<u32>, SpankError>;

    /// Command line of the step.
    fn arguments(&self) -> Result<Vec<Vec<u8>>, SpankError>;

    /// The environment: the command's on the submit side, the step's or the task's on the node.
    fn environment(&self) -> Result<Environment, SpankError>;

    /// One variable of [`Spank::environment`], without copying all of it.
    fn variable(&self, name: &str) -> Option<Vec<u8>>;

    /// Sets a variable of [`Spank::environment`].
    fn set_variable(&mut self, name: &[u8], value: &[u8]) -> Result<(), SpankError>;

    /// Removes a variable of the step or task; on the node only.
    fn remove_variable(&mut self, name: &[u8]) -> Result<(), SpankError>;

    /// Says something to the user or the log.
    fn say(&mut self, message: UserMessage);
}

/// A hook failed, and why has been said or written down.
#[derive(Debug, PartialEq, Eq)]
pub struct Failed;
