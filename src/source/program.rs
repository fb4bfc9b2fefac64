//! A program of the host's, run as the user for as long as the broker wants what it makes.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Access, MemfdFlags};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::reader::BrokerChannel;
use crate::request::Environment;

/// Most of a program's output and complaints that is kept: of complaints the end.
const MAX_KEPT: u64 = 64 << 10;
/// How long a program that is told to end may take.
const GRACE: Duration = Duration::from_secs(5);

/// What becomes of a program's output.
#[derive(Debug)]
pub(super) enum Output {
    /// It is in [`Ended::output`].
    Keep,
    /// The first line of it is there.
    FirstLine,
    /// It goes there.
    To(OwnedFd),
}

/// What a program did.
#[derive(Debug)]
pub(super) struct Ended {
    pub status: ExitStatus,
    pub output: String,
    pub complaint: String,
}

/// Why it did nothing.
#[derive(Debug)]
pub(super) enum RunError {
    /// It could not be run.
    Start(io::Error),
    /// The broker has hung up, and the program was ended.
    Cancelled,
}

impl From<io::Error> for RunError {
    fn from(error: io::Error) -> Self {
        Self::Start(error)
    }
}

/// `program` with exactly this environment. From a directory that cannot be entered anything works but relative paths. A
/// name without a slash is looked for in the environment's `PATH`.
pub(super) fn command(program: &OsStr, environment: &Environment, cwd: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear();
    command.envs(environment.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    if rustix::fs::access(cwd.join("."), Access::EXEC_OK).is_ok() {
        command.current_dir(cwd);
    }
    command
}

/// Runs a program, with nothing to read and in a process group of its own, until it ends or the broker hangs up.
pub(super) fn run(mut command: Command, output: Output, channel: &BrokerChannel) -> Result<Ended, RunError> {
    command.stdin(Stdio::null()).process_group(0);
    let complaints = memory_file()?;
    command.stderr(complaints.try_clone()?);
    let mut kept = None;
    match output {
        Output::Keep => {
            let file = memory_file()?;
            command.stdout(file.try_clone()?);
            kept = Some(file);
        }
        Output::FirstLine => {
            command.stdout(Stdio::piped());
        }
        Output::To(to) => drop(command.stdout(to)),
    }
    let mut child = command.spawn()?;
    // It has the end of the pipe that goes with it.
    drop(command);
    let watched = watch(&mut child, channel);
    match watched {
        Ok((line, status)) => {
            let output = kept.map_or(Ok(line), |file| text(file, SeekFrom::Start(0)))?;
            let complaint = text(complaints, SeekFrom::End(0))?;
            Ok(Ended { status, output, complaint })
        }
        Err(error) => {
            end(&mut child);
            Err(error)
        }
    }
}

fn memory_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("pyxis-output", MemfdFlags::CLOEXEC)?.into())
}

/// The beginning or the end of a file.
fn text(mut file: File, from: SeekFrom) -> io::Result<String> {
    let start = match from {
        SeekFrom::End(_) => file.metadata()?.len().saturating_sub(MAX_KEPT),
        _ => 0,
    };
    file.seek(SeekFrom::Start(start))?;
    let mut bytes = Vec::new();
    file.take(MAX_KEPT).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Waits for the program's end. If there is a pipe from it, gives the first line that it writes, without its end.
fn watch(child: &mut Child, channel: &BrokerChannel) -> Result<(String, ExitStatus), RunError> {
    let pidfd = rustix::process::pidfd_open(pid(child)?, PidfdFlags::empty()).map_err(io::Error::from)?;
    let mut pipe = child.stdout.take();
    if let Some(pipe) = &pipe {
        rustix::io::ioctl_fionbio(pipe, true).map_err(io::Error::from)?;
    }
    let (mut line, mut complete) = (Vec::new(), false);
    loop {
        let mut watched =
            vec![PollFd::new(&pidfd, PollFlags::IN), PollFd::from_borrowed_fd(channel.as_fd(), PollFlags::empty())];
        watched.extend(pipe.as_ref().map(|pipe| PollFd::new(pipe, PollFlags::IN)));
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None)).map_err(io::Error::from)?;
        let mut ready = watched.iter().map(|fd| !fd.revents().is_empty());
        let (ended, hung_up) = (ready.next().unwrap_or(false), ready.next().unwrap_or(false));
        // All that was written before the end is there by now. The rest is read as well: it must not fill the pipe.
        while let Some(open) = &mut pipe {
            let mut buffer = [0; 4096];
            match open.read(&mut buffer) {
                Ok(0) => pipe = None,
                Ok(count) if !complete => {
                    let read = buffer.get(..count).unwrap_or_default();
                    let end = read.iter().position(|&byte| byte == b'\n');
                    line.extend_from_slice(read.get(..end.unwrap_or(count)).unwrap_or_default());
                    complete = end.is_some() || line.len() as u64 > MAX_KEPT;
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error.into()),
            }
            if !ended && hung_up {
                break;
            }
        }
        if ended {
            return Ok((String::from_utf8_lossy(&line).into_owned(), child.wait()?));
        }
        if hung_up {
            return Err(RunError::Cancelled);
        }
    }
}

