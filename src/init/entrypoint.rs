//! What has to be run in a container before the tasks join (behaviour reference, sections 3.10, 6.3 and 13.2), and the
//! probe that it is given to execute (`sys::probe`). The leading task runs it (`task/entrypoint.rs`).
//!
//! * An image with a config: its `Entrypoint`, if it is asked for. `Cmd` is what users replace by their command.
//! * A root filesystem that enroot made has `/etc/rc` instead, which goes to the working directory, sources
//!   `/etc/rc.local` and executes the entrypoint. It always runs, as users may have changed it; where the entrypoint is not
//!   asked for, a file that executes the arguments at once takes the place of `/etc/rc.local`, for this container and not
//!   in its root filesystem.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags};
use rustix::pipe::PipeFlags;

use super::Start;
use crate::enroot::conf::EnrootConf;
use crate::image::config::ImageConfig;
use crate::mounts::entry::Create;
use crate::mounts::rootdir::RootDir;
use crate::request::{ContainerEnv, Environment, StepRequest};
use crate::sys::mount::{FsContext, MountError, attach, clone_tree, is_mount_root};
use crate::sys::{memfile, probe};
use crate::task::protocol::Entrypoint;

/// What runs `/etc/rc`.
pub const SHELL: &str = "/bin/sh";
const RC: &str = "/etc/rc";
const RC_LOCAL: &str = "/etc/rc.local";
/// What [`override_rc_local`] shows there.
const RC_LOCAL_TEXT: &str = "# For this container only: go on without the image's entrypoint.\nexec \"$@\"\n";

/// The pipe and the program through which an entrypoint is noticed. Has to be kept until it has run.
#[derive(Debug)]
pub struct Probe {
    /// Where it reports: for the leading task.
    pub report: OwnedFd,
    _kept: (OwnedFd, Option<File>),
}

/// What to run, without its last arguments, in the container whose namespaces and root the caller has. `image` is `None` for a root filesystem that is described by files of
/// enroot's.
pub fn plan(
    start: &Start<'_>,
    image: Option<&ImageConfig>,
    conf: &EnrootConf,
    root: RootDir<'_>,
) -> Option<Entrypoint> {
    let request = start.request;
    let (program, words) = match image {
        Some(image) => {
            let program = image.entrypoint.first().filter(|_| request.entrypoint)?;
            (program.clone(), image.entrypoint.clone())
        }
        None => {
            if !has_rc(root) {
                return None;
            }
            // Login shells read `/etc/profile` and the user's own files: not unless somebody asks for it.
            let login = conf.switch("ENROOT_LOGIN_SHELL") == Some(true);
            let name = if login { "-sh" } else { SHELL };
            (SHELL.to_owned(), vec![name.to_owned(), RC.to_owned()])
        }
    };
    Some(Entrypoint {
        program,
        words,
        timeout_seconds: start.settings.entrypoint_timeout_seconds,
        requested: request.entrypoint,
        show_output: request.entrypoint && request.entrypoint_log,
    })
}

/// Adds to `environment`, the container's, what `--container-env` says: an entrypoint sees it.
pub fn add_named(environment: &mut Environment, request: &StepRequest, job: &Environment) {
    for item in &request.container_env {
        match item {
            ContainerEnv::FromHost(name) => {
                if let Some(value) = job.get(name).filter(|value| !value.is_empty()) {
                    environment.set(name.as_str(), value);
                }
            }
            ContainerEnv::Set(name, value) => environment.set(name.as_str(), value.as_str()),
        }
    }
}

/// Whether the root filesystem has a command script of enroot's kind.
fn has_rc(root: RootDir<'_>) -> bool {
    root.open(Path::new(RC), OFlags::PATH, Mode::empty())
        .and_then(rustix::fs::fstat)
        .is_ok_and(|status| status.st_mode & libc::S_IFMT == libc::S_IFREG)
}

/// Hides the `/etc/rc.local` of a root filesystem that has `/etc/rc` behind a file that executes the arguments, unless the
/// user has mounted one.
pub fn override_rc_local(root: RootDir<'_>) -> Result<(), MountError> {
    if !has_rc(root) {
        return Ok(());
    }
    let at = |what: &'static str| move |errno: Errno| MountError::new(format!("{what} {RC_LOCAL}"), errno);
    let target = root.mount_point(Path::new(RC_LOCAL), Create::File).map_err(at("mount on"))?;
    if is_mount_root(&target, Path::new("")).map_err(at("look at"))? {
        return Ok(());
    }
    // Only what is mounted somewhere can be bound: on the directory itself, where nothing sees it until it is gone again.
    let tmpfs = FsContext::open("tmpfs")?;
    tmpfs.set("source", "tmpfs")?;
    let tmpfs = tmpfs.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)?;
    let directory = root.open(Path::new("/etc"), OFlags::PATH, Mode::empty()).map_err(at("mount on"))?;
    attach(tmpfs.as_fd(), directory.as_fd()).map_err(at("mount on"))?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::openat(&tmpfs, "file", flags, Mode::from_raw_mode(0o644)).map_err(at("write"))?;
    File::from(file)
        .write_all(RC_LOCAL_TEXT.as_bytes())
        .map_err(|error| at("write")(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    let file = clone_tree(tmpfs.as_fd(), Path::new("file"), false).map_err(at("bind"))?;
    rustix::mount::unmount(format!("/proc/self/fd/{}", tmpfs.as_raw_fd()), UnmountFlags::DETACH).map_err(at("bind"))?;
    attach(file.as_fd(), target.as_fd()).map_err(at("mount on"))
}

impl Probe {
    /// The entrypoint, if there is one, with its probe.
    pub fn of(entrypoint: Option<Entrypoint>) -> io::Result<Option<(Entrypoint, Self)>> {
        let probed = |mut entrypoint| Self::new(&mut entrypoint).map(|probe| (entrypoint, probe));
        entrypoint.map(probed).transpose()
    }

    /// Makes the probe, and the arguments of `entrypoint` end with it. The entrypoint reaches it through this process's
    /// descriptors: it needs no place in the root filesystem, and entrypoints may close theirs.
    fn new(entrypoint: &mut Entrypoint) -> io::Result<Self> {
        let (report, write) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        let descriptors = match rustix::fs::readlink("/proc/self", Vec::new())?.into_string() {
            Ok(pid) => format!("/proc/{pid}/fd"),
            Err(error) => return Err(io::Error::other(error)),
        };
        let path = format!("{descriptors}/{}", write.as_raw_fd());
        let executable = match probe::executable(&CString::new(path.as_str())?) {
            Some(bytes) => {
                let file = memfile::executable("pyxis-probe", &bytes)?;
                entrypoint.words.push(format!("{descriptors}/{}", file.as_raw_fd()));
                Some(file)
            }
            None => {
                entrypoint.words.extend(["sh".to_owned(), "-c".to_owned(), probe::shell_script(&path)]);
                None
            }
        };
        Ok(Self { report, _kept: (write, executable) })
    }
}
