//! The process between the leading task and an entrypoint. Whatever the entrypoint starts becomes its child at last, and it
//! ends all of that when the leading task says so, or ends itself, however it ends: process trackers without cgroups lose
//! orphans.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

use crate::sys::process::{block_all_signals, children, close_all_but, default_signals, exit_now};

/// How often it looks whether anything is left of an entrypoint that has ended, in nanoseconds.
const TICK: i64 = 20_000_000;

/// What the leading task holds of it.
#[derive(Debug)]
pub(super) struct Keeper {
    process: Pid,
    /// A byte when the entrypoint has ended by itself: its exit code. The end when nothing is left of it.
    status: File,
    /// Closed by whoever wants everything to end.
    hold: Option<OwnedFd>,
}

/// What has become of an entrypoint.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// It has ended itself.
    Code(i32),
    /// A signal has ended it, or nothing is left of what it has started.
    Gone,
}

/// The ends of the pipes that the keeper gets.
#[derive(Debug)]
pub(super) struct Ends {
    status: OwnedFd,
    hold: OwnedFd,
}

impl Keeper {
    /// Pipes for one, before the caller forks.
    pub fn pipes() -> io::Result<((File, OwnedFd), Ends)> {
        let ((status_read, status), (hold, hold_write)) =
            (pipe_with(PipeFlags::CLOEXEC)?, pipe_with(PipeFlags::CLOEXEC)?);
        rustix::io::ioctl_fionbio(&status_read, true)?;
        Ok(((status_read.into(), hold_write), Ends { status, hold }))
    }

    /// In the parent.
    pub fn new(process: Pid, (status, hold): (File, OwnedFd)) -> Self {
        Self { process, status, hold: Some(hold) }
    }

    /// Readable when [`Self::news`] has something to say.
    pub fn status(&self) -> &File {
        &self.status
    }

    /// What there is to know; `None` if nothing is.
    pub fn news(&mut self) -> io::Result<Option<Ended>> {
        let mut code = [0];
        match self.status.read(&mut code) {
            Ok(1) => Ok(Some(Ended::Code(code[0].into()))),
            Ok(_) => Ok(Some(Ended::Gone)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.hold = None;
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(self.process), WaitOptions::empty()));
    }
}

/// Makes the calling process, a child of the leading task, one that adopts what loses its parent, and detaches it from what
/// the task has. `streams` become its standard streams.
pub(super) fn begin(streams: [&OwnedFd; 3], ends: &Ends) -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    let [input, output, error] = streams;
    rustix::stdio::dup2_stdin(input)?;
    rustix::stdio::dup2_stdout(output)?;
    rustix::stdio::dup2_stderr(error)?;
    let standard = [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
    let kept: Vec<BorrowedFd<'_>> = standard.into_iter().chain([ends.status.as_fd(), ends.hold.as_fd()]).collect();
    close_all_but(&kept)
}

/// The rest of its life, with the entrypoint as its child.
pub(super) fn keep(entrypoint: Pid, ends: &Ends) -> ! {
    // The task's signals are for the task.
    default_signals();
    block_all_signals();
    let _ = watch(entrypoint, ends);
    end_children(None);
    exit_now(0)
}

/// Until nobody wants it any more, or nothing is left.
fn watch(entrypoint: Pid, ends: &Ends) -> io::Result<()> {
    // Nobody waits here for the end of output that nobody writes.
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    let mut running = Some(rustix::process::pidfd_open(entrypoint, PidfdFlags::empty())?);
    loop {
        let tick = Timespec { tv_sec: 0, tv_nsec: TICK };
        let mut watched = vec![PollFd::new(&ends.hold, PollFlags::empty())];
        watched.extend(running.as_ref().map(|process| PollFd::new(process, PollFlags::IN)));
        let timeout = if running.is_some() { None } else { Some(&tick) };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, timeout))?;
        if watched.first().is_some_and(|hold| !hold.revents().is_empty()) {
            return Ok(());
        }
        while let Some((process, status)) = rustix::process::wait(WaitOptions::NOHANG)? {
            if process == entrypoint {
                running = None;
                let Some(code) = status.exit_status().and_then(|code| u8::try_from(code).ok()) else { return Ok(()) };
                rustix::io::write(&ends.status, &[code])?;
            }
        }
    }
}

/// Ends all children of this process but `spared`, and theirs.
pub(super) fn end_children(spared: Option<Pid>) {
    loop {
        let mut others = children().unwrap_or_default();
        others.retain(|&child| Some(child) != spared);
        if others.is_empty() {
            return;
        }
        for &process in &others {
            let _ = rustix::process::kill_process(process, Signal::KILL);
        }
        // Their children become ours, for the next round.
        for process in others {
            let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(process), WaitOptions::empty()));
        }
    }
}
