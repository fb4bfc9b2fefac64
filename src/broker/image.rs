//! The image of a step: where it comes from, and what the user is told meanwhile.
//!
//! Scripts count lines: `importing` and `imported` for what is imported, one pair a step and node; none for files.

mod site_importer;

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use super::import::{
    self, AcquireRequest, AcquiredImage, Agreed, AskingTurn, ImportError, ImportEvent, ImportSettings, LocalRequest,
    OpenedImage,
};
use super::squashfs::{self, FuseServer, Method};
use super::{BrokerError, Leader, failed};
use crate::config::Config;
use crate::container::InUse;
use crate::image::reference::ImageReference;
use crate::metrics::{Meter, Metrics};
use crate::policy::Policy;
use crate::progress::{Progress, Update};
use crate::request::{Environment, ImageSource, LocalImage, Meaning, Place, StepRequest, TagMeaning};
use crate::rootfs::cgroups;
use crate::source::importer::ImporterCall;
use crate::store::Store;
use crate::sys;
use crate::task::UserMessage;
use crate::task::protocol::ToLeader;

/// What all sources need.
pub(super) struct Acquisition<'a, 'b> {
    pub leader: &'a mut Leader<'b>,
    pub life: &'a OwnedFd,
    pub config: &'a Config,
    pub request: &'a StepRequest,
    pub environment: &'a Environment,
    /// What the collector must leave alone.
    pub in_use: &'a InUse<'a>,
    /// Where imports are counted.
    pub metrics: &'a Metrics,
    /// What has happened so far.
    pub meter: Meter,
    /// Whether other nodes of the step wait for what this one learns of the image's tag.
    pub turn: Option<AskingTurn>,
}

/// What a container can be made from.
#[derive(Debug)]
pub(super) enum Acquired {
    /// Layers of the store.
    Layers(AcquiredImage),
    /// A squashfs file that the kernel has mounted.
    Mount(OwnedFd),
    /// A squashfs file behind a FUSE server.
    Fuse(FuseServer),
}

impl Acquisition<'_, '_> {
    /// Gets the image that the request names.
    pub fn acquire(&mut self) -> Result<Acquired, BrokerError> {
        if let Some(call) = ImporterCall::new(self.request) {
            return self.by_site_importer(&call);
        }
        match &self.request.image {
            Some(ImageSource::Registry { typed, reference }) => {
                self.of_registry(typed, reference).map(Acquired::Layers)
            }
            Some(ImageSource::File(path)) => {
                let image = LocalImage::Path { path: path.clone(), form: None, name: None };
                self.of_file(&path.display().to_string(), &image)
            }
            Some(ImageSource::Local { typed, image: image @ LocalImage::Path { .. } }) => self.of_file(typed, image),
            Some(ImageSource::Local { typed, image: image @ LocalImage::Engine { .. } }) => {
                self.of_engine(typed, image)
            }
            None => Err(BrokerError::Start("no image".into())),
        }
    }

    /// Gets the image `reference`, which the user does not wait for: he has it already.
    pub fn again(&mut self, reference: &ImageReference) -> Result<AcquiredImage, ImportError> {
        // Whether it may be used is known from when the container was made.
        let settings = ImportSettings { policy: Policy::default(), ..self.config.import_settings() };
        let store = Store::open(&self.config.store.path)?;
        let wanted = AcquireRequest { user: &self.request.user, reference, environment: self.environment };
        let in_use = self.in_use;
        let image =
            self.watch(None, |cancel, events| import::acquire(&store, &settings, wanted, in_use, cancel, events));
        self.count(image.as_ref());
        image
    }

    fn count(&self, image: Result<&AcquiredImage, &ImportError>) {
        match image {
            Ok(image) => self.metrics.acquired(image, &self.meter),
            Err(error) => self.metrics.not_acquired(error, &self.meter),
        }
    }

    fn of_registry(&mut self, typed: &str, reference: &ImageReference) -> Result<AcquiredImage, BrokerError> {
        self.announce(typed);
        let (store, mut settings) = (self.store()?, self.config.import_settings());
        settings.pull = self.request.pull.unwrap_or(settings.pull);
        let shell = self.request.step.is_none().then(|| self.config.proxy.of_shell(self.environment));
        settings.shell = shell;
        settings.meaning = match self.request.meaning.as_deref().and_then(TagMeaning::parse) {
            Some(TagMeaning::Known(meaning)) => Some(meaning),
            Some(TagMeaning::Asked(place)) if settings.asks_for_tags() => self.agree(typed, &settings, &place)?,
            _ => None,
        };
        settings.for_others = self.turn.is_some();
        let wanted = AcquireRequest { user: &self.request.user, reference, environment: self.environment };
        let in_use = self.in_use;
        let image = self
            .watch(Some(typed), |cancel, events| import::acquire(&store, &settings, wanted, in_use, cancel, events));
        // Whoever waits for what was not learned need not wait for the rest of it.
        self.turn = None;
        self.count(image.as_ref());
        let image = image.map_err(|error| match import_error(typed, &error) {
            BrokerError::Import { image, reason, .. } => {
                BrokerError::Import { image, reason, hint: self.hint(typed, &settings) }
            }
            other => other,
        })?;
        self.conclude(typed, image.from_network);
        Ok(image)
    }

