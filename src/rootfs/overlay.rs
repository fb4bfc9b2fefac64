//! The overlay of one container (kernel documentation, filesystems/overlayfs): idmapped clones of the shared layer mounts
//! below, a scratch layer on top.
//!
//! Every layer is named by the path of an attached mount, in a namespace of the broker's own, because that works on every
//! kernel that can do it at all (overlay takes detached mounts only from 6.15), and by relative names of one to three
//! digits, because all of them together must fit into one page.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

use super::layers::{LayerMountError, LayerMounts, mount_point};
use crate::request::User;
use crate::store::LeasedLayer;
use crate::sys::mount::{Attributes, FsContext, MountError, attach_at, clone_tree, set_attributes};

/// Most lower layers overlay takes (`OVL_MAX_STACK`).
pub const MAX_LAYERS: usize = 500;

/// Why there is no root filesystem.
#[derive(Debug, thiserror::Error)]
pub enum OverlayError {
    /// The layers.
    #[error(transparent)]
    Layers(#[from] LayerMountError),
    /// A step of the overlay.
    #[error("cannot make the root filesystem: {0}")]
    Mount(#[from] MountError),
    /// More than [`MAX_LAYERS`].
    #[error("cannot make the root filesystem: the image has {0} layers, overlayfs takes {MAX_LAYERS}")]
    TooManyLayers(usize),
}

/// Makes the root filesystem of a container of `user`'s and returns it as a detached mount.
///
/// `idmap` is a user namespace that maps 0 to the user: so the root-owned files of the layers become his. The calling,
/// single-threaded process is in another mount namespace afterwards and must not use host paths any more.
pub fn mount(
    mounts: &LayerMounts,
    layers: &[LeasedLayer],
    idmap: &OwnedFd,
    user: &User,
    scratch_size: Option<&str>,
) -> Result<OwnedFd, OverlayError> {
    let layers = topmost_first(layers);
    if layers.len() > MAX_LAYERS {
        return Err(OverlayError::TooManyLayers(layers.len()));
    }
    mounts.enter(&layers)?;
    // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("unshare"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("private mounts"))?;

    let scratch = scratch_layer(user, scratch_size)?;
    let workspace = Path::new("/scratch");
    attach_new(&scratch, workspace)?;
    rustix::process::chdir(workspace).map_err(step("chdir"))?;

    for (index, layer) in layers.iter().enumerate() {
        let clone = clone_tree(CWD.as_fd(), &mount_point(layer), false).map_err(step("open_tree"))?;
        let attributes = Attributes { user_namespace: Some(idmap.as_fd()), ..Attributes::default() };
        set_attributes(clone.as_fd(), &attributes).map_err(step("idmapped mount"))?;
        attach_new(&clone, Path::new(&index.to_string()))?;
        if index == 0 {
            inherit_root_attributes(&clone).map_err(step("attributes of /"))?;
        }
    }
    let lower: Vec<String> = (0..layers.len()).map(|index| index.to_string()).collect();
    // volatile: the upper layer never outlives the container, so nothing is gained by syncing it.
    let options = format!("lowerdir={},upperdir=u,workdir=w,volatile,redirect_dir=on", lower.join(":"));
    rustix::fs::mkdir("m", Mode::from_raw_mode(0o700)).map_err(step("mkdir"))?;
    let options = std::ffi::CString::new(options).map_err(|_| step("options")(Errno::INVAL))?;
    rustix::mount::mount("pyxis", "m", "overlay", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())
        .map_err(step("overlay (the reason may be in the kernel log)"))?;
    Ok(clone_tree(CWD.as_fd(), Path::new("m"), false).map_err(step("open_tree"))?)
}

/// The layers as overlay wants them. Of a layer that occurs twice only the upper one counts, as if it had been applied
/// again, and overlay does not take the same directory twice.
fn topmost_first(layers: &[LeasedLayer]) -> Vec<&LeasedLayer> {
    let mut seen = std::collections::HashSet::new();
    layers.iter().rev().filter(|layer| seen.insert(layer.diff_id)).collect()
}

fn step(call: &'static str) -> impl Fn(Errno) -> MountError {
    move |errno| MountError::new(call, errno)
}

/// A detached tmpfs with the directories `u` (upper, the user's) and `w` (work).
fn scratch_layer(user: &User, size: Option<&str>) -> Result<OwnedFd, MountError> {
    let context = FsContext::open("tmpfs")?;
    context.set("source", "pyxis")?;
    context.set("mode", "700")?;
    if let Some(size) = size {
        context.set("size", size)?;
    }
    let mount = context.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    for name in ["u", "w"] {
        rustix::fs::mkdirat(&mount, name, Mode::from_raw_mode(0o755)).map_err(step("mkdir"))?;
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    rustix::fs::chownat(&mount, "u", Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(step("chown"))?;
    Ok(mount)
}

/// The merged root directory has the attributes of the upper one: give it those of the image's.
fn inherit_root_attributes(top: &OwnedFd) -> Result<(), Errno> {
    let status = rustix::fs::fstat(top)?;
    rustix::fs::chmodat(CWD, "u", Mode::from_raw_mode(status.st_mode & 0o7777), AtFlags::empty())?;
    let modified = Timespec { tv_sec: status.st_mtime, tv_nsec: status.st_mtime_nsec.cast_signed() };
    let times = Timestamps { last_access: modified, last_modification: modified };
    rustix::fs::utimensat(CWD, "u", &times, AtFlags::SYMLINK_NOFOLLOW)
}

fn attach_new(mount: &OwnedFd, path: &Path) -> Result<(), MountError> {
    match rustix::fs::mkdir(path, Mode::from_raw_mode(0o700)) {
        Err(Errno::EXIST) => {}
        other => other.map_err(step("mkdir"))?,
    }
    attach_at(mount.as_fd(), path).map_err(step("move_mount"))
}

/// Directory on the host at which container init attaches the root before it enters it: empty, root's.
pub fn attach_point(runtime: &Path) -> PathBuf {
    runtime.join("root")
}
