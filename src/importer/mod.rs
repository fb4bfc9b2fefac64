//! The importer: the unprivileged process that talks to registries and turns blobs into layer images.
//!
//! It begins with the service account's identity, no capabilities and one descriptor, the channel to the broker
//! ([`protocol`]), and confines itself further ([`confine`]) before it reads anything from outside. One thread listens to
//! the broker, whose going ends everything at once; the others, as many as layers may be under way, take turns with what
//! it asks for. What happens to a layer is in [`layer`].

#![forbid(unsafe_code)]

pub(crate) mod confine;
pub mod failure;
pub mod inflate;
pub mod layer;
pub mod local;
pub mod pipe;
pub mod protocol;
mod signature;

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::process::ExitCode;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use failure::Failure;
use layer::ImportError;
use local::LocalImage;
use protocol::{Command, ImportLimits, LayerDescriptor, Report};

use crate::image::digest::Digest;
use crate::image::manifest::Descriptor;
use crate::image::platform::Platform;
use crate::import::{Converted, LayerError, LayerLimits, LayerSummary, write_squashfs};
use crate::registry::TROUBLE;
use crate::registry::credentials::remote::{Asker, RemoteKeys};
use crate::registry::credentials::{Keyrings, SharedKeyring, no_keys};
use crate::registry::places::{Places, Undelivered};
use crate::registry::proxy::Proxies;
use crate::registry::resolve::resolve;
use crate::squashfs;
use crate::sys::channel::Channel;
use crate::sys::memfile;
use crate::trace::{Heard, Listener};

/// How often progress is reported.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);
/// Most characters about something that is tried again.
const MAX_TROUBLE: usize = 300;

/// The channel as this end has it.
pub type BrokerChannel = Channel<Report, Command>;

/// The whole life of an importer process, from its role's identity on: confines the process and serves the broker.
/// Returns when the broker is gone; the caller then ends the process, and with it what is under way.
pub fn run(channel: BrokerChannel) -> ExitCode {
    if let Err(error) = confine::confine() {
        let reason = crate::sys::reason(error);
        eprintln!("pyxis: importer: cannot confine itself: {reason}");
        // The broker sees the end of the channel whether or not this arrives.
        let _ = channel.send(&Failure::local(format!("the importer cannot confine itself: {reason}")).report(), &[]);
        return ExitCode::FAILURE;
    }
    let channel = Arc::new(channel);
    let to_broker = Arc::clone(&channel);
    let wanted = |event: &tracing::Metadata<'_>| event.target() == TROUBLE;
    let heard = move |heard: &Heard| {
        let message = heard.to_string().chars().take(MAX_TROUBLE).collect();
        // A broker that is gone ends the process.
        let _ = to_broker.send(&Report::Trouble { message }, &[]);
    };
    Listener::new(wanted, heard).install();
    serve(channel)
}

/// Serves the broker in this process as it is.
pub fn serve(channel: impl Into<Arc<BrokerChannel>>) -> ExitCode {
    let channel = channel.into();
    let mut jobs: Option<Sender<Job>> = None;
    loop {
        let (command, descriptors) = match channel.receive() {
            Ok(Some(message)) => message,
            Ok(None) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("pyxis: importer: {}", crate::sys::reason(error));
                return ExitCode::FAILURE;
            }
        };
        let job = match (command, &jobs) {
            (command @ (Command::Resolve { .. } | Command::Open { .. }), None) => {
                let (sender, receiver) = channel_of_jobs();
                jobs = Some(sender);
                let start = Start { command, descriptors };
                let worker_channel = Arc::clone(&channel);
                let begun = thread::Builder::new()
                    .name("resolve".into())
                    .spawn(move || begin(start, &worker_channel, receiver));
                if let Err(error) = begun {
                    fail(&channel, Failure::local(format!("cannot start a thread: {}", crate::sys::reason(error))));
                }
                continue;
            }
            (Command::Convert { limits }, None) => {
                let (sender, _) = channel_of_jobs();
                jobs = Some(sender);
                let worker_channel = Arc::clone(&channel);
                let begun = thread::Builder::new().name("convert".into()).spawn(move || {
                    match convert(descriptors, &limits, &worker_channel) {
                        // A broker that is gone ends the process.
                        Ok(report) => drop(worker_channel.send(&report, &[])),
                        Err(failure) => fail(&worker_channel, failure),
                    }
                });
                if let Err(error) = begun {
                    fail(&channel, Failure::local(format!("cannot start a thread: {}", crate::sys::reason(error))));
                }
                continue;
            }
            (Command::Examine { keys, digests }, Some(_)) => Job::Examine { keys, digests },
            (Command::Confirm { layer }, Some(_)) => Job::Confirm { layer },
            (Command::Fetch { layer }, Some(_)) => match descriptors.into_iter().next() {
                Some(out) => Job::Fetch { layer, out: out.into() },
                None => {
                    fail(&channel, Failure::local("the broker sent no file for a layer"));
                    continue;
                }
            },
            _ => {
                fail(&channel, Failure::local("the broker sent a command out of turn"));
                continue;
            }
        };
        if let Some(jobs) = &jobs {
            // Nobody listens after a failure, which ends the conversation.
            let _ = jobs.send(job);
        }
    }
}

