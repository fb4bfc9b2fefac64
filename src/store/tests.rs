//! The store on a real file system, as root.

use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, SystemTime};

use sha2::Digest as _;
use tempfile::TempDir;

use super::*;
use crate::image::reference::ImageReference;
use crate::importer::protocol::LayerDescriptor;
use crate::policy::Evidence;

struct Nothing;

impl PinnedMounts for Nothing {
    fn release(&self, _: &Digest) -> io::Result<()> {
        Ok(())
    }
}

fn new_store() -> (TempDir, Store) {
    assert!(rustix::process::geteuid().is_root(), "the store's tests must run as root");
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(&directory.path().join("store")).unwrap();
    (directory, store)
}

fn digest(text: &str) -> Digest {
    Digest::from_bytes(sha2::Sha256::digest(text).into())
}

fn seal<'a>(new: NewLayer<'a>, layer: &Digest, content: &[u8]) -> SealedLayer<'a> {
    write(&new, content);
    new.seal(layer, content.len() as u64).unwrap()
}

fn write(new: &NewLayer<'_>, content: &[u8]) {
    let mut file = std::fs::File::from(new.as_fd().try_clone_to_owned().unwrap());
    file.write_all(content).unwrap();
}

fn publish(store: &Store, name: &str, content: &[u8]) -> Digest {
    let layer = digest(name);
    drop(seal(store.new_layer().unwrap(), &layer, content).publish().unwrap());
    layer
}

/// As if the layer had been leased `hours` ago.
fn age(store: &Store, layer: &Digest, hours: u64) {
    let path = store.path().join(layer::layer_path(layer));
    let file = fs::File::options().read(true).open(path).unwrap();
    file.set_modified(SystemTime::now() - Duration::from_secs(hours * 3600)).unwrap();
}

fn names(store: &Store, directory: &str) -> Vec<String> {
    store.list(directory).unwrap()
}

fn image(name: &str) -> ImageReference {
    ImageReference {
        user: None,
        registry: "registry.example".into(),
        repository: name.into(),
        tag_or_digest: "latest".into(),
        is_short: false,
    }
}

#[test]
fn a_store_is_made_with_its_parents_and_found_again() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a/b/store");
    let layer = publish(&Store::open(&path).unwrap(), "x", b"content");
    assert_eq!(fs::metadata(directory.path().join("a")).unwrap().mode() & 0o7777, 0o755);
    for (below, mode) in
        [("", 0o711), ("layers", 0o700), ("layers/sha256", 0o700), ("confirmed", 0o700), ("locks", 0o700)]
    {
        assert_eq!(fs::metadata(path.join(below)).unwrap().mode() & 0o7777, mode, "{below}");
    }
    assert_eq!(fs::metadata(path.join(layer::layer_path(&layer))).unwrap().mode() & 0o7777, 0o400);
    assert!(Store::open(&path).unwrap().lease(&layer).unwrap().is_some());
    assert_eq!(fs::read_to_string(path.join("version")).unwrap(), "1\n");
}

#[test]
fn a_half_made_store_is_finished() {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("layers")).unwrap();
    fs::create_dir(directory.path().join("lost+found")).unwrap();
    publish(&Store::open(directory.path()).unwrap(), "x", b"content");
}

#[test]
fn what_is_not_a_safe_store_is_refused_in_one_line() {
    let (directory, store) = new_store();
    let path = store.path();
    let refused = |path: &Path, expected: &str| {
        let message = Store::open(path).unwrap_err().to_string();
        assert!(message.contains(expected) && !message.contains('\n'), "{message}");
    };
    fs::set_permissions(path, fs::Permissions::from_mode(0o770)).unwrap();
    refused(path, "may be written by group or others (mode 0770)");
    fs::set_permissions(path, fs::Permissions::from_mode(0o700)).unwrap();
    std::os::unix::fs::chown(path, Some(1000), None).unwrap();
    refused(path, "belongs to uid 1000");
    std::os::unix::fs::chown(path, Some(0), None).unwrap();
    symlink(path, directory.path().join("link")).unwrap();
    refused(&directory.path().join("link"), "cannot open");
    fs::remove_file(path.join("version")).unwrap();
    fs::write(path.join("version"), "2\n").unwrap();
    refused(path, "has version \"2\", this pyxis knows only \"1\"");
    fs::create_dir(directory.path().join("home")).unwrap();
    fs::write(directory.path().join("home/letter"), "").unwrap();
    refused(&directory.path().join("home"), "not a pyxis store (it holds \"letter\")");
    fs::write(directory.path().join("file"), "").unwrap();
    refused(&directory.path().join("file/store"), "Not a directory");
}

