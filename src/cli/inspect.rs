//! `pyxis inspect`: what an image is made of, in a registry or on this machine, and what a container of it would be.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use super::enroot::{Asking, Context};
use super::unprivileged;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;
use crate::importer::local;
use crate::importer::protocol::{LayerDescriptor, Report};
use crate::options::Options;
use crate::options::table::OptionId;
use crate::request::{ImageSource, LocalImage};
use crate::source::{FromReader, SourceForm, ToReader, reader};
use crate::squashfs::reader::Image as Squashfs;
use crate::store::{Store, size};
use crate::sys::channel::{self, Channel};

/// Show what an image is made of.
///
/// Asks the registry with the credentials of who types the command, and reads images in files and container engines. Nothing
/// is downloaded but manifest and config. What a container's root filesystem would be mounted from, under a layer of its own,
/// is listed topmost first.
#[derive(Debug, Clone, clap::Args)]
pub struct InspectArgs {
    /// Architecture of the image, if not that of this machine
    #[arg(long, value_name = "NAME")]
    arch: Option<String>,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// As for --container-image: [USER@][REGISTRY#]IMAGE[:TAG], a path, dockerd://IMAGE
    #[arg(value_name = "IMAGE")]
    image: String,
}

/// For the man page.
pub const JSON: &str = "\
One object:
  image         the image, as it is called in full
  form          registry, layout, archive, or squashfs
  origin        HOST[:PORT]/REPOSITORY that answered: the registry, or a mirror of it; null for images on this machine
  digests       digests of the index, if there is one, and of the manifest; empty for squashfs files
  os, architecture  what the image is for; empty if it does not say
  bytes         size of the layers as they are stored there
  layers        list of objects, lowest layer first: blob, diff_id, bytes, stored (whether this node's store has the
                layer; null if that is not for us to see)
  root          what a container's root filesystem is stacked from, topmost first: diffIDs
  config        user, env, entrypoint, cmd, working_dir, volumes, labels, as the image has them; null for squashfs files
  warnings      list of lines";

type Error = Box<dyn std::error::Error>;

