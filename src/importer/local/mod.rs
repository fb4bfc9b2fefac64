//! Images that users have on the node: archives and OCI layouts, read by the importer just as registries are, and just as
//! hostile.
//!
//! * [`archive`]: the members of a tar archive, found without unpacking it;
//! * here: which of them are an image's manifest, config and layers, and whether they are what their digests say.

#![forbid(unsafe_code)]

mod archive;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, PoisonError};

use archive::Archive;

use super::failure::Failure;
use super::inflate::Inflate;
use super::protocol::LayerDescriptor;
use crate::image::config::{ImageConfig, MAX_CONFIG_BYTES};
use crate::image::digest::Digest;
use crate::image::docker_archive;
use crate::image::manifest::{Descriptor, Document, MAX_MANIFEST_BYTES, Manifest};
use crate::image::platform::Platform;
use crate::registry::sha256;
use crate::request::LocalForm;
use crate::source::{LayoutAnswer, LayoutAsk, SourceForm};
use crate::sys::channel::Channel;

/// The index of an OCI layout may name an index, and that one another; more is a joke.
const MAX_DOCUMENTS: usize = 3;
/// What an image in a layout, and one that `docker save` wrote, is recognised by.
const OCI_INDEX: &str = "index.json";
const DOCKER_MANIFEST: &str = "manifest.json";

/// An image that was found.
#[derive(Debug)]
pub struct LocalImage {
    source: Source,
    /// Where the blob of each layer is.
    places: Vec<String>,
    /// Digest of the manifest, or of the config where there is no manifest.
    pub manifest_digest: Digest,
    /// The config as it is.
    pub config_bytes: Vec<u8>,
    /// Lowest layer first. Of an archive of docker's the blobs have no digest: the diffID stands in.
    pub layers: Vec<LayerDescriptor>,
    /// Whether the blobs have digests of their own.
    pub has_blob_digests: bool,
    /// One line each, for the user.
    pub warnings: Vec<String>,
}

/// What the files of an image are read from.
#[derive(Debug)]
enum Source {
    Archive(Archive),
    Layout(Mutex<Channel<LayoutAsk, LayoutAnswer>>),
}

/// A file of an image: a part of an archive, or a file of a layout.
#[derive(Debug)]
pub struct Part {
    file: Arc<File>,
    position: u64,
    left: u64,
}

/// Opens what the source reader has passed on. A stream is kept in `spool`, an empty file.
fn open_source(form: SourceForm, source: OwnedFd, spool: Option<OwnedFd>) -> Result<Source, Failure> {
    let file = match form {
        SourceForm::Layout => return Ok(Source::Layout(Mutex::new(source.into()))),
        SourceForm::Squashfs => return Err(Failure::local("a squashfs file is nothing to import")),
        SourceForm::Archive => File::from(source),
        SourceForm::Stream => {
            let spool = spool.ok_or_else(|| Failure::local("the broker sent no file for a stream"))?;
            keep(File::from(source), File::from(spool))?
        }
    };
    Archive::read(file).map(Source::Archive)
}

/// Copies a stream, decompressed, into a file that can be read from anywhere.
fn keep(stream: File, mut spool: File) -> Result<File, Failure> {
    let unreadable = |error: io::Error| Failure::bad(&format!("cannot read it: {}", crate::sys::reason(error)));
    let mut stream = Inflate::new(io::BufReader::with_capacity(256 << 10, stream)).map_err(unreadable)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = match stream.read(&mut buffer) {
            Ok(0) => return Ok(spool),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(unreadable(error)),
        };
        spool
            .write_all(buffer.get(..count).unwrap_or_default())
            .map_err(|error| Failure::write(&error, "the archive"))?;
    }
}

/// Finds the image called `name`, or the only one, in what the source reader has opened. `shown` is what the user calls
/// it.
pub fn find(
    (form, source, spool): (SourceForm, OwnedFd, Option<OwnedFd>),
    wanted: Option<LocalForm>,
    name: Option<&str>,
    shown: &str,
    platform: &Platform,
) -> Result<LocalImage, Failure> {
    let found = || {
        let source = open_source(form, source, spool)?;
        // What docker writes today can be read as both: as a layout it has digests.
        let is_layout = wanted != Some(LocalForm::DockerArchive) && source.has(OCI_INDEX);
        let image = if is_layout {
            find_in_layout(source, name, platform)
        } else if source.has(DOCKER_MANIFEST) {
            find_docker(source, name)
        } else {
            let what = "it has neither the index.json of an OCI layout nor the manifest.json of docker save";
            Err(Failure::bad(&format!("not an image ({what})")))
        }?;
        image.check(shown, platform)
    };
    found().map_err(|failure| failure.about(shown))
}

