//! What a container with a network namespace of its own (`--container-unshare=net`) has to see in place of the host's:
//! the devices of its network below `/sys`.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::mount::MountAttrFlags;

use super::entry::Create;
use super::rootdir::RootDir;
use crate::sys::mount::{FsContext, MountError, attach, clone_tree};

const CGROUPS: &str = "/sys/fs/cgroup";
const HARDENED: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Mounts a new sysfs over the host's: `/sys/class/net` belongs to the network namespace of whoever mounted it.
pub fn mount_sysfs(root: RootDir<'_>) -> Result<(), MountError> {
    // A host that hides parts of its own sysfs (a pod, mostly) lets nobody mount a whole one: there the container goes on
    // to see the host's, whose interfaces it cannot use.
    let sysfs = FsContext::open("sysfs")?;
    sysfs.set("source", "sysfs")?;
    let Ok(sys) = sysfs.mount(HARDENED | MountAttrFlags::MOUNT_ATTR_RDONLY) else {
        return Ok(());
    };
    let at = |path: &'static str| move |errno| MountError::new(format!("mount on {path}"), errno);
    let target = root.mount_point(Path::new("/sys"), Create::Directory).map_err(at("/sys"))?;
    attach(sys.as_fd(), target.as_fd()).map_err(at("/sys"))?;
    // A new sysfs comes without the hierarchies. What of them is shown is decided later.
    match clone_tree(CWD.as_fd(), Path::new(CGROUPS), true) {
        Ok(cgroups) => {
            let target = root.mount_point(Path::new(CGROUPS), Create::No).map_err(at(CGROUPS))?;
            attach(cgroups.as_fd(), target.as_fd()).map_err(at(CGROUPS))
        }
        Err(_) => Ok(()),
    }
}
