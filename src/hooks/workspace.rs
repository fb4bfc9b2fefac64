//! What hooks find beside the root filesystem: the files they append to and the library they source, in a tmpfs that only
//! the container's own namespace shows and that is gone with the hooks.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use rustix::mount::MountAttrFlags;

use crate::enroot::{HOST_PATH, read_file};
use crate::request::Environment;
use crate::sys::mount::{FsContext, attach_at};

/// `common.sh`, which hooks source.
const COMMON: &str = include_str!("../../packaging/enroot/common.sh");
/// `argv[0]` of the program that hooks mount with; see [`super::mount`].
pub const ENROOT_MOUNT: &str = "enroot-mount";
/// Most bytes hooks may write to one of their files.
const MAX_FILE: u64 = 4 << 20;

/// The directory and its files.
#[derive(Debug)]
pub struct Workspace {
    directory: PathBuf,
}

impl Workspace {
    /// Where it is mounted: a directory that the broker makes.
    pub fn mount_point(runtime: &Path) -> PathBuf {
        runtime.join("hooks")
    }

    /// Covers the directory with an empty file system that nobody else sees.
    pub fn cover(runtime: &Path) -> io::Result<PathBuf> {
        let directory = Self::mount_point(runtime);
        let tmpfs = || {
            let tmpfs = FsContext::open("tmpfs")?;
            tmpfs.set("source", "tmpfs")?;
            tmpfs.set("mode", "700")?;
            tmpfs.set("size", "32m")?;
            tmpfs.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)
        };
        let mount = tmpfs().map_err(io::Error::other)?;
        attach_at(mount.as_fd(), &directory)?;
        Ok(directory)
    }

    /// Mounts and fills it. `environ` is what [`Workspace::environ`] begins with.
    pub fn create(runtime: &Path, environ: &[u8]) -> io::Result<Self> {
        let workspace = Self { directory: Self::cover(runtime)? };
        fs::write(workspace.path("environ"), environ)?;
        fs::write(workspace.path("mounts"), "")?;
        fs::write(workspace.path("common.sh"), COMMON)?;
        symlink(std::env::current_exe()?, workspace.path(ENROOT_MOUNT))?;
        Ok(workspace)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Says in a hook's environment where everything is.
    pub fn announce(&self, environment: &mut Environment) {
        for (name, path) in [
            ("ENROOT_ENVIRON", self.path("environ")),
            ("ENROOT_MOUNTS", self.path("mounts")),
            ("ENROOT_LIBRARY_PATH", self.directory.clone()),
            ("ENROOT_RUNTIME_PATH", self.directory.clone()),
        ] {
            environment.set(name, path.to_string_lossy().as_bytes());
        }
        environment.set("PATH", format!("{}:{HOST_PATH}", self.directory.display()));
    }

    /// What the hooks have made of their environ file.
    pub fn environ(&self) -> io::Result<Vec<u8>> {
        self.read("environ")
    }

    /// The fstab lines that the hooks have appended.
    pub fn mounts(&self) -> io::Result<Vec<u8>> {
        self.read("mounts")
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        Ok(read_file(&self.path(name), MAX_FILE)?.map(|(text, _)| text).unwrap_or_default())
    }
}
