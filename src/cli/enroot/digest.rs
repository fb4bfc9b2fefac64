//! `enroot digest`: which image a reference means on this machine.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use super::{Context, Error, say};
use crate::image;
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;
use crate::registry::credentials::{Keyrings, SharedKeyring, UserKeys};
use crate::registry::error::RegistryError;
use crate::registry::resolve::{Resolved, resolve};
use crate::registry::site;
use crate::request::{Engine, LocalImage};

/// Print the digest of an image.
#[derive(Debug, clap::Args)]
pub struct DigestArgs {
    #[command(flatten)]
    image: RegistryImage,
}

/// An image in a registry, for a machine.
#[derive(Debug, clap::Args)]
pub struct RegistryImage {
    /// Architecture of the image, if not that of this machine
    #[arg(short, long)]
    arch: Option<String>,
    /// docker://[USER@][REGISTRY#]IMAGE[:TAG]; import also takes dockerd://IMAGE and podman://IMAGE
    #[arg(value_name = "URI")]
    pub uri: String,
}

impl RegistryImage {
    /// The image `uri` for this machine.
    #[cfg(test)]
    pub fn new(uri: &str) -> Self {
        Self { arch: None, uri: uri.to_owned() }
    }

    /// The reference.
    pub fn reference(&self) -> Result<ImageReference, Error> {
        match self.uri.strip_prefix("docker://") {
            Some(reference) => Ok(ImageReference::parse(reference)?),
            None => Err(format!("Invalid argument: {}", self.uri).into()),
        }
    }

    /// The engine on this machine that has the image, and what it calls it.
    pub fn engine(&self) -> Result<Option<(Engine, String)>, Error> {
        match image::local::parse(&self.uri) {
            Some(Ok(LocalImage::Engine { engine, name })) => Ok(Some((engine, name))),
            Some(Err(error)) => Err(error.into()),
            _ => Ok(None),
        }
    }

    /// The machine.
    pub fn platform(&self) -> Result<Platform, Error> {
        match &self.arch {
            None => Ok(Platform::host()),
            Some(name) => Platform::of(name).ok_or_else(|| format!("Unsupported architecture: {name}").into()),
        }
    }

    /// Asks the registry, with the user's credentials.
    pub fn resolve(&self, context: &Context) -> Result<Resolved, Error> {
        let platform = self.platform()?;
        let resolved = context.resolve(&self.reference()?, &platform)?;
        let (has, wanted) = (&resolved.config.architecture, &platform.architecture);
        if !has.is_empty() && has != wanted {
            say::warn(format_args!("Image architecture doesn't match the requested one: {has} != {wanted}"));
        }
        Ok(resolved)
    }
}

impl Context {
    /// Asks the registry for an image, with the user's credentials. A short name is looked for as the site says.
    pub fn resolve(&self, typed: &ImageReference, platform: &Platform) -> Result<Resolved, Error> {
        let candidates = self.config.short_names.candidates(typed);
        let mut found = Err("no registry to search".into());
        for reference in &candidates {
            found = self.resolve_at(reference, platform);
            // Only an answer sends on to the next one.
            let no = |error: &Error| error.downcast_ref::<RegistryError>().is_some_and(RegistryError::is_a_no);
            if !found.as_ref().is_err_and(no) {
                break;
            }
        }
        found
    }

    fn resolve_at(&self, reference: &ImageReference, platform: &Platform) -> Result<Resolved, Error> {
        let mut registries = self.registries(reference);
        let mut files = Vec::new();
        for file in registries.site_files(reference) {
            let failed = |error| format!("{}: {}", crate::sys::reason(error), file.path.display());
            if let Some(opened) = site::open_own(&file).map_err(failed)? {
                files.push((file, opened));
            }
        }
        let failed = |(path, error): (PathBuf, _)| format!("{}: {}", crate::sys::reason(error), path.display());
        let helpers = registries.site_helpers(reference);
        let own = registries.read_site_files(files).map_err(failed)?;
        let home = self.environment.get_str("HOME").unwrap_or(&self.identity.home);
        // Credentials as the settings say: `ENROOT_CONFIG_PATH` may come from a file.
        let keys = UserKeys::new(self.settings.environment().clone(), home, helpers);
        let keyring: SharedKeyring = Arc::new(Keyrings(vec![Arc::new(keys), Arc::new(own)]));
        Ok(resolve(reference, &registries, &keyring, platform)?)
    }
}

/// Runs the command.
pub fn run(args: &DigestArgs, context: &Context) -> Result<ExitCode, Error> {
    let resolved = args.image.resolve(context)?;
    say::line(resolved.manifest_digest)?;
    Ok(ExitCode::SUCCESS)
}
