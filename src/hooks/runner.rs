//! Runs hooks: as children of a process in a PID namespace of its own, so that nothing a hook starts outlives it, and
//! whoever dies on the way takes all of them with him.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::AsFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::fs::MemfdFlags;
use rustix::process::{Signal, WaitOptions};
use rustix::thread::CapabilitySets;
use serde::{Deserialize, Serialize};

use crate::enroot::os;
use crate::request::Environment;
use crate::sys;
use crate::sys::command::{Stream, capture_fed};
use crate::sys::memfile;
use crate::sys::process::{Forked, close_all_but, exit_now, fork};

/// Most bytes of a hook's standard error that are kept.
const MAX_LOG: usize = 16 << 10;
/// Most lines of it that are shown.
const MAX_LINES: usize = 50;
/// Most bytes of what the runner reports.
const MAX_REPORT: u64 = 64 << 20;

/// A hook that failed, and what it said.
#[derive(Debug, thiserror::Error)]
#[error("{reason}")]
pub struct HookError {
    /// The last lines of its standard error.
    pub log: Vec<String>,
    /// enroot's words.
    pub reason: String,
}

impl From<io::Error> for HookError {
    fn from(error: io::Error) -> Self {
        Self { log: Vec::new(), reason: format!("hooks: {}", sys::reason(error)) }
    }
}

/// One hook.
#[derive(Debug)]
pub struct Call<'a> {
    /// The program: absolute.
    pub program: PathBuf,
    /// With `argv[0]`; if empty, the program alone.
    pub arguments: Vec<String>,
    /// Its whole environment.
    pub environment: Cow<'a, Environment>,
    /// On its standard input.
    pub input: Vec<u8>,
    /// How long it may take.
    pub time: Duration,
    /// What says so.
    pub limit: &'static str,
    /// What it is called in messages.
    pub name: String,
}

/// What one hook did.
#[derive(Debug, Serialize, Deserialize)]
struct Report {
    /// Wait status; `None` if it took too long, or never ran.
    status: Option<i32>,
    /// Why it could not be run.
    error: Option<String>,
    log: String,
}

/// Makes `calls` in order and in `cwd`, until one fails. The caller is alone in its process and holds the capabilities of the
/// container's user namespace, which the hooks get as well. Gives what the hooks wrote to standard error.
pub fn run(calls: &[Call<'_>], cwd: &Path) -> Result<Vec<String>, HookError> {
    let (wait, release) = io::pipe()?;
    let file = rustix::fs::memfd_create("pyxis-hooks", MemfdFlags::CLOEXEC).map_err(io::Error::from)?;
    let mut file = File::from(file);
    // SAFETY: the caller has one thread.
    let forked = match unsafe { fork(libc::CLONE_NEWPID) } {
        // The host lets nobody have one: what a hook leaves in the background lives as long as the step then.
        // SAFETY: as above.
        Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => unsafe { fork(0) },
        other => other,
    };
    let runner = match forked? {
        Forked::Child => {
            drop(release);
            let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            let kept =
                [wait.as_fd(), file.as_fd(), rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()];
            let prepared = close_all_but(&kept).and_then(|()| keep_capabilities());
            // Nothing is read if the parent has died meanwhile.
            if prepared.is_err() || (&wait).read(&mut [0]).unwrap_or(0) != 1 {
                exit_now(1);
            }
            let done = run_all(calls, cwd, &mut file);
            exit_now(i32::from(done.is_err()))
        }
        Forked::Parent(runner) => runner,
    };
    drop(wait);
    let released = (&release).write_all(b".");
    drop(release);
    let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(runner), WaitOptions::empty()));
    released?;
    let succeeded = matches!(status, Ok(Some((_, status))) if status.exit_status() == Some(0));
    evaluate(calls, file, succeeded)
}

/// Hooks are programs of an ordinary user: only ambient capabilities survive their execution.
fn keep_capabilities() -> io::Result<()> {
    let all = rustix::thread::capabilities(None)?.permitted;
    rustix::thread::set_capabilities(None, CapabilitySets { effective: all, permitted: all, inheritable: all })?;
    for capability in all.iter() {
        rustix::thread::configure_capability_in_ambient_set(capability, true)?;
    }
    // Changing owners succeeds and does nothing, as for tasks.
    crate::task::fake_ownership().load()
}

