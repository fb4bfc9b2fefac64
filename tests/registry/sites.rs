//! What the administrator says about registries: elsewhere, blocked, with certificates and credentials of the site's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use spank_pyxis::importer::protocol::FailureKind;
use spank_pyxis::registry::config::{Mirror, PullFromMirror, RegistryEntry};
use spank_pyxis::registry::site;
use testbed::Site;
use testbed::registry::{Registry, RegistryOptions};

use crate::broker::Import;
use crate::content::Content;
use crate::server::{Reply, Server};

fn serving() -> Server {
    let content = Content::simple(1000);
    Server::start(move |request| content.answer(request))
}

#[test]
fn a_location_takes_the_place_of_a_name() {
    let server = serving();
    let mut import = Import::new("team/image", &["example.com"]);
    let entry = |location: &str| RegistryEntry {
        insecure: true,
        location: Some(format!("{}/{location}", server.host())),
        ..RegistryEntry::default()
    };
    import.registries.registry.insert("example.com/team".into(), entry("mirrored/t"));
    let imported = import.run().unwrap();
    assert_eq!(imported.origin, format!("{}/mirrored/t/image", server.host()));
    assert_eq!(server.count("/v2/mirrored/t/image/"), server.requests().len());
}

#[test]
fn what_is_blocked_is_not_asked_for() {
    let server = serving();
    let mut import = Import::new("team/image", &[&server.host()]);
    import.registries.registry.get_mut(&server.host()).unwrap().blocked = true;
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Denied);
    let host = server.host();
    let expected = format!("image {host}/team/image:latest is not allowed here: the administrator has blocked {host}");
    assert_eq!(message, expected);
    assert!(server.requests().is_empty());
}

#[test]
fn a_mirror_may_be_for_digests_only() {
    let (mirror, registry) = (serving(), serving());
    let mut import = Import::new("team/image", &[&registry.host()]);
    let location = mirror.host();
    let entry = import.registries.registry.get_mut(&registry.host()).unwrap();
    entry.mirrors.push(Mirror { location, insecure: true, pull_from_mirror: PullFromMirror::DigestOnly });
    let imported = import.run().unwrap();
    assert!(mirror.requests().is_empty());
    import.image = format!("{}/team/image@{}", registry.host(), imported.manifest);
    assert!(import.run().unwrap().origin.starts_with(&mirror.host()));
}

/// A file of the site's, as root has it.
fn secret(directory: &Path, text: &str) -> std::path::PathBuf {
    let path = directory.join("credentials");
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    path
}

#[test]
fn the_sites_credentials_are_for_who_has_none() {
    let content = Content::simple(1000);
    let registry = Server::start(move |request| match request.header("authorization") {
        // site:s, own:o
        Some("Basic c2l0ZTpz" | "Basic b3duOm8=") => content.answer(request),
        _ => Reply::status(401).header("WWW-Authenticate", "Basic realm=x"),
    });
    let directory = tempfile::tempdir().unwrap();
    let file = secret(directory.path(), &format!("machine {} login site password s\n", registry.host()));
    let mut import = Import::new("team/image", &[&registry.host()]);
    import.registries.registry.get_mut(&registry.host()).unwrap().credentials = Some(file.clone());
    import.run().unwrap();
    import.credential(&registry.host(), "own", "o").run().unwrap();
    let last = registry.requests().pop().unwrap();
    assert_eq!(last.header("authorization"), Some("Basic b3duOm8="));

    // Nor is a file taken that others can read.
    let mut import = Import::new("team/image", &[&registry.host()]);
    import.registries.registry.get_mut(&registry.host()).unwrap().credentials = Some(file.clone());
    let reference = spank_pyxis::image::reference::ImageReference::parse(&import.image).unwrap();
    let files = import.registries.site_files(&reference);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).unwrap();
    let error = site::open(&files[0]).unwrap_err().to_string();
    assert!(error.contains("chmod 600"), "{error}");
}

#[test]
fn the_sites_authority_and_certificate() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-site").unwrap();
    let options = RegistryOptions { tls: true, client_certificates: true, ..RegistryOptions::default() };
    let registry = Registry::start(&site, "mutual", options).unwrap();
    let mut import = Import::new("some/image", &[&registry.host()]);
    import.registries.registry.clear();
    let (certificate, key) = registry.client_certificate().unwrap();
    let entry = |with_certificate: bool| RegistryEntry {
        ca: registry.authority().map(Path::to_owned),
        client_certificate: with_certificate.then(|| certificate.to_owned()),
        client_key: with_certificate.then(|| key.to_owned()),
        ..RegistryEntry::default()
    };
    import.registries.registry.insert(registry.host(), entry(false));
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Unavailable, "{message}");
    import.registries.registry.insert(registry.host(), entry(true));
    // The registry is empty: that is what it says, to those whom it lets speak.
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::NotFound, "{message}");
}

/// As docker and podman have them.
#[test]
fn directories_of_certificates() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-certs").unwrap();
    let options = RegistryOptions { tls: true, client_certificates: true, ..RegistryOptions::default() };
    let registry = Registry::start(&site, "certs", options).unwrap();
    let mut import = Import::new("some/image", &[&registry.host()]);
    import.registries.registry.clear();
    import.registries.certs = ["first", "second"].map(|name| site.path(name)).to_vec();
    let directory = site.make_directory(&format!("second/{}", registry.host())).unwrap();
    let copy = |from: &Path, name: &str| {
        fs::copy(from, directory.join(name)).unwrap();
        fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o600)).unwrap();
    };
    copy(registry.authority().unwrap(), "ca.crt");
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert!(!message.contains("unknown authority"), "{message}");
    let (certificate, key) = registry.client_certificate().unwrap();
    copy(certificate, "client.cert");
    // Without its key it is nothing to show.
    assert_eq!(import.fail().0, FailureKind::Unavailable);
    copy(key, "client.key");
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::NotFound, "{message}");
    // The first directory about a registry is the one that counts.
    site.make_directory(&format!("first/{}", registry.host())).unwrap();
    let (_, message) = import.fail();
    assert!(message.contains("unknown authority"), "{message}");
}
