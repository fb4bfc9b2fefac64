//! Images out of `docker` and `podman`, by their commands: only these know contexts, remote daemons, and where a user's
//! rootless storage is. Run as the user, with the environment of hooks (behaviour reference, section 7.1).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::ExitStatus;

use rustix::process::{Pid, Signal, WaitOptions};

use super::program::{self, Ended, Output};
use super::reader::{BrokerChannel, Refusal};
use super::{FromReader, SourceForm, ToReader};
use crate::enroot::{HOST_PATH, conf};
use crate::request::{Engine, Environment};

/// Most bytes of what is passed on of a command's complaint.
const MAX_COMPLAINT: usize = 500;

/// One engine, and the broker for whom it is asked.
pub(super) struct Engines<'a> {
    engine: Engine,
    environment: Environment,
    cwd: &'a Path,
    channel: &'a BrokerChannel,
}

impl<'a> Engines<'a> {
    pub fn new(engine: Engine, job: &Environment, cwd: &'a Path, channel: &'a BrokerChannel) -> Self {
        let mut environment = conf::of_job(job);
        environment.set("PATH", HOST_PATH);
        Self { engine, environment, cwd, channel }
    }

    /// Finds the image `name`, pulling it if the engine has it not, and saves it if the broker wants it.
    pub fn serve(&self, name: &str) -> Result<(), Refusal> {
        // Podman leaves a process behind, which is to end with this one.
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).map_err(io::Error::from)?;
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
        let output = output.map_or(Output::Keep, Output::To);
        let mut command = program::command(name.as_ref(), &self.environment, self.cwd);
        command.args(arguments);
        program::run(command, output, self.channel).map_err(|error| match error {
            program::RunError::Start(error) if error.kind() == io::ErrorKind::NotFound => {
                Refusal(format!("Command not found: {name} (looked for in {HOST_PATH})"))
            }
            program::RunError::Start(error) => Refusal(format!("cannot run {name}: {}", crate::sys::reason(error))),
            program::RunError::Cancelled => {
                end_children();
                Refusal("cancelled".into())
            }
        })
    }

    fn refusal(&self, what: &str, ended: &Ended) -> Refusal {
        let name = self.engine.command();
        Refusal(format!("{name} {what} failed: {}", reason(&ended.complaint, ended.status)))
    }
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
