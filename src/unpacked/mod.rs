//! Root filesystems unpacked in a directory of the user's (`ENROOT_DATA_PATH`): what `pyxis create` and `pyxis load` make,
//! and `pyxis start`, `export`, `list` and `remove` use.
//!
//! A name in there is complete: a tree is made in a hidden directory and renamed when it is whole, and renamed back to such
//! a one before it is removed. What a killed process leaves hidden is removed by the next one that makes a tree; a
//! process at work holds an flock on its directory.

#![forbid(unsafe_code)]

pub mod furnishing;
pub mod squashfs;
pub mod tree;

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::container::remove::remove_tree;

/// What hidden directories' names begin with.
const UNFINISHED: &str = ".pyxis-unfinished.";
/// Tries to find a name that nobody uses.
const ATTEMPTS: u32 = 100;

/// Why something cannot be done with a container's root filesystem; in enroot's words where it has some.
#[derive(Debug, thiserror::Error)]
pub enum UnpackedError {
    /// A name that is no file name.
    #[error("Invalid argument: {0}")]
    Name(String),
    /// It is there.
    #[error("File already exists: {}", .0.display())]
    Exists(PathBuf),
    /// It is not there.
    #[error("No such file or directory: {}", .0.display())]
    Missing(PathBuf),
    /// The file system says no.
    #[error("cannot {what} {}: {}", .path.display(), crate::sys::reason(.cause))]
    Io {
        /// To do what.
        what: &'static str,
        /// With what.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
}

/// The directory.
#[derive(Debug, Clone)]
pub struct Containers {
    path: PathBuf,
}

impl Containers {
    /// The root filesystems in `path`, which need not exist.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where the root filesystem `name` is or would be.
    pub fn path_of(&self, name: &OsStr) -> Result<PathBuf, UnpackedError> {
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.starts_with(b".") || bytes.contains(&b'/') || bytes.len() > 255 {
            return Err(UnpackedError::Name(name.to_string_lossy().into_owned()));
        }
        Ok(self.path.join(name))
    }

    /// Where the root filesystem `name` is.
    pub fn find(&self, name: &OsStr) -> Result<PathBuf, UnpackedError> {
        let path = self.path_of(name)?;
        if path.is_dir() { Ok(path) } else { Err(UnpackedError::Missing(path)) }
    }

    /// All names, sorted.
    pub fn names(&self) -> Result<Vec<OsString>, UnpackedError> {
        let failed = |cause| self.failed("list", cause);
        let entries = match std::fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(failed)?,
        };
        let mut names = entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        names.retain(|name| !name.as_bytes().starts_with(b"."));
        names.sort();
        Ok(names)
    }

    /// Begins a root filesystem. Made for `name`, which must not exist unless it is to be replaced: that is looked at now
    /// so that a mistake costs nothing, and again at the end.
    pub fn begin(&self, name: &OsStr, replace: bool) -> Result<Unfinished, UnpackedError> {
        let path = self.path_of(name)?;
        if !replace && std::fs::symlink_metadata(&path).is_ok() {
            return Err(UnpackedError::Exists(path));
        }
        let directory = self.open_or_make()?;
        reap(directory.as_fd());
        let (hidden, root) =
            make_hidden(directory.as_fd()).map_err(|cause| self.failed("make a directory in", cause))?;
        Ok(Unfinished { directory, hidden, root, path, replace, published: false })
    }

    /// Removes the root filesystem `name`.
    pub fn remove(&self, name: &OsStr) -> Result<(), UnpackedError> {
        let path = self.path_of(name)?;
        let failed = |cause| UnpackedError::Io { what: "remove", path: path.clone(), cause };
        let directory = match open_directory(&self.path) {
            Err(Errno::NOENT) => return Err(UnpackedError::Missing(path)),
            other => other.map_err(|errno| failed(errno.into()))?,
        };
        match hide(directory.as_fd(), name) {
            Ok((hidden, lock)) => {
                let removed = remove_tree(directory.as_fd(), &hidden);
                drop(lock);
                removed.map_err(|errno| failed(errno.into()))
            }
            Err(Errno::NOENT) => Err(UnpackedError::Missing(path)),
            Err(errno) => Err(failed(errno.into())),
        }
    }