fn run_all(calls: &[Call<'_>], cwd: &Path, file: &mut File) -> io::Result<()> {
    for call in calls {
        let report = run_one(call, cwd);
        end_everything()?;
        let mut line = serde_json::to_vec(&report)?;
        line.push(b'\n');
        file.write_all(&line)?;
        if report.status != Some(0) {
            break;
        }
    }
    Ok(())
}

fn run_one(call: &Call<'_>, cwd: &Path) -> Report {
    let arguments = call.arguments.get(1..).unwrap_or_default();
    let run = |mut command: Command| {
        let input = match call.input.as_slice() {
            [] => Stdio::null(),
            input => Stdio::from(memfile::sealed("pyxis-hook-input", input)?),
        };
        command
            .args(arguments)
            .env_clear()
            .envs(call.environment.iter().map(|(name, value)| (os(name), os(value))))
            .current_dir(if cwd.is_dir() { cwd } else { Path::new("/") });
        capture_fed(&mut command, input, Stream::Error, MAX_LOG, call.time)
    };
    let mut command = Command::new(&call.program);
    if let Some(name) = call.arguments.first() {
        command.arg0(name);
    }
    let captured = match run(command) {
        // Without "#!" it is a script for the shell, as shells have it.
        Err(error) if error.raw_os_error() == Some(libc::ENOEXEC) => {
            let mut shell = Command::new("/bin/sh");
            shell.arg(&call.program);
            run(shell)
        }
        other => other,
    };
    match captured {
        Ok(captured) => Report {
            status: captured.status.map(ExitStatusExt::into_raw),
            error: None,
            log: String::from_utf8_lossy(&captured.text).into_owned(),
        },
        Err(error) => Report { status: None, error: Some(sys::reason(error)), log: String::new() },
    }
}

/// Ends every other process of the PID namespace.
fn end_everything() -> io::Result<()> {
    // Outside a namespace of one's own this would be every process of the user.
    if rustix::process::getpid().as_raw_nonzero().get() != 1 {
        return Ok(());
    }
    loop {
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(-1), nix::sys::signal::Signal::SIGKILL);
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::CHILD) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn evaluate(calls: &[Call<'_>], mut file: File, succeeded: bool) -> Result<Vec<String>, HookError> {
    file.rewind()?;
    let mut text = String::new();
    file.take(MAX_REPORT).read_to_string(&mut text)?;
    let mut all = Vec::new();
    let mut reports = text.lines();
    for call in calls {
        let report: Report = match reports.next().map(serde_json::from_str) {
            Some(Ok(report)) => report,
            _ => return Err(io::Error::other("the process that runs them has ended").into()),
        };
        let program = &call.name;
        let log = shown(&report.log);
        let reason = match (report.error, report.status.map(ExitStatus::from_raw)) {
            (None, Some(status)) if status.success() => {
                all.extend(log.into_iter().map(|line| format!("{program}: {line}")));
                continue;
            }
            (None, Some(status)) => {
                let code = status.code().or_else(|| Some(128 + status.signal()?)).unwrap_or(1);
                format!("{program} exited with return code {code}")
            }
            (None, None) => {
                format!("{program} did not end within {} seconds ({}) and was killed", call.time.as_secs(), call.limit)
            }
            (Some(error), _) => format!("{program} cannot be executed: {error}"),
        };
        return Err(HookError { log, reason });
    }
    if succeeded { Ok(all) } else { Err(io::Error::other("the process that runs them has failed").into()) }
}

/// The last lines of a log, without what a terminal would act on.
fn shown(log: &str) -> Vec<String> {
    let lines: Vec<String> = log
        .lines()
        .map(|line| line.chars().filter(|character| !character.is_control() || *character == '\t').collect())
        .collect();
    lines.iter().skip(lines.len().saturating_sub(MAX_LINES)).cloned().collect()
}
