//! Who has signed an image: signatures as cosign writes them, tags and bundles, in registries with a list of referrers and
//! without. Keys and signatures are OpenSSL's.

use std::fs;
use std::path::Path;
use std::process::Command;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use spank_pyxis::image::digest::Digest;
use spank_pyxis::importer::protocol::{Command as ToImporter, FailureKind, Report};
use testbed::process::output_of;

use crate::broker::{Failed, Import};
use crate::content::{Content, INDEX, MANIFEST};
use crate::server::{Reply, Request, Server};

const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
const SIGN: &str = "https://sigstore.dev/cosign/sign/v1";
const EMPTY: &str = "application/vnd.oci.empty.v1+json";
const IN_TOTO: &str = "application/vnd.in-toto+json";

/// A key pair in a directory.
struct Key(tempfile::TempDir);

impl Key {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let private = directory.path().join("key");
        let mut generate = Command::new("openssl");
        generate.args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]).arg(&private);
        output_of(&mut generate).unwrap();
        Self(directory)
    }

    fn public(&self) -> String {
        output_of(Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(self.path("key"))).unwrap()
    }

    fn path(&self, name: &str) -> impl AsRef<Path> + AsRef<std::ffi::OsStr> {
        self.0.path().join(name)
    }

    fn sign(&self, message: &[u8]) -> Vec<u8> {
        fs::write(self.path("message"), message).unwrap();
        let mut openssl = Command::new("openssl");
        openssl.args(["dgst", "-sha256", "-sign"]).arg(self.path("key")).arg("-out").arg(self.path("signature"));
        output_of(openssl.arg(self.path("message"))).unwrap();
        fs::read(self.path("signature")).unwrap()
    }
}

/// What `cosign sign` of version 3 says of an image.
fn statement(digest: &str) -> Value {
    let hex = digest.trim_start_matches("sha256:");
    json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"digest": {"sha256": hex}}],
        "predicateType": SIGN,
        "predicate": {},
    })
}

/// A bundle of `statement`, signed with `key` as of the type `payload_type`.
fn bundle(key: &Key, statement: &Value, payload_type: &str) -> Value {
    let payload = statement.to_string();
    let signed = format!("DSSEv1 {} {payload_type} {} {payload}", payload_type.len(), payload.len());
    json!({
        "mediaType": BUNDLE,
        "verificationMaterial": {"publicKey": {"hint": "unknown"}},
        "dsseEnvelope": {
            "payload": STANDARD.encode(&payload),
            "payloadType": payload_type,
            "signatures": [{"sig": STANDARD.encode(key.sign(signed.as_bytes())), "keyid": ""}],
        },
    })
}

/// A registry with the image `latest`, and what refers to it.
#[derive(Clone)]
struct Referred {
    content: Content,
    /// Of the image.
    digest: String,
    /// Descriptors.
    referrers: Vec<Value>,
}

impl Referred {
    fn new() -> Self {
        let content = Content::simple(1000);
        let manifest = content.manifest("latest").to_string();
        let digest = spank_pyxis::registry::sha256(manifest.as_bytes()).to_string();
        Self { content, digest, referrers: Vec::new() }
    }

    /// Attaches an artifact with a bundle, as cosign does; `predicate` is what it says of it.
    fn attach(&mut self, bundle: &Value, predicate: Option<&str>) {
        let layer = self.content.add_blob(BUNDLE, bundle.to_string().into_bytes());
        let config = self.content.add_blob(EMPTY, b"{}".to_vec());
        let annotations = predicate.map(|predicate| json!({"dev.sigstore.bundle.predicateType": predicate}));
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "artifactType": BUNDLE, "config": config, "layers": [layer],
            "subject": {"mediaType": MANIFEST, "digest": self.digest, "size": 1}, "annotations": annotations,
        });
        let mut descriptor = self.content.add_manifest(MANIFEST, &manifest);
        descriptor["artifactType"] = json!(BUNDLE);
        descriptor["annotations"] = json!(annotations);
        self.referrers.push(descriptor);
    }

    fn index(referrers: &[Value]) -> Value {
        json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": referrers})
    }

    /// With a list, in pages of this many.
    fn with_list(&self, page: usize) -> Server {
        let this = self.clone();
        Server::start(move |request| this.answer(request, page))
    }

    fn answer(&self, request: &Request, page: usize) -> Reply {
        let list = format!("/v2/some/image/referrers/{}", self.digest);
        if request.path != list {
            return self.content.answer(request);
        }
        let from: usize = request.query.get("from").and_then(|from| from.parse().ok()).unwrap_or(0);
        let until = (from + page).min(self.referrers.len());
        let index = Self::index(&self.referrers[from..until]).to_string();
        let reply = Reply::ok(index).header("Content-Type", INDEX);
        match until < self.referrers.len() {
            true => reply.header("Link", format!("<{list}?from={until}>; rel=\"next\"")),
            false => reply,
        }
    }

    /// Without one: as an index under a tag.
    fn with_tag(&self) -> Server {
        let mut content = self.content.clone();
        if !self.referrers.is_empty() {
            content.tag(&self.digest.replace(':', "-"), INDEX, &Self::index(&self.referrers));
        }
        Server::start(move |request| content.answer(request))
    }

    /// Which of `keys` has signed the image at `server`, or what was seen instead.
    fn signer(&self, server: &Server, keys: &[&Key]) -> Result<Result<usize, String>, Failed> {
        let import = Import::new("some/image", &[&server.host()]);
        let (conversation, imported) = import.resolve()?;
        let digests: Vec<Digest> = vec![imported.manifest];
        let keys = keys.iter().map(|key| key.public()).collect();
        conversation.0.send(&ToImporter::Examine { keys, digests }, &[]).unwrap();
        match conversation.next().0 {
            Report::Examined { signed_by, problem, .. } => Ok(signed_by.ok_or(problem)),
            Report::Failed { kind, message } => Err((kind, message)),
            other => panic!("{other:?}"),
        }
    }

    /// The same wherever the referrers are listed.
    fn signer_anywhere(&self, keys: &[&Key]) -> Result<usize, String> {
        let listed = self.signer(&self.with_list(100), keys).unwrap();
        assert_eq!(self.signer(&self.with_tag(), keys).unwrap(), listed);
        listed
    }
}

