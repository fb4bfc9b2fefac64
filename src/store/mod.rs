//! The layer store: content-addressed EROFS layer images, shared by all users of a node, or of a cluster.
//!
//! Read and written only by brokers and `pyxis gc`, as root. Everything below the root directory is 0700; the root
//! directory itself may be passed through, for the named containers that are kept there by default ([`crate::container`]).
//!
//! ```text
//! /var/lib/pyxis/
//!   version                           "1\n", written last when the store is made; anything else is refused
//!   layers/sha256/HEX                 layer image, named by the diffID (digest of the uncompressed tar), mode 0400
//!   blobs/sha256/HEX                  BlobRecord: this blob unpacks to that diffID; the registries that proved it
//!   configs/sha256/HEX                image configs, named by their own digest
//!   confirmed/UID/references/HEX      ReferenceRecord: at that time this user was given that manifest for a reference
//!   confirmed/UID/manifests/HEX       ManifestRecord: at that time this user could have every layer of the manifest
//!   confirmed/UID/local/HEX           LocalRecord: this user had every layer in this file, as long as it is unchanged
//!   locks/HEX                         exclusive lock: somebody fetches the layer with this diffID
//!   locks/gc                          exclusive lock: somebody collects
//!   */.tmp-*                          being written; shared lock by the writer
//! ```
//!
//! **What makes an entry valid.** A name under `layers`, `blobs`, `configs` and `confirmed` appears by link(2) or
//! rename(2) of a file that was complete and fsynced: it is whole or absent, whatever happens to the writer
//! ([`layer`], [`dir`]). A layer file never changes once it has its name: before it is linked, the broker makes sure that
//! nobody has it open for writing. A blob record counts only while the layer that it names exists; a reference record
//! only while its manifest record does, and that one only while all its layers and the config do.
//!
//! **Whom an entry may be given to.** The importer, which turns blobs into layer images, reads hostile data and is not
//! trusted with other registries' layers. Therefore a layer that is in the store is given to a user only if the registry
//! *host* of his image is among the [`BlobRecord::origins`] of his image's blob and confirms that he may have the blob,
//! or after the blob has been fetched once more from that host, with his credentials, and has become the same bytes
//! ([`SealedLayer::proves`]; the EROFS writer is deterministic). So one registry can neither obtain nor change what
//! users of another one run, not even through an importer that it took over. Manifest records are kept per user for the
//! same reason. An image that a user has in a file of his own is read as a whole whatever the store has of it ([`local`]
//! says when it is not read again), and is no registry's word for anybody else.
//!
//! **Who locks what.** All locks are flock(2), never pids or timestamps, so they are free when their holder dies and work
//! between the nodes that share a store (NFS 3 and later, Lustre with `-o flock`, and other file systems with cluster-wide
//! flock).
//!
//! | lock | shared | exclusive |
//! |---|---|---|
//! | layer file | lease: whoever uses the layer, for as long as a descriptor is open | collector, just before it unlinks |
//! | `.tmp-*` | its writer | collector, just before it unlinks |
//! | `locks/HEX` | | the broker that fetches the layer |
//! | `locks/gc` | | the collector |
//!
//! After locking, every locker checks that the name still leads to the file that it locked, since a collector or the
//! previous holder may have unlinked it between open and flock. Nobody waits for a lock: fetch locks are tried again
//! while a broker does other work ([`crate::broker::import`]), which makes deadlocks impossible.

#![forbid(unsafe_code)]

mod dir;
mod gc;
mod layer;
mod local;
mod lock;
mod record;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};

use crate::image::digest::Digest;

pub use gc::{CollectReport, Goal, PinnedMounts, Watermark, Watermarks};
pub use layer::{LeasedLayer, NewLayer, SealedLayer};
pub use local::{FileIdentity, LocalKey, LocalRecord};
pub use lock::FetchLock;
pub use record::{BlobRecord, ManifestRecord, ReferenceRecord, StoredImage, now};

/// Content of the `version` file.
const VERSION: &str = "1\n";
/// Directories of a store, parents first.
const DIRECTORIES: [&str; 8] =
    ["layers", "layers/sha256", "blobs", "blobs/sha256", "configs", "configs/sha256", "confirmed", "locks"];

