//! The saver: the process that Slurm has started for a task of a step with `--container-save` (see `task::saving`).
//!
//! It waits for the task, its child. If that was the last one on the node, it exports the container, whose init is still
//! there, and then ends as the task did: with 1 if there is no image although the task succeeded. It is the job's user
//! all the time. The target is opened where the job runs, with no privilege; then it enters the container.
//!
//! Signals are for the task. Once that has ended, SIGINT and the like end the export, and SIGTERM does unless the task has
//! ended by a signal, too: a step that is being terminated has Slurm's `KillWait` for its image.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::ExportError;
use super::target::Target;
use crate::config::Config;
use crate::container::FullName;
use crate::enroot::conf::{EnrootConf, Identity, of_job};
use crate::namespaces::running::enter_root;
use crate::request::{Environment, PROTOCOL_VERSION, User};
use crate::rootfs::identity::HostUser;
use crate::squashfs::writer::{DEFAULT_OPTIONS, Options};
use crate::sys::process::{block_all_signals, close_from, end_like, exit_now, take_inherited, wait_for_signal};
use crate::sys::{self, memfile};
use crate::task::protocol::MAX_MEMORY_FILE;
use crate::task::saving::{SaveRequest, TaskCount, descriptors};

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
enum SaveError {
    /// pyxis's words.
    #[error("container export: relative path used, but job's cwd is unset")]
    NoWorkingDirectory,
    /// The plugin and the executable do not understand each other.
    #[error("the plugin and the executable are of different versions: install the same version of both")]
    Versions,
    /// Init is gone, or the kernel refuses.
    #[error("cannot {what} the container: {}", sys::reason(.cause))]
    Container { what: &'static str, cause: io::Error },
    /// Options of mksquashfs, a file of enroot's settings.
    #[error("{0}")]
    Settings(String),
    /// The image or its file.
    #[error(transparent)]
    Export(ExportError),
}

impl<E: Into<ExportError>> From<E> for SaveError {
    fn from(error: E) -> Self {
        Self::Export(error.into())
    }
}

fn container<E: Into<io::Error>>(what: &'static str) -> impl Fn(E) -> SaveError {
    move |error| SaveError::Container { what, cause: error.into() }
}

/// The process. Its arguments are the path of the configuration file and the process id of the task.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    block_all_signals();
    let config = arguments.next().map(PathBuf::from);
    let task = arguments.next().and_then(|pid| pid.to_str()?.parse().ok()).and_then(Pid::from_raw);
    let inherited = || {
        close_from(descriptors::END).ok()?;
        let [request, environment, count] = [descriptors::REQUEST, descriptors::ENVIRONMENT, descriptors::COUNT]
            .map(|number| take_inherited(number).map(File::from));
        Some((request?, environment?, count?))
    };
    let (Some(config), Some(task), Some((request, environment, count))) = (config, task, inherited()) else {
        eprintln!("pyxis: the saver is started by the plugin, not by hand");
        return ExitCode::from(2);
    };
    let _ = rustix::thread::set_name(c"pyxis-saver");
    // Pipes that the task has closed are closed; what is left to say goes to its standard error.
    let _ = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .and_then(|null| rustix::stdio::dup2_stdin(&null).and_then(|()| rustix::stdio::dup2_stdout(&null)));

    let prepared = memfile::read_all(request, MAX_MEMORY_FILE)
        .ok()
        .and_then(|bytes| serde_json::from_slice::<SaveRequest>(&bytes).ok())
        .filter(|request| request.protocol == PROTOCOL_VERSION);
    let status = wait_for_task(task, prepared.as_ref().is_some_and(|request| request.forward_signals));
    let Some(request) = prepared else {
        eprintln!("pyxis: {}", SaveError::Versions);
        end(status, false)
    };
    let last = TaskCount::inherited(&count).and_then(|count| count.ended(request.local_tasks));
    let saved = match last {
        Ok(false) => true,
        Ok(true) => {
            let environment = memfile::read_all(environment, MAX_MEMORY_FILE)
                .map(|block| Environment::from_block(&block))
                .unwrap_or_default();
            save(&request, &environment, &config, status)
        }
        Err(error) => {
            eprintln!("pyxis: couldn't count the step's tasks: {}", sys::reason(error));
            false
        }
    };
    end(status, saved)
}

/// Ends as the task did, unless it succeeded and its container was to be saved and is not.
fn end(status: WaitStatus, saved: bool) -> ! {
    if status.exit_status() == Some(0) && !saved {
        exit_now(1);
    }
    end_like(status)
}

/// Waits for the task. Signals that come on the way have reached it as well, unless they are to be forwarded.
fn wait_for_task(task: Pid, forward_signals: bool) -> WaitStatus {
    loop {
        match rustix::process::waitpid(Some(task), WaitOptions::NOHANG) {
            Ok(Some((_, status))) => return status,
            Ok(None) | Err(Errno::INTR) => {}
            // Nobody else waits for it.
            Err(_) => exit_now(1),
        }
        match wait_for_signal() {
            Ok(signal) if forward_signals && signal != Signal::CHILD => {
                let _ = rustix::process::kill_process(task, signal);
            }
            _ => {}
        }
    }
}