/// Ends the program's process group: asks first, as Slurm does.
fn end(child: &mut Child) {
    if let Ok(group) = pid(child) {
        let _ = rustix::process::kill_process_group(group, Signal::TERM);
        if let Ok(pidfd) = rustix::process::pidfd_open(group, PidfdFlags::empty()) {
            let mut ended = [PollFd::new(&pidfd, PollFlags::IN)];
            let _ = rustix::event::poll(&mut ended, GRACE.try_into().ok().as_ref());
        }
        // The number is the group's until the child is waited for.
        let _ = rustix::process::kill_process_group(group, Signal::KILL);
    }
    let _ = child.wait();
}

fn pid(child: &Child) -> io::Result<Pid> {
    Pid::from_raw(child.id().cast_signed()).ok_or_else(|| io::Error::other("pid out of range"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::{FromReader, ToReader};
    use crate::sys::channel::{self, Channel};

    fn channel() -> (Channel<ToReader, FromReader>, BrokerChannel) {
        channel::pair().unwrap()
    }

    fn shell(script: &str, output: Output) -> Ended {
        let (_broker, reader) = channel();
        let environment = Environment::from_block(b"PATH=/usr/bin:/bin\0A=b\0");
        let mut command = command("sh".as_ref(), &environment, Path::new("/usr"));
        command.args(["-c", script]);
        run(command, output, &reader).unwrap()
    }

    #[test]
    fn output_and_complaints_are_kept() {
        let ended = shell("echo $A; read x || echo nothing; echo bad >&2; exit 3", Output::Keep);
        assert_eq!((&*ended.output, &*ended.complaint, ended.status.code()), ("b\nnothing\n", "bad\n", Some(3)));
        let ended = shell("head -c 100000 /dev/zero; head -c 100000 /dev/zero >&2; echo last >&2", Output::Keep);
        assert_eq!(ended.output.len() as u64, MAX_KEPT);
        assert!(ended.complaint.ends_with("last\n") && ended.complaint.len() as u64 == MAX_KEPT);
    }

    #[test]
    fn the_first_line_is_enough() {
        // It may write on as long as it likes.
        let ended = shell("echo /some/path; seq 100000", Output::FirstLine);
        assert_eq!((&*ended.output, ended.status.code()), ("/some/path", Some(0)));
        assert_eq!(shell("pwd", Output::FirstLine).output, "/usr");
        assert_eq!(shell("printf /no/newline", Output::FirstLine).output, "/no/newline");
        assert_eq!(shell("exit 7", Output::FirstLine).output, "");
    }

    #[test]
    fn who_hangs_up_ends_it() {
        for output in [Output::Keep, Output::FirstLine] {
            let (broker, reader) = channel();
            let thread = std::thread::spawn(move || {
                let environment = Environment::from_block(b"PATH=/usr/bin:/bin\0");
                let mut command = command("sleep".as_ref(), &environment, Path::new("/"));
                command.arg("1000");
                run(command, output, &reader)
            });
            drop(broker);
            assert!(matches!(thread.join().unwrap(), Err(RunError::Cancelled)));
        }
    }

    #[test]
    fn what_cannot_be_run_is_an_error() {
        let (_broker, reader) = channel();
        let command = command("/nonexistent".as_ref(), &Environment::default(), Path::new("/nonexistent"));
        let error = run(command, Output::Keep, &reader).unwrap_err();
        assert!(matches!(error, RunError::Start(error) if error.kind() == io::ErrorKind::NotFound));
    }
}