/// An open store.
#[derive(Debug)]
pub struct Store {
    root: OwnedFd,
    path: PathBuf,
}

/// Why the store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A system call failed.
    #[error("store: cannot {action} {}: {}{}", .path.display(), crate::sys::reason(.source), remedy(.source))]
    Io {
        /// What was tried: "open", "create".
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The directory belongs to somebody who could change it.
    #[error("store: {} belongs to uid {uid}, not to root: make it root's, or set another store directory", .path.display())]
    Owner {
        /// The store directory.
        path: PathBuf,
        /// Its owner.
        uid: u32,
    },
    /// The directory can be written by others than its owner.
    #[error("store: {} may be written by group or others (mode {mode:04o}): chmod go-w it", .path.display())]
    Writable {
        /// The store directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Made by another release.
    #[error("store: {} has version {found:?}, this pyxis knows only {:?}: use the pyxis that made it, or another store directory", .path.display(), VERSION.trim_end())]
    Version {
        /// The store directory.
        path: PathBuf,
        /// What the version file says.
        found: String,
    },
    /// The directory holds something else.
    #[error("store: {} is not empty and not a pyxis store (it holds {found:?}): set another store directory", .path.display())]
    Foreign {
        /// The store directory.
        path: PathBuf,
        /// One of its entries.
        found: String,
    },
    /// A new layer image has not the length that was announced.
    #[error("store: the image of layer {layer} has {found} bytes instead of {expected}")]
    Length {
        /// The layer's diffID.
        layer: Digest,
        /// Bytes announced.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// Somebody could still change a new layer image.
    #[error("store: the image of layer {layer} is still open for writing")]
    OpenForWriting {
        /// The layer's diffID.
        layer: Digest,
    },
    /// The same layer is there already, with other bytes.
    #[error(
        "store: layer {layer} is in the store with other content: if no pyxis of another release made it, somebody lied about it; remove it with `pyxis gc --all`"
    )]
    Differs {
        /// The layer's diffID.
        layer: Digest,
    },
    /// The collector keeps a layer locked for too long.
    #[error("store: layer {layer} is being removed and does not go away: try again, and see `pyxis doctor`")]
    Stuck {
        /// The layer's diffID.
        layer: Digest,
    },
    /// Another process collects already.
    #[error("store: another process is collecting in {} already", .path.display())]
    Collecting {
        /// The store directory.
        path: PathBuf,
    },
}

/// What to do about the errors that an admin can repair.
fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::ROFS) => "; the store must be writable to import images",
        Some(rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT) => "; free space there, or run `pyxis gc --all`",
        Some(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => {
            "; the store is for root, who needs full access to it"
        }
        _ => "",
    }
}

/// Results of this module.
pub type Result<T> = std::result::Result<T, StoreError>;

impl Store {
    /// Opens the store at `path`, and makes it if there is nothing yet.
    pub fn open(path: &Path) -> Result<Self> {
        let store = match Self::open_directory(path)? {
            Some(store) => store,
            None => {
                create_with_parents(path).map_err(|source| StoreError::Io {
                    action: "create",
                    path: path.to_owned(),
                    source,
                })?;
                Self::open_directory(path)?.ok_or_else(|| StoreError::Io {
                    action: "open",
                    path: path.to_owned(),
                    source: rustix::io::Errno::NOENT.into(),
                })?
            }
        };
        if !store.is_made()? {
            store.initialise()?;
        }
        Ok(store)
    }

    /// The store at `path`, if there is one. Changes nothing.
    pub fn examine(path: &Path) -> Result<Option<Self>> {
        let Some(store) = Self::open_directory(path)? else { return Ok(None) };
        if store.is_made()? {
            return Ok(Some(store));
        }
        store.refuse_foreign().map(|()| None)
    }

