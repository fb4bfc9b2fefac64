//! Images out of `docker` and `podman`, by their commands: only these know contexts, remote daemons, and where a user's
//! rootless storage is. Run as the user, with the environment of hooks (behaviour reference, section 7.1).

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::MemfdFlags;
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};

use super::reader::{BrokerChannel, Refusal};
use super::{FromReader, SourceForm, ToReader};
use crate::enroot::{HOST_PATH, conf};
use crate::request::{Engine, Environment};
use crate::sys::memfile;

/// Most of what a command says that is kept.
const MAX_OUTPUT: u64 = 1 << 20;
/// Most bytes of what is passed on of a command's complaint.
const MAX_COMPLAINT: usize = 500;

/// One engine, and the broker for whom it is asked.
pub(super) struct Engines<'a> {
    engine: Engine,
    environment: Environment,
    channel: &'a BrokerChannel,
}

/// What a command did.
struct Ended {
    status: ExitStatus,
    output: String,
    complaint: String,
}

impl<'a> Engines<'a> {
    pub fn new(engine: Engine, job: &Environment, channel: &'a BrokerChannel) -> Self {
        let mut environment = conf::of_job(job);
        environment.set("PATH", HOST_PATH);
        Self { engine, environment, channel }
    }

    /// Finds the image `name`, pulling it if the engine has it not, and saves it if the broker wants it.
    pub fn serve(&self, name: &str, cwd: &Path) -> Result<(), Refusal> {
        // Podman leaves a process behind, which is to end with this one.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(io::Error::from)?;
        // From a directory that is not there anything works but relative paths.
        let _ = std::env::set_current_dir(cwd);
        let outcome = self.find(name).and_then(|id| match id {
            Some(id) => self.save(&id),
            None => Ok(()),
        });
        end_children();
        outcome
    }

    /// The image's id, once the broker wants the image itself.
    fn find(&self, name: &str) -> Result<Option<String>, Refusal> {
        let inspect = ["image", "inspect", "--format", "{{.Id}}", name];
        let mut found = self.run(&inspect)?;
        if !found.status.success() {
            let pulled = self.run(&["pull", "--quiet", name])?;
            if !pulled.status.success() {
                return Err(self.refusal(&format!("pull {name}"), &pulled));
            }
            found = self.run(&inspect)?;
        }
        let id = found.output.trim();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || byte == b':';
        if !found.status.success() || id.is_empty() || id.len() > 200 || !id.bytes().all(plain) {
            return Err(self.refusal(&format!("image inspect {name}"), &found));
        }
        self.channel.send(&FromReader::Found { id: id.to_owned() }, &[])?;
        let wanted = matches!(self.channel.receive()?, Some((ToReader::Save, _)));
        Ok(wanted.then(|| id.to_owned()))
    }

    /// Passes the image on as it comes.
    fn save(&self, id: &str) -> Result<(), Refusal> {
        let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(io::Error::from)?;
        self.channel.send(&FromReader::Opened { form: SourceForm::Stream, file: None }, &[read.as_fd()])?;
        drop(read);
        let arguments: &[&str] = match self.engine {
            Engine::Docker => &["save", id],
            Engine::Podman => &["save", "--quiet", "--format", "docker-archive", id],
        };
        let saved = self.run_into(arguments, Some(write))?;
        if saved.status.success() { Ok(()) } else { Err(self.refusal(&format!("save {id}"), &saved)) }
    }

    fn run(&self, arguments: &[&str]) -> Result<Ended, Refusal> {
        self.run_into(arguments, None)
    }

