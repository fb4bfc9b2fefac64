//! The descriptor-based mount API: fsopen(2), fsmount(2), open_tree(2), move_mount(2), mount_setattr(2).
//!
//! rustix has all but the last; what is added here keeps the kernel's own explanation with the error.

use std::ffi::CString;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, StatVfsMountFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags,
};

/// A mount call that failed, with what the kernel logged about it.
#[derive(Debug, thiserror::Error)]
#[error("{call}: {}{}", super::reason(.source), Hint(.log))]
pub struct MountError {
    /// The system call and what it was about.
    pub call: String,
    /// The errno.
    pub source: io::Error,
    /// Messages of the file-system context, joined.
    pub log: String,
}

struct Hint<'a>(&'a String);

impl fmt::Display for Hint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() { Ok(()) } else { write!(f, " ({})", self.0) }
    }
}

impl MountError {
    /// `call` failed with `errno`.
    pub fn new(call: impl Into<String>, errno: Errno) -> Self {
        Self { call: call.into(), source: errno.into(), log: String::new() }
    }

    /// The errno.
    pub fn errno(&self) -> Option<Errno> {
        Errno::from_io_error(&self.source)
    }
}

/// A file system being configured (fsopen(2)).
#[derive(Debug)]
pub struct FsContext {
    fd: OwnedFd,
    name: String,
}

impl FsContext {
    /// Begins a new instance of file system `name`.
    pub fn open(name: &str) -> Result<Self, MountError> {
        let fd = rustix::mount::fsopen(name, FsOpenFlags::FSOPEN_CLOEXEC)
            .map_err(|errno| MountError::new(format!("fsopen({name})"), errno))?;
        Ok(Self { fd, name: name.to_owned() })
    }

    /// Sets `key=value`.
    pub fn set(&self, key: &str, value: &str) -> Result<(), MountError> {
        rustix::mount::fsconfig_set_string(&self.fd, key, value)
            .map_err(|errno| self.error(&format!("{key}={value}"), errno))
    }

    /// Sets the option `key`, which has no value.
    pub fn flag(&self, key: &str) -> Result<(), MountError> {
        rustix::mount::fsconfig_set_flag(&self.fd, key).map_err(|errno| self.error(key, errno))
    }

    /// Creates the file system and returns a detached mount of it.
    pub fn mount(self, attributes: MountAttrFlags) -> Result<OwnedFd, MountError> {
        rustix::mount::fsconfig_create(&self.fd).map_err(|errno| self.error("create", errno))?;
        rustix::mount::fsmount(&self.fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.error("mount", errno))
    }

    /// The error of step `step`; reads the context's log, whose end would overwrite errno.
    fn error(&self, step: &str, errno: Errno) -> MountError {
        let mut log = Vec::new();
        let mut buffer = [0; 1024];
        // ENODATA ends the log; the bound is for a kernel that would never end it.
        while let Ok(length) = rustix::io::read(&self.fd, &mut buffer) {
            if length == 0 || log.len() >= 8 {
                break;
            }
            let text = String::from_utf8_lossy(&buffer[..length]);
            // "e erofs: message": level and subsystem.
            log.push(text.trim().trim_start_matches(['e', 'w', 'i']).trim().to_owned());
        }
        MountError { call: format!("{} {step}", self.name), source: errno.into(), log: log.join("; ") }
    }
}

/// What [`set_attributes`] changes.
#[derive(Debug, Default)]
pub struct Attributes<'a> {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_PRIVATE`, `MS_SLAVE`, `MS_SHARED` or `MS_UNBINDABLE`; 0 leaves the propagation.
    pub propagation: u64,
    /// Maps owners through this user namespace (`MOUNT_ATTR_IDMAP`); the mount must be detached.
    pub user_namespace: Option<BorrowedFd<'a>>,
    /// Also every mount below.
    pub recursive: bool,
}

/// `MOUNT_ATTR_NOSYMFOLLOW` of <linux/mount.h> (Linux 5.14).
pub const NOSYMFOLLOW: u64 = 0x0020_0000;