    fn open_or_make(&self) -> Result<OwnedFd, UnpackedError> {
        make_private_directory(&self.path).map_err(|cause| self.failed("make the directory", cause))?;
        open_directory(&self.path).map_err(|errno| self.failed("open", errno.into()))
    }

    fn failed(&self, what: &'static str, cause: io::Error) -> UnpackedError {
        UnpackedError::Io { what, path: self.path.clone(), cause }
    }
}

/// Makes `path` with its parents, all that is new for the user alone.
pub fn make_private_directory(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn open_directory(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// A root filesystem that nobody sees yet. Removed when dropped before [`Unfinished::publish`].
#[derive(Debug)]
pub struct Unfinished {
    directory: OwnedFd,
    hidden: OsString,
    root: OwnedFd,
    path: PathBuf,
    replace: bool,
    published: bool,
}

impl Unfinished {
    /// Its root directory.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Where it is, until it has its name.
    pub fn hidden_path(&self) -> PathBuf {
        self.path.with_file_name(&self.hidden)
    }

    /// Gives it its name. Returns where it is.
    pub fn publish(mut self) -> Result<PathBuf, UnpackedError> {
        let name = self.path.file_name().unwrap_or_default().to_owned();
        let directory = self.directory.as_fd();
        let rename = |flags| rename(directory, &self.hidden, &name, flags);
        let outcome = match rename(RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) if self.replace => rename(RenameFlags::EXCHANGE).map(|()| true),
            other => other.map(|()| false),
        };
        match outcome {
            Ok(replaced) => {
                // What was there has the hidden name now, and goes when this is dropped.
                self.published = !replaced;
                Ok(self.path.clone())
            }
            Err(Errno::EXIST) => Err(UnpackedError::Exists(self.path.clone())),
            Err(errno) => Err(UnpackedError::Io { what: "make", path: self.path.clone(), cause: errno.into() }),
        }
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        if !self.published {
            // What cannot be removed now is tried again by the next one.
            let _ = remove_tree(self.directory.as_fd(), &self.hidden);
        }
    }
}

/// renameat2(2); where the file system lacks its flags (NFS), as close as it gets.
fn rename(directory: BorrowedFd<'_>, from: &OsStr, to: &OsStr, flags: RenameFlags) -> Result<(), Errno> {
    match rustix::fs::renameat_with(directory, from, directory, to, flags) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {}
        other => return other,
    }
    let exists = rustix::fs::statat(directory, to, AtFlags::SYMLINK_NOFOLLOW).is_ok();
    if flags == RenameFlags::NOREPLACE {
        // A directory never replaces one that is not empty.
        return if exists { Err(Errno::EXIST) } else { rustix::fs::renameat(directory, from, directory, to) };
    }
    let (hidden, _lock) = hide(directory, to)?;
    rustix::fs::renameat(directory, from, directory, to)?;
    rustix::fs::renameat(directory, &hidden, directory, from)
}

/// A new hidden directory, locked.
fn make_hidden(directory: BorrowedFd<'_>) -> io::Result<(OsString, OwnedFd)> {
    for attempt in 0..ATTEMPTS {
        let name = hidden_name(attempt);
        match rustix::fs::mkdirat(directory, &name, Mode::from_raw_mode(0o700)) {
            Err(Errno::EXIST) => continue,
            other => other?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = match rustix::fs::openat(directory, &name, flags, Mode::empty()) {
            Err(Errno::NOENT) => continue,
            other => other?,
        };
        // Otherwise another process took it for a leftover before it was locked.
        if lock(root.as_fd()) && rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
            return Ok((name, root));
        }
    }
    Err(Errno::EXIST.into())
}

/// Gives the directory `name` a hidden name and locks it.
fn hide(directory: BorrowedFd<'_>, name: &OsStr) -> Result<(OsString, Option<OwnedFd>), Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    // Whatever it is: what cannot be opened is not locked.
    let root = rustix::fs::openat(directory, name, flags, Mode::empty()).ok();
    if let Some(root) = &root {
        lock(root.as_fd());
    }
    for attempt in 0..ATTEMPTS {
        let hidden = hidden_name(attempt);
        match rustix::fs::renameat_with(directory, name, directory, &hidden, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
                return rustix::fs::renameat(directory, name, directory, &hidden).map(|()| (hidden, root));
            }
            other => return other.map(|()| (hidden, root)),
        }
    }
    Err(Errno::EXIST)
}

