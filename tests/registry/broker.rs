//! The broker's side of the importer's protocol.

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use spank_pyxis::image::digest::Digest;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::importer::protocol::{Command, FailureKind, ImportLimits, LayerDescriptor, Report};
use spank_pyxis::registry::config::{Mirror, NetworkConfig, PullFromMirror, RegistryConfig, RegistryEntry};
use spank_pyxis::registry::credentials::remote::serve;
use spank_pyxis::registry::credentials::{Answer, Credential, Keyring, Kind, Query, SharedKeyring};
use spank_pyxis::registry::proxy::Source;
use spank_pyxis::registry::site;
use spank_pyxis::request::Environment;
use spank_pyxis::sys::channel::{self, Channel};
use spank_pyxis::sys::memfile;

/// Longest time between two messages of an importer.
const DEADLINE: Duration = Duration::from_secs(60);

/// What to import, and how.
#[derive(Debug, Clone)]
pub struct Import {
    pub image: String,
    pub registries: RegistryConfig,
    pub keyring: SharedKeyring,
    /// The job's environment, as far as it is about proxies.
    pub job: Environment,
    pub limits: ImportLimits,
}

/// What was imported.
#[derive(Debug)]
pub struct Imported {
    pub manifest: Digest,
    pub origin: String,
    pub warnings: Vec<String>,
    pub config: Vec<u8>,
    pub layers: Vec<LayerDescriptor>,
    /// The layer images.
    pub files: Vec<File>,
    /// Layers that came from another place, and from which.
    pub elsewhere: Vec<(usize, String)>,
    /// Bytes that were reported as progress.
    pub progress: u64,
}

/// How an import ended that did not succeed.
pub type Failed = (FailureKind, String);

impl Import {
    /// `IMAGE` from the registries at `hosts`, which speak plain HTTP: the first is asked, the others may be named.
    pub fn new(image: &str, hosts: &[&str]) -> Self {
        let mut registries = RegistryConfig {
            network: NetworkConfig {
                connect_timeout: 5,
                stall_timeout: 1,
                min_rate: 1,
                attempts: 3,
                blob_connections: 4,
                submit_timeout: 2,
            },
            ..RegistryConfig::default()
        };
        for host in hosts {
            registries
                .registry
                .insert((*host).to_owned(), RegistryEntry { insecure: true, ..RegistryEntry::default() });
        }
        Self {
            image: format!("{}/{image}", hosts[0]),
            registries,
            keyring: Arc::new(Entries::default()),
            job: Environment::default(),
            limits: ImportLimits { max_layer_bytes: 64 << 20, max_layer_entries: 10_000, max_connections: 3 },
        }
    }

    /// The same with a mirror in front of `registry`.
    pub fn mirror(mut self, registry: &str, location: &str) -> Self {
        let mirror = Mirror { location: location.to_owned(), insecure: true, pull_from_mirror: PullFromMirror::All };
        self.registries.registry.entry(registry.to_owned()).or_default().mirrors.push(mirror);
        self
    }

    /// The same with these credentials only.
    pub fn credential(self, host: &str, user: &str, secret: &str) -> Self {
        self.entries(&[(host, user, secret)])
    }

    /// The same with several.
    pub fn entries(self, entries: &[(&str, &str, &str)]) -> Self {
        let credential = |user: &str, secret: &str| Credential {
            user: user.to_owned(),
            secret: secret.into(),
            kind: Kind::Password,
            source: "/home/u/.docker/config.json".into(),
        };
        let entries = entries.iter().map(|(host, user, secret)| ((*host).to_owned(), credential(user, secret)));
        Self { keyring: Arc::new(Entries { entries: entries.collect(), ..Entries::default() }), ..self }
    }

    /// Imports all layers in a conversation that has begun.
    pub fn run_in(&self, conversation: &Conversation) -> Result<Imported, Failed> {
        let mut imported = conversation.resolve(self)?;
        conversation.fetch_all(&mut imported)?;
        Ok(imported)
    }

    /// Starts an importer in a thread and has it find the image.
    pub fn resolve(&self) -> Result<(Conversation, Imported), Failed> {
        let (broker, importer) = channel::pair().unwrap();
        std::thread::spawn(move || spank_pyxis::importer::serve(importer));
        let conversation = Conversation(broker);
        let imported = conversation.resolve(self)?;
        Ok((conversation, imported))
    }

    /// Imports all layers.
    pub fn run(&self) -> Result<Imported, Failed> {
        let (conversation, mut imported) = self.resolve()?;
        conversation.fetch_all(&mut imported)?;
        Ok(imported)
    }

