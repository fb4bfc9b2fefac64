//! Looks for a signature of an image, in the registry that the image came from, in both of the ways in which cosign keeps them
//! ([`crate::policy::cosign`], [`crate::policy::bundle`]).

use super::failure::Failure;
use crate::image::digest::Digest;
use crate::policy::bundle::{self, MAX_BUNDLE_BYTES, MAX_BUNDLES};
use crate::policy::cosign::{self, MAX_PAYLOAD_BYTES, Refusal};
use crate::policy::key::PublicKey;
use crate::registry::client::Client;
use crate::registry::error::RegistryError;

/// The index of one of `keys`, public keys in PEM, that has signed one of `digests`; else what was seen instead. `clients`
/// are asked one after the other, until one has signatures.
pub fn find<'a>(
    clients: impl Iterator<Item = &'a Client> + Clone,
    digests: &[Digest],
    keys: &[String],
) -> Result<Result<usize, String>, Failure> {
    let mut parsed = Vec::with_capacity(keys.len());
    for (index, text) in keys.iter().enumerate() {
        match PublicKey::from_pem(text) {
            Ok(key) => parsed.push(key),
            Err(error) => return Ok(Err(format!("key {} of the rule: {error}", index + 1))),
        }
    }
    let (mut refusal, mut trouble) = (None, None);
    for digest in digests {
        for client in clients.clone() {
            match signed(client, digest, &parsed) {
                Ok(Ok(key)) => return Ok(Ok(key)),
                Ok(Err(Some(seen))) => {
                    refusal = Some(seen);
                    break;
                }
                Ok(Err(None)) => {}
                // Behind a mirror the registry itself need not be reachable.
                Err(error) if client.endpoint().mirror || clients.clone().count() == 1 => {
                    return Err(Failure::from(error).about("cannot look for the image's signature"));
                }
                Err(error) => trouble = Some(error),
            }
        }
    }
    // What was seen is more to the point than that nothing was.
    Ok(Err(match (refusal, trouble) {
        (Some(refusal), _) => refusal.to_string(),
        (None, Some(trouble)) => format!("its mirror has no signatures; {trouble}"),
        (None, None) => "it has no signatures".to_owned(),
    }))
}

/// The index of the key that has signed `digest`, as far as `client` knows; else why its signatures do not count, if it has
/// any.
fn signed(
    client: &Client,
    digest: &Digest,
    keys: &[PublicKey],
) -> Result<Result<usize, Option<Refusal>>, RegistryError> {
    let mut seen = Seen(None);
    let tagged = match client.manifest(&cosign::tag(digest)) {
        Ok(manifest) => cosign::signatures(&manifest.bytes).ok_or(Refusal::Payload),
        Err(error) if error.is_not_found() => Ok(vec![]),
        Err(error) => return Err(error),
    };
    let tagged = tagged.unwrap_or_else(|refusal| {
        seen.note(refusal);
        vec![]
    });
    for signature in tagged {
        let payload = client.small_blob(&signature.payload, MAX_PAYLOAD_BYTES)?;
        match cosign::verify(&payload, &signature.signature, keys, digest) {
            Ok(key) => return Ok(Ok(key)),
            Err(refusal) => seen.note(refusal),
        }
    }
    for artifact in artifacts(client, digest, &mut seen)? {
        let manifest = match client.manifest(&artifact.to_string()) {
            Ok(manifest) => manifest,
            // It is still in the list.
            Err(error) if error.is_not_found() => continue,
            Err(error) => return Err(error),
        };
        let Some(blob) = bundle::blob(&manifest.bytes) else { continue };
        match bundle::verify(&client.small_blob(&blob, MAX_BUNDLE_BYTES)?, keys, digest) {
            Ok(key) => return Ok(Ok(key)),
            Err(refusal) => seen.note(refusal),
        }
    }
    Ok(Err(seen.0))
}

/// What may have a bundle in it.
fn artifacts(client: &Client, digest: &Digest, seen: &mut Seen) -> Result<Vec<Digest>, RegistryError> {
    let mut found = Vec::new();
    for page in client.referrers(digest, &bundle::tag(digest))? {
        match bundle::artifacts(&page) {
            Some(artifacts) => found.extend(artifacts),
            None => seen.note(Refusal::Bundle),
        }
    }
    found.sort_by_key(|artifact| !artifact.says_so);
    Ok(found.into_iter().take(MAX_BUNDLES).map(|artifact| artifact.digest).collect())
}

/// The most telling of the reasons why signatures do not count.
struct Seen(Option<Refusal>);

impl Seen {
    /// A signature by one of the keys, for something else, is worth mentioning.
    fn note(&mut self, refusal: Refusal) {
        if self.0.is_none() || !matches!(refusal, Refusal::Key | Refusal::Bundle) {
            self.0 = Some(refusal);
        }
    }
}