fn hidden_name(attempt: u32) -> OsString {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let id = std::process::id();
    OsString::from_vec(format!("{UNFINISHED}{host}.{id}.{attempt}").into_bytes())
}

/// Marks a directory as somebody's at work. Not every file system can lock directories: there a leftover cannot be told
/// from work in progress, and stays.
///
/// False if somebody is removing it.
fn lock(root: BorrowedFd<'_>) -> bool {
    rustix::fs::flock(root, FlockOperation::NonBlockingLockShared) != Err(Errno::WOULDBLOCK)
}

/// Removes what killed processes have left.
fn reap(directory: BorrowedFd<'_>) {
    let Ok(entries) = rustix::fs::Dir::read_from(directory) else { return };
    for entry in entries.flatten() {
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if !name.as_bytes().starts_with(UNFINISHED.as_bytes()) {
            continue;
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        if let Ok(root) = rustix::fs::openat(directory, name, flags, Mode::empty())
            && rustix::fs::flock(&root, FlockOperation::NonBlockingLockExclusive).is_ok()
        {
            let _ = remove_tree(directory, name);
        }
    }
}

/// The directory of `path` itself, for the tests and for what looks at trees from outside.
pub fn open_root(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn name(text: &str) -> &OsStr {
        OsStr::new(text)
    }

    fn fill(unfinished: &Unfinished, content: &[u8]) {
        let flags = OFlags::CREATE | OFlags::WRONLY;
        let file = rustix::fs::openat(unfinished.root(), "file", flags, Mode::from_raw_mode(0o600)).unwrap();
        rustix::io::write(&file, content).unwrap();
    }

    #[test]
    fn a_name_is_whole_or_absent() {
        let directory = tempfile::tempdir().unwrap();
        let containers = Containers::new(directory.path().join("data/enroot"));
        assert_eq!(containers.names().unwrap(), Vec::<OsString>::new());
        let begun = containers.begin(name("a"), false).unwrap();
        fill(&begun, b"one");
        assert_eq!(containers.names().unwrap(), Vec::<OsString>::new());
        // A second one does not take the first for a leftover.
        drop(containers.begin(name("a"), false).unwrap());
        let path = begun.publish().unwrap();
        assert_eq!(std::fs::read(path.join("file")).unwrap(), b"one");
        assert_eq!(containers.names().unwrap(), ["a"]);
        assert_eq!(path.parent().unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o700);

        let error = containers.begin(name("a"), false).unwrap_err().to_string();
        assert_eq!(error, format!("File already exists: {}", path.display()));
        let second = containers.begin(name("a"), true).unwrap();
        fill(&second, b"two");
        second.publish().unwrap();
        assert_eq!(std::fs::read(path.join("file")).unwrap(), b"two");
        let entries = std::fs::read_dir(path.parent().unwrap()).unwrap().count();
        assert_eq!(entries, 1, "the old one is gone");
    }

    #[test]
    fn the_loser_of_a_race_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let containers = Containers::new(directory.path().to_owned());
        let begun = [(); 2].map(|()| containers.begin(name("a"), false).unwrap());
        let outcomes = begun.map(Unfinished::publish);
        assert_eq!(outcomes.iter().filter(|outcome| outcome.is_ok()).count(), 1);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }

    #[test]
    fn leftovers_go() {
        let directory = tempfile::tempdir().unwrap();
        let left = directory.path().join(format!("{UNFINISHED}host.1.0"));
        std::fs::create_dir_all(left.join("below")).unwrap();
        let containers = Containers::new(directory.path().to_owned());
        drop(containers.begin(name("a"), false).unwrap());
        assert!(!left.exists());
    }

    #[test]
    fn names_are_file_names() {
        let containers = Containers::new("/nonexistent".into());
        for bad in ["", "a/b", ".", "..", ".hidden", &"x".repeat(256)] {
            assert!(matches!(containers.path_of(name(bad)), Err(UnpackedError::Name(_))), "{bad}");
        }
        assert_eq!(containers.remove(name("x")).unwrap_err().to_string(), "No such file or directory: /nonexistent/x");
        assert!(matches!(containers.find(name("x")), Err(UnpackedError::Missing(_))));
    }
}
