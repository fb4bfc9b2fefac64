//! Image indexes and manifests (OCI image-spec 1.1, and Docker's manifest v2, schema 2, from which it came).
//!
//! Only the fields that a pull needs are read, and everything else is skipped without being kept, so that a document of
//! the largest allowed size costs little memory. What an index says about images for other platforms is not judged.

#![forbid(unsafe_code)]

use serde::Deserialize;

use crate::image::digest::Digest;
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;

/// Most bytes of an index or manifest (distribution-spec 1.1 asks for at least 4 MiB).
pub const MAX_MANIFEST_BYTES: u64 = 4 * 1024 * 1024;

/// Most layers of an image: what overlayfs stacks (`OVL_MAX_STACK` in the kernel's `fs/overlayfs/params.h`).
pub const MAX_LAYERS: usize = 500;

const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";

const FOREIGN: [&str; 2] =
    ["application/vnd.oci.image.layer.nondistributable.v1.tar", "application/vnd.docker.image.rootfs.foreign.diff.tar"];

/// The `Accept` header for a manifest request.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

/// A reference to a blob or manifest (descriptor.md).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// Digest of its bytes.
    pub digest: Digest,
    /// Number of its bytes.
    pub size: u64,
}

/// What a registry answers to a request for a manifest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image for several platforms.
    Index(Index),
    /// One image.
    Manifest(Manifest),
}

/// An image manifest: config and layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The image config.
    pub config: Descriptor,
    /// Lowest layer first; at least one and at most [`MAX_LAYERS`].
    pub layers: Vec<Descriptor>,
}

/// An image index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    entries: Vec<RawDescriptor>,
}

/// Why a document is no image that can run.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not JSON, or fields of the wrong type.
    #[error("malformed manifest: {0}")]
    Json(#[from] serde_json::Error),
    /// Docker's schema 1.
    #[error("manifest of the obsolete schema 1: push the image again with a current tool")]
    SchemaOne,
    /// Some other version.
    #[error("manifest of the unknown schema version {0}")]
    SchemaVersion(u64),
    /// Neither index nor manifest, or both at once.
    #[error("neither an image manifest nor an image index (media type \"{0}\")")]
    Unknown(String),
    /// An OCI artifact: a chart, a signature, a model.
    #[error(
        "not a container image but an artifact of type \"{0}\" (a chart, a signature, a model …): nothing can run in it"
    )]
    Artifact(String),
    /// A digest that is missing or of the wrong form.
    #[error("malformed manifest: {0}")]
    Digest(#[from] crate::image::digest::InvalidDigest),
    /// No layers.
    #[error("the image has no layers: there is nothing to run in it")]
    NoLayers,
    /// More than [`MAX_LAYERS`].
    #[error("the image has {0} layers, more than the {MAX_LAYERS} that overlayfs can stack")]
    TooManyLayers(usize),
    /// A layer that is no tar archive.
    #[error("layer {digest} has the media type \"{media_type}\", which is not a file system layer")]
    LayerType {
        /// The layer.
        digest: Digest,
        /// Its media type.
        media_type: String,
    },
    /// The index of a layout has nothing with this name.
    #[error("no image called \"{name}\": there is {offered}")]
    NoName {
        /// What was asked for.
        name: String,
        /// What the index has.
        offered: String,
    },
    /// The index of a layout has several images.
    #[error("there are several images ({0}): say which one, as in oci:PATH:NAME")]
    Ambiguous(String),
    /// The index has nothing for this machine.
    #[error("no image for {host}: there is one for {offered}; choose another tag, or nodes of that kind")]
    NoPlatform {
        /// This machine.
        host: Platform,
        /// What the index has.
        offered: String,
    },
}

/// The fields of all four kinds of document.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    media_type: Option<String>,
    artifact_type: Option<String>,
    manifests: Option<Vec<RawDescriptor>>,
    config: Option<RawDescriptor>,
    layers: Option<Vec<RawDescriptor>>,
}

/// The digest stays text: an index may hold digests that we cannot read, for images that we do not want.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawDescriptor {
    #[serde(default)]
    media_type: String,
    digest: String,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<Names>,
}

