//! The threads of a conversion: one walks through the image, several unpack, one hashes.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use sha2::{Digest as _, Sha256};

use super::super::error::LayerError;
use crate::image::digest::Digest;
use crate::squashfs::reader::{Error, File, FileType, Image, Visit};

/// Bytes that are unpacked at once, at least a block.
const PIECE: usize = 256 << 10;
/// Bytes that may wait to be written.
const WAITING: usize = 16 << 20;
/// Pieces that may wait to be hashed.
const TO_HASH: usize = 16;
/// Stacks are small: nothing recurses.
const STACK: usize = 1 << 20;
/// Most threads that unpack.
const MAX_THREADS: usize = 8;

/// What the walk comes to, in order.
pub enum Item {
    Visit(Box<Found>),
    /// The next piece of the last file, when it is ready.
    Piece(Receiver<Result<Arc<Vec<u8>>, Error>>),
}

/// A file of any type.
pub struct Found {
    pub visit: Visit,
    /// Where a regular file has data. Its pieces follow.
    pub extents: Vec<(u64, u64)>,
}

/// A piece to be unpacked.
struct Job {
    file: Arc<File>,
    offset: u64,
    length: usize,
    done: SyncSender<Result<Arc<Vec<u8>>, Error>>,
}

/// The items of an image.
pub struct Items(Receiver<Result<Item, Error>>);

impl Items {
    /// The next one; `None` at the end.
    pub fn next(&mut self) -> Option<Result<Item, Error>> {
        self.0.recv().ok()
    }

    /// The next piece, which has to be there.
    pub fn piece(&mut self) -> Result<Arc<Vec<u8>>, LayerError> {
        match self.next() {
            Some(Ok(Item::Piece(piece))) => match piece.recv() {
                Ok(bytes) => Ok(bytes?),
                Err(_) => Err(internal()),
            },
            Some(Err(error)) => Err(error.into()),
            Some(Ok(Item::Visit(_))) | None => Err(internal()),
        }
    }
}

fn internal() -> LayerError {
    LayerError::Read(std::io::Error::other("internal error: a thread ended early"))
}

/// Starts the threads that read. They end when the image does, or when nobody wants more.
pub fn start<'scope>(scope: &'scope Scope<'scope, '_>, image: &'scope Image, limit: u64) -> Result<Items, LayerError> {
    let piece = PIECE.max(image.block_size() as usize);
    let waiting = (WAITING / piece).max(2);
    let (items, received) = sync_channel(waiting);
    let (jobs, work) = sync_channel::<Job>(waiting);
    let work = Arc::new(Mutex::new(work));
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    for _ in 0..threads {
        let work = Arc::clone(&work);
        spawn(scope, "unpack", move || unpack(image, &work))?;
    }
    spawn(scope, "walk", move || {
        if let Err(Stop::Failed(error)) = walk(image, limit, piece, &items, &jobs) {
            // Nobody listens if the writer has failed.
            let _ = items.send(Err(error));
        }
    })?;
    Ok(Items(received))
}

fn spawn<'scope, T: Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'scope,
) -> Result<ScopedJoinHandle<'scope, T>, LayerError> {
    Builder::new().name(name.to_owned()).stack_size(STACK).spawn_scoped(scope, work).map_err(LayerError::Read)
}

fn unpack(image: &Image, work: &Mutex<Receiver<Job>>) {
    loop {
        let next = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        let mut bytes = vec![0; job.length];
        let read = image.read_at(&job.file, job.offset, &mut bytes).map(|_| Arc::new(bytes));
        // Nobody listens if the writer has failed.
        let _ = job.done.send(read);
    }
}

/// Why a walk ends before the image does.
enum Stop {
    Failed(Error),
    /// Nobody wants more.
    Unwanted,
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

fn walk(
    image: &Image,
    limit: u64,
    piece: usize,
    items: &SyncSender<Result<Item, Error>>,
    jobs: &SyncSender<Job>,
) -> Result<(), Stop> {
    let mut linked = std::collections::HashSet::new();
    for visit in image.walk(limit)? {
        let visit = visit?;
        let inode = &visit.inode;
        let first = inode.nlink <= 1 || linked.insert(inode.reference);
        if inode.file_type() != FileType::Regular || !first {
            let found = Found { visit, extents: Vec::new() };
            items.send(Ok(Item::Visit(Box::new(found)))).map_err(|_| Stop::Unwanted)?;
            continue;
        }
        let file = Arc::new(image.file(inode)?);
        let extents = match inode.is_sparse() {
            true => image.data_extents(&file)?,
            false if file.size() == 0 => Vec::new(),
            false => vec![(0, file.size())],
        };
        let found = Found { visit, extents: extents.clone() };
        items.send(Ok(Item::Visit(Box::new(found)))).map_err(|_| Stop::Unwanted)?;
        for (offset, length) in extents {
            let mut at = offset;
            let end = offset.saturating_add(length);
            while at < end {
                let now = usize::try_from(end - at).unwrap_or(usize::MAX).min(piece);
                let (done, ready) = sync_channel(1);
                // In this order: a piece that is waited for is one that somebody unpacks.
                jobs.send(Job { file: Arc::clone(&file), offset: at, length: now, done })
                    .map_err(|_| Stop::Unwanted)?;
                items.send(Ok(Item::Piece(ready))).map_err(|_| Stop::Unwanted)?;
                at += now as u64;
            }
        }
    }
    Ok(())
}

/// A digest that is computed in a thread of its own.
pub struct Hashing {
    bytes: SyncSender<Arc<Vec<u8>>>,
    digest: Receiver<Digest>,
}

impl Hashing {
    pub fn start<'scope>(scope: &'scope Scope<'scope, '_>) -> Result<Self, LayerError> {
        let (bytes, to_hash) = sync_channel::<Arc<Vec<u8>>>(TO_HASH);
        let (done, digest) = sync_channel(1);
        spawn(scope, "hash", move || {
            let mut hash = Sha256::new();
            for bytes in to_hash {
                hash.update(&*bytes);
            }
            let _ = done.send(Digest::from_bytes(hash.finalize().into()));
        })?;
        Ok(Self { bytes, digest })
    }

    pub fn add(&self, bytes: Vec<u8>) {
        self.share(&Arc::new(bytes));
    }

    pub fn share(&self, bytes: &Arc<Vec<u8>>) {
        // The thread listens as long as this exists.
        let _ = self.bytes.send(Arc::clone(bytes));
    }

    /// The digest of all that was added.
    pub fn finish(self) -> Result<Digest, LayerError> {
        drop(self.bytes);
        self.digest.recv().map_err(|_| internal())
    }
}
