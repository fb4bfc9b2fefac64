//! Images of every kind, good and bad, from a registry that works.

use serde_json::{Value, json};
use spank_pyxis::image::platform::Platform;
use spank_pyxis::importer::protocol::FailureKind;
use spank_pyxis::registry::sha256;

use crate::broker::{Failed, Import};
use crate::content::{Compression, Content, INDEX, MANIFEST, gzip, tar};
use crate::server::{Reply, Server};

fn server(content: &Content) -> Server {
    let content = content.clone();
    Server::start(move |request| content.answer(request))
}

fn import(content: &Content) -> Import {
    // The server lives as long as the test's process.
    let server = Box::leak(Box::new(server(content)));
    Import::new("some/image:latest", &[&server.host()])
}

#[test]
fn layers_of_every_compression_arrive() {
    let content = Content::image(&[
        (tar(1_000_000), Compression::Gzip),
        (tar(2_000_000), Compression::Zstd),
        (tar(3_000_000), Compression::Plain),
        (tar(1), Compression::Gzip),
    ]);
    let server = server(&content);
    let imported = Import::new("some/image", &[&server.host()]).run().unwrap();
    let manifest = content.manifest("latest");
    assert_eq!(imported.manifest, sha256(manifest.to_string().as_bytes()));
    assert_eq!(imported.origin, format!("{}/some/image", server.host()));
    assert_eq!(sha256(&imported.config).to_string(), manifest["config"]["digest"]);
    assert_eq!(imported.layers.len(), 4);
    assert_eq!(imported.layers[2].blob, imported.layers[2].diff_id);
    assert!(imported.warnings.is_empty());
    let first = &server.requests()[0];
    assert_eq!(first.path, "/v2/some/image/manifests/latest");
    for media_type in [INDEX, MANIFEST, "application/vnd.docker.distribution.manifest.list.v2+json"] {
        assert!(first.header("accept").unwrap().contains(media_type));
    }
    assert!(server.requests().iter().all(|request| request.header("authorization").is_none()));
}

#[test]
fn the_same_layer_gives_the_same_image() {
    use std::io::{Read, Seek};
    let content = Content::image(&[(tar(100_000), Compression::Gzip), (tar(100_000), Compression::Zstd)]);
    let mut images = import(&content).run().unwrap().files.into_iter().map(|mut file| {
        let mut bytes = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        bytes
    });
    assert!(images.next() == images.next());
}

/// An index with attestations and images for other machines, and the digest of the image for this one.
fn index() -> (Content, String) {
    let host = Platform::host();
    let other = if host.architecture == "arm64" { "amd64" } else { "arm64" };
    let mut content = Content::default();
    let mut entries = Vec::new();
    let mut chosen = String::new();
    for (number, (os, architecture)) in [
        ("unknown", "unknown"),
        ("windows", &*host.architecture),
        ("linux", other),
        ("linux", &*host.architecture),
        ("linux", &*host.architecture),
    ]
    .into_iter()
    .enumerate()
    {
        let platform = Platform { os: os.into(), architecture: architecture.into(), variant: None };
        let manifest = content.add_image(&[(tar(1000 + number), Compression::Gzip)], &platform);
        let mut entry = content.add_manifest(MANIFEST, &manifest);
        if number == 3 {
            chosen = entry["digest"].as_str().unwrap().to_owned();
        }
        entry["platform"] = json!({"os": os, "architecture": architecture});
        entries.push(entry);
    }
    let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": entries});
    content.tag("latest", INDEX, &index);
    (content, chosen)
}

#[test]
fn an_index_leads_to_the_image_for_this_machine() {
    let (mut content, chosen) = index();
    assert_eq!(import(&content).run().unwrap().manifest.to_string(), chosen);

    // An index may name an index, and a digest may be asked for.
    let nested = content.manifest("latest");
    let outer = json!({"schemaVersion": 2, "manifests": [content.add_manifest(INDEX, &nested)]});
    let digest = content.add_manifest(INDEX, &outer)["digest"].as_str().unwrap().to_owned();
    let server = server(&content);
    let import = Import::new(&format!("some/image:ignored@{digest}"), &[&server.host()]);
    assert_eq!(import.run().unwrap().manifest.to_string(), chosen);
    assert!(server.requests()[0].path.ends_with(&digest));
}

#[test]
fn another_architecture_is_a_warning_and_another_system_a_failure() {
    let mut content = Content::default();
    let mut platform = Platform { os: "linux".into(), architecture: "s390x".into(), variant: None };
    let manifest = content.add_image(&[(tar(10), Compression::Gzip)], &platform);
    content.tag("latest", MANIFEST, &manifest);
    let warnings = import(&content).run().unwrap().warnings;
    assert!(warnings[0].contains("is for s390x, and this machine is"), "{warnings:?}");

    platform.os = "windows".into();
    let manifest = content.add_image(&[(tar(10), Compression::Gzip)], &platform);
    content.tag("latest", MANIFEST, &manifest);
    let (kind, message) = import(&content).fail();
    assert_eq!(kind, FailureKind::NotFound);
    assert!(message.contains("is for windows, not for linux/"), "{message}");
}

