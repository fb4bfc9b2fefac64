//! An image that its user has on this machine: a file, a directory, or in a container engine's storage.
//!
//! The source reader opens it as the user, an importer reads it ([`crate::source`]); the broker hands the one's descriptors
//! to the other and looks at none of them. Whatever the store has already is read and compared all the same: nobody but
//! the bytes shows that the user has them. What he has shown is not read again until it changes.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::process::{Child, Importer, start_importer, start_reader};
use super::session::Session;
use super::{AcquiredImage, ImportError, ImportEvent, ImportSettings, collect, one_line, permit, settled};
use crate::cli;
use crate::image::digest::Digest;
use crate::importer::protocol::{Command, FailureKind};
use crate::policy::{Evidence, Subject};
use crate::request::{Environment, LocalImage, User};
use crate::source::importer::ImporterCall;
use crate::source::{FromReader, SourceForm, ToReader};
use crate::store::{LocalKey, LocalRecord, PinnedMounts, Store, StoreError, now};
use crate::sys::channel::Channel;
use crate::sys::memfile;

/// Longest message of a source reader that is passed on.
const MAX_MESSAGE: usize = 1000;
/// Most lines of a site's importer that are passed on.
const MAX_LINES: usize = 100;
/// How long an engine's command that has closed its output may take to say why.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// Who has which image.
#[derive(Debug, Clone, Copy)]
pub struct LocalRequest<'a> {
    /// As whom it is opened.
    pub user: &'a User,
    /// The image.
    pub image: &'a LocalImage,
    /// As the user typed it, for messages.
    pub typed: &'a str,
    /// What relative paths are relative to.
    pub cwd: &'a Path,
    /// The job's environment, for container engines.
    pub environment: &'a Environment,
}

/// An image that its user could open.
#[derive(Debug)]
pub struct OpenedImage {
    /// `None` when it is not needed any more.
    channel: Option<Channel<ToReader, FromReader>>,
    reader: Option<Child>,
    /// It runs a program, after which it has to tidy up.
    takes_long: bool,
    /// `None`: an engine has it, and has not been asked for it yet.
    form: Option<SourceForm>,
    descriptor: Option<OwnedFd>,
    key: Option<LocalKey>,
    /// For the administrator's rules.
    subject: Subject,
}

