//! Several processes at one store, and processes that are killed. They are this test program again, in the `role` below.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use spank_pyxis::importer::protocol::LayerDescriptor;
use spank_pyxis::store::{Goal, Store, StoreError};
use tempfile::TempDir;

use crate::fake::{FakeImporter, Registries, Repository, digest, image_of};
use crate::{NoMounts, Site, settings, site};

const ROLE: &str = "PYXIS_STORE_TEST_ROLE";
const STORE: &str = "PYXIS_STORE_TEST_STORE";
const ROUNDS: usize = 25;

/// Not a test: what the processes that the tests start do.
#[test]
fn role() {
    let (Ok(role), Some(store)) = (std::env::var(ROLE), std::env::var_os(STORE)) else { return };
    let store = Store::open(Path::new(&store)).unwrap();
    match role.split_once(' ').unwrap_or((&role, "")) {
        ("publish", seed) => publish_for_ever(&store, seed),
        ("import", seed) => import(store, seed.parse().unwrap()),
        ("collect", _) => collect_until_told(&store),
        ("lease", _) => lease_until_told(&store),
        (other, _) => panic!("{other}"),
    }
}

fn start(role: &str, store: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["processes::role", "--exact", "--nocapture"])
        .env(ROLE, role)
        .env(STORE, store)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits for a line of a process's output.
fn wait_for(child: &mut Child, text: &str) {
    let mut seen = String::new();
    let mut byte = [0];
    let output = child.stdout.as_mut().unwrap();
    while !seen.ends_with(text) {
        assert_eq!(output.read(&mut byte).unwrap(), 1, "it ended after {seen:?}");
        seen.push(byte[0].into());
    }
}

/// Blocks until the parent closes the standard input.
fn wait_for_parent() {
    let _ = std::io::stdin().read(&mut [0]);
}

fn content(name: &str) -> Vec<u8> {
    name.repeat(40_000 / name.len()).into_bytes()
}

/// Layers named by the digest of their own image, so that everybody can see whether they are whole.
fn publish_for_ever(store: &Store, seed: &str) {
    for i in 0.. {
        let image = content(&format!("{seed}-{i}"));
        let layer = LayerDescriptor { blob: digest(format!("blob {seed} {i}")), diff_id: digest(&image), size: 1 };
        let lock = store.try_lock(&layer.diff_id).unwrap().unwrap();
        let new = store.new_layer().unwrap();
        let mut file = fs::File::from(new.as_fd().try_clone_to_owned().unwrap());
        for piece in image.chunks(4096) {
            file.write_all(piece).unwrap();
        }
        drop(file);
        let sealed = new.seal(&layer.diff_id, image.len() as u64).unwrap();
        store.note_blob(&layer, "host.example/x").unwrap();
        sealed.publish().unwrap();
        drop(lock);
        println!("published");
    }
}

