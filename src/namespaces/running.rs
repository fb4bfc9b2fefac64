//! Entering the namespaces of a running container, as its user (setns(2)): whoever may signal container init and owns its
//! user namespace may do so, without privilege on the host.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, WaitOptions};
use rustix::thread::{CapabilitySet, ThreadNameSpaceType};

use crate::request::User;
use crate::sys::channel::{self, Channel};
use crate::sys::mount::clone_tree;
use crate::sys::process::{Forked, become_user_keeping, die_with_parent, exit_now, fork};

/// The kinds of namespaces a container may have of its own, with their names in `/proc/PID/ns`.
const KINDS: [(ThreadNameSpaceType, &str); 5] = [
    (ThreadNameSpaceType::USER, "user"),
    (ThreadNameSpaceType::CONTROL_GROUP, "cgroup"),
    (ThreadNameSpaceType::INTER_PROCESS_COMMUNICATION, "ipc"),
    (ThreadNameSpaceType::HOST_NAME_AND_NIS_DOMAIN_NAME, "uts"),
    (ThreadNameSpaceType::NETWORK, "net"),
];

/// Moves the calling process, which is the container's user and holds `CAP_SYS_ADMIN`, into all namespaces of process
/// `pid`, which `pidfd` refers to. Returns those that are not the caller's own.
pub fn enter_all(pid: i32, pidfd: BorrowedFd<'_>) -> io::Result<ThreadNameSpaceType> {
    let mut namespaces = ThreadNameSpaceType::MOUNT;
    for (kind, file) in KINDS {
        let identity = |process: &str| {
            rustix::fs::stat(format!("/proc/{process}/ns/{file}")).map(|status| (status.st_dev, status.st_ino))
        };
        match (identity(&pid.to_string()), identity("self")) {
            (Ok(its), Ok(own)) if its == own => {}
            // Unknown to this kernel.
            (_, Err(Errno::NOENT)) => {}
            (its, own) => {
                its.and(own)?;
                namespaces |= kind;
            }
        }
    }
    rustix::thread::move_into_thread_name_spaces(pidfd, namespaces)?;
    Ok(namespaces)
}

/// Moves the calling process, which has one thread and is the container's user, into the user and mount namespaces of
/// process `pid`. Returns a detached clone of their root mount, without what is mounted below.
pub fn enter_root(pid: i32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(Errno::SRCH)?;
    let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
    match rustix::thread::move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::USER) {
        // It is there already: a step's leading task has entered it.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    rustix::thread::move_into_thread_name_spaces(pidfd.as_fd(), ThreadNameSpaceType::MOUNT)?;
    Ok(clone_tree(CWD.as_fd(), Path::new("/"), false)?)
}

/// A detached clone of the root mount of the container that the process behind `pidfd` belongs to, which is `user`'s:
/// without what is mounted below. `None` if the process has ended.
pub fn clone_root(pidfd: BorrowedFd<'_>, user: &User) -> io::Result<Option<OwnedFd>> {
    let (ours, theirs) = channel::pair::<(), Found>()?;
    let broker = rustix::process::getpid();
    // SAFETY: the broker has one thread.
    match unsafe { fork(0) }? {
        Forked::Child => {
            let found = clone_inside(pidfd, user, broker);
            let _ = match &found {
                Ok(root) => theirs.send(&Found::Root, &[root.as_fd()]),
                Err(error) => theirs.send(&Found::Nothing(error.raw_os_error().unwrap_or(libc::EIO)), &[]),
            };
            exit_now(0)
        }
        Forked::Parent(child) => {
            drop(theirs);
            let received = receive(&ours, child);
            match received? {
                (Found::Root, mut root) => Ok(root.pop()),
                (Found::Nothing(libc::ESRCH), _) => Ok(None),
                (Found::Nothing(errno), _) => Err(io::Error::from_raw_os_error(errno)),
            }
        }
    }
}

#[derive(Debug, serde::Serialize, serde::Deserialize)]
enum Found {
    Root,
    /// An error number.
    Nothing(i32),
}

fn receive(channel: &Channel<(), Found>, child: Pid) -> io::Result<(Found, Vec<OwnedFd>)> {
    let received = channel.receive();
    rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))?;
    received?.ok_or_else(|| io::Error::other("the process that looked ended"))
}

fn clone_inside(pidfd: BorrowedFd<'_>, user: &User, broker: Pid) -> io::Result<OwnedFd> {
    become_user_keeping(user, CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_CHROOT)?;
    die_with_parent(broker)?;
    rustix::thread::move_into_thread_name_spaces(pidfd, ThreadNameSpaceType::MOUNT)?;
    let root = clone_tree(CWD.as_fd(), Path::new("/"), false)?;
    // Whatever else the user has mounted there.
    if rustix::fs::fstatfs(&root)?.f_type != libc::OVERLAYFS_SUPER_MAGIC {
        return Err(Errno::INVAL.into());
    }
    Ok(root)
}
