//! The root filesystem over a squashfs file that a FUSE server reads ([`crate::squashfuse`]): everything is mounted by the
//! job's user in his own namespaces (overlay there: Linux 5.11).

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, UnmountFlags};

use super::overlay::{inherit_root_attributes, step};
use crate::sys::mount::{FsContext, MountError, attach_at, clone_tree};

/// Where the kernel and FUSE servers meet.
pub const DEVICE: &str = "/dev/fuse";

/// Makes the root filesystem and returns it as a detached mount; a tmpfs of `scratch_size` takes what is written. `owner`
/// is the user inside his namespace. `workspace` is an empty directory of the host, which is the working directory
/// afterwards. `serve` has the server answer on the device that it is given.
pub fn mount<E: From<MountError>>(
    owner: (u32, u32),
    scratch_size: Option<&str>,
    workspace: &Path,
    serve: impl FnOnce(OwnedFd) -> Result<(), E>,
) -> Result<OwnedFd, E> {
    let (lower, device) = lower(owner)?;
    let make = || -> Result<(), MountError> {
        let context = FsContext::open("tmpfs")?;
        context.set("source", "pyxis")?;
        context.set("mode", "700")?;
        if let Some(size) = scratch_size {
            context.set("size", size)?;
        }
        let scratch = context.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
        attach_at(scratch.as_fd(), workspace).map_err(step("move_mount"))?;
        rustix::process::chdir(workspace).map_err(step("chdir"))?;
        for name in ["u", "w", "l", "m"] {
            rustix::fs::mkdir(name, Mode::from_raw_mode(0o755)).map_err(step("mkdir"))?;
        }
        attach_at(lower.as_fd(), Path::new("l")).map_err(step("move_mount"))
    };
    make()?;
    serve(device)?;
    // From here on the kernel asks the server.
    let finish = || -> Result<OwnedFd, MountError> {
        inherit_root_attributes(&lower, "u").map_err(step("read the squashfs file through FUSE"))?;
        // volatile: the upper layer never outlives the container.
        let options = c"lowerdir=l,upperdir=u,workdir=w,userxattr,volatile";
        let flags = MountFlags::NOSUID | MountFlags::NODEV;
        rustix::mount::mount("pyxis", "m", "overlay", flags, options)
            .map_err(step("overlay in the user's namespace, which needs Linux 5.11"))?;
        let root = clone_tree(CWD.as_fd(), Path::new("m"), false).map_err(step("open_tree"))?;
        // The overlay has what it needs of it.
        rustix::mount::unmount(".", UnmountFlags::DETACH).map_err(step("umount"))?;
        rustix::process::chdir(workspace).map_err(step("chdir"))?;
        Ok(root)
    };
    Ok(finish()?)
}

/// A detached FUSE mount, and the device on which its server answers.
fn lower(owner: (u32, u32)) -> Result<(OwnedFd, OwnedFd), MountError> {
    let device =
        rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(step("open /dev/fuse"))?;
    let context = FsContext::open("fuse")?;
    context.set("source", "squashfs")?;
    context.set("fd", &device.as_raw_fd().to_string())?;
    context.set("rootmode", "40000")?;
    context.set("user_id", &owner.0.to_string())?;
    context.set("group_id", &owner.1.to_string())?;
    context.flag("default_permissions")?;
    // In this user namespace: there is nobody else.
    context.flag("allow_other")?;
    let attributes =
        MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    Ok((context.mount(attributes)?, device))
}

/// Whether `user` could use FUSE: the device is his to open, and tmpfs holds what overlay notes for users.
pub fn is_usable(user: &crate::request::User) -> bool {
    // Opening it loads the module where that is one.
    let opened = rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
    opened.and_then(|device| rustix::fs::fstat(&device)).is_ok_and(|status| {
        let (read, write) = (0o4, 0o2);
        let granted = if user.uid == 0 {
            read | write
        } else if status.st_uid == user.uid {
            status.st_mode >> 6
        } else if status.st_gid == user.gid || user.groups.contains(&status.st_gid) {
            status.st_mode >> 3
        } else {
            status.st_mode
        };
        granted & (read | write) == read | write
    }) && tmpfs_has_user_attributes()
}

/// Since Linux 6.6. Without them a directory cannot be made where the image had one that was removed.
fn tmpfs_has_user_attributes() -> bool {
    let set = || -> Result<(), Errno> {
        let file = rustix::fs::memfd_create("pyxis-probe", rustix::fs::MemfdFlags::CLOEXEC)?;
        rustix::fs::fsetxattr(&file, "user.pyxis", b"", rustix::fs::XattrFlags::empty())
    };
    set().is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_memory_file_tells_what_tmpfs_can() {
        // What the rest of this suite runs on has it, or the FUSE tests could not.
        assert!(tmpfs_has_user_attributes());
    }
}
