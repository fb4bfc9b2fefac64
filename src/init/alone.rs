//! A container for `pyxis start`: furnished as that of a step, by the process that then becomes the command. There is no
//! broker and no root; the namespaces are made by the user himself, where the host lets him.

mod image;

pub use image::ImageServer;

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountPropagationFlags, UnmountFlags};
use rustix::thread::UnshareFlags;

use super::entrypoint;
use super::furnish::{Furnished, Furnisher, Outside};
use super::site::Site;
use super::{InitError, Start, pivot, step};
use crate::devices::access::DeviceAccess;
use crate::devices::nvidia::inventory;
use crate::hooks::workspace::Workspace;
use crate::image::config::ImageConfig;
use crate::mounts::entry::Create;
use crate::mounts::fstab::Fstab;
use crate::mounts::rootdir::RootDir;
use crate::namespaces;
use crate::request::Environment;
use crate::rootfs::identity::HostUser;
use crate::rootfs::{cgroups, overlay};
use crate::sys::mount::{Attributes, FsContext, attach, attach_at, attach_changed, set_attributes, set_attributes_at};
use crate::task::UserMessage;
use crate::unpacked::make_private_directory;

/// Tries to find a name that nobody uses.
const ATTEMPTS: u32 = 100;

/// Why there is no container: lines that are complete as they are, of `enroot-mount`, say, or `[ERROR] …`.
#[derive(Debug)]
pub struct Failure(pub Vec<String>);

impl Failure {
    /// One line of ours.
    pub fn line(text: impl std::fmt::Display) -> Self {
        Self(vec![format!("[ERROR] {text}")])
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl From<InitError> for Failure {
    fn from(error: InitError) -> Self {
        match error {
            InitError::Log(lines) => Self(lines),
            other => Self::line(other),
        }
    }
}

/// What the command line adds to a container.
#[derive(Debug, Default)]
pub struct Extras {
    /// Mounts, after all others.
    pub fstab: Fstab,
    /// Text of a program that runs after the hooks.
    pub hooks: Option<String>,
}

/// A directory in which a start keeps what nobody else sees: empty, and covered inside by a file system of its own.
#[derive(Debug)]
pub struct Runtime {
    path: PathBuf,
    /// Where it was made for this start, and what it is called there.
    made: Option<(OwnedFd, PathBuf)>,
}

impl Runtime {
    /// `wanted` (`ENROOT_RUNTIME_PATH`) if the user can have that, else a new directory in `temporary`.
    pub fn make(wanted: &Path, temporary: &Path) -> io::Result<Self> {
        let is_own = || rustix::fs::access(wanted, Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK).is_ok();
        if make_private_directory(wanted).is_ok() && is_own() {
            return Ok(Self { path: wanted.canonicalize()?, made: None });
        }
        let temporary = temporary.canonicalize()?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let parent = rustix::fs::open(&temporary, flags, Mode::empty())?;
        for number in 0..ATTEMPTS {
            let name = PathBuf::from(format!(".pyxis-start.{}.{number}", std::process::id()));
            match rustix::fs::mkdirat(&parent, &name, Mode::RWXU) {
                Ok(()) => return Ok(Self { path: temporary.join(&name), made: Some((parent, name)) }),
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Err(Errno::EXIST.into())
    }

    /// Its path before the container has its own root.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the directory, if nothing covers it any more.
    pub fn remove(&self) {
        if let Some((parent, name)) = &self.made {
            // Another process of ours may have been faster; an empty directory more does no harm.
            let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
        }
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if self.made.is_some() {
            let _ = rustix::mount::unmount(&self.path, UnmountFlags::DETACH);
            self.remove();
        }
    }
}

/// A container that is being made, by a process that is in its namespaces.
#[derive(Debug)]
pub struct Alone<'a> {
    start: &'a Start<'a>,
    host: HostUser,
    site: Site,
    is_confined: bool,
}

/// What the command starts with.
#[derive(Debug)]
pub struct Ready {
    /// Its environment.
    pub environment: Environment,
    /// What the image wants to be started with, before the command's words; none if it says nothing.
    pub entrypoint: Option<Vec<String>>,
    /// Whether there is a shell.
    pub has_shell: bool,
    /// Whether the user has no more than he had: then nothing he starts may have, and owners cannot be changed.
    pub is_confined: bool,
    /// What is odd, one line each.
    pub log: Vec<String>,
}

impl<'a> Alone<'a> {
    /// Moves the calling, single-threaded process into namespaces of its own; with `process_namespace`, only its children
    /// are in all of them.
    pub fn enter(start: &'a Start<'a>, process_namespace: bool) -> Result<Self, Failure> {
        let user = &start.request.user;
        let host = HostUser::look_up(user, start.environment);
        let site = Site::load(start, &host)?;
        let is_confined = user.uid != 0 || !site.conf.allow_superuser();
        if !is_confined {
            // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(step("mount namespace"))?;
        } else {
            namespaces::enter_container(user, site.choices.remap_root).map_err(|error| forbidden(&error))?;
        }
        namespaces::unshare(site.choices.unshare).map_err(|(what, cause)| InitError::Step { what, cause })?;
        if process_namespace {
            // SAFETY: as above; it concerns children only.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWPID) }.map_err(step("PID namespace"))?;
        }
        rustix::mount::mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
            .map_err(step("mount propagation"))?;
        Ok(Self { start, host, site, is_confined })
    }

    /// Covers [`Start::runtime`], a directory of the user's, with a file system that nobody else sees.
    pub fn make_runtime(&self) -> Result<(), Failure> {
        let runtime = self.start.runtime;
        let make = || -> io::Result<()> {
            let context = || {
                let tmpfs = FsContext::open("tmpfs")?;
                tmpfs.set("source", "tmpfs")?;
                tmpfs.set("mode", "700")?;
                tmpfs.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)
            };
            let tmpfs = context().map_err(io::Error::other)?;
            attach_at(tmpfs.as_fd(), runtime)?;
            for directory in [overlay::attach_point(runtime), Workspace::mount_point(runtime)] {
                fs::create_dir(directory)?;
            }
            Ok(())
        };
        Ok(make().map_err(step("runtime directory"))?)
    }

    /// Who the user is inside.
    pub fn owner(&self) -> (u32, u32) {
        let user = &self.start.request.user;
        if self.site.choices.remap_root { (0, 0) } else { (user.uid, user.gid) }
    }

    /// Furnishes the root filesystem `root`, a detached mount, and makes it the root of this process. With `new_proc` the
    /// process is in a PID namespace that shall see itself.
    pub fn furnish(&self, root: OwnedFd, extras: Extras, new_proc: bool) -> Result<Ready, Failure> {
        let Self { start, host, site, is_confined } = self;
        let hardened = Attributes { set: libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV, ..Attributes::default() };
        let attach = || attach_at(root.as_fd(), &overlay::attach_point(start.runtime));
        attach_changed(root.as_fd(), || set_attributes(root.as_fd(), &hardened), attach)
            .map_err(step("attach the root filesystem"))?;
        let image = ImageConfig::default();
        let mut furnisher = Furnisher::new(start, site, &image, host, root)?;
        let hooks = extras.hooks.map(|text| write_program(&start.runtime.join("hooks.sh"), &text)).transpose();
        furnisher.add(extras.fstab, hooks.map_err(step("hooks()"))?.into_iter().collect());
        let login = furnisher.before_the_task()?;
        if new_proc {
            mount_proc(furnisher.root()).map_err(step("mount /proc"))?;
        }
        let mut here = Here(Vec::new());
        furnisher.with_the_task(start.environment, &DeviceAccess::of_this_process(), &mut here)?;
        let Furnished { mut environment, root, oci_hooks, mut log, .. } = furnisher.finish(&login);
        log.extend(here.0);
        rustix::process::fchdir(&root).map_err(step("enter the root filesystem"))?;
        pivot().map_err(step("pivot_root"))?;
        let inside = RootDir::new(root.as_fd());
        let entrypoint = entrypoint::plan(start, None, &site.conf, inside);
        let has_shell = inside.is_executable(entrypoint::SHELL);
        let own = rustix::process::getpid().as_raw_nonzero().get();
        cgroups::show_own_subtree(own, false);
        // SAFETY: a cgroup namespace changes no descriptor or memory of this process. A kernel may have none.
        let _ = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) };
        if !site.choices.writable {
            let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
            set_attributes_at(Path::new("/"), &attributes).map_err(step("make the root filesystem read-only"))?;
        }
        log.extend(oci_hooks.start(start, &environment)?);
        let terminal = start.environment.get("TERM").filter(|terminal| !terminal.is_empty()).unwrap_or(b"dumb");
        environment.set_default("TERM", terminal);
        let entrypoint = entrypoint.map(|entrypoint| entrypoint.words);
        Ok(Ready { environment, entrypoint, has_shell, is_confined: *is_confined, log })
    }
}

