//! Who is given what: single flight, confirmation, proof, and one user's layers in front of another's request.

use std::fs;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use spank_pyxis::broker::import::{AcquireRequest, AcquiredImage, ImportError, ImportEvent, acquire_through};
use spank_pyxis::image::digest::Digest;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::importer::protocol::{Command, FailureKind, Report};
use spank_pyxis::registry::config::{Mirror, PullFromMirror, RegistryEntry};
use spank_pyxis::request::{Environment, Meaning, PullPolicy, User};
use spank_pyxis::store::{Goal, Store, Watermark, Watermarks, now};

use crate::fake::{FakeImporter, Registries, Repository, answer, digest, image_of, layer};
use crate::{NoMounts, Site, site};

const ALICE: u32 = 1001;
const BOB: u32 = 1002;

fn contents(image: &AcquiredImage) -> Vec<Vec<u8>> {
    let read = |file: &fs::File| {
        let mut bytes = Vec::new();
        // A descriptor of its own: duplicates share their position.
        fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file)))
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    };
    image.layers.iter().map(|layer| read(&layer.file)).collect()
}

fn refused(result: Result<AcquiredImage, ImportError>, expected: FailureKind) {
    match result {
        Err(ImportError::Refused { kind, .. }) if kind == expected => {}
        other => panic!("{other:?}"),
    }
}

fn no_layer_records(site: &Site) {
    assert!(site.layers().is_empty());
    site.assert_tidy();
}

#[test]
fn the_second_time_nobody_is_asked() {
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["base", "top", "base"]))]);
    let importer = FakeImporter::honest(&registries);
    let mut events = Vec::new();
    let first = site.acquire_with(&importer, ALICE, "host.example/app", &mut |event| events.push(event)).unwrap();
    assert!(first.from_network);
    assert_eq!(first.config, b"{\"config\":{}}");
    assert_eq!(contents(&first), [image_of("base"), image_of("top"), image_of("base")]);
    assert_eq!(registries.counts(), (1, 0, 2));
    assert_eq!(events[0], ImportEvent::NetworkStart);
    assert!(events.contains(&ImportEvent::Resolved { layers: 3, missing: 2, bytes: 7 }));
    assert!(events.contains(&ImportEvent::Progress { layer: 0, bytes: 1, total: 4 }));
    let again = site.acquire(&importer, ALICE, "host.example/app").unwrap();
    assert!(!again.from_network);
    assert_eq!((again.manifest, &again.config), (first.manifest, &first.config));
    assert_eq!(contents(&again), contents(&first));
    assert_eq!(registries.counts(), (0, 0, 0));
    site.assert_tidy();
    let images = site.store.images().unwrap();
    assert_eq!((images.len(), images[0].uid, images[0].layers), (1, ALICE, 3));
}