/// Attributes, as statvfs(3) shows them, and as mount(2) takes them.
pub const FLAGS: [(u64, StatVfsMountFlags, MountFlags); 7] = [
    (libc::MOUNT_ATTR_RDONLY, StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
    (libc::MOUNT_ATTR_NOSUID, StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
    (libc::MOUNT_ATTR_NODEV, StatVfsMountFlags::NODEV, MountFlags::NODEV),
    (libc::MOUNT_ATTR_NOEXEC, StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    (libc::MOUNT_ATTR_NOATIME, StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
    (libc::MOUNT_ATTR_NODIRATIME, StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
    // ST_NOSYMFOLLOW and MS_NOSYMFOLLOW of the kernel, which libraries do not know.
    (NOSYMFOLLOW, StatVfsMountFlags::from_bits_retain(0x2000), MountFlags::from_bits_retain(0x100)),
];

/// Changes attributes of the mount that `mount` refers to. Before Linux 5.12 that has to be attached: a detached one gives
/// `ENOSYS` ([`attach_changed`]).
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: &Attributes<'_>) -> Result<(), Errno> {
    match mount_setattr(mount, Path::new(""), attributes) {
        Err(Errno::NOSYS) => remount(&path_of(mount), attributes),
        other => other,
    }
}

/// The same of the mount that is attached at `path`.
pub fn set_attributes_at(path: &Path, attributes: &Attributes<'_>) -> Result<(), Errno> {
    match mount_setattr(CWD, path, attributes) {
        Err(Errno::NOSYS) => remount(path, attributes),
        other => other,
    }
}

/// Has `change` set attributes of the detached mount `mount` and `attach` attach it: before Linux 5.12, which can change only
/// what is attached, the other way round.
pub fn attach_changed(
    mount: BorrowedFd<'_>,
    change: impl Fn() -> Result<(), Errno>,
    attach: impl FnOnce() -> Result<(), Errno>,
) -> Result<(), Errno> {
    match change() {
        Err(Errno::NOSYS) => {
            attach()?;
            change().inspect_err(|_| {
                let _ = rustix::mount::unmount(path_of(mount), UnmountFlags::DETACH);
            })
        }
        other => other.and_then(|()| attach()),
    }
}

/// A path for the calls that take no descriptor.
pub fn path_of(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/self/fd/{}", fd.as_raw_fd()).into()
}

/// What mount(2) can do in the place of mount_setattr(2).
fn remount(path: &Path, attributes: &Attributes<'_>) -> Result<(), Errno> {
    let &Attributes { set, clear, propagation, user_namespace, recursive } = attributes;
    if user_namespace.is_some() {
        return Err(Errno::NOSYS);
    }
    let not_attached = |errno| if errno == Errno::INVAL { Errno::NOSYS } else { errno };
    if set | clear != 0 {
        let flags = changed_flags(rustix::fs::statvfs(path)?.f_flag, set, clear);
        rustix::mount::mount_remount(path, flags | MountFlags::BIND, c"").map_err(not_attached)?;
    }
    let Ok(bits) = u32::try_from(propagation) else { return Err(Errno::INVAL) };
    if bits != 0 {
        let mut flags = MountPropagationFlags::from_bits_retain(bits);
        flags.set(MountPropagationFlags::REC, recursive);
        rustix::mount::mount_change(path, flags).map_err(not_attached)?;
    }
    Ok(())
}

/// All flags of a mount that has those of `current`: mount(2) takes away what is not named.
fn changed_flags(current: StatVfsMountFlags, set: u64, clear: u64) -> MountFlags {
    let stays = |(attribute, shown, _): &&(u64, StatVfsMountFlags, MountFlags)| {
        set & attribute != 0 || (clear & attribute == 0 && current.contains(*shown))
    };
    let flags = FLAGS.iter().filter(stays).fold(MountFlags::empty(), |flags, (.., flag)| flags | *flag);
    // How access times are kept is one value out of three; nothing said leaves it.
    if flags.contains(MountFlags::NOATIME) {
        return flags;
    }
    let relative = if clear & libc::MOUNT_ATTR__ATIME == 0 {
        current.contains(StatVfsMountFlags::RELATIME)
    } else {
        set & libc::MOUNT_ATTR_STRICTATIME == 0
    };
    flags | if relative { MountFlags::RELATIME } else { MountFlags::STRICTATIME }
}

fn mount_setattr(directory: impl AsFd, path: &Path, attributes: &Attributes<'_>) -> Result<(), Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
    let argument = libc::mount_attr {
        attr_set: attributes.set | attributes.user_namespace.map_or(0, |_| libc::MOUNT_ATTR_IDMAP),
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: attributes.user_namespace.map_or(0, |fd| fd.as_raw_fd().unsigned_abs().into()),
    };
    let recursive = if attributes.recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is NUL-terminated and outlives the call, as the argument does, whose size is passed with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_fd().as_raw_fd(),
            path.as_ptr(),
            libc::AT_EMPTY_PATH | recursive,
            &raw const argument,
            size_of_val(&argument),
        )
    };
    if result == 0 { Ok(()) } else { Err(last_errno()) }
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// A detached copy of the mount at `path` (relative to `directory`), with everything below it if `recursive`.
pub fn clone_tree(directory: BorrowedFd<'_>, path: &Path, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    flags.set(OpenTreeFlags::AT_EMPTY_PATH, path.as_os_str().is_empty());
    rustix::mount::open_tree(directory, path, flags)
}

/// Attaches the detached mount `mount` at `path`.
pub fn attach_at(mount: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    rustix::mount::move_mount(mount, "", CWD, path, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Attaches the detached mount `mount` over what `target` refers to: no path is walked.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::mount::move_mount(
        mount,
        "",
        target,
        "",
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH,
    )
}

/// Attaches the detached mount `mount` over the name `name` in `directory`: a symbolic link is covered, not followed.
pub fn attach_over(
    mount: BorrowedFd<'_>,
    directory: BorrowedFd<'_>,
    name: impl rustix::path::Arg,
) -> Result<(), Errno> {
    rustix::mount::move_mount(mount, "", directory, name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

/// Whether a mount is attached at `path` (relative to `directory`).
pub fn is_mount_root(directory: impl AsFd, path: &Path) -> Result<bool, Errno> {
    let mut flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW | rustix::fs::AtFlags::NO_AUTOMOUNT;
    flags.set(rustix::fs::AtFlags::EMPTY_PATH, path.as_os_str().is_empty());
    let status = rustix::fs::statx(directory, path, flags, rustix::fs::StatxFlags::empty())?;
    Ok(status.stx_attributes.bits() & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_a_mount_stay_unless_something_else_is_said() {
        use MountFlags as F;
        let current = StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV | StatVfsMountFlags::RELATIME;
        let kept = F::NOSUID | F::NODEV | F::RELATIME;
        assert_eq!(changed_flags(current, libc::MOUNT_ATTR_RDONLY, 0), kept | F::RDONLY);
        assert_eq!(changed_flags(current | StatVfsMountFlags::RDONLY, 0, libc::MOUNT_ATTR_RDONLY), kept);
        assert_eq!(changed_flags(current, 0, libc::MOUNT_ATTR_NODEV), F::NOSUID | F::RELATIME);
        let atime = |set| changed_flags(current, set, libc::MOUNT_ATTR__ATIME) - F::NOSUID - F::NODEV;
        assert_eq!(atime(libc::MOUNT_ATTR_NOATIME), F::NOATIME);
        assert_eq!(atime(libc::MOUNT_ATTR_STRICTATIME), F::STRICTATIME);
        assert_eq!(atime(libc::MOUNT_ATTR_RELATIME), F::RELATIME);
        assert_eq!(changed_flags(StatVfsMountFlags::NOATIME, 0, 0), F::NOATIME);
        assert_eq!(changed_flags(StatVfsMountFlags::empty(), NOSYMFOLLOW, 0).bits(), 0x100 | F::STRICTATIME.bits());
    }
}