fn find_in_layout(source: Source, name: Option<&str>, platform: &Platform) -> Result<LocalImage, Failure> {
    let wrong = |error: crate::image::manifest::ManifestError| Failure::bad(&error.to_string());
    let index = source.read(OCI_INDEX, MAX_MANIFEST_BYTES)?;
    let Document::Index(index) = Document::parse(&index, None).map_err(wrong)? else {
        return Err(Failure::bad("its index.json is no image index"));
    };
    let mut chosen = index.named(name).and_then(|index| index.choose(platform)).map_err(wrong)?;
    for _ in 0..MAX_DOCUMENTS {
        let document = source.read_blob(&chosen, MAX_MANIFEST_BYTES)?;
        match Document::parse(&document, Some(&chosen.media_type)).map_err(wrong)? {
            Document::Index(index) => chosen = index.choose(platform).map_err(wrong)?,
            Document::Manifest(manifest) => return layout_image(source, chosen.digest, &manifest),
        }
    }
    Err(Failure::bad("its indexes are nested too deeply"))
}

fn layout_image(source: Source, manifest_digest: Digest, manifest: &Manifest) -> Result<LocalImage, Failure> {
    let config_bytes = source.read_blob(&manifest.config, MAX_CONFIG_BYTES)?;
    let config = parse_config(&config_bytes, manifest.layers.len())?;
    let layers = std::iter::zip(&manifest.layers, config.diff_ids)
        .map(|(layer, diff_id)| LayerDescriptor { blob: layer.digest, diff_id, size: layer.size })
        .collect();
    let places = manifest.layers.iter().map(|layer| blob_path(&layer.digest)).collect();
    let (has_blob_digests, warnings) = (true, Vec::new());
    Ok(LocalImage { source, places, manifest_digest, config_bytes, layers, has_blob_digests, warnings })
}

fn find_docker(source: Source, name: Option<&str>) -> Result<LocalImage, Failure> {
    let manifest = source.read(DOCKER_MANIFEST, MAX_MANIFEST_BYTES)?;
    let image = docker_archive::choose(&manifest, name).map_err(|error| Failure::bad(&error.to_string()))?;
    let config_bytes = source.read(&image.config, MAX_CONFIG_BYTES)?;
    let manifest_digest = sha256(&config_bytes);
    // `HEX.json`, `blobs/sha256/HEX`: the config is what its name says.
    let stem = image.config.rsplit('/').next().unwrap_or_default().trim_end_matches(".json");
    if let Ok(named) = format!("sha256:{stem}").parse::<Digest>()
        && named != manifest_digest
    {
        return Err(Failure::bad(&format!(
            "its config has the digest {manifest_digest}, and is called {stem}: it was changed"
        )));
    }
    let config = parse_config(&config_bytes, image.layers.len())?;
    let mut layers = Vec::with_capacity(image.layers.len());
    for (place, diff_id) in std::iter::zip(&image.layers, config.diff_ids) {
        let size = source.open(place)?.left;
        layers.push(LayerDescriptor { blob: diff_id, diff_id, size });
    }
    let (places, has_blob_digests, warnings) = (image.layers, false, Vec::new());
    Ok(LocalImage { source, places, manifest_digest, config_bytes, layers, has_blob_digests, warnings })
}