#[test]
fn each_user_asks_for_himself() {
    let site = site();
    let private = Repository::with("gzip", &["secret"]).only_for(&[ALICE]);
    let registries = Registries::new([("host.example/private", private)]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    refused(site.acquire(&importer, BOB, "host.example/private"), FailureKind::Denied);
    registries.change("host.example/private", |repository| repository.users.push(BOB));
    registries.counts();
    site.acquire(&importer, BOB, "host.example/private").unwrap();
    // Confirmed, not downloaded.
    assert_eq!(registries.counts(), (1, 1, 0));
}

#[test]
fn a_confirmation_runs_out() {
    let mut site = site();
    site.settings.confirmation = Duration::ZERO;
    let private = Repository::with("gzip", &["secret"]).only_for(&[ALICE]);
    let registries = Registries::new([("host.example/private", private)]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    registries.counts();
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    assert_eq!(registries.counts(), (1, 1, 0));
    registries.change("host.example/private", |repository| repository.users = vec![BOB]);
    refused(site.acquire(&importer, ALICE, "host.example/private"), FailureKind::Denied);
}

#[test]
fn a_manifest_just_confirmed_needs_no_confirmation_under_another_tag() {
    let site = site();
    let mut repository = Repository::with("gzip", &["base", "top"]);
    repository.push("stable", "gzip", &["base", "top"]);
    let registries = Registries::new([("host.example/app", repository)]);
    let importer = FakeImporter::honest(&registries);
    let latest = site.acquire(&importer, ALICE, "host.example/app:latest").unwrap();
    registries.counts();
    let stable = site.acquire(&importer, ALICE, "host.example/app:stable").unwrap();
    assert_eq!(registries.counts(), (1, 0, 0));
    assert_eq!(stable.manifest, latest.manifest);
}

#[test]
fn knowing_a_digest_is_no_permission() {
    let site = site();
    let private = Repository::with("gzip", &["secret"]).only_for(&[ALICE]);
    // Bob's own registry, whose manifest names the layer that he wants, in both ways.
    let mut thief = Repository::default();
    thief.images.insert("blob".into(), vec![layer("gzip", "secret")]);
    let own_blob =
        spank_pyxis::importer::protocol::LayerDescriptor { diff_id: digest("secret"), ..layer("gzip", "worthless") };
    thief.images.insert("diffid".into(), vec![own_blob.clone()]);
    thief.blobs.insert(own_blob.blob, "worthless".into());
    // And a repository of the same registry, whose manifest names it too, without having the blob.
    let mut neighbour = Repository::default();
    neighbour.images.insert("latest".into(), vec![layer("gzip", "secret")]);
    let registries = Registries::new([
        ("host.example/private", private),
        ("evil.example/x", thief),
        ("host.example/public", neighbour),
    ]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    let record = fs::read(site.store.path().join("blobs/sha256").join(layer("gzip", "secret").blob.hex())).unwrap();
    refused(site.acquire(&importer, BOB, "evil.example/x:blob"), FailureKind::NotFound);
    refused(site.acquire(&importer, BOB, "evil.example/x:diffid"), FailureKind::BadImage);
    registries.counts();
    refused(site.acquire(&importer, BOB, "host.example/public"), FailureKind::NotFound);
    assert_eq!(registries.counts(), (1, 1, 1));
    let unchanged = fs::read(site.store.path().join("blobs/sha256").join(layer("gzip", "secret").blob.hex())).unwrap();
    assert_eq!(record, unchanged);
    site.assert_tidy();
    // What is refused is not remembered.
    assert!(site.store.images().unwrap().iter().all(|image| image.uid == ALICE));
}

/// A mirror of the administrator's answers for itself: what came from the registry it has to deliver once, and then its
/// word counts, for each user as long as it is not taken back.
#[test]
fn a_mirror_confirms_what_it_has_delivered() {
    let mut site = site();
    site.settings.confirmation = Duration::ZERO;
    let private = Repository::with("gzip", &["secret"]).only_for(&[ALICE]);
    let mirrored = Repository::with("gzip", &["secret"]).only_for(&[ALICE, BOB]);
    let registries = Registries::new([("host.example/private", private), ("mirror.example/m/private", mirrored)]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    registries.counts();
    let mirror = Mirror { location: "mirror.example/m".into(), insecure: false, pull_from_mirror: PullFromMirror::All };
    let entry = RegistryEntry { mirrors: vec![mirror], ..RegistryEntry::default() };
    site.settings.registries.registry.insert("host.example".into(), entry);
    site.acquire(&importer, BOB, "host.example/private").unwrap();
    assert_eq!(registries.counts(), (1, 0, 1), "delivered as proof");
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    assert_eq!(registries.counts(), (1, 1, 0), "confirmed");
    // Revoked.
    registries.change("mirror.example/m/private", |repository| repository.users = vec![ALICE]);
    refused(site.acquire(&importer, BOB, "host.example/private"), FailureKind::Denied);
    // One that names a layer without having it gives it to nobody.
    let mut empty = Repository::default();
    empty.images.insert("latest".into(), vec![layer("gzip", "secret")]);
    registries.change("mirror.example/m/private", |repository| *repository = empty);
    refused(site.acquire(&importer, BOB, "host.example/private"), FailureKind::NotFound);
    site.assert_tidy();
}

#[test]
fn a_short_name_is_searched_for() {
    let mut site = site();
    let registries = Registries::new([
        ("one.example/app", Repository::with("gzip", &["app"]).only_for(&[ALICE])),
        ("two.example/app", Repository::with("gzip", &["app"])),
        ("two.example/other", Repository::with("gzip", &["other"])),
    ]);
    let importer = FakeImporter::honest(&registries);
    let names = &mut site.settings.registries.short_names;
    names.search = vec!["one.example".into(), "two.example".into()];
    names.aliases.insert("alias".into(), "two.example/other".into());
    let mut starts = 0;
    site.acquire_with(&importer, BOB, "app", &mut |event| starts += usize::from(event == ImportEvent::NetworkStart))
        .unwrap();
    assert_eq!((registries.counts().0, starts), (2, 1));
    site.acquire(&importer, ALICE, "other").unwrap();
    site.acquire(&importer, ALICE, "alias").unwrap();
    refused(site.acquire(&importer, ALICE, "nowhere"), FailureKind::NotFound);
    let entry = RegistryEntry { blocked: true, ..RegistryEntry::default() };
    site.settings.registries.registry.insert("two.example/other".into(), entry);
    // Also what the store has.
    refused(site.acquire(&importer, ALICE, "alias"), FailureKind::Denied);
}

#[test]
fn a_registry_that_is_down_does_not_change_what_a_name_means() {
    fn down(served: &crate::fake::Served, command: Command, descriptors: Vec<std::os::fd::OwnedFd>) {
        match command {
            Command::Resolve { .. } if served.origin.starts_with("one.") => {
                served.fail(FailureKind::Unavailable, "no answer");
            }
            command => answer(served, command, descriptors),
        }
    }
    let mut site = site();
    let registries = Registries::new([("two.example/app", Repository::with("gzip", &["app"]))]);
    site.settings.registries.short_names.search = vec!["one.example".into(), "two.example".into()];
    let importer = FakeImporter { registries, answer: down };
    refused(site.acquire(&importer, ALICE, "app"), FailureKind::Unavailable);
}

#[test]
fn an_importer_that_lies_for_its_registry_gets_nothing() {
    fn lie(served: &crate::fake::Served, command: Command, mut descriptors: Vec<std::os::fd::OwnedFd>) {
        match command {
            Command::Confirm { layer } => served.report(&Report::Confirmed { layer, allowed: true }),
            Command::Fetch { layer } => {
                crate::fake::deliver(served, layer, b"whatever", descriptors.remove(0));
            }
            command => answer(served, command, descriptors),
        }
    }
    let site = site();
    let private = Repository::with("gzip", &["secret"]).only_for(&[ALICE]);
    let mut thief = Repository::default();
    thief.images.insert("latest".into(), vec![layer("gzip", "secret")]);
    let registries = Registries::new([("host.example/private", private), ("evil.example/x", thief)]);
    site.acquire(&FakeImporter::honest(&registries), ALICE, "host.example/private").unwrap();
    let taken_over = FakeImporter { registries: registries.clone(), answer: lie };
    let error = site.acquire(&taken_over, BOB, "evil.example/x").unwrap_err();
    assert!(matches!(error, ImportError::Mismatch { .. }), "{error}");
    // Nor does it change what others get, if it is first.
    let mut early = Repository::default();
    early.images.insert("latest".into(), vec![layer("gzip", "popular")]);
    registries.change("evil.example/early", |repository| *repository = early);
    registries.change("host.example/popular", |repository| *repository = Repository::with("gzip", &["popular"]));
    site.acquire(&taken_over, BOB, "evil.example/early").unwrap();
    let error = site.acquire(&FakeImporter::honest(&registries), ALICE, "host.example/popular").unwrap_err();
    assert!(error.to_string().contains("pyxis gc --all"), "{error}");
    site.store.collect(Goal::Everything, &NoMounts, false).unwrap();
    let image = site.acquire(&FakeImporter::honest(&registries), ALICE, "host.example/popular").unwrap();
    assert_eq!(contents(&image), [image_of("popular")]);
}

#[test]
fn another_registry_proves_that_it_has_the_layer_once() {
    let site = site();
    let registries = Registries::new([
        ("one.example/app", Repository::with("gzip", &["base", "top"])),
        ("two.example/app", Repository::with("gzip", &["base", "top"])),
        ("two.example/other", Repository::with("gzip", &["base"])),
        ("two.example/recompressed", Repository::with("zstd", &["base"])),
    ]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "one.example/app").unwrap();
    registries.counts();
    let mut events = Vec::new();
    site.acquire_with(&importer, ALICE, "two.example/app", &mut |event| events.push(event)).unwrap();
    assert_eq!(registries.counts(), (1, 0, 2));
    assert!(events.contains(&ImportEvent::Resolved { layers: 2, missing: 2, bytes: 7 }));
    site.acquire(&importer, BOB, "two.example/app").unwrap();
    site.acquire(&importer, BOB, "two.example/other").unwrap();
    assert_eq!(registries.counts(), (2, 3, 0));
    // The same layer as another blob.
    site.acquire(&importer, BOB, "two.example/recompressed").unwrap();
    assert_eq!(registries.counts(), (1, 0, 1));
    assert_eq!(site.layers().len(), 2);
    site.assert_tidy();
}

#[test]
fn many_layers_and_none() {
    let site = site();
    let names: Vec<String> = (0..300).map(|i| format!("layer {i}")).collect();
    let layers: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut repository = Repository::with("gzip", &layers);
    repository.images.insert("empty".into(), vec![]);
    let registries = Registries::new([("host.example/app", repository)]);
    let importer = FakeImporter::honest(&registries);
    let image = site.acquire(&importer, ALICE, "host.example/app").unwrap();
    assert_eq!(image.layers.len(), 300);
    assert_eq!(image.layers[7].diff_id, digest("layer 7"));
    assert_eq!(site.acquire(&importer, BOB, "host.example/app").unwrap().layers.len(), 300);
    assert_eq!(site.acquire(&importer, ALICE, "host.example/app:empty").unwrap().layers.len(), 0);
    site.assert_tidy();
}

#[test]
fn a_layer_is_fetched_once_for_all_who_want_it() {
    let site = site();
    let contents = ["a", "b", "c", "d", "e", "f"];
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &contents))]);
    let importer = FakeImporter::honest(&registries);
    std::thread::scope(|scope| {
        for uid in 0..8 {
            let (site, importer) = (&site, &importer);
            scope.spawn(move || {
                let image = site.acquire(importer, 1000 + uid, "host.example/app").unwrap();
                assert_eq!(self::contents(&image), contents.map(image_of));
            });
        }
    });
    let (starts, _, fetches) = registries.counts();
    assert_eq!((starts, fetches), (8, 6));
    site.assert_tidy();
}

