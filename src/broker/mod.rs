//! The broker: the short-lived root process that turns a request into a container.
//!
//! It opens the store, has missing layers imported, mounts layers and overlay, and starts container init, which does the
//! rest as the job's user. It opens no path that the user chose and reads nothing that came from an image or a registry
//! (`import` checks the few numbers it is told). It stays until the container can be joined, is the only holder of the
//! leader's socket, and watches the leader and the life pipe: so a cancelled step never waits for it.
//!
//! The sequence, with the reason for each step, is that of `start`.

mod image;
pub mod import;
mod trace;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::CapabilitySet;

use crate::config::Config;
use crate::init::protocol::{FromInit, ToInit};
use crate::init::{self, Start};
use crate::namespaces;
use crate::request::{Environment, PROTOCOL_VERSION, StepRequest};
use crate::rootfs::layers::LayerMounts;
use crate::rootfs::overlay;
use crate::sys::channel::{self, Channel};
use crate::sys::memfile;
use crate::sys::process::{Forked, close_from, die_with_parent, fork, set_capabilities};
use crate::task::UserMessage;
use crate::task::protocol::{MAX_MEMORY_FILE, ToBroker, ToLeader, descriptors};

/// What the broker needs of root's privileges: mounting and entering namespaces; making the scratch layer the user's;
/// becoming the user and the importer, and mapping their ids (SETFCAP: root's own); writing to a store that root owns; ending what it started.
const CAPABILITIES: CapabilitySet = CapabilitySet::SYS_ADMIN
    .union(CapabilitySet::SYS_CHROOT)
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::KILL);

/// Why there is no container. Each is reported by [`BrokerError::messages`].
#[derive(Debug, thiserror::Error)]
enum BrokerError {
    /// The image could not be had.
    #[error("failed to import docker image: {image}")]
    Import {
        /// As the user typed it.
        image: String,
        /// Why.
        reason: String,
    },
    /// An image on this machine could not be had.
    #[error("failed to create container filesystem for image: {image}")]
    Create {
        /// As the user typed it.
        image: String,
        /// Why.
        reason: String,
    },
    /// Root's part of the start.
    #[error("cannot start container: {0}")]
    Start(String),
    /// Init said why.
    #[error("container init failed")]
    Init(Vec<UserMessage>),
    /// The leader or the step has ended: nobody is left to be told.
    #[error("cancelled")]
    Cancelled,
}

impl BrokerError {
    fn messages(self) -> Vec<UserMessage> {
        match self {
            Self::Import { ref reason, .. } | Self::Create { ref reason, .. } => vec![
                UserMessage::error(&self),
                UserMessage::error("printing enroot log file:"),
                UserMessage::error(format!("    [ERROR] {reason}")),
            ],
            Self::Start(_) => vec![UserMessage::error(self)],
            Self::Init(messages) => messages,
            Self::Cancelled => vec![],
        }
    }
}

fn failed<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> BrokerError + '_ {
    move |error| BrokerError::Start(format!("{what}: {error}"))
}

/// The process that the leading task starts, with [`descriptors`] open and the path of the configuration as argument.
pub fn main(config: Option<PathBuf>) -> ExitCode {
    let (Some(config), Some(leader)) = (config, rustix::process::getppid()) else {
        eprintln!("pyxis: the broker is started by the plugin or by \"pyxis run\", not by hand");
        return ExitCode::from(2);
    };
    let Some(inherited) = Inherited::take() else {
        eprintln!("pyxis: the broker is started by the plugin or by \"pyxis run\", not by hand");
        return ExitCode::from(2);
    };
    let channel = inherited.channel;
    let result = start(&channel, inherited.life, inherited.request, inherited.environment, &config, leader);
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            for message in error.messages() {
                let _ = channel.send(&ToLeader::Say(message), &[]);
            }
            let _ = channel.send(&ToLeader::Failed, &[]);
            ExitCode::FAILURE
        }
    }
}

struct Inherited {
    channel: Channel<ToLeader, ToBroker>,
    life: OwnedFd,
    request: File,
    environment: File,
}

