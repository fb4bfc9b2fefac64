//! Paths inside a root filesystem that is not `/` yet: nothing an image contains can lead out of it.
//!
//! Every look-up is one openat2(2) with `RESOLVE_IN_ROOT`: symbolic links, also absolute ones, are followed as the
//! container would follow them. What is opened is acted on by descriptor.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::entry::Create;

/// Most dangling links on the way to a target, as for the kernel's own look-ups.
const MAX_LINKS: u32 = 40;
/// Mode of a mount point made by us: what nobody can use by mistake, and what an export recognises and leaves out.
const STUB: Mode = Mode::empty();
/// Mode of a directory made on the way.
const PARENT: Mode = Mode::from_raw_mode(0o755);

/// The root directory of a container being built.
#[derive(Debug, Clone, Copy)]
pub struct RootDir<'a> {
    fd: BorrowedFd<'a>,
}

impl<'a> RootDir<'a> {
    /// Paths are relative to `fd`.
    pub fn new(fd: BorrowedFd<'a>) -> Self {
        Self { fd }
    }

    /// Opens `path`, which may begin with `/`.
    pub fn open(&self, path: &Path, flags: OFlags, mode: Mode) -> Result<OwnedFd, Errno> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        loop {
            match rustix::fs::openat2(self.fd, path, flags | OFlags::CLOEXEC, mode, resolve) {
                // A rename somewhere in the system raced with "..".
                Err(Errno::AGAIN | Errno::INTR) => {}
                other => return other,
            }
        }
    }

    /// A reference (`O_PATH`) to mount on; made, with its parents, if it is missing and `create` says so. A path that
    /// climbs above the root is `EXDEV`.
    pub fn mount_point(&self, path: &Path, create: Create) -> Result<OwnedFd, Errno> {
        if climbs(path) {
            return Err(Errno::XDEV);
        }
        match self.open(path, OFlags::PATH, Mode::empty()) {
            Err(Errno::NOENT) if create != Create::No => {
                self.create(path, create, STUB, MAX_LINKS)?;
                self.open(path, OFlags::PATH, Mode::empty())
            }
            other => other,
        }
    }

    /// Makes the directory `path` with its parents, unless something is there.
    pub fn ensure_directory(&self, path: &Path, mode: Mode) -> Result<(), Errno> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => self.create(path, Create::Directory, mode, MAX_LINKS),
            other => other.map(drop),
        }
    }

    fn create(&self, path: &Path, what: Create, mode: Mode, links: u32) -> Result<(), Errno> {
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { return Err(Errno::NOENT) };
        if !parent.as_os_str().is_empty()
            && self.open(parent, OFlags::PATH, Mode::empty()).is_err_and(|errno| errno == Errno::NOENT)
        {
            self.create(parent, Create::Directory, PARENT, links)?;
        }
        let parent_fd = match parent.as_os_str().is_empty() {
            true => self.open(Path::new("/"), OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?,
            false => self.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())?,
        };
        let made = match what {
            Create::File => {
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
                rustix::fs::openat(&parent_fd, name, flags, mode).map(drop)
            }
            _ => rustix::fs::mkdirat(&parent_fd, name, mode),
        };
        match made {
            // A link to something that does not exist: that is what has to be made.
            Err(Errno::EXIST) => {
                let link = match rustix::fs::readlinkat(&parent_fd, name, Vec::new()) {
                    Ok(link) => link,
                    // Somebody else has made it meanwhile: containers of one name may share a root.
                    Err(Errno::INVAL) => return Ok(()),
                    Err(_) => return Err(Errno::EXIST),
                };
                let links = links.checked_sub(1).ok_or(Errno::LOOP)?;
                let target = parent.join(PathBuf::from(std::ffi::OsString::from_vec(link.into_bytes())));
                match self.open(&target, OFlags::PATH, Mode::empty()) {
                    Err(Errno::NOENT) => self.create(&target, what, mode, links),
                    other => other.map(drop),
                }
            }
            other => other,
        }
    }

    /// The content of the regular file `path`, at most `limit` bytes; `None` if there is no such file.
    pub fn read(&self, path: &str, limit: u64) -> io::Result<Option<Vec<u8>>> {
        let file = match self.open(Path::new(path), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(None),
            other => File::from(other?),
        };
        if !file.metadata()?.is_file() {
            return Ok(None);
        }
        let mut content = Vec::new();
        file.take(limit + 1).read_to_end(&mut content)?;
        if content.len() as u64 > limit {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
        }
        Ok(Some(content))
    }

    /// Replaces the content of `path`, made with its parents if it is missing. What is there already is not touched:
    /// somebody may be reading it.
    pub fn write(&self, path: &str, content: &[u8], mode: u32) -> io::Result<()> {
        if self.read(path, content.len() as u64).is_ok_and(|found| found.as_deref() == Some(content)) {
            return Ok(());
        }
        let path = Path::new(path);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NONBLOCK;
        let mode = Mode::from_raw_mode(mode);
        let file = match self.open(path, flags, mode) {
            Err(Errno::NOENT) => {
                self.create(path, Create::File, mode, MAX_LINKS)?;
                self.open(path, flags, mode)
            }
            other => other,
        }?;
        File::from(file).write_all(content)
    }

    /// The same, but an image that has something there which is no file, a directory or a link that goes in circles, keeps
    /// it: what looks for the file will say so.
    pub fn write_where_possible(&self, path: &str, content: &[u8], mode: u32) -> io::Result<()> {
        match self.write(path, content, mode) {
            Err(error) if Errno::from_io_error(&error).is_some_and(is_no_place_for_a_file) => Ok(()),
            other => other,
        }
    }

    /// Whether `path` is a regular file that somebody may execute.
    pub fn is_executable(&self, path: &str) -> bool {
        self.open(Path::new(path), OFlags::PATH, Mode::empty())
            .and_then(rustix::fs::fstat)
            .is_ok_and(|status| status.st_mode & libc::S_IFMT == libc::S_IFREG && status.st_mode & 0o111 != 0)
    }

    /// The directory `path`, made with its parents if it is missing.
    pub fn directory(&self, path: &Path) -> Result<OwnedFd, Errno> {
        if climbs(path) {
            return Err(Errno::XDEV);
        }
        self.ensure_directory(path, PARENT)?;
        self.open(path, OFlags::PATH | OFlags::DIRECTORY, Mode::empty())
    }
}