/// Fetches are held back while the gate is closed.
static GATE: Gate = Gate { open: Mutex::new(false), changed: Condvar::new() };

struct Gate {
    open: Mutex<bool>,
    changed: Condvar,
}

impl Gate {
    fn open(&self) {
        *self.open.lock().unwrap() = true;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut open = self.open.lock().unwrap();
        while !*open {
            open = self.changed.wait(open).unwrap();
        }
    }
}

#[test]
fn who_waits_takes_over_when_the_other_fails() {
    fn fail_late(served: &crate::fake::Served, command: Command, descriptors: Vec<std::os::fd::OwnedFd>) {
        if let Command::Fetch { .. } = command {
            GATE.pass();
            return served.fail(FailureKind::Unavailable, "the network is gone");
        }
        answer(served, command, descriptors);
    }
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["layer"]))]);
    let failing = FakeImporter { registries: registries.clone(), answer: fail_late };
    let importer = FakeImporter::honest(&registries);
    std::thread::scope(|scope| {
        let first = scope.spawn(|| site.acquire(&failing, ALICE, "host.example/app"));
        while !site.store.is_locked(&digest("layer")).unwrap() {
            std::thread::yield_now();
        }
        let second = scope.spawn(|| {
            site.acquire_with(&importer, BOB, "host.example/app", &mut |event| {
                if let ImportEvent::Log(text) = event {
                    assert!(text.contains("waiting for another job's import of layer sha256:"), "{text}");
                    GATE.open();
                }
            })
        });
        refused(first.join().unwrap(), FailureKind::Unavailable);
        assert_eq!(contents(&second.join().unwrap().unwrap()), [image_of("layer")]);
    });
    site.assert_tidy();
}

