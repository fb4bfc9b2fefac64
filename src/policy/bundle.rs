//! Signatures as cosign has written them since its version 3: sigstore bundles (sigstore's `sigstore_bundle.proto`, in JSON), in
//! artifacts that refer to the signed image (OCI distribution specification 1.1, "Listing Referrers"). A bundle is an envelope
//! (DSSE 1.0.2) around a statement (in-toto Statement v1) about the image's digest.
//!
//! As `cosign verify --key --insecure-ignore-tlog` does: the transparency log is not asked, for keys that a site has given
//! need no witness. Attestations are in bundles of the same form, made with the same keys, and are no signatures: what a
//! statement says about its subject is told by its type.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use std::collections::BTreeMap;

use super::cosign::Refusal;
use super::key::PublicKey;
use crate::image::digest::Digest;
use crate::image::manifest::Descriptor;

/// Most bytes of a bundle. Those of signatures have some thousand; those of attestations may be long.
pub const MAX_BUNDLE_BYTES: u64 = 256 << 10;
/// Most bundles about an image that are looked at.
pub const MAX_BUNDLES: usize = 64;

/// How the media types of bundles begin, and of artifacts with one: a version follows.
const MEDIA_TYPE: &str = "application/vnd.dev.sigstore.bundle";
/// What indexes say of artifacts where they know nothing better.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
/// What a bundle's statement says, for those who look for one among many.
const PREDICATE_ANNOTATION: &str = "dev.sigstore.bundle.predicateType";
const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
const STATEMENT_TYPES: [&str; 2] = ["https://in-toto.io/Statement/v1", "https://in-toto.io/Statement/v0.1"];
/// The statement that an image is signed.
const PREDICATE_TYPE: &str = "https://sigstore.dev/cosign/sign/v1";
/// Most signatures of an envelope, and most subjects of a statement, that are looked at.
const MAX_PARTS: usize = 16;

/// The tag under which a registry without a list of referrers has an index of those of `digest`.
pub fn tag(digest: &Digest) -> String {
    format!("sha256-{}", digest.hex())
}

/// An artifact that may have a signature in a bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Artifact {
    /// Of its manifest.
    pub digest: Digest,
    /// Whether it says so, and should be looked at before others.
    pub says_so: bool,
}

/// Those in an index of referrers. `None` if it is none.
pub fn artifacts(index: &[u8]) -> Option<Vec<Artifact>> {
    #[derive(Deserialize)]
    struct Index {
        manifests: Vec<Referrer>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Referrer {
        digest: String,
        #[serde(default)]
        artifact_type: Option<String>,
        #[serde(default)]
        annotations: Option<BTreeMap<String, String>>,
    }
    let index: Index = serde_json::from_slice(index).ok()?;
    let artifact = |referrer: Referrer| {
        let kind = referrer.artifact_type.unwrap_or_default();
        let may_be_one = kind.is_empty() || kind == EMPTY_TYPE || kind.starts_with(MEDIA_TYPE);
        let digest = referrer.digest.parse().ok().filter(|_| may_be_one)?;
        let predicate = referrer.annotations.as_ref().and_then(|annotations| annotations.get(PREDICATE_ANNOTATION));
        let says_so = predicate.is_some_and(|predicate| predicate == PREDICATE_TYPE);
        (says_so || predicate.is_none()).then_some(Artifact { digest, says_so })
    };
    Some(index.manifests.into_iter().filter_map(artifact).collect())
}

/// The bundle in an artifact with this manifest, if there is one.
pub fn blob(manifest: &[u8]) -> Option<Descriptor> {
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
    }
    let manifest: Manifest = serde_json::from_slice(manifest).ok()?;
    let layer = manifest.layers.into_iter().find(|layer| layer.media_type.starts_with(MEDIA_TYPE))?;
    let digest = layer.digest.parse().ok().filter(|_| layer.size <= MAX_BUNDLE_BYTES)?;
    Some(Descriptor { media_type: layer.media_type, digest, size: layer.size })
}

/// The index of the one of `keys` that says, by a bundle, that the image is `digest`.
pub fn verify(bundle: &[u8], keys: &[PublicKey], digest: &Digest) -> Result<usize, Refusal> {
    let envelope = Envelope::of(bundle).ok_or(Refusal::Bundle)?;
    let signed = envelope.signed();
    let key = keys.iter().position(|key| envelope.signatures.iter().any(|signature| key.verifies(&signed, signature)));
    let key = key.ok_or(Refusal::Key)?;
    // Only now: before, anybody may have written it.
    let subjects = envelope.subjects().ok_or(Refusal::Payload)?;
    match subjects.first() {
        _ if subjects.contains(digest) => Ok(key),
        Some(other) => Err(Refusal::Digest(*other)),
        None => Err(Refusal::Payload),
    }
}

/// What is signed, and by which signatures.
struct Envelope {
    payload_type: String,
    payload: Vec<u8>,
    signatures: Vec<Vec<u8>>,
}

