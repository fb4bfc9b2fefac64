//! Layer images, each mounted once per node.
//!
//! A second mount of the same file would be a second superblock with a page cache of its own. So every layer is mounted
//! once, in a mount namespace that belongs to nothing else, and cloned (open_tree(2)) for each container: the clones
//! share one copy of the data, whoever's they are, and nothing shows in the host's mount table.
//!
//! ```text
//! RUNTIME/mounts          a private mount, so that a namespace file may be bound in it
//! RUNTIME/mounts/layers   the pinned mount namespace: /HEX-INODE is the mount of layer sha256:HEX, whose file has that
//!                         inode: in a store on a shared file system another node may collect and import it anew
//! RUNTIME/lock            flock: exclusive while the namespace or a layer mount is made
//! ```
//!
//! Who may unmount: only a holder of the layer's exclusive lease (the collector). Who clones holds a shared one.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::WaitOptions;
use rustix::thread::{CpuSet, LinkNameSpaceType, UnshareFlags};

use super::kernel::Feature;
use crate::image::digest::Digest;
use crate::store::{LeasedLayer, PinnedMounts};
use crate::sys;
use crate::sys::mount::{FsContext, MountError};
use crate::sys::process::{Forked, exit_now, fork};

/// Flags of every layer mount.
const LAYER_ATTRIBUTES: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_RDONLY.union(MountAttrFlags::MOUNT_ATTR_NOSUID).union(MountAttrFlags::MOUNT_ATTR_NODEV);

/// Why layers cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum LayerMountError {
    /// The pinned namespace cannot be made or entered.
    #[error("cannot {action} the mount namespace of the layers at {}: {}", .path.display(), sys::reason(.source))]
    Namespace {
        /// What was tried.
        action: &'static str,
        /// The namespace's file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// One layer cannot be mounted.
    #[error("cannot mount layer {layer}: {source}{}", remedy(.source))]
    Layer {
        /// Which one.
        layer: Digest,
        /// Why not.
        source: MountError,
    },
}

fn remedy(error: &MountError) -> &'static str {
    match error.errno() {
        Some(Errno::NODEV) => "; the kernel has no EROFS: try \"modprobe erofs\"",
        Some(Errno::UCLEAN) | Some(Errno::INVAL) => "; the image may be damaged: \"pyxis gc --all\" removes it",
        _ => "",
    }
}

/// The pinned namespace of a node.
#[derive(Debug)]
pub struct LayerMounts {
    runtime: PathBuf,
    /// None where the kernel does not let it be pinned: every container mounts its layers for itself then.
    namespace: Option<OwnedFd>,
    /// Whether the kernel may read layers from their files.
    from_files: bool,
}

impl LayerMounts {
    /// Opens the namespace below `runtime` (`/run/pyxis`), making it if this is the first container since boot.
    pub fn open(runtime: &Path) -> Result<Self, LayerMountError> {
        let path = runtime.join("mounts/layers");
        let failed = |action| {
            let path = path.clone();
            move |source| LayerMountError::Namespace { action, path, source }
        };
        let mut namespace = open_namespace(&path).map_err(failed("open"))?;
        if namespace.is_none() {
            let _lock = lock(runtime).map_err(failed("lock"))?;
            namespace = open_namespace(&path).map_err(failed("open"))?;
            if namespace.is_none() && pin_new_namespace(&path).map_err(failed("make"))? {
                namespace = open_namespace(&path).map_err(failed("open"))?;
            }
        }
        Ok(Self { runtime: runtime.to_owned(), namespace, from_files: true })
    }

    /// The same, as if the kernel had not these features.
    pub fn without(mut self, features: &[Feature]) -> Self {
        if features.contains(&Feature::SharedLayers) {
            self.namespace = None;
        }
        self.from_files = !features.contains(&Feature::LayersFromFiles);
        self
    }

    /// Whether containers share their layers' page cache.
    pub fn is_shared(&self) -> bool {
        self.namespace.is_some()
    }

    /// Moves the calling, single-threaded process into the namespace, for good: `/` is then the directory of the layers.
    /// Mounts those of `layers`, each named once, that are not mounted yet.
    pub fn enter(&self, layers: &[&LeasedLayer]) -> Result<(), LayerMountError> {
        let Some(namespace) = &self.namespace else {
            let mounts = self.mount_layers(layers)?;
            become_empty_namespace(&self.runtime).map_err(|source| self.failed("make", source))?;
            return attach_layers(&mounts);
        };
        let home = File::open("/proc/self/ns/mnt").map_err(|source| self.failed("leave for", source))?;
        let enter = || self.move_to(namespace.as_fd(), "enter");
        let leave = || self.move_to(home.as_fd(), "leave");
        let missing = || layers.iter().filter(|layer| !is_mounted(layer)).copied().collect::<Vec<_>>();
        enter()?;
        if missing().is_empty() {
            return Ok(());
        }
        // Device and descriptor paths exist only outside. The lock makes sure that nobody mounts the same layer twice.
        leave()?;
        let _lock = lock(&self.runtime).map_err(|source| self.failed("lock", source))?;
        enter()?;
        let missing = missing();
        leave()?;
        let mounts = self.mount_layers(&missing)?;
        enter()?;
        attach_layers(&mounts)
    }