/// What is known of an image.
#[derive(Debug, Serialize, Deserialize)]
struct Inspection {
    image: String,
    form: String,
    origin: Option<String>,
    digests: Vec<Digest>,
    os: String,
    architecture: String,
    bytes: u64,
    layers: Vec<Layer>,
    root: Vec<Digest>,
    config: Option<Config>,
    warnings: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Layer {
    blob: Digest,
    diff_id: Digest,
    bytes: u64,
    stored: Option<bool>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Config {
    user: String,
    env: Vec<String>,
    entrypoint: Vec<String>,
    cmd: Vec<String>,
    working_dir: String,
    volumes: Vec<String>,
    labels: BTreeMap<String, String>,
}

/// Runs the command.
pub fn run(args: &InspectArgs, config: &Path) -> Result<ExitCode, Error> {
    let context = Context::load(config)?;
    let platform = match &args.arch {
        None => Platform::host(),
        Some(name) => Platform::of(name).ok_or_else(|| format!("unknown architecture: {}", name.escape_debug()))?,
    };
    let mut options = Options::default();
    options.set(OptionId::Image, args.image.as_bytes())?;
    let source = options.image.ok_or("no image")?;
    let mut found = inspect(&source, &platform, &context)?;
    if rustix::process::geteuid().is_root()
        && let Ok(store) = Store::open(&context.config.store.path)
    {
        for layer in &mut found.layers {
            layer.stored = store.lease(&layer.diff_id).ok().map(|lease| lease.is_some());
        }
    }
    match args.json {
        true => println!("{}", serde_json::to_string(&found)?),
        false => print!("{}", found.describe()),
    }
    Ok(ExitCode::SUCCESS)
}

fn inspect(source: &ImageSource, platform: &Platform, context: &Context) -> Result<Inspection, Error> {
    let account = unprivileged::account(&context.config.import.user);
    let (image, shown) = match source {
        ImageSource::Registry { reference, .. } => {
            return Ok(context.unprivileged(reference, |asking| of_registry(asking, reference, platform, context))??);
        }
        ImageSource::File(path) => {
            (LocalImage::Path { path: path.clone(), form: None, name: None }, path.display().to_string())
        }
        ImageSource::Local { typed, image } => (image.clone(), typed.clone()),
    };
    let (broker, source) = channel::pair::<ToReader, FromReader>()?;
    let spool = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_TMPFILE)
        .mode(0o600)
        .open(std::env::temp_dir())
        .ok()
        .map(OwnedFd::from);
    let cwd = std::env::current_dir()?;
    // The file is opened by who typed its name, and read by the other process. Each has one end only, or it would not see
    // that the other has ended.
    let (broker, source) = (Cell::new(Some(broker)), Cell::new(Some(source)));
    let work = || {
        drop(source.take());
        match broker.take() {
            Some(broker) => of_this_machine(broker, spool, &image, &shown, platform),
            None => Err("internal error: nothing to read".into()),
        }
    };
    let beside = || {
        drop(broker.take());
        if let Some(source) = source.take() {
            // What fails here is told to the other process, or follows from its end.
            let _ = reader::run(&source, &image, &cwd, &context.environment);
        }
    };
    Ok(unprivileged::run_beside(account.as_ref(), work, beside)??)
}

fn of_registry(
    asking: &Asking,
    reference: &ImageReference,
    platform: &Platform,
    context: &Context,
) -> Result<Inspection, String> {
    let (reference, found) = context.resolve_by(asking, reference, platform).map_err(|error| error.to_string())?;
    let layers = std::iter::zip(&found.manifest.layers, &found.config.diff_ids)
        .map(|(layer, diff_id)| LayerDescriptor { blob: layer.digest, diff_id: *diff_id, size: layer.size });
    Ok(Inspection {
        origin: Some(found.client.endpoint().origin()),
        digests: found.digests,
        warnings: found.warnings,
        ..Inspection::new(reference.to_string(), "registry", layers.collect(), Some(&found.config))
    })
}

fn of_this_machine(
    channel: Channel<ToReader, FromReader>,
    spool: Option<OwnedFd>,
    image: &LocalImage,
    shown: &str,
    platform: &Platform,
) -> Result<Inspection, String> {
    let gone = |error: io::Error| format!("cannot open {shown}: {}", crate::sys::reason(error));
    let receive = || match channel.receive().map_err(gone)? {
        Some((FromReader::Failed { message }, _)) => Err(message),
        Some(message) => Ok(message),
        None => Err(format!("cannot open {shown}: the process that was to do it ended unexpectedly")),
    };
    let mut message = receive()?;
    if matches!(message.0, FromReader::Found { .. }) {
        channel.send(&ToReader::Save, &[]).map_err(gone)?;
        message = receive()?;
    }
    let (FromReader::Opened { form, .. }, descriptors) = message else { return Err(format!("cannot open {shown}")) };
    let descriptor = descriptors.into_iter().next().ok_or_else(|| format!("cannot open {shown}"))?;
    if form == SourceForm::Squashfs {
        let file = std::fs::File::from(descriptor);
        let bytes = file.metadata().map_err(gone)?.len();
        Squashfs::open(file).map_err(|error| format!("Invalid image format: {shown} ({error})"))?;
        return Ok(Inspection { bytes, ..Inspection::new(shown.to_owned(), "squashfs", vec![], None) });
    }
    if form == SourceForm::Stream && spool.is_none() {
        return Err(format!("cannot read {shown}: no room for it in {}", std::env::temp_dir().display()));
    }
    let (wanted, name) = match image {
        LocalImage::Path { form, name, .. } => (*form, name.as_deref()),
        LocalImage::Engine { .. } => (None, None),
    };
    let found = local::find((form, descriptor, spool), wanted, name, shown, platform);
    let found = found.map_err(|failure| match failure.report() {
        Report::Failed { message, .. } => message,
        _ => format!("cannot read {shown}"),
    })?;
    let config = ImageConfig::parse(&found.config_bytes).map_err(|error| format!("{shown}: {error}"))?;
    let form = if form == SourceForm::Layout { "layout" } else { "archive" };
    Ok(Inspection {
        digests: vec![found.manifest_digest],
        warnings: found.warnings.clone(),
        ..Inspection::new(shown.to_owned(), form, found.layers.clone(), Some(&config))
    })
}

impl Inspection {
    fn new(image: String, form: &str, layers: Vec<LayerDescriptor>, config: Option<&ImageConfig>) -> Self {
        let mut root: Vec<Digest> = Vec::new();
        for layer in layers.iter().rev() {
            // Of a layer that occurs twice the upper one covers the other.
            if !root.contains(&layer.diff_id) {
                root.push(layer.diff_id);
            }
        }
        Self {
            image,
            form: form.to_owned(),
            origin: None,
            digests: Vec::new(),
            os: config.map(|config| config.os.clone()).unwrap_or_default(),
            architecture: config.map(|config| config.architecture.clone()).unwrap_or_default(),
            bytes: layers.iter().fold(0, |sum, layer| layer.size.saturating_add(sum)),
            layers: layers
                .into_iter()
                .map(|layer| Layer { blob: layer.blob, diff_id: layer.diff_id, bytes: layer.size, stored: None })
                .collect(),
            root,
            config: config.map(|config| Config {
                user: config.user.clone(),
                env: config.env.clone(),
                entrypoint: config.entrypoint.clone(),
                cmd: config.cmd.clone(),
                working_dir: config.working_dir.clone(),
                volumes: config.volumes.clone(),
                labels: config.labels.clone(),
            }),
            warnings: Vec::new(),
        }
    }