impl Envelope {
    /// That of a bundle. `None` if there is none.
    fn of(bundle: &[u8]) -> Option<Self> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Bundle {
            media_type: String,
            dsse_envelope: Raw,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Raw {
            payload: String,
            payload_type: String,
            signatures: Vec<Signature>,
        }
        #[derive(Deserialize)]
        struct Signature {
            sig: String,
        }
        let Bundle { media_type, dsse_envelope } = serde_json::from_slice(bundle).ok()?;
        let Raw { payload, payload_type, signatures } = dsse_envelope;
        let decoded = signatures.iter().take(MAX_PARTS).filter_map(|signature| STANDARD.decode(&signature.sig).ok());
        let signatures = decoded.collect();
        let payload = STANDARD.decode(payload).ok().filter(|_| media_type.starts_with(MEDIA_TYPE))?;
        Some(Self { payload_type, payload, signatures })
    }

    /// The bytes that signatures are of ("pre-authentication encoding").
    fn signed(&self) -> Vec<u8> {
        let Self { payload_type, payload, .. } = self;
        let mut bytes = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
        bytes.extend(payload);
        bytes
    }

    /// The digests of what is said to be signed. `None` if it is no such statement.
    fn subjects(&self) -> Option<Vec<Digest>> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Statement {
            #[serde(rename = "_type")]
            kind: String,
            subject: Vec<Subject>,
            predicate_type: String,
        }
        #[derive(Deserialize)]
        struct Subject {
            digest: Digests,
        }
        #[derive(Deserialize)]
        struct Digests {
            #[serde(default)]
            sha256: Option<String>,
        }
        if self.payload_type != PAYLOAD_TYPE {
            return None;
        }
        let Statement { kind, subject, predicate_type } = serde_json::from_slice(&self.payload).ok()?;
        if !STATEMENT_TYPES.contains(&kind.as_str()) || predicate_type != PREDICATE_TYPE {
            return None;
        }
        let digests = subject.into_iter().take(MAX_PARTS).filter_map(|subject| subject.digest.sha256);
        Some(digests.filter_map(|hex| format!("sha256:{hex}").parse().ok()).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::slice;

    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::policy::key::tests::{EC, generate, sign};

    const VERSION: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

    fn digest(byte: u8) -> Digest {
        Digest::from_bytes([byte; 32])
    }

    fn statement(digest: &Digest) -> Value {
        json!({
            "_type": STATEMENT_TYPES[0],
            "subject": [{"digest": {"sha256": digest.hex()}, "annotations": {}}],
            "predicateType": PREDICATE_TYPE,
            "predicate": {},
        })
    }

    /// A bundle with these signatures.
    fn bundle(payload: &str, payload_type: &str, signatures: &[Vec<u8>]) -> Value {
        let signatures: Vec<Value> =
            signatures.iter().map(|signature| json!({"sig": STANDARD.encode(signature), "keyid": ""})).collect();
        json!({
            "mediaType": VERSION,
            "verificationMaterial": {"publicKey": {"hint": "x"}, "tlogEntries": []},
            "dsseEnvelope": {
                "payload": STANDARD.encode(payload), "payloadType": payload_type, "signatures": signatures,
            },
        })
    }

    #[test]
    fn a_statement_speaks_for_its_subjects_and_by_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let keys: Vec<PublicKey> = [("one", &EC[..], true), ("two", &["-algorithm", "ED25519"], false)]
            .map(|(name, kind, _)| PublicKey::from_pem(&generate(directory, name, kind)).unwrap())
            .into();
        let made = |name: &str, payload: &str, payload_type: &str| {
            // As the specification writes it.
            let signed = format!("DSSEv1 {} {payload_type} {} {payload}", payload_type.len(), payload.len());
            sign(directory, name, signed.as_bytes(), name == "one")
        };
        let check = |bundle: &Value, keys: &[PublicKey], of| verify(bundle.to_string().as_bytes(), keys, &digest(of));
        let good = statement(&digest(1)).to_string();
        for (name, at) in [("one", 0), ("two", 1)] {
            let signature = made(name, &good, PAYLOAD_TYPE);
            let bundle = |signatures: &[Vec<u8>]| bundle(&good, PAYLOAD_TYPE, signatures);
            assert_eq!(check(&bundle(slice::from_ref(&signature)), &keys, 1), Ok(at));
            assert_eq!(check(&bundle(&[vec![1, 2], signature.clone()]), &keys, 1), Ok(at));
            assert_eq!(check(&bundle(slice::from_ref(&signature)), &keys, 2), Err(Refusal::Digest(digest(1))));
            assert_eq!(check(&bundle(&[signature]), &keys[1 - at..2 - at], 1), Err(Refusal::Key));
            assert_eq!(check(&bundle(&[]), &keys, 1), Err(Refusal::Key));
        }
        // Signed for one image, and shown with another statement or another type.
        let signature = made("one", &good, PAYLOAD_TYPE);
        let other = statement(&digest(2)).to_string();
        assert_eq!(check(&bundle(&other, PAYLOAD_TYPE, slice::from_ref(&signature)), &keys, 2), Err(Refusal::Key));
        assert_eq!(check(&bundle(&good, "text/plain", &[signature]), &keys, 1), Err(Refusal::Key));
        // Signed as something else.
        let signed = |payload: &Value, payload_type: &str| {
            let payload = payload.to_string();
            check(&bundle(&payload, payload_type, &[made("one", &payload, payload_type)]), &keys, 1)
        };
        assert_eq!(signed(&statement(&digest(1)), "application/json"), Err(Refusal::Payload));
        for (pointer, value) in [
            ("/predicateType", json!("https://slsa.dev/provenance/v1")),
            ("/_type", json!("https://in-toto.io/Statement/v7")),
            ("/subject", json!([])),
            ("/subject/0/digest", json!({"sha512": "00"})),
            ("/subject/0/digest/sha256", json!("00")),
        ] {
            let mut statement = statement(&digest(1));
            *statement.pointer_mut(pointer).unwrap() = value;
            assert_eq!(signed(&statement, PAYLOAD_TYPE), Err(Refusal::Payload), "{pointer}");
        }
        let mut several = statement(&digest(3));
        several["subject"].as_array_mut().unwrap().push(json!({"digest": {"sha256": digest(1).hex()}}));
        assert_eq!(signed(&several, PAYLOAD_TYPE), Ok(0));
    }

