//! What the appearance of devices leaves in a root filesystem that is kept, and how it goes again: an image saved from it or
//! a later start on a node with another driver must find nothing of it.
//!
//! Devices appear by mounts, which end with the container. Two things are in the root filesystem itself:
//!
//! * mount points, made as stubs (`RootDir::mount_point`), and links to stubs beside them, which exports leave out. They are
//!   listed in a file before they are made, so that the next start can remove those that it does not need, whenever this one is
//!   killed. Only what is still a stub, or leads to one, is removed, and only when no other container uses the root filesystem:
//!   removing a mount point ends its mounts in all namespaces.
//! * `/etc/ld.so.cache`, which is written and not mounted over, because ldconfig, and with it every package manager, replaces
//!   it by renaming. What it was before is kept beside it. Whether it is ours still, its own text says.
//!
//! The files are the user's, as everything else in the root filesystem: they are read and written with his rights only, and
//! what he writes there can do nothing that he could not.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat, StatxFlags};
use rustix::io::Errno;
use rustix::path::Arg;

use super::ldcache::{self, Cache};
use crate::mounts::rootdir::RootDir;

/// The directory of our files in a root filesystem that is kept; exports leave it out.
pub const DIRECTORY: &str = ".pyxis";
/// The list.
const LIST: &str = "mount-points";
/// What [`ldcache::PATH`] was.
const CACHE: &str = "ld.so.cache";
/// Most bytes of the list.
const MAX_LIST: u64 = 1 << 20;

/// Mount points, and directories that were made for them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountPoints(BTreeSet<PathBuf>);

impl MountPoints {
    /// Those of earlier starts.
    pub fn read(root: RootDir<'_>) -> Self {
        let list = root.read(&format!("/{DIRECTORY}/{LIST}"), MAX_LIST).ok().flatten().unwrap_or_default();
        let paths = list.split(|&byte| byte == 0).filter(|path| path.starts_with(b"/"));
        Self(paths.map(|path| PathBuf::from(OsStr::from_bytes(path))).collect())
    }

    /// Adds the mount point `path` and those directories on the way to it that `root` does not have.
    pub fn add(&mut self, root: RootDir<'_>, path: &Path) {
        let mut missing = path;
        while self.0.insert(missing.to_owned()) {
            match missing.parent() {
                Some(parent) if root.open(parent, OFlags::PATH, Mode::empty()).is_err_and(|e| e == Errno::NOENT) => {
                    missing = parent;
                }
                _ => break,
            }
        }
    }

    /// Adds all of `other`.
    pub fn extend(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// Writes the list, to be read by a later start.
    pub fn write(&self, root: RootDir<'_>) -> io::Result<()> {
        let list: Vec<u8> = self.0.iter().flat_map(|path| [path.as_os_str().as_bytes(), b"\0"].concat()).collect();
        if list.is_empty() {
            return match root.open(Path::new(DIRECTORY), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
                Ok(directory) => Ok(rustix::fs::unlinkat(directory, LIST, AtFlags::empty()).or_else(unless_missing)?),
                Err(errno) => Ok(unless_missing(errno)?),
            };
        }
        replace(root, DIRECTORY, DIRECTORY, LIST, &list)
    }

    /// Removes what is still a stub and not one of `wanted`, and directories that nothing is in any more. Those that stay
    /// are returned.
    pub fn remove_except(self, root: RootDir<'_>, wanted: &Self) -> Self {
        let mut directories = Self::default();
        // Before what they lead to, and those that will lead elsewhere.
        for path in &self.0 {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let Ok(directory) = root.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) else { continue };
            let Ok(target) = rustix::fs::readlinkat(&directory, name, Vec::new()) else { continue };
            let target = parent.join(OsStr::from_bytes(target.as_bytes()));
            let stays = wanted.0.contains(path) && wanted.0.contains(&target);
            if !stays && self.0.contains(&target) && is_link_to_stub(directory.as_fd(), name) {
                let _ = rustix::fs::unlinkat(&directory, name, AtFlags::empty());
            }
        }
        // What is below a directory comes before it.
        for path in self.0.into_iter().rev().filter(|path| !wanted.0.contains(path)) {
            let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else { continue };
            let Ok(parent) = root.open(parent, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) else { continue };
            let Ok(status) = rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            match FileType::from_raw_mode(status.st_mode) {
                FileType::Directory => {
                    let is_wanted = wanted.0.iter().any(|wanted| wanted.starts_with(&path));
                    if is_wanted || rustix::fs::unlinkat(&parent, name, AtFlags::REMOVEDIR).is_err() {
                        directories.0.insert(path);
                    }
                }
                FileType::RegularFile if is_stub(&status) => {
                    // What cannot be removed will not be in the way.
                    let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
                }
                // A user has made something of it.
                _ => {}
            }
        }
        directories
    }
}

