//! Signatures as cosign kept them before its version 3, and does if it is told so (sigstore's `cosign/specs/SIGNATURE_SPEC.md`): an image in the signed image's
//! repository under the tag `sha256-HEX.sig`, each layer of which is a payload in the "simple signing" format, with the
//! signature of its bytes in an annotation.
//!
//! As `cosign verify --key` does: the payload is of cosign's type and names the digest. Its `docker-reference` has to be
//! there and is not compared, because images keep their signatures when they are copied to another registry.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;

use super::key::PublicKey;
use crate::image::digest::Digest;
use crate::image::manifest::Descriptor;

/// Most bytes of a payload.
pub const MAX_PAYLOAD_BYTES: u64 = 64 << 10;
/// Most signatures of an image that are looked at.
pub const MAX_SIGNATURES: usize = 64;

const PAYLOAD_TYPE: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
const ANNOTATION: &str = "dev.cosignproject.cosign/signature";
const CLAIM_TYPE: &str = "cosign container image signature";

/// Where the signatures of the document `digest` are: a tag.
pub fn tag(digest: &Digest) -> String {
    format!("sha256-{}.sig", digest.hex())
}

/// One signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// The blob with the payload.
    pub payload: Descriptor,
    /// The signature of its bytes.
    pub signature: Vec<u8>,
}

/// The signatures in the manifest of a signature image. What is none is passed over; `None` if it is no manifest.
pub fn signatures(manifest: &[u8]) -> Option<Vec<Signature>> {
    #[derive(Deserialize)]
    struct Manifest {
        layers: Vec<Layer>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Layer {
        #[serde(default)]
        media_type: String,
        digest: String,
        size: u64,
        #[serde(default)]
        annotations: Option<BTreeMap<String, String>>,
    }
    let manifest: Manifest = serde_json::from_slice(manifest).ok()?;
    let signature = |layer: Layer| {
        if layer.media_type != PAYLOAD_TYPE || layer.size > MAX_PAYLOAD_BYTES {
            return None;
        }
        let signature = STANDARD.decode(layer.annotations?.get(ANNOTATION)?).ok()?;
        let digest = layer.digest.parse().ok()?;
        Some(Signature { payload: Descriptor { media_type: layer.media_type, digest, size: layer.size }, signature })
    };
    Some(manifest.layers.into_iter().take(MAX_SIGNATURES).filter_map(signature).collect())
}

/// Why a payload does not speak for an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// None of the keys has made the signature.
    #[error("it has signatures, but of other keys, or of something that was changed afterwards")]
    Key,
    /// A bundle that is none, or of something else.
    #[error("what it has for a signature is no bundle of cosign's")]
    Bundle,
    /// Signed, but no claim that we know.
    #[error("what is signed is no claim of cosign's")]
    Payload,
    /// Signed, for another image.
    #[error("the signature is for another image, {0}")]
    Digest(Digest),
}

/// The index of the one of `keys` that says, by `signature` of `payload`, that the image is `digest`.
pub fn verify(payload: &[u8], signature: &[u8], keys: &[PublicKey], digest: &Digest) -> Result<usize, Refusal> {
    let key = keys.iter().position(|key| key.verifies(payload, signature)).ok_or(Refusal::Key)?;
    // Only now: before, anybody may have written it.
    match claimed(payload).ok_or(Refusal::Payload)? {
        claimed if claimed == *digest => Ok(key),
        claimed => Err(Refusal::Digest(claimed)),
    }
}

