//! The real importer and credentials reader, with Debian's registry.

use std::cell::RefCell;
use std::fs;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use spank_pyxis::broker::import::{AcquireRequest, AcquiredImage, ImportError, ImportEvent, ImportSettings, acquire};
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::importer::protocol::FailureKind;
use spank_pyxis::registry::config::RegistryEntry;
use spank_pyxis::request::{Environment, User};
use spank_pyxis::store::Store;
use testbed::registry::{Account, Registry, RegistryOptions};
use testbed::users::{SERVICE_USER, TestUser};
use testbed::{images, wait};

use crate::NoMounts;

/// A store, and registries that are allowed plain HTTP.
pub struct World {
    pub site: testbed::Site,
    pub store: Store,
    pub settings: ImportSettings,
}

/// A user with a home directory of his own for credentials.
pub struct Person {
    pub user: TestUser,
    pub home: PathBuf,
}

impl World {
    pub fn new(name: &str) -> Self {
        testbed::prerequisites::check().unwrap();
        testbed::users::ensure_service_user().unwrap();
        let site = testbed::Site::create(name).unwrap();
        let store = Store::open(&site.path("store")).unwrap();
        let executable = env!("CARGO_BIN_EXE_pyxis").into();
        Self { site, store, settings: ImportSettings { executable, ..crate::settings() } }
    }

    fn registry(&mut self, name: &str, accounts: &[(&str, &str)]) -> Registry {
        let account = |(user, password): &(&str, &str)| Account { user: (*user).into(), password: (*password).into() };
        let options =
            RegistryOptions { accounts: accounts.iter().map(account).collect(), ..RegistryOptions::default() };
        let registry = Registry::start(&self.site, name, options).unwrap();
        let entry = RegistryEntry { insecure: true, ..RegistryEntry::default() };
        self.settings.registries.registry.insert(registry.host(), entry);
        registry
    }

    pub fn person(&self, number: usize) -> Person {
        let user = TestUser::get(number).unwrap();
        let home = self.site.make_directory(&format!("home-{number}")).unwrap();
        user.own(&home).unwrap();
        Person { user, home }
    }

    /// Puts a password into the person's file, which only he may read.
    fn log_in(&self, person: &Person, registry: &Registry, user: &str, password: &str) {
        let directory = person.home.join(".config/enroot");
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join(".credentials");
        let host = registry.host();
        let host = host.split(':').next().unwrap();
        fs::write(&file, format!("machine {host} login {user} password {password}\n")).unwrap();
        person.user.own(&file).unwrap();
        fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    }

    fn acquire(&self, person: &Person, image: &str) -> Result<AcquiredImage, ImportError> {
        self.acquire_with(person, image, &mut |_| {})
    }

