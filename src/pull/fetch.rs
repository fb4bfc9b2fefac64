//! Brings the layers of an image into the cache, several at once, topmost first.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use sha2::{Digest as _, Sha256};

use super::PullError;
use super::cache::Cache;
use crate::image::digest::Digest;
use crate::image::manifest::Descriptor;
use crate::importer::layer::ImportError;
use crate::importer::protocol::LayerDescriptor;
use crate::registry::places::{Places, Useless};
use crate::registry::stream::BlobStream;

/// Bytes read at once.
const BUFFER: usize = 256 << 10;

/// Layers on their way.
#[derive(Debug)]
pub struct Fetch {
    layers: Vec<LayerDescriptor>,
    arrivals: HashMap<Digest, Receiver<Result<File, PullError>>>,
    arrived: HashMap<Digest, File>,
}

/// Where a layer is awaited.
type Arrival = Sender<Result<File, PullError>>;

struct Shared {
    places: Places,
    cache: Cache,
    wanted: Mutex<Vec<(LayerDescriptor, Arrival)>>,
    next: AtomicUsize,
}

impl Fetch {
    /// Begins to download what is not in the cache, with at most `connections` layers at a time. The threads end with the
    /// process if nobody waits for them any more.
    pub fn start(
        places: Places,
        cache: Cache,
        layers: Vec<LayerDescriptor>,
        connections: usize,
    ) -> Result<Self, PullError> {
        let mut arrivals = HashMap::new();
        let mut wanted = Vec::new();
        for layer in layers.iter().rev() {
            arrivals.entry(layer.blob).or_insert_with(|| {
                let (sender, receiver) = channel();
                wanted.push((layer.clone(), sender));
                receiver
            });
        }
        let threads = connections.clamp(1, wanted.len().max(1));
        let shared = Arc::new(Shared { places, cache, wanted: Mutex::new(wanted), next: AtomicUsize::new(0) });
        for _ in 0..threads {
            let shared = Arc::clone(&shared);
            thread::Builder::new().name("fetch".into()).spawn(move || shared.work()).map_err(PullError::Thread)?;
        }
        Ok(Self { layers, arrivals, arrived: HashMap::new() })
    }

    /// How many of `layers` are not in `cache`.
    pub fn missing(cache: &Cache, layers: &[LayerDescriptor]) -> usize {
        let mut blobs: Vec<_> = layers.iter().map(|layer| (layer.blob, layer.size)).collect();
        blobs.sort_unstable_by_key(|(digest, _)| digest.to_string());
        blobs.dedup();
        blobs.iter().filter(|(digest, size)| !cache.has(digest, *size)).count()
    }

    /// The blob of layer `index`, at its beginning, as soon as it is there.
    pub fn open(&mut self, index: usize) -> Result<File, PullError> {
        let digest = self.layers[index].blob;
        let file = match self.arrived.remove(&digest) {
            Some(file) => file,
            None => match self.arrivals.get(&digest).map(Receiver::recv) {
                Some(Ok(arrived)) => arrived?,
                _ => return Err(PullError::Thread(std::io::Error::other("a download has ended without a result"))),
            },
        };
        let mut copy = file.try_clone().map_err(PullError::Write)?;
        copy.rewind().map_err(PullError::Write)?;
        self.arrived.insert(digest, file);
        Ok(copy)
    }
}

impl Shared {
    /// Fetches one layer after the other until there is none left.
    fn work(&self) {
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            let next = self.wanted.lock().unwrap_or_else(PoisonError::into_inner).get(index).cloned();
            let Some((layer, sender)) = next else { return };
            // Nobody listens any more after a failure: the process is about to end.
            let _ = sender.send(self.fetch(&layer));
        }
    }

    fn fetch(&self, layer: &LayerDescriptor) -> Result<File, PullError> {
        match self.cache.get(&layer.blob, layer.size) {
            Some(file) => Ok(file),
            None => self.download(layer),
        }
    }

    fn download(&self, layer: &LayerDescriptor) -> Result<File, PullError> {
        let blob = Descriptor { media_type: String::new(), digest: layer.blob, size: layer.size };
        let downloaded = self.places.download(&blob, |stream| {
            self.keep(layer, stream).map_err(|error| match error {
                PullError::Layer { .. } => Useless::Damaged(error),
                PullError::Registry(_) => Useless::Unavailable(error),
                _ => Useless::Anyway(error),
            })
        });
        downloaded.map(|(file, _)| file).map_err(|undelivered| PullError::undelivered(layer.blob, undelivered))
    }

    /// Writes what comes to the cache.
    fn keep(&self, layer: &LayerDescriptor, mut blob: BlobStream) -> Result<File, PullError> {
        let new = self.cache.begin(&layer.blob)?;
        let write_error = |error| PullError::Cache(new.failed("write", error).into());
        let mut file = new.file().map_err(write_error)?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; BUFFER];
        loop {
            match blob.read(&mut buffer).map_err(|error| blob.read_error(error))? {
                0 => break,
                count => {
                    hash.update(&buffer[..count]);
                    file.write_all(&buffer[..count]).map_err(write_error)?;
                }
            }
        }
        match Digest::from_bytes(hash.finalize().into()) {
            actual if actual == layer.blob => Ok(self.cache.keep(new)?),
            actual => Err(PullError::layer(layer.blob, ImportError::BlobDigest(actual))),
        }
    }
}
