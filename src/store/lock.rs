//! Single flight: who fetches a layer holds the lock with its name.

use std::fs::File;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::{Result, Store};
use crate::image::digest::Digest;

/// Name of the collector's lock, which no layer can have.
pub(super) const COLLECTOR: &str = "locks/gc";

/// The right to fetch one layer, or to collect. Free again when dropped or when the process ends.
#[derive(Debug)]
pub struct FetchLock<'a> {
    store: &'a Store,
    name: String,
    file: File,
}

impl Store {
    /// Takes the lock of `layer` if nobody has it. Never waits.
    pub fn try_lock(&self, layer: &Digest) -> Result<Option<FetchLock<'_>>> {
        self.try_lock_file(format!("locks/{}", layer.hex()))
    }

    /// Whether somebody holds the lock of `layer` right now. Changes nothing.
    pub fn is_locked(&self, layer: &Digest) -> Result<bool> {
        let name = format!("locks/{}", layer.hex());
        let Some(file) = self.open_file(&name)? else { return Ok(false) };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
            Ok(()) => Ok(false),
            Err(Errno::WOULDBLOCK) => Ok(true),
            Err(errno) => Err(self.error("lock", &name, errno)),
        }
    }

    /// Whether files of the store can be locked at all.
    pub fn try_locks(&self) -> Result<()> {
        let Some(file) = self.open_file("version")? else { return Ok(()) };
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared)
            .map_err(|errno| self.error("lock", "version", errno))
    }

    pub(super) fn try_lock_file(&self, name: String) -> Result<Option<FetchLock<'_>>> {
        loop {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = rustix::fs::openat(&self.root, &name, flags, Mode::RUSR | Mode::WUSR)
                .map_err(|errno| self.error("open", &name, errno))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => return Ok(None),
                Err(errno) => return Err(self.error("lock", &name, errno)),
            }
            let stat = rustix::fs::fstat(&file).map_err(|errno| self.error("examine", &name, errno))?;
            // The previous holder unlinks the name before it lets go: then this lock is on a file that nobody finds.
            if self.leads_to(&name, &stat)? {
                return Ok(Some(FetchLock { store: self, name, file: file.into() }));
            }
        }
    }
}

impl Drop for FetchLock<'_> {
    fn drop(&mut self) {
        // A name that stays is harmless, and the collector finds it. The unlock is explicit because a process forked
        // meanwhile may have a duplicate of the descriptor.
        let _ = self.store.unlink(&self.name);
        let _ = rustix::fs::flock(&self.file, FlockOperation::Unlock);
    }
}
