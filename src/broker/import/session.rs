//! The conversation with one importer, and what becomes of each layer.
//!
//! A layer that is in the store is confirmed by the registry, or fetched again as proof (see [`crate::store`] for when);
//! one that is missing is fetched under its lock, or awaited if another broker has that lock:
//!
//! ```text
//! in the store, from this registry ─▶ Confirming ─ allowed ───────────────────────────▶ Ready
//!                                          └ refused ─▶ Proving
//! in the store, from elsewhere ──────▶ Proving ─ fetched, the same bytes ─────────────▶ Ready
//! missing, lock free ────────────────▶ Fetching ─ fetched, published, lock released ──▶ Ready
//! missing, lock taken ───────────────▶ Waiting ─ lock free, or layer there ─▶ one of the above
//! ```
//!
//! Locks are only ever tried, and every lock that is held belongs to a fetch that goes on whatever others do. So no two
//! brokers wait for each other, and a broker whose competitor fails takes over.

#![forbid(unsafe_code)]

mod convert;
mod examine;
mod reports;

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use super::process::Importer;
use super::{ImportError, ImportEvent, ImportSettings, one_line};
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::importer::protocol::{Command, LayerDescriptor, Report};
use crate::store::{FetchLock, Goal, LeasedLayer, NewLayer, PinnedMounts, Store, StoreError, count, size};

/// Most layers of an image: what overlayfs can stack.
const MAX_LAYERS: usize = 500;
/// Longest message of the importer that is passed on.
const MAX_MESSAGE: usize = 1000;
/// Most warnings about an image that are passed on.
const MAX_WARNINGS: usize = 20;
/// How often a lock is tried that another broker holds.
const RETRY_PAUSE: Duration = Duration::from_millis(100);
/// How long to wait for another process that collects already.
const COLLECTION_TIMEOUT: Duration = Duration::from_secs(60);

/// What the registry said the image is.
#[derive(Debug)]
pub(super) struct Resolved {
    pub manifest: Digest,
    pub config: Vec<u8>,
    pub origin: String,
    pub layers: Vec<LayerDescriptor>,
}

/// One import.
pub(super) struct Session<'a, 'e> {
    pub store: &'a Store,
    pub settings: &'a ImportSettings,
    /// The image's registry; `None` if it is on this machine.
    pub registry: Option<&'a ImageReference>,
    /// What the user calls the image.
    pub shown: String,
    pub pinned: &'a dyn PinnedMounts,
    pub cancel: &'a [BorrowedFd<'a>],
    pub events: &'e mut dyn FnMut(ImportEvent),
    pub importer: Importer,
    /// When the importer last did something useful.
    active: Instant,
    /// When whoever shows the progress was last told that time passes.
    ticked: Instant,
    /// Layers that other brokers fetch.
    elsewhere: usize,
}

/// A layer on its way. The index in the manifest is that of its first occurrence.
struct Layer<'a> {
    descriptor: LayerDescriptor,
    state: State<'a>,
    /// Where it came from, if not from where the image was found.
    elsewhere: Option<String>,
}

enum State<'a> {
    /// In the store. `known`: the registry's host delivered this blob before.
    Present { lease: LeasedLayer, known: bool },
    /// Not in the store.
    Missing,
    /// Another broker fetches it.
    Waiting,
    /// The registry has been asked whether the user may have it.
    Confirming(LeasedLayer),
    /// Being downloaded although it is there.
    Proving { stored: LeasedLayer, new: NewLayer<'a>, received: u64 },
    /// Being downloaded.
    Fetching { lock: FetchLock<'a>, new: NewLayer<'a>, received: u64 },
    /// The user may have it.
    Ready(LeasedLayer),
}

impl State<'_> {
    /// Whether an answer of the importer is due.
    fn is_asked(&self) -> bool {
        matches!(self, Self::Confirming(_) | Self::Proving { .. } | Self::Fetching { .. })
    }
}

impl<'a, 'e> Session<'a, 'e> {
    pub fn new(
        store: &'a Store,
        settings: &'a ImportSettings,
        (registry, shown): (Option<&'a ImageReference>, String),
        pinned: &'a dyn PinnedMounts,
        cancel: &'a [BorrowedFd<'a>],
        events: &'e mut dyn FnMut(ImportEvent),
        importer: Importer,
    ) -> Self {
        let shown = one_line(&shown, 300);
        Self {
            store,
            settings,
            registry,
            shown,
            pinned,
            cancel,
            events,
            importer,
            active: Instant::now(),
            ticked: Instant::now(),
            elsewhere: 0,
        }
    }

