//! What the store remembers of images that users have on the node: so that an archive or a squashfs file that has not
//! changed is not read again.
//!
//! A record belongs to the user who has shown that he has the bytes. It is found by what his own process says of the file,
//! which he could make up: that gives him nothing but the layers that he has shown already.

use rustix::fs::Stat;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::{Result, Store, now};
use crate::image::digest::Digest;
use crate::request::{Engine, LocalForm};

/// A file that was changed less than this many seconds ago may change again without a trace: a kernel's time stamps are
/// only as fine as its clock ticks, a file server's as coarse as seconds.
const SETTLED_SECONDS: i64 = 3;

/// A file in a certain state, as fstat(2) has it: whatever changes its content changes one of these.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    device: u64,
    inode: u64,
    size: u64,
    /// Seconds and nanoseconds.
    modified: (i64, u64),
    changed: (i64, u64),
}

impl FileIdentity {
    /// That of an open file. `None` if it was changed so lately that the next change may not show.
    pub fn of(stat: &Stat) -> Option<Self> {
        let age = i64::try_from(now()).unwrap_or(i64::MAX).saturating_sub(stat.st_ctime);
        (age >= SETTLED_SECONDS).then(|| Self {
            device: stat.st_dev,
            inode: stat.st_ino,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            modified: (stat.st_mtime, stat.st_mtime_nsec),
            changed: (stat.st_ctime, stat.st_ctime_nsec),
        })
    }
}

/// Which image of which file or engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalKey {
    /// A file: an archive, a squashfs file, or the index of an OCI layout, which names everything else by digest.
    File {
        /// The file.
        file: FileIdentity,
        /// As what it was read, if the user said so.
        form: Option<LocalForm>,
        /// Which of its images, if the user said so.
        name: Option<String>,
    },
    /// An image in an engine's storage.
    Engine {
        /// Whose.
        engine: Engine,
        /// What the engine calls its content.
        id: String,
    },
}

/// `confirmed/UID/local/HEX`: what a user's file or engine held.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LocalRecord {
    /// Where it was.
    pub key: LocalKey,
    /// Digest of the manifest, or of the config where there is no manifest.
    pub manifest: Digest,
    /// The image config.
    pub config: Digest,
    /// DiffIDs, lowest layer first.
    pub layers: Vec<Digest>,
    /// When: seconds since 1970.
    pub confirmed_at: u64,
}

impl Store {
    /// What `key` was when `uid` last showed it. Its layers need not be there any more.
    pub fn local(&self, uid: u32, key: &LocalKey) -> Result<Option<LocalRecord>> {
        let record: Option<LocalRecord> =
            self.read_json(&format!("confirmed/{uid}/local/{}", self.local_name(key)?))?;
        Ok(record.filter(|record| record.key == *key))
    }

    /// Notes that `uid` has shown every layer of `record`.
    pub fn confirm_local(&self, uid: u32, record: &LocalRecord) -> Result<()> {
        for directory in ["", "/local"] {
            self.make_directory(&format!("confirmed/{uid}{directory}"))?;
        }
        self.write_json(&format!("confirmed/{uid}/local"), &self.local_name(&record.key)?, record)
    }

    /// What to lock while a layer is made of `key` for `uid`.
    pub fn local_lock(&self, uid: u32, key: &LocalKey) -> Result<Digest> {
        Ok(Digest::from_bytes(Sha256::digest(format!("{uid} {}", self.local_name(key)?)).into()))
    }

    /// File name of a record. Nodes of several architectures may share a store.
    fn local_name(&self, key: &LocalKey) -> Result<String> {
        let key = serde_json::to_vec(&(std::env::consts::ARCH, key))
            .map_err(|source| self.error("write", "confirmed", source))?;
        Ok(Digest::from_bytes(Sha256::digest(key).into()).hex())
    }
}