/// Has the image opened as the user. For an image in an engine's storage, which may have to be pulled first, the import
/// has begun with this: [`ImportEvent::NetworkStart`]. Fails with [`ImportError::Cancelled`] as [`acquire`](super::acquire)
/// does.
pub fn open_local(
    settings: &ImportSettings,
    request: LocalRequest<'_>,
    cancel: &[BorrowedFd<'_>],
    events: &mut dyn FnMut(ImportEvent),
) -> Result<OpenedImage, ImportError> {
    let subject = Subject::local(request.user, request.image, &one_line(request.typed, 300));
    permit::before(settings, &subject)?;
    let message =
        ToReader::Open { user: request.user.clone(), image: request.image.clone(), cwd: request.cwd.to_owned() };
    let takes_long = matches!(request.image, LocalImage::Engine { .. });
    let mut opened = start(settings, subject, &message, request.environment, takes_long, events)?;
    let (report, descriptors) = opened.receive(request.typed, cancel)?;
    match (report, request.image) {
        (FromReader::Found { id }, LocalImage::Engine { engine, .. }) => {
            opened.key = Some(LocalKey::Engine { engine: *engine, id });
        }
        (FromReader::Opened { form, file }, LocalImage::Path { form: wanted, name, .. }) => {
            opened.form = Some(form);
            opened.descriptor = descriptors.into_iter().next();
            opened.key = file.map(|file| LocalKey::File { file, form: *wanted, name: name.clone() });
        }
        _ => return Err(unexpected()),
    }
    Ok(opened)
}

/// Has the site's importer get `uri`, which `subject` is about, and opens, as the user, what it names. The import has begun
/// with this.
pub fn open_imported(
    settings: &ImportSettings,
    subject: Subject,
    call: &ImporterCall,
    uri: &str,
    environment: &Environment,
    cancel: &[BorrowedFd<'_>],
    events: &mut dyn FnMut(ImportEvent),
) -> Result<OpenedImage, ImportError> {
    permit::before(settings, &subject)?;
    let message = ToReader::Import { call: call.clone(), uri: uri.to_owned() };
    let mut opened = start(settings, subject, &message, environment, true, events)?;
    let (FromReader::Opened { form, file }, descriptors) = opened.receive(uri, cancel)? else {
        return Err(unexpected());
    };
    opened.form = Some(form);
    opened.descriptor = descriptors.into_iter().next();
    opened.key = file.map(|file| LocalKey::File { file, form: None, name: None });
    Ok(opened)
}

/// Starts a source reader with its first message.
fn start(
    settings: &ImportSettings,
    subject: Subject,
    message: &ToReader,
    environment: &Environment,
    takes_long: bool,
    events: &mut dyn FnMut(ImportEvent),
) -> Result<OpenedImage, ImportError> {
    let (channel, reader) = start_reader(settings, cli::SOURCE)?;
    if takes_long {
        events(ImportEvent::NetworkStart);
        events(reader.event());
    }
    let environment = memfile::sealed("pyxis-environment", &environment.to_block())
        .map_err(|error| ImportError::start("user's environment", &error))?;
    channel.send(message, &[environment.as_fd()]).map_err(|error| ImportError::start("source reader", &error))?;
    Ok(OpenedImage {
        channel: Some(channel),
        reader: Some(reader),
        takes_long,
        form: None,
        descriptor: None,
        key: None,
        subject,
    })
}

impl OpenedImage {
    /// The squashfs file that it is, read-only, and by what to remember what was made of it. `None`: it is another image.
    pub fn take_squashfs(
        &mut self,
        settings: &ImportSettings,
    ) -> Result<Option<(OwnedFd, Option<LocalKey>)>, ImportError> {
        if self.form != Some(SourceForm::Squashfs) {
            return Ok(None);
        }
        // It has no digest that anybody could have named.
        settled(settings, &self.subject, &Evidence::default())?;
        Ok(self.descriptor.take().map(|file| (file, self.key.clone())))
    }

    fn channel(&self) -> Result<&Channel<ToReader, FromReader>, ImportError> {
        self.channel.as_ref().ok_or_else(unexpected)
    }

    /// The source reader's next message. However long it takes: a file server or a pull may be slow.
    fn receive(&mut self, typed: &str, cancel: &[BorrowedFd<'_>]) -> Result<(FromReader, Vec<OwnedFd>), ImportError> {
        let channel = self.channel()?;
        let mut watched = vec![PollFd::new(channel, PollFlags::IN)];
        watched.extend(cancel.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)));
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None))
            .map_err(|errno| ImportError::start("source reader", &errno.into()))?;
        if watched.iter().skip(1).any(|fd| !fd.revents().is_empty()) {
            return Err(ImportError::Cancelled { image: one_line(typed, 300) });
        }
        match channel.receive() {
            Ok(Some((FromReader::Failed { message }, _))) => Err(refused(&message)),
            Ok(Some((FromReader::ImporterFailed { problem, log }, _))) => {
                let log = log.iter().take(MAX_LINES).map(|line| one_line(line, MAX_MESSAGE)).collect();
                Err(ImportError::SiteImporter { problem: one_line(&problem, MAX_MESSAGE), log })
            }
            Ok(Some(message)) => Ok(message),
            Ok(None) => Err(ImportError::Source("the process that opens images as the user ended unexpectedly".into())),
            Err(error) => Err(ImportError::start("source reader", &error)),
        }
    }

    /// Why an engine's command has failed, if it has.
    fn failure(&self) -> Option<ImportError> {
        let channel = self.channel.as_ref()?;
        let mut watched = [PollFd::new(channel, PollFlags::IN)];
        let timeout = REASON_TIMEOUT.try_into().ok();
        match rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, timeout.as_ref())) {
            Ok(1..) => match channel.receive() {
                Ok(Some((FromReader::Failed { message }, _))) => Some(refused(&message)),
                _ => None,
            },
            _ => None,
        }
    }
}

