//! Registries in memory, and an importer that talks to them: honest unless told otherwise.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest as _, Sha256};
use spank_pyxis::broker::import::{AcquireRequest, ImportError, ImportEvent, ImportSettings, Importer, StartImporter};
use spank_pyxis::image::digest::Digest;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::importer::protocol::{Command, FailureKind, LayerDescriptor, Report};
use spank_pyxis::registry::config::RegistryConfig;
use spank_pyxis::sys::channel::{self, Channel};
use spank_pyxis::sys::memfile;

pub fn digest(text: impl AsRef<[u8]>) -> Digest {
    Digest::from_bytes(Sha256::digest(text).into())
}

/// A layer whose image has the bytes of `content`, compressed in a way of its own for each registry.
pub fn layer(compression: &str, content: &str) -> LayerDescriptor {
    LayerDescriptor {
        blob: digest(format!("{compression} {content}")),
        diff_id: digest(content),
        size: content.len() as u64,
    }
}

/// What a layer image is made of, so that a test can tell that it is whole.
pub fn image_of(content: &str) -> Vec<u8> {
    format!("image of {content}").repeat(1000).into_bytes()
}

/// One repository of one registry.
#[derive(Debug, Clone, Default)]
pub struct Repository {
    /// Who may pull from it. Everybody if empty.
    pub users: Vec<u32>,
    /// Its images, by tag.
    pub images: BTreeMap<String, Vec<LayerDescriptor>>,
    /// Blobs it really has: content by blob digest.
    pub blobs: BTreeMap<Digest, String>,
}

impl Repository {
    /// A repository with one image, `latest`, of these layers.
    pub fn with(compression: &str, contents: &[&str]) -> Self {
        let mut repository = Self::default();
        repository.push("latest", compression, contents);
        repository
    }

    pub fn push(&mut self, tag: &str, compression: &str, contents: &[&str]) {
        let layers: Vec<_> = contents.iter().map(|content| layer(compression, content)).collect();
        for (layer, content) in layers.iter().zip(contents) {
            self.blobs.insert(layer.blob, (*content).to_owned());
        }
        self.images.insert(tag.to_owned(), layers);
    }

    pub fn only_for(mut self, users: &[u32]) -> Self {
        self.users = users.to_vec();
        self
    }
}

/// All registries, by `HOST/REPOSITORY`, and what was asked of them.
#[derive(Debug, Clone, Default)]
pub struct Registries {
    pub repositories: Arc<Mutex<BTreeMap<String, Repository>>>,
    pub starts: Arc<AtomicUsize>,
    pub confirms: Arc<AtomicUsize>,
    pub fetches: Arc<AtomicUsize>,
}

impl Registries {
    pub fn new(repositories: impl IntoIterator<Item = (&'static str, Repository)>) -> Self {
        let registries = Self::default();
        for (name, repository) in repositories {
            registries.change(name, |entry| *entry = repository);
        }
        registries
    }

    pub fn change(&self, name: &str, change: impl FnOnce(&mut Repository)) {
        change(self.repositories.lock().unwrap().entry(name.to_owned()).or_default());
    }

    fn repository(&self, name: &str) -> Repository {
        self.repositories.lock().unwrap().get(name).cloned().unwrap_or_default()
    }

    /// Starts, confirmations and downloads since the last call.
    pub fn counts(&self) -> (usize, usize, usize) {
        let take = |counter: &AtomicUsize| counter.swap(0, Ordering::SeqCst);
        (take(&self.starts), take(&self.confirms), take(&self.fetches))
    }
}

/// What a conversation needs.
pub struct Served {
    pub registries: Registries,
    pub channel: Channel<Report, Command>,
    pub uid: u32,
    pub origin: String,
    pub found: bool,
    pub layers: Vec<LayerDescriptor>,
}

/// Answers one command. The honest way is [`answer`].
pub type Answer = fn(&Served, Command, Vec<OwnedFd>);

/// An importer in a thread.
pub struct FakeImporter {
    pub registries: Registries,
    pub answer: Answer,
}

impl FakeImporter {
    pub fn honest(registries: &Registries) -> Self {
        Self { registries: registries.clone(), answer }
    }
}

impl StartImporter for FakeImporter {
    fn start(
        &self,
        _: &ImportSettings,
        request: AcquireRequest<'_>,
        _: &mut dyn FnMut(ImportEvent),
    ) -> Result<Importer, ImportError> {
        self.registries.starts.fetch_add(1, Ordering::SeqCst);
        let (channel, importer_end) = channel::pair().unwrap();
        let (credentials, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        // The user's "credentials": who he is.
        File::from(write).write_all(request.user.uid.to_string().as_bytes()).unwrap();
        let (registries, answer) = (self.registries.clone(), self.answer);
        std::thread::spawn(move || serve(registries, answer, importer_end));
        Ok(Importer { channel, descriptors: vec![credentials], site_files: vec![], process: None, reader: None })
    }
}

fn serve(registries: Registries, answer: Answer, channel: Channel<Report, Command>) {
    let mut served = Served { registries, channel, uid: 0, origin: String::new(), found: false, layers: vec![] };
    while let Ok(Some((command, mut descriptors))) = served.channel.receive() {
        if let Command::Resolve { reference, registries, .. } = &command {
            let mut uid = String::new();
            File::from(descriptors.remove(0)).read_to_string(&mut uid).unwrap();
            served.uid = uid.parse().unwrap();
            served.look_up(reference, registries);
        }
        answer(&served, command, descriptors);
    }
}

impl Served {
    /// At the first mirror that has it, else at the registry.
    fn look_up(&mut self, reference: &ImageReference, registries: &RegistryConfig) {
        let mut origins: Vec<String> =
            registries.endpoints(reference).iter().map(|endpoint| endpoint.origin()).collect();
        let upstream = origins.pop().unwrap();
        let has = |origin: &String| !self.registries.repository(origin).images.is_empty();
        self.origin = origins.into_iter().find(has).unwrap_or(upstream);
        let repository = self.registries.repository(&self.origin);
        let by_digest = |layers: &&Vec<LayerDescriptor>| manifest_of(layers).to_string() == reference.tag_or_digest;
        let found = repository.images.get(&reference.tag_or_digest);
        let found = found.or_else(|| repository.images.values().find(by_digest)).cloned();
        self.found = found.is_some();
        self.layers = found.unwrap_or_default();
    }

