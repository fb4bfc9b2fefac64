//! `enroot digest`: which image a reference means on this machine.

use std::process::ExitCode;

use super::{Context, Error, say};
use crate::image;
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;
use crate::registry::resolve::Resolved;
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

/// Runs the command.
pub fn run(args: &DigestArgs, context: &Context) -> Result<ExitCode, Error> {
    let resolved = args.image.resolve(context)?;
    say::line(resolved.manifest_digest)?;
    Ok(ExitCode::SUCCESS)
}
