//! An image for a user: from the store if the registry confirmed it lately, else through an importer.
//!
//! The broker's side of an import, for the broker of a step, `pyxis run` and `pyxis pull`. Nothing here reads what came
//! from a registry, except the few numbers and digests of [`crate::importer::protocol`], each checked before use: the
//! importer reads hostile data and is not trusted.
//!
//! * [`acquire`]: the warm path, and what is remembered after the cold one;
//! * [`agreement`]: what the tag means for all nodes of a step;
//! * [`known`]: what the store knows of an image, and whose turn it is to ask the registry;
//! * [`local`]: the same for an image that the user has on this machine;
//! * [`session`]: the conversation with one importer, and what becomes of each layer;
//! * [`process`]: the importer and the credentials reader as child processes;
//! * [`permit`]: what the administrator's rules say about the image;
//! * [`roles`]: their first steps, in which they take on their identities.

mod agreement;
mod known;
mod local;
mod permit;
mod process;
mod roles;
mod session;

use std::os::fd::BorrowedFd;
use std::path::PathBuf;
use std::time::Duration;

use crate::config::RegistryConfig;
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::importer::protocol::{Command, FailureKind, ImportLimits};
use crate::policy::{Evidence, Policy, Subject};
use crate::registry::error::RegistryError;
use crate::registry::proxy;
use crate::request::{Environment, Meaning, PullPolicy, User};
use crate::store::{
    Goal, LeasedLayer, ManifestRecord, PinnedMounts, ReferenceRecord, Store, StoreError, Watermark, Watermarks, count,
    now, size,
};
pub use agreement::{Agreed, Turn as AskingTurn, agree};
use known::{Known, Turn};
pub use local::{LocalRequest, OpenedImage, acquire_local, convert, open_imported, open_local};
pub(super) use permit::settled;
pub use process::{Child, Importer, Processes, StartImporter};
pub(super) use process::{service_identity, start_reader};
pub use roles::{
    account_role, credentials_role, guest_role, importer_role, inventory_role, release_role, source_role,
    squashfuse_role,
};
use session::Session;

/// What the administrator decides about imports.
#[derive(Debug, Clone, PartialEq)]
pub struct ImportSettings {
    /// Mirrors, plain HTTP, timeouts: handed to the importer.
    pub registries: RegistryConfig,
    /// Bounds of one layer.
    pub limits: ImportLimits,
    /// How long a user may go on using an image before the registry is asked again whether he may have it.
    pub confirmation: Duration,
    /// When to ask it about an image that the store has.
    pub pull: PullPolicy,
    /// What the image's tag means, if that is known from elsewhere, for all nodes of a step.
    pub meaning: Option<Meaning>,
    /// Whether other nodes wait for what this one learns of it.
    pub for_others: bool,
    /// Space that an import needs, as a multiple of the size of the blobs it downloads. Layers of usual images grow two-
    /// to threefold.
    pub space_factor: f64,
    /// Between which levels the store is kept.
    pub watermarks: Watermarks,
    /// Name (in /etc/passwd) or number of the account that imports run under. `nobody` if there is no such name.
    pub importer_user: String,
    /// The importer's whole environment: proxy variables, `SSL_CERT_FILE`, `SSL_CERT_DIR`.
    pub importer_environment: Vec<(String, String)>,
    /// Which images may be used, and by whom.
    pub policy: Policy,
    /// What the shell says about proxies in which root has typed the command that wants the image, if it is no job's.
    pub shell: Option<proxy::Variables>,
    /// The executable that has the internal roles.
    pub executable: PathBuf,
}

impl Default for ImportSettings {
    fn default() -> Self {
        Self {
            registries: RegistryConfig::default(),
            limits: ImportLimits { max_layer_bytes: 1 << 40, max_layer_entries: 10_000_000, max_connections: 8 },
            confirmation: Duration::from_secs(300),
            pull: PullPolicy::Recent,
            meaning: None,
            for_others: false,
            space_factor: 3.0,
            watermarks: Watermarks::default(),
            importer_user: "pyxis".into(),
            importer_environment: Vec::new(),
            policy: Policy::default(),
            shell: None,
            executable: "/proc/self/exe".into(),
        }
    }
}

