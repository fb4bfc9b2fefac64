//! Steps whose container is saved when their last task on the node has ended (behaviour reference, section 3.7).
//!
//! Slurm takes a task's exit status from the process that it has started, and nothing that a plugin does after that
//! process has ended changes it. So in such a step that process becomes the *saver* (`export::saver`), the task its child:
//!
//! ```text
//! slurmstepd ── task process ── fork ── task: joins the container, execs the command
//!                    │
//!                    └ exec: saver: waits for the task; the last one on the node saves; ends as the task did, or fails
//! ```
//!
//! It is in the task's cgroups, and Slurm's signals end it. What counts tasks is a memory file that all of them inherit.

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::ForkResult;
use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags};
use rustix::process::{Signal, WaitOptions};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use super::shared::environment_file;
use super::{Container, UserMessage};
use crate::request::{Environment, PROTOCOL_VERSION};
use crate::sys::memfile;
use crate::sys::process::{block_signals_to_forward, end_like, exec, keep_capabilities_across_exec, restore_signals};

/// Descriptors a saver starts with, after the standard streams.
pub mod descriptors {
    /// Memory file with a [`SaveRequest`](super::SaveRequest) as JSON.
    pub const REQUEST: i32 = 3;
    /// Memory file with the job's environment block.
    pub const ENVIRONMENT: i32 = 4;
    /// The step's [`TaskCount`](super::TaskCount).
    pub const COUNT: i32 = 5;
    /// The first one that is none of these.
    pub const END: i32 = 6;
}

/// What the saver does in the container's user namespace: enter its mount namespace, clone its root, read every file.
const CAPABILITIES: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH);

/// A task has joined the container.
const JOINED: u8 = b'j';
/// A task that a saver waited for has ended.
const ENDED: u8 = b'e';

/// What a saver has to know.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveRequest {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u32,
    /// Process id of container init.
    pub init: i32,
    /// The container's name, for messages.
    pub container: String,
    /// `--container-save`: absolute, or relative to the job's `PWD`.
    pub target: String,
    /// Tasks of the step on this node.
    pub local_tasks: u32,
    /// Whether signals reach only the process that Slurm knows, as `scancel --batch` sends them.
    pub forward_signals: bool,
}

/// Counts the tasks of a step on a node.
#[derive(Debug)]
pub struct TaskCount(File);

impl TaskCount {
    /// Made once a step, in slurmstepd, before the tasks are forked.
    pub fn create() -> io::Result<Self> {
        let file = rustix::fs::memfd_create("pyxis-save", MemfdFlags::CLOEXEC)?;
        rustix::fs::fcntl_setfl(&file, OFlags::RDWR | OFlags::APPEND)?;
        Ok(Self(file.into()))
    }