/// Saves the container and says how that went.
fn save(request: &SaveRequest, environment: &Environment, config: &Path, status: WaitStatus) -> bool {
    let path = target_path(request, environment);
    let shown = path.as_deref().unwrap_or(Path::new(&request.target)).display().to_string();
    let terminating = status.terminating_signal().is_some();
    match path.and_then(|path| export(request, environment, config, &path, &shown, terminating)) {
        Ok(()) => {
            eprintln!("pyxis: exported container {} to {shown}", request.container);
            true
        }
        Err(error) => {
            report_failure(&request.container, &shown, &error);
            false
        }
    }
}

fn report_failure(container: &str, target: &str, reason: &dyn std::fmt::Display) {
    eprintln!("pyxis: {reason}\npyxis: failed to export container {container} to {target}");
}

fn target_path(request: &SaveRequest, environment: &Environment) -> Result<PathBuf, SaveError> {
    let target = Path::new(&request.target);
    if target.is_absolute() {
        return Ok(target.to_owned());
    }
    match environment.get("PWD") {
        Some(directory) if !directory.is_empty() => Ok(Path::new(OsStr::from_bytes(directory)).join(target)),
        _ => Err(SaveError::NoWorkingDirectory),
    }
}

fn export(
    request: &SaveRequest,
    environment: &Environment,
    config: &Path,
    path: &Path,
    shown: &str,
    terminating: bool,
) -> Result<(), SaveError> {
    // A leading task's saver has privileges in the container's user namespace already. They are not for the user's files.
    let privileges = rustix::thread::capabilities(None).map_err(container("enter"))?;
    set_effective(privileges, CapabilitySet::empty()).map_err(container("enter"))?;
    // What else there is in it is not needed here, and a broken one has been complained about.
    let config = Config::load(config).unwrap_or_default();
    let options = options(environment, &config)?;
    // A container that this step has joined may have been made without them.
    let uid = rustix::process::getuid().as_raw();
    let name = FullName::parse(&request.container);
    let start_files = name.map(|name| super::start_files(&config.runtime.path, uid, &name)).unwrap_or_default();
    let file = Target::open(path)?.create()?;
    set_effective(privileges, privileges.permitted).map_err(container("enter"))?;
    let root = enter_root(request.init).map_err(container("enter"))?;
    let remove = file.remover();
    let (name, target) = (request.container.clone(), shown.to_owned());
    let watch = move || {
        let signal = loop {
            match wait_for_signal() {
                Ok(signal @ (Signal::INT | Signal::HUP | Signal::QUIT)) => break signal,
                Ok(Signal::TERM) if !terminating => break Signal::TERM,
                _ => {}
            }
        };
        remove();
        report_failure(&name, &target, &"cancelled");
        exit_now(128 + signal.as_raw())
    };
    std::thread::Builder::new().spawn(watch).map_err(container("save"))?;
    super::write(root.as_fd(), &file, &options, &start_files)?;
    // What the target's directory allows is again for the user alone to use.
    let privileges = rustix::thread::capabilities(None).map_err(container("leave"))?;
    set_effective(privileges, CapabilitySet::empty()).map_err(container("leave"))?;
    Ok(file.publish()?)
}

/// For the calling thread.
fn set_effective(sets: CapabilitySets, effective: CapabilitySet) -> Result<(), Errno> {
    rustix::thread::set_capabilities(None, CapabilitySets { effective, ..sets })
}

/// `ENROOT_SQUASH_OPTIONS` of the environment or of enroot's settings, else enroot's default.
fn options(environment: &Environment, config: &Config) -> Result<Options, SaveError> {
    let user =
        User { uid: rustix::process::getuid().as_raw(), gid: rustix::process::getgid().as_raw(), groups: Vec::new() };
    let host = HostUser::look_up(&user, environment);
    let identity = Identity {
        uid: user.uid,
        gid: user.gid,
        name: host.name,
        group: host.group,
        home: host.home,
        cwd: std::env::current_dir().unwrap_or_else(|_| "/".into()),
    };
    let settings = EnrootConf::load(&config.enroot.sysconf_path, &of_job(environment), &identity)
        .map_err(|error| SaveError::Settings(error.to_string()))?;
    let words = settings.squash_options().map(|words| words.join(" "));
    let (mut options, unknown) = Options::parse(words.as_deref().unwrap_or(DEFAULT_OPTIONS))
        .map_err(|error| SaveError::Settings(error.to_string()))?;
    if !unknown.is_empty() {
        eprintln!("pyxis: ENROOT_SQUASH_OPTIONS: ignored: {}", unknown.join(" "));
    }
    if let Some(most) = settings.number("ENROOT_MAX_PROCESSORS").and_then(|most| usize::try_from(most).ok()) {
        options.threads = options.threads.min(most.max(1));
    }
    Ok(options.with_source_date_epoch(environment.get_str("SOURCE_DATE_EPOCH")))
}
