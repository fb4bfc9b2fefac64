//! Reads a root filesystem: each name once, by descriptor, never through a symbolic link or into another file system.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, SeekFrom, Stat};
use rustix::io::Errno;

use super::ExportError;
use crate::devices::remains::{is_link_to_stub, is_mounted_on, is_stub};
use crate::devices::{ldcache, remains};
use crate::mounts::rootdir::RootDir;
use crate::squashfs::writer::{Attributes, Entry, FileWriter, Special, Writer, Xattrs};

/// What only this container has, whatever it is. What is in `/dev` is left out, too.
const LEFT_OUT: [&[u8]; 3] = [b".enroot", b".lock", remains::DIRECTORY.as_bytes()];
const DEV: &[u8] = b"dev";
const LIBRARY_CACHE: &[u8] = b"etc/ld.so.cache";
/// Longest name and value of an extended attribute (xattr(7)).
const XATTR_MAX: usize = 64 << 10;

/// A directory being read: its names, the last one first.
struct Level {
    directory: OwnedFd,
    path: Vec<u8>,
    names: Vec<Vec<u8>>,
}

/// Whether files that say how to start a container may be added to `root`: it has none, and `/etc` is a directory or
/// absent.
pub fn wants_start_files(root: BorrowedFd<'_>) -> bool {
    let is_absent = |directory: BorrowedFd<'_>, name: &str| {
        rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).is_err_and(|errno| errno == Errno::NOENT)
    };
    match open(root, b"etc", OFlags::PATH | OFlags::DIRECTORY) {
        Ok(etc) => is_absent(etc.as_fd(), "rc"),
        Err(_) => is_absent(root, "etc"),
    }
}

/// Adds everything in `root` to `writer`, but what is there already.
pub fn walk(root: BorrowedFd<'_>, writer: &mut Writer) -> Result<(), ExportError> {
    let root = open(root, b".", OFlags::RDONLY | OFlags::DIRECTORY).map_err(|errno| failed(b"", errno))?;
    let status = rustix::fs::fstat(&root).map_err(|errno| failed(b"", errno))?;
    writer.directory(b"", attributes(&status, xattrs(root.as_fd()).map_err(|errno| failed(b"", errno))?))?;
    let names_of_root = names(&root, b"")?;
    let top = rustix::io::fcntl_dupfd_cloexec(&root, 0).map_err(|errno| failed(b"", errno))?;
    let mut walker = Walker { writer, root: RootDir::new(top.as_fd()), links: HashMap::new() };
    let mut levels = vec![Level { names: names_of_root, directory: root, path: Vec::new() }];
    while let Some(level) = levels.last_mut() {
        let Some(name) = level.names.pop() else {
            levels.pop();
            continue;
        };
        let path = if level.path.is_empty() { name.clone() } else { [&level.path, &b"/"[..], &name].concat() };
        if LEFT_OUT.contains(&&path[..]) || walker.writer.entry(&path) == Some(Entry::Other) {
            continue;
        }
        match walker.entry(level.directory.as_fd(), &name, &path) {
            Ok(Some(directory)) => {
                let names = if path == DEV { Vec::new() } else { names(&directory, &path)? };
                levels.push(Level { directory, path, names });
            }
            Ok(None) => {}
            // Somebody else is at work in this container.
            Err(Failure::Read(Errno::NOENT | Errno::STALE)) => {}
            Err(Failure::Read(errno)) => return Err(failed(&path, errno)),
            Err(Failure::Export(error)) => return Err(error),
        }
    }
    Ok(())
}

/// The names in a directory in reverse order.
fn names(directory: &OwnedFd, path: &[u8]) -> Result<Vec<Vec<u8>>, ExportError> {
    let read = || {
        Dir::read_from(directory)?
            .map(|entry| Ok(entry?.file_name().to_bytes().to_vec()))
            .filter(|name| !matches!(name.as_deref(), Ok(b"." | b"..")))
            .collect::<Result<Vec<_>, Errno>>()
    };
    let mut names = read().map_err(|errno| failed(path, errno))?;
    names.sort_unstable_by(|one, other| other.cmp(one));
    Ok(names)
}

