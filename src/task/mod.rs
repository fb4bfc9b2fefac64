//! A task's side of a container start: elect a leader, start the broker, wait for the container, join it.
//!
//! Used by the plugin in Slurm's task processes and by `pyxis run`. Single-threaded; never panics.
//!
//! ```text
//! user_init              StepShared::create, LifePipe::create        (slurmstepd)
//! task_init_privileged   StepShared::elect → Leader: start_broker    (each task, root)
//! task_init              Leader: StartingContainer::finish, publish  (each task, the user)
//!                        everybody: Container::join, then merged environment and exec
//! ```

mod entrypoint;
mod environment;
pub mod importer;
mod join;
pub mod protocol;
pub mod saving;
mod seccomp;
mod shared;
mod start;

pub use join::{Container, JoinOptions};
pub use protocol::UserMessage;
pub(crate) use seccomp::fake_ownership;
pub use shared::{Leadership, LifePipe, Outcome, Role, StepShared};
pub use start::{StartingContainer, start_broker};