    /// The directory, which may be empty; `None` if it does not exist.
    fn open_directory(path: &Path) -> Result<Option<Self>> {
        let error =
            |action, errno: rustix::io::Errno| StoreError::Io { action, path: path.to_owned(), source: errno.into() };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let root = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(root) => root,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(error("open", errno)),
        };
        let stat = rustix::fs::fstat(&root).map_err(|errno| error("examine", errno))?;
        let mode = Mode::from_raw_mode(stat.st_mode);
        if stat.st_uid != 0 {
            return Err(StoreError::Owner { path: path.to_owned(), uid: stat.st_uid });
        }
        if mode.intersects(Mode::WGRP | Mode::WOTH) {
            return Err(StoreError::Writable { path: path.to_owned(), mode: mode.bits() });
        }
        Ok(Some(Self { root, path: path.to_owned() }))
    }

    /// Whether it is a store, of this version.
    fn is_made(&self) -> Result<bool> {
        match self.version()? {
            Some(version) if version == VERSION => Ok(true),
            Some(found) => {
                Err(StoreError::Version { path: self.path.clone(), found: found.trim_end().chars().take(40).collect() })
            }
            None => Ok(false),
        }
    }

    /// The directory that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn version(&self) -> Result<Option<String>> {
        let Some(file) = self.open_file("version")? else { return Ok(None) };
        let mut text = String::new();
        file.take(100).read_to_string(&mut text).map_err(|source| self.error("read", "version", source))?;
        Ok(Some(text))
    }

    /// A directory in which something else is kept does not become a store.
    fn refuse_foreign(&self) -> Result<()> {
        for name in self.list("")? {
            let ours = DIRECTORIES.contains(&name.as_str()) || name.starts_with(dir::TEMPORARY);
            // Another process may have finished just now; a file system of its own has lost+found; and named containers
            // are kept there by default.
            if !ours && !["version", "lost+found", "containers"].contains(&name.as_str()) {
                return Err(StoreError::Foreign { path: self.path.clone(), found: name });
            }
        }
        Ok(())
    }

    /// Makes the directories, then the version. Several processes may do it at once.
    fn initialise(&self) -> Result<()> {
        self.refuse_foreign()?;
        for directory in DIRECTORIES {
            self.make_directory(directory)?;
        }
        self.write_record("", "version", VERSION.as_bytes())
    }

    /// A read-only descriptor of the regular file `name`, a path relative to the store; `None` if there is none.
    fn open_file(&self, name: &str) -> Result<Option<File>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        match rustix::fs::openat(&self.root, name, flags, Mode::empty()) {
            Ok(file) => Ok(Some(file.into())),
            Err(rustix::io::Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.error("open", name, errno)),
        }
    }

    /// Whether `name` leads to the file that is open as `file`.
    fn leads_to(&self, name: &str, file: &rustix::fs::Stat) -> Result<bool> {
        match rustix::fs::statat(&self.root, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(stat.st_dev == file.st_dev && stat.st_ino == file.st_ino),
            Err(rustix::io::Errno::NOENT) => Ok(false),
            Err(errno) => Err(self.error("examine", name, errno)),
        }
    }

    fn error(&self, action: &'static str, name: &str, source: impl Into<io::Error>) -> StoreError {
        StoreError::Io { action, path: self.path.join(name), source: source.into() }
    }
}

/// Parents that do not exist become 0755, the store itself 0711, whatever the umask of the caller.
fn create_with_parents(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty())
        && !parent.exists()
    {
        create_directories(parent, Mode::from_raw_mode(0o755))?;
    }
    create_directories(path, Mode::from_raw_mode(0o711))
}

fn create_directories(path: &Path, mode: Mode) -> io::Result<()> {
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty())
        && !parent.exists()
    {
        create_directories(parent, mode)?;
    }
    match rustix::fs::mkdir(path, mode) {
        Ok(()) => Ok(rustix::fs::chmod(path, mode)?),
        // Another process was faster.
        Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether a directory entry is what it should be.
fn is_regular(stat: &rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
}

/// A number of things for people: `1 layer`, `2 layers`.
pub fn count(number: usize, noun: &str) -> String {
    format!("{number} {noun}{}", if number == 1 { "" } else { "s" })
}

/// Bytes for people: `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    let mut unit = "B";
    let mut scaled = bytes as f64;
    for larger in ["KiB", "MiB", "GiB", "TiB", "PiB"] {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{scaled:.1} {unit}") }
}

#[cfg(test)]
mod tests;
