//! Executes one [`MountEntry`]: by descriptors, so that no path is walked twice.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, OpenTreeFlags, UnmountFlags};

use super::entry::{self, Action, Create, MountEntry};
use super::rootdir::RootDir;
use crate::sys;
use crate::sys::mount::{Attributes, FLAGS, FsContext, attach, attach_changed, clone_tree, path_of, set_attributes};

/// A mount that failed, in the words of `enroot-mount`.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The target.
    #[error("enroot-mount: failed to resolve path: {target}: {}", sys::reason(.errno))]
    Resolve {
        /// As the user wrote it.
        target: String,
        /// Why.
        errno: Errno,
    },
    /// The mount.
    #[error("enroot-mount: failed to {verb}: {source_path} at {target}: {}", sys::reason(.errno))]
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
///
/// An entry with `nofail` may fail: then the reason is returned, unless it is `silent` too.
pub fn apply(root: RootDir<'_>, cwd: &Path, entry: &MountEntry) -> Result<Option<ApplyError>, ApplyError> {
    match try_apply(root, cwd, entry) {
        Ok(()) => Ok(None),
        Err(error) if entry.nofail => Ok((!entry.quiet).then_some(error)),
        Err(error) => Err(error),
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
    let directory_if_auto = match entry.create {
        Create::Auto => Create::Directory,
        other => other,
    };
    match &entry.action {
        Action::Bind { recursive } => {
            let source = cwd.join(&entry.source);
            let clone = || clone_tree(CWD.as_fd(), &source, *recursive).map_err(failed("mount"));
            let (tree, target) = match entry.create {
                Create::Auto => {
                    let tree = clone()?;
                    let is_directory = is_directory(tree.as_fd()).map_err(failed("mount"))?;
                    let create = if is_directory { Create::Directory } else { Create::File };
                    (tree, target(create)?)
                }
                Create::No => (clone()?, target(Create::No)?),
                // An image's volume is a bind of what has just been made on itself.
                create => {
                    let target = target(create)?;
                    (clone()?, target)
                }
            };
            attach_with_flags(tree.as_fd(), target.as_fd(), entry).map_err(failed("mount"))
        }
        Action::New { kind, data } => {
            let target = target(directory_if_auto)?;
            let mount = new_file_system(kind, &entry.source, data)
                .map_err(|error| failed("mount")(error.errno().unwrap_or(Errno::IO)))?;
            attach_with_flags(mount.as_fd(), target.as_fd(), entry).map_err(failed("mount"))
        }
        Action::Remount { bind: true, .. } => set_flags(target(Create::No)?.as_fd(), entry).map_err(failed("mount")),
        Action::Remount { bind: false, data } => {
            let target = target(Create::No)?;
            remount(target.as_fd(), entry, data).map_err(failed("mount"))?;
            set_propagation(target.as_fd(), entry).map_err(failed("mount"))
        }
        Action::Move => {
            let source = cwd.join(&entry.source);
            let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC;
            let mount = rustix::mount::open_tree(CWD, &source, flags).map_err(failed("mount"))?;
            let target = target(directory_if_auto)?;
            attach(mount.as_fd(), target.as_fd()).map_err(failed("mount"))?;
            set_propagation(mount.as_fd(), entry).map_err(failed("mount"))
        }
        Action::Propagate => set_propagation(target(directory_if_auto)?.as_fd(), entry).map_err(failed("mount")),
        Action::Detach => {
            let target = target(Create::No)?;
            rustix::mount::unmount(path_of(target.as_fd()), UnmountFlags::DETACH).map_err(failed("unmount"))
        }
    }
}

fn attach_with_flags(mount: BorrowedFd<'_>, target: BorrowedFd<'_>, entry: &MountEntry) -> Result<(), Errno> {
    attach_changed(mount, || set_flags(mount, entry), || attach(mount, target))
}

/// Flags on the topmost mount only: what a bind brought with it keeps its own.
fn set_flags(mount: BorrowedFd<'_>, entry: &MountEntry) -> Result<(), Errno> {
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
    set_propagation(mount, entry)
}

fn set_propagation(mount: BorrowedFd<'_>, entry: &MountEntry) -> Result<(), Errno> {
    for &(propagation, recursive) in &entry.propagation {
        set_attributes(mount, &Attributes { propagation, recursive, ..Attributes::default() })?;
    }
    Ok(())
}

/// `MS_REMOUNT` of a whole file system. Flags that the entry does not name stay; a kernel that refuses to give up one
/// that is locked is asked to keep them all.
fn remount(target: BorrowedFd<'_>, entry: &MountEntry, data: &[String]) -> Result<(), Errno> {
    let current = rustix::fs::fstatvfs(target)?.f_flag;
    let flags = |keep_all: bool| {
        let wanted = FLAGS.iter().filter(|(attribute, present, _)| {
            entry.set & attribute != 0 || (current.contains(*present) && (keep_all || entry.clear & attribute == 0))
        });
        let mut flags = wanted.fold(MountFlags::empty(), |flags, (.., flag)| flags | *flag);
        for (name, flag) in
            [("sync", MountFlags::SYNCHRONOUS), ("dirsync", MountFlags::DIRSYNC), ("lazytime", MountFlags::LAZYTIME)]
        {
            flags.set(flag, data.iter().any(|option| option == name));
        }
        flags
    };
    let is_flag = |option: &&String| !entry::OF_FILE_SYSTEM.contains(&option.as_str());
    let data: Vec<&str> = data.iter().filter(is_flag).map(String::as_str).collect();
    let data = data.join(",");
    match rustix::mount::mount_remount(path_of(target), flags(false), data.as_str()) {
        Err(Errno::PERM) => rustix::mount::mount_remount(path_of(target), flags(true), data.as_str()),
        other => other,
    }
}

fn new_file_system(kind: &str, source: &str, data: &[String]) -> Result<OwnedFd, sys::mount::MountError> {
    let context = FsContext::open(kind)?;
    context.set("source", source)?;
    for option in data {
        match option.split_once('=') {
            Some((key, value)) => context.set(key, value)?,
            None => context.flag(option)?,
        }
    }
    context.mount(MountAttrFlags::empty())
}

fn is_directory(fd: BorrowedFd<'_>) -> Result<bool, Errno> {
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
