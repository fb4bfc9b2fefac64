//! The executor of [`ContainerEdits`]: devices appear in a root filesystem, done by the user, while it can be written to.
//!
//! * A device node that the container must not see is covered by a bind of itself with `nodev`, so that opening it is
//!   `EACCES`: programs take that as they take the refusal of a device cgroup, which is what makes it safe. `/dev/null` in
//!   its place would open, and answer nonsense; a `/dev` of the container's own would take all other devices away.
//! * Libraries are bound one by one in the image's own library directory, under their files' names. Their other names are
//!   links to these, as ldconfig would make them: half the mounts. A name that the image has is covered, a link as well, by
//!   one more bind, and nothing of the image is changed.
//! * Made files and links are on one tmpfs, mounted for as long as it takes to bind them where they belong.
//!
//! `devices::remains` says what of it is in the root filesystem, and how that goes again.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, UnmountFlags};
use rustix::path::Arg;

use super::edits::{self, ContainerEdits, DeviceNode, Library, Link, Origin};
use super::ldcache::{self, Addition, Cache, merge, musl_path, musl_path_file};
use super::remains::{self, MountPoints};
use super::root::RootTraits;
use crate::mounts::entry::Create;
use crate::mounts::rootdir::RootDir;
use crate::sys::mount::{
    Attributes, FsContext, MountError, attach, attach_at, attach_changed, attach_over, clone_tree, set_attributes,
};
use crate::task::UserMessage;
use crate::{mounts, sys};

/// Most bytes of musl's file.
const MAX_MUSL_PATH: u64 = 64 << 10;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;

/// A root filesystem in which devices appear.
#[derive(Debug)]
pub struct Place<'a> {
    /// The root filesystem.
    pub root: RootDir<'a>,
    /// Where things go in it.
    pub traits: &'a RootTraits,
    /// What becomes of it.
    pub future: Future,
    /// What relative sources of mounts are relative to.
    pub cwd: &'a Path,
    /// A directory of the host's on which something may be mounted for a moment.
    pub workshop: &'a Path,
}

/// What becomes of a root filesystem.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Future {
    /// It ends with the container.
    Gone,
    /// And is saved before.
    Saved,
    /// It is used again.
    Kept {
        /// Other containers may be using it now.
        shared: bool,
    },
}

/// Why devices cannot appear: one line.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// A path in the container.
    #[error("cannot {what} {path} in the container: {}", sys::reason(.cause))]
    Failed {
        /// A verb and what it is about.
        what: &'static str,
        /// The path.
        path: String,
        /// Why not.
        cause: io::Error,
    },
    /// The plan names something else.
    #[error("{} is no device node", .0.display())]
    NoDevice(PathBuf),
    /// Nothing is made in the host's own `/dev`.
    #[error(
        "cannot show a device node at {}: the container's /dev is the host's, which has none of that name; \
         ENROOT_RESTRICT_DEV=y gives the container a /dev of its own", .0.display()
    )]
    NoPlace(PathBuf),
    /// A mount, in enroot's words.
    #[error(transparent)]
    Mount(#[from] mounts::apply::ApplyError),
    /// The file system for made files.
    #[error("cannot make files for devices: {0}")]
    FileSystem(#[from] MountError),
}

/// Does what `edits` say, but for variables and hooks. What is missing or odd without being a reason to fail is said.
pub fn apply(place: &Place<'_>, edits: &ContainerEdits, say: &mut dyn FnMut(UserMessage)) -> Result<(), ApplyError> {
    Executor { place, say }.execute(edits)
}

struct Executor<'a> {
    place: &'a Place<'a>,
    say: &'a mut dyn FnMut(UserMessage),
}