/// What to find.
struct Start {
    command: Command,
    descriptors: Vec<OwnedFd>,
}

/// What to do, for one layer or for the image.
enum Job {
    Examine { keys: Vec<String>, digests: Vec<Digest> },
    Confirm { layer: usize },
    Fetch { layer: usize, out: File },
}

/// What the broker asks for, for whichever thread is free.
type Jobs = Arc<Mutex<Receiver<Job>>>;

fn channel_of_jobs() -> (Sender<Job>, Jobs) {
    let (sender, receiver) = channel();
    (sender, Arc::new(Mutex::new(receiver)))
}

/// An image that was found.
struct Image {
    origin: Origin,
    /// Digests of the manifest and of what led to it.
    digests: Vec<Digest>,
    layers: Vec<LayerDescriptor>,
    limits: LayerLimits,
}

/// Where its layers come from.
enum Origin {
    Registry(Places),
    Local(LocalImage),
}

/// Finds the image, then works, with more threads like this one.
fn begin(start: Start, channel: &Arc<BrokerChannel>, jobs: Jobs) {
    let limits = match &start.command {
        Command::Resolve { limits, .. } | Command::Open { limits, .. } => *limits,
        Command::Convert { .. } | Command::Examine { .. } | Command::Confirm { .. } | Command::Fetch { .. } => return,
    };
    let threads = worker_count(limits.max_connections);
    let image = match find(start, channel) {
        Ok(image) => Arc::new(image),
        Err(failure) => return fail(channel, failure),
    };
    for _ in 1..threads {
        let (image, channel, jobs) = (Arc::clone(&image), Arc::clone(channel), Arc::clone(&jobs));
        // With fewer threads it takes longer.
        let _ = thread::Builder::new().name("layer".into()).spawn(move || work(&image, &channel, &jobs));
    }
    work(&image, channel, &jobs);
}

/// Layers at the same time: enough to fill all processors while some wait for the network, and few enough that their
/// buffers stay small.
fn worker_count(most: usize) -> usize {
    let processors = thread::available_parallelism().map_or(1, usize::from);
    processors.clamp(3, 8).min(most).max(1)
}