enum Failure {
    Read(Errno),
    Export(ExportError),
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Read(errno)
    }
}

impl From<crate::squashfs::writer::Error> for Failure {
    fn from(error: crate::squashfs::writer::Error) -> Self {
        Self::Export(error.into())
    }
}

struct Walker<'a> {
    writer: &'a mut Writer,
    root: RootDir<'a>,
    /// Files with several names, by device and inode number, and the first of them.
    links: HashMap<(u64, u64), Vec<u8>>,
}

impl Walker<'_> {
    /// Adds one entry; a directory is returned, to be read.
    fn entry(&mut self, parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<Option<OwnedFd>, Failure> {
        let status = rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(status.st_mode);
        if is_stub(&status)
            || is_mounted_on(parent, name)?
            || kind == FileType::Symlink && is_link_to_stub(parent, name)
        {
            return Ok(None);
        }
        if kind == FileType::Directory {
            let directory = match open(parent, name, OFlags::RDONLY | OFlags::DIRECTORY) {
                // A mount that has come since.
                Err(Errno::XDEV) => return Ok(None),
                other => other?,
            };
            self.writer.directory(path, attributes(&status, xattrs(directory.as_fd())?))?;
            return Ok(Some(directory));
        }
        if status.st_nlink > 1 {
            let inode = (status.st_dev, status.st_ino);
            if let Some(first) = self.links.get(&inode) {
                self.writer.hard_link(path, first)?;
                return Ok(None);
            }
        }
        match kind {
            FileType::RegularFile if path == LIBRARY_CACHE && self.devices_are_in_cache() => {
                self.own_cache(path, &status)?;
                return Ok(None);
            }
            FileType::RegularFile => self.file(parent, name, path)?,
            FileType::Symlink => {
                let target = rustix::fs::readlinkat(parent, name, Vec::new())?;
                self.writer.symlink(path, attributes(&status, Vec::new()), target.as_bytes())?;
            }
            other => {
                let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
                let special = match other {
                    FileType::CharacterDevice => Special::CharacterDevice { major, minor },
                    FileType::BlockDevice => Special::BlockDevice { major, minor },
                    FileType::Fifo => Special::Fifo,
                    FileType::Socket => Special::Socket,
                    _ => return Ok(None),
                };
                self.writer.special(path, attributes(&status, Vec::new()), special)?;
            }
        }
        if status.st_nlink > 1 {
            self.links.insert((status.st_dev, status.st_ino), path.to_vec());
        }
        Ok(None)
    }

    /// Whether the linker's cache is one with libraries that have appeared with devices.
    fn devices_are_in_cache(&self) -> bool {
        let content = self.root.read(ldcache::PATH, ldcache::MAX_FILE);
        content.is_ok_and(|content| content.is_some_and(|content| remains::is_ours(&content)))
    }

    /// The linker's cache as it was before, if there was one.
    fn own_cache(&mut self, path: &[u8], status: &Stat) -> Result<(), Failure> {
        let saved = remains::saved_cache(self.root)
            .map_err(|error| Failure::Read(Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
        let Some(content) = saved else { return Ok(()) };
        let mut writer = self.writer.begin_file(path, attributes(status, Vec::new()))?;
        let mut rest = &content[..];
        while !rest.is_empty() {
            let space = writer.space()?;
            let count = space.len().min(rest.len());
            space[..count].copy_from_slice(&rest[..count]);
            writer.advance(count);
            rest = &rest[count..];
        }
        Ok(writer.finish()?)
    }

    fn file(&mut self, parent: BorrowedFd<'_>, name: &[u8], path: &[u8]) -> Result<(), Failure> {
        let file = File::from(open(parent, name, OFlags::RDONLY | OFlags::NONBLOCK)?);
        // What was opened, should it have been replaced.
        let status = rustix::fs::fstat(&file)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(Errno::STALE.into());
        }
        let xattrs = xattrs(file.as_fd())?;
        let mut writer = self.writer.begin_file(path, attributes(&status, xattrs))?;
        let blocks = u64::try_from(status.st_blocks).unwrap_or(0);
        let size = u64::try_from(status.st_size).unwrap_or(0);
        let read = if blocks.saturating_mul(512) < size {
            copy_with_holes(&file, size, &mut writer)
        } else {
            copy(&file, u64::MAX, &mut writer).map(drop)
        };
        // A file that cannot be read ends the export: so the rest of this one does not matter.
        match read {
            Err(Failure::Read(errno)) => Err(Failure::Export(failed(path, errno))),
            other => {
                other?;
                Ok(writer.finish()?)
            }
        }
    }
}

/// Copies at most `limit` bytes from where `file` is; returns how many there were.
fn copy(file: &File, limit: u64, writer: &mut FileWriter<'_>) -> Result<u64, Failure> {
    let mut copied = 0;
    while copied < limit {
        let space = writer.space()?;
        let length = usize::try_from(limit - copied).unwrap_or(usize::MAX).min(space.len());
        let count = match rustix::io::read(file, &mut space[..length]) {
            Ok(0) => break,
            Err(Errno::INTR) => continue,
            other => other?,
        };
        writer.advance(count);
        copied += count as u64;
    }
    Ok(copied)
}

fn copy_with_holes(file: &File, size: u64, writer: &mut FileWriter<'_>) -> Result<(), Failure> {
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            // Nothing but a hole.
            Err(Errno::NXIO) => size,
            // A file system without holes.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                rustix::fs::seek(file, SeekFrom::Start(at))?;
                return copy(file, size - at, writer).map(drop);
            }
            other => other?.min(size),
        };
        writer.hole(data - at)?;
        if data == size {
            return Ok(());
        }
        let end = rustix::fs::seek(file, SeekFrom::Hole(data))?.min(size);
        rustix::fs::seek(file, SeekFrom::Start(data))?;
        let copied = copy(file, end - data, writer)?;
        if copied < end - data {
            // It has become shorter.
            return Ok(());
        }
        at = end;
    }
    Ok(())
}

