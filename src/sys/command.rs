//! A program with a time limit, of which one output stream is wanted: for what an administrator or a user has written,
//! which may hang, and may say more than anybody wants to read.

#![forbid(unsafe_code)]

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

/// Which stream [`capture`] keeps; the other one is discarded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Output,
    /// Standard error.
    Error,
}

/// How a program ended, and what it said.
#[derive(Debug)]
pub struct Captured {
    /// `None` if it was killed for taking too long.
    pub status: Option<ExitStatus>,
    /// The beginning of the stream, of the length that was asked for.
    pub text: Vec<u8>,
}

/// Runs `command` in a process group of its own, with nothing on its standard input, and ends the whole group when the
/// program ends or `time` is over. At most `limit` bytes of the stream are kept.
pub fn capture(command: &mut Command, stream: Stream, limit: usize, time: Duration) -> io::Result<Captured> {
    capture_fed(command, Stdio::null(), stream, limit, time)
}

/// The same, with something on its standard input.
pub fn capture_fed(
    command: &mut Command,
    input: Stdio,
    stream: Stream,
    limit: usize,
    time: Duration,
) -> io::Result<Captured> {
    let (kept, discarded) = (Stdio::piped(), Stdio::null());
    let (output, error) = if stream == Stream::Output { (kept, discarded) } else { (discarded, kept) };
    let child = command.stdin(input).stdout(output).stderr(error).process_group(0).spawn()?;
    finish(child, limit, time, |child| {
        // The group has the pid's number until the child is waited for. Nobody else can have it.
        if let Some(group) = pid(child) {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    })
}

/// Runs `command` with `input` (which fits into a pipe) on its standard input, for its standard output. It stays in the
/// caller's process group, and ends with it; only the program itself is ended here, when `time` is over.
pub fn ask(command: &mut Command, input: &[u8], limit: usize, time: Duration) -> io::Result<Captured> {
    let child = command.stdin(filled_pipe(input)?).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    // Its end of the pipe stays with the command otherwise.
    command.stdin(Stdio::null());
    finish(child, limit, time, |child| drop(child.kill()))
}

/// A pipe with `input` in it, which fits: what a pipe holds can be written before there is a reader.
pub fn filled_pipe(input: &[u8]) -> io::Result<OwnedFd> {
    let (read, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
    std::fs::File::from(write).write_all(input)?;
    rustix::io::ioctl_fionbio(&read, false)?;
    Ok(read)
}

fn finish(mut child: Child, limit: usize, time: Duration, end: impl FnOnce(&mut Child)) -> io::Result<Captured> {
    let mut text = Vec::new();
    let ended = watch(&mut child, &mut text, limit, Instant::now() + time);
    end(&mut child);
    let status = child.wait()?;
    Ok(Captured { status: ended?.then_some(status), text })
}

fn pid(child: &Child) -> Option<Pid> {
    Pid::from_raw(child.id().cast_signed())
}

/// Reads until the program ends (`true`) or the deadline has passed.
fn watch(child: &mut Child, text: &mut Vec<u8>, limit: usize, deadline: Instant) -> io::Result<bool> {
    let process = pid(child).ok_or(Errno::SRCH)?;
    let process = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
    let pipe = child.stdout.take().map(OwnedFd::from).or_else(|| child.stderr.take().map(OwnedFd::from));
    let mut pipe = pipe.map(std::fs::File::from);
    if let Some(pipe) = &pipe {
        rustix::io::ioctl_fionbio(pipe, true)?;
    }
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
        let mut watched = vec![PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        watched.extend(pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        match rustix::event::poll(&mut watched, Some(&timeout)) {
            Err(Errno::INTR) => continue,
            other => other?,
        };
        let ended = watched.first().is_some_and(|process| !process.revents().is_empty());
        if pipe.as_mut().is_some_and(|pipe| !drain(pipe, text, limit)) {
            pipe = None;
        }
        if ended || left.is_zero() {
            return Ok(ended);
        }
    }
}

/// Reads what is there. `false`: the stream has ended.
fn drain(pipe: &mut std::fs::File, text: &mut Vec<u8>, limit: usize) -> bool {
    let mut buffer = [0; 4096];
    // A program that writes faster than this reads must not keep the deadline from being seen.
    for _ in 0..64 {
        match pipe.read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => {
                let wanted = length.min(limit.saturating_sub(text.len()));
                text.extend(buffer.iter().take(wanted));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str, stream: Stream, time: Duration) -> Captured {
        capture(Command::new("/bin/sh").args(["-c", script]), stream, 10, time).unwrap()
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn one_stream_is_kept() {
        let captured = shell("echo out; echo err >&2; exit 3", Stream::Output, LONG);
        assert_eq!((captured.text, captured.status.unwrap().code()), (b"out\n".to_vec(), Some(3)));
        assert_eq!(shell("echo out; echo err >&2", Stream::Error, LONG).text, b"err\n");
        assert_eq!(shell("head -c 1000000 /dev/zero; exit 4", Stream::Output, LONG).text, [0; 10]);
        assert_eq!(shell("read x || echo nothing", Stream::Output, LONG).text, b"nothing\n");
    }

    #[test]
    fn a_question_is_answered() {
        let ask = |script: &str, time| ask(Command::new("/bin/sh").args(["-c", script]), b"q\n", 10, time).unwrap();
        let captured = ask("read x; echo $x$x; cat; exit 3", LONG);
        assert_eq!((captured.text, captured.status.unwrap().code()), (b"qq\n".to_vec(), Some(3)));
        assert!(ask("exec sleep 1000", Duration::from_millis(200)).status.is_none());
    }

    #[test]
    fn what_it_started_ends_with_it() {
        let captured = shell("sleep 1000 & echo $!", Stream::Output, LONG);
        let pid = String::from_utf8(captured.text).unwrap();
        let status = || std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        // Killed, if perhaps not yet waited for by whoever inherited it.
        while let Ok(status) = status() {
            if status.contains(") Z ") {
                break;
            }
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let captured = shell("echo before; sleep 1000", Stream::Output, Duration::from_millis(200));
        assert!(captured.status.is_none());
        // Also one that never stops talking, and one that closes its streams.
        assert!(shell("yes", Stream::Output, Duration::from_millis(200)).status.is_none());
        assert!(shell("exec >&- 2>&-; sleep 1000", Stream::Error, Duration::from_millis(200)).status.is_none());
    }
}
