//! A squashfs file becomes a layer.

use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use super::Session;
use crate::broker::import::{ImportError, ImportEvent};
use crate::image::digest::Digest;
use crate::importer::protocol::{Command, Report};
use crate::store::{FetchLock, LeasedLayer};

impl<'a> Session<'a, '_> {
    /// Takes the lock `name`, or `None` after a short time if somebody else has it.
    pub fn try_lock(&mut self, name: &Digest) -> Result<Option<FetchLock<'a>>, ImportError> {
        let lock = self.store.try_lock(name)?;
        if lock.is_none() {
            self.pause()?;
        }
        Ok(lock)
    }

    /// Has the importer make a layer of `file`, which has `size` bytes. Whatever the store has is compared with it: nobody
    /// but the bytes shows that the user has them.
    pub fn convert(&mut self, file: OwnedFd, size: u64) -> Result<LeasedLayer, ImportError> {
        // Saturates at the bounds of u64.
        self.ensure_space((size as f64 * self.settings.space_factor) as u64)?;
        let new = self.store.new_layer()?;
        self.active = Instant::now();
        let command = Command::Convert { limits: self.settings.limits };
        let sent = self.importer.channel.send(&command, &[file.as_fd(), new.as_fd()]);
        drop(file);
        self.sent(sent)?;
        let mut received = 0_u64;
        loop {
            let Some((report, _)) = self.next_report(None)? else { continue };
            match report {
                Report::Progress { layer: 0, bytes } => {
                    if bytes > 0 {
                        self.active = Instant::now();
                    }
                    // Of what it unpacks to, which is more than the file.
                    received = received.saturating_add(bytes).min(size);
                    (self.events)(ImportEvent::Progress { layer: 0, bytes: received, total: size });
                }
                Report::Converted { content, image } => return Ok(new.seal(&content, image)?.publish()?),
                other => return Err(self.unexpected(&other)),
            }
        }
    }
}