    /// Has the importer find the image by its first command.
    pub fn resolve(&mut self, command: &Command) -> Result<Resolved, ImportError> {
        let descriptors = std::mem::take(&mut self.importer.descriptors);
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let sent = self.importer.channel.send(command, &borrowed);
        drop(descriptors);
        self.sent(sent)?;
        loop {
            match self.next_report(None)? {
                Some((Report::Resolved { manifest, origin, layers, warnings }, descriptors)) => {
                    let config = self.read_config(descriptors)?;
                    self.check_origin(&origin)?;
                    if layers.len() > MAX_LAYERS {
                        return Err(self.misbehaves(&format!("{} layers reported", layers.len())));
                    }
                    for warning in warnings.iter().take(MAX_WARNINGS) {
                        (self.events)(ImportEvent::Warning(one_line(warning, MAX_MESSAGE)));
                    }
                    return Ok(Resolved { manifest, config, origin, layers });
                }
                Some((report, _)) => return Err(self.unexpected(&report)),
                None => {}
            }
        }
    }

    /// Every layer of the image, lowest first, each leased and allowed to this user. `confirmed`: the registry said so
    /// for the whole manifest a short time ago.
    pub fn obtain(&mut self, image: &Resolved, confirmed: bool) -> Result<Vec<LeasedLayer>, ImportError> {
        let mut first = BTreeMap::new();
        let mut layers = BTreeMap::new();
        for (index, descriptor) in image.layers.iter().enumerate() {
            let at = *first.entry((descriptor.blob, descriptor.diff_id)).or_insert(index);
            if at == index {
                let state = match self.look_up(descriptor, &image.origin)? {
                    State::Present { lease, .. } if confirmed => State::Ready(lease),
                    state => state,
                };
                layers.insert(index, Layer { descriptor: descriptor.clone(), state, elsewhere: None });
            }
        }
        self.make_room(image.layers.len(), &layers)?;
        self.run(&mut layers, &image.origin)?;

        let mut leases: BTreeMap<usize, LeasedLayer> = BTreeMap::new();
        for (index, layer) in layers {
            match layer.state {
                State::Ready(lease) => leases.insert(index, lease),
                _ => return Err(self.failed("a layer was forgotten")),
            };
        }
        let mut all = Vec::with_capacity(image.layers.len());
        for descriptor in &image.layers {
            let lease = first.get(&(descriptor.blob, descriptor.diff_id)).and_then(|index| leases.get(index));
            let file = lease.map(|lease| lease.file.try_clone()).transpose();
            match file.map_err(|error| self.failed(&crate::sys::reason(error)))? {
                Some(file) => all.push(LeasedLayer { diff_id: descriptor.diff_id, file }),
                None => return Err(self.failed("a layer was forgotten")),
            }
        }
        Ok(all)
    }