#[test]
fn a_cancelled_import_ends_and_a_message_is_no_cancellation() {
    // Never answers a fetch.
    fn hang(served: &crate::fake::Served, command: Command, descriptors: Vec<std::os::fd::OwnedFd>) {
        match command {
            Command::Fetch { .. } => {
                let _ = served.channel.receive();
            }
            command => answer(served, command, descriptors),
        }
    }
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["layer"]))]);
    let importer = FakeImporter { registries, answer: hang };
    let (leader, broker_end) = UnixStream::pair().unwrap();
    let (life_read, life_write) = rustix::pipe::pipe().unwrap();
    std::io::Write::write_all(&mut &leader, b"Arrived").unwrap();
    let user = User { uid: ALICE, gid: ALICE, groups: vec![] };
    let reference = ImageReference::parse("host.example/app").unwrap();
    let request = AcquireRequest { user: &user, reference: &reference, environment: &Environment::default() };
    let acquire = |cancel: &dyn Fn()| {
        let watched = [broker_end.as_fd(), life_read.as_fd()];
        acquire_through(&importer, &site.store, &site.settings, request, &NoMounts, &watched, &mut |event| {
            if let ImportEvent::Resolved { .. } = event {
                cancel();
            }
        })
    };
    let life = std::cell::Cell::new(Some(life_write));
    let error = acquire(&|| drop(life.take())).unwrap_err();
    assert!(matches!(error, ImportError::Cancelled { .. }), "{error}");
    no_layer_records(&site);
    let (life_read, _life_write) = rustix::pipe::pipe().unwrap();
    let leader = std::cell::Cell::new(Some(leader));
    let watched = [broker_end.as_fd(), life_read.as_fd()];
    let result = acquire_through(&importer, &site.store, &site.settings, request, &NoMounts, &watched, &mut |event| {
        if let ImportEvent::Resolved { .. } = event {
            drop(leader.take());
        }
    });
    assert!(matches!(result, Err(ImportError::Cancelled { .. })));
    no_layer_records(&site);
}