    #[test]
    fn what_is_no_bundle_is_none() {
        let good = bundle("x", PAYLOAD_TYPE, &[]);
        assert_eq!(verify(good.to_string().as_bytes(), &[], &digest(1)), Err(Refusal::Key));
        for (pointer, value) in [
            ("/mediaType", json!("application/json")),
            ("/dsseEnvelope/payload", json!("no base64!")),
            ("/dsseEnvelope/signatures", json!({})),
            ("/dsseEnvelope", json!(null)),
        ] {
            let mut bad = good.clone();
            *bad.pointer_mut(pointer).unwrap() = value;
            assert_eq!(verify(bad.to_string().as_bytes(), &[], &digest(1)), Err(Refusal::Bundle), "{pointer}");
        }
        // A signature of a file (`cosign sign-blob`).
        let blob = json!({"mediaType": VERSION, "messageSignature": {"signature": ""}}).to_string();
        assert_eq!(verify(blob.as_bytes(), &[], &digest(1)), Err(Refusal::Bundle));
    }

    #[test]
    fn what_may_be_a_signature_is_looked_at() {
        let artifact = |byte: u8, kind: Option<&str>, predicate: Option<&str>| {
            let annotations = predicate.map(|predicate| json!({PREDICATE_ANNOTATION: predicate}));
            json!({"mediaType": "m", "digest": digest(byte), "size": 1, "artifactType": kind, "annotations": annotations})
        };
        let index = json!({"schemaVersion": 2, "manifests": [
            artifact(1, Some(VERSION), Some("https://slsa.dev/provenance/v1")),
            artifact(2, None, None),
            artifact(3, Some(EMPTY_TYPE), None),
            artifact(4, Some("application/spdx+json"), None),
            {"mediaType": "m", "digest": "sha512:00", "size": 1},
            artifact(5, Some(VERSION), Some(PREDICATE_TYPE)),
        ]});
        let found = artifacts(index.to_string().as_bytes()).unwrap();
        let expected = [(2, false), (3, false), (5, true)];
        assert_eq!(found, expected.map(|(byte, says_so)| Artifact { digest: digest(byte), says_so }));
        assert_eq!(artifacts(b"{}"), None);

        let layer = |kind: &str, size: u64| json!({"mediaType": kind, "digest": digest(1), "size": size});
        let manifest = |layers: &[Value]| blob(json!({"layers": layers}).to_string().as_bytes());
        assert_eq!(manifest(&[layer("x", 1), layer(VERSION, 7)]).map(|found| found.size), Some(7));
        assert_eq!(manifest(&[layer(VERSION, MAX_BUNDLE_BYTES + 1)]), None);
        assert_eq!(manifest(&[]), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in any::<Vec<u8>>(), at in 0usize..400, byte in any::<u8>()) {
            let _ = (artifacts(&bytes), blob(&bytes));
            prop_assert!(verify(&bytes, &[], &digest(1)).is_err());
            let mut damaged = statement(&digest(1)).to_string().into_bytes();
            let at = at % damaged.len();
            damaged[at] = byte;
            let envelope = Envelope { payload_type: PAYLOAD_TYPE.into(), payload: damaged, signatures: vec![] };
            // Whatever else it says, a digest is only ever what stands in its place.
            let text = String::from_utf8_lossy(&envelope.payload).into_owned();
            prop_assert!(envelope.subjects().into_iter().flatten().all(|digest| text.contains(&digest.hex())));
        }
    }
}
