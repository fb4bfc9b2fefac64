//! Looks for a signature of an image, in the registry that the image came from ([`crate::policy::cosign`]).

use super::failure::Failure;
use crate::image::digest::Digest;
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
    let manifest = match client.manifest(&cosign::tag(digest)) {
        Ok(manifest) => manifest,
        Err(error) if error.is_not_found() => return Ok(Err(None)),
        Err(error) => return Err(error),
    };
    let Some(signatures) = cosign::signatures(&manifest.bytes) else { return Ok(Err(Some(Refusal::Payload))) };
    let mut refusal = None;
    for signature in signatures {
        let payload = client.small_blob(&signature.payload, MAX_PAYLOAD_BYTES)?;
        match cosign::verify(&payload, &signature.signature, keys, digest) {
            Ok(key) => return Ok(Ok(key)),
            // A signature by one of the keys, for something else, is worth mentioning.
            Err(seen) if refusal.is_none() || seen != Refusal::Key => refusal = Some(seen),
            Err(_) => {}
        }
    }
    Ok(Err(refusal))
}
