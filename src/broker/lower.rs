//! What a root filesystem is made of: a new image's layers, or those of a container that exists.

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;

use super::error::{BrokerError, failed};
use super::image::{Acquired, Acquisition};
use super::import::{self, ImportError};
use super::squashfs::FuseServer;
use super::{Step, named};
use crate::container::InUse;
use crate::container::record::{Lower, Record};
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::metrics::Meter;
use crate::policy::Subject;
use crate::store::{LeasedLayer, Store};

/// What a new root filesystem is made of.
pub(super) struct Image {
    pub config: Vec<u8>,
    /// The platform's manifest, if it is known.
    pub digest: Option<Digest>,
    pub layers: Vec<LeasedLayer>,
    /// What is used instead of layers.
    pub squashfs: Option<Squashfs>,
    /// For those who come later. `None` for what cannot be joined or kept.
    pub record: Option<Record>,
}

/// A squashfs file that is no layer.
pub(super) enum Squashfs {
    Mount(OwnedFd),
    Fuse(FuseServer),
}

impl Step<'_> {
    /// The image that the request names, for a new container.
    pub(super) fn acquire(&mut self) -> Result<Image, BrokerError> {
        let Self { leader, life, config, request, environment, mounts, metrics, .. } = self;
        let (in_use, meter) = (&InUse::new(mounts, &config.container.path), Meter::default());
        let mut acquisition =
            Acquisition { leader, life, config, request, environment, in_use, metrics, meter, turn: None };
        let image = acquisition.acquire()?;
        self.imported = acquisition.meter.imported();
        let of_squashfs =
            |squashfs| Image { config: vec![], digest: None, layers: vec![], squashfs: Some(squashfs), record: None };
        let image = match image {
            Acquired::Layers(image) => image,
            Acquired::Mount(mount) => return Ok(of_squashfs(Squashfs::Mount(mount))),
            Acquired::Fuse(server) => return Ok(of_squashfs(Squashfs::Fuse(server))),
        };
        tracing::debug!(manifest = %image.manifest, layers = image.layers.len(), after = ?self.began.elapsed(), "have the image");
        let record = self.name.as_ref().and_then(|_| named::record(&self.request, &image));
        // What was made of a squashfs file has no config, and its digest means nothing elsewhere.
        let digest = (!image.config.is_empty()).then_some(image.manifest);
        if let Some(digest) = &digest {
            tracing::info!("image digest {digest}");
        }
        Ok(Image { config: image.config, digest, layers: image.layers, squashfs: None, record })
    }

    /// Whether a container may be used again that was made from an image which the rules may not allow any more.
    pub(super) fn permit(&self, record: &Record) -> Result<(), BrokerError> {
        let reference = match &record.lower {
            Lower::Layers { reference, .. } => reference.as_ref(),
            Lower::Tree(_) => None,
        };
        let subject = Subject::kept(&self.request.user, reference, record.source, &record.image);
        import::settled(&self.config.import_settings(), &subject, &record.evidence).map_err(|error| {
            let name = self.name.as_ref().map(ToString::to_string).unwrap_or_default();
            BrokerError::Refused(format!("error: the container {name} cannot be used any more: {error}"))
        })
    }

    /// The image of a container that exists. Layers that the store has lost are fetched again.
    pub(super) fn image_of(&mut self, record: Record) -> Result<Image, BrokerError> {
        self.permit(&record)?;
        let layers = match self.leases(&record)? {
            Some(layers) => layers,
            None => self.fetch_again(&record)?,
        };
        Ok(Image {
            config: record.config.clone(),
            digest: record.digest(),
            layers,
            squashfs: None,
            record: Some(record),
        })
    }

    /// `None` if a layer is not in the store.
    pub(super) fn leases(&self, record: &Record) -> Result<Option<Vec<LeasedLayer>>, BrokerError> {
        let store = Store::open(&self.config.store.path).map_err(failed("image store"))?;
        record.layers().iter().map(|layer| store.lease(layer)).collect::<Result<_, _>>().map_err(failed("image store"))
    }

    fn fetch_again(&mut self, record: &Record) -> Result<Vec<LeasedLayer>, BrokerError> {
        let Lower::Layers { reference, manifest, layers } = &record.lower else { return Ok(Vec::new()) };
        let name = self.name.as_ref().map(ToString::to_string).unwrap_or_default();
        let lost = |reason: String| {
            BrokerError::Start(format!(
                "layers of the container {name}, made from {}, are no longer in the store and cannot be had again: \
                 {reason}; \"pyxis remove {name}\" removes the container",
                record.image
            ))
        };
        let Some(reference) = reference else { return Err(lost("they came from no registry".into())) };
        let exact = ImageReference { tag_or_digest: manifest.to_string(), ..reference.clone() };
        tracing::warn!("layers of the container are no longer in the store: importing {exact} again");
        let Self { leader, life, config, request, environment, mounts, metrics, imported, .. } = self;
        *imported = true;
        let (in_use, meter) = (&InUse::new(mounts, &config.container.path), Meter::default());
        let mut acquisition =
            Acquisition { leader, life, config, request, environment, in_use, metrics, meter, turn: None };
        match acquisition.again(&exact) {
            Ok(image) if image.layers.iter().map(|layer| &layer.diff_id).eq(layers) => Ok(image.layers),
            Ok(_) => Err(lost("the registry has other ones now".into())),
            Err(ImportError::Cancelled { .. }) => Err(BrokerError::Cancelled),
            Err(error) => Err(lost(error.to_string())),
        }
    }
}