impl Inherited {
    /// The descriptors a broker starts with, and no other.
    fn take() -> Option<Self> {
        close_from(descriptors::END).ok()?;
        let take = |number| {
            // SAFETY: fcntl takes numbers only; the descriptor, if it is open, was put there for us by `start_broker`, and
            // this function runs once, before anything else in this process owns a descriptor of that number.
            unsafe { (libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) == 0).then(|| OwnedFd::from_raw_fd(number)) }
        };
        Some(Self {
            channel: take(descriptors::CHANNEL)?.into(),
            life: take(descriptors::LIFE)?,
            request: take(descriptors::REQUEST)?.into(),
            environment: take(descriptors::ENVIRONMENT)?.into(),
        })
    }
}

fn start(
    leader_channel: &Channel<ToLeader, ToBroker>,
    life: OwnedFd,
    request: File,
    environment: File,
    config: &Path,
    leader: Pid,
) -> Result<(), BrokerError> {
    die_with_parent(leader).map_err(|_| BrokerError::Cancelled)?;
    set_capabilities(CAPABILITIES).map_err(failed("capabilities"))?;
    let request = read_request(request)?;
    let block = memfile::read_all(environment, MAX_MEMORY_FILE).map_err(failed("environment"))?;
    let environment = Environment::from_block(&block);
    let config = Config::load(config).map_err(failed("configuration"))?;
    trace::install(leader_channel, config.log.level.into());
    let began = Instant::now();

    let runtime = &config.runtime.path;
    let mounts = LayerMounts::open(runtime).map_err(failed("layers"))?;
    make_directory(&overlay::attach_point(runtime)).map_err(failed("runtime directory"))?;
    let mut leader = Leader { channel: leader_channel, pid: leader, proceed: None, arrived: false };
    if !mounts.is_shared() {
        tracing::warn!("every container mounts its layers anew: the kernel lets none be pinned");
    }
    let image = image::acquire(&mut leader, &life, &config, &request, &environment, &mounts)?;
    tracing::debug!(manifest = %image.manifest, layers = image.layers.len(), after = ?began.elapsed(), "have the image");

    // Init gets ready while the broker mounts.
    let idmap = namespaces::idmap(&request.user).map_err(failed("idmapped mounts"))?;
    let (init_channel, init_end) = channel::pair::<ToInit, FromInit>().map_err(failed("container init"))?;
    let broker = rustix::process::getpid();
    // SAFETY: the broker has one thread.
    let init = match unsafe { fork(0) }.map_err(failed("container init"))? {
        Forked::Child => {
            let start = Start {
                request: &request,
                environment: &environment,
                image_config: &image.config,
                settings: &config.container,
                sysconf: &config.enroot.sysconf_path,
                runtime,
                broker,
                leader: leader.pid.as_raw_nonzero().get(),
            };
            init::run(&start, init_end, life, image.layers)
        }
        Forked::Parent(init) => init,
    };
    drop(init_end);
    let size = config.container.scratch_size.as_deref();
    let root = overlay::mount(&mounts, &image.layers, &idmap, &request.user, size)
        .map_err(|error| BrokerError::Start(error.to_string()))?;
    tracing::debug!(after = ?began.elapsed(), "mounted the root filesystem");
    init_channel.send(&ToInit::Root, &[root.as_fd()]).map_err(failed("container init"))?;
    // The container's own mount keeps all of it alive; closing late would cost the leader time.
    drop((root, idmap));
    relay(&mut leader, &life, init, &init_channel, began)
}

fn read_request(file: File) -> Result<StepRequest, BrokerError> {
    let bytes = memfile::read_all(file, MAX_MEMORY_FILE).map_err(failed("request"))?;
    let request: StepRequest = serde_json::from_slice(&bytes)
        .map_err(failed("the plugin and the executable are of different versions: request"))?;
    match request.protocol {
        PROTOCOL_VERSION => Ok(request),
        other => Err(BrokerError::Start(format!(
            "the plugin speaks protocol {other} and the executable {PROTOCOL_VERSION}: \
             install the same version of both"
        ))),
    }
}

