//! Layer images: from an unnamed file that the importer writes to a name in the store, and leases on that name.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, Timespec, Timestamps};
use rustix::io::Errno;

use super::{Result, Store, StoreError};
use crate::image::digest::Digest;

pub(super) const LAYERS: &str = "layers/sha256";
/// The modification time of a layer says when it was last leased, to this precision.
const TOUCH_INTERVAL: u64 = 300;
/// How often, and with which pause, to wait for a collector that has locked a layer and is about to unlink it.
const REMOVAL_TRIES: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(5);
/// How often to look whether a writer has closed its file.
const CLOSING_TRIES: u32 = 200;

/// A layer in use: it is not collected while this descriptor or a duplicate of it is open.
#[derive(Debug)]
pub struct LeasedLayer {
    /// Which layer.
    pub diff_id: Digest,
    /// Its EROFS image, open for reading, with a shared flock.
    pub file: File,
}

/// A layer image that is being written and has no name in the store. Gone when dropped, or when all who have it end.
#[derive(Debug)]
pub struct NewLayer<'a> {
    store: &'a Store,
    file: File,
    temporary: Option<Temporary<'a>>,
}

/// A new layer image that nobody can write any more, still without a name in the store.
#[derive(Debug)]
pub struct SealedLayer<'a> {
    store: &'a Store,
    layer: LeasedLayer,
    temporary: Option<Temporary<'a>>,
}

/// The temporary name of a new layer where the file system has no unnamed files (NFS). Removed when dropped.
#[derive(Debug)]
struct Temporary<'a> {
    store: &'a Store,
    name: String,
}

impl Store {
    /// Leases a layer; `None` if the store has it not.
    pub fn lease(&self, layer: &Digest) -> Result<Option<LeasedLayer>> {
        let name = layer_path(layer);
        for _ in 0..REMOVAL_TRIES {
            let Some(file) = self.open_file(&name)? else { return Ok(None) };
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => {
                    // A collector is about to unlink it.
                    std::thread::sleep(PAUSE);
                    continue;
                }
                Err(errno) => return Err(self.error("lock", &name, errno)),
            }
            let stat = rustix::fs::fstat(&file).map_err(|errno| self.error("examine", &name, errno))?;
            if self.leads_to(&name, &stat)? {
                touch(&file, stat.st_mtime);
                return Ok(Some(LeasedLayer { diff_id: *layer, file }));
            }
        }
        Err(StoreError::Stuck { layer: *layer })
    }

    /// An empty file for the importer to write a layer image to.
    pub fn new_layer(&self) -> Result<NewLayer<'_>> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.root, LAYERS, flags, Mode::RUSR) {
            Ok(file) => Ok(NewLayer { store: self, file: file.into(), temporary: None }),
            // open(2): the file system has no unnamed files, or the kernel does not know the flag.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::NOENT | Errno::INVAL) => self.new_named_layer(),
            Err(errno) => Err(self.error("create a file in", LAYERS, errno)),
        }
    }

    pub(super) fn new_named_layer(&self) -> Result<NewLayer<'_>> {
        let (name, file) = self.create_temporary(LAYERS)?;
        Ok(NewLayer { store: self, file, temporary: Some(Temporary { store: self, name }) })
    }
}

impl AsFd for NewLayer<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl<'a> NewLayer<'a> {
    /// Takes the file as the image of layer `diff_id`, which has `length` bytes, once its writer has closed it: from now
    /// on it cannot be changed.
    pub fn seal(self, diff_id: &Digest, length: u64) -> Result<SealedLayer<'a>> {
        let Self { store, file: written, temporary } = self;
        // A descriptor of its own: a lock on the one that the importer had would be the importer's as well.
        let path = format!("/proc/self/fd/{}", written.as_raw_fd());
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, Mode::empty())
            .and_then(|file| rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared).map(|()| File::from(file)))
            .map_err(|errno| store.error("reopen a new file in", LAYERS, errno))?;
        drop(written);
        let found = file.metadata().map_err(|source| store.error("examine a new file in", LAYERS, source))?.len();
        if found != length || found == 0 {
            return Err(StoreError::Length { layer: *diff_id, expected: length, found });
        }
        if !store.is_unwritable(&file)? {
            return Err(StoreError::OpenForWriting { layer: *diff_id });
        }
        Ok(SealedLayer { store, layer: LeasedLayer { diff_id: *diff_id, file }, temporary })
    }
}

