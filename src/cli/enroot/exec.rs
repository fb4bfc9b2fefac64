//! `enroot exec`: a command in a container that runs.

use std::convert::Infallible;
use std::ffi::{CString, OsStr, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};
use rustix::thread::ThreadNameSpaceType;

use super::{Context, Error, say};
use crate::cli::supervise::in_child;
use crate::namespaces::running::enter_all;
use crate::request::Environment;
use crate::sys;
use crate::task::fake_ownership;

/// Execute a command inside a container that runs.
#[derive(Debug, clap::Args)]
pub struct ExecArgs {
    /// Set a variable, or pass it on
    #[arg(short, long, value_name = "KEY[=VAL]")]
    env: Vec<String>,
    /// Process id of a process in the container
    pid: String,
    /// What to run
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the command; its exit code is ours.
pub fn run(args: &ExecArgs, context: &Context) -> Result<ExitCode, Error> {
    let not_found = || -> Error { format!("Process not found: {}", args.pid).into() };
    let pid = args.pid.parse().ok().filter(|&pid: &i32| pid > 0).and_then(Pid::from_raw).ok_or_else(not_found)?;
    let number = pid.as_raw_nonzero().get();
    let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
        Err(Errno::SRCH | Errno::INVAL) => return Err(not_found()),
        other => other?,
    };
    let process = Path::new("/proc").join(number.to_string());
    let namespace = |of: &Path, kind: &str| std::fs::metadata(of.join("ns").join(kind)).map(|metadata| metadata.ino());
    let own = Path::new("/proc/self");
    let denied = |error| format!("cannot enter the container of process {number}: {}", sys::reason(error));
    if namespace(&process, "mnt").map_err(denied)? == namespace(own, "mnt")? {
        return Err(format!("Process not found: {number} (it is in no container)").into());
    }
    let has_pids = namespace(&process, "pid").map_err(denied)? != namespace(own, "pid")?;
    let mut environment = Environment::from_block(&std::fs::read(process.join("environ")).map_err(denied)?);
    apply(&mut environment, &args.env, &context.environment);
    let cwd = rustix::fs::open(process.join("cwd"), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| denied(errno.into()))?;

    let enter = || -> Result<ExitCode, Error> {
        enter_all(number, pidfd.as_fd()).map_err(denied)?;
        if has_pids {
            rustix::thread::move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::PROCESS_ID)
                .map_err(|errno| denied(errno.into()))?;
        }
        rustix::process::fchdir(&cwd).map_err(|errno| denied(errno.into()))?;
        let program = || -> Result<Infallible, Error> {
            fake_ownership().load().map_err(denied)?;
            Err(execute(args.command.first().map(OsString::as_os_str), &args.command, &environment))
        };
        match has_pids {
            // Only children are in another PID namespace.
            true => Ok(ExitCode::from(in_child(program, say::error)?)),
            false => match program()? {},
        }
    };
    enter()
}

/// Sets what `-e` asks for.
pub fn apply(environment: &mut Environment, asked: &[String], host: &Environment) {
    for item in asked {
        match item.split_once('=') {
            Some((name, value)) => environment.set(name, value),
            None => {
                if let Some(value) = host.get(item) {
                    environment.set(item.as_str(), value);
                }
            }
        }
    }
}

/// Becomes `program` with these words, its name first. Returns only if that fails.
pub fn execute(program: Option<&OsStr>, words: &[OsString], environment: &Environment) -> Error {
    let text = |text: &OsStr| CString::new(text.as_bytes());
    let attempt = || -> Result<Errno, Error> {
        let arguments = words.iter().map(|word| text(word)).collect::<Result<Vec<_>, _>>()?;
        let variables = environment.iter().map(|(name, value)| CString::new([name, b"=", value].concat()));
        let variables = variables.collect::<Result<Vec<_>, _>>()?;
        let program = text(program.ok_or("no command")?)?;
        let errno = sys::exec::execute(&program, &arguments, &variables, environment.get("PATH"));
        Ok(Errno::from_raw_os_error(errno as i32))
    };
    let name = program.map_or_else(String::new, |program| program.to_string_lossy().into_owned());
    match attempt() {
        Ok(Errno::NOENT) => format!("Command not found: {name}").into(),
        Ok(errno) => format!("{name}: {}", sys::reason(errno)).into(),
        Err(error) => error,
    }
}
