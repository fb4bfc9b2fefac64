//! Running an image's entrypoint, or the `/etc/rc` of an image that enroot made, before the tasks join (behaviour
//! reference, sections 3.10 and 6.3).
//!
//! The leading task does it: so it happens in the job's cgroups and with the task's CPUs and limits. The entrypoint is
//! given a program to execute, the probe (`sys::probe`), which says where it is; the environment and the working directory
//! found there become the container's. Then everything the entrypoint has started is killed, wherever it went: that is the
//! keeper's work, a process between the two, which outlives a task that is killed.
//!
//! It ends as well when it takes too long, and when the broker, which watches the step, ends.

mod keeper;

use std::collections::VecDeque;
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use keeper::{Ended, Keeper};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::Pid;

use super::protocol::{Entrypoint, MAX_MEMORY_FILE};
use super::{Container, JoinOptions, UserMessage};
use crate::request::Environment;
use crate::sys;
use crate::sys::exec::execute;
use crate::sys::process::{Forked, close_from, default_signals, die_with_parent, exit_now, fork};

/// Most bytes of output that are kept: the last ones.
const MAX_OUTPUT: usize = 1 << 20;
/// How long what an entrypoint leaves running when it has ended may take to get to the probe.
const GRACE: Duration = Duration::from_secs(10);
/// What shells set for themselves.
const SHELL_VARIABLES: [&str; 4] = ["PWD", "OLDPWD", "SHLVL", "_"];

/// What an entrypoint has prepared.
#[derive(Debug)]
pub(super) struct Prepared {
    /// The container's environment.
    pub environment: Environment,
    /// Where it changed to.
    pub workdir: String,
}

/// Why it has not.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
enum Failure {
    #[error("container start failed with error code: {0}")]
    Code(i32),
    #[error("container exited too soon")]
    TooSoon,
    #[error("container start error: {0} has not executed its arguments within {1} seconds")]
    Time(String, u32),
    #[error("container start was interrupted")]
    Cancelled,
    #[error("container start error: {0}")]
    Other(String),
}

impl Failure {
    fn system<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> Self + '_ {
        move |error| Self::Other(format!("{what}: {}", sys::reason(error)))
    }
}