/// Whether a file cannot be made because of what the image has in its place.
fn is_no_place_for_a_file(errno: Errno) -> bool {
    // NXIO: a fifo or a socket.
    matches!(errno, Errno::ISDIR | Errno::NOTDIR | Errno::LOOP | Errno::EXIST | Errno::NXIO)
}

/// Whether `path`, read as text, leaves the directory it is relative to.
fn climbs(path: &Path) -> bool {
    let mut depth = 0_usize;
    for component in path.components() {
        match component {
            Component::Normal(_) => depth += 1,
            Component::ParentDir if depth == 0 => return true,
            Component::ParentDir => depth -= 1,
            _ => {}
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn with_root(test: impl FnOnce(&Path, RootDir<'_>)) {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        test(directory.path(), RootDir::new(fd.as_fd()));
    }

    #[test]
    fn missing_targets_are_made_as_stubs() {
        with_root(|path, root| {
            root.mount_point(Path::new("/a/b/file"), Create::File).unwrap();
            root.mount_point(Path::new("./a/dir"), Create::Directory).unwrap();
            assert_eq!(path.join("a/b").metadata().unwrap().mode() & 0o7777, 0o755);
            assert_eq!(path.join("a/b/file").metadata().unwrap().mode() & 0o7777, 0);
            assert!(path.join("a/dir").is_dir());
            assert_eq!(root.mount_point(Path::new("/x"), Create::No).unwrap_err(), Errno::NOENT);
        });
    }

    #[test]
    fn links_stay_inside() {
        with_root(|path, root| {
            symlink("/run", path.join("var-run")).unwrap();
            symlink("../../../../outside/x", path.join("up")).unwrap();
            symlink("loop", path.join("loop")).unwrap();
            root.mount_point(Path::new("/var-run/lock"), Create::Directory).unwrap();
            assert!(path.join("run/lock").is_dir());
            root.mount_point(Path::new("/up"), Create::File).unwrap();
            assert!(path.join("outside/x").is_file());
            assert_eq!(root.mount_point(Path::new("/loop"), Create::File).unwrap_err(), Errno::LOOP);
        });
    }

    #[test]
    fn climbing_above_the_root_is_a_cross_device_link() {
        with_root(|_, root| {
            for path in ["../x", "/a/../../x", "./../x"] {
                let error = root.mount_point(Path::new(path), Create::Directory).unwrap_err();
                assert_eq!(error, Errno::XDEV, "{path}");
            }
            root.mount_point(Path::new("/a/../b"), Create::Directory).unwrap_err();
        });
    }

    #[test]
    fn what_is_no_file_is_left_alone() {
        with_root(|path, root| {
            std::fs::create_dir(path.join("directory")).unwrap();
            symlink("circle", path.join("circle")).unwrap();
            for name in ["/directory", "/circle", "/directory/../circle/x"] {
                assert!(root.write(name, b"x", 0o644).is_err(), "{name}");
                root.write_where_possible(name, b"x", 0o644).unwrap();
            }
            assert!(path.join("directory").is_dir());
        });
    }

    #[test]
    fn files_are_read_and_written_inside() {
        with_root(|path, root| {
            symlink("/real/passwd", path.join("passwd")).unwrap();
            root.write("/passwd", b"x", 0o644).unwrap();
            root.write("/passwd", b"y", 0o644).unwrap();
            assert_eq!(std::fs::read(path.join("real/passwd")).unwrap(), b"y");
            assert_eq!(root.read("/passwd", 10).unwrap().unwrap(), b"y");
            assert_eq!(root.read("/none", 10).unwrap(), None);
            assert_eq!(root.read("/real", 10).unwrap(), None);
            assert!(root.read("/passwd", 0).is_err());
        });
    }
}
