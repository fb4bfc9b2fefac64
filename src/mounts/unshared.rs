//! What a container with namespaces of its own (`--container-unshare`) has to see in place of the host's: devices of its
//! network below `/sys`, its own shared memory and message queues.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::entry::Create;
use super::rootdir::RootDir;
use crate::request::Unshare;
use crate::sys::mount::{FsContext, MountError, attach, clone_tree};

const CGROUPS: &str = "/sys/fs/cgroup";
const HARDENED: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Mounts the file systems that show the caller's namespaces, over those of the host that are mounted already.
pub fn mount(root: RootDir<'_>, kinds: Unshare) -> Result<(), MountError> {
    if kinds.net {
        network(root)?;
    }
    if kinds.ipc {
        shared_memory(root)?;
    }
    Ok(())
}

/// `/sys/class/net` belongs to the network namespace of whoever mounted sysfs.
fn network(root: RootDir<'_>) -> Result<(), MountError> {
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

/// POSIX shared memory and message queues. System V's need no mount.
fn shared_memory(root: RootDir<'_>) -> Result<(), MountError> {
    let tmpfs = FsContext::open("tmpfs")?;
    tmpfs.set("source", "tmpfs")?;
    tmpfs.set("mode", "1777")?;
    let mqueue = FsContext::open("mqueue")?;
    mqueue.set("source", "mqueue")?;
    for (path, mount) in [("/dev/shm", tmpfs.mount(HARDENED)?), ("/dev/mqueue", mqueue.mount(HARDENED)?)] {
        match root.mount_point(Path::new(path), Create::No) {
            Ok(target) => attach(mount.as_fd(), target.as_fd())
                .map_err(|errno| MountError::new(format!("mount on {path}"), errno))?,
            // The host has no such directory, and its /dev is not ours to change.
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(MountError::new(format!("mount on {path}"), errno)),
        }
    }
    Ok(())
}
