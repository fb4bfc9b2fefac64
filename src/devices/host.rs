//! The files that say what devices a host has: procfs, `/dev`, library directories. Tests have hosts of their own, in
//! directories.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Most names of one directory that are looked at.
const MAX_NAMES: usize = 4096;

/// A host. All paths are absolute, as the host has them, and are opened with the rights of the calling process.
#[derive(Debug, Clone)]
pub struct Host {
    root: PathBuf,
}

impl Default for Host {
    fn default() -> Self {
        Self::at("/")
    }
}

impl Host {
    /// The host whose files are below `root`.
    pub fn at(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    fn path(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    /// The beginning of a file, at most `limit` bytes. Never waits for a writer of a FIFO.
    pub fn read(&self, path: impl AsRef<Path>, limit: u64) -> io::Result<Vec<u8>> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(self.path(path.as_ref()), flags, Mode::empty())?);
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes)?;
        Ok(bytes)
    }

    /// The same as text; bytes that are not UTF-8 are replaced.
    pub fn read_text(&self, path: impl AsRef<Path>, limit: u64) -> io::Result<String> {
        Ok(String::from_utf8_lossy(&self.read(path, limit)?).into_owned())
    }

    /// What is in a directory, sorted; nothing if there is none.
    pub fn names(&self, path: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path(path.as_ref())) else { return Vec::new() };
        let names = entries.take(MAX_NAMES).filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.collect();
        names.sort_unstable();
        names
    }

    /// Whether the path leads to something.
    pub fn exists(&self, path: impl AsRef<Path>) -> bool {
        rustix::fs::access(self.path(path.as_ref()), Access::EXISTS).is_ok()
    }

    /// Whether permissions keep the calling process from using the device node.
    pub fn forbids(&self, node: impl AsRef<Path>) -> bool {
        let both = Access::READ_OK | Access::WRITE_OK;
        rustix::fs::access(self.path(node.as_ref()), both) == Err(Errno::ACCESS)
    }

    /// Whether the path leads to a directory.
    pub fn is_directory(&self, path: impl AsRef<Path>) -> bool {
        self.path(path.as_ref()).is_dir()
    }

    /// Whether the path leads to a socket.
    pub fn is_socket(&self, path: impl AsRef<Path>) -> bool {
        let stat = rustix::fs::statat(rustix::fs::CWD, self.path(path.as_ref()), AtFlags::empty());
        stat.is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Socket)
    }

    /// What a symbolic link holds.
    pub fn link(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        std::fs::read_link(self.path(path.as_ref())).ok()
    }

    /// The regular file that the path leads to, by the name that no link is part of.
    pub fn resolve(&self, path: impl AsRef<Path>) -> Option<PathBuf> {
        let file = rustix::fs::open(self.path(path.as_ref()), OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return None;
        }
        let link = rustix::fs::readlink(format!("/proc/self/fd/{}", file.as_raw_fd()), Vec::new()).ok()?;
        let path = PathBuf::from(link.into_string().ok()?);
        Some(Path::new("/").join(path.strip_prefix(&self.root).ok()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_found_through_links() {
        let directory = tempfile::tempdir().unwrap();
        let root = directory.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("usr/lib")).unwrap();
        std::fs::write(root.join("usr/lib/liba.so.1.2"), "content").unwrap();
        std::os::unix::fs::symlink("liba.so.1.2", root.join("usr/lib/liba.so.1")).unwrap();
        std::os::unix::fs::symlink("usr/lib", root.join("lib")).unwrap();
        let host = Host::at(&root);
        assert_eq!(host.resolve("/lib/liba.so.1"), Some("/usr/lib/liba.so.1.2".into()));
        assert_eq!(host.resolve("/lib"), None);
        assert_eq!(host.resolve("/lib/liba.so.2"), None);
        assert_eq!(host.read("/lib/liba.so.1", 4).unwrap(), b"cont");
        assert_eq!(host.names("/lib"), ["liba.so.1", "liba.so.1.2"]);
        assert_eq!(host.names("/none"), [""; 0]);
        assert!(host.exists("/lib") && host.is_directory("/lib") && !host.exists("/lib/x") && !host.is_socket("/lib"));
    }
}
