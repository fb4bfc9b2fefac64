//! What a registry holds: manifests and blobs, made in memory, and the right answers to requests for them.

use std::collections::BTreeMap;
use std::io::Write;

use serde_json::{Value, json};
use spank_pyxis::image::platform::Platform;
use spank_pyxis::registry::sha256;

use crate::server::{Reply, Request};

pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Plain,
    Gzip,
    Zstd,
}

/// The content of one repository.
#[derive(Debug, Clone, Default)]
pub struct Content {
    manifests: BTreeMap<String, (String, Vec<u8>)>,
    blobs: BTreeMap<String, Vec<u8>>,
}

impl Content {
    /// The image `latest` with these layers.
    pub fn image(layers: &[(Vec<u8>, Compression)]) -> Self {
        let mut content = Self::default();
        let manifest = content.add_image(layers, &Platform::host());
        content.tag("latest", MANIFEST, &manifest);
        content
    }

    /// The image `latest` of one gzipped layer with a file of `size` bytes that do not compress.
    pub fn simple(size: usize) -> Self {
        Self::image(&[(tar(size), Compression::Gzip)])
    }

    /// Adds config and layers and gives the manifest, which is not added.
    pub fn add_image(&mut self, layers: &[(Vec<u8>, Compression)], platform: &Platform) -> Value {
        let mut descriptors = Vec::new();
        let mut diff_ids = Vec::new();
        for (tar, compression) in layers {
            let (blob, suffix) = match compression {
                Compression::Plain => (tar.clone(), ""),
                Compression::Gzip => (gzip(tar), "+gzip"),
                Compression::Zstd => (zstd::encode_all(&tar[..], 1).unwrap(), "+zstd"),
            };
            descriptors.push(self.add_blob(&format!("{LAYER}{suffix}"), blob));
            diff_ids.push(sha256(tar).to_string());
        }
        let config = json!({
            "os": platform.os,
            "architecture": platform.architecture,
            "config": {"Env": ["PATH=/bin"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.add_blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": descriptors})
    }

    /// Adds a blob and gives its descriptor.
    pub fn add_blob(&mut self, media_type: &str, bytes: Vec<u8>) -> Value {
        let digest = sha256(&bytes).to_string();
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.blobs.insert(digest, bytes);
        descriptor
    }

    /// Adds a manifest under its digest and gives its descriptor.
    pub fn add_manifest(&mut self, media_type: &str, manifest: &Value) -> Value {
        let bytes = manifest.to_string().into_bytes();
        let digest = sha256(&bytes).to_string();
        let descriptor = json!({"mediaType": media_type, "digest": digest, "size": bytes.len()});
        self.manifests.insert(digest, (media_type.to_owned(), bytes));
        descriptor
    }

    /// Adds a manifest under a tag, too.
    pub fn tag(&mut self, tag: &str, media_type: &str, manifest: &Value) {
        self.add_manifest(media_type, manifest);
        self.manifests.insert(tag.to_owned(), (media_type.to_owned(), manifest.to_string().into_bytes()));
    }

    /// The manifest with this tag or digest.
    pub fn manifest(&self, name: &str) -> Value {
        serde_json::from_slice(&self.manifests[name].1).unwrap()
    }

    /// Serves other bytes under a name.
    pub fn replace_manifest(&mut self, name: &str, bytes: impl Into<Vec<u8>>) {
        self.manifests.insert(name.to_owned(), (MANIFEST.to_owned(), bytes.into()));
    }

    /// Digest of the layer `index` of `latest`.
    pub fn layer(&self, index: usize) -> String {
        self.manifest("latest")["layers"][index]["digest"].as_str().unwrap().to_owned()
    }

    /// The bytes of a blob, to damage them.
    pub fn blob(&mut self, digest: &str) -> &mut Vec<u8> {
        self.blobs.get_mut(digest).unwrap()
    }

    /// All bytes of all blobs.
    pub fn blob_bytes(&self) -> usize {
        self.blobs.values().map(Vec::len).sum()
    }

    /// What a registry that is all right answers.
    pub fn answer(&self, request: &Request) -> Reply {
        let (kind, name) = match request.path.rsplit_once('/') {
            Some((rest, name)) => (rest.rsplit('/').next().unwrap_or_default(), name),
            None => return Reply::status(404),
        };
        let error = |code: &str| {
            Reply::status(404).body(json!({"errors": [{"code": code, "message": "unknown here"}]}).to_string())
        };
        match kind {
            "manifests" => match self.manifests.get(name) {
                Some((media_type, bytes)) => Reply::ok(bytes.clone()).header("Content-Type", media_type.as_str()),
                None => error("MANIFEST_UNKNOWN"),
            },
            "blobs" => match self.blobs.get(name) {
                Some(bytes) => ranged(bytes, request),
                None => error("BLOB_UNKNOWN"),
            },
            _ => Reply::status(404),
        }
    }
}

/// The answer to a request for `bytes`, or for a part of them.
pub fn ranged(bytes: &[u8], request: &Request) -> Reply {
    match request.range() {
        Some((start, last)) if start < bytes.len() => {
            let end = last.map_or(bytes.len(), |last| bytes.len().min(last + 1));
            let range = format!("bytes {start}-{}/{}", end - 1, bytes.len());
            Reply::status(206).header("Content-Range", range).body(&bytes[start..end])
        }
        Some(_) => Reply::status(416),
        None => Reply::ok(bytes),
    }
}

/// A ustar archive with one file of `size` bytes that look random.
pub fn tar(size: usize) -> Vec<u8> {
    let mut header = [0u8; 512];
    header[..4].copy_from_slice(b"file");
    header[100..107].copy_from_slice(b"0000644");
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = b'0';
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    let mut archive = header.to_vec();
    let mut state = size as u64 + 1;
    archive.extend((0..size).map(|_| {
        // xorshift
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    }));
    archive.resize(archive.len().next_multiple_of(512) + 1024, 0);
    archive
}

pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
