//! Writes a root filesystem, file by file: for `pyxis create` and `pyxis load`.
//!
//! Paths come from an image and are hostile. Every one is looked up from the root directory with openat2(2), which leaves
//! it by no link and no `..`; files are made, never opened. What is written belongs to the user, who may do everything with
//! directories and read every file; setuid and setgid bits go, as they mean nothing in a container with one user.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Timespec, Timestamps, XattrFlags};
use rustix::io::Errno;

use crate::container::remove::remove_tree;

/// What an inode has, besides its content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Permission bits.
    pub mode: u16,
    /// Modification time: seconds and nanoseconds.
    pub mtime: (i64, u32),
    /// `user.` attributes: whole names, and values.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// A tree being written.
#[derive(Debug)]
pub struct TreeWriter<'a> {
    root: BorrowedFd<'a>,
    /// The directory that was used last.
    last: Option<(Vec<u8>, OwnedFd)>,
}

impl<'a> TreeWriter<'a> {
    /// Writes below `root`, which is empty.
    pub fn new(root: BorrowedFd<'a>) -> Self {
        Self { root, last: None }
    }

    /// Makes a directory. Its attributes are set at the end: [`TreeWriter::attributes`].
    pub fn directory(&mut self, path: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        Ok(rustix::fs::mkdirat(parent, name, Mode::RWXU)?)
    }

    /// Makes a file and lets `fill` write it.
    pub fn file(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<FileWriter> {
        let (parent, name) = self.parent(path)?;
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(parent, name, flags, Mode::RUSR | Mode::WUSR)?);
        for (name, value) in &attributes.xattrs {
            set_xattr(file.as_fd(), name, value)?;
        }
        Ok(FileWriter { file, position: 0, mode: file_mode(attributes.mode), times: times(attributes) })
    }

