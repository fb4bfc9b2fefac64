//! Which container a step gets: what `--container-name` asks for, and what is there (behaviour reference, section 3.6).
//!
//! | asked for | absent | stopped | running |
//! |---|---|---|---|
//! | `auto` | create | reuse | attach |
//! | `create` | create | error | error |
//! | `exec` | error | error | attach |
//! | `no_exec` | create | reuse | share the root filesystem |
//!
//! A tree that enroot has made for the user is a container that is kept ([`tree`]), by itself: nothing here locks it.
//!
//! The lock on a container's directory decides between steps that come at once. Nobody holds it for longer than it takes
//! to register as running, except who creates the container: the others wait for that, as long as their step lives.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::import::{self, AcquiredImage};
use super::{BrokerError, failed, tree};
use crate::config::Config;
use crate::container::FullName;
use crate::container::collect::delete_removed;
use crate::container::kept::{Containers, KeptContainer, Lock};
use crate::container::record::{Lower, Record};
use crate::container::running::{Instance, Running};
use crate::policy::{Evidence, Source, Subject};
use crate::request::{Environment, ImageSource, NameMode, StepRequest};
use crate::store::now;

/// How long to wait before looking again, in nanoseconds: short, because another step's start is what is waited for.
const PAUSE: i64 = 5_000_000;

/// What a step gets.
#[derive(Debug)]
pub(super) enum Choice {
    /// A new container that is to be kept. Its directory is locked and empty.
    Create(KeptContainer),
    /// A container that is kept and does not run.
    Reuse(KeptContainer, Record),
    /// A tree of the user's, whether something runs in it or not.
    Tree(PathBuf),
    /// New namespaces around the root filesystem of a running container.
    Share(Joined),
    /// The namespaces of a running container.
    Attach(Joined),
}

/// A running container that a step joins.
#[derive(Debug)]
pub(super) struct Joined {
    /// Its init.
    pub instance: Instance,
    /// Init's process.
    pub pidfd: OwnedFd,
    /// What it was made from.
    pub record: Record,
    /// Its directory, locked, if it is one that is kept.
    pub kept: Option<KeptContainer>,
}

/// What ends the wait of a broker: the leading task and the step.
#[derive(Debug, Clone, Copy)]
pub(super) struct Patience<'a> {
    pub leader: BorrowedFd<'a>,
    pub life: BorrowedFd<'a>,
}

impl Patience<'_> {
    /// Waits a moment, or until `process` has ended; fails if the step is over.
    pub fn wait(&self, process: Option<BorrowedFd<'_>>) -> Result<(), BrokerError> {
        let mut watched = vec![
            PollFd::from_borrowed_fd(self.leader, PollFlags::RDHUP),
            PollFd::from_borrowed_fd(self.life, PollFlags::empty()),
        ];
        watched.extend(process.map(|process| PollFd::from_borrowed_fd(process, PollFlags::IN)));
        let pause = Timespec { tv_sec: 0, tv_nsec: PAUSE };
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, Some(&pause))).map_err(failed("poll"))?;
        match watched.iter().take(2).all(|descriptor| descriptor.revents().is_empty()) {
            true => Ok(()),
            false => Err(BrokerError::Cancelled),
        }
    }

    /// Whether `process` has ended, after a moment at most; fails if the step is over.
    pub fn has_ended(&self, process: &OwnedFd) -> Result<bool, BrokerError> {
        let ended = || {
            let mut watched = [PollFd::new(process, PollFlags::IN)];
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            rustix::event::poll(&mut watched, Some(&now)).map_err(failed("poll"))?;
            Ok(!watched[0].revents().is_empty())
        };
        if ended()? {
            return Ok(true);
        }
        self.wait(Some(process.as_fd()))?;
        ended()
    }
}

