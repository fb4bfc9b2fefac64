//! Files: what fcntl(2) knows about them.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Whether nobody on this machine has the file behind the read-only descriptor `file` open for writing: a read lease
/// can be had only then (fcntl(2), "Leases"). True where the file system has no leases.
///
/// The caller owns the file or has `CAP_LEASE`.
pub fn has_no_writer(file: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: F_SETLEASE takes an integer; the descriptor is open for the borrow's lifetime.
    let lease = |kind: libc::c_int| unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) };
    if lease(libc::F_RDLCK) == 0 {
        lease(libc::F_UNLCK);
        return Ok(true);
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::EAGAIN) => Ok(false),
        error if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(true),
        error => Err(error),
    }
}

/// Lets user `uid` list the directory, or read the file, that `fd` refers to, beside its owner (acl(5)); nobody else may.
pub fn let_read(fd: BorrowedFd<'_>, uid: u32) -> io::Result<()> {
    // <linux/posix_acl_xattr.h>: a version, then tag, permissions and id of each entry, in the order of the tags.
    const ANYBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 7, ANYBODY), // the owner
        (0x02, 5, uid),
        (0x04, 0, ANYBODY), // the group
        (0x10, 5, ANYBODY), // most that a named user or group may have
        (0x20, 0, ANYBODY), // others
    ];
    let mut list = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        list.extend(tag.to_le_bytes());
        list.extend(permissions.to_le_bytes());
        list.extend(id.to_le_bytes());
    }
    Ok(rustix::fs::fsetxattr(fd, "system.posix_acl_access", &list, rustix::fs::XattrFlags::empty())?)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_writer_is_noticed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let writer = File::create(&path).unwrap();
        let reader = File::open(&path).unwrap();
        assert!(!has_no_writer(reader.as_fd()).unwrap());
        let duplicate = writer.try_clone().unwrap();
        drop(writer);
        assert!(!has_no_writer(reader.as_fd()).unwrap());
        drop(duplicate);
        assert!(has_no_writer(reader.as_fd()).unwrap());
        // The lease was given back: it would make this open wait.
        drop(File::options().write(true).open(&path).unwrap());
    }
}