#[test]
fn bundles_count_as_signatures() {
    let (ours, theirs) = (Key::new(), Key::new());
    let mut image = Referred::new();
    assert_eq!(image.signer_anywhere(&[&ours]), Err("it has no signatures".into()));
    image.attach(&bundle(&ours, &statement(&image.digest), IN_TOTO), Some(SIGN));
    assert_eq!(image.signer_anywhere(&[&ours]), Ok(0));
    assert_eq!(image.signer_anywhere(&[&theirs, &ours]), Ok(1));
    let other = "it has signatures, but of other keys, or of something that was changed afterwards";
    assert_eq!(image.signer_anywhere(&[&theirs]), Err(other.into()));
}

#[test]
fn bundles_about_something_else_do_not() {
    let key = Key::new();
    let other = format!("sha256:{}", "5a".repeat(32));
    let provenance = |digest: &str| {
        let mut statement = statement(digest);
        statement["predicateType"] = json!("https://slsa.dev/provenance/v1");
        statement
    };
    let image = Referred::new();
    let mut tampered = bundle(&key, &statement(&other), IN_TOTO);
    tampered["dsseEnvelope"]["payload"] = json!(STANDARD.encode(statement(&image.digest).to_string()));
    let claim = "what is signed is no claim of cosign's";
    for (made, problem) in [
        (bundle(&key, &statement(&other), IN_TOTO), format!("the signature is for another image, {other}")),
        (bundle(&key, &statement(&image.digest), "application/json"), claim.to_owned()),
        (bundle(&key, &provenance(&image.digest), IN_TOTO), claim.to_owned()),
        (tampered, "it has signatures, but of other keys, or of something that was changed afterwards".to_owned()),
        (json!({"mediaType": BUNDLE}), "what it has for a signature is no bundle of cosign's".to_owned()),
    ] {
        let mut image = image.clone();
        image.attach(&made, Some(SIGN));
        assert_eq!(image.signer_anywhere(&[&key]), Err(problem));
    }
}

#[test]
fn a_signature_is_found_among_many_referrers() {
    let key = Key::new();
    let mut image = Referred::new();
    let noise = json!({"mediaType": BUNDLE, "messageSignature": {}});
    for number in 0..150 {
        let mut noise = noise.clone();
        noise["number"] = json!(number);
        image.attach(&noise, if number % 2 == 0 { Some("https://slsa.dev/provenance/v1") } else { None });
    }
    image.attach(&bundle(&key, &statement(&image.digest), IN_TOTO), Some(SIGN));
    assert_eq!(image.signer_anywhere(&[&key]), Ok(0));
    let paged = image.with_list(40);
    assert_eq!(image.signer(&paged, &[&key]).unwrap(), Ok(0));
    assert_eq!(paged.count("/referrers/"), 4);
    // What nobody looks for is not fetched: of the artifacts one.
    let artifacts = paged.requests().iter().filter(|request| request.path.contains("/manifests/sha256:")).count();
    assert_eq!(artifacts, 1);
    // Without it there is an end to looking.
    image.referrers.pop();
    let paged = image.with_list(40);
    let problem = "what it has for a signature is no bundle of cosign's";
    assert_eq!(image.signer(&paged, &[&key]).unwrap(), Err(problem.into()));
    assert!(paged.count("/manifests/sha256:") <= 64);
}

/// An endless list, one that cannot be read, and a registry in trouble.
#[test]
fn lists_are_bounded() {
    let key = Key::new();
    let image = Referred::new();
    let endless = {
        let image = image.clone();
        Server::start(move |request| {
            if !request.path.contains("/referrers/") {
                return image.content.answer(request);
            }
            let index = Referred::index(&[]).to_string();
            Reply::ok(index).header("Link", format!("<{}?from=0>; rel=\"next\"", request.path))
        })
    };
    assert_eq!(image.signer(&endless, &[&key]).unwrap(), Err("it has no signatures".into()));
    assert_eq!(endless.count("/referrers/"), 8);
    let answering = |reply: Reply| {
        let image = image.clone();
        Server::start(move |request| match request.path.contains("/referrers/") {
            true => reply.clone(),
            false => image.content.answer(request),
        })
    };
    let nonsense = image.signer(&answering(Reply::ok("{}")), &[&key]).unwrap();
    assert_eq!(nonsense, Err("what it has for a signature is no bundle of cosign's".into()));
    for unknown in [400, 404, 405, 501] {
        let none = image.signer(&answering(Reply::status(unknown)), &[&key]).unwrap();
        assert_eq!(none, Err("it has no signatures".into()), "{unknown}");
    }
    let (kind, message) = image.signer(&answering(Reply::status(503)), &[&key]).unwrap_err();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(message.starts_with("cannot look for the image's signature: "), "{message}");
}