    fn mount_layers<'a>(&self, layers: &[&'a LeasedLayer]) -> Result<Vec<(&'a LeasedLayer, OwnedFd)>, LayerMountError> {
        let mount = |layer: &&'a LeasedLayer| match mount_layer(layer.file.as_fd(), self.from_files) {
            Ok(mount) => Ok((*layer, mount)),
            Err(source) => Err(LayerMountError::Layer { layer: layer.diff_id, source }),
        };
        layers.iter().map(mount).collect()
    }

    fn move_to(&self, namespace: BorrowedFd<'_>, action: &'static str) -> Result<(), LayerMountError> {
        rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))
            .map_err(|errno| self.failed(action, errno.into()))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> LayerMountError {
        LayerMountError::Namespace { action, path: self.runtime.join("mounts/layers"), source }
    }
}

/// For the collector, which must have a single thread.
impl PinnedMounts for LayerMounts {
    fn release(&self, layer: &Digest) -> io::Result<()> {
        let Some(namespace) = &self.namespace else { return Ok(()) };
        // In a child, which can go on living in that namespace.
        // SAFETY: the collector has one thread, and the child only makes system calls before it ends.
        match unsafe { fork(0) }? {
            Forked::Child => {
                let released = self.move_to(namespace.as_fd(), "enter").is_ok() && unmount(layer).is_ok();
                exit_now(if released { 0 } else { 1 })
            }
            Forked::Parent(child) => {
                let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))?;
                match status.and_then(|(_, status)| status.exit_status()) {
                    Some(0) => Ok(()),
                    _ => Err(io::Error::other(format!("layer {layer} cannot be unmounted"))),
                }
            }
        }
    }
}

/// Path of a layer's mount inside the pinned namespace.
pub fn mount_point(layer: &LeasedLayer) -> PathBuf {
    // An open file has an inode; were there none, no mount would be found and a new one made.
    let inode = rustix::fs::fstat(&layer.file).map_or(0, |status| status.st_ino);
    Path::new("/").join(format!("{}-{inode}", layer.diff_id.hex()))
}

fn is_mounted(layer: &LeasedLayer) -> bool {
    sys::mount::is_mount_root(CWD, &mount_point(layer)).unwrap_or(false)
}

/// Unmounts what there is of `layer` in the namespace that the process is in. Containers keep their clones.
fn unmount(layer: &Digest) -> Result<(), Errno> {
    let root = rustix::fs::open("/", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let prefix = format!("{}-", layer.hex());
    for entry in rustix::fs::Dir::new(root)? {
        let entry = entry?;
        if !entry.file_name().to_bytes().starts_with(prefix.as_bytes()) {
            continue;
        }
        match rustix::mount::unmount(entry.file_name(), UnmountFlags::DETACH) {
            // A directory of an attempt that failed.
            Err(Errno::INVAL) => {}
            other => other?,
        }
        rustix::fs::rmdir(entry.file_name())?;
    }
    Ok(())
}

fn mount_over_loop(file: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    // The device would hold the lease: a description of its own.
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let own = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| MountError::new("open the layer again", errno))?;
    sys::loopdev::mount(own.as_fd(), "erofs", LAYER_ATTRIBUTES)
}

fn attach_layers(mounts: &[(&LeasedLayer, OwnedFd)]) -> Result<(), LayerMountError> {
    mounts.iter().try_for_each(|(layer, mount)| {
        attach(layer, mount).map_err(|source| LayerMountError::Layer { layer: layer.diff_id, source })
    })
}

/// A detached mount of the layer image in `file`.
fn mount_layer(file: BorrowedFd<'_>, from_file: bool) -> Result<OwnedFd, MountError> {
    if !from_file {
        return mount_over_loop(file);
    }
    match mount_file(file) {
        // The file's file system cannot be read by EROFS itself (tmpfs never, any before Linux 6.12).
        Err(error) if error.errno() == Some(Errno::NOTBLK) => mount_over_loop(file),
        other => other,
    }
}

/// Attaches `layer`'s mount at its place in the namespace that the process is in, instead of the mount of a file that is
/// no longer the layer's.
fn attach(layer: &LeasedLayer, mount: &OwnedFd) -> Result<(), MountError> {
    let step = |call: &'static str| move |errno| MountError::new(call, errno);
    unmount(&layer.diff_id).map_err(step("umount"))?;
    let path = mount_point(layer);
    rustix::fs::mkdir(&path, Mode::from_raw_mode(0o700)).map_err(step("mkdir"))?;
    sys::mount::attach_at(mount.as_fd(), &path).map_err(step("move_mount"))
}