fn make_directory(path: &Path) -> Result<(), Errno> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)) {
        Err(Errno::EXIST) => Ok(()),
        other => other,
    }
}

/// The leading task, as the broker sees it.
struct Leader<'a> {
    channel: &'a Channel<ToLeader, ToBroker>,
    pid: Pid,
    /// It is in `task_init`, and so in its cgroups.
    arrived: bool,
    /// What it sent with `Proceed`.
    proceed: Option<(bool, Vec<OwnedFd>)>,
}

impl Leader<'_> {
    fn say(&self, message: UserMessage) {
        // A leader that is gone is noticed where the broker waits.
        let _ = self.channel.send(&ToLeader::Say(message), &[]);
    }

    fn receive(&mut self) -> Result<(), BrokerError> {
        match self.channel.receive().map_err(failed("task"))? {
            Some((ToBroker::Arrived, _)) => self.arrived = true,
            Some((ToBroker::Proceed { cgroup_namespace }, descriptors)) => {
                self.proceed = Some((cgroup_namespace, descriptors));
            }
            None => return Err(BrokerError::Cancelled),
        }
        Ok(())
    }

    fn wait_until_arrived(&mut self) -> Result<(), BrokerError> {
        while !self.arrived {
            self.receive()?;
        }
        Ok(())
    }
}

/// Carries messages between leader and init until the container is ready; ends with the leader, the step or init.
fn relay(
    leader: &mut Leader<'_>,
    life: &OwnedFd,
    init: Pid,
    init_channel: &Channel<ToInit, FromInit>,
    began: Instant,
) -> Result<(), BrokerError> {
    let init = init.as_raw_nonzero().get();
    let vanished = || BrokerError::Start("container init ended unexpectedly".into());
    loop {
        let mut watched = [
            PollFd::new(leader.channel, PollFlags::IN | PollFlags::RDHUP),
            PollFd::new(init_channel, PollFlags::IN),
            PollFd::from_borrowed_fd(life.as_fd(), PollFlags::empty()),
        ];
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None)).map_err(failed("poll"))?;
        let [from_leader, from_init, life_events] = watched.map(|descriptor| descriptor.revents());
        if !life_events.is_empty() {
            return Err(BrokerError::Cancelled);
        }
        if !from_init.is_empty() {
            match init_channel.receive().map_err(failed("container init"))? {
                Some((FromInit::Say(message), _)) => leader.say(message),
                Some((FromInit::Started, _)) => {
                    leader.channel.send(&ToLeader::Started { init }, &[]).map_err(|_| BrokerError::Cancelled)?;
                }
                Some((FromInit::Ready { workdir, entrypoint }, descriptors)) => {
                    tracing::info!("completed container setup in {} ms", began.elapsed().as_millis());
                    let wait = entrypoint.is_some();
                    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
                    leader
                        .channel
                        .send(&ToLeader::Ready { init, workdir, entrypoint }, &descriptors)
                        .map_err(|_| BrokerError::Cancelled)?;
                    return if wait { stand_by(leader, life) } else { Ok(()) };
                }
                Some((FromInit::Failed { messages }, _)) => return Err(BrokerError::Init(messages)),
                None => return Err(vanished()),
            }
        }
        if !from_leader.is_empty() {
            leader.receive()?;
            if let Some((cgroup_namespace, descriptors)) = leader.proceed.take() {
                let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
                init_channel.send(&ToInit::Proceed { cgroup_namespace }, &descriptors).map_err(|_| vanished())?;
            }
        }
    }
}

/// Waits until the leading task has run the entrypoint, or the step ends: which the task notices because this process
/// ends, since the signals of a cancelled step need not reach the task itself.
fn stand_by(leader: &Leader<'_>, life: &OwnedFd) -> Result<(), BrokerError> {
    let mut watched = [
        PollFd::new(leader.channel, PollFlags::IN | PollFlags::RDHUP),
        PollFd::from_borrowed_fd(life.as_fd(), PollFlags::empty()),
    ];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None)).map(drop).map_err(failed("poll"))
}