    /// Makes a symbolic link.
    pub fn symlink(&mut self, path: &[u8], attributes: &Attributes, target: &[u8]) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::symlinkat(target, parent, name)?;
        Ok(rustix::fs::utimensat(parent, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Makes a named pipe.
    pub fn fifo(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        let (parent, name) = self.parent(path)?;
        rustix::fs::mkfifoat(parent, name, file_mode(attributes.mode))?;
        Ok(rustix::fs::utimensat(parent, name, &times(attributes), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Gives what is at `existing` a second name. Where a file cannot have one more (`EMLINK`), it is an error.
    pub fn link(&mut self, existing: &[u8], path: &[u8]) -> io::Result<()> {
        let (from, from_name) = split(existing)?;
        let from = open(self.root, from)?;
        let (parent, name) = self.parent(path)?;
        Ok(rustix::fs::linkat(&from, from_name, parent, name, AtFlags::empty())?)
    }

    /// Removes what is at `path`, with everything below.
    pub fn remove(&mut self, path: &[u8]) -> io::Result<()> {
        // It may be the one that was used last.
        self.last = None;
        let (parent, name) = self.parent(path)?;
        Ok(remove_tree(parent, name)?)
    }

    /// Sets the attributes of a directory, when nothing is going to be made in it any more. The empty path is the root.
    pub fn attributes(&mut self, path: &[u8], attributes: &Attributes) -> io::Result<()> {
        let directory = match path.is_empty() {
            true => rustix::fs::openat(self.root, ".", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?,
            false => open_with(self.root, path, OFlags::RDONLY | OFlags::DIRECTORY)?,
        };
        for (name, value) in &attributes.xattrs {
            set_xattr(directory.as_fd(), name, value)?;
        }
        rustix::fs::fchmod(&directory, Mode::from_raw_mode(u32::from(attributes.mode & 0o1777 | 0o700)))?;
        Ok(rustix::fs::futimens(&directory, &times(attributes))?)
    }

    /// The directory that `path` is in, and the last name.
    fn parent<'p>(&mut self, path: &'p [u8]) -> io::Result<(BorrowedFd<'_>, &'p [u8])> {
        let (parent, name) = split(path)?;
        if parent.is_empty() {
            return Ok((self.root, name));
        }
        if self.last.as_ref().is_none_or(|(last, _)| last != parent) {
            self.last = Some((parent.to_vec(), open(self.root, parent)?));
        }
        match &self.last {
            Some((_, directory)) => Ok((directory.as_fd(), name)),
            None => Err(Errno::NOENT.into()),
        }
    }
}

/// A file being written, in order.
#[derive(Debug)]
pub struct FileWriter {
    file: File,
    position: u64,
    mode: Mode,
    times: Timestamps,
}

impl FileWriter {
    /// Appends `bytes`.
    pub fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, self.position)?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    /// Appends `length` zeros that take no space.
    pub fn hole(&mut self, length: u64) -> io::Result<()> {
        self.position = self.position.checked_add(length).ok_or(Errno::FBIG)?;
        Ok(())
    }

    /// It is whole.
    pub fn finish(self) -> io::Result<()> {
        if self.file.metadata()?.len() < self.position {
            self.file.set_len(self.position)?;
        }
        rustix::fs::fchmod(&self.file, self.mode)?;
        Ok(rustix::fs::futimens(&self.file, &self.times)?)
    }
}

/// The mode of what is no directory: readable for the owner, and executable for him if it is for anybody.
fn file_mode(mode: u16) -> Mode {
    let owner = if mode & 0o111 != 0 { 0o500 } else { 0o400 };
    Mode::from_raw_mode(u32::from(mode & 0o777 | owner))
}

fn times(attributes: &Attributes) -> Timestamps {
    let (tv_sec, nanoseconds) = attributes.mtime;
    let time = Timespec { tv_sec, tv_nsec: nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

/// Not every file system has extended attributes, and no program in an image relies on those of users.
fn set_xattr(file: BorrowedFd<'_>, name: &[u8], value: &[u8]) -> io::Result<()> {
    match rustix::fs::fsetxattr(file, name, value, XattrFlags::empty()) {
        Err(Errno::OPNOTSUPP | Errno::NOSPC | Errno::PERM) => Ok(()),
        other => Ok(other?),
    }
}

/// Directory and name of a path without `/` in front.
fn split(path: &[u8]) -> io::Result<(&[u8], &[u8])> {
    let (parent, name) = match path.iter().rposition(|&byte| byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&path[..0], path),
    };
    match name {
        b"" | b"." | b".." => Err(Errno::INVAL.into()),
        name => Ok((parent, name)),
    }
}

/// A reference to the directory `path`.
fn open(root: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    open_with(root, path, OFlags::PATH | OFlags::DIRECTORY)
}

fn open_with(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    loop {
        match rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
            // A rename somewhere in the system raced with the look-up.
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;
    use crate::unpacked::open_root;

    fn attributes(mode: u16) -> Attributes {
        Attributes { mode, mtime: (86_400, 7), xattrs: Vec::new() }
    }

    #[test]
    fn files_are_as_they_should_be() {
        let directory = tempfile::tempdir().unwrap();
        let root = open_root(directory.path()).unwrap();
        let mut tree = TreeWriter::new(root.as_fd());
        tree.directory(b"a").unwrap();
        tree.directory(b"a/b").unwrap();
        let mut file = tree.file(b"a/b/file", &attributes(0o6711)).unwrap();
        file.write(b"head").unwrap();
        file.hole(1 << 20).unwrap();
        file.write(b"tail").unwrap();
        file.hole(10).unwrap();
        file.finish().unwrap();
        tree.symlink(b"a/link", &attributes(0o777), b"../../outside").unwrap();
        tree.fifo(b"fifo", &attributes(0)).unwrap();
        tree.link(b"a/b/file", b"second").unwrap();
        tree.link(b"a/link", b"a/second-link").unwrap();
        tree.attributes(b"a/b", &attributes(0o3050)).unwrap();
        tree.attributes(b"", &attributes(0o755)).unwrap();
        let status = |path: &str| directory.path().join(path).symlink_metadata().unwrap();
        let file = status("a/b/file");
        assert_eq!((file.mode() & 0o7777, file.len(), file.nlink()), (0o711, (1 << 20) + 18, 2));
        assert_eq!((file.mtime(), file.mtime_nsec()), (86_400, 7));
        assert!(file.blocks() < 100);
        assert_eq!(status("a/b").mode() & 0o7777, 0o1750);
        assert_eq!(status("fifo").mode() & 0o7777, 0o400);
        assert_eq!(status("a/link").ino(), status("a/second-link").ino());
        tree.remove(b"a").unwrap();
        assert!(status("second").is_file() && !directory.path().join("a").exists());
    }

    #[test]
    fn nothing_leads_outside() {
        let outside = tempfile::tempdir().unwrap();
        let directory = tempfile::tempdir().unwrap();
        symlink(outside.path(), directory.path().join("link")).unwrap();
        let root = open_root(directory.path()).unwrap();
        let mut tree = TreeWriter::new(root.as_fd());
        for path in [&b"link/x"[..], b"../x", b"link", b"..", b"a/../../x", b"", b"/tmp/x", b"missing/x"] {
            assert!(tree.file(path, &attributes(0o644)).is_err());
            assert!(tree.directory(path).is_err());
            assert!(tree.symlink(path, &attributes(0o777), b"x").is_err());
        }
        assert!(tree.link(b"link/x", b"x").is_err() && tree.attributes(b"link", &attributes(0o755)).is_err());
        assert_eq!(std::fs::read_dir(outside.path()).unwrap().count(), 0);
    }
}