/// A mount point made for a container: without any permission, and nothing in it.
pub fn is_stub(status: &Stat) -> bool {
    let kind = FileType::from_raw_mode(status.st_mode);
    status.st_mode & 0o7777 == 0
        && (kind == FileType::Directory || kind == FileType::RegularFile && status.st_size == 0)
}

/// Whether something is mounted on the name.
pub fn is_mounted_on(parent: BorrowedFd<'_>, name: impl Arg) -> Result<bool, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let status = rustix::fs::statx(parent, name, flags, StatxFlags::empty())?;
    Ok(status.stx_attributes.bits() & libc::STATX_ATTR_MOUNT_ROOT as u64 != 0)
}

/// Whether the name is a library's, and leads to a library's stub beside it, or to what is mounted there.
pub fn is_link_to_stub(parent: BorrowedFd<'_>, name: impl Arg) -> bool {
    let Ok(target) = rustix::fs::readlinkat(parent, name, Vec::new()) else { return false };
    let target = target.as_c_str();
    let is_library = target.to_bytes().windows(3).any(|part| part == b".so");
    if target.to_bytes().contains(&b'/') || !is_library {
        return false;
    }
    let status = rustix::fs::statat(parent, target, AtFlags::SYMLINK_NOFOLLOW);
    status.is_ok_and(|status| is_stub(&status)) || is_mounted_on(parent, target).is_ok_and(|mounted| mounted)
}

fn unless_missing(errno: Errno) -> Result<(), Errno> {
    if errno == Errno::NOENT { Ok(()) } else { Err(errno) }
}

/// The image's own cache, as it is without devices; `None` if there is none, or only one that nobody can use.
pub fn own_cache(root: RootDir<'_>) -> io::Result<Option<Vec<u8>>> {
    let current = root.read(ldcache::PATH, ldcache::MAX_FILE)?;
    match &current {
        Some(content) if is_ours(content) => saved_cache(root),
        _ => Ok(current),
    }
}

/// What was saved when the cache was replaced.
pub fn saved_cache(root: RootDir<'_>) -> io::Result<Option<Vec<u8>>> {
    root.read(&format!("/{DIRECTORY}/{CACHE}"), ldcache::MAX_FILE)
}

/// Whether `cache` was written by [`replace_cache`].
pub fn is_ours(cache: &[u8]) -> bool {
    Cache::parse(cache).is_ok_and(|cache| cache.is_ours())
}

/// Replaces the cache, `own`, by `new`. With `keep`, [`own_cache`] goes on to know what was there.
pub fn replace_cache(root: RootDir<'_>, own: Option<&[u8]>, new: &[u8], keep: bool) -> io::Result<()> {
    let (directory, name) = cache_path();
    if root.read(ldcache::PATH, new.len() as u64).is_ok_and(|there| there.as_deref() == Some(new)) {
        return Ok(());
    }
    if !keep {
        return replace(root, directory, directory, name, new);
    }
    // First what was there, and completely.
    match own {
        Some(own) => replace(root, DIRECTORY, DIRECTORY, CACHE, own)?,
        None => {
            let directory = root.directory(Path::new(DIRECTORY))?;
            rustix::fs::unlinkat(directory, CACHE, AtFlags::empty()).or_else(unless_missing)?;
        }
    }
    replace(root, DIRECTORY, directory, name, new)
}