/// Opens a name of a directory: neither a symbolic link nor what is mounted on it.
fn open(parent: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve =
        ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_XDEV;
    let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    loop {
        match rustix::fs::openat2(parent, name, flags, Mode::empty(), resolve) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            other => return other,
        }
    }
}

fn attributes(status: &Stat, xattrs: Xattrs) -> Attributes {
    // Permission bits fit.
    Attributes { mode: (status.st_mode & 0o7777) as u16, mtime: status.st_mtime, xattrs }
}

/// The user's own extended attributes: others mean nothing elsewhere.
fn xattrs(file: BorrowedFd<'_>) -> Result<Xattrs, Errno> {
    // Almost no file has any.
    let (mut few, mut many) = ([0_u8; 256], Vec::new());
    let list = match rustix::fs::flistxattr(file, &mut few) {
        Ok(0) | Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Ok(length) => &few[..length],
        Err(Errno::RANGE) => {
            many.resize(XATTR_MAX, 0);
            let length = rustix::fs::flistxattr(file, &mut many)?;
            &many[..length]
        }
        Err(errno) => return Err(errno),
    };
    let mut xattrs = Vec::new();
    for name in list.split(|&byte| byte == 0).filter(|name| name.starts_with(b"user.")) {
        // What overlayfs keeps there is its own.
        if name.starts_with(b"user.overlay.") {
            continue;
        }
        let mut value = vec![0; XATTR_MAX];
        match rustix::fs::fgetxattr(file, name, &mut value) {
            Err(Errno::NODATA) => {}
            length => {
                value.truncate(length?);
                xattrs.push((name.to_vec(), value));
            }
        }
    }
    Ok(xattrs)
}

fn failed(path: &[u8], errno: Errno) -> ExportError {
    let path = format!("/{}", String::from_utf8_lossy(path).escape_debug());
    ExportError::Read { path, cause: io::Error::from(errno) }
}