fn find(start: Start, channel: &BrokerChannel) -> Result<Image, Failure> {
    let mut descriptors = start.descriptors.into_iter();
    let (image, report, config) = match start.command {
        Command::Resolve { reference, mut registries, proxy: (source, said), site_files, limits } => {
            registries.proxies = Proxies::of_import(&registries.proxy, (source, &said));
            let user: SharedKeyring = match descriptors.next() {
                Some(channel) => Arc::new(RemoteKeys::new(Asker::from(channel))),
                None => no_keys(),
            };
            let files = std::iter::zip(site_files, descriptors.by_ref().map(File::from));
            let site = registries.read_site_files(files).map_err(|(path, error)| {
                Failure::local(format!("cannot read {}: {}", path.display(), crate::sys::reason(error)))
            })?;
            let keyring: SharedKeyring = Arc::new(Keyrings(vec![user, Arc::new(site)]));
            let found = resolve(&reference, &registries, &keyring, &Platform::host())?;
            let layers: Vec<LayerDescriptor> = std::iter::zip(&found.manifest.layers, &found.config.diff_ids)
                .map(|(layer, diff_id)| LayerDescriptor { blob: layer.digest, diff_id: *diff_id, size: layer.size })
                .collect();
            let report = Report::Resolved {
                manifest: found.manifest_digest,
                origin: found.client.endpoint().origin(),
                layers: layers.clone(),
                warnings: found.warnings,
            };
            let origin = Origin::Registry(Places::new(found.client, found.others));
            (Image::new(origin, found.digests, layers, &limits), report, found.config_bytes)
        }
        Command::Open { form, wanted, name, shown, limits } => {
            let source = descriptors.next().ok_or_else(|| Failure::local("the broker sent no image"))?;
            let source = (form, source, descriptors.next());
            let mut found = local::find(source, wanted, name.as_deref(), &shown, &Platform::host())?;
            let layers = found.layers.clone();
            let report = Report::Resolved {
                manifest: found.manifest_digest,
                origin: String::new(),
                layers: layers.clone(),
                warnings: std::mem::take(&mut found.warnings),
            };
            let config = std::mem::take(&mut found.config_bytes);
            let digests = vec![found.manifest_digest];
            (Image::new(Origin::Local(found), digests, layers, &limits), report, config)
        }
        Command::Convert { .. } | Command::Examine { .. } | Command::Confirm { .. } | Command::Fetch { .. } => {
            return Err(Failure::local("nothing to find"));
        }
    };
    let config = memfile::sealed("pyxis-image-config", &config)
        .map_err(|error| Failure::local(format!("cannot pass the image config on: {}", crate::sys::reason(error))))?;
    channel
        .send(&report, &[config.as_fd()])
        .map_err(|error| Failure::local(format!("cannot tell the broker: {}", crate::sys::reason(error))))?;
    Ok(image)
}

/// Does what the broker asks for until it asks for nothing more, or something fails.
fn work(image: &Image, channel: &BrokerChannel, jobs: &Jobs) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let outcome = match next {
            Ok(Job::Examine { keys, digests }) => examine(image, &keys, &digests),
            Ok(Job::Confirm { layer }) => confirm(image, layer),
            Ok(Job::Fetch { layer, out }) => fetch(image, layer, &out, channel),
            Err(_) => return,
        };
        match outcome {
            // A broker that is gone ends the process.
            Ok(report) => {
                let _ = channel.send(&report, &[]);
            }
            Err(failure) => return fail(channel, failure),
        }
    }
}

/// Makes a layer of a squashfs file.
fn convert(descriptors: Vec<OwnedFd>, limits: &ImportLimits, channel: &BrokerChannel) -> Result<Report, Failure> {
    let mut descriptors = descriptors.into_iter().map(File::from);
    let (Some(file), Some(out)) = (descriptors.next(), descriptors.next()) else {
        return Err(Failure::local("the broker sent no squashfs file"));
    };
    let limits = LayerLimits { max_bytes: limits.max_layer_bytes, max_entries: limits.max_layer_entries };
    let mut progress = Progress::new(0, channel);
    let written = squashfs::reader::Image::open(file).map_err(LayerError::from);
    let written = written.and_then(|image| write_squashfs(&image, &out, &limits, |bytes| progress.add(bytes)));
    let Converted { content, image, .. } = written.map_err(ImportError::Layer)?;
    Ok(Report::Converted { content, image })
}

/// Tells the broker now and then how far a layer has come.
struct Progress<'a> {
    layer: usize,
    channel: &'a BrokerChannel,
    unreported: u64,
    last: Instant,
}

impl<'a> Progress<'a> {
    fn new(layer: usize, channel: &'a BrokerChannel) -> Self {
        Self { layer, channel, unreported: 0, last: Instant::now() }
    }

    fn add(&mut self, bytes: u64) {
        self.unreported += bytes;
        if self.last.elapsed() >= PROGRESS_INTERVAL {
            let bytes = std::mem::take(&mut self.unreported);
            // A broker that is gone ends the process.
            let _ = self.channel.send(&Report::Progress { layer: self.layer, bytes }, &[]);
            self.last = Instant::now();
        }
    }
}