    /// For people: one line for each thing, whatever it contains.
    fn describe(&self) -> String {
        let mut lines = vec![("image", self.image.clone()), ("form", self.form.clone())];
        lines.extend(self.origin.clone().map(|origin| ("from", origin)));
        lines.extend(self.digests.iter().map(|digest| ("digest", digest.to_string())));
        if !self.os.is_empty() || !self.architecture.is_empty() {
            lines.push(("platform", format!("{}/{}", self.os, self.architecture)));
        }
        lines.push(("size", size(self.bytes)));
        for layer in &self.layers {
            let stored = match layer.stored {
                Some(true) => ", in the store",
                Some(false) => ", not in the store",
                None => "",
            };
            lines.push(("layer", format!("{} {}{stored}", layer.diff_id, size(layer.bytes))));
        }
        lines.extend(self.root.iter().map(|diff_id| ("mounted", diff_id.to_string())));
        if let Some(config) = &self.config {
            let words = |words: &[String]| serde_json::to_string(words).unwrap_or_default();
            let one = [
                ("user", config.user.clone()),
                ("workdir", config.working_dir.clone()),
                ("entrypoint", if config.entrypoint.is_empty() { String::new() } else { words(&config.entrypoint) }),
                ("command", if config.cmd.is_empty() { String::new() } else { words(&config.cmd) }),
            ];
            lines.extend(one.into_iter().filter(|(_, value)| !value.is_empty()));
            lines.extend(config.env.iter().map(|variable| ("env", variable.clone())));
            lines.extend(config.volumes.iter().map(|path| ("volume", path.clone())));
            lines.extend(config.labels.iter().map(|(name, value)| ("label", format!("{name}={value}"))));
        }
        lines.extend(self.warnings.iter().map(|warning| ("warning", warning.clone())));
        let line = |(name, value): (&str, String)| {
            let value: String = value.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            format!("{name:11} {value}\n")
        };
        lines.into_iter().map(line).collect()
    }
}