#[test]
fn a_layer_has_no_name_before_it_is_published() {
    let (_directory, store) = new_store();
    let layer = digest("x");
    let sealed = seal(store.new_layer().unwrap(), &layer, b"content");
    assert!(names(&store, "layers/sha256").is_empty());
    assert!(store.lease(&layer).unwrap().is_none());
    let published = sealed.publish().unwrap();
    assert_eq!(names(&store, "layers/sha256"), [layer.hex()]);
    let mut content = [0; 7];
    store.lease(&layer).unwrap().unwrap().file.read_exact_at(&mut content, 0).unwrap();
    assert_eq!((&content, published.diff_id), (b"content", layer));
    drop(seal(store.new_layer().unwrap(), &digest("y"), b"dropped"));
    assert_eq!(names(&store, "layers/sha256").len(), 1);
}

#[test]
fn named_files_do_where_there_are_no_unnamed_ones() {
    let (_directory, store) = new_store();
    let layer = digest("x");
    let new = store.new_named_layer().unwrap();
    assert!(names(&store, "layers/sha256")[0].starts_with(dir::TEMPORARY));
    write(&new, b"content");
    // The collector does not touch what somebody writes.
    store.collect(Goal::Everything, &Nothing, false).unwrap();
    let sealed = new.seal(&layer, 7).unwrap();
    store.collect(Goal::Everything, &Nothing, false).unwrap();
    let published = sealed.publish().unwrap();
    assert_eq!(names(&store, "layers/sha256"), [layer.hex()]);
    assert_eq!(published.file.metadata().unwrap().nlink(), 1);
    drop(store.new_named_layer().unwrap());
    assert_eq!(names(&store, "layers/sha256").len(), 1);
    // As a kill leaves it.
    fs::write(store.path().join("layers/sha256/.tmp-0123"), "half").unwrap();
    assert_eq!(store.collect(Goal::Available(0), &Nothing, false).unwrap().removed_records, 1);
    assert_eq!(names(&store, "layers/sha256"), [layer.hex()]);
}

#[test]
fn a_layer_that_somebody_can_still_change_is_not_published() {
    let (_directory, store) = new_store();
    let layer = digest("x");
    let new = store.new_layer().unwrap();
    write(&new, b"content");
    let kept = new.as_fd().try_clone_to_owned().unwrap();
    assert!(matches!(new.seal(&layer, 7), Err(StoreError::OpenForWriting { .. })));
    drop(kept);
    for (content, length) in [(&b"content"[..], 8), (b"", 0)] {
        let new = store.new_layer().unwrap();
        write(&new, content);
        assert!(matches!(new.seal(&layer, length), Err(StoreError::Length { .. })));
    }
    assert!(names(&store, "layers/sha256").is_empty());
}

#[test]
fn the_first_publisher_wins_and_another_content_is_an_error() {
    let (_directory, store) = new_store();
    let layer = publish(&store, "x", b"content");
    let first = store.lease(&layer).unwrap().unwrap();
    let again = seal(store.new_layer().unwrap(), &layer, b"content");
    assert!(again.proves(&first).unwrap());
    let again = again.publish().unwrap();
    assert_eq!(again.file.metadata().unwrap().ino(), first.file.metadata().unwrap().ino());
    for other in [&b"CONTENT"[..], b"contents", b"conten"] {
        let other = seal(store.new_layer().unwrap(), &layer, other);
        assert!(!other.proves(&first).unwrap());
        assert!(matches!(other.publish(), Err(StoreError::Differs { .. })));
    }
}

#[test]
fn one_holder_of_a_fetch_lock() {
    let (_directory, store) = new_store();
    let other = Store::open(store.path()).unwrap();
    let lock = store.try_lock(&digest("x")).unwrap().unwrap();
    assert!(other.try_lock(&digest("x")).unwrap().is_none());
    assert!(other.try_lock(&digest("y")).unwrap().is_some());
    // What a dead holder leaves.
    fs::write(store.path().join("locks").join(digest("z").hex()), "").unwrap();
    assert_eq!(store.collect(Goal::Available(0), &Nothing, false).unwrap().removed_records, 1);
    assert!(other.try_lock(&digest("x")).unwrap().is_none());
    drop(lock);
    assert!(names(&store, "locks").is_empty());
    assert!(other.try_lock(&digest("x")).unwrap().is_some());
}

