//! `enroot import` and `enroot load`: an image of a registry, as a squashfs file or as a root filesystem.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::digest::RegistryImage;
use super::{Context, Error, engine, say};
use crate::export::target::Target;
use crate::image::config::ImageConfig;
use crate::import::LayerLimits;
use crate::import::merge::Sink;
use crate::importer::failure::Failure;
use crate::importer::local::LocalImage;
use crate::importer::protocol::LayerDescriptor;
use crate::pull::cache::Cache;
use crate::pull::{DirectorySink, Fetch, PullError, SquashfsSink, unpack};
use crate::registry::places::Places;
use crate::request::Engine;
use crate::squashfs::writer::{DEFAULT_OPTIONS, Options, Writer};
use crate::unpacked::Containers;

/// Layers downloaded at the same time, unless `ENROOT_MAX_CONNECTIONS` says otherwise.
pub const CONNECTIONS: usize = 10;

/// Import an image into a squashfs file.
#[derive(Debug, clap::Args)]
pub struct ImportArgs {
    /// Output file, if not one named after the image in the working directory
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    #[command(flatten)]
    image: RegistryImage,
}

/// Import an image into a container root filesystem.
#[derive(Debug, clap::Args)]
pub struct LoadArgs {
    /// Name of the container, if not that of the image
    #[arg(short, long)]
    name: Option<OsString>,
    /// Overwrite an existing one
    #[arg(short, long)]
    force: bool,
    #[command(flatten)]
    image: RegistryImage,
}

/// Runs `import`.
pub fn import(args: &ImportArgs, context: &Context) -> Result<ExitCode, Error> {
    let typed = match &args.output {
        Some(path) => path.clone(),
        None => format!("{}.sqsh", name_of(&args.image)?).into(),
    };
    let path = output_path(&typed)?;
    if path.symlink_metadata().is_ok() {
        return Err(format!("File already exists: {}", path.display()).into());
    }
    let options = squashfs_options(context)?;
    let target = Target::open(&path)?;
    let image = match args.image.engine()? {
        Some((engine, name)) => Image::save(engine, &name, &args.image, context)?,
        None => Image::fetch(&args.image, context)?,
    };
    let new = target.create()?;
    let file = new.file().map_err(|error| new.failed("write", error))?;
    say::info("Extracting image layers...");
    say::info("Converting whiteouts...");
    say::info("Creating squashfs filesystem...");
    let SquashfsSink(writer) = image.unpack(SquashfsSink(Writer::new(file, &options)?))?;
    writer.finish()?;
    match new.publish_new() {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Err(format!("File already exists: {}", path.display()).into()),
        Err(error) => Err(error.into()),
    }
}

/// Runs `load`.
pub fn load(args: &LoadArgs, context: &Context) -> Result<ExitCode, Error> {
    // Only registries.
    args.image.reference()?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None => name_of(&args.image)?.into(),
    };
    let containers = Containers::new(context.settings.data_path());
    let force = args.force || context.settings.force_override();
    let unfinished = containers.begin(&name, force)?;
    let image = Image::fetch(&args.image, context)?;
    say::info("Extracting image layers...");
    say::info("Converting whiteouts...");
    say::info("Loading container root filesystem...");
    image.unpack(DirectorySink::new(unfinished.root()))?;
    unfinished.publish()?;
    Ok(ExitCode::SUCCESS)
}

/// An image whose layers are on their way.
struct Image {
    config: ImageConfig,
    source: String,
    layers: Vec<LayerDescriptor>,
    blobs: Blobs,
    limits: LayerLimits,
}

/// Where the blobs of the layers are.
enum Blobs {
    Registry(Fetch),
    Engine(Box<LocalImage>),
}

impl Image {
    fn fetch(wanted: &RegistryImage, context: &Context) -> Result<Self, Error> {
        let resolved = wanted.resolve(context)?;
        let layers: Vec<LayerDescriptor> = std::iter::zip(&resolved.manifest.layers, &resolved.config.diff_ids)
            .map(|(layer, diff_id)| LayerDescriptor { blob: layer.digest, diff_id: *diff_id, size: layer.size })
            .collect();
        let cache = Cache::open(&context.settings.cache_path())?;
        match Fetch::missing(&cache, &layers) {
            0 => say::info("Found all layers in cache"),
            missing => say::info(format_args!("Downloading {missing} missing layers...")),
        }
        let connections = context.settings.number("ENROOT_MAX_CONNECTIONS").and_then(|number| number.try_into().ok());
        let places = Places::new(resolved.client, resolved.others);
        let fetch = Fetch::start(places, cache, layers.clone(), connections.unwrap_or(CONNECTIONS))?;
        let (blobs, limits) = (Blobs::Registry(fetch), limits(context));
        Ok(Self { config: resolved.config, source: wanted.uri.clone(), layers, blobs, limits })
    }