/// How an image is called in the index of an OCI layout (annotations.md; containerd's convention, which docker follows).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
struct Names {
    #[serde(rename = "org.opencontainers.image.ref.name")]
    tag: Option<String>,
    #[serde(rename = "io.containerd.image.name")]
    full: Option<String>,
}

impl Descriptor {
    /// Whether it is a layer that registries need not have: whoever made it lets only himself hand it out (layer.md,
    /// "Non-Distributable Layers").
    pub fn is_foreign(&self) -> bool {
        FOREIGN.iter().any(|prefix| self.media_type.starts_with(prefix))
    }
}

impl TryFrom<RawDescriptor> for Descriptor {
    type Error = ManifestError;

    fn try_from(raw: RawDescriptor) -> Result<Self, ManifestError> {
        Ok(Self { media_type: raw.media_type, digest: raw.digest.parse()?, size: raw.size })
    }
}

impl Document {
    /// Reads the answer to a manifest request; `content_type` is its header.
    pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Self, ManifestError> {
        // Schema 1 has none of the fields below: look at the version alone first.
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Version {
            schema_version: Option<u64>,
        }
        match serde_json::from_slice::<Version>(bytes)?.schema_version {
            Some(2) => {}
            Some(1) => return Err(ManifestError::SchemaOne),
            Some(other) => return Err(ManifestError::SchemaVersion(other)),
            None => return Err(ManifestError::Unknown(shown(content_type.unwrap_or_default()))),
        }
        let raw: Raw = serde_json::from_slice(bytes)?;
        let header = content_type.and_then(|header| header.split(';').next()).unwrap_or_default().trim();
        let media_type = raw.media_type.as_deref().unwrap_or(header);
        // A document that can be read as both would be one image to us and another to a scanner (CVE-2021-41190).
        match (media_type, raw.manifests, raw.config, raw.layers) {
            (OCI_MANIFEST | DOCKER_MANIFEST, None, Some(config), layers) => {
                Manifest::new(config, layers.unwrap_or_default(), raw.artifact_type.as_deref()).map(Document::Manifest)
            }
            (OCI_INDEX | DOCKER_LIST, Some(entries), None, None) => Ok(Document::Index(Index { entries })),
            // The media type is optional in OCI documents, and some registries send a generic header.
            (_, None, Some(config), Some(layers)) if raw.media_type.is_none() && raw.artifact_type.is_none() => {
                Manifest::new(config, layers, None).map(Document::Manifest)
            }
            (_, Some(entries), None, None) if raw.media_type.is_none() => Ok(Document::Index(Index { entries })),
            (media_type, ..) => Err(match raw.artifact_type {
                Some(artifact) => ManifestError::Artifact(shown(&artifact)),
                None => ManifestError::Unknown(shown(media_type)),
            }),
        }
    }
}

impl Manifest {
    fn new(config: RawDescriptor, layers: Vec<RawDescriptor>, artifact: Option<&str>) -> Result<Self, ManifestError> {
        const CONFIGS: [&str; 2] =
            ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
        if !CONFIGS.contains(&&*config.media_type) {
            return Err(ManifestError::Artifact(shown(artifact.unwrap_or(&config.media_type))));
        }
        match layers.len() {
            0 => return Err(ManifestError::NoLayers),
            1..=MAX_LAYERS => {}
            count => return Err(ManifestError::TooManyLayers(count)),
        }
        let layers = layers.into_iter().map(Descriptor::try_from).collect::<Result<Vec<_>, _>>()?;
        if let Some(layer) = layers.iter().find(|layer| !is_layer(&layer.media_type)) {
            return Err(ManifestError::LayerType { digest: layer.digest, media_type: shown(&layer.media_type) });
        }
        Ok(Self { config: config.try_into()?, layers })
    }
}

impl Index {
    /// Of the index of an OCI layout the images called `name`: a tag, a full name, or `@` and a number; all of them, for
    /// several platforms, without a name.
    pub fn named(self, name: Option<&str>) -> Result<Self, ManifestError> {
        let offered = self.names();
        let entries: Vec<RawDescriptor> = match name {
            None if offered.len() > 1 => return Err(ManifestError::Ambiguous(offered.join(", "))),
            None => self.entries,
            Some(name) => {
                let number = name.strip_prefix('@').and_then(|number| number.parse::<usize>().ok());
                let is_it = |(at, entry): &(usize, RawDescriptor)| match number {
                    Some(number) => number == *at,
                    None => entry.is_called(name),
                };
                self.entries.into_iter().enumerate().filter(is_it).map(|(_, entry)| entry).collect()
            }
        };
        if entries.is_empty() {
            let offered = if offered.is_empty() { "none with a name".to_owned() } else { offered.join(", ") };
            return Err(ManifestError::NoName { name: shown(name.unwrap_or_default()), offered });
        }
        Ok(Self { entries })
    }

