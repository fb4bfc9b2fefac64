//! What the store knows of an image, and whose turn it is to ask the registry.

#![forbid(unsafe_code)]

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use super::permit::{self, Permission};
use super::session::pause;
use super::{AcquireRequest, AcquiredImage, ImportError, ImportEvent, ImportSettings, is_fresh, without_password};
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::policy::Subject;
use crate::request::{Meaning, PullPolicy};
use crate::store::{FetchLock, ReferenceRecord, Store, StoreError};

/// How long a node waits for another step's import while others wait for it.
const PATIENCE: Duration = Duration::from_secs(3);

/// An image that a user asks for, as far as the store knows it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Known<'a> {
    pub store: &'a Store,
    pub settings: &'a ImportSettings,
    pub request: AcquireRequest<'a>,
    /// For the administrator's rules.
    pub subject: &'a Subject,
    /// What they say about the name.
    pub permission: Permission,
}

/// Whose turn it is.
#[derive(Debug)]
pub(super) enum Turn<'a> {
    /// Ours, until the lock is dropped.
    Ours(FetchLock<'a>),
    /// Not ours, but other nodes have waited long enough.
    Unlocked,
    /// Another process of this user's has asked meanwhile.
    Done(AcquiredImage),
}

impl<'a> Known<'a> {
    fn record(&self) -> Result<Option<ReferenceRecord>, StoreError> {
        self.store.reference(self.request.user.uid, &without_password(self.request.reference))
    }

    /// The image as this user was given it a short time ago, if all of it is still there, and if what is known of it is all
    /// that the rules ask for.
    pub fn confirmed(&self) -> Result<Option<AcquiredImage>, ImportError> {
        let record = self.record()?.filter(|record| is_fresh(record.confirmed_at, self.settings.confirmation));
        let Some(record) = record.filter(|record| self.is_meant(record)) else { return Ok(None) };
        if self.permission == Permission::Depends {
            // Of a record from before there were rules nothing is known.
            let evidence = &record.evidence;
            if evidence.digests.is_empty() || permit::known(self.settings, self.subject, evidence)?.is_some() {
                return Ok(None);
            }
        }
        Ok(self.image(&record)?)
    }

    /// What the name meant when it was last looked up.
    pub fn meaning(&self) -> Result<Option<Meaning>, StoreError> {
        let name = self.request.reference.to_string();
        Ok(self.record()?.map(|record| {
            let digest = record.evidence.digests.first().copied().unwrap_or(record.manifest);
            Meaning { asked_at: record.confirmed_at, digest, name }
        }))
    }

    /// Whether a record is not of another image than the one that all nodes of the step are to use.
    fn is_meant(&self, record: &ReferenceRecord) -> bool {
        self.settings.meaning_of(self.request.reference).is_none_or(|meaning| {
            record.manifest == meaning.digest || record.evidence.digests.contains(&meaning.digest)
        })
    }

    /// By which indexes `manifest` was found when the user's name for the image was last looked up, if it was found then.
    pub fn ancestors(&self, manifest: &Digest) -> Result<Vec<Digest>, StoreError> {
        let record = self.record()?.filter(|record| record.manifest == *manifest);
        Ok(record.map(|record| record.evidence.digests).unwrap_or_default())
    }

    /// The image of a record, if all of it is still there.
    fn image(&self, record: &ReferenceRecord) -> Result<Option<AcquiredImage>, StoreError> {
        let store = self.store;
        let Some(manifest) = store.manifest(self.request.user.uid, &record.manifest)? else { return Ok(None) };
        let Some(config) = store.config(&manifest.config)? else { return Ok(None) };
        let mut layers = Vec::with_capacity(manifest.layers.len());
        for layer in &manifest.layers {
            let Some(lease) = store.lease(&layer.diff_id)? else { return Ok(None) };
            layers.push(lease);
        }
        let (manifest, evidence) = (record.manifest, record.evidence.clone());
        Ok(Some(AcquiredImage { manifest, config, layers, evidence, from_network: false }))
    }

    /// What the registry is asked for instead of the tag: the digest that all nodes of the step are to use. With
    /// [`PullPolicy::Missing`] what the user's name for the image meant when he was last given it, if that is still there:
    /// the registry has to confirm that he may have it, and is not asked what the name means now.
    pub fn pinned(&self) -> Result<Option<ImageReference>, StoreError> {
        if let Some(meaning) = self.settings.meaning_of(self.request.reference) {
            let tag_or_digest = meaning.digest.to_string();
            return Ok(Some(ImageReference { tag_or_digest, ..self.request.reference.clone() }));
        }
        if self.settings.pull != PullPolicy::Missing {
            return Ok(None);
        }
        let Some(record) = self.record()? else { return Ok(None) };
        let there = self.image(&record)?.is_some();
        let reference = self.request.reference;
        Ok(there.then(|| ImageReference { tag_or_digest: record.manifest.to_string(), ..reference.clone() }))
    }

    /// Waits for the right to ask the registry, which one process at a time has for a user and an image: the others find
    /// what it has learned.
    pub fn lock(
        &self,
        cancel: &[BorrowedFd<'_>],
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<Turn<'a>, ImportError> {
        let name = self.store.reference_lock(self.request.user.uid, &without_password(self.request.reference))?;
        let mut told = false;
        let began = Instant::now();
        loop {
            let lock = self.store.try_lock(&name)?;
            // The previous holder may have noted it just before.
            if let Some(image) = self.confirmed()? {
                return Ok(Turn::Done(image));
            }
            if let Some(lock) = lock {
                return Ok(Turn::Ours(lock));
            }
            // Whoever has the lock may import for hours. What is asked twice costs little, and layers have locks of their own.
            if self.settings.for_others && began.elapsed() > PATIENCE {
                return Ok(Turn::Unlocked);
            }
            if !std::mem::replace(&mut told, true) {
                let image = self.request.reference;
                events(ImportEvent::Log(format!("waiting for another step of the user's that imports {image}")));
            }
            events(ImportEvent::Waiting);
            pause(cancel, &self.request.reference.to_string())?;
        }
    }
}