    /// The failure that is expected.
    pub fn fail(&self) -> Failed {
        let failed = self.run().expect_err("the import should fail");
        assert!(!failed.1.contains('\n') && failed.1.len() < 1000, "one line: {}", failed.1);
        failed
    }
}

/// A keyring of entries for hosts, of which those for the token server go first.
#[derive(Debug, Default)]
pub struct Entries {
    pub entries: Vec<(String, Credential)>,
    pub warnings: Vec<String>,
}

impl Keyring for Entries {
    fn find(&self, query: &Query) -> Answer {
        let fits = |user: &str| query.user.as_deref().is_none_or(|wanted| wanted == user);
        let at = |host: &str| self.entries.iter().find(|(entry, found)| entry == host && fits(&found.user));
        Answer {
            credential: at(&query.realm).or_else(|| at(&query.registry)).map(|(_, found)| found.clone()),
            tried: vec!["/home/u/.docker/config.json".into()],
            warnings: self.warnings.clone(),
        }
    }
}

/// A conversation with an importer.
#[derive(Debug)]
pub struct Conversation(pub Channel<Command, Report>);

impl Conversation {
    pub fn resolve(&self, import: &Import) -> Result<Imported, Failed> {
        let reference = ImageReference::parse(&import.image).unwrap();
        let endpoints =
            import.registries.mirrors(&reference).into_iter().chain([import.registries.upstream(&reference)]);
        let hosts: Vec<String> = endpoints.map(|endpoint| endpoint.host).collect();
        let (asker, answerer) = channel::pair::<Query, Answer>().unwrap();
        let keyring = Arc::clone(&import.keyring);
        std::thread::spawn(move || serve(&answerer, &*keyring, &hosts));
        let site_files = import.registries.site_files(&reference);
        let command = Command::Resolve {
            reference,
            registries: Box::new(import.registries.clone()),
            proxy: (Source::Job, import.registries.proxy.of_job(&import.job)),
            site_files: site_files.clone(),
            limits: import.limits,
        };
        let opened: Vec<File> = site_files.iter().map(|file| site::open(file).unwrap()).collect();
        let descriptors: Vec<_> = [asker.as_fd()].into_iter().chain(opened.iter().map(AsFd::as_fd)).collect();
        self.0.send(&command, &descriptors).unwrap();
        match self.next() {
            (Report::Resolved { manifest, origin, layers, warnings }, mut descriptors) => {
                let config = memfile::read_all(descriptors.remove(0), 1 << 20).unwrap();
                Ok(Imported {
                    manifest,
                    origin,
                    warnings,
                    config,
                    layers,
                    files: Vec::new(),
                    elsewhere: Vec::new(),
                    progress: 0,
                })
            }
            (Report::Failed { kind, message }, _) => Err((kind, message)),
            (other, _) => panic!("{other:?}"),
        }
    }

    pub fn fetch_all(&self, imported: &mut Imported) -> Result<(), Failed> {
        for layer in 0..imported.layers.len() {
            let file = tempfile::tempfile().unwrap();
            self.0.send(&Command::Fetch { layer }, &[file.as_fd()]).unwrap();
            imported.files.push(file);
        }
        let mut missing = imported.layers.len();
        while missing > 0 {
            match self.next().0 {
                Report::Progress { bytes, .. } => imported.progress += bytes,
                Report::Fetched { layer, image, unpacked } => {
                    assert_eq!(imported.files[layer].metadata().unwrap().len(), image);
                    assert!(unpacked > 0);
                    missing -= 1;
                }
                Report::Elsewhere { layer, origin } => imported.elsewhere.push((layer, origin)),
                Report::Failed { kind, message } => return Err((kind, message)),
                other => panic!("{other:?}"),
            }
        }
        Ok(())
    }

    /// Whether the registry lets this user have the first layer.
    pub fn confirm(&self) -> Result<bool, Failed> {
        self.0.send(&Command::Confirm { layer: 0 }, &[]).unwrap();
        match self.next().0 {
            Report::Confirmed { layer: 0, allowed } => Ok(allowed),
            Report::Failed { kind, message } => Err((kind, message)),
            other => panic!("{other:?}"),
        }
    }

    /// The next message, except about what is tried again.
    pub fn next(&self) -> (Report, Vec<std::os::fd::OwnedFd>) {
        loop {
            let mut ready = [PollFd::new(&self.0, PollFlags::IN)];
            assert_eq!(poll(&mut ready, Some(&DEADLINE.try_into().unwrap())), Ok(1), "the importer says nothing");
            match self.0.receive().unwrap().expect("the importer is gone") {
                (Report::Trouble { .. }, _) => {}
                message => return message,
            }
        }
    }
}