impl Store {
    /// Whether nobody can write `file`, which has no writable mode, any more. A writer that is just closing it gets a
    /// moment.
    fn is_unwritable(&self, file: &File) -> Result<bool> {
        let error = |source| self.error("examine a new file in", LAYERS, source);
        for _ in 0..CLOSING_TRIES {
            if crate::sys::file::has_no_writer(file.as_fd()).map_err(error)? {
                return Ok(true);
            }
            std::thread::sleep(PAUSE);
        }
        // NFSv4 answers "in use" whenever the server has not delegated the file: ask about one that nobody writes.
        let version = self.open_file("version")?;
        let knows = match &version {
            Some(version) => crate::sys::file::has_no_writer(version.as_fd()).map_err(error)?,
            None => false,
        };
        Ok(!knows)
    }
}

impl SealedLayer<'_> {
    /// Gives the image its name. The result is a lease from before the name appears, so no collector comes in between.
    ///
    /// The image is on the disk first, and its pages leave the page cache: the layer is mounted with `directio`, and
    /// would be in memory twice.
    pub fn publish(self) -> Result<LeasedLayer> {
        let Self { store, layer, temporary } = self;
        let name = layer_path(&layer.diff_id);
        layer.file.sync_all().map_err(|source| store.error("write", &name, source))?;
        // Advice: nothing depends on it.
        let _ = rustix::fs::fadvise(&layer.file, 0, None, rustix::fs::Advice::DontNeed);
        loop {
            let linked = match &temporary {
                Some(temporary) => {
                    rustix::fs::linkat(&store.root, &temporary.name, &store.root, &name, AtFlags::empty())
                }
                // open(2), O_TMPFILE: this form needs no capability.
                None => rustix::fs::linkat(
                    rustix::fs::CWD,
                    format!("/proc/self/fd/{}", layer.file.as_raw_fd()),
                    &store.root,
                    &name,
                    AtFlags::SYMLINK_FOLLOW,
                ),
            };
            match linked {
                Ok(()) => {
                    drop(temporary);
                    store.sync_directory(LAYERS)?;
                    return Ok(layer);
                }
                // Somebody was first, without the fetch lock or before it was taken.
                Err(Errno::EXIST) => {
                    if let Some(existing) = store.lease(&layer.diff_id)? {
                        return match same_bytes(&existing.file, &layer.file) {
                            Ok(true) => Ok(existing),
                            Ok(false) => Err(StoreError::Differs { layer: layer.diff_id }),
                            Err(source) => Err(store.error("read", &name, source)),
                        };
                    }
                }
                Err(errno) => return Err(store.error("create", &name, errno)),
            }
        }
    }

    /// Whether this image is the stored one: then its sender has the layer, and both came from the same tar stream.
    pub fn proves(&self, stored: &LeasedLayer) -> Result<bool> {
        same_bytes(&stored.file, &self.layer.file)
            .map_err(|source| self.store.error("read", &layer_path(&stored.diff_id), source))
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        // Best effort: the collector finds what stays.
        let _ = self.store.unlink(&self.name);
    }
}

/// Where a layer is, relative to the store.
pub(super) fn layer_path(layer: &Digest) -> String {
    format!("{LAYERS}/{}", layer.hex())
}

/// Notes that a layer is used, for the collector's order.
fn touch(file: &File, modified: i64) {
    let now = super::record::now();
    if now.abs_diff(u64::try_from(modified).unwrap_or(0)) > TOUCH_INTERVAL {
        let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
        // A store that is read-only has no order to keep.
        let _ = rustix::fs::futimens(file, &Timestamps { last_access: now, last_modification: now });
    }
}

fn same_bytes(a: &File, b: &File) -> io::Result<bool> {
    const PIECE: usize = 1 << 20;
    let length = a.metadata()?.len();
    if b.metadata()?.len() != length {
        return Ok(false);
    }
    let (mut piece_a, mut piece_b) = (vec![0; PIECE], vec![0; PIECE]);
    let mut offset = 0;
    while offset < length {
        let size = PIECE.min(usize::try_from(length - offset).unwrap_or(PIECE));
        a.read_exact_at(&mut piece_a[..size], offset)?;
        b.read_exact_at(&mut piece_b[..size], offset)?;
        if piece_a[..size] != piece_b[..size] {
            return Ok(false);
        }
        offset += size as u64;
    }
    Ok(true)
}
