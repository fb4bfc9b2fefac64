//! Commands that end by themselves or at a deadline, daemons that are ended by pid, and a look at `/proc`.

use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::wait;

/// What a command that ended said.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Standard output; what is not UTF-8 is replaced.
    pub stdout: String,
    /// Standard error; what is not UTF-8 is replaced.
    pub stderr: String,
}

impl Output {
    /// The exit code, or 128 and the signal number as shells report it.
    pub fn code(&self) -> i32 {
        self.status.code().unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Fails with everything the command said unless it succeeded.
    pub fn success(self) -> Result<Self> {
        if !self.status.success() {
            bail!("{self}");
        }
        Ok(self)
    }
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` ended with {}", self.command, self.status)?;
        for (name, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.is_empty() {
                write!(f, "\n--- {name}\n{}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A command that has been started, in a process group of its own.
#[derive(Debug)]
pub struct Running {
    command: String,
    child: Child,
    stdout: Capture,
    stderr: Capture,
}

/// A pipe that is read to its end by a thread.
#[derive(Debug)]
struct Capture {
    bytes: Arc<Mutex<Vec<u8>>>,
    reader: Option<JoinHandle<()>>,
}

impl Capture {
    fn start(mut pipe: impl Read + Send + 'static) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&bytes);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(count @ 1..) = pipe.read(&mut buffer) {
                sink.lock().expect("no reader panics").extend_from_slice(&buffer[..count]);
            }
        });
        Self { bytes, reader: Some(reader) }
    }

    fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().expect("no reader panics")).into_owned()
    }

    fn finished(&self) -> bool {
        self.reader.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Running {
    /// Starts `command` with its output captured. Its standard input is `/dev/null` unless the caller set it.
    pub fn start(command: &mut Command) -> Result<Self> {
        let text = format!("{command:?}");
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {text}"))?;
        let stdout = Capture::start(child.stdout.take().context("stdout was piped")?);
        let stderr = Capture::start(child.stderr.take().context("stderr was piped")?);
        Ok(Self { command: text, child, stdout, stderr })
    }

    /// Writes `input` to the command's standard input (which the caller made a pipe) and closes it.
    pub fn write_stdin(&mut self, input: &[u8]) -> Result<()> {
        let mut pipe = self.child.stdin.take().context("stdin is not a pipe")?;
        pipe.write_all(input).context("cannot write to the command")
    }

    /// The pid.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Standard output until now.
    pub fn stdout(&self) -> String {
        self.stdout.so_far()
    }

    /// Standard error until now.
    pub fn stderr(&self) -> String {
        self.stderr.so_far()
    }

    /// Sends a signal to the command itself.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.command))
    }

    /// Waits until standard output or error contains `text`. Fails when the command ends without it.
    pub fn wait_for_text(&mut self, text: &str, deadline: Duration) -> Result<()> {
        let found = wait::until(&format!("\"{text}\" from {}", self.command), deadline, || {
            let ended = self.has_ended();
            match self.stdout().contains(text) || self.stderr().contains(text) {
                true => Some(true),
                false => ended.then_some(false),
            }
        });
        match found {
            Ok(true) => Ok(()),
            Ok(false) => {
                bail!("{} ended without saying \"{text}\", but {}{}", self.command, self.stdout(), self.stderr())
            }
            Err(error) => bail!("{error}; it said: {}{}", self.stdout(), self.stderr()),
        }
    }

    fn has_ended(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(Some(_))) && self.stdout.finished() && self.stderr.finished()
    }

    /// Waits for the end of the command and of its output; at the deadline its process group is killed and that is an
    /// error with all it said.
    pub fn wait(mut self, deadline: Duration) -> Result<Output> {
        if wait::until("the command", deadline, || self.has_ended().then_some(())).is_err() {
            // The group may be gone while a daemon that inherited the pipes lives on.
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
            bail!(
                "`{}` did not end within {} s; it said:\n{}{}",
                self.command,
                deadline.as_secs(),
                self.stdout(),
                self.stderr()
            );
        }
        let status = self.child.wait().with_context(|| format!("cannot wait for {}", self.command))?;
        Ok(Output { command: self.command.clone(), status, stdout: self.stdout(), stderr: self.stderr() })
    }
}

impl Drop for Running {
    /// A test that fails half-way leaves nothing running.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = killpg(self.pid(), Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }
}

/// Runs `command` to its end. Its standard input is `/dev/null`.
pub fn run(command: &mut Command, deadline: Duration) -> Result<Output> {
    Running::start(command.stdin(Stdio::null()))?.wait(deadline)
}

/// Runs `command` to its successful end and gives its standard output.
pub fn output_of(command: &mut Command) -> Result<String> {
    Ok(run(command, wait::DEADLINE)?.success()?.stdout)
}

/// A process that is recorded in the testbed's list and ended by [`Daemon::stop`].
#[derive(Debug)]
pub struct Daemon {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Daemon {
    /// Starts `command` with its output appended to `log`, in a session of its own, and records it in `processes`.
    pub fn start(name: &str, command: &mut Command, log: &Path, processes: &Path) -> Result<Self> {
        let file = File::options().create(true).append(true).open(log).with_context(|| log.display().to_string())?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        let pid = child.id().cast_signed();
        let start = start_time(pid).unwrap_or(0);
        let mut list = File::options().create(true).append(true).open(processes)?;
        list.write_all(format!("{pid} {start} {name}\n").as_bytes())?;
        Ok(Self { name: name.into(), child, log: log.into() })
    }

    /// The pid.
    pub fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().cast_signed())
    }

    /// Fails with the end of the log when the daemon has ended.
    pub fn check(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            bail!("{} ended with {status}; {}:\n{}", self.name, self.log.display(), tail(&self.log));
        }
        Ok(())
    }

    /// Ends the daemon with `signal`, and by force when it does not heed it.
    pub fn stop(&mut self, signal: Signal) {
        let _ = kill(self.pid(), signal);
        if wait::until("end", wait::DEADLINE / 4, || matches!(self.child.try_wait(), Ok(Some(_))).then_some(()))
            .is_err()
        {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// The last lines of a log.
pub fn tail(log: &Path) -> String {
    let text = fs::read(log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(25)..].join("\n")
}

/// When a process started, in clock ticks since boot: with the pid, its identity (proc(5), `/proc/pid/stat`).
pub fn start_time(pid: i32) -> Option<u64> {
    stat_fields(pid)?.get(19)?.parse().ok()
}

/// The parent of a process.
pub fn parent(pid: i32) -> Option<i32> {
    stat_fields(pid)?.get(1)?.parse().ok()
}

/// The fields of `/proc/pid/stat` after the name, which may itself hold blanks and parentheses.
fn stat_fields(pid: i32) -> Option<Vec<String>> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(stat.rsplit_once(')')?.1.split_whitespace().map(str::to_owned).collect())
}

/// All pids.
pub fn pids() -> Vec<i32> {
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect()
}

/// Ends the processes that a testbed recorded in the file `processes`, last one first, if they are still the same.
pub fn end_recorded(processes: &Path) {
    let list = fs::read_to_string(processes).unwrap_or_default();
    let recorded = list.lines().rev().filter_map(|line| {
        let mut fields = line.split(' ');
        Some((fields.next()?.parse::<i32>().ok()?, fields.next()?.parse::<u64>().ok()?))
    });
    for (pid, start) in recorded {
        let alive = || start_time(pid) == Some(start);
        if alive() {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            // A zombie keeps its pid until its parent looks; that is not ours to wait for.
            let state = || stat_fields(pid).and_then(|fields| fields.first().cloned());
            let _ =
                wait::until("end", wait::DEADLINE / 4, || (!alive() || state().as_deref() == Some("Z")).then_some(()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn captures_output_and_code() {
        let output = run(&mut shell("echo out; echo err >&2; exit 7"), wait::DEADLINE).unwrap();
        assert_eq!((output.stdout.as_str(), output.stderr.as_str(), output.code()), ("out\n", "err\n", 7));
        assert!(output.success().unwrap_err().to_string().contains("err"));
        assert_eq!(run(&mut shell("kill -9 $$"), wait::DEADLINE).unwrap().code(), 137);
    }

    #[test]
    fn a_deadline_kills_the_group() {
        let running = Running::start(&mut shell("sleep 1000 & echo $!; wait")).unwrap();
        let error = running.wait(Duration::from_millis(300)).unwrap_err().to_string();
        let pid: i32 = error.lines().nth(1).unwrap().parse().unwrap();
        wait::until("the sleeper's end", wait::DEADLINE, || {
            stat_fields(pid).is_none_or(|fields| fields[0] == "Z").then_some(())
        })
        .unwrap();
    }

    #[test]
    fn recorded_processes_are_ended_only_if_they_are_the_same() {
        let directory = std::env::temp_dir().join(format!("testbed-process-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let (log, list) = (directory.join("log"), directory.join("processes"));
        let mut daemon = Daemon::start("sleeper", Command::new("sleep").arg("1000"), &log, &list).unwrap();
        let same = fs::read_to_string(&list).unwrap();
        fs::write(&list, format!("{} 1 another\n", daemon.pid())).unwrap();
        end_recorded(&list);
        daemon.check().unwrap();
        fs::write(&list, same).unwrap();
        end_recorded(&list);
        wait::until("the end", wait::DEADLINE, || daemon.check().err()).unwrap();
        fs::remove_dir_all(directory).unwrap();
    }
}
