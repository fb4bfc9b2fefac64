use std::os::fd::AsFd;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::super::protocol::Report;
use super::*;
use crate::sys::channel;

/// A member of an archive: `0` a file, `2` a symbolic and `1` a hard link.
fn member(archive: &mut Vec<u8>, flag: u8, name: &str, link: &str, content: &[u8]) {
    let mut header = [0u8; 512];
    header[..name.len()].copy_from_slice(name.as_bytes());
    header[100..107].copy_from_slice(b"0000644");
    header[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = flag;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    archive.extend(header);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(512), 0);
}

fn finished(mut archive: Vec<u8>) -> Vec<u8> {
    archive.resize(archive.len() + 1024, 0);
    archive
}

fn host() -> Platform {
    Platform { os: "linux".into(), architecture: "amd64".into(), variant: None }
}

/// A layer of `size` bytes of one file.
fn layer(size: usize) -> Vec<u8> {
    let mut tar = Vec::new();
    member(&mut tar, b'0', "file", "", &vec![7; size]);
    finished(tar)
}

fn config(layers: &[Vec<u8>]) -> Vec<u8> {
    let diff_ids: Vec<String> = layers.iter().map(|layer| sha256(layer).to_string()).collect();
    let config = json!({"os": "linux", "architecture": "amd64", "config": {}, "rootfs": {"diff_ids": diff_ids}});
    config.to_string().into_bytes()
}

/// The files of an OCI layout with an image of these layers. `edit` may make its manifest lie.
fn layout(layers: &[Vec<u8>], edit: impl FnOnce(&mut Value)) -> Vec<(String, Vec<u8>)> {
    let mut files = vec![("oci-layout".to_owned(), b"{}".to_vec())];
    let mut blob = |media_type: &str, bytes: Vec<u8>| {
        let digest = sha256(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()});
        files.push((format!("./{}", blob_path(&digest)), bytes));
        descriptor
    };
    let config = blob("application/vnd.oci.image.config.v1+json", config(layers));
    let layers: Vec<Value> =
        layers.iter().map(|layer| blob("application/vnd.oci.image.layer.v1.tar", layer.clone())).collect();
    let mut manifest = json!({"schemaVersion": 2, "config": config, "layers": layers});
    edit(&mut manifest);
    let manifest = blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().into_bytes());
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    files.push(("index.json".into(), index.to_string().into_bytes()));
    files
}

fn archive(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut archive = Vec::new();
    for (name, content) in files {
        member(&mut archive, b'0', name, "", content);
    }
    finished(archive)
}

fn file(bytes: &[u8]) -> OwnedFd {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    file.into()
}

fn open(form: SourceForm, bytes: &[u8], wanted: Option<LocalForm>, name: Option<&str>) -> Result<LocalImage, String> {
    let spool = (form == SourceForm::Stream).then(|| file(b""));
    find((form, file(bytes), spool), wanted, name, "./x", &host()).map_err(|failure| match failure.report() {
        Report::Failed { message, .. } => message,
        other => panic!("{other:?}"),
    })
}

fn problem(bytes: &[u8]) -> String {
    let message = open(SourceForm::Archive, bytes, None, None).unwrap_err();
    assert!(message.starts_with("./x: ") && !message.contains('\n'), "{message}");
    message
}

/// Every layer of the image, read.
fn contents(image: &LocalImage) -> Vec<Vec<u8>> {
    let read = |index| {
        let mut bytes = Vec::new();
        image.blob(index).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    };
    (0..image.layers.len()).map(read).collect()
}

#[test]
fn an_archive_of_a_layout_is_read_in_every_form() {
    let layers = [layer(10), layer(300_000), layer(0)];
    let bytes = archive(&layout(&layers, |_| {}));
    let gzip = {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&bytes).unwrap();
        encoder.finish().unwrap()
    };
    for (form, bytes) in [
        (SourceForm::Archive, bytes.clone()),
        (SourceForm::Stream, bytes.clone()),
        (SourceForm::Stream, gzip),
        (SourceForm::Stream, zstd::encode_all(&bytes[..], 1).unwrap()),
    ] {
        let image = open(form, &bytes, None, None).unwrap();
        assert!(image.has_blob_digests);
        assert!(contents(&image) == layers);
        assert_eq!(image.config_bytes, config(&layers));
        assert!(image.blob(3).is_err());
    }
    assert!(open(SourceForm::Archive, &bytes, Some(LocalForm::DockerArchive), None).is_err());
}