#[test]
fn the_longest_unused_goes_first_and_what_is_leased_stays() {
    let (_directory, store) = new_store();
    let layers: Vec<_> = (0..5).map(|i| publish(&store, &format!("{i}"), &[i; 8192])).collect();
    for (hours, layer) in [(1, 3), (2, 0), (3, 4), (4, 1), (5, 2)] {
        age(&store, &layers[layer], hours);
    }
    let released = RefCell::new(Vec::new());
    struct Released<'a>(&'a RefCell<Vec<Digest>>);
    impl PinnedMounts for Released<'_> {
        fn release(&self, layer: &Digest) -> io::Result<()> {
            self.0.borrow_mut().push(*layer);
            Ok(())
        }
    }
    let lease = store.lease(&layers[1]).unwrap().unwrap();
    let duplicate = lease.file.try_clone().unwrap();
    drop(lease);
    age(&store, &layers[1], 4);
    let marks = |high, low| Goal::Watermarks(Watermarks { high: Watermark::Bytes(high), low: Watermark::Bytes(low) });
    let nothing = store.collect(marks(40960, 100), &Released(&released), false).unwrap();
    assert_eq!((nothing.removed.len(), nothing.kept_layers, nothing.kept_bytes), (0, 5, 40960));
    let planned = store.collect(marks(40959, 20000), &Released(&released), true).unwrap();
    assert_eq!((names(&store, "layers/sha256").len(), released.borrow().len()), (5, 0));
    let report = store.collect(marks(40959, 20000), &Released(&released), false).unwrap();
    assert_eq!(report.removed, [layers[2], layers[4], layers[0]]);
    assert_eq!((report.freed_bytes, report.kept_layers, report.in_use_layers), (3 * 8192, 2, 1));
    assert_eq!(planned, report);
    assert_eq!(*released.borrow(), report.removed);
    assert_eq!(store.collect(Goal::Everything, &Nothing, false).unwrap().removed, [layers[3]]);
    drop(duplicate);
    assert_eq!(store.collect(Goal::Everything, &Nothing, false).unwrap().removed, [layers[1]]);
}

#[test]
fn a_lease_makes_a_layer_young() {
    let (_directory, store) = new_store();
    let (a, b) = (publish(&store, "a", b"a"), publish(&store, "b", b"b"));
    age(&store, &a, 2);
    age(&store, &b, 1);
    drop(store.lease(&a).unwrap());
    let available = store.available().unwrap();
    let report = store.collect(Goal::Available(available + 1), &Nothing, true).unwrap();
    assert_eq!(report.removed[0], b);
}

#[test]
fn a_layer_that_cannot_be_unmounted_stays() {
    struct Busy;
    impl PinnedMounts for Busy {
        fn release(&self, _: &Digest) -> io::Result<()> {
            Err(io::Error::other("busy"))
        }
    }
    let (_directory, store) = new_store();
    let layer = publish(&store, "a", b"a");
    let report = store.collect(Goal::Everything, &Busy, false).unwrap();
    assert_eq!((report.removed.len(), report.problems.len()), (0, 1));
    assert!(store.lease(&layer).unwrap().is_some());
}

#[test]
fn one_collector_at_a_time() {
    struct Nested<'a>(&'a Store);
    impl PinnedMounts for Nested<'_> {
        fn release(&self, _: &Digest) -> io::Result<()> {
            assert!(matches!(self.0.collect(Goal::Everything, &Nothing, false), Err(StoreError::Collecting { .. })));
            Ok(())
        }
    }
    let (_directory, store) = new_store();
    publish(&store, "a", b"a");
    assert_eq!(store.collect(Goal::Everything, &Nested(&store), false).unwrap().removed.len(), 1);
    store.collect(Goal::Everything, &Nothing, false).unwrap();
}

#[test]
fn records_go_with_their_layers() {
    let (_directory, store) = new_store();
    let config = store.keep_config(b"{}").unwrap();
    let descriptor =
        |name: &str| LayerDescriptor { blob: digest(&format!("blob {name}")), diff_id: digest(name), size: 9 };
    let remember = |name: &str, layers: &[&str]| {
        let layers: Vec<_> = layers.iter().map(|layer| descriptor(layer)).collect();
        for layer in &layers {
            store.note_blob(layer, "registry.example/x").unwrap();
        }
        let manifest = ManifestRecord { origin: "registry.example/x".into(), config, layers, confirmed_at: now() };
        let reference = ReferenceRecord {
            reference: image(name),
            manifest: digest(name),
            evidence: Evidence::default(),
            confirmed_at: now(),
        };
        store.confirm(1000, &reference, &manifest).unwrap();
    };
    publish(&store, "base", b"base");
    publish(&store, "top", b"top");
    age(&store, &digest("top"), 1);
    remember("one", &["base", "top"]);
    remember("two", &["base"]);
    assert_eq!(store.images().unwrap().len(), 2);
    let _lease = store.lease(&digest("base")).unwrap().unwrap();
    let report = store.collect(Goal::Everything, &Nothing, false).unwrap();
    // The manifest and the reference; the blob record and the config are too young.
    assert_eq!((report.removed.len(), report.removed_records), (1, 2));
    let images = store.images().unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!((&images[0].reference, images[0].layer_bytes, images[0].blob_bytes), (&image("two"), 4, 9));
    assert!(store.reference(1000, &image("one")).unwrap().is_none());
    for name in names(&store, "blobs/sha256") {
        let file = fs::File::open(store.path().join("blobs/sha256").join(name)).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(7200)).unwrap();
    }
    assert_eq!(store.collect(Goal::Available(0), &Nothing, false).unwrap().removed_records, 1);
    assert!(store.blob(&digest("blob base")).unwrap().is_some());
    assert!(store.blob(&digest("blob top")).unwrap().is_none());
    assert!(store.config(&config).unwrap().is_some());
}

