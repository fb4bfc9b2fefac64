//! The messages of the failures that people meet, to the letter: each says what to do next. Those of the network are in
//! `faults`, of credentials in `auth` and `flows`, of the proxy in `confined`, of the disk in the store's tests.

use serde_json::json;
use spank_pyxis::image::platform::Platform;
use spank_pyxis::registry::config::RegistryEntry;

use crate::broker::Import;
use crate::content::{Compression, Content, INDEX, MANIFEST, tar};
use crate::server::{Reply, Server};

/// The failure of `image` at a registry with this content.
fn failure(content: &Content, image: &str) -> (String, String) {
    let content = content.clone();
    let server = Server::start(move |request| content.answer(request));
    (server.host(), Import::new(image, &[&server.host()]).fail().1)
}

#[test]
fn no_such_image_or_tag() {
    for (content, image) in [(Content::default(), "no/image:latest"), (Content::simple(10), "some/image:missing")] {
        let (host, message) = failure(&content, image);
        let expected =
            format!("image {host}/{image} not found: {host} has no such repository, tag or digest: check name and tag");
        assert!(message.starts_with(&expected), "{message}");
    }
}

/// Docker Hub says of images that do not exist that they want credentials.
#[test]
fn a_file_taken_for_an_image() {
    let server = Server::start(|_| Reply::status(401).header("WWW-Authenticate", "Basic realm=x"));
    let mut import = Import::new("x", &[&server.host()]);
    import.image = "foo.sqsh".into();
    let entry = RegistryEntry { location: Some(server.host()), insecure: true, ..RegistryEntry::default() };
    import.registries.registry.insert("docker.io".into(), entry);
    let message = import.fail().1;
    let expected = format!(
        "run \"pyxis login {}\"; for a squashfs file in the working directory write ./foo.sqsh; tried ",
        server.host()
    );
    assert!(message.contains(&expected), "{message}");
}

#[test]
fn another_platform() {
    let host = Platform::host();
    let mut content = Content::default();
    let platform = Platform { os: "linux".into(), architecture: "s390x".into(), variant: None };
    let manifest = content.add_image(&[(tar(10), Compression::Gzip)], &platform);
    let mut entry = content.add_manifest(MANIFEST, &manifest);
    entry["platform"] = json!({"os": "linux", "architecture": "s390x"});
    content.tag("latest", INDEX, &json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": [entry]}));
    let (registry, message) = failure(&content, "some/image:latest");
    assert_eq!(
        message,
        format!(
            "image {registry}/some/image:latest: no image for {host}: there is one for linux/s390x; choose another tag, \
             or nodes of that kind"
        )
    );
}

#[test]
fn no_image_at_all() {
    let artifact = |config: &str| {
        let mut content = Content::simple(10);
        let mut manifest = content.manifest("latest");
        manifest["config"]["mediaType"] = config.into();
        manifest["artifactType"] = "application/vnd.example.model".into();
        content.tag("latest", MANIFEST, &manifest);
        failure(&content, "some/image:latest").1
    };
    let message = artifact("application/vnd.oci.empty.v1+json");
    assert!(
        message.ends_with(
            "some/image:latest: not a container image but an artifact of type \"application/vnd.example.model\" (a chart, \
             a signature, a model …): nothing can run in it"
        ),
        "{message}"
    );
}

#[test]
fn too_many_requests() {
    let server = Server::start(|_| Reply::status(429));
    let (_, message) = Import::new("some/image", &[&server.host()]).fail();
    let host = server.host();
    assert_eq!(
        message,
        format!("{host} allows no more requests for now: try again later, log in, or configure a mirror")
    );
}