#[test]
fn a_password_in_a_reference_is_not_written_down() {
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["layer"]))]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "bob:hunter2@host.example#app").unwrap();
    let mut directories = vec![site.store.path().to_owned()];
    let mut files = 0;
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            assert!(!path.to_string_lossy().contains("hunter2"));
            if path.is_dir() {
                directories.push(path);
            } else {
                files += 1;
                assert!(!fs::read(&path).unwrap().windows(7).any(|bytes| bytes == b"hunter2"), "{path:?}");
            }
        }
    }
    assert!(files >= 5);
    assert_eq!(site.store.images().unwrap()[0].reference.user.as_deref(), Some("bob"));
}

#[test]
fn a_store_beyond_its_watermark_is_collected_after_an_import() {
    let mut site = site();
    let registries = Registries::new([
        ("host.example/old", Repository::with("gzip", &["old 1", "old 2"])),
        ("host.example/new", Repository::with("gzip", &["new"])),
    ]);
    let importer = FakeImporter::honest(&registries);
    drop(site.acquire(&importer, ALICE, "host.example/old").unwrap());
    let level = Watermark::Bytes(1);
    site.settings.watermarks = Watermarks { high: level, low: level };
    let image = site.acquire(&importer, ALICE, "host.example/new").unwrap();
    assert_eq!(site.layers(), [digest("new").hex()]);
    assert_eq!(contents(&image), [image_of("new")]);
}

