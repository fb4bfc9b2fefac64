//! Lock and state of one step on one node, shared by its tasks.
//!
//! A memory file made by slurmstepd and inherited by every task it forks: in no directory, so there is nothing to clean
//! up, and nobody else can reach it. The lock is an flock(2), which the kernel releases when its holder dies.

use std::cell::OnceCell;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{FlockOperation, MemfdFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use super::protocol::MAX_MEMORY_FILE;
use super::{Container, UserMessage};
use crate::request::Environment;
use crate::sys::memfile;

/// Lock and state of one step, shared by all its tasks on this node.
#[derive(Debug)]
pub struct StepShared {
    file: File,
    /// This task's own open file description: an flock belongs to it.
    own: OnceCell<File>,
}

/// What [`StepShared::elect`] decided for this task.
#[derive(Debug)]
pub enum Role {
    /// This task starts the container and holds the step's lock until it publishes the outcome.
    Leader(Leadership),
    /// Another task does.
    Follower,
}

/// The lock of the leader: dropping it lets the other tasks go on.
#[derive(Debug)]
pub struct Leadership(File);

/// How a container start ended, for every task of the step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// Join it.
    Ready(Container),
    /// The leader has already reported why.
    Failed,
}

impl StepShared {
    /// Made once a step, in slurmstepd, before the tasks are forked.
    pub fn create() -> io::Result<Self> {
        let file = File::from(rustix::fs::memfd_create("pyxis-step", MemfdFlags::CLOEXEC)?);
        Ok(Self { file, own: OnceCell::new() })
    }

    fn own(&self) -> io::Result<&File> {
        if self.own.get().is_none() {
            let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let file = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
            // Empty a moment ago, and this process has one thread.
            let _ = self.own.set(File::from(file));
        }
        self.own.get().ok_or_else(|| io::Error::other("no lock"))
    }

    /// Called once by each task, as root. Never waits.
    pub fn elect(&self) -> io::Result<Role> {
        let own = self.own()?;
        match rustix::fs::flock(own, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(Role::Follower),
            other => other?,
        }
        if own.metadata()?.len() > 0 {
            rustix::fs::flock(own, FlockOperation::Unlock)?;
            return Ok(Role::Follower);
        }
        Ok(Role::Leader(Leadership(own.try_clone()?)))
    }

    /// The leader's last act: tells the outcome to the other tasks and lets them go on. Dropping the [`Leadership`] (or
    /// dying) without publishing makes them fail.
    pub fn publish(&self, leadership: Leadership, outcome: &Outcome) -> io::Result<()> {
        let Leadership(mut file) = leadership;
        let bytes = match outcome {
            Outcome::Ready(container) => {
                let mut bytes = serde_json::to_vec(container)?;
                bytes.push(0);
                bytes.extend(container.environment.to_block());
                bytes
            }
            Outcome::Failed => vec![0],
        };
        file.write_all(&bytes)?;
        rustix::fs::flock(&file, FlockOperation::Unlock)?;
        Ok(())
    }

    /// Waits for the leader. `None`: it died before it could publish.
    pub fn wait(&self) -> io::Result<Option<Outcome>> {
        let mut file = self.own()?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(file, FlockOperation::LockShared))?;
        file.rewind()?;
        let mut bytes = Vec::new();
        file.take(MAX_MEMORY_FILE).read_to_end(&mut bytes)?;
        rustix::fs::flock(file, FlockOperation::Unlock)?;
        let Some(end) = bytes.iter().position(|&byte| byte == 0) else { return Ok(None) };
        if end == 0 {
            return Ok(Some(Outcome::Failed));
        }
        let mut container: Container = serde_json::from_slice(&bytes[..end])?;
        container.environment = Environment::from_block(&bytes[end + 1..]);
        Ok(Some(Outcome::Ready(container)))
    }
}

/// The life pipe: container init lives as long as somebody holds the write end.
#[derive(Debug)]
pub struct LifePipe {
    /// Inherited by the broker and init.
    pub read: OwnedFd,
    /// Stays in slurmstepd.
    pub write: OwnedFd,
}

impl LifePipe {
    /// A new pipe, close-on-exec.
    pub fn create() -> io::Result<Self> {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        Ok(Self { read, write })
    }

    /// Ends the container in order: who reads the pipe can tell that its writer was not killed.
    pub fn end(self) {
        // Into an empty pipe: this does not block.
        let _ = rustix::io::write(&self.write, &[0]);
    }
}

/// A sealed memory file with `environment`'s block.
pub(super) fn environment_file(environment: &Environment) -> io::Result<File> {
    memfile::sealed("pyxis-environment", &environment.to_block())
}

impl UserMessage {
    /// An error line, as pyxis prefixes it.
    pub fn error(text: impl std::fmt::Display) -> Self {
        Self::Error(format!("pyxis: {text}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn container() -> Container {
        Container::new(4711, "/w".into(), true, Environment::from_iter(["A=1", "B=x y"]))
    }

    /// As tasks are: copies of one descriptor, each with a description of its own.
    fn task(shared: &StepShared) -> StepShared {
        StepShared { file: shared.file.try_clone().unwrap(), own: OnceCell::new() }
    }

    #[test]
    fn one_leads_and_the_others_learn_the_outcome() {
        let shared = StepShared::create().unwrap();
        let (first, second, late) = (task(&shared), task(&shared), task(&shared));
        let Role::Leader(leadership) = first.elect().unwrap() else { panic!("the first task leads") };
        assert!(matches!(second.elect().unwrap(), Role::Follower));
        let waiting = std::thread::spawn(move || second.wait().unwrap());
        first.publish(leadership, &Outcome::Ready(container())).unwrap();
        assert_eq!(waiting.join().unwrap(), Some(Outcome::Ready(container())));
        assert!(matches!(late.elect().unwrap(), Role::Follower));
        assert_eq!(late.wait().unwrap(), Some(Outcome::Ready(container())));
    }

    #[test]
    fn failure_and_death_of_the_leader_are_told_apart() {
        let shared = StepShared::create().unwrap();
        let (first, second) = (task(&shared), task(&shared));
        let Role::Leader(leadership) = first.elect().unwrap() else { panic!("the first task leads") };
        drop((leadership, first));
        assert_eq!(second.wait().unwrap(), None);

        let third = task(&shared);
        let Role::Leader(leadership) = third.elect().unwrap() else { panic!("a dead leader is replaced") };
        third.publish(leadership, &Outcome::Failed).unwrap();
        assert_eq!(second.wait().unwrap(), Some(Outcome::Failed));
    }
}