impl ImportSettings {
    /// Whether what a tag means is asked of the registry.
    pub fn asks_for_tags(&self) -> bool {
        matches!(self.pull, PullPolicy::Always | PullPolicy::Recent)
    }

    /// What is said about proxies by the shell, or by the job with this environment.
    fn said_of_proxies(&self, environment: &Environment) -> (proxy::Source, proxy::Variables) {
        match &self.shell {
            Some(shell) => (proxy::Source::Command, shell.clone()),
            None => (proxy::Source::Job, self.registries.proxy.of_job(environment)),
        }
    }

    /// What the tag of `reference` means for all nodes of the step.
    fn meaning_of(&self, reference: &ImageReference) -> Option<&Meaning> {
        self.meaning.as_ref().filter(|meaning| self.asks_for_tags() && meaning.name == reference.to_string())
    }
}

/// Who wants which image.
#[derive(Debug, Clone, Copy)]
pub struct AcquireRequest<'a> {
    /// Whose credentials count, and who is given the image.
    pub user: &'a User,
    /// The image.
    pub reference: &'a ImageReference,
    /// The job's environment, for the user's credential files and helpers (`HOME`, `DOCKER_CONFIG`).
    pub environment: &'a Environment,
}

/// An image whose layers stay in the store as long as this value, or duplicates of the layers' descriptors, exist.
#[derive(Debug)]
pub struct AcquiredImage {
    /// The platform's manifest.
    pub manifest: Digest,
    /// The image config as it came from the registry: hostile input.
    pub config: Vec<u8>,
    /// Lowest layer first. A layer may occur more than once.
    pub layers: Vec<LeasedLayer>,
    /// What rules about images may want to know later.
    pub evidence: Evidence,
    /// Whether the registry was asked.
    pub from_network: bool,
}