#[test]
fn what_docker_wrote_is_read_with_its_links() {
    let layers = [layer(10), layer(20), layer(10)];
    let config = config(&layers);
    let name = format!("{}.json", sha256(&config).hex());
    let mut tar = Vec::new();
    member(&mut tar, b'0', &name, "", &config);
    member(&mut tar, b'0', "a/layer.tar", "", &layers[0]);
    member(&mut tar, b'0', "b.tar", "", &layers[1]);
    member(&mut tar, b'2', "b/layer.tar", "../b.tar", b"");
    member(&mut tar, b'1', "c/layer.tar", "a/layer.tar", b"");
    let manifest =
        json!([{"Config": name, "RepoTags": ["x:1"], "Layers": ["a/layer.tar", "b/layer.tar", "c/layer.tar"]}]);
    member(&mut tar, b'0', "manifest.json", "", manifest.to_string().as_bytes());
    let tar = finished(tar);
    for name in [None, Some("x:1"), Some("@0")] {
        let image = open(SourceForm::Archive, &tar, Some(LocalForm::DockerArchive), name).unwrap();
        assert!(!image.has_blob_digests && contents(&image) == layers);
        assert_eq!(image.manifest_digest, sha256(&config));
    }
    assert!(
        open(SourceForm::Archive, &tar, None, Some("y")).unwrap_err().contains("no image called \"y\": there is x:1")
    );
}

#[test]
fn a_layout_is_asked_for_by_digest() {
    let layers = [layer(10), layer(100)];
    let files = layout(&layers, |_| {});
    let (importer, reader) = channel::pair::<LayoutAsk, LayoutAnswer>().unwrap();
    let server = std::thread::spawn(move || {
        while let Some((ask, _)) = reader.receive().unwrap() {
            let name = match ask {
                LayoutAsk::Index => "index.json".to_owned(),
                LayoutAsk::Blob(digest) => format!("./{}", blob_path(&digest)),
            };
            let content = &files.iter().find(|(file, _)| *file == name).unwrap().1;
            reader.send(&LayoutAnswer::File { size: content.len() as u64 }, &[file(content).as_fd()]).unwrap();
        }
    });
    let image = find((SourceForm::Layout, importer.into(), None), None, None, "./x", &host()).unwrap();
    assert!(contents(&image) == layers);
    drop(image);
    server.join().unwrap();
}

#[test]
fn lies_and_damage_are_found_out() {
    let layers = [layer(10)];
    let good = layout(&layers, |_| {});
    let index_of = |prefix: &str| good.iter().position(|(name, _)| name.starts_with(prefix)).unwrap();
    let without = |at: usize| {
        let mut files = good.clone();
        files.remove(at);
        archive(&files)
    };
    // 0: oci-layout, 1: config, 2: layer, 3: manifest, 4: index
    assert!(problem(&without(index_of("index.json"))).contains("neither the index.json"));
    assert!(problem(&without(3)).contains("the archive has no file blobs/sha256/"));
    assert!(problem(&without(1)).contains("the archive has no file blobs/sha256/"));
    for at in [1, 3] {
        let mut files = good.clone();
        files[at].1.push(b' ');
        assert!(problem(&archive(&files)).contains("it was changed or is damaged"));
    }
    let mut huge = good.clone();
    huge[4].1.resize(5 << 20, b' ');
    assert!(problem(&archive(&huge)).contains("index.json has 5242880 bytes: the limit is 4194304"));
    let whole = archive(&good);
    assert!(problem(&whole[..whole.len() - 1400]).contains("cut off"));
    assert!(problem(b"no archive at all").contains("malformed archive"));
    assert!(problem(b"").contains("neither"));
    let two = layout(&layers, |manifest| {
        let layer = manifest["layers"][0].clone();
        manifest["layers"] = json!([layer, layer]);
    });
    assert!(problem(&archive(&two)).contains("2 layers and a config for 1"));
    // A layer that is not there, or not as long as it should be, is missed when it is asked for.
    let image = open(SourceForm::Archive, &without(2), None, None).unwrap();
    assert!(image.blob(0).is_err());
    let wrong_size = layout(&layers, |manifest| manifest["layers"][0]["size"] = 7.into());
    let image = open(SourceForm::Archive, &archive(&wrong_size), None, None).unwrap();
    assert!(image.blob(0).is_err());
}

