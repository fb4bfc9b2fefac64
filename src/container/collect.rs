//! Removing containers as root: those that are not whole, and those of a job that is over. What belongs to a user is
//! deleted by a process that has become the user.

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;

use super::FullName;
use super::kept::{Containers, KeptError, Lock, UserContainers};
use super::running::Running;
use crate::config::Config;
use crate::sys::process::run_as;

/// What [`collect`] did.
#[derive(Debug, Default)]
pub struct Collected {
    /// Containers that were not whole, and what was left of removed ones.
    pub leftovers: usize,
    /// One line for each thing that went wrong.
    pub problems: Vec<String>,
}

/// Removes what no container needs below `path` and `runtime`: what half-made containers and killed processes have left.
/// Single-threaded. With `dry_run` only counts.
pub fn collect(path: &Path, runtime: &Path, dry_run: bool) -> Collected {
    let mut collected = Collected::default();
    if !dry_run {
        for uid in Running::users(runtime) {
            if let Ok(Some(running)) = Running::open(runtime, uid) {
                collected.leftovers += running.sweep();
            }
        }
    }
    let containers = match Containers::open(path) {
        Ok(Some(containers)) => containers,
        Ok(None) => return collected,
        Err(error) => {
            collected.problems.push(error.to_string());
            return collected;
        }
    };
    let users = containers.users().unwrap_or_else(|error| {
        collected.problems.push(error.to_string());
        Vec::new()
    });
    for uid in users {
        let of_user = || -> Result<usize, KeptError> {
            let Some(user) = containers.user(uid)? else { return Ok(0) };
            let mut found = usize::from(user.has_removed());
            for name in user.all_names()? {
                found += usize::from(remove_unless_whole(&user, &name, runtime, uid, dry_run)?);
            }
            if !dry_run {
                delete_removed(&user)?;
            }
            Ok(found)
        };
        match of_user() {
            Ok(found) => collected.leftovers += found,
            Err(error) => collected.problems.push(error.to_string()),
        }
    }
    collected
}

fn remove_unless_whole(
    user: &UserContainers,
    name: &FullName,
    runtime: &Path,
    uid: u32,
    dry_run: bool,
) -> Result<bool, KeptError> {
    // Somebody who has it locked is making it.
    let Lock::Taken(kept) = user.try_lock(name)? else { return Ok(false) };
    if kept.record()?.is_some() || is_running(runtime, uid, name) {
        return Ok(false);
    }
    if !dry_run {
        user.remove(name)?;
    }
    Ok(true)
}

fn is_running(runtime: &Path, uid: u32, name: &FullName) -> bool {
    // What cannot be seen is taken for running.
    match Running::open(runtime, uid) {
        Ok(Some(running)) => running.instances(name).map_or(true, |instances| !instances.is_empty()),
        Ok(None) => false,
        Err(_) => true,
    }
}

/// The process that the epilog starts, with the path of the configuration, the job's user and its id as arguments.
pub fn epilog_role(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.collect();
    let number = |index: usize| arguments.get(index)?.to_str()?.parse().ok();
    let (Some(config), Some(uid), Some(job)) = (arguments.first(), number(1), number(2)) else {
        eprintln!("pyxis: the epilog role is started by the plugin, not by hand");
        return ExitCode::from(2);
    };
    let removed = Config::load(Path::new(config)).map_err(|error| error.to_string()).and_then(|config| {
        remove_job(&config.container.path, &config.runtime.path, uid, job).map_err(|error| error.to_string())
    });
    match removed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pyxis: epilog: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Removes the containers of `job`, which is over, and which belonged to user `uid`. Single-threaded.
pub fn remove_job(path: &Path, runtime: &Path, uid: u32, job: u32) -> Result<(), KeptError> {
    if let Ok(Some(running)) = Running::open(runtime, uid) {
        running.sweep();
    }
    let Some(containers) = Containers::open(path)? else { return Ok(()) };
    let Some(user) = containers.user(uid)? else { return Ok(()) };
    for name in user.all_names()?.iter().filter(|name| name.is_of_job(job)) {
        user.remove(name)?;
    }
    delete_removed(&user)
}

/// Deletes what has been removed: as the owner, and then what overlayfs may have left that is root's.
pub fn delete_removed(user: &UserContainers) -> Result<(), KeptError> {
    if !user.has_removed() {
        return Ok(());
    }
    let owner = user.owner()?;
    // SAFETY: brokers, collectors and epilogs have one thread.
    let _ = unsafe { run_as(&owner, || user.delete_removed().is_ok()) };
    user.delete_removed()
}