/// Nobody is outside: messages are kept, and the process is where it belongs.
struct Here(Vec<String>);

impl Outside for Here {
    fn say(&mut self, message: UserMessage) {
        let (UserMessage::Notice(text) | UserMessage::Error(text) | UserMessage::Log(text)) = message;
        self.0.push(text);
    }

    fn enter_task_cgroup(&mut self) -> Result<(), InitError> {
        Ok(())
    }

    fn take_inventory(&mut self, _start: &Start<'_>) -> Result<Vec<u8>, String> {
        inventory::take_elsewhere()
    }
}

fn write_program(path: &Path, text: &str) -> io::Result<PathBuf> {
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o700).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())?;
    Ok(path.to_owned())
}

fn mount_proc(root: RootDir<'_>) -> Result<(), Errno> {
    let io = |error: crate::sys::mount::MountError| error.errno().unwrap_or(Errno::IO);
    let context = FsContext::open("proc").map_err(io)?;
    context.set("source", "proc").map_err(io)?;
    let flags =
        MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc = context.mount(flags).map_err(io)?;
    let target = root.mount_point(Path::new("/proc"), Create::Directory)?;
    attach(proc.as_fd(), target.as_fd())
}

/// Why the user may not have a namespace, and who can change that.
fn forbidden(error: &io::Error) -> InitError {
    let setting = |path: &str| fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let name = if setting("/proc/sys/kernel/apparmor_restrict_unprivileged_userns") == "1" {
        Some("kernel.apparmor_restrict_unprivileged_userns=0, or an AppArmor profile that lets pyxis have \"userns\"")
    } else if setting("/proc/sys/kernel/unprivileged_userns_clone") == "0" {
        Some("kernel.unprivileged_userns_clone=1")
    } else if setting("/proc/sys/user/max_user_namespaces") == "0" {
        Some("user.max_user_namespaces=10000")
    } else {
        None
    };
    let reason = crate::sys::reason(error);
    InitError::Other(match name {
        Some(name) => format!(
            "this host forbids unprivileged user namespaces ({reason}): the administrator can allow them with the sysctl {name}"
        ),
        None => format!("cannot make a user namespace: {reason}"),
    })
}