/// What the registry is asked for the same image a second time, by policy, while its first answer counts and after that.
#[test]
fn the_policy_says_when_the_registry_is_asked() {
    for (policy, while_it_counts, later, moved) in [
        (PullPolicy::Always, (1, 1, 0), (1, 1, 0), true),
        (PullPolicy::Recent, (0, 0, 0), (1, 1, 0), true),
        (PullPolicy::Missing, (0, 0, 0), (1, 1, 0), false),
    ] {
        let mut site = site();
        site.settings.pull = policy;
        let registries = Registries::new([("host.example/app", Repository::with("gzip", &["old"]))]);
        let importer = FakeImporter::honest(&registries);
        let acquire = |site: &Site| site.acquire(&importer, ALICE, "host.example/app").unwrap();
        let old = acquire(&site).manifest;
        registries.counts();
        assert_eq!(acquire(&site).manifest, old);
        assert_eq!(registries.counts(), while_it_counts, "{policy:?}");
        site.settings.confirmation = Duration::ZERO;
        acquire(&site);
        assert_eq!(registries.counts(), later, "{policy:?}");
        // The tag moves on.
        registries.change("host.example/app", |repository| {
            let before = repository.images["latest"].clone();
            repository.push("latest", "gzip", &["new"]);
            repository.images.insert("before".into(), before);
        });
        assert_eq!(acquire(&site).manifest != old, moved, "{policy:?}");
        site.assert_tidy();
    }
}

/// What all nodes of a step have been told that a tag means counts for more than what this one knows, or would find.
#[test]
fn nodes_use_what_they_were_told() {
    let mut site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["old"]))]);
    let importer = FakeImporter::honest(&registries);
    let acquire = |site: &Site| site.acquire(&importer, ALICE, "host.example/app").unwrap();
    let told = |digest: Digest, age: u64| {
        let name = "host.example/app:latest".to_owned();
        Some(Meaning { asked_at: now() - age, digest, name })
    };
    let old = acquire(&site).manifest;
    registries.change("host.example/app", |repository| {
        let before = repository.images["latest"].clone();
        repository.push("latest", "gzip", &["new"]);
        repository.images.insert("before".into(), before);
    });
    let new = {
        let other = crate::site();
        other.acquire(&importer, BOB, "host.example/app").unwrap().manifest
    };
    registries.counts();
    site.settings.meaning = told(old, 200);
    assert_eq!((acquire(&site).manifest, registries.counts()), (old, (0, 0, 0)));
    site.settings.meaning = told(new, 200);
    assert_eq!((acquire(&site).manifest, registries.counts()), (new, (1, 0, 1)));
    assert_eq!((acquire(&site).manifest, registries.counts()), (new, (0, 0, 0)));
    // It was said 200 seconds ago, and counts no longer than what was asked for then.
    site.settings.meaning = None;
    assert_eq!((acquire(&site).manifest, registries.counts()), (new, (0, 0, 0)));
    site.settings.confirmation = Duration::from_secs(150);
    acquire(&site);
    assert_eq!(registries.counts().0, 1);
    // Another image's is nothing to this one, and so is one where the tag is not to be asked for.
    let elsewhere = told(old, 0).map(|meaning| Meaning { name: "host.example/other:latest".into(), ..meaning });
    site.settings.meaning = elsewhere;
    assert_eq!(acquire(&site).manifest, new);
    (site.settings.meaning, site.settings.pull) = (told(old, 0), PullPolicy::Missing);
    assert_eq!(acquire(&site).manifest, new);
    // A registry that does not have it any more, or a mirror that does not have it yet: what the tag means there.
    (site.settings.meaning, site.settings.pull) = (told(digest("gone"), 0), PullPolicy::Recent);
    assert_eq!(acquire(&site).manifest, new);
    // What a user may have is still the registry's to say.
    registries.change("host.example/app", |repository| repository.users = vec![BOB]);
    (site.settings.meaning, site.settings.confirmation) = (told(old, 0), Duration::ZERO);
    refused(site.acquire(&importer, ALICE, "host.example/app"), FailureKind::Denied);
    site.assert_tidy();
}

