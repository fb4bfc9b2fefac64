//! A file that appears under its name when it is complete.
//!
//! It has no name until then (`O_TMPFILE`), so whatever ends the process leaves nothing behind. Where the file system
//! cannot do that (NFS), it has a hidden name beside the target, `.NAME.HOST.N.partial`, and a lock: the next export to
//! the same target removes it if nobody holds the lock.
//!
//! Everything goes through descriptors that are opened at the beginning: the caller may enter another mount namespace.

#![forbid(unsafe_code)]

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use crate::sys;

/// As mksquashfs makes them.
const MODE: Mode = Mode::from_raw_mode(0o644);
/// Most names tried for an unfinished file.
const ATTEMPTS: u32 = 64;
/// Longest name in a directory.
const NAME_MAX: usize = 255;

/// Why the file cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {}", .path.display(), sys::reason(.cause))]
pub struct TargetError {
    action: &'static str,
    path: PathBuf,
    cause: io::Error,
}

/// Where a file shall appear.
#[derive(Debug)]
pub struct Target {
    directory: OwnedFd,
    name: OsString,
    path: PathBuf,
    /// `/proc` of now.
    proc: OwnedFd,
}

/// A file that is being written.
#[derive(Debug)]
pub struct NewFile {
    target: Target,
    file: File,
    /// Its own name, if it has one.
    partial: Option<OsString>,
}

impl Target {
    /// The directory of `path` has to exist; what is at `path` has not, and may be replaced if it is a file.
    pub fn open(path: &Path) -> Result<Self, TargetError> {
        let failed = |action, errno: Errno| TargetError { action, path: path.to_owned(), cause: errno.into() };
        let (Some(name), false) = (path.file_name(), path.as_os_str().as_bytes().ends_with(b"/")) else {
            return Err(failed("create", Errno::ISDIR));
        };
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::openat(CWD, parent, flags, Mode::empty()).map_err(|errno| failed("create", errno))?;
        match rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(status) if status.st_mode & libc::S_IFMT == libc::S_IFDIR => {
                return Err(failed("create", Errno::ISDIR));
            }
            Ok(_) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(failed("create", errno)),
        }
        let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| failed("create", errno))?;
        Ok(Self { directory, name: name.to_owned(), path: path.to_owned(), proc })
    }

    /// Begins the file.
    pub fn create(self) -> Result<NewFile, TargetError> {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        match rustix::fs::openat(&self.directory, ".", flags, MODE) {
            Ok(file) => Ok(NewFile { target: self, file: file.into(), partial: None }),
            // Old kernels and file systems ignore a part of the flag or know it not.
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::ISDIR | Errno::NOSYS) => self.create_named(),
            Err(errno) => Err(self.failed("create", errno)),
        }
    }

    fn create_named(self) -> Result<NewFile, TargetError> {
        for name in self.partial_names() {
            match open_partial(self.directory.as_fd(), &name) {
                Ok(file) => return Ok(NewFile { target: self, file, partial: Some(name) }),
                // Another export to the same target.
                Err(Errno::WOULDBLOCK) => {}
                Err(errno) => return Err(self.failed("create", errno)),
            }
        }
        Err(self.failed("create", Errno::BUSY))
    }

    /// Names for an unfinished file, none of which another node uses.
    fn partial_names(&self) -> impl Iterator<Item = OsString> + use<> {
        let host = rustix::system::uname().nodename().to_bytes().to_vec();
        let name = self.name.as_bytes().to_vec();
        (0..ATTEMPTS).map(move |number| {
            let end = [&b"."[..], &host, format!(".{number}.partial").as_bytes()].concat();
            let room = NAME_MAX.saturating_sub(1 + end.len());
            OsStr::from_bytes(&[&b"."[..], &name[..name.len().min(room)], &end].concat()).to_owned()
        })
    }

    fn failed(&self, action: &'static str, cause: impl Into<io::Error>) -> TargetError {
        TargetError { action, path: self.path.clone(), cause: cause.into() }
    }
}

/// Makes a file with this name and locks it, in place of one that nobody writes any more. `WOULDBLOCK`: somebody does.
fn open_partial(directory: BorrowedFd<'_>, name: &OsStr) -> Result<File, Errno> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(directory, name, flags | OFlags::CREATE | OFlags::EXCL, MODE) {
        Err(Errno::EXIST) => {}
        other => {
            let file = other?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            return Ok(file.into());
        }
    }
    let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        // Gone, or not ours to open: another name will do.
        Err(Errno::NOENT | Errno::ACCESS | Errno::LOOP) => return Err(Errno::WOULDBLOCK),
        other => other?,
    };
    let opened = rustix::fs::fstat(&file)?;
    if opened.st_uid != rustix::process::geteuid().as_raw() || opened.st_nlink != 1 {
        return Err(Errno::WOULDBLOCK);
    }
    rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    // Published or removed while we were waiting.
    let there = rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW);
    if there.map_or(true, |there| (there.st_dev, there.st_ino) != (opened.st_dev, opened.st_ino)) {
        return Err(Errno::WOULDBLOCK);
    }
    rustix::fs::ftruncate(&file, 0)?;
    Ok(file.into())
}

impl NewFile {
    /// The file, to be written from its beginning.
    pub fn file(&self) -> io::Result<File> {
        self.file.try_clone()
    }

    /// Makes the file durable and gives it its name, in place of what has that name now.
    pub fn publish(mut self) -> Result<(), TargetError> {
        self.file.sync_all().map_err(|error| self.failed("write", error))?;
        self.replace()?;
        // The old file or the new one, whenever the machine stops. Not every file system can say so.
        let _ = rustix::fs::fsync(&self.target.directory);
        Ok(())
    }