#[test]
fn nothing_outside_the_archive_is_reached() {
    let layers = [layer(10)];
    let config = config(&layers);
    for (path, flag, link) in [
        ("../../etc/passwd", b'0', ""),
        ("/etc/passwd", b'0', ""),
        ("out", b'2', "/etc/passwd"),
        ("out", b'2', "../../../etc/passwd"),
        ("out", b'1', "/etc/passwd"),
        ("loop", b'2', "loop"),
    ] {
        let mut tar = Vec::new();
        member(&mut tar, b'0', "c.json", "", &config);
        if !link.is_empty() {
            member(&mut tar, flag, path, link, b"");
        }
        let manifest = json!([{"Config": "c.json", "Layers": [path]}]).to_string();
        member(&mut tar, b'0', "manifest.json", "", manifest.as_bytes());
        assert!(problem(&finished(tar)).contains(&format!("the archive has no file {path}")));
    }
    let mut tar = Vec::new();
    let name = format!("{}.json", "0".repeat(64));
    member(&mut tar, b'0', &name, "", &config);
    member(&mut tar, b'0', "l", "", &layers[0]);
    let manifest = json!([{"Config": name, "Layers": ["l"]}]).to_string();
    member(&mut tar, b'0', "manifest.json", "", manifest.as_bytes());
    assert!(problem(&finished(tar)).contains("it was changed"));
}

#[test]
fn other_machines_images_are_told() {
    let mut files = layout(&[layer(1)], |_| {});
    let edit = |files: &mut Vec<(String, Vec<u8>)>, from: &str, to: &str| {
        let config = String::from_utf8(files[1].1.clone()).unwrap().replace(from, to).into_bytes();
        let (old, new) = (sha256(&files[1].1), sha256(&config));
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        let manifest = text(&files[3].1).replace(&old.to_string(), &new.to_string());
        let manifest =
            manifest.replace(&format!("\"size\":{}", files[1].1.len()), &format!("\"size\":{}", config.len()));
        let index =
            text(&files[4].1).replace(&sha256(&files[3].1).to_string(), &sha256(manifest.as_bytes()).to_string());
        files[1] = (blob_path(&new), config);
        files[3] = (blob_path(&sha256(manifest.as_bytes())), manifest.into_bytes());
        files[4].1 = index.into_bytes();
    };
    edit(&mut files, "amd64", "s390x");
    let image = open(SourceForm::Archive, &archive(&files), None, None).unwrap();
    assert_eq!(image.warnings, ["image ./x is for s390x, and this machine is amd64"]);
    edit(&mut files, "\"linux\"", "\"windows\"");
    assert!(problem(&archive(&files)).contains("it is for windows, and this machine is linux/amd64"));
}

proptest! {
    #[test]
    fn any_damage_is_survived(at in 0usize..6000, byte in any::<u8>(), cut in any::<Option<prop::sample::Index>>()) {
        let mut bytes = archive(&layout(&[layer(10)], |_| {}));
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(image) = open(SourceForm::Archive, &bytes, None, None) {
            for index in 0..image.layers.len() {
                if let Ok(mut blob) = image.blob(index) {
                    let _ = io::copy(&mut blob, &mut io::sink());
                }
            }
        }
    }
}