/// What happens during [`acquire`], for the user and for the caller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportEvent {
    /// The registry is going to be asked: this may take a while.
    NetworkStart,
    /// A process was started; it does nothing before this event has been handled, so it can be moved to a cgroup.
    Process {
        /// Its process id.
        pid: u32,
    },
    /// The image was found. Of its layers, `missing` with `bytes` bytes of blobs are downloaded.
    Resolved {
        /// Layers of the image.
        layers: usize,
        /// Layers to download.
        missing: usize,
        /// Bytes to download.
        bytes: u64,
    },
    /// Part of a layer has arrived.
    Progress {
        /// Index of the layer, lowest first.
        layer: usize,
        /// Bytes of the blob so far.
        bytes: u64,
        /// Bytes of the blob.
        total: u64,
    },
    /// Something went wrong and is tried again: one line.
    Trouble(String),
    /// Some time has passed.
    Tick {
        /// Layers that other steps import.
        elsewhere: usize,
    },
    /// Another step of the user's imports the image. Said again and again.
    Waiting,
    /// What the image's tag means, as this node has learned now or a short time ago.
    Meant(Meaning),
    /// One line for the user: something may be wrong with the image or the credentials.
    Warning(String),
    /// One line for the administrator: the store is beyond its high watermark, whatever is removed.
    Crowded(String),
    /// One line for the node's log.
    Log(String),
}

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The importer says so; the message is a whole line.
    #[error("{message}")]
    Refused {
        /// Whose fault it is.
        kind: FailureKind,
        /// What, on what, why, next step.
        message: String,
    },
    /// A rule of the administrator's; the message is a whole line.
    #[error("{0}")]
    Policy(String),
    /// One of the cancel descriptors was hung up.
    #[error("import of {image} cancelled")]
    Cancelled {
        /// The image.
        image: String,
    },
    /// An image on this machine cannot be opened; the message is a whole line.
    #[error("{0}")]
    Source(String),
    /// The site's own importer has failed.
    #[error("{problem}")]
    SiteImporter {
        /// In pyxis's words.
        problem: String,
        /// What it said.
        log: Vec<String>,
    },
    /// The importer could not be started.
    #[error("cannot start the importer: {0}")]
    Start(String),
    /// The importer ended, hangs, or does not keep to the protocol.
    #[error("import of {image} failed: {reason}")]
    Importer {
        /// The image.
        image: String,
        /// What is wrong with the importer.
        reason: String,
    },
    /// A registry delivered a layer that other registries deliver differently.
    #[error(
        "layer {layer} as {origin} delivers it is not the one in the store: one of the two is forged, or was written by \
         another release of pyxis; compare the image's source, and remove the stored one with `pyxis gc --all`"
    )]
    Mismatch {
        /// The layer's diffID.
        layer: Digest,
        /// `HOST[:PORT]/REPOSITORY`.
        origin: String,
    },
    /// The registry was not to be asked.
    #[error(
        "the registry is not to be asked (--container-pull=never), and {image} is not in the store, or no registry has \
         confirmed within {seconds} s that you may have it: use --container-pull=missing"
    )]
    NotAsked {
        /// The image.
        image: String,
        /// `store.confirmation_seconds`.
        seconds: u64,
    },
    /// The file system of the store is too full.
    #[error(
        "no space to import {image}: about {needed} needed, {available} available in {path}, and the rest is in use: \
         free space there, or set store.path to a larger file system"
    )]
    NoSpace {
        /// The image.
        image: String,
        /// Estimate, human-readable.
        needed: String,
        /// What there is, human-readable.
        available: String,
        /// The store.
        path: String,
    },
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Finds the image and returns it with all its layers leased, importing what the store has not.
///
/// Single-threaded. `events` is called on the way. Fails with [`ImportError::Cancelled`] soon after one of `cancel` is
/// hung up (poll(2) POLLHUP, POLLRDHUP or POLLERR; data to read is no reason). The caller does not ignore SIGCHLD.
pub fn acquire(
    store: &Store,
    settings: &ImportSettings,
    request: AcquireRequest<'_>,
    pinned: &dyn PinnedMounts,
    cancel: &[BorrowedFd<'_>],
    events: &mut dyn FnMut(ImportEvent),
) -> Result<AcquiredImage, ImportError> {
    acquire_through(&Processes, store, settings, request, pinned, cancel, events)
}

/// [`acquire`], with importers of the caller's choice.
pub fn acquire_through(
    starter: &dyn StartImporter,
    store: &Store,
    settings: &ImportSettings,
    request: AcquireRequest<'_>,
    pinned: &dyn PinnedMounts,
    cancel: &[BorrowedFd<'_>],
    events: &mut dyn FnMut(ImportEvent),
) -> Result<AcquiredImage, ImportError> {
    Acquirer { starter, store, settings, pinned, cancel }.first_of_candidates(request, events)
}

/// What an import works with, by whatever name it tries the image.
#[derive(Clone, Copy)]
struct Acquirer<'a> {
    starter: &'a dyn StartImporter,
    store: &'a Store,
    settings: &'a ImportSettings,
    pinned: &'a dyn PinnedMounts,
    cancel: &'a [BorrowedFd<'a>],
}

