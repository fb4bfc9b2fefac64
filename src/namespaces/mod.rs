//! Namespaces: of a container (user_namespaces(7) and those that `--container-unshare` asks for), and the user namespaces
//! of idmapped mounts.

pub mod running;

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags};
use rustix::process::WaitOptions;
use rustix::thread::UnshareFlags;

use crate::request::{Unshare, User};
use crate::sys::network;
use crate::sys::process::{Forked, exit_now, fork};

/// A user namespace in which 0 is `user`, for `MOUNT_ATTR_IDMAP` (mount_setattr(2)): no process lives in it.
pub fn idmap(user: &User) -> io::Result<OwnedFd> {
    let (wait, release) = io::pipe()?;
    // SAFETY: the broker has one thread.
    match unsafe { fork(libc::CLONE_NEWUSER) }? {
        Forked::Child => {
            drop(release);
            let _ = io::Read::read(&mut &wait, &mut [0]);
            exit_now(0)
        }
        Forked::Parent(child) => {
            drop(wait);
            let process = format!("/proc/{}", child.as_raw_nonzero());
            let namespace = fs::write(format!("{process}/uid_map"), format!("0 {} 1\n", user.uid))
                .and_then(|()| fs::write(format!("{process}/gid_map"), format!("0 {} 1\n", user.gid)))
                .and_then(|()| {
                    let path = format!("{process}/ns/user");
                    Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
                });
            drop(release);
            rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))?;
            namespace
        }
    }
}

/// Moves the calling process, which is `user` and holds `CAP_SYS_ADMIN`, into new user and mount namespaces, with one
/// uid and one gid: the user's own, or 0 with `remap_root`.
///
/// With that capability it works also where the host restricts *unprivileged* user namespaces.
pub fn enter_container(user: &User, remap_root: bool) -> io::Result<()> {
    // SAFETY: neither namespace changes a descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS)? };
    // Changing the uid made the process undumpable, and its /proc files root's.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)?;
    let inside = |id| if remap_root { 0 } else { id };
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{} {} 1\n", inside(user.uid), user.uid))?;
    fs::write("/proc/self/gid_map", format!("{} {} 1\n", inside(user.gid), user.gid))
}

/// Moves the calling process into the namespaces that `--container-unshare` asks for; they belong to its user namespace.
/// The error comes with the kind that could not be made, as users call it.
pub fn unshare(kinds: Unshare) -> Result<(), (&'static str, io::Error)> {
    for (wanted, flag, kind) in [
        (kinds.net, UnshareFlags::NEWNET, "network namespace"),
        (kinds.ipc, UnshareFlags::NEWIPC, "IPC namespace"),
        (kinds.uts, UnshareFlags::NEWUTS, "UTS namespace"),
    ] {
        if wanted {
            // SAFETY: none of them changes a descriptor or memory of this single-threaded process.
            unsafe { rustix::thread::unshare_unsafe(flag) }.map_err(|errno| (kind, errno.into()))?;
        }
    }
    if kinds.net {
        network::bring_up_loopback().map_err(|error| ("loopback interface", error))?;
    }
    Ok(())
}