/// A file or link that is made.
enum Made<'a> {
    File(&'a edits::File),
    Link(&'a Link),
}

impl Executor<'_> {
    fn execute(&mut self, edits: &ContainerEdits) -> Result<(), ApplyError> {
        if let Future::Kept { shared } = self.place.future {
            self.prepare_kept(edits, shared).map_err(|cause| ApplyError::Failed {
                what: "tidy up what devices have left in",
                path: format!("/{}", remains::DIRECTORY),
                cause,
            })?;
        }
        for path in &edits.hidden {
            self.hide(path).map_err(failed("hide the device node", path))?;
        }
        for node in &edits.device_nodes {
            self.device_node(node)?;
        }
        for entry in &edits.mounts {
            if let Some(error) = mounts::apply::apply(self.place.root, self.place.cwd, entry)? {
                (self.say)(UserMessage::Log(format!("pyxis: {error}")));
            }
        }
        let additions = self.libraries(&edits.libraries)?;
        let mut files: Vec<edits::File> = Vec::new();
        if !additions.is_empty() {
            files.extend(self.musl_path()?);
            files.extend(self.cache(&additions, self.place.future != Future::Gone)?);
        }
        let made: Vec<Made<'_>> = edits.files.iter().chain(&files).map(Made::File).collect();
        self.make(made.into_iter().chain(edits.links.iter().map(Made::Link)).collect())
    }

    /// Removes what earlier starts have left in a root filesystem that is kept, and notes what this one is about to leave.
    fn prepare_kept(&self, edits: &ContainerEdits, shared: bool) -> io::Result<()> {
        let earlier = MountPoints::read(self.place.root);
        let mut wanted = MountPoints::default();
        for path in self.targets(edits) {
            wanted.add(self.place.root, &path);
        }
        if edits.libraries.is_empty() {
            remains::restore_cache(self.place.root)?;
        }
        let before = earlier.clone();
        let staying = if shared { earlier } else { earlier.remove_except(self.place.root, &wanted) };
        wanted.extend(staying);
        if wanted == before { Ok(()) } else { wanted.write(self.place.root) }
    }

    /// All mount points.
    fn targets(&self, edits: &ContainerEdits) -> Vec<PathBuf> {
        let mut targets: Vec<PathBuf> = edits.device_nodes.iter().map(|node| node.path.clone()).collect();
        targets.extend(edits.mounts.iter().map(|entry| PathBuf::from(&entry.target)));
        targets.extend(edits.files.iter().map(|file| file.path.clone()));
        targets.extend(edits.links.iter().map(|link| link.path.clone()));
        for library in &edits.libraries {
            let directory = Path::new(self.place.traits.directory(library.is_32_bit));
            targets.extend(library.names.iter().map(|name| directory.join(name)));
        }
        if !edits.libraries.is_empty() && self.place.traits.is_musl {
            targets.push(musl_path_file().1.into());
        }
        targets
    }

    fn hide(&self, path: &Path) -> Result<(), Errno> {
        let node = match self.place.root.open(path, OFlags::PATH, Mode::empty()) {
            // It is not there anyway.
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            other => other?,
        };
        bind(node.as_fd(), NODEV | NOSUID | NOEXEC)?.attach(|bind| attach(bind, node.as_fd()))
    }

    fn device_node(&self, node: &DeviceNode) -> Result<(), ApplyError> {
        let failed = failed("show the device node", &node.host_path);
        let source = match rustix::fs::open(&node.host_path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()) {
            Err(_) if node.optional => return Ok(()),
            other => other.map_err(&failed)?,
        };
        let wanted = rustix::fs::fstat(&source).map_err(&failed)?;
        let kind = FileType::from_raw_mode(wanted.st_mode);
        if !matches!(kind, FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo) {
            return Err(ApplyError::NoDevice(node.host_path.clone()));
        }
        let target = match self.place.root.open(&node.path, OFlags::PATH, Mode::empty()) {
            Err(Errno::NOENT) => {
                self.is_own_place(&node.path)?;
                self.place.root.mount_point(&node.path, Create::File).map_err(&failed)?
            }
            other => other.map_err(&failed)?,
        };
        let there = rustix::fs::fstat(&target).map_err(&failed)?;
        // The host's /dev shows it already.
        if (there.st_rdev, there.st_mode) == (wanted.st_rdev, wanted.st_mode) {
            return Ok(());
        }
        bind(source.as_fd(), RDONLY | NOSUID | NOEXEC)
            .and_then(|bind| bind.attach(|bind| attach(bind, target.as_fd())))
            .map_err(&failed)
    }

    /// Nothing is made in the host's own `/dev`.
    fn is_own_place(&self, path: &Path) -> Result<(), ApplyError> {
        let device = |fd: Result<OwnedFd, Errno>| fd.and_then(|fd| Ok(rustix::fs::fstat(fd)?.st_dev)).ok();
        let parent = path.parent().unwrap_or(path);
        let own = device(self.place.root.open(parent, OFlags::PATH, Mode::empty()));
        let host = device(rustix::fs::open("/dev", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()));
        if own.is_some() && own == host {
            return Err(ApplyError::NoPlace(path.to_owned()));
        }
        Ok(())
    }

    /// Binds the libraries; what the linker has to find is returned.
    fn libraries(&mut self, libraries: &[Library]) -> Result<Vec<Addition>, ApplyError> {
        let mut additions = Vec::new();
        for is_32_bit in [false, true] {
            let mut of_class = libraries.iter().filter(|library| library.is_32_bit == is_32_bit).peekable();
            if of_class.peek().is_none() {
                continue;
            }
            let path = self.place.traits.directory(is_32_bit);
            let directory = self.place.root.directory(Path::new(path)).map_err(failed("open", Path::new(path)))?;
            for library in of_class {
                let set = RDONLY | NOSUID | NODEV;
                let bind = || match library.origin {
                    Origin::Host => bind_at(CWD, &library.path, set),
                    Origin::Image => {
                        bind(self.place.root.open(&library.path, OFlags::PATH, Mode::empty())?.as_fd(), set)
                    }
                };
                let mut mount = match bind() {
                    Ok(mount) => Some(mount),
                    Err(Errno::NOENT | Errno::NOTDIR | Errno::ACCESS) => {
                        let name = library.names.last().map_or("", String::as_str);
                        let path = library.path.display();
                        (self.say)(UserMessage::Notice(format!(
                            "pyxis: the node's library {path} has gone: programs in the container will not find {name}"
                        )));
                        continue;
                    }
                    Err(errno) => return Err(failed("show the library", &library.path)(errno)),
                };
                let file = library.names.first().map_or("", String::as_str);
                for name in &library.names {
                    let is_link = name != file && make_link(file, directory.as_fd(), name);
                    if !is_link {
                        let mount = mount.take().map_or_else(bind, Ok);
                        mount
                            .and_then(|mount| show_over(mount, directory.as_fd(), name))
                            .map_err(failed("show the library", &Path::new(path).join(name)))?;
                    }
                    additions.push(Addition { name: name.clone(), path: format!("{path}/{name}"), is_32_bit });
                }
            }
        }
        Ok(additions)
    }

    /// musl's linker looks in other directories than glibc's.
    fn musl_path(&self) -> Result<Option<edits::File>, ApplyError> {
        if !self.place.traits.is_musl {
            return Ok(None);
        }
        let path = musl_path_file().1;
        let own = self.place.root.read(&path, MAX_MUSL_PATH).map_err(|error| unreadable(&path, error))?;
        let own = own.map(|own| String::from_utf8_lossy(&own).into_owned());
        let content = musl_path(own.as_deref(), &self.place.traits.library_directory);
        Ok(content.map(|content| edits::File { path: path.into(), mode: 0o644, content: content.into_bytes() }))
    }

    /// Adds the libraries to the image's cache. A cache that cannot be replaced is to be covered: by what is returned.
    fn cache(&mut self, additions: &[Addition], keep: bool) -> Result<Option<edits::File>, ApplyError> {
        let own = remains::own_cache(self.place.root).map_err(|error| unreadable(ldcache::PATH, error))?;
        if own.is_none() && self.place.traits.is_musl {
            return Ok(None);
        }
        let image = match own.as_deref().map(Cache::parse) {
            Some(Ok(image)) => image,
            None => Cache::default(),
            Some(Err(error)) => {
                let path = ldcache::PATH;
                (self.say)(UserMessage::Log(format!("pyxis: the image's {path} is not used: {error}")));
                Cache::default()
            }
        };
        let content = merge(image, additions).to_bytes();
        match remains::replace_cache(self.place.root, own.as_deref(), &content, keep) {
            Ok(()) => Ok(None),
            Err(_) => Ok(Some(edits::File { path: ldcache::PATH.into(), mode: 0o644, content })),
        }
    }

    /// Makes files and links, and binds them where they belong.
    fn make(&self, made: Vec<Made<'_>>) -> Result<(), ApplyError> {
        if made.is_empty() {
            return Ok(());
        }
        let tmpfs = || {
            let tmpfs = FsContext::open("tmpfs")?;
            tmpfs.set("source", "tmpfs")?;
            tmpfs.set("mode", "755")?;
            tmpfs.mount(MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV)
        };
        let workshop = self.place.workshop;
        let tmpfs = tmpfs()?;
        // What is not attached cannot be bound.
        attach_at(tmpfs.as_fd(), workshop).map_err(failed("mount on", workshop))?;
        let done = made.iter().enumerate().try_for_each(|(number, made)| {
            let name = number.to_string();
            match made {
                Made::File(file) => self.file(&tmpfs, &name, file).map_err(failed("make", &file.path)),
                Made::Link(link) => self.link(&tmpfs, &name, link).map_err(failed("make the link", &link.path)),
            }
        });
        rustix::mount::unmount(workshop, UnmountFlags::DETACH).map_err(failed("unmount", workshop))?;
        done
    }

    fn file(&self, tmpfs: &OwnedFd, name: &str, file: &edits::File) -> Result<(), Errno> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mut made = File::from(rustix::fs::openat(tmpfs, name, flags, Mode::from_raw_mode(0o600))?);
        made.write_all(&file.content).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
        rustix::fs::fchmod(&made, Mode::from_raw_mode(file.mode))?;
        let target = self.place.root.mount_point(&file.path, Create::File)?;
        bind(made.as_fd(), RDONLY | NOSUID | NODEV)?.attach(|bind| attach(bind, target.as_fd()))
    }

    fn link(&self, tmpfs: &OwnedFd, name: &str, link: &Link) -> Result<(), Errno> {
        let (Some(parent), Some(target)) = (link.path.parent(), link.path.file_name()) else {
            return Err(Errno::INVAL);
        };
        let parent = self.place.root.directory(parent)?;
        if rustix::fs::statat(&parent, target, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|status| status.st_mode & 0o7777 != 0)
        {
            return Ok(());
        }
        rustix::fs::symlinkat(&link.target, tmpfs, name)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(tmpfs, name, flags, Mode::empty())?;
        show_over(bind(made.as_fd(), NOSUID | NODEV)?, parent.as_fd(), target)
    }
}

