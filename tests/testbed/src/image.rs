//! Images made from directory trees: OCI layouts (image-spec, image-layout.md), written without any image tool.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// How a layer is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// `application/vnd.oci.image.layer.v1.tar`
    None,
    /// `…tar+gzip`
    Gzip,
    /// `…tar+zstd`
    Zstd,
}

impl Compression {
    fn media_type(self) -> &'static str {
        match self {
            Self::None => "application/vnd.oci.image.layer.v1.tar",
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// An OCI layout being written. Layers are added lowest first.
#[derive(Debug)]
pub struct ImageBuilder {
    layout: PathBuf,
    layers: Vec<Value>,
    diff_ids: Vec<String>,
    config: Value,
}

impl ImageBuilder {
    /// An image without layers in the new directory `layout`.
    pub fn new(layout: &Path) -> Result<Self> {
        fs::create_dir_all(layout.join("blobs/sha256")).with_context(|| layout.display().to_string())?;
        Ok(Self { layout: layout.into(), layers: Vec::new(), diff_ids: Vec::new(), config: json!({}) })
    }

    /// Sets a field of the image's runtime configuration: `Env`, `WorkingDir`, `Entrypoint`, `Cmd`, `Volumes`, ….
    pub fn config(mut self, field: &str, value: Value) -> Self {
        self.config[field] = value;
        self
    }

    /// Adds a layer with everything below `tree`, owners, modes, links, holes and extended attributes included.
    pub fn layer_from_tree(self, tree: &Path, compression: Compression) -> Result<Self> {
        let mut tar = Command::new("tar")
            .args(["--create", "--format=pax", "--pax-option=delete=atime,delete=ctime", "--sort=name", "--sparse"])
            .args(["--numeric-owner", "--xattrs", "--xattrs-include=user.*", "--directory"])
            .arg(tree)
            .arg(".")
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start tar")?;
        let stream = tar.stdout.take().context("stdout was piped")?;
        let image = self.layer_from_tar(stream, compression)?;
        if !tar.wait()?.success() {
            bail!("tar failed on {}", tree.display());
        }
        Ok(image)
    }

    /// Adds a layer with this tar stream.
    pub fn layer_from_tar(mut self, mut stream: impl Read, compression: Compression) -> Result<Self> {
        let blob = BlobWriter::create(&self.layout)?;
        let (diff_id, blob) = match compression {
            Compression::None => digest_copy(&mut stream, blob)?,
            Compression::Gzip => {
                let level = flate2::Compression::fast();
                let (diff_id, encoder) = digest_copy(&mut stream, flate2::write::GzEncoder::new(blob, level))?;
                (diff_id, encoder.finish()?)
            }
            Compression::Zstd => {
                let (diff_id, encoder) = digest_copy(&mut stream, zstd::Encoder::new(blob, 3)?)?;
                (diff_id, encoder.finish()?)
            }
        };
        self.layers.push(blob.finish(compression.media_type())?);
        self.diff_ids.push(diff_id);
        Ok(self)
    }

    /// Makes the config lie about layer `index`.
    pub fn with_diff_id(mut self, index: usize, diff_id: &str) -> Self {
        self.diff_ids[index] = diff_id.to_owned();
        self
    }

    /// Writes the config, the manifest and the index, which names the image `tag`. Gives skopeo's name of the image.
    pub fn finish(self, tag: &str) -> Result<String> {
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": self.config,
            "rootfs": { "type": "layers", "diff_ids": self.diff_ids },
        });
        let config = self.blob(&config, "application/vnd.oci.image.config.v1+json")?;
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": self.layers });
        let mut manifest = self.blob(&manifest, media_type)?;
        manifest["annotations"] = json!({ "org.opencontainers.image.ref.name": tag });
        manifest["platform"] = json!({ "os": "linux", "architecture": architecture() });
        let index = json!({ "schemaVersion": 2, "manifests": [manifest] });
        fs::write(self.layout.join("index.json"), serde_json::to_vec(&index)?)?;
        fs::write(self.layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        Ok(format!("oci:{}:{tag}", self.layout.display()))
    }

    fn blob(&self, value: &Value, media_type: &str) -> Result<Value> {
        let mut blob = BlobWriter::create(&self.layout)?;
        blob.write_all(&serde_json::to_vec(value)?)?;
        blob.finish(media_type)
    }
}

/// Makes `latest` of a layout an index of `manifests`, whose blobs are there.
pub fn index(layout: &Path, manifests: &[Value]) -> Result<()> {
    let media_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": media_type, "manifests": manifests });
    let mut blob = BlobWriter::create(layout)?;
    blob.write_all(&serde_json::to_vec(&index)?)?;
    let mut top = blob.finish(media_type)?;
    top["annotations"] = json!({ "org.opencontainers.image.ref.name": "latest" });
    let top = json!({ "schemaVersion": 2, "manifests": [top] });
    Ok(fs::write(layout.join("index.json"), serde_json::to_vec(&top)?)?)
}

/// The one manifest that `index.json` of a layout names.
pub fn manifest(layout: &Path) -> Result<Value> {
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    Ok(index["manifests"][0].clone())
}

/// This machine's architecture as OCI spells it.
pub fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        other => other,
    }
}

/// `sha256:` and the digest of `bytes`.
pub fn digest(bytes: &[u8]) -> String {
    name_of(Sha256::new_with_prefix(bytes))
}

fn name_of(hash: Sha256) -> String {
    hash.finalize().iter().fold("sha256:".to_owned(), |name, byte| format!("{name}{byte:02x}"))
}

/// Copies `stream` into `sink` and gives the digest of what was copied.
fn digest_copy<W: Write>(stream: &mut impl Read, mut sink: W) -> io::Result<(String, W)> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok((name_of(hash), sink)),
            count => {
                hash.update(&buffer[..count]);
                sink.write_all(&buffer[..count])?;
            }
        }
    }
}

/// A blob that gets its name, the digest, when it is complete.
struct BlobWriter {
    directory: PathBuf,
    unnamed: PathBuf,
    file: io::BufWriter<File>,
    hash: Sha256,
    size: u64,
}

impl BlobWriter {
    fn create(layout: &Path) -> io::Result<Self> {
        let directory = layout.join("blobs/sha256");
        let unnamed = directory.join("unnamed");
        let file = io::BufWriter::with_capacity(1 << 18, File::create(&unnamed)?);
        Ok(Self { directory, unnamed, file, hash: Sha256::new(), size: 0 })
    }

    /// The descriptor of the finished blob.
    fn finish(mut self, media_type: &str) -> Result<Value> {
        self.file.flush()?;
        let digest = name_of(self.hash);
        fs::rename(&self.unnamed, self.directory.join(&digest["sha256:".len()..]))?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": self.size }))
    }
}

impl Write for BlobWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.size += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}
