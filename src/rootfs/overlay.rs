//! The overlay of one container (kernel documentation, filesystems/overlayfs): idmapped clones of the shared layer mounts
//! below, a scratch layer on top.
//!
//! Every layer is named by the path of an attached mount, in a namespace of the broker's own, because that works on every
//! kernel that can do it at all (overlay takes detached mounts only from 6.15), and by relative names of one to three
//! digits, because all of them together must fit into one page.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Gid, Mode, OFlags, Timespec, Timestamps, Uid};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags};
use rustix::thread::UnshareFlags;

use super::layers::{LayerMountError, LayerMounts, mount_point};
use crate::request::User;
use crate::store::LeasedLayer;
use crate::sys::mount::{
    Attributes, FsContext, MountError, NOSYMFOLLOW, attach_at, clone_tree, set_attributes, set_attributes_at,
};

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

/// What a container's writes go to.
#[derive(Debug)]
pub enum Upper<'a> {
    /// A tmpfs that goes with the container; with this size, as tmpfs takes it.
    Scratch(Option<&'a str>),
    /// The directories [`UPPER`](kept::UPPER) and [`WORK`](kept::WORK) in a directory of the user's.
    Kept {
        /// The directory.
        directory: BorrowedFd<'a>,
        /// Whether nothing has been written there yet.
        new: bool,
    },
}

/// What is below.
#[derive(Debug)]
pub enum Lower<'a> {
    /// Layers of the store.
    Layers(&'a [LeasedLayer]),
    /// A detached mount in which everything is the user's already.
    Mount(&'a OwnedFd),
}

/// Makes the root filesystem of a container of `user`'s and returns it as a detached mount.
///
/// `idmap` is a user namespace that maps 0 to the user: so the root-owned files of the layers become his; without one they
/// are his already. The calling,
/// single-threaded process is in another mount namespace afterwards and must not use host paths any more.
pub fn mount(
    mounts: &LayerMounts,
    lower: Lower<'_>,
    idmap: Option<&OwnedFd>,
    user: &User,
    upper: Upper<'_>,
) -> Result<OwnedFd, OverlayError> {
    let layers = match lower {
        Lower::Layers(layers) => topmost_first(layers),
        Lower::Mount(_) => Vec::new(),
    };
    if layers.len() > MAX_LAYERS {
        return Err(OverlayError::TooManyLayers(layers.len()));
    }
    // In the namespace that the directory is in.
    let kept = match upper {
        Upper::Scratch(_) => None,
        Upper::Kept { directory, .. } => Some(clone_tree(directory, Path::new(""), false).map_err(step("open_tree"))?),
    };
    mounts.enter(&layers)?;
    // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("unshare"))?;
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("private mounts"))?;

    let size = match upper {
        Upper::Scratch(size) => size,
        Upper::Kept { .. } => Some("1m"),
    };
    let workspace = Path::new("/scratch");
    attach_new(&scratch_layer(user, size)?, workspace)?;
    rustix::process::chdir(workspace).map_err(step("chdir"))?;
    if let Some(kept) = &kept {
        // Its user can rename what is in it at any moment, so that no link may be followed there, wherever it leads.
        attach_new(kept, Path::new("k"))?;
        let set = NOSYMFOLLOW | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
        let attributes = Attributes { set, ..Attributes::default() };
        set_attributes_at(Path::new("k"), &attributes).map_err(step("mount_setattr"))?;
    }
    let (upper_path, new, options) = match upper {
        // volatile: the upper layer never outlives the container, so nothing is gained by syncing it.
        Upper::Scratch(_) => ("u", true, "upperdir=u,workdir=w,volatile,redirect_dir=on"),
        // Not volatile: it has to outlive the node's crash, and an fsync in the container means something. So the kernel
        // syncs the upper layer's file system when the last process has left, which is init: no task waits for that, only
        // the next step of that name.
        // What index adds would tie the upper layer to one mount of its lower ones, and leaves files that are not the user's.
        Upper::Kept { new, .. } => ("k/upper", new, "upperdir=k/upper,workdir=k/work,redirect_dir=on,index=off"),
    };

    let attach_lower = |index: usize, mount: &OwnedFd| {
        attach_new(mount, Path::new(&index.to_string()))?;
        if index == 0 && new {
            inherit_root_attributes(mount, upper_path).map_err(step("attributes of /"))?;
        }
        Ok::<(), MountError>(())
    };
    for (index, layer) in layers.iter().enumerate() {
        let clone = clone_tree(CWD.as_fd(), &mount_point(layer), false).map_err(step("open_tree"))?;
        if let Some(idmap) = idmap {
            show_as(&clone, idmap)?;
        }
        attach_lower(index, &clone)?;
    }
    let mut count = layers.len();
    if let Lower::Mount(mount) = lower {
        attach_lower(0, mount)?;
        count = 1;
    }
    let lower: Vec<String> = (0..count).map(|index| index.to_string()).collect();
    let options = format!("lowerdir={},{options}", lower.join(":"));
    rustix::fs::mkdir("m", Mode::from_raw_mode(0o700)).map_err(step("mkdir"))?;
    let options = std::ffi::CString::new(options).map_err(|_| step("options")(Errno::INVAL))?;
    rustix::mount::mount("pyxis", "m", "overlay", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str()).map_err(
        step(match kept {
            None => "overlay (the reason may be in the kernel log)",
            Some(_) => {
                "overlay (container.path must be on a file system that can hold upper layers, such as ext4 or xfs)"
            }
        }),
    )?;
    Ok(clone_tree(CWD.as_fd(), Path::new("m"), false).map_err(step("open_tree"))?)
}

/// Shows the root-owned files of a detached mount as those of the user of `idmap`.
pub fn show_as(mount: &OwnedFd, idmap: &OwnedFd) -> Result<(), MountError> {
    let attributes = Attributes { user_namespace: Some(idmap.as_fd()), ..Attributes::default() };
    set_attributes(mount.as_fd(), &attributes).map_err(step("idmapped mount"))
}

/// The layers as overlay wants them. Of a layer that occurs twice only the upper one counts, as if it had been applied
/// again, and overlay does not take the same directory twice.
fn topmost_first(layers: &[LeasedLayer]) -> Vec<&LeasedLayer> {
    let mut seen = std::collections::HashSet::new();
    layers.iter().rev().filter(|layer| seen.insert(layer.diff_id)).collect()
}

pub(super) fn step(call: &'static str) -> impl Fn(Errno) -> MountError {
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
pub(super) fn inherit_root_attributes(top: &OwnedFd, upper: &str) -> Result<(), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let upper = rustix::fs::open(upper, flags, Mode::empty())?;
    let status = rustix::fs::fstat(top)?;
    rustix::fs::fchmod(&upper, Mode::from_raw_mode(status.st_mode & 0o7777))?;
    let modified = Timespec { tv_sec: status.st_mtime, tv_nsec: status.st_mtime_nsec.cast_signed() };
    rustix::fs::futimens(&upper, &Timestamps { last_access: modified, last_modification: modified })
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
