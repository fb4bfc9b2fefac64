//! The broker: the short-lived root process that turns a request into a container.
//!
//! It opens the store, has missing layers imported, mounts layers and overlay, and starts container init, which does the
//! rest as the job's user. It opens no path that the user chose and reads nothing that came from an image or a registry
//! (`import` checks the few numbers it is told). It stays until the container can be joined, is the only holder of the
//! leader's socket, and watches the leader and the life pipe: so a cancelled step never waits for it.
//!
//! The sequence, with the reason for each step, is that of `start`.

mod error;
mod image;
pub mod import;
mod inventory;
mod lower;
mod named;
mod owned;
mod relay;
mod squashfs;
mod trace;
mod tree;

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::CapabilitySet;

use crate::config::Config;
use crate::container::FullName;
use crate::container::kept::KeptContainer;
use crate::container::record::Record;
use crate::container::running::{Instance, Running};
use crate::hooks::workspace::Workspace;
use crate::image::digest::Digest;
use crate::init::attach::Attach;
use crate::init::protocol::{FromInit, ToInit};
use crate::init::{self, Start};
use crate::metrics::Metrics;
use crate::namespaces;
use crate::request::{Environment, NameMode, PROTOCOL_VERSION, StepRequest};
use crate::rootfs::kernel::{Feature, Kernel};
use crate::rootfs::layers::LayerMounts;
use crate::rootfs::overlay::{self, Upper};
use crate::sys::channel::{self, Channel};
use crate::sys::process::{Forked, close_from, die_with_parent, fork, set_capabilities, take_inherited};
use crate::sys::{self, memfile};
use crate::task::UserMessage;
use crate::task::protocol::{MAX_MEMORY_FILE, ToBroker, ToLeader, descriptors};
use error::{BrokerError, failed};
use lower::{Image, Squashfs};
use named::{Choice, Joined, Patience};
use relay::{Leader, Ready, vanished};

