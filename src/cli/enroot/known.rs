//! The containers that a user has on this node: his unpacked root filesystems, what steps keep for him under a name, and
//! what runs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use super::processes::{self, Process};
use super::{Context, Error};
use crate::container::FullName;
use crate::container::kept::{Lock, UserContainers};
use crate::container::running::Running;
use crate::unpacked::Containers;

/// What a container is called that nobody has given a name.
const UNKNOWN: &str = "<unknown>";

/// A user's containers.
#[derive(Debug)]
pub struct Known {
    unpacked: Containers,
    kept: Option<UserContainers>,
    kept_path: PathBuf,
    running: Option<Running>,
    uid: u32,
}

/// A container, and what runs in it: the oldest process of each of its mount namespaces.
#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    pub name: OsString,
    pub processes: Vec<Process>,
}

impl Known {
    /// The containers of who runs the command. What the node keeps for steps is left out where it cannot be seen.
    pub fn new(context: &Context) -> Self {
        let uid = context.identity.uid;
        let kept_path = context.config.container.path.clone();
        Self {
            unpacked: Containers::new(context.settings.data_path()),
            kept: UserContainers::open_own(&kept_path, uid).ok().flatten(),
            kept_path,
            running: Running::open(&context.config.runtime.path, uid).ok().flatten(),
            uid,
        }
    }

    /// All names, sorted.
    pub fn names(&self) -> Result<Vec<OsString>, Error> {
        let mut names: BTreeSet<OsString> = self.unpacked.names()?.into_iter().collect();
        if let Some(kept) = &self.kept {
            names.extend(kept.names()?.into_iter().map(|name| name.as_str().into()));
        }
        Ok(names.into_iter().collect())
    }

    /// All containers, and those that run without being kept, sorted by name.
    pub fn list(&self) -> Result<Vec<Listed>, Error> {
        let mut containers: BTreeMap<OsString, Vec<Process>> =
            self.names()?.into_iter().map(|name| (name, Vec::new())).collect();
        let of_steps = self.registered()?;
        let roots: BTreeMap<(u64, u64), OsString> = self
            .unpacked
            .names()?
            .into_iter()
            .filter_map(|name| {
                let metadata = self.unpacked.find(&name).ok()?.metadata().ok()?;
                Some(((metadata.dev(), metadata.ino()), name))
            })
            .collect();
        for processes in processes::in_containers(self.uid)?.into_values() {
            let registered = processes.iter().find_map(|process| Some((process.pid, of_steps.get(&process.pid)?)));
            // Container init only holds the namespaces.
            let init = registered.map(|(pid, _)| pid);
            let found = processes.iter().find(|process| Some(process.pid) != init).or(processes.first());
            let Some(process) = found else { continue };
            let name = match (registered, roots.get(&process.root)) {
                (Some((_, name)), _) => name.as_str().into(),
                (None, Some(name)) => name.clone(),
                (None, None) if process.is_marked => UNKNOWN.into(),
                (None, None) => continue,
            };
            containers.entry(name).or_default().push(process.clone());
        }
        Ok(containers.into_iter().map(|(name, processes)| Listed { name, processes }).collect())
    }

    /// The containers of steps that run, by the process id of their init.
    fn registered(&self) -> Result<BTreeMap<i32, FullName>, Error> {
        let mut found = BTreeMap::new();
        if let Some(running) = &self.running {
            for name in running.names()? {
                found.extend(running.instances(&name)?.iter().map(|instance| (instance.pid(), name.clone())));
            }
        }
        Ok(found)
    }

    /// The container of a step that runs as `name`: process id of its init.
    pub fn running(&self, name: &OsStr) -> Result<Option<(FullName, i32)>, Error> {
        let (Some(running), Some(name)) = (&self.running, name.to_str().and_then(FullName::parse)) else {
            return Ok(None);
        };
        let instance = running.instances(&name)?.into_iter().find(|instance| instance.is_ready());
        Ok(instance.map(|instance| (name, instance.pid())))
    }

    /// Where the container `name` is.
    pub fn find(&self, name: &OsStr) -> Result<PathBuf, Error> {
        match (self.unpacked.find(name), self.kept(name)) {
            (Err(_), Some(kept)) => Ok(self.kept_path.join(self.uid.to_string()).join(kept.as_str())),
            (found, _) => Ok(found?),
        }
    }

    /// Where the unpacked root filesystem `name` is. `option` is what a step is given that does the same with a container
    /// that is kept for steps: only root can mount those.
    pub fn find_unpacked(&self, name: &OsStr, option: &str) -> Result<PathBuf, Error> {
        match (self.unpacked.find(name), self.kept(name)) {
            (Err(_), Some(kept)) => {
                let given = kept.as_str().split_once('_').map_or(kept.as_str(), |(_, given)| given);
                let text = format!("{kept} is kept for steps of Slurm: use srun --container-name={given} {option}");
                Err(text.trim_end().into())
            }
            (found, _) => Ok(found?),
        }
    }

    /// The container `name` that is kept for steps.
    pub fn kept(&self, name: &OsStr) -> Option<FullName> {
        let name = FullName::parse(name.to_str()?)?;
        self.kept.as_ref()?.names().ok()?.contains(&name).then_some(name)
    }

    /// Removes the container `name`.
    pub fn remove(&self, name: &OsStr) -> Result<(), Error> {
        let kept = match (self.unpacked.find(name), self.kept(name)) {
            (Err(_), Some(kept)) => kept,
            _ => return Ok(self.unpacked.remove(name)?),
        };
        let Some(containers) = &self.kept else { return Ok(()) };
        let in_use = || format!("{kept} is in use by a step");
        let runs = self.running.as_ref().map(|running| running.instances(&kept)).transpose()?;
        if runs.is_some_and(|instances| !instances.is_empty()) {
            return Err(in_use().into());
        }
        match containers.try_lock(&kept)? {
            Lock::Absent => Ok(()),
            Lock::Busy => Err(in_use().into()),
            Lock::Taken(lock) => {
                containers.remove(&kept)?;
                drop(lock);
                // What overlayfs has left there is root's, and goes with the next step or `pyxis gc`.
                let _ = containers.delete_removed();
                Ok(())
            }
        }
    }
}
