//! Where the nodes of a step agree on what a tag means ([`crate::agreement`]), beside `srun`: `pyxis-meaning` becomes this where
//! it has found out nothing.

use std::ffi::{CString, OsStr, OsString};
use std::io::{self, Read, Write};
use std::net::TcpListener;
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};
use rustix::process::{DumpableBehavior, PidfdFlags, Resource, Rlimit};

use super::run::join;
use crate::agreement::host;
use crate::devices::slurm_config;
use crate::request::{Environment, Place};
use crate::sys::process::{Forked, close_from, exec, exit_now, fork};

/// Where slurmd and sackd keep a configuration that comes from the controller.
const FETCHED_CONFIG: &str = "/run/slurm/conf/slurm.conf";

/// Makes this process, whatever its threads are doing, one that has just started in this role. Returns if that fails.
pub fn become_one(nodes: &OsStr) -> ExitCode {
    let variables = std::env::vars_os().filter_map(|(name, value)| CString::new(join(name, value)).ok());
    let variables: Vec<CString> = variables.collect();
    let _ = exec(Path::new("/proc/self/exe"), &[super::RENDEZVOUS.as_bytes(), nodes.as_bytes()], &variables);
    // Each node asks for itself.
    ExitCode::FAILURE
}

/// The role: the number of the step's nodes (0: that is not known) is its argument, the [`Place`] its output. A child stays, until all
/// nodes have been answered or the caller has ended.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let nodes = arguments.next().and_then(|number| number.to_str()?.parse().ok()).unwrap_or(0);
    match open(nodes) {
        Ok(place) => {
            // Nobody is there to be told that nobody listens.
            let _ = writeln!(io::stdout(), "{place}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("pyxis: {}", crate::sys::reason(error));
            ExitCode::FAILURE
        }
    }
}

fn open(nodes: usize) -> io::Result<Place> {
    close_from(3)?;
    let parent = rustix::process::getppid().ok_or(io::ErrorKind::NotFound)?;
    let srun = rustix::process::pidfd_open(parent, PidfdFlags::empty())?;
    if rustix::process::getppid() != Some(parent) {
        return Err(io::ErrorKind::NotFound.into());
    }
    let (listener, place) = host::listen(port_range())?;
    let (mut ready, child_end) = io::pipe()?;
    // SAFETY: this process has just been executed and has started no thread.
    match unsafe { fork(0) }? {
        Forked::Child => {
            drop(ready);
            if detach().is_ok() {
                drop(child_end);
                let _ = stay(&listener, &place, &srun, nodes);
            }
            exit_now(0)
        }
        Forked::Parent(_) => {
            drop(child_end);
            // Before that it would end with this process.
            ready.read_to_end(&mut Vec::new())?;
            Ok(place)
        }
    }
}

/// Out of reach of the caller's terminal, and of who ends the caller's process group.
fn detach() -> io::Result<()> {
    rustix::process::setsid()?;
    rustix::process::chdir("/")?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

fn stay(listener: &TcpListener, place: &Place, srun: &OwnedFd, nodes: usize) -> io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    host::serve(listener, &place.key, srun.as_fd(), nodes)
}

/// The ports that a site has left open for `srun`.
fn port_range() -> Option<RangeInclusive<u16>> {
    let environment: Environment = std::env::vars_os().map(|(name, value)| join(name, value)).collect();
    let usual = slurm_config::path(&environment).to_owned();
    [usual, PathBuf::from(FETCHED_CONFIG)].into_iter().find_map(|path| {
        let mut text = String::new();
        std::fs::File::open(path).ok()?.take(slurm_config::MAX_FILE).read_to_string(&mut text).ok()?;
        host::port_range(slurm_config::value(&text, "SrunPortRange")?)
    })
}