    /// Gives the file its name, in place of what has that name now: for what is checked whenever it is used.
    pub fn publish_unsynced(mut self) -> Result<(), TargetError> {
        self.replace()
    }

    /// Makes the file durable and gives it its name, unless something has that name: then `false`.
    pub fn publish_new(self) -> Result<bool, TargetError> {
        self.file.sync_all().map_err(|error| self.failed("write", error))?;
        let (directory, name) = (&self.target.directory, &self.target.name);
        let linked = match &self.partial {
            // It is removed under its own name when this is dropped.
            Some(partial) => rustix::fs::linkat(directory, partial, directory, name, AtFlags::empty()),
            None => {
                let file = format!("self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(&self.target.proc, &file, directory, name, AtFlags::SYMLINK_FOLLOW)
            }
        };
        match linked {
            Ok(()) => {
                let _ = rustix::fs::fsync(directory);
                Ok(true)
            }
            Err(Errno::EXIST) => Ok(false),
            Err(errno) => Err(self.failed("write", errno)),
        }
    }

    fn replace(&mut self) -> Result<(), TargetError> {
        let partial = match self.partial.take() {
            Some(partial) => partial,
            None => self.link()?,
        };
        let renamed = rustix::fs::renameat(&self.target.directory, &partial, &self.target.directory, &self.target.name);
        // To be removed if that went wrong.
        self.partial = renamed.is_err().then_some(partial);
        renamed.map_err(|errno| self.failed("replace", errno))
    }

    /// Gives a file without a name a hidden one: a link cannot replace anything.
    fn link(&self) -> Result<OsString, TargetError> {
        let file = format!("self/fd/{}", self.file.as_raw_fd());
        for name in self.target.partial_names() {
            let link =
                || rustix::fs::linkat(&self.target.proc, &file, &self.target.directory, &name, AtFlags::SYMLINK_FOLLOW);
            match link() {
                Ok(()) => return Ok(name),
                // Left over by a process that was killed here, or in use.
                Err(Errno::EXIST) => {
                    if open_partial(self.target.directory.as_fd(), &name).is_ok() {
                        let _ = rustix::fs::unlinkat(&self.target.directory, &name, AtFlags::empty());
                        if link().is_ok() {
                            return Ok(name);
                        }
                    }
                }
                Err(errno) => return Err(self.failed("write", errno)),
            }
        }
        Err(self.failed("write", Errno::EXIST))
    }

    /// What removes it if the process has to end before it is published or dropped.
    pub fn remover(&self) -> impl FnOnce() + Send + 'static {
        let partial = self.partial.clone().zip(self.target.directory.try_clone().ok());
        move || {
            if let Some((partial, directory)) = partial {
                let _ = rustix::fs::unlinkat(directory, partial, AtFlags::empty());
            }
        }
    }

    /// An error about this file.
    pub fn failed(&self, action: &'static str, cause: impl Into<io::Error>) -> TargetError {
        self.target.failed(action, cause)
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(partial) = &self.partial {
            let _ = rustix::fs::unlinkat(&self.target.directory, partial, AtFlags::empty());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn names(directory: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            directory.read_dir().unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn begin(path: &Path, named: bool) -> NewFile {
        let target = Target::open(path).unwrap();
        let new = if named { target.create_named() } else { target.create() }.unwrap();
        new.file().unwrap().write_all(b"new").unwrap();
        new
    }

    #[test]
    fn a_file_appears_complete_or_not_at_all() {
        for named in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("image.sqsh");
            std::fs::write(&path, "old").unwrap();
            let new = begin(&path, named);
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            drop(new);
            assert_eq!(names(directory.path()), ["image.sqsh"]);
            assert_eq!(std::fs::read(&path).unwrap(), b"old");
            begin(&path, named).publish().unwrap();
            assert_eq!(names(directory.path()), ["image.sqsh"]);
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
        }
    }

    #[test]
    fn unfinished_files_of_nobody_are_used_again_and_others_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.sqsh");
        let alive = begin(&path, true);
        let killed = begin(&path, true);
        // As after a kill: the file stays, the lock goes.
        let left = killed.partial.clone().unwrap();
        std::fs::write(directory.path().join("copy"), "").unwrap();
        drop(killed);
        std::fs::rename(directory.path().join("copy"), directory.path().join(&left)).unwrap();
        assert_eq!(names(directory.path()).len(), 2);
        for named in [false, true] {
            begin(&path, named).publish().unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"new");
        }
        assert_eq!(names(directory.path()), [alive.partial.as_ref().unwrap().to_str().unwrap(), "image.sqsh"]);
        drop(alive);
        assert_eq!(names(directory.path()), ["image.sqsh"]);
    }

    #[test]
    fn targets_that_cannot_be_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let message = |path: &Path| Target::open(path).map(drop).unwrap_err().to_string();
        let shown = directory.path().display().to_string();
        assert_eq!(
            message(&directory.path().join("no/x")),
            format!("cannot create {shown}/no/x: No such file or directory")
        );
        assert_eq!(message(directory.path()), format!("cannot create {shown}: Is a directory"));
        assert!(message(&directory.path().join("x/")).ends_with("Is a directory"));
        let long = directory.path().join("x".repeat(255));
        begin(&long, true).publish().unwrap();
        begin(&long, false).publish().unwrap();
        assert_eq!(names(directory.path()).len(), 1);
    }

    #[test]
    fn a_link_is_replaced_and_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image.sqsh");
        std::fs::write(directory.path().join("other"), "other").unwrap();
        std::os::unix::fs::symlink("other", &path).unwrap();
        begin(&path, false).publish().unwrap();
        assert!(path.symlink_metadata().unwrap().is_file());
        assert_eq!(std::fs::read(directory.path().join("other")).unwrap(), b"other");
    }
}