/// What the broker needs of root's privileges: mounting and entering namespaces; making the scratch layer the user's;
/// becoming the user and the importer, and mapping their ids (SETFCAP: root's own); writing to a store that root owns; ending what it started.
pub(crate) const CAPABILITIES: CapabilitySet = CapabilitySet::SYS_ADMIN
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
            let messages = error.messages();
            trace::failed(&messages);
            for message in messages {
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
        Some(Self {
            channel: take_inherited(descriptors::CHANNEL)?.into(),
            life: take_inherited(descriptors::LIFE)?,
            request: take_inherited(descriptors::REQUEST)?.into(),
            environment: take_inherited(descriptors::ENVIRONMENT)?.into(),
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
    set_capabilities(CAPABILITIES).map_err(|error| BrokerError::Start(without_privilege(CAPABILITIES, &error)))?;
    let request = read_request(request)?;
    let block = memfile::read_all(environment, MAX_MEMORY_FILE).map_err(failed("environment"))?;
    let environment = Environment::from_block(&block);
    let config = Config::load(config).map_err(failed("configuration"))?;
    trace::install(leader_channel, &config.log, &request);

    // Through /proc only its owner and root get at it: whoever joins this container later looks whether the step is over.
    let _ = rustix::fs::fchmod(&life, Mode::from_raw_mode(0o444));
    let runtime = &config.runtime.path;
    let mounts = LayerMounts::open(runtime).map_err(failed("layers"))?.without(&config.debug.without);
    for directory in [overlay::attach_point(runtime), Workspace::mount_point(runtime)] {
        make_directory(&directory).map_err(failed("runtime directory"))?;
    }
    if !mounts.is_shared() {
        tracing::warn!("every container mounts its layers anew: the kernel lets none be pinned");
    }
    let (name, mode) = FullName::of(&request).map_err(|error| BrokerError::Refused(error.to_string()))?.unzip();
    let running = Running::create(&config.runtime.path, request.user.uid).map_err(failed("running containers"))?;
    let leader = Leader::new(leader_channel, leader);
    let host = rustix::fs::open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(failed("mount namespace"))?;
    let metrics = Metrics::open(&config.runtime.path);
    let (began, imported) = (Instant::now(), false);
    let mut step =
        Step { leader, life, config, request, environment, mounts, name, running, host, metrics, imported, began };
    loop {
        match step.start(mode.flatten()) {
            Ok(true) => return Ok(()),
            // Another time: the container that this step was to join has ended meanwhile.
            Ok(false) => {}
            Err(error) => {
                error.counters().iter().for_each(|counter| step.metrics.count(*counter));
                return Err(error);
            }
        }
    }
}

/// Why the `needed` capabilities cannot be had, by name: in a pod or a container slurmd may run without some.
fn without_privilege(needed: CapabilitySet, error: &std::io::Error) -> String {
    let missing: Vec<_> = rustix::thread::capabilities(None)
        .map(|sets| needed.difference(sets.permitted).iter_names().map(|(name, _)| format!("CAP_{name}")).collect())
        .unwrap_or_default();
    if missing.is_empty() {
        return format!("capabilities: {error}");
    }
    format!(
        "slurmd runs without {} on this node, which mounting images takes; a pod has it by securityContext.privileged",
        missing.join(", ")
    )
}

/// One step's start of a container.
struct Step<'a> {
    leader: Leader<'a>,
    life: OwnedFd,
    config: Config,
    request: StepRequest,
    environment: Environment,
    mounts: LayerMounts,
    /// What the container is registered as.
    name: Option<FullName>,
    running: Running,
    /// The mount namespace of the host, which the broker leaves for that of the layers.
    host: OwnedFd,
    metrics: Metrics,
    /// Whether something of the image had to be imported.
    imported: bool,
    began: Instant,
}

/// Where a container's root filesystem comes from.
enum Root {
    /// Layers, and an upper layer that goes with the container.
    Scratch,
    /// Layers, and an upper layer that is kept; new, or not.
    Kept(KeptContainer, bool),
    /// A running container, whose directory stays locked until this one is registered as well.
    Shared { root: OwnedFd, _lock: Option<KeptContainer> },
    /// A directory of the user's.
    Tree(PathBuf),
}

impl Step<'_> {
    /// Whether it worked. It may not only if a container that was to be joined has ended.
    fn start(&mut self, mode: Option<NameMode>) -> Result<bool, BrokerError> {
        let choice = match (mode, &self.name) {
            (Some(mode), Some(name)) => {
                let Self { config, request, environment, running, .. } = &*self;
                Some(named::choose(self.patience(), config, request, environment, name, mode, running)?)
            }
            _ => None,
        };
        let (image, root) = match choice {
            None => (self.acquire()?, Root::Scratch),
            Some(Choice::Create(kept)) => (self.acquire()?, Root::Kept(kept, true)),
            Some(Choice::Reuse(kept, record)) => {
                tracing::info!("reusing existing container filesystem");
                (self.image_of(record)?, Root::Kept(kept, false))
            }
            Some(Choice::Tree(path)) => {
                let record = named::record_of_tree(&self.request, path.clone());
                self.permit(&record)?;
                tracing::info!("reusing existing container filesystem");
                let record = Some(record);
                (Image { config: vec![], digest: None, layers: vec![], squashfs: None, record }, Root::Tree(path))
            }
            Some(Choice::Attach(joined)) => return self.attach(joined),
            Some(Choice::Share(Joined { pidfd, record, kept, .. })) => {
                let root = namespaces::running::clone_root(pidfd.as_fd(), &self.request.user)
                    .map_err(failed("the running container's root filesystem"))?;
                let Some(root) = root else {
                    drop(kept);
                    named::wait_for_end(self.patience(), &pidfd)?;
                    return Ok(false);
                };
                tracing::info!("reusing existing container filesystem");
                (self.image_of(record)?, Root::Shared { root, _lock: kept })
            }
        };
        self.build(image, root).map(|()| true)
    }

    fn patience(&self) -> Patience<'_> {
        Patience { leader: self.leader.channel.as_fd(), life: self.life.as_fd() }
    }

    /// Starts a container of its own.
    fn build(&mut self, image: Image, root: Root) -> Result<(), BrokerError> {
        let kernel = self.kernel();
        let copies = match kernel.idmapped_layers {
            true => None,
            false => Some(self.of_the_user(&image.layers)?),
        };
        // Init gets ready while the broker mounts.
        let idmap = match kernel.idmapped_layers {
            true => Some(namespaces::idmap(&self.request.user).map_err(failed("idmapped mounts"))?),
            false => None,
        };
        let (init_channel, init_end) = channel::pair::<ToInit, FromInit>().map_err(failed("container init"))?;
        let broker = rustix::process::getpid();
        // SAFETY: the broker has one thread.
        let init = match unsafe { fork(0) }.map_err(failed("container init"))? {
            Forked::Child => {
                let start =
                    self.start_of_init(broker, (&image.config, image.digest), matches!(root, Root::Shared { .. }));
                let leases = image.layers.into_iter().chain(copies.into_iter().flatten()).collect();
                init::run(&start, init_end, &self.life, leases)
            }
            Forked::Parent(init) => init,
        };
        drop(init_end);
        let registered = self.register(init, image.record.as_ref(), !matches!(root, Root::Scratch))?;
        let size = self.config.container.scratch_size.as_deref();
        let upper = match &root {
            Root::Scratch => Some(Upper::Scratch(size)),
            Root::Kept(kept, new) => Some(Upper::Kept { directory: kept.directory(), new: *new }),
            Root::Shared { .. } | Root::Tree(_) => None,
        };
        let (lower, server) = match &image.squashfs {
            None => (overlay::Lower::Layers(copies.as_deref().unwrap_or(&image.layers)), None),
            Some(Squashfs::Mount(mount)) => (overlay::Lower::Mount(mount), None),
            Some(Squashfs::Fuse(server)) => (overlay::Lower::Layers(&[]), Some(server)),
        };
        if let Some(server) = server {
            init_channel.send(&ToInit::Squashfuse, &[]).map_err(failed("container init"))?;
            drop(idmap);
            let ready = self.relay(init, &init_channel, Some(server))?.ok_or_else(vanished)?;
            self.report(init, ready, registered)?;
            if let Some(Squashfs::Fuse(server)) = image.squashfs {
                server.leave_running();
            }
            return Ok(());
        }
        let mounted = match upper {
            Some(upper) => Some(
                overlay::mount(&self.mounts, lower, idmap.as_ref(), &self.request.user, upper)
                    .map_err(|error| BrokerError::Start(error.to_string()))?,
            ),
            None => None,
        };
        tracing::debug!(after = ?self.began.elapsed(), "mounted the root filesystem");
        // Whoever comes next finds the container registered. A new one is none before it is whole.
        let (message, mounted, new) = match (mounted, root) {
            (Some(mounted), Root::Kept(kept, true)) => (ToInit::Root, Some(mounted), Some(kept)),
            (Some(mounted), _) | (None, Root::Shared { root: mounted, .. }) => (ToInit::Root, Some(mounted), None),
            (None, Root::Tree(path)) => (ToInit::Tree { path }, None, None),
            (None, _) => return Err(BrokerError::Start("internal error: no root filesystem".into())),
        };
        let descriptors: Vec<BorrowedFd<'_>> = mounted.iter().map(AsFd::as_fd).collect();
        init_channel.send(&message, &descriptors).map_err(failed("container init"))?;
        // The container's own mount keeps all of it alive; closing late would cost the leader time.
        drop((mounted, idmap));
        let ready = self.relay(init, &init_channel, None)?.ok_or_else(vanished)?;
        if let (Some(kept), Some(record)) = (&new, &image.record) {
            kept.write_record(record).map_err(|error| BrokerError::Start(error.to_string()))?;
        }
        drop(new);
        self.report(init, ready, registered)
    }

    fn kernel(&self) -> Kernel {
        let known = Kernel::of_node(&self.config.store.path, &self.config.runtime.path);
        let wanted = !self.config.debug.without.contains(&Feature::IdmappedLayers);
        Kernel { idmapped_layers: known.idmapped_layers && wanted }
    }

    fn start_of_init<'a>(
        &'a self,
        broker: Pid,
        (image_config, image_digest): (&'a [u8], Option<Digest>),
        root_is_shared: bool,
    ) -> Start<'a> {
        Start {
            request: &self.request,
            environment: &self.environment,
            image_config,
            image_digest,
            settings: &self.config.container,
            sysconf: &self.config.enroot.sysconf_path,
            hooks: &self.config.hooks,
            devices: &self.config.devices,
            root_is_shared,
            runtime: &self.config.runtime.path,
            broker,
            leader: self.leader.pid.as_raw_nonzero().get(),
        }
    }

    /// Joins a running container; `false` if it has ended.
    fn attach(&mut self, joined: Joined) -> Result<bool, BrokerError> {
        let Joined { instance, pidfd, record, kept } = joined;
        tracing::info!("reusing existing container namespaces");
        let leases = self.leases(&record)?.unwrap_or_default();
        let (init_channel, init_end) = channel::pair::<ToInit, FromInit>().map_err(failed("container init"))?;
        let broker = rustix::process::getpid();
        // SAFETY: the broker has one thread.
        let init = match unsafe { fork(0) }.map_err(failed("container init"))? {
            Forked::Child => {
                let start = self.start_of_init(broker, (&record.config, record.digest()), true);
                let attach = Attach { start: &start, instance: &instance, pidfd: &pidfd };
                init::attach::run(&attach, init_end, &self.life, leases)
            }
            Forked::Parent(init) => init,
        };
        drop(init_end);
        let registered = self.register(init, Some(&record), kept.is_some())?;
        drop((kept, leases));
        let Some(ready) = self.relay(init, &init_channel, None)? else {
            named::wait_for_end(self.patience(), &pidfd)?;
            return Ok(false);
        };
        let request = &self.request;
        for (option, given) in [("mounts", !request.mounts.is_empty()), ("device", !request.devices.is_empty())] {
            if given {
                let text = format!("pyxis: ignoring --container-{option} when attaching to a running container");
                self.leader.say(UserMessage::Notice(text));
            }
        }
        self.report(init, ready, registered).map(|()| true)
    }

    /// Lets others know that `init` runs, or will in a moment. If it `must` be known, not being able to say so is an error.
    fn register(&self, init: Pid, record: Option<&Record>, must: bool) -> Result<Option<Instance>, BrokerError> {
        let (Some(name), Some(record)) = (&self.name, record) else { return Ok(None) };
        match self.running.register(name, init, self.life.as_raw_fd(), record) {
            Ok(instance) => Ok(Some(instance)),
            Err(error) if must => Err(failed("registration")(sys::reason(error))),
            Err(error) => {
                tracing::warn!("nobody can attach to this container: {}", sys::reason(error));
                Ok(None)
            }
        }
    }

    /// Tells the leader, and everybody who may join.
    fn report(&self, init: Pid, ready: Ready, registered: Option<Instance>) -> Result<(), BrokerError> {
        if let (Some(name), Some(instance)) = (&self.name, registered) {
            self.running.set_ready(name, &instance).map_err(failed("registration"))?;
        }
        let Ready { workdir, entrypoint, cgroup_namespace, gpu_numbers, descriptors } = ready;
        let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let wait = entrypoint.is_some();
        let init = init.as_raw_nonzero().get();
        let message = ToLeader::Ready { init, workdir, entrypoint, cgroup_namespace, gpu_numbers };
        self.leader.channel.send(&message, &descriptors).map_err(|_| BrokerError::Cancelled)?;
        self.metrics.started(self.began.elapsed(), self.imported);
        if wait { self.stand_by() } else { Ok(()) }
    }

    /// Waits until the leading task has run the entrypoint, or the step ends: which the task notices because this process
    /// ends, since the signals of a cancelled step need not reach the task itself.
    fn stand_by(&self) -> Result<(), BrokerError> {
        loop {
            let mut watched = [
                PollFd::new(self.leader.channel, PollFlags::IN | PollFlags::RDHUP),
                PollFd::from_borrowed_fd(self.life.as_fd(), PollFlags::empty()),
            ];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None)).map_err(failed("poll"))?;
            let [from_leader, life] = watched.map(|descriptor| descriptor.revents());
            if !life.is_empty() {
                return Ok(());
            }
            // What it said before, if nobody had to wait for that: init may join a running container without the task.
            if !from_leader.is_empty() && self.leader.channel.receive().map_err(failed("task"))?.is_none() {
                return Ok(());
            }
        }
    }
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