    /// What its images are called: a dozen at most.
    fn names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for entry in self.entries.iter().filter(|entry| is_image_document(&entry.media_type)) {
            let known = entry.annotations.as_ref().and_then(|names| names.full.as_ref().or(names.tag.as_ref()));
            let name = known.map(|name| shown(name));
            if let Some(name) = name.filter(|name| !names.contains(name) && names.len() < 12) {
                names.push(name);
            }
        }
        names
    }

    /// The manifest, or the nested index, for `host`: of those that run there the one for the highest variant, and the
    /// first of equals.
    pub fn choose(&self, host: &Platform) -> Result<Descriptor, ManifestError> {
        let ranked = self.entries.iter().rev().filter_map(|entry| {
            let rank = host.rank(entry.platform.as_ref()?)?;
            is_image_document(&entry.media_type).then_some((rank, entry))
        });
        let unnamed = || {
            let mut entries =
                self.entries.iter().filter(|entry| entry.platform.is_none() && is_image_document(&entry.media_type));
            // Nothing to choose from: the config will tell whether it fits.
            entries.next().filter(|_| entries.next().is_none())
        };
        match ranked.max_by_key(|(rank, _)| *rank).map(|(_, entry)| entry).or_else(unnamed) {
            Some(entry) => entry.clone().try_into(),
            None => Err(ManifestError::NoPlatform { host: host.clone(), offered: self.offered() }),
        }
    }

    fn offered(&self) -> String {
        let mut platforms: Vec<String> = Vec::new();
        for platform in self.entries.iter().filter_map(|entry| entry.platform.as_ref()) {
            let name = platform.to_string();
            // Attestations are filed as images for an unknown platform.
            if platform.os != "unknown" && !platforms.contains(&name) && platforms.len() < 12 {
                platforms.push(name);
            }
        }
        if platforms.is_empty() { "no platform".to_owned() } else { platforms.join(", ") }
    }
}

impl RawDescriptor {
    fn is_called(&self, name: &str) -> bool {
        let Some(names) = &self.annotations else { return false };
        names.tag.as_deref() == Some(name) || names.full.as_deref().is_some_and(|full| same_image(full, name))
    }
}

/// Whether two names mean one image: `busybox` and `docker.io/library/busybox:latest` do.
pub(super) fn same_image(one: &str, other: &str) -> bool {
    one == other
        || match (ImageReference::parse(one), ImageReference::parse(other)) {
            (Ok(one), Ok(other)) => one == other,
            _ => false,
        }
}

fn is_image_document(media_type: &str) -> bool {
    matches!(media_type, "" | OCI_INDEX | DOCKER_LIST | OCI_MANIFEST | DOCKER_MANIFEST)
}

/// Whether this is a tar archive, in any compression (which the blob's first bytes tell).
fn is_layer(media_type: &str) -> bool {
    let rest = ["application/vnd.oci.image.layer.v1.tar", "application/vnd.docker.image.rootfs.diff.tar"]
        .into_iter()
        .chain(FOREIGN)
        .find_map(|prefix| media_type.strip_prefix(prefix));
    matches!(rest, Some("" | "+gzip" | "+zstd" | ".gzip" | ".zstd"))
}