impl Drop for OpenedImage {
    fn drop(&mut self) {
        self.channel = None;
        if let (Some(reader), true) = (&mut self.reader, self.takes_long) {
            reader.ended();
        }
    }
}

fn refused(message: &str) -> ImportError {
    ImportError::Source(one_line(message, MAX_MESSAGE))
}

fn unexpected() -> ImportError {
    ImportError::Source("the process that opens images as the user does not keep to the protocol".into())
}

/// Returns the image with all its layers leased, reading it unless nothing has changed since it was read.
///
/// Single-threaded. As [`acquire`](super::acquire) in everything else.
pub fn acquire_local(
    store: &Store,
    settings: &ImportSettings,
    request: LocalRequest<'_>,
    mut opened: OpenedImage,
    pinned: &dyn PinnedMounts,
    cancel: &[BorrowedFd<'_>],
    events: &mut dyn FnMut(ImportEvent),
) -> Result<AcquiredImage, ImportError> {
    let uid = request.user.uid;
    if let Some(key) = &opened.key
        && let Some(image) = remembered(store, uid, key)?
    {
        settled(settings, &opened.subject, &image.evidence)?;
        return Ok(image);
    }
    if opened.form.is_none() {
        opened.channel()?.send(&ToReader::Save, &[]).map_err(|error| ImportError::start("source reader", &error))?;
        let (FromReader::Opened { form, .. }, descriptors) = opened.receive(request.typed, cancel)? else {
            return Err(unexpected());
        };
        opened.form = Some(form);
        opened.descriptor = descriptors.into_iter().next();
    } else {
        events(ImportEvent::NetworkStart);
    }
    let (Some(form), Some(descriptor)) = (opened.form, opened.descriptor.take()) else { return Err(unexpected()) };
    let (channel, process) = start_importer(settings, uid, events)?;
    events(process.event());
    // Gone with this function, whatever happens: it never gets a name.
    let spool = (form == SourceForm::Stream).then(|| store.new_layer()).transpose()?;
    let spool_descriptor = spool.as_ref().map(|spool| spool.as_fd().try_clone_to_owned()).transpose();
    let spool_descriptor = spool_descriptor.map_err(|error| ImportError::start("importer", &error))?;
    let descriptors = std::iter::once(descriptor).chain(spool_descriptor).collect();
    let importer = Importer { channel, descriptors, site_files: vec![], process: Some(process), reader: None };

    let (wanted, name) = match request.image {
        LocalImage::Path { form, name, .. } => (*form, name.clone()),
        LocalImage::Engine { .. } => (None, None),
    };
    let shown = one_line(request.typed, 300);
    let command = Command::Open { form, wanted, name, shown: shown.clone(), limits: settings.limits };
    let mut session = Session::new(store, settings, (None, shown), pinned, cancel, events, importer);
    let outcome = session.resolve(&command).and_then(|image| {
        settled(settings, &opened.subject, &of_manifest(image.manifest))?;
        let layers = session.obtain(&image, false)?;
        Ok((image, layers))
    });
    drop(session);
    let (image, layers) = outcome.map_err(|error| match &error {
        // An archive that breaks off: the engine knows why.
        ImportError::Refused { kind: FailureKind::BadImage, .. } => opened.failure().unwrap_or(error),
        _ => error,
    })?;

    let config = store.keep_config(&image.config)?;
    if let Some(key) = opened.key.clone() {
        let layers = layers.iter().map(|layer| layer.diff_id).collect();
        let record = LocalRecord { key, manifest: image.manifest, config, layers, confirmed_at: now() };
        store.confirm_local(uid, &record)?;
    }
    collect(store, settings, pinned, events);
    let evidence = of_manifest(image.manifest);
    Ok(AcquiredImage { manifest: image.manifest, config: image.config, layers, evidence, from_network: true })
}

/// Makes a layer of the squashfs file that was opened, unless that is done and nothing has changed. The image has no
/// config, which is an empty one.
///
/// As [`acquire_local`] in everything else.
pub fn convert(
    store: &Store,
    settings: &ImportSettings,
    request: LocalRequest<'_>,
    (file, key): (OwnedFd, Option<LocalKey>),
    pinned: &dyn PinnedMounts,
    cancel: &[BorrowedFd<'_>],
    events: &mut dyn FnMut(ImportEvent),
) -> Result<AcquiredImage, ImportError> {
    let uid = request.user.uid;
    let known = |key: &Option<LocalKey>| key.as_ref().map_or(Ok(None), |key| remembered(store, uid, key));
    if let Some(image) = known(&key)? {
        return Ok(image);
    }
    events(ImportEvent::NetworkStart);
    let size = rustix::fs::fstat(&file).map_err(|errno| ImportError::start("squashfs file", &errno.into()))?.st_size;
    let (channel, process) = start_importer(settings, uid, events)?;
    events(process.event());
    let importer = Importer { channel, descriptors: vec![], site_files: vec![], process: Some(process), reader: None };
    let shown = one_line(request.typed, 300);
    let mut session = Session::new(store, settings, (None, shown.clone()), pinned, cancel, events, importer);
    // Another step of this user's may be at it.
    let lock = match &key {
        Some(key) => {
            let name = store.local_lock(uid, key)?;
            loop {
                if let Some(image) = known(&Some(key.clone()))? {
                    return Ok(image);
                }
                if let Some(lock) = session.try_lock(&name)? {
                    break Some(lock);
                }
            }
        }
        None => None,
    };
    // It may have been done while the lock was waited for.
    if let Some(image) = known(&key)? {
        return Ok(image);
    }
    let layer = session.convert(file, u64::try_from(size).unwrap_or(0)).map_err(|error| match error {
        ImportError::Refused { kind: FailureKind::BadImage, message } => {
            ImportError::Source(format!("Invalid image format: {shown} ({message})"))
        }
        other => other,
    });
    drop(session);
    let layer = layer?;

    let (config, manifest) = (store.keep_config(&[])?, layer.diff_id);
    if let Some(key) = key {
        let record = LocalRecord { key, manifest, config, layers: vec![layer.diff_id], confirmed_at: now() };
        store.confirm_local(uid, &record)?;
    }
    drop(lock);
    collect(store, settings, pinned, events);
    let evidence = of_manifest(manifest);
    Ok(AcquiredImage { manifest, config: vec![], layers: vec![layer], evidence, from_network: true })
}

/// What rules may want to know about an image with this manifest.
fn of_manifest(manifest: Digest) -> Evidence {
    Evidence { digests: vec![manifest], keys: vec![] }
}

/// The image as this user had it, if all of it is still there.
fn remembered(store: &Store, uid: u32, key: &LocalKey) -> Result<Option<AcquiredImage>, StoreError> {
    let Some(record) = store.local(uid, key)? else { return Ok(None) };
    let Some(config) = store.config(&record.config)? else { return Ok(None) };
    let mut layers = Vec::with_capacity(record.layers.len());
    for layer in &record.layers {
        let Some(lease) = store.lease(layer)? else { return Ok(None) };
        layers.push(lease);
    }
    let evidence = of_manifest(record.manifest);
    Ok(Some(AcquiredImage { manifest: record.manifest, config, layers, evidence, from_network: false }))
}