/// Makes `name` of `directory` a link to `target`, which is in the same; whether it is one, now or since an earlier start.
fn make_link(target: &str, directory: BorrowedFd<'_>, name: &str) -> bool {
    match rustix::fs::symlinkat(target, directory, name) {
        Err(Errno::EXIST) => {
            rustix::fs::readlinkat(directory, name, Vec::new()).is_ok_and(|there| there.as_bytes() == target.as_bytes())
        }
        made => made.is_ok(),
    }
}

/// Covers the name `name` of `directory` by `bind`. What is missing is made as a stub.
fn show_over(bind: Bind, directory: BorrowedFd<'_>, name: impl Arg + Copy) -> Result<(), Errno> {
    // Not opened: that would open it on the layer below, too.
    match rustix::fs::mknodat(directory, name, FileType::RegularFile, Mode::empty(), 0) {
        Err(Errno::EXIST) => {}
        other => other?,
    }
    bind.attach(|bind| attach_over(bind, directory, name))
}

/// A detached bind, and the flags that it gets.
struct Bind {
    mount: OwnedFd,
    set: u64,
}

impl Bind {
    fn attach(self, attach: impl FnOnce(BorrowedFd<'_>) -> Result<(), Errno>) -> Result<(), Errno> {
        let mount = self.mount.as_fd();
        let attributes = Attributes { set: self.set, propagation: libc::MS_PRIVATE, ..Attributes::default() };
        attach_changed(mount, || set_attributes(mount, &attributes), || attach(mount))
    }
}

/// Of what `source` refers to.
fn bind(source: BorrowedFd<'_>, set: u64) -> Result<Bind, Errno> {
    bind_at(source, Path::new(""), set)
}

/// The same of `path`, relative to `directory`.
fn bind_at(directory: BorrowedFd<'_>, path: &Path, set: u64) -> Result<Bind, Errno> {
    Ok(Bind { mount: clone_tree(directory, path, false)?, set })
}

fn failed(what: &'static str, path: &Path) -> impl Fn(Errno) -> ApplyError {
    let path = path.display().to_string();
    move |errno| ApplyError::Failed { what, path: path.clone(), cause: errno.into() }
}

fn unreadable(path: &str, cause: io::Error) -> ApplyError {
    ApplyError::Failed { what: "read", path: path.to_owned(), cause }
}

#[cfg(test)]
mod tests;