#[test]
fn what_is_kept_is_still_asked_for() {
    let mut site = site();
    site.settings.pull = PullPolicy::Missing;
    let private = Repository::with("gzip", &["secret"]).only_for(&[ALICE]);
    let registries = Registries::new([("host.example/private", private)]);
    let importer = FakeImporter::honest(&registries);
    site.acquire(&importer, ALICE, "host.example/private").unwrap();
    site.settings.confirmation = Duration::ZERO;
    registries.change("host.example/private", |repository| repository.users = vec![BOB]);
    refused(site.acquire(&importer, ALICE, "host.example/private"), FailureKind::Denied);
    // A manifest that the registry has no more: then what the tag means now.
    registries.change("host.example/private", |repository| {
        repository.users = vec![];
        repository.push("latest", "gzip", &["other"]);
    });
    let image = site.acquire(&importer, ALICE, "host.example/private").unwrap();
    assert_eq!(contents(&image), [image_of("other")]);
}

#[test]
fn never_is_never() {
    let mut site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["base"]))]);
    let importer = FakeImporter::honest(&registries);
    let acquire = |site: &Site| site.acquire(&importer, ALICE, "host.example/app");
    site.settings.pull = PullPolicy::Never;
    let refused = acquire(&site).unwrap_err();
    assert_eq!(
        refused.to_string(),
        "the registry is not to be asked (--container-pull=never), and host.example/app:latest is not in the store, or \
         no registry has confirmed within 300 s that you may have it: use --container-pull=missing"
    );
    site.settings.pull = PullPolicy::Recent;
    acquire(&site).unwrap();
    site.settings.pull = PullPolicy::Never;
    acquire(&site).unwrap();
    assert_eq!(registries.counts(), (1, 0, 1));
    site.settings.confirmation = Duration::ZERO;
    assert!(matches!(acquire(&site), Err(ImportError::NotAsked { .. })));
    assert_eq!(registries.counts(), (0, 0, 0));
}

/// The benchmark has the same with a thousand steps and a real registry.
#[test]
fn many_steps_at_once_ask_once() {
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["base"]))]);
    let importer = FakeImporter::honest(&registries);
    std::thread::scope(|scope| {
        for _ in 0..20 {
            scope.spawn(|| site.acquire(&importer, ALICE, "host.example/app").unwrap());
        }
    });
    assert_eq!(registries.counts(), (1, 0, 1));
    site.assert_tidy();
}

/// Another step's import may take long: a node for which others wait does not.
#[test]
fn who_asks_for_others_is_not_kept_from_it() {
    let mut site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["base"]))]);
    let importer = FakeImporter::honest(&registries);
    let reference = ImageReference::parse("host.example/app").unwrap();
    let holder = Store::open(site.store.path()).unwrap();
    let lock = holder.try_lock(&holder.reference_lock(ALICE, &reference).unwrap()).unwrap().unwrap();
    site.settings.for_others = true;
    let mut meant = Vec::new();
    let image = site.acquire_with(&importer, ALICE, "host.example/app", &mut |event| {
        if let ImportEvent::Meant(meaning) = event {
            meant.push(meaning);
        }
    });
    let manifest = image.unwrap().manifest;
    assert_eq!(meant.len(), 1);
    assert_eq!((meant[0].digest, meant[0].name.as_str()), (manifest, "host.example/app:latest"));
    drop(lock);
    // What is known is told as well.
    meant.clear();
    site.acquire_with(&importer, ALICE, "host.example/app", &mut |event| {
        if let ImportEvent::Meant(meaning) = event {
            meant.push(meaning);
        }
    })
    .unwrap();
    assert_eq!((meant.len(), meant[0].digest), (1, manifest));
    assert_eq!(registries.counts().0, 1);
}