/// A text from the document, for a message of one line.
pub(super) fn shown(text: &str) -> String {
    text.chars().take(100).flat_map(char::escape_debug).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn digest(digit: char) -> String {
        format!("sha256:{}", String::from(digit).repeat(64))
    }

    fn manifest() -> Value {
        json!({
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest('a'), "size": 7},
            "layers": [
                {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": digest('b'), "size": 8},
                {"mediaType": "application/vnd.docker.image.rootfs.diff.tar.zstd", "digest": digest('c'), "size": 9},
            ],
            "annotations": {"x": "y"},
        })
    }

    fn parse(value: &Value) -> Result<Document, ManifestError> {
        Document::parse(value.to_string().as_bytes(), Some("application/json; charset=utf-8"))
    }

    fn edited(edit: impl FnOnce(&mut Value)) -> Value {
        let mut value = manifest();
        edit(&mut value);
        value
    }

    #[test]
    fn reads_manifests_of_both_families() {
        let docker = edited(|value| {
            value["mediaType"] = DOCKER_MANIFEST.into();
            value["config"]["mediaType"] = "application/vnd.docker.container.image.v1+json".into();
        });
        let untyped = edited(|value| {
            value.as_object_mut().unwrap().remove("mediaType");
        });
        for value in [manifest(), docker, untyped] {
            let Document::Manifest(manifest) = parse(&value).unwrap() else { panic!("{value}") };
            assert_eq!(manifest.config.size, 7);
            assert_eq!(manifest.layers.iter().map(|layer| layer.size).collect::<Vec<_>>(), [8, 9]);
        }
    }

    #[test]
    fn reads_what_oci_spec_reads() {
        let judge: oci_spec::image::ImageManifest = serde_json::from_value(manifest()).unwrap();
        let Document::Manifest(ours) = parse(&manifest()).unwrap() else { panic!("a manifest") };
        let judged: Vec<_> = std::iter::once(judge.config()).chain(judge.layers()).collect();
        let ours: Vec<_> = std::iter::once(&ours.config).chain(&ours.layers).collect();
        assert_eq!(ours.len(), judged.len());
        for (ours, judged) in ours.into_iter().zip(judged) {
            assert_eq!(ours.media_type, judged.media_type().to_string());
            assert_eq!(ours.digest.to_string(), judged.digest().to_string());
            assert_eq!(ours.size, judged.size());
        }
    }

    #[test]
    fn refuses_what_is_no_image() {
        let layers = |count: usize| vec![manifest()["layers"][0].clone(); count];
        for (value, message) in [
            (json!({"schemaVersion": 1, "fsLayers": []}), "obsolete schema 1"),
            (json!({"schemaVersion": 3}), "schema version 3"),
            (json!({"schemaVersion": 2}), "neither"),
            (json!({}), "neither"),
            (json!([]), "malformed manifest"),
            (edited(|value| value["layers"] = json!([])), "no layers"),
            (edited(|value| value["layers"] = json!(null)), "no layers"),
            (edited(|value| value["layers"] = layers(501).into()), "501 layers"),
            (edited(|value| value["manifests"] = json!([])), "neither"),
            (edited(|value| value["layers"][1]["digest"] = "sha256:../../etc".into()), "invalid digest"),
            (edited(|value| value["layers"][1]["size"] = (-1).into()), "malformed manifest"),
            (edited(|value| value["layers"][1]["mediaType"] = "application/vnd.in-toto+json".into()), "in-toto"),
            (edited(|value| value["config"]["mediaType"] = "application/vnd.cncf.helm.config".into()), "artifact"),
            (edited(|value| value["mediaType"] = "application/vnd.oci.artifact.manifest.v1+json".into()), "neither"),
            (
                edited(|value| {
                    value["mediaType"] = "application/vnd.oci.artifact.manifest.v1+json".into();
                    value["artifactType"] = "application/vnd.example\n".into();
                }),
                r#"artifact of type "application/vnd.example\n""#,
            ),
            (
                edited(|value| {
                    value["artifactType"] = "application/vnd.example".into();
                    value["config"]["mediaType"] = "application/vnd.oci.empty.v1+json".into();
                }),
                r#"artifact of type "application/vnd.example""#,
            ),
        ] {
            let error = parse(&value).unwrap_err().to_string();
            assert!(error.contains(message), "{value}: {error}");
            assert!(!error.contains('\n'));
        }
        assert!(parse(&edited(|value| value["layers"] = layers(500).into())).is_ok());
    }

    fn index(platforms: &[(&str, char)]) -> Index {
        let entries = platforms.iter().map(|(platform, digit)| {
            let mut parts = platform.split('/');
            json!({
                "mediaType": OCI_MANIFEST,
                "digest": if *digit == '!' { "md5:0".into() } else { digest(*digit) },
                "size": 1,
                "platform": {"os": parts.next(), "architecture": parts.next(), "variant": parts.next()},
            })
        });
        let value = json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries.collect::<Vec<_>>()});
        let Document::Index(index) = parse(&value).unwrap() else { panic!("{value}") };
        index
    }

    #[test]
    fn chooses_the_best_manifest_for_the_host() {
        let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: Some("v3".into()) };
        for (platforms, chosen) in [
            (&[("unknown/unknown", '0'), ("windows/amd64", '1'), ("linux/amd64", '2')][..], '2'),
            (&[("linux/arm64/v8", '0'), ("linux/amd64", '1'), ("linux/amd64/v3", '2'), ("linux/amd64/v4", '3')], '2'),
            (&[("linux/amd64", '1'), ("linux/amd64", '2')], '1'),
            (&[("linux/s390x", '!'), ("linux/amd64", '2')], '2'),
        ] {
            assert_eq!(
                index(platforms).choose(&host).unwrap().digest,
                digest(chosen).parse().unwrap(),
                "{platforms:?}"
            );
        }
        let error = index(&[("linux/arm64/v8", '0'), ("unknown/unknown", '1'), ("windows/amd64", '2')]).choose(&host);
        assert_eq!(
            error.unwrap_err().to_string(),
            "no image for linux/amd64/v3: there is one for linux/arm64/v8, windows/amd64; choose another tag, or nodes of \
             that kind"
        );
        assert!(index(&[("linux/amd64", '!')]).choose(&host).is_err());
        assert!(index(&[]).choose(&host).is_err());
    }

    #[test]
    fn an_only_entry_without_platform_is_taken() {
        let entry = json!({"mediaType": OCI_MANIFEST, "digest": digest('4'), "size": 1});
        let parse = |entries: Vec<Value>| match parse(&json!({"schemaVersion": 2, "manifests": entries})).unwrap() {
            Document::Index(index) => index.choose(&Platform::host()),
            Document::Manifest(_) => panic!(),
        };
        assert_eq!(parse(vec![entry.clone()]).unwrap().size, 1);
        assert!(parse(vec![entry.clone(), entry]).is_err());
    }

    #[test]
    fn the_images_of_a_layout_have_names() {
        let entry = |digit, name: Value| {
            let media_type = OCI_MANIFEST;
            json!({"mediaType": media_type, "digest": digest(digit), "size": 1, "annotations": name})
        };
        let tag = |tag: &str| json!({"org.opencontainers.image.ref.name": tag});
        let docker = json!({
            "org.opencontainers.image.ref.name": "2",
            "io.containerd.image.name": "docker.io/library/busybox:2"
        });
        let index = |entries: &[Value]| match parse(&json!({"schemaVersion": 2, "manifests": entries})).unwrap() {
            Document::Index(index) => index,
            Document::Manifest(_) => panic!(),
        };
        let entries = [entry('a', tag("1")), entry('b', docker), entry('c', json!(null))];
        let choose = |name| {
            let chosen = index(&entries).named(name)?.choose(&Platform::host())?;
            Ok::<_, ManifestError>(chosen.digest.to_string())
        };
        for (name, expected) in [("1", 'a'), ("2", 'b'), ("busybox:2", 'b'), ("@2", 'c'), ("@0", 'a')] {
            assert_eq!(choose(Some(name)).unwrap(), digest(expected), "{name}");
        }
        assert_eq!(
            choose(None).unwrap_err().to_string(),
            "there are several images (1, docker.io/library/busybox:2): say which one, as in oci:PATH:NAME"
        );
        for name in ["3", "@3", "@x", "busybox"] {
            let error = choose(Some(name)).unwrap_err().to_string();
            assert_eq!(error, format!("no image called \"{name}\": there is 1, docker.io/library/busybox:2"));
        }
        assert!(index(&entries[2..]).named(None).is_ok() && index(&entries[..1]).named(None).is_ok());
        assert!(index(&[]).named(None).is_err());
    }

    proptest! {
        #[test]
        fn never_panics(bytes in any::<Vec<u8>>()) {
            let _ = Document::parse(&bytes, None);
        }

        #[test]
        fn survives_damage(at in 0usize..600, byte in any::<u8>()) {
            let mut bytes = manifest().to_string().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            if let Ok(Document::Index(index)) = Document::parse(&bytes, None) {
                let _ = index.choose(&Platform::host());
            }
        }
    }
}