impl Acquirer<'_> {
    /// The image by the first name of those it may have that a registry knows.
    fn first_of_candidates(
        self,
        request: AcquireRequest<'_>,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<AcquiredImage, ImportError> {
        let mut started = false;
        let mut events = |event| {
            if event != ImportEvent::NetworkStart || !std::mem::replace(&mut started, true) {
                events(event);
            }
        };
        let mut candidates = self.settings.registries.short_names.candidates(request.reference);
        if let Some(meant) = candidates.iter().find(|candidate| self.settings.meaning_of(candidate).is_some()) {
            candidates = vec![meant.clone()];
        }
        let mut before = Vec::new();
        for (index, reference) in candidates.iter().enumerate() {
            let request = AcquireRequest { reference, ..request };
            match self.by_name(request, &mut events) {
                // Only an answer sends on to the next one: a registry that is down must not change what a name means.
                Err(ImportError::Refused { kind: FailureKind::NotFound | FailureKind::Denied, message })
                    if index + 1 < candidates.len() =>
                {
                    before.push(message);
                }
                Err(ImportError::Refused { kind, message }) if !before.is_empty() => {
                    return Err(ImportError::Refused {
                        kind,
                        message: format!("{message}; before that, {}", before.join("; ")),
                    });
                }
                outcome => return outcome,
            }
        }
        // There is always one.
        Err(ImportError::Start("no registry to search".into()))
    }

    /// The image by the name that it is asked for.
    fn by_name(
        self,
        request: AcquireRequest<'_>,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<AcquiredImage, ImportError> {
        let Self { store, settings, pinned, cancel, .. } = self;
        if let Some(blocked) = settings.registries.blocked(request.reference) {
            let message = RegistryError::Blocked { image: request.reference.to_string(), blocked }.to_string();
            return Err(ImportError::Refused { kind: FailureKind::Denied, message });
        }
        let subject = Subject::registry(request.user, request.reference);
        let permission = permit::before(settings, &subject)?;
        let known = Known { store, settings, request, subject: &subject, permission };
        if settings.pull != PullPolicy::Always
            && let Some(image) = known.confirmed()?
        {
            known.meaning()?.into_iter().for_each(|meaning| events(ImportEvent::Meant(meaning)));
            return Ok(image);
        }
        if settings.pull == PullPolicy::Never {
            return Err(ImportError::NotAsked {
                image: request.reference.to_string(),
                seconds: settings.confirmation.as_secs(),
            });
        }
        events(ImportEvent::NetworkStart);
        // A thousand steps that begin at once ask once.
        let lock = match settings.pull {
            PullPolicy::Always => None,
            _ => match known.lock(cancel, events)? {
                Turn::Ours(lock) => Some(lock),
                Turn::Unlocked => None,
                Turn::Done(image) => {
                    known.meaning()?.into_iter().for_each(|meaning| events(ImportEvent::Meant(meaning)));
                    return Ok(AcquiredImage { from_network: true, ..image });
                }
            },
        };
        let mut ask = |reference: &ImageReference| {
            let request = AcquireRequest { reference, ..request };
            self.import(known, request, events)
        };
        let image = match known.pinned()? {
            Some(pinned) => match ask(&pinned) {
                // It is not there, or not any more, whatever the tag means now.
                Err(ImportError::Refused { kind: FailureKind::NotFound, .. }) => ask(request.reference),
                outcome => outcome,
            },
            None => ask(request.reference),
        }?;
        drop(lock);
        collect(store, settings, pinned, events);
        Ok(image)
    }

    /// Asks the registry for the image `request` and notes that its user was given it by the name in `known`.
    fn import(
        self,
        known: Known<'_>,
        request: AcquireRequest<'_>,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<AcquiredImage, ImportError> {
        let Self { starter, store, settings, pinned, cancel } = self;
        // What the registry says counts from before it was asked.
        let confirmed_at = now();
        let mut importer = starter.start(settings, request, events)?;
        let site_files = std::mem::take(&mut importer.site_files);
        let name = (Some(request.reference), known.request.reference.to_string());
        let mut session = Session::new(store, settings, name, pinned, cancel, events, importer);
        let image = session.resolve(&Command::Resolve {
            reference: request.reference.clone(),
            registries: Box::new(settings.registries.only_for(request.reference)),
            proxy: settings.said_of_proxies(request.environment),
            site_files,
            limits: settings.limits,
        })?;
        let evidence = session.examine(known.subject, image.manifest, known.ancestors(&image.manifest)?)?;
        if let Some(digest) = evidence.digests.first().copied() {
            (session.events)(ImportEvent::Meant(Meaning {
                asked_at: confirmed_at,
                digest,
                name: known.request.reference.to_string(),
            }));
        }
        let uid = request.user.uid;
        let before = store.manifest(uid, &image.manifest)?;
        let confirmed = settings.pull != PullPolicy::Always
            && before.is_some_and(|before| {
                is_fresh(before.confirmed_at, settings.confirmation)
                    && before.origin == image.origin
                    && before.layers == image.layers
            });
        let layers = session.obtain(&image, confirmed)?;
        drop(session);

        let config = store.keep_config(&image.config)?;
        let reference = without_password(known.request.reference);
        // What the tag means was said before, if it was not asked now.
        let meaning = settings.meaning_of(known.request.reference);
        let meant = meaning.filter(|meaning| evidence.digests.contains(&meaning.digest));
        let said_at = meant.map_or(confirmed_at, |meaning| meaning.asked_at.min(confirmed_at));
        let reference = ReferenceRecord { reference, manifest: image.manifest, evidence, confirmed_at: said_at };
        let manifest = ManifestRecord { origin: image.origin, config, layers: image.layers, confirmed_at };
        store.confirm(uid, &reference, &manifest)?;
        let (manifest, config, evidence) = (reference.manifest, image.config, reference.evidence);
        Ok(AcquiredImage { manifest, config, layers, evidence, from_network: true })
    }
}