#[test]
fn a_reference_belongs_to_one_user_and_one_name() {
    let (_directory, store) = new_store();
    let manifest = ManifestRecord {
        origin: "registry.example/x".into(),
        config: store.keep_config(b"{}").unwrap(),
        layers: vec![],
        confirmed_at: now(),
    };
    let reference = ReferenceRecord {
        reference: image("x"),
        manifest: digest("x"),
        evidence: Evidence::default(),
        confirmed_at: now(),
    };
    store.confirm(1000, &reference, &manifest).unwrap();
    assert_eq!(store.reference(1000, &image("x")).unwrap(), Some(reference.clone()));
    assert_eq!(store.manifest(1000, &digest("x")).unwrap(), Some(manifest));
    assert_eq!(store.reference(1001, &image("x")).unwrap(), None);
    assert_eq!(store.manifest(1001, &digest("x")).unwrap(), None);
    let as_user = ImageReference { user: Some("bob".into()), ..image("x") };
    assert_eq!(store.reference(1000, &as_user).unwrap(), None);
}

#[test]
fn a_blob_remembers_where_it_came_from() {
    let (_directory, store) = new_store();
    let layer = LayerDescriptor { blob: digest("blob"), diff_id: digest("layer"), size: 5 };
    for i in 0..70 {
        store.note_blob(&layer, &format!("host{i}/repository")).unwrap();
    }
    store.note_blob(&layer, "host69/repository").unwrap();
    let record = store.blob(&layer.blob).unwrap().unwrap();
    assert_eq!((record.origins.len(), record.origins[0].as_str()), (64, "host6/repository"));
    // Another meaning of the same blob: what was known about it is void.
    let other = LayerDescriptor { diff_id: digest("other"), ..layer };
    store.note_blob(&other, "host/repository").unwrap();
    assert_eq!(store.blob(&other.blob).unwrap().unwrap().origins, ["host/repository"]);
}

#[test]
fn a_damaged_record_is_no_record() {
    let (_directory, store) = new_store();
    let layer = LayerDescriptor { blob: digest("blob"), diff_id: digest("layer"), size: 5 };
    store.note_blob(&layer, "host/repository").unwrap();
    let path = store.path().join("blobs/sha256").join(layer.blob.hex());
    fs::write(&path, b"{\"diff_id\":").unwrap();
    assert!(store.blob(&layer.blob).unwrap().is_none());
    fs::write(&path, b"").unwrap();
    store.note_blob(&layer, "host/repository").unwrap();
    assert!(store.blob(&layer.blob).unwrap().is_some());
}

#[test]
fn watermarks_are_bytes_or_percent() {
    for (text, expected) in [
        ("85%", Watermark::Percent(85)),
        ("100 %", Watermark::Percent(100)),
        ("123", Watermark::Bytes(123)),
        ("2 KiB", Watermark::Bytes(2048)),
        ("3GiB", Watermark::Bytes(3 << 30)),
        ("1T", Watermark::Bytes(1 << 40)),
    ] {
        assert_eq!(text.parse(), Ok(expected), "{text}");
        assert_eq!(expected.to_string().parse(), Ok(expected));
    }
    for text in ["", "%", "101%", "-1", "1.5G", "5 parsecs", "99999999999999T"] {
        assert!(text.parse::<Watermark>().is_err(), "{text}");
    }
    #[derive(serde::Deserialize)]
    struct File {
        store: Watermarks,
    }
    let file: File = toml::from_str("[store]\nhigh = 1000\nlow = \"1%\"").unwrap();
    assert_eq!(file.store, Watermarks { high: Watermark::Bytes(1000), low: Watermark::Percent(1) });
    assert!(toml::from_str::<File>("[store]\nhigh = \"much\"").is_err());
}

#[test]
fn sizes_are_readable() {
    for (bytes, text) in [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB")] {
        assert_eq!(size(bytes), text);
    }
}
