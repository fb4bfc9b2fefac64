//! Containers that have a name: those that are kept from step to step, and whichever run on this node.
//!
//! A kept container is an image's layers, which stay in the store, and an upper layer on a local disk (`[container] path`):
//!
//! ```text
//! /var/lib/pyxis/containers/           root's
//!   UID/                               the user's, 0700, and so is what is below it, except:
//!     pyxis_NAME/                      flock: exclusive while somebody decides what becomes of the container
//!       record                         root's, written last: what the container was made from
//!       upper/  work/                  of overlayfs; work/work is root's
//!     .removed-*/                      being deleted
//! ```
//!
//! Whose container it is, is a matter of file permissions: a user may list and delete his own without privilege, and
//! quotas and `du` count what he wrote. The broker, which works there as root, follows no symbolic link and takes no
//! other file for a record ([`record`]). Without a valid record there is no container, whatever else is there: so one
//! that is half made, by a step that was killed, never counts.
//!
//! What runs is registered in memory, also unnamed containers, as `pyxis_JOBID.STEPID` ([`running`]).

pub mod collect;
pub mod kept;
pub mod name;
pub mod record;
pub mod remove;
pub mod running;

use std::cell::OnceCell;
use std::collections::HashSet;
use std::io;
use std::path::Path;

use crate::image::digest::Digest;
use crate::rootfs::layers::LayerMounts;
use crate::store::PinnedMounts;
use kept::Containers;
pub use name::{FullName, InvalidName};

/// What the collector of the store has to know of this node: its shared mounts, and the layers of kept containers, which
/// stay although nobody leases them. (On another node that shares the store they may go: then they are imported again.)
#[derive(Debug)]
pub struct InUse<'a> {
    mounts: &'a LayerMounts,
    path: &'a Path,
    kept: OnceCell<HashSet<Digest>>,
}

impl<'a> InUse<'a> {
    /// Containers are kept in `path`.
    pub fn new(mounts: &'a LayerMounts, path: &'a Path) -> Self {
        Self { mounts, path, kept: OnceCell::new() }
    }
}

impl PinnedMounts for InUse<'_> {
    fn release(&self, layer: &Digest) -> io::Result<()> {
        self.mounts.release(layer)
    }

    fn is_kept(&self, layer: &Digest) -> bool {
        // Read when the first layer is to go: most collections find nothing to do.
        self.kept.get_or_init(|| layers_of_all(self.path)).contains(layer)
    }
}

/// The layers of every container in `path`. What cannot be read is no container.
fn layers_of_all(path: &Path) -> HashSet<Digest> {
    let mut found = HashSet::new();
    let Ok(Some(containers)) = Containers::open(path) else { return found };
    for uid in containers.users().unwrap_or_default() {
        let Ok(Some(user)) = containers.user(uid) else { continue };
        for name in user.all_names().unwrap_or_default() {
            if let Ok(Some(record)) = user.read(&name) {
                found.extend(record.layers());
            }
        }
    }
    found
}
