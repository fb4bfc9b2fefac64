//! What broker and importer say to each other, over one [`Channel`](crate::sys::channel::Channel).
//!
//! ```text
//! broker → Resolve (+ a channel to who looks for the user's credentials, + files of the site's)
//!          importer → Resolved (+ memory file with the image config)      or Failed
//! broker → Open (+ what the source reader opened)                          instead, for an image on this machine
//!          importer → Resolved (+ memory file with the image config)      or Failed
//! broker → Convert (+ a squashfs file, + the unnamed file to write)        instead, and nothing else follows
//!          importer → Progress …, Converted                               or Failed
//! broker → Examine, if a rule of the administrator's asks for more than the image's name
//!          importer → Examined                                            or Failed
//! broker → Confirm, for a layer that is in the store and came from this registry
//!          importer → Confirmed
//! broker → Fetch (+ the unnamed file to write), for a layer that is missing or came from elsewhere
//!          importer → Progress …, Fetched                                 or Failed
//! broker → closes the channel: the importer ends
//! ```
//!
//! `Confirm` and `Fetch` may be sent for several layers at once; answers come in any order. The first `Failed` ends the
//! conversation. The importer sees neither a store path nor a user's file: only descriptors that the broker opened.

use serde::{Deserialize, Serialize};

use crate::config::RegistryConfig;
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::registry::proxy::{Source, Variables};
use crate::registry::site::SiteFile;
use crate::request::LocalForm;
use crate::source::SourceForm;

/// From the broker to the importer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Command {
    /// Find the image. Descriptors: a channel on which to ask for credentials
    /// ([`Asker`](crate::registry::credentials::remote::Asker)), and each of `site_files`.
    Resolve {
        /// The image the user asked for.
        reference: ImageReference,
        /// Mirrors, plain HTTP, timeouts.
        registries: Box<RegistryConfig>,
        /// Proxies that the job names, or the shell, as far as they may.
        proxy: (Source, Variables),
        /// Files of the site's for the image's registry and its mirrors.
        site_files: Vec<SiteFile>,
        /// Bounds of one layer.
        limits: ImportLimits,
    },
    /// Read an image that its user has on this machine. Descriptors: what the source reader opened, and for a stream an
    /// empty file, open for reading and writing, to keep it in.
    Open {
        /// What the first descriptor is.
        form: SourceForm,
        /// As what it is to be read; `None` if whatever it is will do.
        wanted: Option<LocalForm>,
        /// Which of its images.
        name: Option<String>,
        /// What the user calls it, for messages.
        shown: String,
        /// Bounds of one layer.
        limits: ImportLimits,
    },
    /// Make a layer of a squashfs file. Two descriptors: the file, and an empty one, open for reading and writing. The only
    /// command to an importer.
    Convert {
        /// Bounds of the layer.
        limits: ImportLimits,
    },
    /// Say what the administrator's rules ask for, after [`Report::Resolved`]: digests of the image, and who has signed it.
    Examine {
        /// Public keys in PEM, one of which has to have signed the image; none if no signature is needed.
        keys: Vec<String>,
        /// What may be signed: digests of the manifest and of indexes that it was found by.
        digests: Vec<Digest>,
    },
    /// Ask the registry whether this user may have layer `layer` (`HEAD` of its blob with the user's credentials).
    Confirm {
        /// Index into [`Report::Resolved`]'s layers.
        layer: usize,
    },
    /// Download layer `layer` and write its EROFS image to the one descriptor of this message: an empty file, open for
    /// reading and writing.
    Fetch {
        /// Index into [`Report::Resolved`]'s layers.
        layer: usize,
    },
}

/// From the importer to the broker.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Report {
    /// The image was found. One descriptor: a memory file with the image config's bytes, already checked against the
    /// manifest.
    Resolved {
        /// Digest of the platform's manifest (not of an index), computed over the bytes received.
        manifest: Digest,
        /// Where the layers come from, `HOST[:PORT]/REPOSITORY`: the endpoint that answered, which may be a mirror. Empty
        /// for an image on this machine.
        origin: String,
        /// Lowest layer first.
        layers: Vec<LayerDescriptor>,
        /// One line each, for the user: what may go wrong with this image.
        warnings: Vec<String>,
    },
    /// The answer to `Examine`.
    Examined {
        /// Digests of the manifest and of the indexes that it was found by.
        digests: Vec<Digest>,
        /// Index of a key that has signed one of them.
        signed_by: Option<usize>,
        /// If none has: what was seen.
        problem: String,
    },
    /// The registry's answer to `Confirm`.
    Confirmed {
        /// The layer asked about.
        layer: usize,
        /// Whether this user may have it.
        allowed: bool,
    },
    /// Bytes of the compressed blob received since the last report of this layer (throttled).
    Progress {
        /// The layer being fetched.
        layer: usize,
        /// Compressed bytes since the last report.
        bytes: u64,
    },
    /// Something went wrong and is tried again.
    Trouble {
        /// One line for the user.
        message: String,
    },
    /// The layer will not come from where the image was found, but from another of its endpoints.
    Elsewhere {
        /// The layer asked for.
        layer: usize,
        /// `HOST[:PORT]/REPOSITORY`.
        origin: String,
    },
    /// The layer image is complete: the blob has the digest of its descriptor and the uncompressed stream has the
    /// config's diffID.
    Fetched {
        /// The layer asked for.
        layer: usize,
        /// Bytes of the uncompressed tar stream.
        unpacked: u64,
        /// Bytes of the layer image.
        image: u64,
    },
    /// The squashfs file has become a layer.
    Converted {
        /// Digest of its content: the layer's name.
        content: Digest,
        /// Bytes of the layer image.
        image: u64,
    },
    /// The import cannot go on.
    Failed {
        /// Whose fault it is, for exit codes and retries.
        kind: FailureKind,
        /// One line for the user: what failed, on what, why, and what to do.
        message: String,
    },
}

/// One layer of the manifest, with its diffID from the config.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerDescriptor {
    /// Digest of the (compressed) blob.
    pub blob: Digest,
    /// Digest of the uncompressed tar stream: the layer's name in the store.
    pub diff_id: Digest,
    /// Bytes of the blob.
    pub size: u64,
}

/// Bounds on what an image may make us do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportLimits {
    /// Most bytes of one uncompressed layer.
    pub max_layer_bytes: u64,
    /// Most entries (files, directories, links) of one layer.
    pub max_layer_entries: u64,
    /// Layers downloaded at the same time.
    pub max_connections: usize,
}

/// Sorts failures by what helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// No such image, tag, blob or platform.
    NotFound,
    /// The registry refuses these credentials, or wants some.
    Denied,
    /// The network, DNS, TLS, or a registry in trouble: another try may help.
    Unavailable,
    /// The image is malformed, lies about a digest or exceeds a limit.
    BadImage,
    /// This machine: no space, no memory, I/O error.
    Local,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::manifest::MAX_LAYERS;

    #[test]
    fn the_largest_image_fits_into_a_message() {
        let digest = Digest::from_bytes([0xff; 32]);
        let layer = LayerDescriptor { blob: digest, diff_id: digest, size: u64::MAX };
        let report = Report::Resolved {
            manifest: digest,
            origin: "x".repeat(253 + 1 + 255),
            layers: vec![layer; MAX_LAYERS],
            warnings: vec!["x".repeat(1000)],
        };
        let (importer, broker) = crate::sys::channel::pair::<Report, Command>().unwrap();
        importer.send(&report, &[]).unwrap();
        assert!(matches!(broker.receive(), Ok(Some((Report::Resolved { .. }, _)))));
    }
}
