//! Executes one [`MountEntry`]: by descriptors, so that no path is walked twice.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags};

use super::entry::{Action, Create, MountEntry};
use super::rootdir::RootDir;
use crate::sys;
use crate::sys::mount::{Attributes, FsContext, attach, clone_tree, set_attributes};

/// A mount that failed, in the words of `enroot-mount`.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The target.
    #[error("failed to resolve path: {target}: {}", sys::reason(.errno))]
    Resolve {
        /// As the user wrote it.
        target: String,
        /// Why.
        errno: Errno,
    },
    /// The mount.
    #[error("failed to {verb}: {source_path} at {target}: {}", sys::reason(.errno))]
    Mount {
        /// `mount` or `unmount`.
        verb: &'static str,
        /// As the user wrote it.
        source_path: String,
        /// As the user wrote it.
        target: String,
        /// Why.
        errno: Errno,
    },
}

/// Does what `entry` says below `root`. Relative sources are relative to `cwd`, a host path.
pub fn apply(root: RootDir<'_>, cwd: &Path, entry: &MountEntry) -> Result<(), ApplyError> {
    match try_apply(root, cwd, entry) {
        Err(_) if entry.nofail => Ok(()),
        other => other,
    }
}

fn try_apply(root: RootDir<'_>, cwd: &Path, entry: &MountEntry) -> Result<(), ApplyError> {
    let failed = |verb| {
        move |errno| ApplyError::Mount { verb, source_path: entry.source.clone(), target: entry.target.clone(), errno }
    };
    let target = |create| {
        root.mount_point(Path::new(&entry.target), create)
            .map_err(|errno| ApplyError::Resolve { target: entry.target.clone(), errno })
    };
    match &entry.action {
        Action::Bind { recursive } => {
            let source = cwd.join(&entry.source);
            let tree = clone_tree(CWD.as_fd(), &source, *recursive).map_err(failed("mount"))?;
            let target = target(match entry.create {
                Create::Auto if is_directory(tree.as_fd()).map_err(failed("mount"))? => Create::Directory,
                Create::Auto => Create::File,
                other => other,
            })?;
            set_flags(tree.as_fd(), entry).map_err(failed("mount"))?;
            attach(tree.as_fd(), target.as_fd()).map_err(failed("mount"))
        }
        Action::Tmpfs { data } => {
            let target = target(match entry.create {
                Create::Auto => Create::Directory,
                other => other,
            })?;
            let mount = tmpfs(data).map_err(|error| failed("mount")(error.errno().unwrap_or(Errno::IO)))?;
            set_flags(mount.as_fd(), entry).map_err(failed("mount"))?;
            attach(mount.as_fd(), target.as_fd()).map_err(failed("mount"))
        }
        Action::Detach => {
            let target = target(Create::No)?;
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&target));
            rustix::mount::unmount(path, UnmountFlags::DETACH).map_err(failed("unmount"))
        }
    }
}

/// Flags on the topmost mount only: what a bind brought with it keeps its own.
fn set_flags(mount: std::os::fd::BorrowedFd<'_>, entry: &MountEntry) -> Result<(), Errno> {
    if entry.set | entry.clear != 0 {
        let attributes = Attributes { set: entry.set, clear: entry.clear, ..Attributes::default() };
        match set_attributes(mount, &attributes) {
            // What the host's mount forbids stays forbidden, and its access times stay as they are: in a user namespace
            // both are locked. Ours is added.
            Err(Errno::PERM) => {
                let set = entry.set & !(libc::MOUNT_ATTR__ATIME | libc::MOUNT_ATTR_NODIRATIME);
                set_attributes(mount, &Attributes { set, ..Attributes::default() })?;
            }
            other => other?,
        }
    }
    for &(propagation, recursive) in &entry.propagation {
        set_attributes(mount, &Attributes { propagation, recursive, ..Attributes::default() })?;
    }
    Ok(())
}

fn tmpfs(data: &[String]) -> Result<std::os::fd::OwnedFd, sys::mount::MountError> {
    let context = FsContext::open("tmpfs")?;
    context.set("source", "tmpfs")?;
    for option in data {
        match option.split_once('=') {
            Some((key, value)) => context.set(key, value)?,
            None => context.flag(option)?,
        }
    }
    context.mount(MountAttrFlags::empty())
}

fn is_directory(fd: std::os::fd::BorrowedFd<'_>) -> Result<bool, Errno> {
    let status = rustix::fs::statat(fd, "", AtFlags::EMPTY_PATH)?;
    Ok(FileType::from_raw_mode(status.st_mode) == FileType::Directory)
}

/// The absolute sources of `entries` that do not exist, looked up as the caller.
pub fn missing_sources(entries: &[MountEntry]) -> Vec<PathBuf> {
    entries
        .iter()
        .filter(|entry| matches!(entry.action, Action::Bind { .. }) && entry.source.starts_with('/'))
        .filter(|entry| matches!(rustix::fs::stat(&entry.source), Err(Errno::NOENT | Errno::NOTDIR)))
        .map(|entry| PathBuf::from(&entry.source))
        .collect()
}