/// Undoes [`replace_cache`] of an earlier start, if nobody else has replaced the cache since.
pub fn restore_cache(root: RootDir<'_>) -> io::Result<()> {
    // Nothing but ours has one there.
    if root.open(Path::new(DIRECTORY), OFlags::PATH, Mode::empty()).is_err() {
        return Ok(());
    }
    let current = root.read(ldcache::PATH, ldcache::MAX_FILE)?;
    if !current.is_some_and(|content| is_ours(&content)) {
        return Ok(());
    }
    let (directory, name) = cache_path();
    match saved_cache(root)? {
        Some(own) => replace(root, DIRECTORY, directory, name, &own),
        None => {
            let directory = root.directory(Path::new(directory))?;
            Ok(rustix::fs::unlinkat(directory, name, AtFlags::empty())?)
        }
    }
}

fn cache_path() -> (&'static str, &'static str) {
    ldcache::PATH.rsplit_once('/').unwrap_or(("/", ldcache::PATH))
}

/// Gives `directory` a file `name` with `content`, all at once; it is written in the directory `staging`.
fn replace(root: RootDir<'_>, staging: &str, directory: &str, name: &str, content: &[u8]) -> io::Result<()> {
    let staging = root.directory(Path::new(staging))?;
    let target = root.directory(Path::new(directory))?;
    let temporary = format!(".{name}.new");
    rustix::fs::unlinkat(&staging, &temporary, AtFlags::empty()).or_else(unless_missing)?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(&staging, &temporary, flags, Mode::from_raw_mode(0o644))?);
    file.write_all(content)?;
    let renamed = rustix::fs::renameat(&staging, &temporary, &target, name);
    if renamed.is_err() {
        let _ = rustix::fs::unlinkat(&staging, &temporary, AtFlags::empty());
    }
    Ok(renamed?)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::devices::ldcache::{Addition, merge};
    use crate::mounts::entry::Create;

    fn with_root(test: impl FnOnce(&Path, RootDir<'_>)) {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("etc")).unwrap();
        let fd = File::open(directory.path()).unwrap();
        test(directory.path(), RootDir::new(fd.as_fd()));
    }

    fn cache(name: &str) -> Vec<u8> {
        let additions = [Addition { name: name.into(), path: format!("/usr/lib/{name}"), is_32_bit: false }];
        merge(Cache::default(), &additions).to_bytes()
    }

    #[test]
    fn stubs_go_when_nobody_needs_them() {
        with_root(|path, root| {
            let mut points = MountPoints::default();
            let targets = ["/usr/lib64/liba.so.1", "/usr/lib64/liba.so.2", "/usr/lib64/used", "/run/socket", "/etc/x"];
            fs::create_dir(path.join("run")).unwrap();
            for target in targets {
                points.add(root, Path::new(target));
                root.mount_point(Path::new(target), Create::File).unwrap();
            }
            points.write(root).unwrap();
            let read = MountPoints::read(root);
            assert_eq!(read, points);
            // The user has made something of one.
            fs::set_permissions(path.join("usr/lib64/used"), fs::Permissions::from_mode(0o644)).unwrap();
            let mut wanted = MountPoints::default();
            wanted.add(root, Path::new("/usr/lib64/liba.so.2"));
            let read = read.remove_except(root, &wanted);
            assert_eq!(read.0.len(), 2, "{read:?}");
            let mut read = read;
            read.extend(wanted);
            let left = |name: &str| path.join(name).symlink_metadata().is_ok();
            assert!(!left("usr/lib64/liba.so.1") && !left("run/socket") && !left("etc/x"));
            assert!(left("usr/lib64/liba.so.2") && left("usr/lib64/used") && left("run"));
            fs::remove_file(path.join("usr/lib64/used")).unwrap();
            read.remove_except(root, &MountPoints::default());
            // Directories that were made go, others stay.
            assert!(!left("usr") && left("run") && left("etc"));
            MountPoints::default().write(root).unwrap();
            assert_eq!(MountPoints::read(root), MountPoints::default());
        });
    }

    #[test]
    fn links_go_with_what_they_lead_to() {
        use std::os::unix::fs::symlink;
        with_root(|path, root| {
            let mut points = MountPoints::default();
            for target in
                ["/usr/lib64/liba.so.550", "/usr/lib64/liba.so.1", "/usr/lib64/libb.so", "/usr/lib64/libc.so.1"]
            {
                points.add(root, Path::new(target));
            }
            root.mount_point(Path::new("/usr/lib64/liba.so.550"), Create::File).unwrap();
            let directory = path.join("usr/lib64");
            symlink("liba.so.550", directory.join("liba.so.1")).unwrap();
            // The user's: elsewhere, or to something of his own.
            symlink("/etc/x.so", directory.join("libb.so")).unwrap();
            fs::write(directory.join("libc.so.6"), "his").unwrap();
            symlink("libc.so.6", directory.join("libc.so.1")).unwrap();
            points.remove_except(root, &MountPoints::default());
            let mut left: Vec<_> = fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            left.sort();
            assert_eq!(left, ["libb.so", "libc.so.1", "libc.so.6"]);
        });
    }

    #[test]
    fn what_a_list_says_is_done_inside() {
        with_root(|path, root| {
            let outside = tempfile::NamedTempFile::new().unwrap();
            fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o000)).unwrap();
            std::os::unix::fs::symlink(outside.path().parent().unwrap(), path.join("out")).unwrap();
            fs::create_dir(path.join(DIRECTORY)).unwrap();
            let name = outside.path().file_name().unwrap().to_str().unwrap();
            let list = format!("/out/{name}\0/../{name}\0relative\0{}\0/\0", outside.path().display());
            fs::write(path.join(DIRECTORY).join(LIST), list).unwrap();
            MountPoints::read(root).remove_except(root, &MountPoints::default());
            assert!(outside.path().exists() && path.join("out").symlink_metadata().is_ok());
        });
    }

    #[test]
    fn the_images_cache_comes_back() {
        with_root(|path, root| {
            let file = path.join("etc/ld.so.cache");
            for own in [None, Some(&b"the image's"[..])] {
                if let Some(own) = own {
                    fs::write(&file, own).unwrap();
                }
                for name in ["libx.so.1", "libx.so.2"] {
                    let before = own_cache(root).unwrap();
                    assert_eq!(before.as_deref(), own);
                    replace_cache(root, before.as_deref(), &cache(name), true).unwrap();
                    assert_eq!(fs::read(&file).unwrap(), cache(name));
                }
                restore_cache(root).unwrap();
                assert_eq!(fs::read(&file).ok().as_deref(), own);
            }
            // Somebody else's stays.
            replace_cache(root, None, &cache("libx.so.1"), true).unwrap();
            fs::write(&file, "ldconfig's").unwrap();
            restore_cache(root).unwrap();
            assert_eq!(fs::read(&file).unwrap(), b"ldconfig's");
            assert_eq!(own_cache(root).unwrap().unwrap(), b"ldconfig's");
        });
    }

    #[test]
    fn a_root_that_is_not_kept_has_nothing_of_ours() {
        with_root(|path, root| {
            restore_cache(root).unwrap();
            replace_cache(root, None, &cache("libx.so.1"), false).unwrap();
            assert!(!path.join(DIRECTORY).exists());
            assert_eq!(fs::read_dir(path.join("etc")).unwrap().count(), 1);
        });
    }
}
