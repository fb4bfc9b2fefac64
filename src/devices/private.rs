//! A `/dev` of the container's own, with what every Unix program expects and nothing of the host's hardware (behaviour
//! reference, section 17, `10-devices`): for `ENROOT_RESTRICT_DEV`, and for containers with an IPC namespace of their own,
//! whose shared memory and message queues live there.

#![forbid(unsafe_code)]

use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::mounts::apply::{ApplyError, apply};
use crate::mounts::entry::MountEntry;
use crate::mounts::rootdir::RootDir;
use crate::sys;
use crate::sys::mount::is_mount_root;

/// Device nodes that mean the same on every machine.
const NODES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// What the host may have, and shares if it has.
const OPTIONAL: [(&str, &str); 2] = [("hugepages", "x-create=dir"), ("log", "x-create=file")];
/// Name and target.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("ptmx", "pts/ptmx"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
];
/// More mounts one on the other than any host has on `/dev`.
const MAX_STACKED: usize = 32;

/// Why a container has no `/dev`.
#[derive(Debug, thiserror::Error)]
pub enum PrivateDevError {
    /// A mount.
    #[error(transparent)]
    Mount(#[from] ApplyError),
    /// What is there cannot be taken away.
    #[error("cannot take the host's /dev away: {}", sys::reason(.0))]
    Detach(Errno),
    /// A link.
    #[error("cannot make the link /dev/{name}: {}", sys::reason(.errno))]
    Link {
        /// Below `/dev`.
        name: &'static str,
        /// Why not.
        errno: Errno,
    },
}

/// The mounts, in order. With `own_ipc` shared memory and message queues are those of the caller's IPC namespace, else the
/// host's.
pub fn plan(own_ipc: bool) -> Vec<MountEntry> {
    let entry = |kind: &str, source: &str, target: &str, options: &str| {
        MountEntry::of_type(kind, source, target, options.split(',')).0
    };
    let mut entries = vec![
        entry("tmpfs", "tmpfs", "/dev", "x-create=dir,rw,nosuid,noexec,mode=755"),
        entry("devpts", "devpts", "/dev/pts", "x-create=dir,rw,nosuid,noexec,ptmxmode=0666,mode=620"),
    ];
    let bind = |name: &str, options: &str| {
        let path = format!("/dev/{name}");
        entry("none", &path, &path, &format!("bind,rw,nosuid,noexec,{options}"))
    };
    entries.extend(NODES.map(|name| bind(name, "x-create=file")));
    entries.extend(match own_ipc {
        true => [
            entry("tmpfs", "tmpfs", "/dev/shm", "x-create=dir,rw,nosuid,nodev,noexec,mode=1777"),
            entry("mqueue", "mqueue", "/dev/mqueue", "x-create=dir,rw,nosuid,nodev,noexec"),
        ],
        // Not every host has them.
        false => ["shm", "mqueue"].map(|name| bind(name, "nodev,x-create=dir,nofail,silent")),
    });
    entries.extend(OPTIONAL.map(|(name, create)| bind(name, &format!("{create},nofail,silent"))));
    entries
}

/// Gives the container below `root` a `/dev` of its own in place of whatever is mounted there.
pub fn mount(root: RootDir<'_>, own_ipc: bool) -> Result<(), PrivateDevError> {
    let detach = MountEntry::of_type("none", "umount", "/dev", ["x-detach"].into_iter()).0;
    for _ in 0..MAX_STACKED {
        match root.open(Path::new("/dev"), OFlags::PATH, Mode::empty()) {
            Ok(dev) if is_mount_root(&dev, Path::new("")).map_err(PrivateDevError::Detach)? => {}
            // An image without the directory, too.
            _ => break,
        }
        apply(root, Path::new("/"), &detach)?;
    }
    for entry in plan(own_ipc) {
        apply(root, Path::new("/"), &entry)?;
    }
    let dev = root
        .open(Path::new("/dev"), OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
        .map_err(PrivateDevError::Detach)?;
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, dev.as_fd(), name).map_err(|errno| PrivateDevError::Link { name, errno })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mounts::entry::{Action, Create};

    fn targets(plan: &[MountEntry]) -> Vec<&str> {
        plan.iter().map(|entry| entry.target.trim_start_matches("/dev").trim_start_matches('/')).collect()
    }

    #[test]
    fn standard_nodes_terminals_and_shared_memory() {
        let expected = [&["", "pts"], &NODES[..], &["shm", "mqueue", "hugepages", "log"]].concat();
        assert_eq!(targets(&plan(false)), expected);
        assert_eq!(targets(&plan(true)), expected);
    }

    #[test]
    fn devices_are_the_hosts_and_nothing_can_be_set_user_id() {
        for entry in plan(true) {
            assert_ne!(entry.set & libc::MOUNT_ATTR_NOSUID, 0, "{}", entry.target);
            assert_ne!(entry.set & libc::MOUNT_ATTR_NOEXEC, 0, "{}", entry.target);
            let node = NODES.iter().any(|name| entry.target == format!("/dev/{name}"));
            if node {
                assert_eq!((entry.action, entry.create), (Action::Bind { recursive: false }, Create::File));
                assert_eq!(entry.source, entry.target);
            }
        }
    }

    #[test]
    fn shared_memory_is_the_hosts_unless_ipc_is_the_containers() {
        let kind = |own_ipc, target| {
            let entry = plan(own_ipc).into_iter().find(|entry| entry.target == target).unwrap();
            (entry.action, entry.nofail)
        };
        let tmpfs = Action::New { kind: "tmpfs".into(), data: vec!["mode=1777".into()] };
        assert_eq!(kind(true, "/dev/shm"), (tmpfs, false));
        assert_eq!(kind(true, "/dev/mqueue"), (Action::New { kind: "mqueue".into(), data: vec![] }, false));
        assert_eq!(kind(false, "/dev/shm"), (Action::Bind { recursive: false }, true));
        assert_eq!(kind(false, "/dev/log"), (Action::Bind { recursive: false }, true));
    }
}