    /// What the tag of the image means, if another node of the step has learned it.
    fn agree(&mut self, typed: &str, settings: &ImportSettings, place: &Place) -> Result<Option<Meaning>, BrokerError> {
        self.leader.wait_until_arrived()?;
        let leader = &*self.leader;
        let address = leader.launched_from.as_deref().unwrap_or("an unknown address");
        let agreed = match address.parse::<IpAddr>() {
            Err(_) => Agreed::Alone("Slurm does not say where srun is".into()),
            Ok(address) => {
                let cancel: [BorrowedFd<'_>; 2] = [leader.channel.as_fd(), self.life.as_fd()];
                import::agree(settings, &self.request.user, (address, place), &cancel, |pid| {
                    if let Err(error) = cgroups::join(pid, leader.pid) {
                        tracing::warn!("process {pid} stays outside the job's cgroup: {}", sys::reason(error));
                    }
                })
                .map_err(|error| import_error(typed, &error))?
            }
        };
        match agreed {
            Agreed::Known(meaning) => return Ok(Some(meaning)),
            Agreed::Ours(turn) => self.turn = Some(turn),
            Agreed::Nobody => {}
            Agreed::Alone(reason) => leader.say(UserMessage::Notice(format!(
                "pyxis: {typed}: cannot agree with the step's other nodes on what the tag means ({address}, port {}: \
                 {reason}): this node asks the registry for itself",
                place.port
            ))),
        }
        Ok(None)
    }

    /// That a name of no image is one of a file: users forget that paths begin with a dot or a slash.
    fn hint(&mut self, typed: &str, settings: &ImportSettings) -> Option<String> {
        let image = LocalImage::Path { path: typed.into(), form: None, name: None };
        let (user, cwd) = (&self.request.user, Path::new(&self.request.cwd));
        let wanted = LocalRequest { user, image: &image, typed, cwd, environment: self.environment };
        let opened = self.watch(None, |cancel, events| import::open_local(settings, wanted, cancel, events));
        opened.is_ok().then(|| {
            format!("{typed} is a file in {}: --container-image=./{typed} runs it", self.request.cwd.display())
        })
    }

    /// An image in a container engine's storage.
    fn of_engine(&mut self, typed: &str, image: &LocalImage) -> Result<Acquired, BrokerError> {
        self.announce(typed);
        let image = self.of_this_machine(typed, image, Some(typed)).map_err(|error| import_error(typed, &error))?;
        if let Acquired::Layers(image) = &image {
            self.conclude(typed, image.from_network);
        }
        Ok(image)
    }

    /// An OCI layout, an archive, or a squashfs file.
    fn of_file(&mut self, typed: &str, image: &LocalImage) -> Result<Acquired, BrokerError> {
        self.of_this_machine(typed, image, None).map_err(|error| match error {
            ImportError::Cancelled { .. } => BrokerError::Cancelled,
            other => BrokerError::Create { image: typed.to_owned(), reason: other.to_string() },
        })
    }

    /// `announced`: what is said when the user has to wait.
    fn of_this_machine(
        &mut self,
        typed: &str,
        image: &LocalImage,
        announced: Option<&str>,
    ) -> Result<Acquired, ImportError> {
        let store = Store::open(&self.config.store.path)?;
        let settings = self.config.import_settings();
        let (user, cwd) = (&self.request.user, Path::new(&self.request.cwd));
        let wanted = LocalRequest { user, image, typed, cwd, environment: self.environment };
        let (in_use, life) = (self.in_use, self.life);
        let method = Method::choose(self.config.squashfs.mode, self.request);
        let preparation = Preparation { store: &store, settings: &settings, wanted, in_use, life, method };
        let acquired = self.watch(announced, |cancel, events| {
            let opened = import::open_local(&settings, wanted, cancel, events)?;
            preparation.prepare(opened, cancel, events)
        });
        match &acquired {
            Ok(Acquired::Layers(image)) => self.count(Ok(image)),
            Ok(Acquired::Mount(_) | Acquired::Fuse(_)) => {}
            Err(error) => self.count(Err(error)),
        }
        acquired
    }

    /// Calls `work`, which may be cancelled, and tells the leader what happens.
    fn watch<T>(
        &mut self,
        announced: Option<&str>,
        work: impl FnOnce(&[BorrowedFd<'_>], &mut dyn FnMut(ImportEvent)) -> Result<T, ImportError>,
    ) -> Result<T, ImportError> {
        let in_step = self.request.step.is_some();
        let mut progress = announced.map(|typed| Progress::new(typed, &self.config.progress));
        let (leader, meter, turn) = (&mut *self.leader, &mut self.meter, &mut self.turn);
        let cancel: [BorrowedFd<'_>; 2] = [leader.channel.as_fd(), self.life.as_fd()];
        let mut gone = false;
        let image = work(&cancel, &mut |event| {
            meter.note(&event);
            if let Some(Update { line, due }) = progress.as_mut().and_then(|progress| progress.note(&event)) {
                let _ = leader.channel.send(&ToLeader::Progress { line, due }, &[]);
            }
            match event {
                ImportEvent::NetworkStart => {
                    if let Some(typed) = announced.filter(|_| !in_step) {
                        leader.say(UserMessage::Notice(format!("pyxis: importing docker image: {typed}")));
                    }
                    // What an import uses is the job's: it starts when the task is in its cgroups.
                    gone |= leader.wait_until_arrived().is_err();
                }
                ImportEvent::Process { pid } => {
                    if let Err(error) = cgroups::join(pid, leader.pid) {
                        tracing::warn!("importer {pid} stays outside the job's cgroup: {}", sys::reason(error));
                    }
                }
                ImportEvent::Meant(meaning) => {
                    if let Some(turn) = turn.take() {
                        turn.tell(meaning);
                    }
                }
                ImportEvent::Warning(text) => leader.say(UserMessage::Notice(format!("pyxis: {text}"))),
                ImportEvent::Crowded(text) => tracing::warn!("{text}"),
                ImportEvent::Log(text) => tracing::info!("{text}"),
                ImportEvent::Trouble(text) => tracing::info!("{text}"),
                ImportEvent::Resolved { .. }
                | ImportEvent::Progress { .. }
                | ImportEvent::Tick { .. }
                | ImportEvent::Waiting => {}
            }
        })?;
        if gone { Err(ImportError::Cancelled { image: String::new() }) } else { Ok(image) }
    }

    /// In a step the first line is shown only where a single task will show it.
    fn announce(&self, typed: &str) {
        if self.request.step.as_ref().is_some_and(|step| step.total_tasks <= 1) {
            self.leader.say(UserMessage::Notice(format!("pyxis: importing docker image: {typed}")));
        }
    }

    fn conclude(&self, typed: &str, from_network: bool) {
        if self.request.step.is_some() || from_network {
            self.leader.say(UserMessage::Notice(format!("pyxis: imported docker image: {typed}")));
        }
    }

    fn store(&self) -> Result<Store, BrokerError> {
        Store::open(&self.config.store.path).map_err(failed("image store"))
    }
}

/// Makes an opened image something a container can be made from.
struct Preparation<'a> {
    store: &'a Store,
    settings: &'a ImportSettings,
    wanted: LocalRequest<'a>,
    in_use: &'a InUse<'a>,
    life: &'a OwnedFd,
    method: Method,
}

impl Preparation<'_> {
    fn prepare(
        &self,
        mut opened: OpenedImage,
        cancel: &[BorrowedFd<'_>],
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<Acquired, ImportError> {
        let Self { store, settings, wanted, in_use, life, method } = self;
        let Some((file, key)) = opened.take_squashfs(settings)? else {
            let image = import::acquire_local(store, settings, *wanted, opened, *in_use, cancel, events)?;
            return Ok(Acquired::Layers(image));
        };
        drop(opened);
        let (user, typed) = (wanted.user, wanted.typed);
        match method {
            Method::Fuse => return FuseServer::start(settings, user, &file, life, typed).map(Acquired::Fuse),
            Method::Kernel => match squashfs::mount(&file, user) {
                Ok(mount) => return Ok(Acquired::Mount(mount)),
                // The conversion will do, or say what is wrong with the file.
                Err(reason) => events(ImportEvent::Log(format!("the kernel does not mount {typed}: {reason}"))),
            },
            Method::Convert => {}
        }
        let image = import::convert(store, settings, *wanted, (file, key), *in_use, cancel, events)?;
        Ok(Acquired::Layers(image))
    }
}

fn import_error(typed: &str, error: &ImportError) -> BrokerError {
    match error {
        ImportError::Cancelled { .. } => BrokerError::Cancelled,
        other => BrokerError::Import { image: typed.to_owned(), reason: other.to_string(), hint: None },
    }
}
