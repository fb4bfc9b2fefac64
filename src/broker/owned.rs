//! The user's own layers, on kernels whose overlayfs does not take idmapped ones: copies in which everything is his.
//!
//! A copy is in the store under a name of its own, is leased and collected like any other layer, and is made once for each
//! user. Who reads the image is a process of the account for imports, as everywhere: the broker opens the files.

use std::fs::File;
use std::os::fd::AsFd;

use sha2::{Digest as _, Sha256};

use super::Step;
use super::error::{BrokerError, failed};
use super::import;
use crate::erofs::owner;
use crate::image::digest::Digest;
use crate::importer::confine::confine;
use crate::request::User;
use crate::store::{LeasedLayer, Store};
use crate::sys::process::{close_all_but, run_as};

impl Step<'_> {
    /// Copies of `layers`.
    pub(super) fn of_the_user(&self, layers: &[LeasedLayer]) -> Result<Vec<LeasedLayer>, BrokerError> {
        if layers.is_empty() {
            return Ok(Vec::new());
        }
        let store = Store::open(&self.config.store.path).map_err(failed("image store"))?;
        layers.iter().map(|layer| self.copy(&store, layer)).collect()
    }

    fn copy(&self, store: &Store, layer: &LeasedLayer) -> Result<LeasedLayer, BrokerError> {
        let user = &self.request.user;
        let name = name_of_copy(&layer.diff_id, user);
        let stored = failed("image store");
        let _lock = loop {
            let lock = store.try_lock(&name).map_err(&stored)?;
            if let Some(copy) = store.lease(&name).map_err(&stored)? {
                return Ok(copy);
            }
            if let Some(lock) = lock {
                break lock;
            }
            self.patience().wait(None)?;
        };
        tracing::info!("copying layer {} for uid {}: this kernel has no idmapped layers", layer.diff_id, user.uid);
        let new = store.new_layer().map_err(&stored)?;
        let target = File::from(new.as_fd().try_clone_to_owned().map_err(failed("copy of a layer"))?);
        let service = import::service_identity(&self.config.import.user, user.uid, &mut |_| {})
            .map_err(failed("copy of a layer"))?;
        let limit = self.config.import.max_layer_entries;
        // SAFETY: the broker has one thread.
        let copied = unsafe {
            run_as(&service, || {
                close_all_but(&[layer.file.as_fd(), target.as_fd()]).is_ok()
                    && confine().is_ok()
                    && owner::give(&layer.file, &target, user.uid, user.gid, limit).is_ok()
            })
        };
        drop(target);
        let length = layer.file.metadata().map_err(failed("copy of a layer"))?.len();
        if !matches!(copied, Ok(true)) {
            let hint = "is there space in the store?";
            return Err(BrokerError::Start(format!("cannot copy layer {} for the user: {hint}", layer.diff_id)));
        }
        let sealed = new.seal(&name, length).map_err(&stored)?;
        sealed.publish().map_err(&stored)
    }
}

/// No layer's diffID: those are digests of archives.
fn name_of_copy(layer: &Digest, user: &User) -> Digest {
    Digest::from_bytes(Sha256::digest(format!("{layer} of {}:{}", user.uid, user.gid)).into())
}
