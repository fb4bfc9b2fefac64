//! What a command presents to registries: the credentials of who typed it, and the site's files as far as they are for him.
//!
//! Where root has typed it, another process asks, without privileges: it gets the files opened, and asks for credentials
//! when a registry does ([`remote`](crate::registry::credentials::remote)).

use std::cell::Cell;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Context, Error};
use crate::cli::unprivileged;
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;
use crate::registry::config::RegistryConfig;
use crate::registry::credentials::remote::{RemoteKeys, serve};
use crate::registry::credentials::{Answer, Keyrings, Query, SharedKeyring, SiteHelpers, SiteKeys, UserKeys, no_keys};
use crate::registry::error::RegistryError;
use crate::registry::resolve::{Resolved, resolve};
use crate::registry::site::{self, SiteFile};
use crate::sys::channel;

/// What there is to present.
pub struct Asking {
    keys: SharedKeyring,
    files: Vec<(SiteFile, File)>,
}

impl Asking {
    /// Takes in the site's files for `reference`, and gives the site's credentials.
    pub fn complete(&self, registries: &mut RegistryConfig, reference: &ImageReference) -> Result<SiteKeys, Error> {
        let wanted = registries.site_files(reference);
        let mut files = Vec::new();
        for (file, opened) in self.files.iter().filter(|(file, _)| wanted.contains(file)) {
            files.push((file.clone(), opened.try_clone()?));
        }
        let failed = |(path, error): (PathBuf, _)| format!("{}: {}", crate::sys::reason(error), path.display());
        Ok(registries.read_site_files(files).map_err(failed)?)
    }
}

/// Whether a registry has answered that there is no such image, or none for this user.
pub fn is_a_no(error: &Error) -> bool {
    error.downcast_ref::<RegistryError>().is_some_and(RegistryError::is_a_no)
}

impl Context {
    /// The images that `typed` may be.
    fn candidates(&self, typed: &ImageReference) -> Vec<ImageReference> {
        self.config.short_names.candidates(typed)
    }

    /// The site's files for `typed`, opened.
    fn site_files(&self, typed: &ImageReference) -> Result<Vec<(SiteFile, File)>, Error> {
        let mut files: Vec<(SiteFile, File)> = Vec::new();
        for reference in self.candidates(typed) {
            for file in self.registries(&reference).site_files(&reference) {
                let failed = |error| format!("{}: {}", crate::sys::reason(error), file.path.display());
                if let Some(opened) = site::open_for_command(&file).map_err(failed)? {
                    files.push((file, opened));
                }
            }
        }
        Ok(files)
    }

    /// The credentials of who typed the command, for `typed`.
    fn keys(&self, typed: &ImageReference) -> UserKeys {
        let mut helpers = SiteHelpers::new();
        for reference in self.candidates(typed) {
            helpers.extend(self.registries(&reference).site_helpers(&reference));
        }
        // Credentials as the settings say: `ENROOT_CONFIG_PATH` may come from a file.
        UserKeys::new(self.settings.environment().clone(), self.home(), helpers)
    }

    /// Asks the registry for an image, with the user's credentials. A short name is looked for as the site says.
    pub fn resolve(&self, typed: &ImageReference, platform: &Platform) -> Result<Resolved, Error> {
        self.resolve_by(&self.asking(typed)?, typed, platform).map(|(_, resolved)| resolved)
    }

    /// What who typed the command presents himself, for `typed`.
    pub fn asking(&self, typed: &ImageReference) -> Result<Asking, Error> {
        Ok(Asking { keys: Arc::new(self.keys(typed)), files: self.site_files(typed)? })
    }

    /// The image with what `asking` presents, and which one of those it is that a short name may mean.
    pub fn resolve_by(
        &self,
        asking: &Asking,
        typed: &ImageReference,
        platform: &Platform,
    ) -> Result<(ImageReference, Resolved), Error> {
        self.ask(asking, typed, |reference, registries, keyring| resolve(reference, registries, keyring, platform))
    }

    /// What `ask` gets for the first of the images that `typed` may mean, and which one that is.
    pub fn ask<T>(
        &self,
        asking: &Asking,
        typed: &ImageReference,
        ask: impl Fn(&ImageReference, &RegistryConfig, &SharedKeyring) -> Result<T, RegistryError>,
    ) -> Result<(ImageReference, T), Error> {
        let mut found = Err("no registry to search".into());
        for reference in self.candidates(typed) {
            found = self.ask_about(asking, &reference, &ask).map(|answer| (reference, answer));
            // Only an answer sends on to the next one.
            if !found.as_ref().is_err_and(is_a_no) {
                break;
            }
        }
        found
    }

    fn ask_about<T>(
        &self,
        asking: &Asking,
        reference: &ImageReference,
        ask: impl Fn(&ImageReference, &RegistryConfig, &SharedKeyring) -> Result<T, RegistryError>,
    ) -> Result<T, Error> {
        let mut registries = self.registries(reference);
        let site = asking.complete(&mut registries, reference)?;
        let keyring: SharedKeyring = Arc::new(Keyrings(vec![SharedKeyring::clone(&asking.keys), Arc::new(site)]));
        Ok(ask(reference, &registries, &keyring)?)
    }

    /// What `work` returns, which asks registries about `typed` without root's privileges.
    pub fn unprivileged<T: Serialize + DeserializeOwned>(
        &self,
        typed: &ImageReference,
        work: impl FnOnce(&Asking) -> T,
    ) -> Result<T, Error> {
        let account = unprivileged::account(&self.config.import.user);
        let (files, keys) = (self.site_files(typed)?, self.keys(typed));
        let candidates = self.candidates(typed);
        let endpoints = candidates.iter().flat_map(|reference| self.registries(reference).endpoints(reference));
        let hosts: Vec<String> = endpoints.map(|endpoint| endpoint.host).collect();
        // Each process has one end only, or it would not see that the other has ended.
        let (asker, answerer) = channel::pair::<Query, Answer>()?;
        let (asker, answerer) = (Cell::new(Some(asker)), Cell::new(Some(answerer)));
        let asks = || {
            drop(answerer.take());
            let keys: SharedKeyring = match asker.take() {
                Some(asker) => Arc::new(RemoteKeys::new(asker)),
                None => no_keys(),
            };
            work(&Asking { keys, files })
        };
        let answers = || {
            drop(asker.take());
            if let Some(answerer) = answerer.take() {
                // What fails here is told to the other process, or follows from its end.
                let _ = serve(&answerer, &keys, &hosts);
            }
        };
        Ok(unprivileged::run_beside(account.as_ref(), asks, answers)?)
    }
}