    /// Runs the engine's command; its output is kept unless it goes to `output`. Ends with the broker.
    fn run_into(&self, arguments: &[&str], output: Option<OwnedFd>) -> Result<Ended, Refusal> {
        let name = self.engine.command();
        let kept = memory_file()?;
        let complaints = memory_file()?;
        let mut command = Command::new(name);
        command.args(arguments).env_clear().stdin(Stdio::null()).stderr(complaints.try_clone()?).process_group(0);
        command.envs(self.environment.iter().map(|(name, value)| {
            use std::os::unix::ffi::OsStrExt;
            (std::ffi::OsStr::from_bytes(name), std::ffi::OsStr::from_bytes(value))
        }));
        match output {
            Some(output) => command.stdout(output),
            None => command.stdout(kept.try_clone()?),
        };
        let mut child = command.spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => Refusal(format!("Command not found: {name} (looked for in {HOST_PATH})")),
            _ => Refusal(format!("cannot run {name}: {}", crate::sys::reason(error))),
        })?;
        // It has the end of the pipe that goes with it.
        drop(command);
        let pid = Pid::from_raw(child.id().cast_signed()).ok_or_else(|| io::Error::other("pid out of range"))?;
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(io::Error::from)?;
        let mut watched =
            [PollFd::new(&pidfd, PollFlags::IN), PollFd::from_borrowed_fd(self.channel.as_fd(), PollFlags::empty())];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None)).map_err(io::Error::from)?;
        if watched.first().is_some_and(|process| process.revents().is_empty()) {
            let _ = rustix::process::kill_process_group(pid, Signal::KILL);
            let _ = child.wait();
            end_children();
            return Err(Refusal("cancelled".into()));
        }
        let text =
            |file| Ok::<_, io::Error>(String::from_utf8_lossy(&memfile::read_all(file, MAX_OUTPUT)?).into_owned());
        Ok(Ended { status: child.wait()?, output: text(kept)?, complaint: text(complaints)? })
    }

    fn refusal(&self, what: &str, ended: &Ended) -> Refusal {
        let name = self.engine.command();
        Refusal(format!("{name} {what} failed: {}", reason(&ended.complaint, ended.status)))
    }
}

fn memory_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("pyxis-output", MemfdFlags::CLOEXEC)?.into())
}

/// What a command's complaint comes to: its last lines that speak of an error, else the last line.
fn reason(complaint: &str, status: ExitStatus) -> String {
    let lines: Vec<&str> = complaint.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let errors: Vec<&str> =
        lines.iter().copied().filter(|line| line.contains("rror") || line.contains("annot")).collect();
    let said = errors.last().or(lines.last()).copied();
    match said {
        Some(line) => line.chars().filter(|c| !c.is_control()).take(MAX_COMPLAINT).collect(),
        None => format!("{status}, and it did not say why"),
    }
}

/// Ends what the commands have left running, which has become this process's.
fn end_children() {
    let own = rustix::process::getpid().as_raw_nonzero();
    loop {
        // proc_pid_children(5): CONFIG_PROC_CHILDREN, which every distribution has.
        let children = std::fs::read_to_string(format!("/proc/self/task/{own}/children")).unwrap_or_default();
        let mut ended = false;
        for child in children.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)) {
            let _ = rustix::process::kill_process(child, Signal::KILL);
            ended |= rustix::process::waitpid(Some(child), WaitOptions::empty()).is_ok();
        }
        // Theirs have become this process's in turn.
        if !ended {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;

    #[test]
    fn the_reason_is_the_line_that_tells() {
        let failed = ExitStatus::from_raw(1 << 8);
        for (complaint, expected) in [
            (
                "warning: x\nError response from daemon: No such image: a\n",
                "Error response from daemon: No such image: a",
            ),
            ("Error: no\nSee 'docker --help'\n\n", "Error: no"),
            (
                "Cannot connect to the Docker daemon at unix:///x. Is it running?\n",
                "Cannot connect to the Docker daemon at unix:///x. Is it running?",
            ),
            ("one\ntwo\x1b[0m\n", "two[0m"),
            ("", "exit status: 1, and it did not say why"),
        ] {
            assert_eq!(reason(complaint, failed), expected);
        }
    }
}