    /// From a container engine on this machine.
    fn save(engine: Engine, name: &str, wanted: &RegistryImage, context: &Context) -> Result<Self, Error> {
        let image = engine::save(engine, name, &wanted.uri, &wanted.platform()?, &context.settings.temp_path())?;
        image.warnings.iter().for_each(say::warn);
        let (config, layers) = (ImageConfig::parse(&image.config_bytes)?, image.layers.clone());
        let blobs = Blobs::Engine(Box::new(image));
        Ok(Self { config, source: wanted.uri.clone(), layers, blobs, limits: limits(context) })
    }

    fn unpack<S: Sink>(self, sink: S) -> Result<S, Error> {
        let Self { config, source, layers, blobs, limits } = self;
        Ok(match blobs {
            Blobs::Registry(mut fetch) => {
                unpack((&layers, true), &config, &source, limits, |index| fetch.open(index), sink)?
            }
            Blobs::Engine(image) => {
                let open = |index| {
                    let unreadable = |failure: Failure| PullError::Write(io::Error::other(failure.into_message()));
                    image.blob(index).map_err(unreadable)
                };
                unpack((&layers, image.has_blob_digests), &config, &source, limits, open, sink)?
            }
        })
    }
}

fn limits(context: &Context) -> LayerLimits {
    let import = &context.config.import;
    LayerLimits { max_bytes: import.max_layer_bytes, max_entries: import.max_layer_entries }
}

/// What an image is called as a file: `nvidia+cuda+12.4`, with the tag if one was named.
fn name_of(image: &RegistryImage) -> Result<String, Error> {
    if let Some((_, name)) = image.engine()? {
        let name = name.strip_prefix("library/").unwrap_or(&name);
        return Ok(name.replace(['/', ':'], "+"));
    }
    let reference = image.reference()?;
    let repository = reference.repository_path();
    let name = repository.strip_prefix("library/").unwrap_or(repository).replace('/', "+");
    let tag = &reference.tag_or_digest;
    let named = image.uri.strip_suffix(tag.as_str()).is_some_and(|before| before.ends_with([':', '@']));
    Ok(if named { format!("{name}+{tag}") } else { name })
}

/// The absolute path of an output file, whose directory has to be there.
pub fn output_path(typed: &Path) -> Result<PathBuf, Error> {
    let (Some(name), false) = (typed.file_name(), typed.as_os_str().as_bytes().ends_with(b"/")) else {
        return Err(format!("Invalid argument: {}", typed.display()).into());
    };
    let parent = typed.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match parent.canonicalize() {
        Ok(parent) => Ok(parent.join(name)),
        Err(error) => Err(format!("{}: {}", crate::sys::reason(error), parent.display()).into()),
    }
}

/// How squashfs files are written.
pub fn squashfs_options(context: &Context) -> Result<Options, Error> {
    let text = context.settings.get("ENROOT_SQUASH_OPTIONS").unwrap_or(DEFAULT_OPTIONS);
    let (mut options, unknown) = Options::parse(text).map_err(|error| format!("ENROOT_SQUASH_OPTIONS: {error}"))?;
    if !unknown.is_empty() {
        say::warn(format_args!("ENROOT_SQUASH_OPTIONS: ignored: {}", unknown.join(" ")));
    }
    if let Some(processors) = context.settings.number("ENROOT_MAX_PROCESSORS").filter(|number| *number > 0) {
        options.threads = usize::try_from(processors).unwrap_or(options.threads).min(options.threads);
    }
    Ok(options.with_source_date_epoch(context.environment.get_str("SOURCE_DATE_EPOCH")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_named_after_images() {
        for (uri, name) in [
            ("docker://alpine", "alpine"),
            ("docker://alpine:latest", "alpine+latest"),
            ("docker://nvcr.io#nvidia/cuda:12.4", "nvidia+cuda+12.4"),
            ("docker://user@localhost:5000/x/y", "x+y"),
            ("docker://localhost:5000#/x:1", "x+1"),
            ("docker://ubuntu@sha256:ab", "ubuntu+sha256:ab"),
            ("dockerd://ubuntu", "ubuntu"),
            ("podman://localhost/x/y:1", "localhost+x+y+1"),
        ] {
            let image = RegistryImage::new(uri);
            assert_eq!(name_of(&image).unwrap(), name, "{uri}");
        }
        assert_eq!(name_of(&RegistryImage::new("alpine")).unwrap_err().to_string(), "Invalid argument: alpine");
    }
}