/// Keeps the store between its watermarks, after it has grown.
fn collect(store: &Store, settings: &ImportSettings, pinned: &dyn PinnedMounts, events: &mut dyn FnMut(ImportEvent)) {
    match store.collect(Goal::Watermarks(settings.watermarks), pinned, false) {
        Ok(report) if report.removed.is_empty() => {}
        Ok(report) => events(ImportEvent::Log(format!(
            "removed {} ({}): the store was beyond its high watermark",
            count(report.removed.len(), "unused layer"),
            size(report.freed_bytes)
        ))),
        // The image is there: the next import or `pyxis gc` will try again.
        Err(error) => events(ImportEvent::Log(error.to_string())),
    }
    if let Ok(true) = store.beyond(settings.watermarks.high).map(|bytes| bytes > 0) {
        events(ImportEvent::Crowded(crowded(store, settings.watermarks.high)));
    }
}

/// What an administrator is told of a store that is beyond its high watermark although nothing is left to remove.
pub fn crowded(store: &Store, high: Watermark) -> String {
    let (path, what) = match high {
        Watermark::Percent(_) => (store.path().display(), "the file system of"),
        Watermark::Bytes(_) => (store.path().display(), "what jobs use in"),
    };
    format!(
        "{what} {path} is beyond the high watermark ({high}): images are removed as soon as no job uses them, and imported \
         again for the next one; free space there, or raise store.watermarks in pyxis.toml"
    )
}

/// Whether something confirmed at `at` still counts. The future does not: it comes from a wrong clock.
pub fn is_fresh(at: u64, confirmation: Duration) -> bool {
    now().checked_sub(at).is_some_and(|age| age < confirmation.as_secs())
}

/// The reference as the store may know it: secrets are not written down.
pub fn without_password(reference: &ImageReference) -> ImageReference {
    let user = reference.user.as_deref().map(|user| user.split(':').next().unwrap_or_default().to_owned());
    ImageReference { user, ..reference.clone() }
}

/// Text from outside as one line of at most `length` characters.
pub(super) fn one_line(text: &str, length: usize) -> String {
    let line: String =
        text.chars().map(|c| if c.is_whitespace() { ' ' } else { c }).filter(|c| !c.is_control()).collect();
    line.trim().chars().take(length).collect()
}
