//! What the store remembers beside the layers: which blob is which layer, image configs, and who was given what when.

use std::time::{SystemTime, UNIX_EPOCH};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Result, Store};
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::importer::protocol::LayerDescriptor;
use crate::policy::Evidence;

pub(super) const BLOBS: &str = "blobs/sha256";
pub(super) const CONFIGS: &str = "configs/sha256";
/// Most origins that a blob record remembers; the oldest goes first, which costs a download when it is needed.
const MAX_ORIGINS: usize = 64;

/// `blobs/sha256/HEX`: what a blob unpacks to, as seen by an importer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobRecord {
    /// The layer that it is.
    pub diff_id: Digest,
    /// Bytes of the blob.
    pub size: u64,
    /// `HOST[:PORT]/REPOSITORY`: where it was downloaded from, each time with the same result.
    pub origins: Vec<String>,
}

/// `confirmed/UID/references/HEX`: what a reference meant for a user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceRecord {
    /// The reference.
    pub reference: ImageReference,
    /// The platform's manifest.
    pub manifest: Digest,
    /// What rules about images may want to know.
    #[serde(default)]
    pub evidence: Evidence,
    /// When the registry said so: seconds since 1970.
    pub confirmed_at: u64,
}

/// `confirmed/UID/manifests/HEX`: a manifest all of whose layers a user could have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestRecord {
    /// Who confirmed it: `HOST[:PORT]/REPOSITORY`.
    pub origin: String,
    /// The image config.
    pub config: Digest,
    /// Lowest layer first.
    pub layers: Vec<LayerDescriptor>,
    /// When: seconds since 1970.
    pub confirmed_at: u64,
}

/// An image that a user was given and that is complete in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredImage {
    /// Who.
    pub uid: u32,
    /// By which name.
    pub reference: ImageReference,
    /// The platform's manifest.
    pub manifest: Digest,
    /// Where from: `HOST[:PORT]/REPOSITORY`.
    pub origin: String,
    /// Number of layers.
    pub layers: usize,
    /// Bytes of the (compressed) blobs.
    pub blob_bytes: u64,
    /// Bytes of the layer images; layers are shared with other images.
    pub layer_bytes: u64,
    /// When the registry said last that the user may have it: seconds since 1970.
    pub confirmed_at: u64,
}

impl Store {
    /// What is known about a blob.
    pub fn blob(&self, blob: &Digest) -> Result<Option<BlobRecord>> {
        self.read_json(&format!("{BLOBS}/{}", blob.hex()))
    }

    /// Notes that `origin` delivered `layer.blob` and that it unpacks to `layer.diff_id`.
    ///
    /// Two processes may do it at once, and then one origin may be forgotten: it is asked again when it matters.
    pub fn note_blob(&self, layer: &LayerDescriptor, origin: &str) -> Result<()> {
        let mut origins = match self.blob(&layer.blob)? {
            Some(record) if record.diff_id == layer.diff_id => record.origins,
            _ => Vec::new(),
        };
        origins.retain(|known| known != origin);
        if origins.len() == MAX_ORIGINS {
            origins.remove(0);
        }
        origins.push(origin.to_owned());
        let record = BlobRecord { diff_id: layer.diff_id, size: layer.size, origins };
        self.write_json(BLOBS, &layer.blob.hex(), &record)
    }

    /// An image config. It was named by its digest when it was written.
    pub fn config(&self, config: &Digest) -> Result<Option<Vec<u8>>> {
        self.read_record(&format!("{CONFIGS}/{}", config.hex()))
    }

    /// Keeps an image config; returns its digest.
    pub fn keep_config(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::from_bytes(Sha256::digest(bytes).into());
        self.write_record(CONFIGS, &digest.hex(), bytes)?;
        Ok(digest)
    }

    /// What `reference` meant for `uid` when it was last confirmed.
    pub fn reference(&self, uid: u32, reference: &ImageReference) -> Result<Option<ReferenceRecord>> {
        let record: Option<ReferenceRecord> =
            self.read_json(&format!("confirmed/{uid}/references/{}", self.reference_key(reference)?))?;
        Ok(record.filter(|record| record.reference == *reference))
    }

    /// What to lock while the registry is asked what `reference` means for `uid`.
    pub fn reference_lock(&self, uid: u32, reference: &ImageReference) -> Result<Digest> {
        let name = format!("{uid} {}", self.reference_key(reference)?);
        Ok(Digest::from_bytes(Sha256::digest(name).into()))
    }

    /// A manifest that `uid` was given.
    pub fn manifest(&self, uid: u32, manifest: &Digest) -> Result<Option<ManifestRecord>> {
        self.read_json(&format!("confirmed/{uid}/manifests/{}", manifest.hex()))
    }

    /// Notes that `uid` was given `manifest` for `reference`, with all its layers.
    pub fn confirm(&self, uid: u32, reference: &ReferenceRecord, manifest: &ManifestRecord) -> Result<()> {
        for directory in ["", "/references", "/manifests"] {
            self.make_directory(&format!("confirmed/{uid}{directory}"))?;
        }
        self.write_json(&format!("confirmed/{uid}/manifests"), &reference.manifest.hex(), manifest)?;
        self.write_json(&format!("confirmed/{uid}/references"), &self.reference_key(&reference.reference)?, reference)
    }

    /// File name of a reference record. Nodes of several architectures may share a store.
    fn reference_key(&self, reference: &ImageReference) -> Result<String> {
        let key = serde_json::to_vec(&(std::env::consts::ARCH, reference))
            .map_err(|source| self.error("write", "confirmed", source))?;
        Ok(Digest::from_bytes(Sha256::digest(key).into()).hex())
    }

    /// The images that could be used without a download, by user and name.
    pub fn images(&self) -> Result<Vec<StoredImage>> {
        let mut images = Vec::new();
        for user in self.list("confirmed")? {
            let Ok(uid) = user.parse() else { continue };
            for name in self.list(&format!("confirmed/{user}/references"))? {
                let path = format!("confirmed/{user}/references/{name}");
                let Some(record) = self.read_json::<ReferenceRecord>(&path)? else { continue };
                let Some(manifest) = self.manifest(uid, &record.manifest)? else { continue };
                let sizes = manifest.layers.iter().map(|layer| self.layer_length(&layer.diff_id));
                let Some(layer_bytes) = sizes.sum::<Result<Option<u64>>>()? else { continue };
                images.push(StoredImage {
                    uid,
                    reference: record.reference,
                    manifest: record.manifest,
                    origin: manifest.origin,
                    layers: manifest.layers.len(),
                    blob_bytes: manifest.layers.iter().fold(0, |sum, layer| layer.size.saturating_add(sum)),
                    layer_bytes,
                    confirmed_at: record.confirmed_at,
                });
            }
        }
        images.sort_by(|a, b| {
            let key = |image: &StoredImage| {
                let reference = &image.reference;
                (image.uid, reference.registry.clone(), reference.repository.clone(), reference.tag_or_digest.clone())
            };
            key(a).cmp(&key(b))
        });
        Ok(images)
    }

    /// `None` also for a record of another form: whoever needs it makes it anew.
    pub(super) fn read_json<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>> {
        Ok(self.read_record(name)?.and_then(|content| serde_json::from_slice(&content).ok()))
    }

    pub(super) fn write_json<T: Serialize>(&self, directory: &str, name: &str, record: &T) -> Result<()> {
        let content = serde_json::to_vec(record).map_err(|source| self.error("write", directory, source))?;
        self.write_record(directory, name, &content)
    }
}

/// Seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