    /// From a descriptor that a saver has inherited. The lock needs an open file description of this process's own.
    pub fn inherited(file: &File) -> io::Result<Self> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = OFlags::RDWR | OFlags::APPEND | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::open(path, flags, Mode::empty())?.into()))
    }

    /// This task, which runs under a saver, has joined the container. From now on it ends with its saver.
    pub fn joined(&self) -> io::Result<()> {
        // Entering a user namespace has cleared it.
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        (&self.0).write_all(&[JOINED])
    }

    /// A task has ended. Whether it is the last of `tasks`, all of which had joined: true once a step.
    pub fn ended(&self, tasks: u32) -> io::Result<bool> {
        rustix::io::retry_on_intr(|| rustix::fs::flock(&self.0, FlockOperation::LockExclusive))?;
        (&self.0).write_all(&[ENDED])?;
        let mut events = Vec::new();
        File::from(rustix::fs::open(
            format!("/proc/self/fd/{}", self.0.as_raw_fd()),
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
        .read_to_end(&mut events)?;
        rustix::fs::flock(&self.0, FlockOperation::Unlock)?;
        let all = |event| events.iter().filter(|&&other| other == event).count() == tasks as usize;
        Ok(all(JOINED) && all(ENDED))
    }
}

impl Container {
    /// What is to be saved of it, and when.
    pub fn save_request(
        &self,
        container: String,
        target: String,
        local_tasks: u32,
        forward_signals: bool,
    ) -> SaveRequest {
        SaveRequest { protocol: PROTOCOL_VERSION, init: self.init, container, target, local_tasks, forward_signals }
    }
}

/// Makes the calling task, which has one thread, the child of a saver. Returns in that child; `say` is for the other one,
/// if there is no program to become.
pub fn run_under_saver(
    executable: &Path,
    config: &Path,
    request: &SaveRequest,
    job_environment: &Environment,
    count: &TaskCount,
    say: &mut dyn FnMut(UserMessage),
) -> Result<(), String> {
    let failed = |error: io::Error| format!("couldn't prepare saving the container: {error}");
    let json = serde_json::to_vec(request).map_err(|error| failed(error.into()))?;
    let request = memfile::sealed("pyxis-save-request", &json).map_err(failed)?;
    let environment = environment_file(job_environment).map_err(failed)?;
    let mask = block_signals_to_forward();
    // SAFETY: a task process has one thread, and what has to be done about Slurm's and the C library's locks is done by
    // the library's own fork, which this is.
    let task = match unsafe { nix::unistd::fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            restore_signals(&mask);
            return Ok(());
        }
        Err(errno) => {
            restore_signals(&mask);
            return Err(failed(errno.into()));
        }
    };
    // Here the process that Slurm knows goes on.
    let become_saver = || -> io::Error {
        let placed = [
            (&request, descriptors::REQUEST),
            (&environment, descriptors::ENVIRONMENT),
            (&count.0, descriptors::COUNT),
        ]
        .map(|(file, target)| {
            let raised = rustix::io::fcntl_dupfd_cloexec(file.as_fd(), descriptors::END)?;
            Ok::<_, io::Error>((raised, target))
        });
        for (raised, target) in placed.into_iter().flatten() {
            // SAFETY: dup2 takes numbers. What had the target's number is this program's, which ends here.
            unsafe { libc::dup2(raised.as_raw_fd(), target) };
        }
        if let Err(error) = keep_capabilities_across_exec(CAPABILITIES) {
            return error;
        }
        let task = task.to_string();
        let arguments = [crate::cli::SAVER.as_bytes(), config.as_os_str().as_bytes(), task.as_bytes()];
        let variables: [CString; 2] = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".into(), c"LANG=C.UTF-8".into()];
        exec(executable, &arguments, &variables)
    };
    let error = become_saver();
    say(UserMessage::error(format!("the container will not be saved: {error}; is pyxis installed on this node?")));
    loop {
        let task = rustix::process::Pid::from_raw(task.as_raw());
        match rustix::io::retry_on_intr(|| rustix::process::waitpid(task, WaitOptions::empty())) {
            Ok(Some((_, status))) if status.exit_status() != Some(0) => end_like(status),
            Ok(None) => {}
            _ => crate::sys::process::exit_now(1),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As a saver has it.
    fn saver(count: &TaskCount) -> TaskCount {
        TaskCount::inherited(&count.0).unwrap()
    }

    #[test]
    fn the_last_task_saves() {
        let count = TaskCount::create().unwrap();
        for _ in 0..3 {
            count.joined().unwrap();
        }
        assert!(!saver(&count).ended(3).unwrap());
        assert!(!saver(&count).ended(3).unwrap());
        assert!(saver(&count).ended(3).unwrap());
    }

    #[test]
    fn nobody_saves_if_a_task_could_not_join() {
        let count = TaskCount::create().unwrap();
        count.joined().unwrap();
        assert!(!saver(&count).ended(2).unwrap());
        assert!(!saver(&count).ended(2).unwrap());
    }

    #[test]
    fn of_many_that_end_at_once_one_saves() {
        let count = TaskCount::create().unwrap();
        (0..32).for_each(|_| count.joined().unwrap());
        let savers: Vec<_> = (0..32)
            .map(|_| {
                let saver = saver(&count);
                std::thread::spawn(move || saver.ended(32).unwrap())
            })
            .collect();
        let last = savers.into_iter().map(|saver| saver.join().unwrap()).filter(|last| *last).count();
        assert_eq!(last, 1);
    }
}