/// The failure of an image whose manifest was edited.
fn with_manifest(edit: impl FnOnce(&mut Content, &mut Value)) -> Failed {
    let mut content = Content::simple(100_000);
    let mut manifest = content.manifest("latest");
    edit(&mut content, &mut manifest);
    content.replace_manifest("latest", manifest.to_string());
    import(&content).fail()
}

/// The failure of an image whose layer is `blob`, which unpacks to `tar`.
fn with_layer(blob: Vec<u8>, tar: &[u8]) -> Failed {
    with_manifest(|content, manifest| {
        manifest["layers"][0] = content.add_blob("application/vnd.oci.image.layer.v1.tar+gzip", blob);
        with_config(content, manifest, |config| config["rootfs"]["diff_ids"][0] = sha256(tar).to_string().into());
    })
}

fn with_config(content: &mut Content, manifest: &mut Value, edit: impl FnOnce(&mut Value)) {
    let digest = manifest["config"]["digest"].as_str().unwrap().to_owned();
    let mut config: Value = serde_json::from_slice(content.blob(&digest)).unwrap();
    edit(&mut config);
    manifest["config"] = content.add_blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes());
}

#[test]
fn bad_manifests_are_named() {
    use FailureKind::{BadImage, NotFound};
    let digest = || "0".repeat(64);
    for (failed, kind, text) in [
        (with_manifest(|_, manifest| *manifest = json!({"schemaVersion": 1})), BadImage, "obsolete schema 1"),
        (with_manifest(|_, manifest| *manifest = json!("x")), BadImage, "malformed manifest"),
        (with_manifest(|_, manifest| manifest["layers"] = json!([])), BadImage, "no layers"),
        (
            with_manifest(|_, manifest| {
                manifest["layers"] = vec![manifest["layers"][0].clone(); 501].into();
            }),
            BadImage,
            "501 layers, more than the 500",
        ),
        (
            with_manifest(|_, manifest| {
                manifest["layers"] = vec![manifest["layers"][0].clone(); 2].into();
            }),
            BadImage,
            "the manifest has 2 layers and the config 1 diffIDs",
        ),
        (
            with_manifest(|_, manifest| manifest["config"]["mediaType"] = "application/vnd.cncf.helm".into()),
            BadImage,
            "not a container image but an artifact of type \"application/vnd.cncf.helm\"",
        ),
        (
            with_manifest(|_, manifest| manifest["config"]["size"] = (9 << 20).into()),
            BadImage,
            "longer than 8388608 bytes",
        ),
        (
            with_manifest(|_, manifest| manifest["config"]["digest"] = format!("sha256:{}", digest()).into()),
            NotFound,
            "but not its blob sha256:0000",
        ),
        (
            with_manifest(|content, manifest| {
                with_config(content, manifest, |config| config["rootfs"]["diff_ids"][0] = "sha256:x".into());
            }),
            BadImage,
            "malformed image config: invalid digest \"sha256:x\"",
        ),
        (
            with_manifest(|_, manifest| {
                *manifest = json!({"schemaVersion": 2, "manifests": [
                    {"digest": "x", "size": 1, "platform": {"os": "plan9", "architecture": "mips"}}
                ]});
            }),
            NotFound,
            ": there is one for plan9/mips",
        ),
        (
            with_manifest(|_, manifest| manifest["x"] = "y".repeat(5 << 20).into()),
            BadImage,
            "longer than 4194304 bytes",
        ),
    ] {
        assert!(failed.0 == kind && failed.1.contains(text), "{text}: {failed:?}");
    }
}

#[test]
fn a_layer_that_is_not_handed_out_is_used_if_it_is_there() {
    const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";
    let mut content = Content::simple(1000);
    let mut manifest = content.manifest("latest");
    manifest["layers"][0]["mediaType"] = FOREIGN.into();
    manifest["layers"][0]["urls"] = json!(["https://elsewhere.example/layer"]);
    content.replace_manifest("latest", manifest.to_string());
    import(&content).run().unwrap();

    let digest = format!("sha256:{}", "0".repeat(64));
    manifest["layers"][0]["digest"] = digest.clone().into();
    content.replace_manifest("latest", manifest.to_string());
    let (kind, message) = import(&content).fail();
    assert_eq!(kind, FailureKind::NotFound);
    assert!(
        message.contains(&format!("does not have the non-distributable layer {digest} of some/image")),
        "{message}"
    );
}

