//! What this kernel can do, found by doing it: the steps of a container start on an empty image, one by one.
//!
//! For `pyxis doctor`. Everything happens in a forked process in a mount namespace of its own and is gone with it.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags};
use rustix::process::WaitOptions;
use rustix::thread::UnshareFlags;

use super::kernel::Kernel;
use super::layers::LayerMounts;
use super::overlay::{self, Upper};
use crate::erofs::owner;
use crate::image::digest::Digest;
use crate::import::{LayerLimits, write_layer};
use crate::namespaces;
use crate::request::User;
use crate::store::LeasedLayer;
use crate::sys;
use crate::sys::process::{Forked, exit_now, fork};

/// The end of a tar archive: an empty layer.
const EMPTY_TAR: [u8; 1024] = [0; 1024];
/// Whom the probe's files belong to: nobody.
const NOBODY: User = User { uid: 65534, gid: 65534, groups: Vec::new() };

/// Mounts an empty image from a file in `store` as a container's root, in a directory below `runtime`.
///
/// The error is a line that names the step which failed. Single-threaded callers only.
pub fn container_root(store: &Path, runtime: &Path) -> Result<Kernel, String> {
    let works = |idmapped| in_child(|| try_root(store, runtime, idmapped));
    match works(true) {
        Ok(()) => Ok(Kernel { idmapped_layers: true }),
        Err(error) => works(false).map(|()| Kernel { idmapped_layers: false }).map_err(|_| error),
    }
}

/// Tries whether `directory`, in which nothing else is touched, can hold overlayfs's upper layers.
///
/// As [`container_root`] in everything else.
pub fn upper_layers(directory: &Path) -> Result<(), String> {
    let own = directory.join(format!(".probe-{}", std::process::id()));
    let tried = in_child(|| try_upper(&own));
    // In this process: the mount is gone with the child.
    let _ = std::fs::remove_dir_all(&own);
    tried
}

fn in_child(attempt: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    let (mut result, mut report) = io::pipe().map_err(sys::reason)?;
    // SAFETY: the caller has one thread.
    match unsafe { fork(0) }.map_err(sys::reason)? {
        Forked::Child => {
            drop(result);
            let text = attempt().err().unwrap_or_default();
            let _ = report.write_all(text.as_bytes());
            exit_now(0)
        }
        Forked::Parent(child) => {
            drop(report);
            let mut text = String::new();
            result.read_to_string(&mut text).map_err(sys::reason)?;
            let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()));
            match (text.is_empty(), status.ok().flatten().and_then(|(_, status)| status.exit_status())) {
                (true, Some(0)) => Ok(()),
                (true, _) => Err("the probe ended unexpectedly".into()),
                (false, _) => Err(text),
            }
        }
    }
}

fn try_upper(own: &Path) -> Result<(), String> {
    let step = |what: &'static str| move |error: io::Error| format!("{what}: {}", sys::reason(error));
    private_mounts()?;
    for name in ["l/removed", "u", "w", "m"] {
        std::fs::create_dir_all(own.join(name)).map_err(step("directory"))?;
    }
    std::env::set_current_dir(own).map_err(step("directory"))?;
    let options = c"lowerdir=l,upperdir=u,workdir=w,index=off";
    rustix::mount::mount("pyxis", "m", "overlay", MountFlags::empty(), options)
        .map_err(|errno| step("overlay")(errno.into()))?;
    // Takes a device node and a trusted attribute.
    std::fs::remove_dir("m/removed").map_err(step("whiteout"))?;
    std::fs::create_dir("m/removed").map_err(step("opaque directory"))
}

fn private_mounts() -> Result<(), String> {
    let step = |what: &'static str| move |errno: Errno| format!("{what}: {}", sys::reason(errno));
    // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("mount namespace"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("mount propagation"))
}

fn try_root(store: &Path, runtime: &Path, idmapped: bool) -> Result<(), String> {
    let step = |what: &'static str| move |error: io::Error| format!("{what}: {}", sys::reason(error));
    private_mounts()?;
    // Hides the real one, whose layers this must not touch.
    std::fs::create_dir_all(runtime).map_err(step("runtime directory"))?;
    rustix::mount::mount("pyxis", runtime, "tmpfs", MountFlags::empty(), None)
        .map_err(|errno| step("tmpfs")(errno.into()))?;
    let file = tempfile_in(store).map_err(step("file in the store"))?;
    let limits = LayerLimits { max_bytes: 1 << 20, max_entries: 1 };
    write_layer(&EMPTY_TAR[..], &file, &limits).map_err(|error| error.to_string())?;
    let (file, idmap) = if idmapped {
        (file, Some(namespaces::idmap(&NOBODY).map_err(step("user namespace"))?))
    } else {
        let copy = tempfile_in(store).map_err(step("file in the store"))?;
        owner::give(&file, &copy, NOBODY.uid, NOBODY.gid, 1).map_err(|error| error.to_string())?;
        (copy, None)
    };
    let layer = LeasedLayer { diff_id: Digest::from_bytes([0; 32]), file };
    let mounts = LayerMounts::open(runtime).map_err(|error| error.to_string())?;
    let root = overlay::mount(&mounts, overlay::Lower::Layers(&[layer]), idmap.as_ref(), &NOBODY, Upper::Scratch(None))
        .map_err(|error| error.to_string())?;
    let owner = rustix::fs::statat(root.as_fd(), "", rustix::fs::AtFlags::EMPTY_PATH)
        .map_err(|errno| step("root directory")(errno.into()))?;
    match owner.st_uid == NOBODY.uid {
        true => Ok(()),
        false => Err("overlay ignores the idmapped mounts of the layers (it needs Linux 5.19)".into()),
    }
}

fn tempfile_in(directory: &Path) -> io::Result<std::fs::File> {
    use rustix::fs::{Mode, OFlags};
    Ok(rustix::fs::open(directory, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR)?.into())
}