    pub fn report(&self, report: &Report) {
        // A broker that has given up is none of the importer's business.
        let _ = self.channel.send(report, &[]);
    }

    pub fn fail(&self, kind: FailureKind, message: &str) {
        self.report(&Report::Failed { kind, message: message.to_owned() });
    }

    pub fn resolved(&self) -> Report {
        Report::Resolved {
            manifest: manifest_of(&self.layers),
            origin: self.origin.clone(),
            layers: self.layers.clone(),
            warnings: vec![],
        }
    }

    pub fn config() -> File {
        memfile::sealed("config", b"{\"config\":{}}").unwrap()
    }

    pub fn allowed(&self) -> bool {
        let users = self.registries.repository(&self.origin).users;
        users.is_empty() || users.contains(&self.uid)
    }

    pub fn blob(&self, layer: usize) -> Option<String> {
        self.registries.repository(&self.origin).blobs.get(&self.layers[layer].blob).cloned()
    }
}

fn manifest_of(layers: &[LayerDescriptor]) -> Digest {
    digest(format!("{layers:?}"))
}

/// Writes a layer image and reports it.
pub fn deliver(served: &Served, layer: usize, image: &[u8], file: OwnedFd) {
    let mut file = File::from(file);
    let written = file.write_all(image);
    let length = file.stream_position().unwrap();
    drop(file);
    match written {
        Ok(()) => served.report(&Report::Fetched { layer, unpacked: length, image: length }),
        Err(error) => served.fail(FailureKind::Local, &format!("cannot write layer: {error}")),
    }
}

/// What an honest importer does.
pub fn answer(served: &Served, command: Command, mut descriptors: Vec<OwnedFd>) {
    if !served.allowed() {
        return served.fail(FailureKind::Denied, "the registry refuses");
    }
    match command {
        Command::Resolve { .. } if !served.found => {
            served.fail(FailureKind::NotFound, "no such image");
        }
        Command::Resolve { .. } => {
            let _ = served.channel.send(&served.resolved(), &[Served::config().as_fd()]);
        }
        Command::Open { .. } | Command::Convert { .. } => served.fail(FailureKind::Local, "no registry's image"),
        Command::Examine { .. } => {
            let Report::Resolved { manifest, .. } = served.resolved() else { unreachable!() };
            let problem = "it has no signatures".into();
            served.report(&Report::Examined { digests: vec![manifest], signed_by: None, problem });
        }
        Command::Confirm { layer } => {
            served.registries.confirms.fetch_add(1, Ordering::SeqCst);
            served.report(&Report::Confirmed { layer, allowed: served.blob(layer).is_some() });
        }
        Command::Fetch { layer } => {
            served.registries.fetches.fetch_add(1, Ordering::SeqCst);
            match served.blob(layer) {
                Some(content) if digest(&content) == served.layers[layer].diff_id => {
                    served.report(&Report::Progress { layer, bytes: 1 });
                    deliver(served, layer, &image_of(&content), descriptors.remove(0));
                }
                Some(_) => served.fail(FailureKind::BadImage, "the layer has not its diffID"),
                None => served.fail(FailureKind::NotFound, "the registry has no such blob"),
            }
        }
    }
}