#[test]
fn an_index_that_never_ends_is_refused() {
    // Four indexes deep.
    let mut content = Content::simple(10);
    let mut entry = content.add_manifest(MANIFEST, &content.manifest("latest"));
    for _ in 0..4 {
        entry = content.add_manifest(INDEX, &json!({"schemaVersion": 2, "manifests": [entry]}));
    }
    content.replace_manifest("latest", json!({"schemaVersion": 2, "manifests": [entry]}).to_string());
    assert!(import(&content).fail().1.contains("nested too deeply"));
}

#[test]
fn bad_layers_are_named() {
    let good = tar(300_000);
    let blob = gzip(&good);
    let mut below_link = good.clone();
    below_link[..10].copy_from_slice(b"../escape\0");
    below_link[148..156].fill(b' ');
    let sum: u32 = below_link[..512].iter().map(|&byte| u32::from(byte)).sum();
    below_link[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    for ((kind, message), text) in [
        (with_layer(blob.clone(), b"another"), "it unpacks to sha256:"),
        (with_layer(blob[..blob.len() - 100].to_vec(), &good), "malformed gzip stream"),
        (with_layer(good[..100_000].to_vec(), &good[..100_000]), "malformed layer"),
        (with_layer(gzip(&below_link), &below_link), "../escape"),
        (with_layer(gzip(&vec![0; 80 << 20]), &[]), "more bytes than import.max_layer_bytes"),
        (with_manifest(|_, manifest| manifest["layers"][0]["size"] = 1000.into()), "longer than 1000 bytes"),
        (with_manifest(|_, manifest| manifest["layers"][0]["size"] = 1_000_000.into()), "of 1000000 bytes"),
        (with_manifest(|content, _| content.blob(&content.layer(0).clone())[50_000] ^= 1), "layer sha256:"),
    ] {
        assert!(kind == FailureKind::BadImage && message.contains(text), "{text}: {message}");
        assert!(message.starts_with("layer sha256:"), "{message}");
    }
}

#[test]
fn digests_are_computed_and_not_believed() {
    let mut content = Content::simple(10);
    let digest = sha256(content.manifest("latest").to_string().as_bytes()).to_string();
    // A registry that serves something else for a digest, and says that it is what was asked for.
    let other = Content::simple(11).manifest("latest").to_string();
    content.replace_manifest(&digest, other);
    let claimed = digest.clone();
    let server =
        Server::start(move |request| content.answer(request).header("Docker-Content-Digest", claimed.as_str()));
    let (kind, message) = Import::new(&format!("some/image@{digest}"), &[&server.host()]).fail();
    assert_eq!(kind, FailureKind::BadImage);
    assert!(message.contains("has the digest sha256:") && message.contains(&digest), "{message}");
}

#[test]
fn what_is_not_there_is_said() {
    let (kind, message) = {
        let server = server(&Content::simple(10));
        Import::new("some/image:missing", &[&server.host()]).fail()
    };
    assert_eq!(kind, FailureKind::NotFound);
    assert!(message.contains("some/image:missing not found: 127.0.0.1:"), "{message}");
    // A file name taken for an image name.
    let server = server(&Content::default());
    let mut import = Import::new("x", &[&server.host()]).mirror("docker.io", &server.host());
    import.image = "ubuntu.sqsh".into();
    import.registries.registry.get_mut("docker.io").unwrap().insecure = true;
    let reference = spank_pyxis::image::reference::ImageReference::parse("ubuntu.sqsh").unwrap();
    assert_eq!(import.registries.mirrors(&reference)[0].host, server.host());
    let (conversation, _) = (import.resolve().map(drop), ());
    let (_, message) = conversation.unwrap_err();
    assert!(message.contains("for a squashfs file in the working directory write ./ubuntu.sqsh"), "{message}");
}

#[test]
fn mirrors_are_asked_first_and_the_registry_last() {
    let content = Content::simple(1000);
    let (broken, empty, mirror, upstream) =
        (Server::start(|_| Reply::status(500)), server(&Content::default()), server(&content), server(&content));
    let import = Import::new("some/image", &[&upstream.host()])
        .mirror(&upstream.host(), &empty.host())
        .mirror(&upstream.host(), &broken.host())
        .mirror(&upstream.host(), &format!("{}/cache", mirror.host()));
    let imported = import.run().unwrap();
    assert_eq!(imported.origin, format!("{}/cache/some/image", mirror.host()));
    assert!(empty.count("") == 1 && broken.count("") == 2 && upstream.count("") == 0);

    let import = Import::new("some/image", &[&upstream.host()]).mirror(&upstream.host(), &broken.host());
    assert_eq!(import.run().unwrap().origin, format!("{}/some/image", upstream.host()));

    let import = Import::new("some/image:missing", &[&upstream.host()]).mirror(&upstream.host(), &empty.host());
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::NotFound);
    assert!(message.contains(&format!("; before that, mirror {}/some/image: image", empty.host())), "{message}");
}
