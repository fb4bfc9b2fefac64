//! Images for who runs a command, as himself: from a registry through his own cache into one tree, a squashfs file or a
//! directory. `pyxis import` and `pyxis load`.
//!
//! ```text
//! registry ─▶ cache ─▶ sha256 ─▶ inflate ─▶ sha256 ─▶ merge ─▶ sink
//!  several layers at once         one layer after the other, topmost first
//! ```

#![forbid(unsafe_code)]

pub mod cache;
mod fetch;
mod sinks;

use std::collections::HashSet;
use std::io::{self, Read};

pub use fetch::Fetch;
pub use sinks::{DirectorySink, SquashfsSink};

use crate::enroot::generated;
use crate::image::config::ImageConfig;
use crate::image::digest::Digest;
use crate::import::merge::{Merge, Sink};
use crate::import::{LayerError, LayerLimits};
use crate::importer::layer::{ImportError, stream};
use crate::importer::protocol::LayerDescriptor;
use crate::registry::error::RegistryError;
use crate::registry::places::Undelivered;
use crate::sys;
use cache::CacheError;

/// Why there is no image.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry.
    #[error(transparent)]
    Registry(Box<RegistryError>),
    /// The user's cache.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// A layer.
    #[error("layer {digest}: {cause}{again}")]
    Layer {
        /// Of its blob.
        digest: Digest,
        /// What is wrong with it.
        cause: Box<ImportError>,
        /// What was done about it: `; …`, or nothing.
        again: String,
    },
    /// The result.
    #[error("cannot write the container's files: {}", sys::reason(.0))]
    Write(#[source] io::Error),
    /// No threads.
    #[error("cannot start a thread: {}", sys::reason(.0))]
    Thread(#[source] io::Error),
}

impl From<RegistryError> for PullError {
    fn from(error: RegistryError) -> Self {
        Self::Registry(Box::new(error))
    }
}

impl PullError {
    fn layer(digest: Digest, cause: ImportError) -> Self {
        match cause {
            ImportError::Layer(LayerError::Write(error)) => Self::Write(error),
            cause => Self::Layer { digest, cause: Box::new(cause), again: String::new() },
        }
    }

    /// The blob could not be had.
    fn undelivered(digest: Digest, undelivered: Undelivered<Self>) -> Self {
        match (undelivered.error, undelivered.again) {
            (Self::Layer { cause, .. }, Some(again)) => Self::Layer { digest, cause, again: format!("; {again}") },
            (error, _) => error,
        }
    }

    fn result(error: LayerError) -> Self {
        match error {
            LayerError::Write(error) => Self::Write(error),
            // Files of our own are not malformed; a path of the image's may be.
            other => Self::Write(io::Error::other(other.to_string())),
        }
    }
}

/// Merges the layers of an image, lowest first in `layers`, into `sink`, and adds what enroot's images have. `open` gives
/// a layer's blob, perhaps twice; `have_digests` says whether blobs have digests of their own, or only content. `source` is
/// where the image comes from, as `docker://…`.
pub fn unpack<S: Sink, R: Read + Send>(
    (layers, have_digests): (&[LayerDescriptor], bool),
    config: &ImageConfig,
    source: &str,
    limits: LayerLimits,
    mut open: impl FnMut(usize) -> Result<R, PullError>,
    sink: S,
) -> Result<S, PullError> {
    let mut merge = Merge::new(sink, limits);
    // Of a layer that occurs twice only the upper one counts.
    let mut seen = HashSet::new();
    let topmost_first = layers.iter().enumerate().rev().filter(|(_, layer)| seen.insert(layer.diff_id));
    for (index, layer) in topmost_first {
        let failed = |cause| PullError::layer(layer.blob, cause);
        let blob = have_digests.then_some(&layer.blob);
        if stream(open(index)?, blob, &layer.diff_id, |_| {}, |tar| merge.layer(tar)).map_err(failed)? {
            stream(open(index)?, blob, &layer.diff_id, |_| {}, |tar| merge.links(tar)).map_err(failed)?;
        }
    }
    for file in generated::files(config, Some(source)) {
        merge.put(file.path.as_bytes(), file.mode, file.content.as_bytes()).map_err(PullError::result)?;
    }
    // Mount points that a container makes for itself nobody can use.
    let directories = config.volumes.iter().chain([&config.working_dir]);
    for directory in directories.filter(|directory| !directory.trim_matches('/').is_empty()) {
        // A path that cannot be, in a config, is no reason to fail: whoever uses it will be told.
        if let Err(LayerError::Write(error)) = merge.ensure_directory(directory.as_bytes()) {
            return Err(PullError::Write(error));
        }
    }
    merge.finish().map_err(PullError::result)
}