    /// What the store has of a layer.
    fn look_up(&self, descriptor: &LayerDescriptor, origin: &str) -> Result<State<'a>, ImportError> {
        let Some(lease) = self.store.lease(&descriptor.diff_id)? else { return Ok(State::Missing) };
        if self.registry.is_none() {
            // Nobody vouches for the bytes of a file but the bytes.
            return Ok(State::Present { lease, known: false });
        }
        let record = self.store.blob(&descriptor.blob)?.filter(|record| record.diff_id == descriptor.diff_id);
        let known = record.is_some_and(|record| record.origins.iter().any(|known| host(known) == host(origin)));
        Ok(State::Present { lease, known })
    }

    /// Announces the downloads, and collects if there is too little space for them.
    fn make_room(&mut self, count: usize, layers: &BTreeMap<usize, Layer<'a>>) -> Result<(), ImportError> {
        let (mut missing, mut bytes, mut own_bytes) = (0, 0_u64, 0_u64);
        for layer in layers.values() {
            let own = match &layer.state {
                State::Missing => !self.store.is_locked(&layer.descriptor.diff_id)?,
                State::Present { known: false, .. } => true,
                _ => continue,
            };
            missing += 1;
            bytes = bytes.saturating_add(layer.descriptor.size);
            if own {
                own_bytes = own_bytes.saturating_add(self.space(&layer.descriptor));
            }
        }
        (self.events)(ImportEvent::Resolved { layers: count, missing, bytes });
        self.ensure_space(own_bytes)
    }

    /// About how much space a layer takes.
    fn space(&self, descriptor: &LayerDescriptor) -> u64 {
        if descriptor.blob == descriptor.diff_id {
            // Not compressed.
            return descriptor.size;
        }
        // Saturates at the bounds of u64.
        (descriptor.size as f64 * self.settings.space_factor) as u64
    }

    /// Makes sure that `needed` bytes are available to new layers.
    fn ensure_space(&mut self, needed: u64) -> Result<(), ImportError> {
        let deadline = Instant::now() + COLLECTION_TIMEOUT;
        loop {
            if self.store.available()? >= needed {
                return Ok(());
            }
            match self.store.collect(Goal::Available(needed), self.pinned, false) {
                Ok(report) => {
                    let (layers, freed) = (count(report.removed.len(), "unused layer"), size(report.freed_bytes));
                    let text = format!("removed {layers} ({freed}) to make room for {}", self.image());
                    (self.events)(ImportEvent::Log(text));
                    break;
                }
                Err(StoreError::Collecting { .. }) if Instant::now() < deadline => self.pause()?,
                Err(StoreError::Collecting { .. }) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let available = self.store.available()?;
        if available >= needed {
            return Ok(());
        }
        Err(ImportError::NoSpace {
            image: self.image(),
            needed: size(needed),
            available: size(available),
            path: self.store.path().display().to_string(),
        })
    }

    /// Works until every layer is ready.
    fn run(&mut self, layers: &mut BTreeMap<usize, Layer<'a>>, origin: &str) -> Result<(), ImportError> {
        // The largest first: it takes longest, and the rest fits beside it. A bounded number at a time: each is up to
        // three descriptors, and a message that waits in the socket.
        let mut order: Vec<usize> = layers.keys().copied().collect();
        order.sort_by_key(|index| layers.get(index).map(|layer| std::cmp::Reverse(layer.descriptor.size)));
        let mut queue = VecDeque::from(order);
        let window = (2 * self.settings.limits.max_connections).clamp(4, 64);
        self.active = Instant::now();
        loop {
            let mut asked = layers.values().filter(|layer| layer.state.is_asked()).count();
            while asked < window
                && let Some(index) = queue.pop_front()
                && let Some(layer) = layers.get_mut(&index)
            {
                self.begin(index, layer, origin)?;
                asked += usize::from(layer.state.is_asked());
            }
            let waiting: Vec<usize> = layers
                .iter()
                .filter(|(_, layer)| matches!(layer.state, State::Waiting))
                .map(|(index, _)| *index)
                .collect();
            self.elsewhere = waiting.len();
            if asked == 0 && waiting.is_empty() {
                return Ok(());
            }
            if asked == 0 {
                // Nothing is asked of the importer: it may be silent.
                self.active = Instant::now();
            }
            let timeout = (!waiting.is_empty()).then_some(RETRY_PAUSE);
            match self.next_report(timeout)? {
                Some((report, _)) => self.handle(report, layers, origin)?,
                None => {
                    for index in waiting {
                        queue.push_back(index);
                    }
                }
            }
        }
    }

    /// Takes a layer one step on, as far as that goes without waiting.
    fn begin(&mut self, index: usize, layer: &mut Layer<'a>, origin: &str) -> Result<(), ImportError> {
        let Layer { descriptor, state, .. } = layer;
        let waited = matches!(state, State::Waiting);
        if matches!(state, State::Waiting | State::Missing) {
            *state = self.look_up(descriptor, origin)?;
        }
        if matches!(state, State::Missing) {
            let Some(lock) = self.store.try_lock(&descriptor.diff_id)? else {
                if !waited {
                    let text = format!("waiting for another job's import of layer {}", descriptor.diff_id);
                    (self.events)(ImportEvent::Log(text));
                }
                *state = State::Waiting;
                return Ok(());
            };
            // The previous holder may have published it just before.
            *state = self.look_up(descriptor, origin)?;
            if matches!(state, State::Missing) {
                if waited {
                    self.ensure_space(self.space(descriptor))?;
                }
                let new = self.store.new_layer()?;
                self.fetch(index, &new)?;
                *state = State::Fetching { lock, new, received: 0 };
                return Ok(());
            }
        }
        *state = match std::mem::replace(state, State::Missing) {
            State::Present { lease, known: true } => {
                let sent = self.importer.channel.send(&Command::Confirm { layer: index }, &[]);
                self.sent(sent)?;
                State::Confirming(lease)
            }
            State::Present { lease, known: false } => {
                if waited {
                    self.ensure_space(self.space(descriptor))?;
                }
                self.prove(index, lease)?
            }
            other => other,
        };
        Ok(())
    }

    /// Asks for a layer that is there, to see that the registry lets this user have it.
    fn prove(&mut self, index: usize, stored: LeasedLayer) -> Result<State<'a>, ImportError> {
        let new = self.store.new_layer()?;
        self.fetch(index, &new)?;
        Ok(State::Proving { stored, new, received: 0 })
    }

    fn fetch(&mut self, index: usize, new: &NewLayer<'_>) -> Result<(), ImportError> {
        let sent = self.importer.channel.send(&Command::Fetch { layer: index }, &[new.as_fd()]);
        self.sent(sent)
    }

    /// A report about a layer. Only answers to questions that are open are accepted.
    fn handle(
        &mut self,
        report: Report,
        layers: &mut BTreeMap<usize, Layer<'a>>,
        origin: &str,
    ) -> Result<(), ImportError> {
        let (Report::Confirmed { layer: index, .. }
        | Report::Progress { layer: index, .. }
        | Report::Elsewhere { layer: index, .. }
        | Report::Fetched { layer: index, .. }) = report
        else {
            return Err(self.unexpected(&report));
        };
        let Some(Layer { descriptor, state, elsewhere }) = layers.get_mut(&index) else {
            return Err(self.unexpected(&report));
        };
        match (&report, &mut *state) {
            (Report::Progress { bytes, .. }, State::Fetching { received, .. } | State::Proving { received, .. }) => {
                if *bytes > 0 {
                    self.active = Instant::now();
                }
                *received = received.saturating_add(*bytes).min(descriptor.size);
                let (bytes, total) = (*received, descriptor.size);
                (self.events)(ImportEvent::Progress { layer: index, bytes, total });
                return Ok(());
            }
            (Report::Elsewhere { origin, .. }, State::Fetching { .. } | State::Proving { .. }) => {
                self.check_origin(origin)?;
                *elsewhere = Some(origin.clone());
                return Ok(());
            }
            (Report::Confirmed { .. }, State::Confirming(_)) => {}
            (Report::Fetched { unpacked, .. }, State::Fetching { .. } | State::Proving { .. })
                if *unpacked <= self.settings.limits.max_layer_bytes => {}
            _ => return Err(self.unexpected(&report)),
        }
        self.active = Instant::now();
        if matches!(report, Report::Fetched { .. }) {
            let total = descriptor.size;
            (self.events)(ImportEvent::Progress { layer: index, bytes: total, total });
        }
        // Nobody else is said to have delivered it.
        let origin = elsewhere.as_deref().unwrap_or(origin);
        *state = match (report, std::mem::replace(state, State::Missing)) {
            (Report::Confirmed { allowed: true, .. }, State::Confirming(lease)) => State::Ready(lease),
            (Report::Confirmed { .. }, State::Confirming(lease)) => {
                self.ensure_space(self.space(descriptor))?;
                self.prove(index, lease)?
            }
            (Report::Fetched { image, .. }, State::Fetching { lock, new, .. }) => {
                let sealed = new.seal(&descriptor.diff_id, image)?;
                // Before the layer has its name: who sees the layer finds the record.
                self.note_blob(descriptor, origin)?;
                let lease = sealed.publish()?;
                drop(lock);
                State::Ready(lease)
            }
            (Report::Fetched { image, .. }, State::Proving { stored, new, .. }) => {
                if !new.seal(&descriptor.diff_id, image)?.proves(&stored)? {
                    let origin = if origin.is_empty() { self.image() } else { origin.to_owned() };
                    return Err(ImportError::Mismatch { layer: descriptor.diff_id, origin });
                }
                self.note_blob(descriptor, origin)?;
                State::Ready(stored)
            }
            (_, state) => state,
        };
        Ok(())
    }

    /// Notes what a registry has delivered. What a user has in a file says nothing about any registry.
    fn note_blob(&self, descriptor: &LayerDescriptor, origin: &str) -> Result<(), StoreError> {
        if self.registry.is_some() { self.store.note_blob(descriptor, origin) } else { Ok(()) }
    }

    /// Lets some time pass, unless the import is cancelled.
    fn pause(&self) -> Result<(), ImportError> {
        pause(self.cancel, &self.shown)
    }

    /// An importer that speaks for one registry must not vouch for layers of another.
    fn check_origin(&self, origin: &str) -> Result<(), ImportError> {
        let Some(reference) = self.registry else { return Ok(()) };
        if self.settings.registries.endpoints(reference).iter().any(|endpoint| endpoint.origin() == origin) {
            return Ok(());
        }
        Err(self.misbehaves(&format!("\"{}\" was not to be asked", one_line(origin, 200))))
    }

    fn image(&self) -> String {
        self.shown.clone()
    }
}

/// Lets some time pass, unless the import of `shown` is cancelled.
pub(super) fn pause(cancel: &[BorrowedFd<'_>], shown: &str) -> Result<(), ImportError> {
    let mut watched: Vec<_> = cancel.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)).collect();
    let timeout = RETRY_PAUSE.try_into().ok();
    match rustix::event::poll(&mut watched, timeout.as_ref()) {
        Ok(0) | Err(_) => Ok(()),
        Ok(_) => Err(ImportError::Cancelled { image: shown.to_owned() }),
    }
}

/// The host of an origin.
fn host(origin: &str) -> &str {
    origin.split('/').next().unwrap_or(origin)
}