fn parse_config(bytes: &[u8], layers: usize) -> Result<ImageConfig, Failure> {
    let config = ImageConfig::parse(bytes).map_err(|error| Failure::bad(&error.to_string()))?;
    if config.diff_ids.len() != layers {
        let text = format!("it has {layers} layers and a config for {}: build it again", config.diff_ids.len());
        return Err(Failure::bad(&text));
    }
    Ok(config)
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl LocalImage {
    /// The blob of layer `index`.
    pub fn blob(&self, index: usize) -> Result<Part, Failure> {
        let (Some(place), Some(layer)) = (self.places.get(index), self.layers.get(index)) else {
            return Err(Failure::local(format!("the broker asks for layer {index}, which is none")));
        };
        let part = self.source.open(place)?;
        if part.left != layer.size {
            return Err(Failure::bad(&format!("it has {} bytes instead of {}", part.left, layer.size)));
        }
        Ok(part)
    }

    /// Whether it can run here.
    fn check(mut self, shown: &str, platform: &Platform) -> Result<Self, Failure> {
        let config = ImageConfig::parse(&self.config_bytes).map_err(|error| Failure::bad(&error.to_string()))?;
        let text = |text: &str| text.chars().take(32).flat_map(char::escape_debug).collect::<String>();
        if !config.os.is_empty() && config.os != platform.os {
            return Err(Failure::bad(&format!("it is for {}, and this machine is {platform}", text(&config.os))));
        }
        if !config.architecture.is_empty() && config.architecture != platform.architecture {
            let architecture = text(&config.architecture);
            let warning = format!("image {shown} is for {architecture}, and this machine is {}", platform.architecture);
            self.warnings.push(warning);
        }
        Ok(self)
    }
}

impl Source {
    fn has(&self, path: &str) -> bool {
        self.open(path).is_ok()
    }

    /// A file of the image. The path is one of ours, or from an archive's manifest.
    fn open(&self, path: &str) -> Result<Part, Failure> {
        match self {
            Self::Archive(archive) => archive.open(path),
            Self::Layout(channel) => {
                let ask = match path.strip_prefix("blobs/sha256/").map(|hex| format!("sha256:{hex}").parse()) {
                    Some(Ok(digest)) => LayoutAsk::Blob(digest),
                    None if path == OCI_INDEX => LayoutAsk::Index,
                    _ => return Err(Failure::bad(&format!("{path}: not a file of an OCI layout"))),
                };
                // An answer belongs to its question.
                let channel = channel.lock().unwrap_or_else(PoisonError::into_inner);
                let gone =
                    |error: io::Error| Failure::local(format!("cannot ask for {path}: {}", crate::sys::reason(error)));
                channel.send(&ask, &[]).map_err(gone)?;
                match channel.receive().map_err(gone)? {
                    Some((LayoutAnswer::File { size }, descriptors)) => match descriptors.into_iter().next() {
                        Some(file) => Ok(Part { file: Arc::new(file.into()), position: 0, left: size }),
                        None => Err(Failure::local(format!("no descriptor for {path}"))),
                    },
                    Some((LayoutAnswer::None { reason }, _)) => Err(Failure::bad(&format!("{path}: {reason}"))),
                    None => Err(gone(io::ErrorKind::BrokenPipe.into())),
                }
            }
        }
    }

    /// All of a small file.
    fn read(&self, path: &str, limit: u64) -> Result<Vec<u8>, Failure> {
        let mut part = self.open(path)?;
        let shown: String = path.chars().take(200).flat_map(char::escape_debug).collect();
        if part.left > limit {
            return Err(Failure::bad(&format!("{shown} has {} bytes: the limit is {limit}", part.left)));
        }
        let mut bytes = Vec::new();
        part.read_to_end(&mut bytes)
            .map_err(|error| Failure::bad(&format!("cannot read {shown}: {}", crate::sys::reason(error))))?;
        Ok(bytes)
    }

    /// A small blob with the digest that it should have.
    fn read_blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, Failure> {
        let path = blob_path(&descriptor.digest);
        let bytes = self.read(&path, limit)?;
        match sha256(&bytes) {
            actual if actual == descriptor.digest => Ok(bytes),
            actual => Err(Failure::bad(&format!("{path} has the digest {actual}: it was changed or is damaged"))),
        }
    }
}

impl Read for Part {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let Some(buffer) = buffer.get_mut(..most).filter(|buffer| !buffer.is_empty()) else { return Ok(0) };
        match self.file.read_at(buffer, self.position)? {
            0 => Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file is cut off")),
            count => {
                self.position += count as u64;
                self.left -= count as u64;
                Ok(count)
            }
        }
    }
}

#[cfg(test)]
mod tests;