fn fail(channel: &BrokerChannel, failure: Failure) {
    // As above.
    let _ = channel.send(&failure.report(), &[]);
}

impl Image {
    fn new(origin: Origin, digests: Vec<Digest>, layers: Vec<LayerDescriptor>, limits: &ImportLimits) -> Self {
        let limits = LayerLimits { max_bytes: limits.max_layer_bytes, max_entries: limits.max_layer_entries };
        Self { origin, digests, layers, limits }
    }

    fn layer(&self, index: usize) -> Result<&LayerDescriptor, Failure> {
        self.layers
            .get(index)
            .ok_or_else(|| Failure::local(format!("the broker asks for layer {index}, which is none")))
    }
}

/// Looks for a signature of one of `digests` that one of `keys` has made.
fn examine(image: &Image, keys: &[String], digests: &[Digest]) -> Result<Report, Failure> {
    let found = match &image.origin {
        _ if keys.is_empty() => Err(String::new()),
        Origin::Registry(places) => {
            let upstream = places.others().filter(|other| !other.endpoint().mirror);
            signature::find(std::iter::once(places.found().as_ref()).chain(upstream), digests, keys)?
        }
        Origin::Local(_) => Err("it comes from no registry".into()),
    };
    let (signed_by, problem) = found.map_or_else(|problem| (None, problem), |key| (Some(key), String::new()));
    Ok(Report::Examined { digests: image.digests.clone(), signed_by, problem })
}

fn confirm(image: &Image, layer: usize) -> Result<Report, Failure> {
    let descriptor = image.layer(layer)?;
    let allowed = match &image.origin {
        Origin::Registry(places) => places.found().may_have(&descriptor.blob)?,
        // Nobody but the bytes can say so.
        Origin::Local(_) => false,
    };
    Ok(Report::Confirmed { layer, allowed })
}

fn fetch(image: &Image, layer: usize, out: &File, channel: &BrokerChannel) -> Result<Report, Failure> {
    let descriptor = image.layer(layer)?;
    let mut reported = Progress::new(layer, channel);
    let progress = |bytes: u64| reported.add(bytes);
    let about = format!("layer {}", descriptor.blob);
    let summary = match &image.origin {
        Origin::Registry(places) => {
            let summary = download(places, layer, descriptor, (out, &image.limits), channel, progress);
            let summary = summary.map_err(|failure| failure.about(&about))?;
            return Ok(Report::Fetched { layer, unpacked: summary.unpacked, image: summary.image });
        }
        Origin::Local(local) => {
            let blob = local.blob(layer).map_err(|failure| failure.about(&about))?;
            if local.has_blob_digests {
                layer::import(blob, descriptor, out, &image.limits, progress)
            } else {
                layer::import_by_diff_id(blob, &descriptor.diff_id, out, &image.limits, progress)
            }
        }
    };
    let summary = summary.map_err(|error| Failure::from(error).about(&about))?;
    Ok(Report::Fetched { layer, unpacked: summary.unpacked, image: summary.image })
}

/// Imports a layer from a registry, or from another place that has it.
fn download(
    places: &Places,
    layer: usize,
    descriptor: &LayerDescriptor,
    (out, limits): (&File, &LayerLimits),
    channel: &BrokerChannel,
    mut progress: impl FnMut(u64) + Send,
) -> Result<LayerSummary, Failure> {
    let blob = Descriptor { media_type: String::new(), digest: descriptor.blob, size: descriptor.size };
    let downloaded = places.download(&blob, |stream| {
        let emptied = out.set_len(0).map_err(|error| ImportError::Layer(LayerError::Write(error)));
        emptied
            .and_then(|()| layer::import(stream, descriptor, out, limits, &mut progress))
            .map_err(ImportError::sorted)
    });
    match downloaded {
        Ok((summary, client)) => {
            if !Arc::ptr_eq(client, places.found()) {
                // A broker that is gone ends the process.
                let _ = channel.send(&Report::Elsewhere { layer, origin: client.endpoint().origin() }, &[]);
            }
            Ok(summary)
        }
        Err(Undelivered { error, again }) => {
            let failure = Failure::from(error);
            Err(again.into_iter().fold(failure, |failure, again| failure.with(&again)))
        }
    }
}