/// Runs `entrypoint` in `container` until it has got to the probe, which writes to `report`. `broker` is the one child
/// that is not the entrypoint's, and `channel` the socket to it. If it fails, the reason has been said.
pub(super) fn run(
    entrypoint: &Entrypoint,
    container: &Container,
    report: OwnedFd,
    (broker, channel): (Pid, BorrowedFd<'_>),
    say: &mut dyn FnMut(UserMessage),
) -> Result<Prepared, ()> {
    let mut output = Output::default();
    let result = attempt(entrypoint, container, report, (broker, channel), &mut output);
    match &result {
        Ok(_) if entrypoint.show_output => output.lines().for_each(|line| say(UserMessage::Notice(line))),
        Ok(_) => {}
        Err(Failure::Cancelled) => say(UserMessage::error(Failure::Cancelled)),
        Err(failure) => {
            say(UserMessage::error(failure));
            say(UserMessage::error("printing enroot log file:"));
            output.lines().for_each(|line| say(UserMessage::error(format!("    {line}"))));
            if entrypoint.requested {
                say(UserMessage::error("if the image has an unusual entrypoint, try using --no-container-entrypoint"));
            }
        }
    }
    result.map_err(drop)
}

fn attempt(
    entrypoint: &Entrypoint,
    container: &Container,
    report: OwnedFd,
    (broker, channel): (Pid, BorrowedFd<'_>),
    output: &mut Output,
) -> Result<Prepared, Failure> {
    let text = |bytes: &[u8]| CString::new(bytes).map_err(Failure::system("entrypoint"));
    let arguments = entrypoint.words.iter().map(|word| text(word.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let environment = &container.environment;
    let variables =
        environment.iter().map(|(name, value)| text(&[name, b"=", value].concat())).collect::<Result<Vec<_>, _>>()?;
    let null = rustix::fs::open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(Failure::system("/dev/null"))?;
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).map_err(Failure::system("pipe"))?;
    for reading in [&read, &report] {
        rustix::io::ioctl_fionbio(reading, true).map_err(Failure::system("pipe"))?;
    }

    let program = || {
        let program = &entrypoint.program;
        let errno = match text(program.as_bytes()) {
            Ok(program) => execute(&program, &arguments, &variables, environment.get("PATH")),
            Err(_) => nix::errno::Errno::EINVAL,
        };
        let _ = writeln!(io::stderr(), "[ERROR] {program}: {}", errno.desc());
        // As shells have it.
        if errno == nix::errno::Errno::ENOENT { 127 } else { 126 }
    };

    let adopting = Adopting::begin(broker).map_err(Failure::system("entrypoint"))?;
    let (own_ends, ends) = Keeper::pipes().map_err(Failure::system("pipe"))?;
    // SAFETY: a task process has one thread.
    let keeper = match unsafe { fork(0) }.map_err(Failure::system("entrypoint"))? {
        Forked::Child => become_keeper(container, [&null, &write, &write], &ends, program),
        Forked::Parent(keeper) => Keeper::new(keeper, own_ends),
    };
    drop((write, null, ends));
    let mut watch = Watch { keeper, report: File::from(report), output: Some(File::from(read)), channel };
    let limit = Duration::from_secs(entrypoint.timeout_seconds.into());
    let result = watch
        .until_reported(output, Instant::now() + limit)
        .and_then(|probe| prepared(probe, environment))
        .map_err(|failure| match failure {
            Failure::Time(..) => Failure::Time(entrypoint.program.clone(), entrypoint.timeout_seconds),
            other => other,
        });
    let Watch { keeper, output: pipe, .. } = watch;
    drop(keeper);
    drop(adopting);
    // What was written before the end.
    if let Some(mut pipe) = pipe {
        output.take_from(&mut pipe);
    }
    result
}

/// In the child of the task: the keeper, and its child, the entrypoint.
fn become_keeper(
    container: &Container,
    streams: [&OwnedFd; 3],
    ends: &keeper::Ends,
    program: impl FnOnce() -> i32,
) -> ! {
    let failed = |reason: String| -> ! {
        let _ = writeln!(io::stderr(), "[ERROR] {reason}");
        exit_now(1)
    };
    let step = |error: io::Error| format!("cannot start the entrypoint: {}", sys::reason(error));
    if let Err(error) = keeper::begin(streams, ends) {
        failed(step(error));
    }
    let keeper = rustix::process::getpid();
    // SAFETY: the copy of a process with one thread has one.
    match unsafe { fork(0) } {
        Ok(Forked::Child) => match become_entrypoint(keeper, container) {
            Ok(()) => exit_now(program()),
            Err(reason) => failed(reason),
        },
        Ok(Forked::Parent(entrypoint)) => keeper::keep(entrypoint, ends),
        Err(error) => failed(step(error)),
    }
}

/// In the child of the keeper: everything up to execve(2).
fn become_entrypoint(keeper: Pid, container: &Container) -> Result<(), String> {
    let step = |error: io::Error| format!("cannot start the entrypoint: {}", sys::reason(error));
    die_with_parent(keeper).map_err(step)?;
    rustix::process::setsid().map_err(|errno| step(errno.into()))?;
    container.join(&JoinOptions::default())?;
    close_from(3).map_err(step)?;
    default_signals();
    Ok(())
}

/// Reads what the entrypoint has made of the environment it was given.
fn prepared(probe: Pid, given: &Environment) -> Result<Prepared, Failure> {
    let process = format!("/proc/{}", probe.as_raw_nonzero());
    let mut block = Vec::new();
    File::open(format!("{process}/environ"))
        .and_then(|file| file.take(MAX_MEMORY_FILE).read_to_end(&mut block))
        .map_err(Failure::system("couldn't read container environment"))?;
    let mut environment = Environment::from_block(&block);
    for name in SHELL_VARIABLES {
        match given.get(name) {
            Some(value) => environment.set(name, value),
            None => environment.remove(name),
        }
    }
    let workdir = std::fs::read_link(format!("{process}/cwd"))
        .map_err(Failure::system("couldn't get container directory"))?
        .into_os_string()
        .into_string()
        .map_err(|path| Failure::Other(format!("the entrypoint's directory is not UTF-8: {}", path.display())))?;
    Ok(Prepared { environment, workdir })
}

/// As long as it exists, processes that lose their parent become the caller's children, should the keeper be killed. When
/// dropped, ends all children but the broker.
struct Adopting {
    broker: Pid,
}

impl Adopting {
    fn begin(broker: Pid) -> Result<Self, Errno> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
        Ok(Self { broker })
    }
}

impl Drop for Adopting {
    fn drop(&mut self) {
        keeper::end_children(Some(self.broker));
        // The command this process becomes has no use for other people's orphans.
        let _ = rustix::process::set_child_subreaper(None);
    }
}

struct Watch<'a> {
    keeper: Keeper,
    report: File,
    /// `None` once all of it is read.
    output: Option<File>,
    channel: BorrowedFd<'a>,
}

impl Watch<'_> {
    /// Waits for the probe, and gives its pid.
    fn until_reported(&mut self, output: &mut Output, mut deadline: Instant) -> Result<Pid, Failure> {
        let mut running = true;
        let mut reported = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(if running { Failure::Time(String::new(), 0) } else { Failure::TooSoon });
            }
            let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
            let mut watched = vec![
                PollFd::new(&self.report, PollFlags::IN),
                PollFd::from_borrowed_fd(self.channel, PollFlags::IN | PollFlags::RDHUP),
                PollFd::new(self.keeper.status(), PollFlags::IN),
            ];
            watched.extend(self.output.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, Some(&timeout)))
                .map_err(Failure::system("poll"))?;
            let cancelled = watched.get(1).is_some_and(|channel| !channel.revents().is_empty());

            if self.output.as_mut().is_some_and(|pipe| !output.take_from(pipe)) {
                self.output = None;
            }
            // Before the probe, which is read to the end of what was written before this.
            let news = self.keeper.news().map_err(Failure::system("entrypoint"))?;
            if let Some(probe) = self.probe(&mut reported)? {
                return Ok(probe);
            }
            if cancelled {
                return Err(Failure::Cancelled);
            }
            match news {
                None => {}
                // Something it has started may be about to execute the probe, if it says that all is well.
                Some(Ended::Code(0)) => {
                    running = false;
                    deadline = deadline.min(Instant::now() + GRACE);
                }
                Some(Ended::Code(code)) => return Err(Failure::Code(code)),
                Some(Ended::Gone) => return Err(Failure::TooSoon),
            }
        }
    }

    /// What the probe has said, if it has.
    fn probe(&mut self, reported: &mut Vec<u8>) -> Result<Option<Pid>, Failure> {
        let mut buffer = [0; 64];
        match self.report.read(&mut buffer) {
            // Container init holds the other end.
            Ok(0) => return Err(Failure::Other("container init has ended".into())),
            Ok(length) => reported.extend(buffer.iter().take(length)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(Failure::system("entrypoint")(error)),
        }
        let Some(end) = reported.iter().position(|&byte| byte == b'\n') else { return Ok(None) };
        std::str::from_utf8(reported.get(..end).unwrap_or_default())
            .ok()
            .and_then(|text| text.parse().ok())
            .and_then(Pid::from_raw)
            .map(Some)
            .ok_or_else(|| Failure::Other("the probe's report makes no sense".into()))
    }
}

