//! From an image reference to the manifest, config and layers for this machine.

#![forbid(unsafe_code)]

use super::PROGRESS;
use super::client::{Client, ManifestBytes};
use super::config::{Endpoint, NetworkConfig, RegistryConfig};
use super::credentials::SharedKeyring;
use super::error::RegistryError;
use crate::image::config::{ImageConfig, MAX_CONFIG_BYTES};
use crate::image::digest::Digest;
use crate::image::manifest::{Document, Manifest, ManifestError};
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;

/// An index may name an index, which names manifests; more is a joke.
const MAX_DOCUMENTS: usize = 3;
/// Tries of a request to an endpoint behind which there is another.
const MIRROR_ATTEMPTS: u32 = 2;

/// An image that was found.
#[derive(Debug)]
pub struct Resolved {
    /// The endpoint that has it.
    pub client: Client,
    /// The others that may have it, in order.
    pub others: Vec<Client>,
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// Its digest and those of the indexes that led to it.
    pub digests: Vec<Digest>,
    /// The manifest, as many layers as the config has diffIDs.
    pub manifest: Manifest,
    /// The config as it came.
    pub config_bytes: Vec<u8>,
    /// The config.
    pub config: ImageConfig,
    /// One line each, for the user.
    pub warnings: Vec<String>,
}

/// Finds an image for `platform`: at the first mirror that has it, else at its registry.
pub fn resolve(
    reference: &ImageReference,
    registries: &RegistryConfig,
    keyring: &SharedKeyring,
    platform: &Platform,
) -> Result<Resolved, RegistryError> {
    let mut resolved = first(reference, registries, keyring, |client| resolve_at(client, reference, platform))?;
    let mut others = registries.endpoints(reference);
    others.retain(|endpoint| endpoint.origin() != resolved.client.endpoint().origin());
    let client = |endpoint| client(endpoint, registries.network, keyring, reference);
    resolved.others = others.into_iter().map(client).collect();
    Ok(resolved)
}

fn client(endpoint: Endpoint, network: NetworkConfig, keyring: &SharedKeyring, reference: &ImageReference) -> Client {
    Client::new(endpoint, network, SharedKeyring::clone(keyring), reference.user.clone())
}

/// What a tag means now: the digest of its index, or of its manifest.
pub fn digest(
    reference: &ImageReference,
    registries: &RegistryConfig,
    keyring: &SharedKeyring,
) -> Result<Digest, RegistryError> {
    first(reference, registries, keyring, |client| {
        client.digest_of(&reference.tag_or_digest).map_err(|error| explained(error, &client, reference))
    })
}

/// What `ask` gets from the first of the mirrors that answers, else from the registry.
fn first<T>(
    reference: &ImageReference,
    registries: &RegistryConfig,
    keyring: &SharedKeyring,
    ask: impl Fn(Client) -> Result<T, RegistryError>,
) -> Result<T, RegistryError> {
    reference.check()?;
    if let Some(blocked) = registries.blocked(reference) {
        return Err(RegistryError::Blocked { image: reference.to_string(), blocked });
    }
    let client = |endpoint, network| client(endpoint, network, keyring, reference);
    let mut failed: Vec<String> = Vec::new();
    for mirror in registries.mirrors(reference) {
        let attempts = registries.network.attempts.min(MIRROR_ATTEMPTS);
        let origin = mirror.origin();
        match ask(client(mirror, NetworkConfig { attempts, ..registries.network })) {
            Ok(answer) => return Ok(answer),
            Err(error) => failed.push(format!("mirror {origin}: {error}")),
        }
    }
    match ask(client(registries.upstream(reference), registries.network)) {
        Err(error) if !failed.is_empty() => {
            Err(RegistryError::Mirrors { source: Box::new(error), mirrors: failed.join("; ") })
        }
        outcome => outcome,
    }
}

fn resolve_at(client: Client, reference: &ImageReference, platform: &Platform) -> Result<Resolved, RegistryError> {
    let image = reference.to_string();
    tracing::info!(target: PROGRESS, "Querying registry for permission grant");
    let first = client.manifest(&reference.tag_or_digest).map_err(|error| explained(error, &client, reference))?;
    if !client.is_authenticated() {
        tracing::info!(target: PROGRESS, "Permission granted");
    }
    tracing::info!(target: PROGRESS, "Fetching image manifest list");
    let (digests, manifest) = choose(&client, &image, first, platform)?;
    let manifest_digest = *digests.last().ok_or_else(|| RegistryError::Nesting(image.clone()))?;
    let config_bytes = client.small_blob(&manifest.config, MAX_CONFIG_BYTES)?;
    let config =
        ImageConfig::parse(&config_bytes).map_err(|source| RegistryError::Config { image: image.clone(), source })?;
    if config.diff_ids.len() != manifest.layers.len() {
        return Err(RegistryError::LayerCount {
            image,
            layers: manifest.layers.len(),
            diff_ids: config.diff_ids.len(),
        });
    }
    // Hours later would be a bad time to learn it.
    for layer in manifest.layers.iter().filter(|layer| layer.is_foreign()) {
        if !client.may_have(&layer.digest)? {
            let Endpoint { host, repository, .. } = client.endpoint().clone();
            return Err(RegistryError::ForeignLayer { host, repository, digest: layer.digest });
        }
    }
    let shown = |text: &str| text.chars().take(32).flat_map(char::escape_debug).collect::<String>();
    if !config.os.is_empty() && config.os != platform.os {
        return Err(RegistryError::OperatingSystem { image, os: shown(&config.os), host: platform.clone() });
    }
    let mut warnings = Vec::new();
    if !config.architecture.is_empty() && config.architecture != platform.architecture {
        let architecture = shown(&config.architecture);
        warnings.push(format!("image {image} is for {architecture}, and this machine is {}", platform.architecture));
    }
    Ok(Resolved { client, others: vec![], manifest_digest, digests, manifest, config_bytes, config, warnings })
}

/// What an answer about the image as such means.
fn explained(error: RegistryError, client: &Client, reference: &ImageReference) -> RegistryError {
    let hint = || reference.not_found_hint().map(|hint| format!("; {hint}")).unwrap_or_default();
    match error {
        error if error.is_not_found() => RegistryError::ImageNotFound {
            image: reference.to_string(),
            host: client.endpoint().host.clone(),
            hint: hint(),
        },
        // That is how Docker Hub says that there is none.
        RegistryError::CredentialsMissing { host, repository, tried, .. } => {
            RegistryError::CredentialsMissing { host, repository, hint: hint(), tried }
        }
        error => error,
    }
}

/// The manifest for `platform`, behind as many indexes as there may be. The digest of each document, the manifest's last.
fn choose(
    client: &Client,
    image: &str,
    first: ManifestBytes,
    platform: &Platform,
) -> Result<(Vec<Digest>, Manifest), RegistryError> {
    let wrong = |source: ManifestError| RegistryError::Manifest { image: image.to_owned(), source };
    let mut document = first;
    let mut digests = Vec::with_capacity(MAX_DOCUMENTS);
    tracing::info!(target: PROGRESS, "Fetching image manifest");
    for _ in 0..MAX_DOCUMENTS {
        digests.push(document.digest);
        match Document::parse(&document.bytes, document.content_type.as_deref()).map_err(wrong)? {
            Document::Manifest(manifest) => return Ok((digests, manifest)),
            Document::Index(index) => {
                let chosen = index.choose(platform).map_err(wrong)?;
                document = client.manifest(&chosen.digest.to_string())?;
            }
        }
    }
    Err(RegistryError::Nesting(image.to_owned()))
}
