//! Stores on small and on read-only disks: loop-mounted ext4, made by each test.

use std::path::{Path, PathBuf};
use std::process::Command;

use spank_pyxis::broker::import::{ImportError, ImportEvent};
use spank_pyxis::importer::protocol::{Command as ToImporter, FailureKind};
use spank_pyxis::store::Store;
use tempfile::TempDir;

use crate::fake::{FakeImporter, Registries, Repository, answer, deliver, digest, image_of};
use crate::{Site, settings};

const UID: u32 = 1001;

/// An ext4 of its own. Unmounted when dropped.
struct Disk {
    mount_point: PathBuf,
}

fn run(command: &mut Command) {
    let output =
        command.output().unwrap_or_else(|error| panic!("{command:?}: {error} (apt-get install e2fsprogs mount)"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

impl Disk {
    fn new(directory: &Path, mebibytes: u64) -> Self {
        let image = directory.join("disk");
        let mount_point = directory.join("mnt");
        std::fs::File::create(&image).unwrap().set_len(mebibytes << 20).unwrap();
        std::fs::create_dir(&mount_point).unwrap();
        run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount_point));
        Self { mount_point }
    }

    fn remount(&self, option: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,{option}")]).arg(&self.mount_point));
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.mount_point).status();
    }
}

fn site(mebibytes: u64) -> (Site, Disk) {
    let directory = TempDir::new().unwrap();
    let disk = Disk::new(directory.path(), mebibytes);
    let store = Store::open(&disk.mount_point).unwrap();
    (Site { directory, store, settings: settings() }, disk)
}

/// Every layer image has 6 MiB, whatever its blob's size claims.
fn large_layers(served: &crate::fake::Served, command: ToImporter, mut descriptors: Vec<std::os::fd::OwnedFd>) {
    match command {
        ToImporter::Fetch { layer } => {
            let image = image_of(&served.blob(layer).unwrap()).into_iter().cycle().take(6 << 20).collect::<Vec<_>>();
            deliver(served, layer, &image, descriptors.remove(0));
        }
        command => answer(served, command, descriptors),
    }
}

fn registries() -> Registries {
    Registries::new([
        ("host.example/one", Repository::with("gzip", &["one"])),
        ("host.example/two", Repository::with("gzip", &["two"])),
        ("host.example/three", Repository::with("gzip", &["three 1", "three 2", "three 3"])),
    ])
}

/// Makes the blobs of `name` claim `mebibytes` each.
fn claim(registries: &Registries, name: &str, mebibytes: u64) {
    registries.change(name, |repository| {
        for layer in repository.images.values_mut().flatten() {
            layer.size = mebibytes << 20;
        }
    });
}

#[test]
fn a_disk_that_fills_up_during_an_import_is_as_before() {
    let (site, _disk) = site(20);
    let before = site.store.available().unwrap();
    let importer = FakeImporter { registries: registries(), answer: large_layers };
    let error = site.acquire(&importer, UID, "host.example/three").unwrap_err();
    match error {
        ImportError::Refused { kind: FailureKind::Local, message } => {
            assert!(message.contains("No space left on device"), "{message}");
        }
        other => panic!("{other}"),
    }
    site.assert_tidy();
    // What was complete before may stay.
    assert!(site.layers().len() < 3);
    site.store.collect(spank_pyxis::store::Goal::Everything, &crate::NoMounts, false).unwrap();
    // The file system gives the space back when the last descriptor is closed, by an importer in a thread here.
    while site.store.available().unwrap() + (1 << 20) < before {
        std::thread::yield_now();
    }
    site.acquire(&importer, UID, "host.example/one").unwrap();
}

#[test]
fn what_does_not_fit_is_not_begun() {
    let (site, _disk) = site(20);
    let registries = registries();
    claim(&registries, "host.example/three", 3);
    let importer = FakeImporter { registries: registries.clone(), answer: large_layers };
    let error = site.acquire(&importer, UID, "host.example/three").unwrap_err().to_string();
    assert!(error.starts_with("no space to import host.example/three:latest: about 27.0 MiB needed, "), "{error}");
    assert!(error.contains("MiB available in /") && error.contains("store.path"), "{error}");
    assert_eq!(registries.counts().2, 0);
    assert!(site.layers().is_empty());
    site.assert_tidy();
}

#[test]
fn unused_layers_make_room() {
    let (site, _disk) = site(20);
    let registries = registries();
    let importer = FakeImporter { registries: registries.clone(), answer: large_layers };
    let used = site.acquire(&importer, UID, "host.example/one").unwrap();
    drop(site.acquire(&importer, UID, "host.example/two").unwrap());
    registries.change("host.example/next", |repository| *repository = Repository::with("gzip", &["next"]));
    claim(&registries, "host.example/next", 2);
    let mut events = Vec::new();
    site.acquire_with(&importer, UID, "host.example/next", &mut |event| events.push(event)).unwrap();
    let mut expected = [digest("one").hex(), digest("next").hex()];
    expected.sort();
    assert_eq!(site.layers(), expected);
    let log = "removed 1 unused layer (6.0 MiB) to make room for host.example/next:latest";
    assert!(events.contains(&ImportEvent::Log(log.into())), "{events:?}");
    drop(used);
}

#[test]
fn a_read_only_store_serves_what_it_has() {
    let (site, disk) = site(20);
    let importer = FakeImporter::honest(&registries());
    drop(site.acquire(&importer, UID, "host.example/one").unwrap());
    disk.remount("ro");
    let store = Store::open(site.store.path()).unwrap();
    let image = site.acquire(&importer, UID, "host.example/one").unwrap();
    assert!(!image.from_network);
    assert!(store.lease(&digest("one")).unwrap().is_some());
    let error = site.acquire(&importer, UID, "host.example/two").unwrap_err().to_string();
    assert!(error.contains("Read-only file system; the store must be writable to import images"), "{error}");
    let collected = store.collect(spank_pyxis::store::Goal::Everything, &crate::NoMounts, false).unwrap_err();
    assert!(collected.to_string().contains("Read-only file system"), "{collected}");
    disk.remount("rw");
    site.acquire(&importer, UID, "host.example/two").unwrap();
    // Nothing there yet.
    disk.remount("ro");
    let error = Store::open(&disk.mount_point.join("new/store")).unwrap_err().to_string();
    assert!(error.contains("cannot create") && error.contains("Read-only file system"), "{error}");
    drop(site);
}
