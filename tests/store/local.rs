//! Images that users have on the node, by the real processes: what is remembered of them, and for whom.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use spank_pyxis::broker::import::{AcquiredImage, ImportError, LocalRequest, acquire_local, open_local};
use spank_pyxis::request::{Environment, LocalImage, User};
use spank_pyxis::store::{FileIdentity, Goal};
use testbed::{images, process, wait};

use crate::real::{Person, World};
use crate::{NoMounts, names};

/// An image in a file of `person`'s, only for him.
struct Image {
    path: PathBuf,
    name: Option<&'static str>,
}

impl Image {
    fn of(path: &Path) -> Self {
        Self { path: path.to_owned(), name: None }
    }

    fn acquire(&self, world: &World, person: &Person) -> Result<AcquiredImage, ImportError> {
        let user = User { uid: person.user.uid, gid: person.user.gid, groups: vec![] };
        let image = LocalImage::Path { path: self.path.clone(), form: None, name: self.name.map(str::to_owned) };
        let environment = Environment::default();
        let request =
            LocalRequest { user: &user, image: &image, typed: "./image", cwd: &person.home, environment: &environment };
        let opened = open_local(&world.settings, request, &[], &mut |_| {})?;
        acquire_local(&world.store, &world.settings, request, opened, &NoMounts, &[], &mut |_| {})
    }
}

/// The small image as an OCI layout.
fn layout(person: &Person) -> PathBuf {
    let path = person.home.join("layout");
    images::busybox(&path).unwrap();
    fs::remove_dir_all(path.join("tree")).unwrap();
    own(person, &path);
    path
}

fn own(person: &Person, path: &Path) {
    let owner = format!("{}:{}", person.user.uid, person.user.gid);
    process::output_of(Command::new("chown").args(["--recursive", "--no-dereference", &owner]).arg(path)).unwrap();
    process::output_of(Command::new("chmod").args(["--recursive", "go="]).arg(path)).unwrap();
}

fn archive(person: &Person, layout: &Path, name: &str) -> PathBuf {
    let path = person.home.join(name);
    let (from, to) = (format!("oci:{}:latest", layout.display()), format!("docker-archive:{}:x:1", path.display()));
    process::output_of(Command::new("skopeo").args(["copy", "--quiet", "--insecure-policy", &from, &to])).unwrap();
    own(person, &path);
    path
}

/// Waits until a change of the file could not go unnoticed.
fn settle(path: &Path) {
    let identity = || FileIdentity::of(&rustix::fs::stat(path).unwrap());
    wait::until("the file to be old enough", wait::DEADLINE, identity).unwrap();
}

fn layers(image: &AcquiredImage) -> Vec<String> {
    image.layers.iter().map(|layer| layer.diff_id.to_string()).collect()
}

#[test]
fn what_has_not_changed_is_not_read_again() {
    let world = World::new("store-local");
    let person = world.person(1);
    let layout = layout(&person);
    let archive = archive(&person, &layout, "image.tar");
    for (path, changed) in [(&archive, &archive), (&layout, &layout.join("index.json"))] {
        let image = Image::of(path);
        settle(changed);
        let first = image.acquire(&world, &person).unwrap();
        assert!(first.from_network);
        for _ in 0..2 {
            let again = image.acquire(&world, &person).unwrap();
            assert!(!again.from_network);
            assert_eq!(
                (layers(&again), &again.config, again.manifest),
                (layers(&first), &first.config, first.manifest)
            );
        }
        // The same bytes, written anew: nobody can tell without reading them.
        let bytes = fs::read(changed).unwrap();
        fs::write(changed, bytes).unwrap();
        assert!(image.acquire(&world, &person).unwrap().from_network);
        settle(changed);
        let _ = image.acquire(&world, &person).unwrap();
        assert!(!image.acquire(&world, &person).unwrap().from_network);
    }
}