#[test]
fn a_killed_publisher_leaves_nothing_that_looks_whole() {
    let site = site();
    let layers = site.store.path().join("layers/sha256");
    let mut checked = 0;
    for i in 0..40 {
        let mut child = start(&format!("publish {i}"), site.store.path());
        wait_for(&mut child, "published\n");
        // Another point of the cycle each time.
        let deadline = Instant::now() + Duration::from_micros(i * 397);
        while Instant::now() < deadline {
            std::hint::spin_loop();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        for name in crate::names(&layers) {
            let image = fs::read(layers.join(&name)).unwrap();
            assert_eq!(digest(&image).hex(), name);
            checked += 1;
        }
        for name in crate::names(&site.store.path().join("blobs/sha256")) {
            if !name.starts_with(".tmp-") {
                let record = fs::read(site.store.path().join("blobs/sha256").join(name)).unwrap();
                serde_json::from_slice::<spank_pyxis::store::BlobRecord>(&record).unwrap();
            }
        }
    }
    assert!(checked > 40);
    let kept = site.layers().len();
    site.store.collect(Goal::Available(0), &NoMounts, false).unwrap();
    assert_eq!(site.layers().len(), kept);
    site.assert_tidy();
}

fn registries() -> Registries {
    Registries::new([
        ("host.example/a", Repository::with("gzip", &["base", "a 1", "a 2"])),
        ("host.example/b", Repository::with("gzip", &["base", "b 1"])),
        ("other.example/c", Repository::with("zstd", &["base", "a 1", "c 1"])),
    ])
}

/// Imports images again and again, and looks at every layer while it holds the lease.
fn import(store: Store, seed: usize) {
    let mut settings = settings();
    let importer = FakeImporter::honest(&registries());
    for i in 0..ROUNDS {
        settings.confirmation = if (seed + i).is_multiple_of(2) { Duration::ZERO } else { Duration::from_secs(300) };
        let site = Site { directory: TempDir::new().unwrap(), store: reopened(&store), settings: settings.clone() };
        let name = ["host.example/a", "host.example/b", "other.example/c"][(seed + i) % 3];
        let image = site.acquire(&importer, 1000 + (seed % 3) as u32, name).unwrap();
        std::thread::yield_now();
        let expected = registries().repositories.lock().unwrap()[name].clone();
        for (layer, descriptor) in image.layers.iter().zip(&expected.images["latest"]) {
            let mut bytes = Vec::new();
            (&layer.file).read_to_end(&mut bytes).unwrap();
            assert_eq!(bytes, image_of(&expected.blobs[&descriptor.blob]));
            assert_eq!(layer.file.metadata().unwrap().nlink(), 1, "collected while leased");
        }
    }
}

fn reopened(store: &Store) -> Store {
    Store::open(store.path()).unwrap()
}

fn collect_until_told(store: &Store) {
    let stop = std::thread::spawn(wait_for_parent);
    let mut removed = 0;
    while !stop.is_finished() {
        match store.collect(Goal::Everything, &NoMounts, false) {
            Ok(report) => removed += report.removed.len(),
            Err(StoreError::Collecting { .. }) => {}
            Err(error) => panic!("{error}"),
        }
    }
    println!("removed {removed}");
}

#[test]
fn importers_and_collectors_at_once() {
    let site = site();
    let importers: Vec<_> = (0..6).map(|seed| start(&format!("import {seed}"), site.store.path())).collect();
    let mut collectors: Vec<_> = (0..2).map(|_| start("collect", site.store.path())).collect();
    for importer in importers {
        let output = importer.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    for collector in &mut collectors {
        drop(collector.stdin.take());
    }
    for collector in collectors {
        let output = collector.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
    site.store.collect(Goal::Everything, &NoMounts, false).unwrap();
    assert!(site.layers().is_empty());
    site.assert_tidy();
}

fn lease_until_told(store: &Store) {
    let _lease = store.lease(&digest("layer")).unwrap().unwrap();
    println!("leased");
    wait_for_parent();
}

#[test]
fn the_lease_of_another_process_counts_until_it_dies() {
    let site = site();
    let registries = Registries::new([("host.example/app", Repository::with("gzip", &["layer"]))]);
    drop(site.acquire(&FakeImporter::honest(&registries), 1001, "host.example/app").unwrap());
    let mut child = start("lease", site.store.path());
    wait_for(&mut child, "leased\n");
    let report = site.store.collect(Goal::Everything, &NoMounts, false).unwrap();
    assert_eq!((report.removed.len(), report.in_use_layers), (0, 1));
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(site.store.collect(Goal::Everything, &NoMounts, false).unwrap().removed.len(), 1);
}

#[test]
fn the_lock_of_a_killed_fetcher_is_free() {
    let site = site();
    let mut child = start("publish x", site.store.path());
    wait_for(&mut child, "published\n");
    child.kill().unwrap();
    child.wait().unwrap();
    let left: Vec<PathBuf> =
        fs::read_dir(site.store.path().join("locks")).unwrap().map(|e| e.unwrap().path()).collect();
    for lock in left {
        let layer = format!("sha256:{}", lock.file_name().unwrap().to_str().unwrap()).parse().unwrap();
        assert!(!site.store.is_locked(&layer).unwrap());
        assert!(site.store.try_lock(&layer).unwrap().is_some());
    }
    site.assert_tidy_after_collection();
}