/// Chooses for the container `name`, which `request` wants to be kept in `mode`.
pub(super) fn choose(
    patience: Patience<'_>,
    config: &Config,
    request: &StepRequest,
    environment: &Environment,
    name: &FullName,
    mode: NameMode,
    running: &Running,
) -> Result<Choice, BrokerError> {
    loop {
        let own = match Containers::open(&config.container.path).map_err(refused)? {
            Some(containers) => containers.user(request.user.uid).map_err(refused)?,
            None => None,
        };
        let locked = match &own {
            Some(own) => own.try_lock(name).map_err(refused)?,
            None => Lock::Absent,
        };
        let kept = match locked {
            Lock::Taken(kept) => Some(kept),
            Lock::Absent => None,
            Lock::Busy => {
                patience.wait(None)?;
                continue;
            }
        };
        let instances = running.instances(name).map_err(failed("running containers"))?;
        let record = match &kept {
            Some(kept) => kept.record().map_err(refused)?,
            None => None,
        };
        let tree = match (&record, instances.is_empty(), mode) {
            (None, true, NameMode::Auto | NameMode::Create | NameMode::NoExec) => {
                tree::find(config, request, environment, name).map_err(failed("look for containers of enroot's"))?
            }
            _ => None,
        };
        if mode == NameMode::Create && (!instances.is_empty() || record.is_some() || tree.is_some()) {
            return Err(BrokerError::Refused(
                "error: \"create\" flag was passed to --container-name but the container already exists".into(),
            ));
        }
        if !instances.is_empty() {
            match joined(running, name, &instances)? {
                Some((instance, pidfd, record)) => {
                    tell_if_other_image(request, &record);
                    return Ok(match (mode, &record.lower) {
                        (NameMode::NoExec, Lower::Tree(path)) => Choice::Tree(path.clone()),
                        (NameMode::NoExec, Lower::Layers { .. }) => {
                            Choice::Share(Joined { instance, pidfd, record, kept })
                        }
                        _ => Choice::Attach(Joined { instance, pidfd, record, kept }),
                    });
                }
                // It starts, or has just ended.
                None => {
                    drop(kept);
                    patience.wait(None)?;
                    continue;
                }
            }
        }
        if mode == NameMode::Exec {
            return Err(BrokerError::Refused(
                "error: \"exec\" flag was passed to --container-name but the container is not running".into(),
            ));
        }
        if let Some(tree) = tree {
            return Ok(Choice::Tree(tree));
        }
        match (kept, record) {
            (Some(kept), Some(record)) => {
                tell_if_other_image(request, &record);
                return Ok(Choice::Reuse(kept, record));
            }
            _ if request.image.is_none() => {
                return Err(BrokerError::Refused(format!(
                    "error: a container with name \"{name}\" does not exist, and --container-image is not set"
                )));
            }
            (Some(kept), None) => {
                let own = own.ok_or_else(|| BrokerError::Start("internal error: no directory".into()))?;
                kept.make_layers(&own, &request.user).map_err(refused)?;
                // What is in the way is gone already; deleting it may be left to the collector.
                if let Err(error) = delete_removed(&own) {
                    tracing::warn!("{error}");
                }
                return Ok(Choice::Create(kept));
            }
            (None, _) => {
                let made = Containers::create(&config.container.path)
                    .and_then(|containers| containers.make_user(&request.user))
                    .map_err(refused)?;
                made.make(name, &request.user).map_err(refused)?;
            }
        }
    }
}

/// The oldest of `instances` that can be joined.
fn joined(
    running: &Running,
    name: &FullName,
    instances: &[Instance],
) -> Result<Option<(Instance, OwnedFd, Record)>, BrokerError> {
    for instance in instances.iter().filter(|instance| instance.is_ready()) {
        // A registration that cannot be read has been swept away.
        let Ok(record) = running.record(name, instance) else { continue };
        if let Some(pidfd) = running.pidfd(instance).map_err(failed("running container"))? {
            return Ok(Some((*instance, pidfd, record)));
        }
    }
    Ok(None)
}

fn refused(error: impl std::fmt::Display) -> BrokerError {
    BrokerError::Refused(error.to_string())
}

/// pyxis says nothing about it; it may be a mistake.
fn tell_if_other_image(request: &StepRequest, record: &Record) {
    if let Some(asked) = request.image.as_ref().map(text).filter(|asked| *asked != record.image) {
        tracing::info!("the container was made from {}, --container-image={asked} is ignored", record.image);
    }
}

/// An image for people, without a password.
fn text(image: &ImageSource) -> String {
    match image {
        ImageSource::Registry { reference, .. } => reference.to_string(),
        ImageSource::File(path) => path.display().to_string(),
        ImageSource::Local { typed, .. } => typed.clone(),
    }
}

/// What a container of `image` is made from.
pub(super) fn record(request: &StepRequest, image: &AcquiredImage) -> Option<Record> {
    let source = request.image.as_ref()?;
    let reference = match source {
        ImageSource::Registry { reference, .. } => Some(import::without_password(reference)),
        ImageSource::File(_) | ImageSource::Local { .. } => None,
    };
    let layers = image.layers.iter().map(|layer| layer.diff_id).collect();
    Some(Record {
        uid: request.user.uid,
        created: now(),
        image: text(source),
        lower: Lower::Layers { reference, manifest: image.manifest, layers },
        source: Subject::of(&request.user, source).source(),
        evidence: image.evidence.clone(),
        config: image.config.clone(),
    })
}

/// What a container around the tree at `path` is made from.
pub(super) fn record_of_tree(request: &StepRequest, path: PathBuf) -> Record {
    Record {
        uid: request.user.uid,
        created: now(),
        image: path.display().to_string(),
        lower: Lower::Tree(path),
        source: Source::File,
        evidence: Evidence::default(),
        config: Vec::new(),
    }
}

/// Waits until a container that is ending has ended.
pub(super) fn wait_for_end(patience: Patience<'_>, pidfd: &OwnedFd) -> Result<(), BrokerError> {
    while !patience.has_ended(pidfd)? {}
    Ok(())
}