/// As promise 4 of the store has it: layers that are there are no news to whoever knows their names.
#[test]
fn everybody_has_to_show_the_bytes() {
    let world = World::new("store-local-bytes");
    let (alice, bob) = (world.person(1), world.person(2));
    let original = layout(&alice);
    settle(&original.join("index.json"));
    let first = Image::of(&original).acquire(&world, &alice).unwrap();
    let records = world.store.path().join("confirmed").join(alice.user.uid.to_string()).join("local");
    assert_eq!(names(&records).len(), 1);
    // Not a registry's word.
    assert!(names(&world.store.path().join("blobs/sha256")).is_empty());

    // Bob may not open Alice's, and knows everything but the bytes of the layer.
    let error = Image::of(&original).acquire(&world, &bob).unwrap_err().to_string();
    assert!(error.contains("Permission denied"), "{error}");
    let copy = bob.home.join("layout");
    process::output_of(Command::new("cp").arg("--recursive").args([&original, &copy])).unwrap();
    let blobs = fs::read_dir(copy.join("blobs/sha256")).unwrap().map(|blob| blob.unwrap().path());
    let layer = blobs.max_by_key(|blob| fs::metadata(blob).unwrap().len()).unwrap();
    let bytes = fs::read(&layer).unwrap();
    fs::remove_file(&layer).unwrap();
    own(&bob, &copy);
    let error = Image::of(&copy).acquire(&world, &bob).unwrap_err().to_string();
    assert!(error.contains("No such file or directory"), "{error}");
    fs::write(&layer, vec![0; bytes.len()]).unwrap();
    own(&bob, &copy);
    let error = Image::of(&copy).acquire(&world, &bob).unwrap_err().to_string();
    assert!(error.contains("its blob has the digest"), "{error}");

    fs::write(&layer, bytes).unwrap();
    own(&bob, &copy);
    let second = Image::of(&copy).acquire(&world, &bob).unwrap();
    assert!(second.from_network);
    assert_eq!(layers(&second), layers(&first));
}

#[test]
fn a_collection_forgets_what_is_gone() {
    let world = World::new("store-local-collect");
    let person = world.person(1);
    let archive = archive(&person, &layout(&person), "image.tar");
    let image = Image::of(&archive);
    settle(&archive);
    let acquired = image.acquire(&world, &person).unwrap();
    let records = world.store.path().join("confirmed").join(person.user.uid.to_string()).join("local");
    world.store.collect(Goal::Everything, &NoMounts, false).unwrap();
    // Leased all the time.
    assert_eq!(names(&records).len(), 1);
    assert!(!image.acquire(&world, &person).unwrap().from_network);
    drop(acquired);
    world.store.collect(Goal::Everything, &NoMounts, false).unwrap();
    assert!(names(&records).is_empty());
    assert!(image.acquire(&world, &person).unwrap().from_network);
}

#[test]
fn a_compressed_archive_leaves_nothing_but_layers() {
    let world = World::new("store-local-spool");
    let person = world.person(1);
    let archive = archive(&person, &layout(&person), "image.tar");
    process::output_of(Command::new("gzip").arg(&archive)).unwrap();
    let compressed = archive.with_extension("tar.gz");
    own(&person, &compressed);
    let image = Image { name: Some("x:1"), ..Image::of(&compressed) };
    assert_eq!(image.acquire(&world, &person).unwrap().layers.len(), 1);
    assert_eq!(names(&world.store.path().join("layers/sha256")).len(), 1);
    // Cut off in the middle.
    let file = File::options().write(true).open(&compressed).unwrap();
    file.set_len(file.metadata().unwrap().len() / 2).unwrap();
    let error = Image::of(&compressed).acquire(&world, &person).unwrap_err().to_string();
    assert!(error.starts_with("./image: cannot read it: ") && !error.contains('\n'), "{error}");
    assert_eq!(names(&world.store.path().join("layers/sha256")).len(), 1);
}

#[test]
fn who_cancels_does_not_wait() {
    let world = World::new("store-local-cancel");
    let person = world.person(1);
    let (leader, end) = rustix::pipe::pipe().unwrap();
    drop(end);
    let user = User { uid: person.user.uid, gid: person.user.gid, groups: vec![] };
    let image = LocalImage::Path { path: "image".into(), form: None, name: None };
    let environment = Environment::default();
    let request =
        LocalRequest { user: &user, image: &image, typed: "./image", cwd: &person.home, environment: &environment };
    let result = open_local(&world.settings, request, &[leader.as_fd()], &mut |_| {});
    assert!(matches!(result, Err(ImportError::Cancelled { .. })), "{result:?}");
}