/// The end of what an entrypoint has written.
#[derive(Debug, Default)]
struct Output {
    kept: VecDeque<u8>,
    left_out: usize,
}

impl Output {
    /// Reads what there is. `false` at the end of the stream.
    fn take_from(&mut self, pipe: &mut File) -> bool {
        let mut buffer = [0; 1 << 14];
        // An entrypoint that writes faster than this reads must not keep the deadline from being seen.
        for _ in 0..64 {
            match pipe.read(&mut buffer) {
                Ok(0) => return false,
                Ok(length) => {
                    self.kept.extend(buffer.iter().take(length));
                    let excess = self.kept.len().saturating_sub(MAX_OUTPUT);
                    self.kept.drain(..excess);
                    self.left_out += excess;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    fn lines(&mut self) -> impl Iterator<Item = String> {
        let note = (self.left_out > 0).then(|| format!("[... {} bytes left out]", self.left_out));
        let text = &*self.kept.make_contiguous();
        let text = text.strip_suffix(b"\n").unwrap_or(text);
        let lines = text.split(|&byte| byte == b'\n').filter(|_| !text.is_empty());
        // What is printed ends at a NUL.
        let lines = lines.map(|line| String::from_utf8_lossy(line).trim_end_matches('\r').replace('\0', "\\0"));
        note.into_iter().chain(lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_the_output_is_kept() {
        let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC).unwrap();
        rustix::io::ioctl_fionbio(&read, true).unwrap();
        let (mut read, mut write) = (File::from(read), File::from(write));
        let mut output = Output::default();
        assert_eq!(output.lines().count(), 0);
        write.write_all(b"first\r\n\nbad \xff\0\nlast").unwrap();
        assert!(output.take_from(&mut read));
        assert_eq!(output.lines().collect::<Vec<_>>(), ["first", "", "bad \u{fffd}\\0", "last"]);
        for _ in 0..MAX_OUTPUT / 1024 {
            write.write_all(&[b'x'; 1024]).unwrap();
            assert!(output.take_from(&mut read));
        }
        assert_eq!(output.kept.len(), MAX_OUTPUT);
        assert_eq!(output.lines().next().unwrap(), "[... 19 bytes left out]");
        drop(write);
        assert!(!output.take_from(&mut read));
    }
}