/// The digest that a payload is about.
pub fn claimed(payload: &[u8]) -> Option<Digest> {
    #[derive(Deserialize)]
    struct Payload {
        critical: Critical,
    }
    #[derive(Deserialize)]
    struct Critical {
        identity: Identity,
        image: Image,
        r#type: String,
    }
    #[derive(Deserialize)]
    struct Identity {
        #[serde(rename = "docker-reference")]
        _reference: String,
    }
    #[derive(Deserialize)]
    struct Image {
        #[serde(rename = "docker-manifest-digest")]
        digest: Digest,
    }
    let Critical { identity: Identity { .. }, image, r#type } =
        serde_json::from_slice::<Payload>(payload).ok()?.critical;
    (r#type == CLAIM_TYPE).then_some(image.digest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::policy::key::tests::{EC, generate, sign};

    fn digest(byte: u8) -> Digest {
        Digest::from_bytes([byte; 32])
    }

    fn payload(digest: &Digest) -> Value {
        json!({
            "critical": {
                "identity": {"docker-reference": "reg.io/a/b"},
                "image": {"docker-manifest-digest": digest},
                "type": CLAIM_TYPE
            },
            "optional": null
        })
    }

    #[test]
    fn a_payload_speaks_for_its_digest_and_by_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let keys: Vec<PublicKey> =
            ["one", "two", "three"].map(|name| PublicKey::from_pem(&generate(directory, name, &EC)).unwrap()).into();
        let bytes = payload(&digest(1)).to_string().into_bytes();
        let signature = sign(directory, "two", &bytes, true);
        let check = |bytes: &[u8], keys: &[PublicKey], of| verify(bytes, &signature, keys, &digest(of));
        assert_eq!(check(&bytes, &keys, 1), Ok(1));
        assert_eq!(check(&bytes, &keys, 2), Err(Refusal::Digest(digest(1))));
        assert_eq!(check(&bytes, &keys[..1], 1), Err(Refusal::Key));
        assert_eq!(check(&bytes, &[], 1), Err(Refusal::Key));
        assert_eq!(check(payload(&digest(2)).to_string().as_bytes(), &keys, 2), Err(Refusal::Key));
        let mut other = payload(&digest(1));
        other["critical"]["type"] = "atomic container signature".into();
        let other = other.to_string().into_bytes();
        let signature = sign(directory, "two", &other, true);
        assert_eq!(verify(&other, &signature, &keys, &digest(1)), Err(Refusal::Payload));
    }

    #[test]
    fn what_is_no_claim_claims_nothing() {
        let good = payload(&digest(1));
        assert_eq!(claimed(good.to_string().as_bytes()), Some(digest(1)));
        for pointer in
            ["/critical/identity/docker-reference", "/critical/image/docker-manifest-digest", "/critical/type"]
        {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).unwrap() = json!(7);
            assert_eq!(claimed(bad.to_string().as_bytes()), None, "{pointer}");
        }
        // Said twice: nobody can know which one counts.
        let twice = good.to_string().replacen(r#""type""#, r#""type":"x","type""#, 1);
        assert_eq!(claimed(twice.as_bytes()), None);
    }

    #[test]
    fn signatures_are_layers_with_an_annotation() {
        let layer = |media_type: &str, size: u64, signature: &str| json!({"mediaType": media_type, "digest": digest(3), "size": size, "annotations": {ANNOTATION: signature}});
        let manifest = json!({"schemaVersion": 2, "layers": [
            layer(PAYLOAD_TYPE, 10, "AAEC"),
            layer(PAYLOAD_TYPE, 10, "no base64!"),
            layer(PAYLOAD_TYPE, MAX_PAYLOAD_BYTES + 1, "AAEC"),
            layer("application/octet-stream", 10, "AAEC"),
            {"mediaType": PAYLOAD_TYPE, "digest": digest(3), "size": 10},
        ]});
        let found = signatures(manifest.to_string().as_bytes()).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!((&*found[0].signature, found[0].payload.size), (&[0, 1, 2][..], 10));
        assert_eq!(signatures(b"{}"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in any::<Vec<u8>>(), at in 0usize..200, byte in any::<u8>()) {
            let _ = (claimed(&bytes), signatures(&bytes));
            let mut damaged = payload(&digest(1)).to_string().into_bytes();
            let at = at % damaged.len();
            damaged[at] = byte;
            // Whatever else it says, a digest is only ever what stands in its place.
            let claim = claimed(&damaged);
            prop_assert!(claim.is_none_or(|claim| String::from_utf8_lossy(&damaged).contains(&claim.hex())));
        }
    }
}
