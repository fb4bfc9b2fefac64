//! Files and directories of the store, relative to its root: listing, temporary files, records that appear whole.

use std::fs::File;
use std::hash::{BuildHasher, Hasher};
use std::io::{Read, Write};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::{Result, Store};

/// Prefix of files that have no content yet.
pub(super) const TEMPORARY: &str = ".tmp-";
/// Longest record that is read back: 500 layers take about 120 kB, an image config at most 8 MiB.
const MAX_RECORD: u64 = 8 << 20;

impl Store {
    /// Names in a directory, without `.` and `..`; `""` is the store itself. A directory that is missing is empty.
    pub(super) fn list(&self, directory: &str) -> Result<Vec<String>> {
        let path = if directory.is_empty() { "." } else { directory };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let fd = match rustix::fs::openat(&self.root, path, flags, Mode::empty()) {
            Ok(fd) => fd,
            Err(Errno::NOENT) => return Ok(Vec::new()),
            Err(errno) => return Err(self.error("open", directory, errno)),
        };
        let mut names = Vec::new();
        let entries = rustix::fs::Dir::new(fd).map_err(|errno| self.error("list", directory, errno))?;
        for entry in entries {
            let entry = entry.map_err(|errno| self.error("list", directory, errno))?;
            // Every name that this module makes is UTF-8; others are none of its business.
            if let Ok(name) = entry.file_name().to_str()
                && name != "."
                && name != ".."
            {
                names.push(name.to_owned());
            }
        }
        Ok(names)
    }

    /// Makes one directory, 0700 whatever the umask.
    pub(super) fn make_directory(&self, name: &str) -> Result<()> {
        match rustix::fs::mkdirat(&self.root, name, Mode::RWXU) {
            Ok(()) => rustix::fs::chmodat(&self.root, name, Mode::RWXU, AtFlags::empty())
                .map_err(|errno| self.error("set the mode of", name, errno)),
            Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(self.error("create", name, errno)),
        }
    }

    /// Creates an empty file with a name of its own, with a shared lock that keeps the collector away from it.
    pub(super) fn create_temporary(&self, directory: &str) -> Result<(String, File)> {
        loop {
            // RandomState is seeded by the kernel once a process and differs on every call: no crate needed, and a
            // collision is caught by O_EXCL.
            let random = std::hash::RandomState::new().build_hasher().finish();
            let name = join(directory, &format!("{TEMPORARY}{random:016x}"));
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
            let file = match rustix::fs::openat(&self.root, &name, flags, Mode::RUSR) {
                Ok(file) => file,
                Err(Errno::EXIST) => continue,
                Err(errno) => return Err(self.error("create", &name, errno)),
            };
            // The collector may have come between open and flock.
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
                Ok(()) => {}
                Err(Errno::WOULDBLOCK) => continue,
                Err(errno) => return Err(self.error("lock", &name, errno)),
            }
            let stat = rustix::fs::fstat(&file).map_err(|errno| self.error("examine", &name, errno))?;
            if self.leads_to(&name, &stat)? {
                return Ok((name, file.into()));
            }
        }
    }

    /// Writes the file `directory/name`: the old content or all of the new one, whenever the machine stops.
    pub(super) fn write_record(&self, directory: &str, name: &str, content: &[u8]) -> Result<()> {
        let target = join(directory, name);
        let (temporary, mut file) = self.create_temporary(directory)?;
        let written = file
            .write_all(content)
            .and_then(|()| file.sync_all())
            .map_err(|source| self.error("write", &target, source))
            .and_then(|()| {
                rustix::fs::renameat(&self.root, &temporary, &self.root, &target)
                    .map_err(|errno| self.error("write", &target, errno))
            });
        if written.is_err() {
            // Best effort: the collector finds what stays.
            let _ = rustix::fs::unlinkat(&self.root, &temporary, AtFlags::empty());
        }
        written
    }

    /// Content of a record; `None` if there is none.
    pub(super) fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(file) = self.open_file(name)? else { return Ok(None) };
        let mut content = Vec::new();
        file.take(MAX_RECORD).read_to_end(&mut content).map_err(|source| self.error("read", name, source))?;
        Ok(Some(content))
    }

    /// Removes a name. Gone already is fine.
    pub(super) fn unlink(&self, name: &str) -> Result<()> {
        match rustix::fs::unlinkat(&self.root, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.error("remove", name, errno)),
        }
    }

    /// Makes the names in a directory durable.
    pub(super) fn sync_directory(&self, directory: &str) -> Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.root, directory, flags, Mode::empty())
            .and_then(rustix::fs::fsync)
            .map_err(|errno| self.error("sync", directory, errno))
    }
}

/// `directory/name`, or `name` in the store's root.
pub(super) fn join(directory: &str, name: &str) -> String {
    if directory.is_empty() { name.to_owned() } else { format!("{directory}/{name}") }
}