/// A detached mount of the EROFS image in `file`. `directio` keeps the data out of the file's own page cache: EROFS caches
/// it already.
fn mount_file(file: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    let attempt = |direct: bool| {
        let context = FsContext::open("erofs")?;
        context.set("source", &source)?;
        if direct {
            context.flag("directio")?;
        }
        context.mount(LAYER_ATTRIBUTES)
    };
    attempt(true).or_else(|error| match error.errno() {
        Some(Errno::NOTBLK) => Err(error),
        // Unknown to the kernel, or not possible on this file system.
        _ => attempt(false),
    })
}

/// The namespace file at `path`, if a namespace is pinned there.
fn open_namespace(path: &Path) -> io::Result<Option<OwnedFd>> {
    let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()) {
        Err(Errno::NOENT) => return Ok(None),
        other => other?,
    };
    let pinned = rustix::fs::fstatfs(&file)?.f_type == libc::NSFS_MAGIC;
    Ok(pinned.then_some(file))
}

fn open_lock(runtime: &Path) -> io::Result<File> {
    rustix::fs::mkdir(runtime, Mode::from_raw_mode(0o755)).or_else(|errno| match errno {
        Errno::EXIST => Ok(()),
        other => Err(other),
    })?;
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(rustix::fs::open(runtime.join("lock"), flags, Mode::from_raw_mode(0o600))?.into())
}

fn lock(runtime: &Path) -> io::Result<File> {
    let file = open_lock(runtime)?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))?;
    Ok(file)
}

/// Makes an empty mount namespace and binds it to `path`, so that it outlives every process. False if the kernel refuses.
///
/// A mount namespace can only be bound in an older one, and the kernel tells their age by a number. From Linux 6.18 on it
/// takes the numbers from a stock of each CPU, so a new namespace may look older than ours: the number is greater for
/// sure on the CPU where ours was made, whichever that is. (The first namespace of a machine is older than all.)
fn pin_new_namespace(path: &Path) -> io::Result<bool> {
    let directory = path.parent().ok_or_else(|| io::Error::other("no parent directory"))?;
    match rustix::fs::mkdir(directory, Mode::from_raw_mode(0o700)) {
        Err(Errno::EXIST) => {}
        other => other?,
    }
    // A namespace file cannot be bound on a shared mount: its peers would hold a loop of namespaces.
    if !sys::mount::is_mount_root(CWD, directory)? {
        rustix::mount::mount_bind(directory, directory)?;
    }
    rustix::mount::mount_change(directory, MountPropagationFlags::PRIVATE)?;
    rustix::fs::open(path, OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o600))?;

    let allowed = rustix::thread::sched_getaffinity(None)?;
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)) {
        if pin_namespace_made_on(cpu, directory, path)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn pin_namespace_made_on(cpu: usize, directory: &Path, path: &Path) -> io::Result<bool> {
    let (ready, signal_ready) = io::pipe()?;
    let (wait, release) = io::pipe()?;
    // SAFETY: brokers and collectors have one thread.
    match unsafe { fork(0) }? {
        Forked::Child => {
            drop((ready, release));
            let mut one = CpuSet::new();
            one.set(cpu);
            let made = rustix::thread::sched_setaffinity(None, &one)
                .map_err(io::Error::from)
                .and_then(|()| become_empty_namespace(directory));
            let _ = io::Write::write_all(&mut &signal_ready, &[u8::from(made.is_ok())]);
            // Until the parent has bound the namespace, or has died.
            let _ = io::Read::read(&mut &wait, &mut [0]);
            exit_now(0)
        }
        Forked::Parent(child) => {
            drop((signal_ready, wait));
            let mut made = [0];
            let result = io::Read::read_exact(&mut &ready, &mut made).and_then(|()| match made {
                [1] => match rustix::mount::mount_bind(format!("/proc/{}/ns/mnt", child.as_raw_nonzero()), path) {
                    Err(Errno::INVAL) => Ok(false),
                    other => Ok(other.map(|()| true)?),
                },
                _ => Err(io::Error::other("the namespace cannot be emptied")),
            });
            drop(release);
            rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))?;
            result
        }
    }
}

/// Moves into a new mount namespace that holds one empty tmpfs and nothing of the host: what is mounted there today must
/// stay unmountable.
fn become_empty_namespace(scratch: &Path) -> io::Result<()> {
    // SAFETY: a mount namespace changes no descriptor or memory of this single-threaded process.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS)? };
    rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
    let options = CString::new("mode=700,size=1m").map_err(io::Error::other)?;
    rustix::mount::mount("pyxis", scratch, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, options.as_c_str())?;
    rustix::process::chdir(scratch)?;
    rustix::process::pivot_root(".", ".")?;
    rustix::mount::unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}