    fn acquire_with(
        &self,
        person: &Person,
        image: &str,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<AcquiredImage, ImportError> {
        let user = User { uid: person.user.uid, gid: person.user.gid, groups: vec![] };
        let reference = ImageReference::parse(image).unwrap();
        let mut environment = Environment::default();
        environment.set("HOME", person.home.to_str().unwrap());
        environment.set("SECRET", "not for the importer");
        environment.set("LD_PRELOAD", "/nonexistent/evil.so");
        let request = AcquireRequest { user: &user, reference: &reference, environment: &environment };
        acquire(&self.store, &self.settings, request, &NoMounts, &[], events)
    }
}

fn denied(result: Result<AcquiredImage, ImportError>) -> String {
    match result {
        Err(ImportError::Refused { kind: FailureKind::Denied, message }) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_private_layer_is_for_those_whom_the_registry_lets_in() {
    let mut world = World::new("store-private");
    let registry = world.registry("private", &[("alice", "correct"), ("carol", "other")]);
    registry.push(&images::distroless(&world.site.path("layout")).unwrap(), "secret:latest").unwrap();
    let image = format!("{}/secret", registry.host());
    let (alice, bob) = (world.person(1), world.person(2));
    world.log_in(&alice, &registry, "alice", "correct");

    let first = world.acquire(&alice, &image).unwrap();
    assert!(first.from_network && !first.layers.is_empty());
    assert!(!world.acquire(&alice, &image).unwrap().from_network);

    // The layers are there, and Bob knows the name.
    assert!(denied(world.acquire(&bob, &image)).contains("credentials"));
    world.log_in(&bob, &registry, "alice", "guessed");
    denied(world.acquire(&bob, &image));
    world.log_in(&bob, &registry, "carol", "other");
    let second = world.acquire(&bob, &image).unwrap();
    assert!(second.from_network);
    assert_eq!(second.manifest, first.manifest);
    // Confirmed, not downloaded: one GET of each blob.
    let log = registry.log(&world.site);
    let downloads = |digest: &str| {
        log.lines().filter(|line| line.contains("\"GET /v2/secret/blobs/") && line.contains(digest)).count()
    };
    let manifest = world.store.manifest(alice.user.uid, &first.manifest).unwrap().unwrap();
    for layer in &manifest.layers {
        assert_eq!(downloads(&layer.blob.to_string()), 1);
    }

    // Carol's account is closed: what Bob was given counts as long as configured, not longer.
    let passwords = world.site.path("etc/registry-private.htpasswd");
    let text = fs::read_to_string(&passwords).unwrap();
    let kept: String = text.lines().filter(|line| line.starts_with("alice:")).map(|line| format!("{line}\n")).collect();
    fs::write(&passwords, kept).unwrap();
    assert!(!world.acquire(&bob, &image).unwrap().from_network);
    world.settings.confirmation = std::time::Duration::ZERO;
    denied(world.acquire(&bob, &image));
    world.acquire(&alice, &image).unwrap();
}

#[test]
fn a_registry_that_names_anothers_layers_has_to_deliver_them() {
    let mut world = World::new("store-thief");
    let private = world.registry("owner", &[("alice", "correct")]);
    let thief = world.registry("thief", &[]);
    let image = images::distroless(&world.site.path("layout")).unwrap();
    private.push(&image, "secret:latest").unwrap();
    thief.push(&image, "copy:latest").unwrap();
    let (alice, bob) = (world.person(1), world.person(2));
    world.log_in(&alice, &private, "alice", "correct");
    let given = world.acquire(&alice, &format!("{}/secret", private.host())).unwrap();
    let layers = world.store.manifest(alice.user.uid, &given.manifest).unwrap().unwrap().layers;

    // A manifest and a config, but no layers.
    let moved: Vec<_> = layers
        .iter()
        .map(|layer| {
            let hex = layer.blob.hex();
            let data = thief.storage().join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
            let aside = world.site.path(&hex);
            fs::rename(&data, &aside).unwrap();
            (aside, data)
        })
        .collect();
    let error = world.acquire(&bob, &format!("{}/copy", thief.host())).unwrap_err();
    assert!(matches!(error, ImportError::Refused { .. }), "{error}");
    assert!(world.store.images().unwrap().iter().all(|image| image.uid == alice.user.uid));

    // With the layers it is as good as the other: the same bytes come out.
    for (aside, data) in moved {
        fs::rename(aside, data).unwrap();
    }
    let copy = world.acquire(&bob, &format!("{}/copy", thief.host())).unwrap();
    assert_eq!(copy.manifest, given.manifest);
    assert_eq!(crate::names(&world.store.path().join("layers/sha256")).len(), layers.len());
}

/// The fields of `/proc/PID/status`.
fn status(pid: u32, field: &str) -> String {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("{field}:"))).unwrap();
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[test]
fn the_importer_has_no_rights() {
    let mut world = World::new("store-identity");
    let registry = world.registry("open", &[]);
    registry.push(&images::distroless(&world.site.path("layout")).unwrap(), "app:latest").unwrap();
    world.settings.importer_environment = vec![("no_proxy".into(), "localhost".into())];
    let service = nix::unistd::User::from_name(SERVICE_USER).unwrap().unwrap();
    let (uid, gid) = (service.uid.to_string(), service.gid.to_string());
    let pids = RefCell::new(Vec::new());
    let mut looked = false;
    world
        .acquire_with(&world.person(1), &format!("{}/app", registry.host()), &mut |event| match event {
            ImportEvent::Process { pid } => pids.borrow_mut().push(pid),
            ImportEvent::Resolved { .. } => {
                let importer = pids.borrow()[1];
                assert_eq!(status(importer, "Uid"), [uid.as_str(); 4].join(" "));
                assert_eq!(status(importer, "Gid"), [gid.as_str(); 4].join(" "));
                assert_eq!(status(importer, "Groups"), "");
                for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
                    assert_eq!(u64::from_str_radix(&status(importer, set), 16), Ok(0), "{set}");
                }
                assert_eq!(status(importer, "NoNewPrivs"), "1");
                assert_eq!(status(importer, "Seccomp"), "2");
                let environment = fs::read(format!("/proc/{importer}/environ")).unwrap();
                let environment: Vec<_> = environment.split(|byte| *byte == 0).filter(|v| !v.is_empty()).collect();
                let names: Vec<_> = environment.iter().map(|v| String::from_utf8_lossy(v)).collect();
                assert_eq!(names, ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "no_proxy=localhost"]);
                for descriptor in fs::read_dir(format!("/proc/{importer}/fd")).unwrap() {
                    let target = fs::read_link(descriptor.unwrap().path());
                    let target = target.map(|path| path.display().to_string()).unwrap_or_default();
                    let path = target.strip_prefix('/').filter(|path| !path.starts_with("dev/null"));
                    assert!(path.is_none_or(|path| path.starts_with("memfd:")), "{target}");
                }
                looked = true;
            }
            _ => {}
        })
        .unwrap();
    assert!(looked);
    // Both have gone with the import.
    for pid in pids.into_inner() {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
}

#[test]
fn an_importer_that_is_killed_or_cancelled_leaves_nothing() {
    let mut world = World::new("store-killed");
    let registry = world.registry("open", &[]);
    registry.push(&images::distroless(&world.site.path("layout")).unwrap(), "app:latest").unwrap();
    let (person, image) = (world.person(1), format!("{}/app", registry.host()));
    let pids = RefCell::new(Vec::new());
    let error = world
        .acquire_with(&person, &image, &mut |event| match event {
            ImportEvent::Process { pid } => pids.borrow_mut().push(pid),
            ImportEvent::Resolved { .. } => {
                kill(Pid::from_raw(pids.borrow()[1].try_into().unwrap()), Signal::SIGKILL).unwrap();
            }
            _ => {}
        })
        .unwrap_err()
        .to_string();
    assert!(
        error.ends_with("the importer was killed (signal 9): out of memory? See dmesg and the job's memory limit"),
        "{error}"
    );

    let (life, write) = rustix::pipe::pipe().unwrap();
    let write = RefCell::new(Some(write));
    let user = User { uid: person.user.uid, gid: person.user.gid, groups: vec![] };
    let reference = ImageReference::parse(&image).unwrap();
    let request = AcquireRequest { user: &user, reference: &reference, environment: &Environment::default() };
    pids.borrow_mut().clear();
    let mut events = |event| {
        if let ImportEvent::Process { pid } = event {
            pids.borrow_mut().push(pid);
            drop(write.take());
        }
    };
    let result = acquire(&world.store, &world.settings, request, &NoMounts, &[life.as_fd()], &mut events);
    assert!(matches!(result, Err(ImportError::Cancelled { .. })), "{result:?}");
    for pid in pids.into_inner() {
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }
    assert!(crate::names(&world.store.path().join("layers/sha256")).is_empty());
    assert!(crate::names(&world.store.path().join("locks")).is_empty());
    world.acquire(&person, &image).unwrap();
}

#[test]
fn the_roles_end_with_the_broker() {
    let mut world = World::new("store-orphans");
    let registry = world.registry("open", &[]);
    registry.push(&images::distroless(&world.site.path("layout")).unwrap(), "app:latest").unwrap();
    // The broker is a thread of this test that ends while the importer waits for work.
    let pids = std::sync::Mutex::new(Vec::new());
    let starter = spank_pyxis::broker::import::Processes;
    let user = User { uid: 1001, gid: 1001, groups: vec![] };
    let reference = ImageReference::parse(&format!("{}/app", registry.host())).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let request = AcquireRequest { user: &user, reference: &reference, environment: &Environment::default() };
            let mut events = |event| {
                if let ImportEvent::Process { pid } = event {
                    pids.lock().unwrap().push(pid);
                }
            };
            let importer =
                spank_pyxis::broker::import::StartImporter::start(&starter, &world.settings, request, &mut events);
            let importer = importer.unwrap();
            let pid = pids.lock().unwrap()[1];
            wait::until("the importer to be ready", wait::DEADLINE, || (status(pid, "Seccomp") == "2").then_some(()))
                .unwrap();
            // As if the broker had been killed: nobody closes the channel or ends the processes.
            std::mem::forget(importer);
        });
    });
    for pid in pids.into_inner().unwrap() {
        wait::until("the importer to end", wait::DEADLINE, || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            (status.is_empty() || status.contains("State:\tZ")).then_some(())
        })
        .unwrap();
        let _ = nix::sys::wait::waitpid(Pid::from_raw(pid.try_into().unwrap()), None);
    }
}
