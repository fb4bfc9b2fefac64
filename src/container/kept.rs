//! The directories of kept containers: made and opened by the broker, listed and removed by their owners.
//!
//! What is below a user's directory is his to rename and replace at any moment, also while root works there: so every
//! step opens one name and follows no link, and what root makes there it makes with the user's file-system identity.

#![forbid(unsafe_code)]

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FlockOperation, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;

use super::FullName;
use super::record::Record;
use super::remove::remove_tree;
use crate::request::User;
use crate::sys;
use crate::sys::process::with_file_system_identity;

/// Directory of overlayfs's upper layer in a container's directory.
pub const UPPER: &str = "upper";
/// Its work directory.
pub const WORK: &str = "work";
/// Prefix of what is being deleted, in a user's directory.
const REMOVED: &str = ".removed-";

/// Something went wrong with a container's directory.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}: {}{}", .path.display(), sys::reason(.source), remedy(.source))]
pub struct KeptError {
    /// "open", "create".
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOSPC | Errno::DQUOT) => "; free space there: \"pyxis list\" and \"pyxis remove\"",
        Some(Errno::ROFS) => "; set container.path to a directory on a local disk",
        _ => "",
    }
}

type Result<T> = std::result::Result<T, KeptError>;

/// `[container] path`: all users' containers, for root.
#[derive(Debug)]
pub struct Containers {
    directory: OwnedFd,
    path: PathBuf,
}

/// The containers of one user.
#[derive(Debug)]
pub struct UserContainers {
    directory: OwnedFd,
    path: PathBuf,
    uid: u32,
}

/// A container's directory, locked: nobody else decides what becomes of it until this is dropped.
#[derive(Debug)]
pub struct KeptContainer {
    directory: OwnedFd,
    path: PathBuf,
    uid: u32,
}

/// What [`UserContainers::try_lock`] found.
#[derive(Debug)]
pub enum Lock {
    /// There is no such directory.
    Absent,
    /// Somebody else has it.
    Busy,
    /// It is ours.
    Taken(KeptContainer),
}

impl Containers {
    /// Opens the directory; `None` if nobody has made a container yet.
    pub fn open(path: &Path) -> Result<Option<Self>> {
        let failed = |source: io::Error| KeptError { action: "open", path: path.to_owned(), source };
        let directory = match open_directory(CWD, path) {
            Err(Errno::NOENT) => return Ok(None),
            other => other.map_err(|errno| failed(errno.into()))?,
        };
        let status = rustix::fs::fstat(&directory).map_err(|errno| failed(errno.into()))?;
        if status.st_uid != 0 || status.st_mode & 0o022 != 0 {
            return Err(failed(io::Error::other("it is not root's alone: chown root it and chmod go-w")));
        }
        Ok(Some(Self { directory, path: path.to_owned() }))
    }

    /// Opens the directory, and makes it, with its parents, if it is missing.
    pub fn create(path: &Path) -> Result<Self> {
        loop {
            if let Some(containers) = Self::open(path)? {
                return Ok(containers);
            }
            make_with_parents(path).map_err(|errno| KeptError {
                action: "create",
                path: path.to_owned(),
                source: errno.into(),
            })?;
        }
    }

    /// The containers of user `uid`, if he has ever had any.
    pub fn user(&self, uid: u32) -> Result<Option<UserContainers>> {
        let path = self.path.join(uid.to_string());
        match open_directory(&self.directory, uid.to_string()) {
            Ok(directory) => Ok(Some(UserContainers { directory, path, uid })),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(KeptError { action: "open", path, source: errno.into() }),
        }
    }

    /// The containers of `user`, with a directory made for them.
    pub fn make_user(&self, user: &User) -> Result<UserContainers> {
        let name = user.uid.to_string();
        let make = || -> std::result::Result<OwnedFd, Errno> {
            match rustix::fs::mkdirat(&self.directory, &name, Mode::RWXU) {
                Err(Errno::EXIST) => {}
                other => other?,
            }
            let directory = open_directory(&self.directory, &name)?;
            // Nobody but root can have put anything here.
            if rustix::fs::fstat(&directory)?.st_uid != user.uid {
                let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
                rustix::fs::fchown(&directory, Some(uid), Some(gid))?;
            }
            Ok(directory)
        };
        let path = self.path.join(&name);
        match make() {
            Ok(directory) => Ok(UserContainers { directory, path, uid: user.uid }),
            Err(errno) => Err(KeptError { action: "create", path, source: errno.into() }),
        }
    }

    /// Who has containers.
    pub fn users(&self) -> Result<Vec<u32>> {
        let names = names(self.directory.as_fd(), &self.path)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }
}

impl UserContainers {
    /// For the user himself: his containers below `path`, the configuration's `container.path`.
    pub fn open_own(path: &Path, uid: u32) -> Result<Option<Self>> {
        let path = path.join(uid.to_string());
        match open_directory(CWD, &path) {
            Ok(directory) => Ok(Some(Self { directory, path, uid })),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(KeptError { action: "open", path, source: errno.into() }),
        }
    }

    /// Names of whole containers, as far as their owner can see, sorted.
    pub fn names(&self) -> Result<Vec<FullName>> {
        let mut found: Vec<FullName> = self
            .all_names()?
            .into_iter()
            .filter(|name| {
                open_directory(&self.directory, name.as_str())
                    .is_ok_and(|directory| Record::seems_present(directory.as_fd()))
            })
            .collect();
        found.sort();
        Ok(found)
    }

    /// Names of containers' directories, whole or not.
    pub fn all_names(&self) -> Result<Vec<FullName>> {
        Ok(names(self.directory.as_fd(), &self.path)?.iter().filter_map(|name| FullName::parse(name)).collect())
    }

    /// What a container was made from, for its owner.
    pub fn read_own(&self, name: &FullName) -> Result<Record> {
        open_directory(&self.directory, name.as_str())
            .map_err(io::Error::from)
            .and_then(|directory| Record::read_as_owner(directory.as_fd()))
            .map_err(|source| self.failed("read", name, source))
    }

    /// What a container was made from; `None` if it never was a whole one. For root.
    pub fn read(&self, name: &FullName) -> Result<Option<Record>> {
        open_directory(&self.directory, name.as_str())
            .map_err(io::Error::from)
            .and_then(|directory| Record::read(directory.as_fd(), self.uid))
            .map_err(|source| self.failed("read the record of", name, source))
    }

    /// Locks the container's directory if it exists and nobody has it locked. Never waits.
    pub fn try_lock(&self, name: &FullName) -> Result<Lock> {
        let failed = |errno: Errno| self.failed("lock", name, errno);
        let directory = match open_directory(&self.directory, name.as_str()) {
            Err(Errno::NOENT) => return Ok(Lock::Absent),
            other => other.map_err(|errno| self.failed("open", name, errno))?,
        };
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => return Ok(Lock::Busy),
            other => other.map_err(failed)?,
        }
        let path = self.path.join(name.as_str());
        let locked = KeptContainer { directory, path, uid: self.uid };
        // Whoever had it before may have renamed it to delete it.
        let status = rustix::fs::fstat(&locked.directory).map_err(failed)?;
        match rustix::fs::statat(&self.directory, name.as_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(now) if (now.st_dev, now.st_ino) == (status.st_dev, status.st_ino) => {}
            Ok(_) => return Ok(Lock::Busy),
            Err(Errno::NOENT) => return Ok(Lock::Absent),
            Err(errno) => return Err(failed(errno)),
        }
        if status.st_uid != self.uid {
            return Err(failed(Errno::PERM));
        }
        Ok(Lock::Taken(locked))
    }

    /// Makes an empty directory for the container unless there is one.
    pub fn make(&self, name: &FullName, user: &User) -> Result<()> {
        match with_file_system_identity(user, || rustix::fs::mkdirat(&self.directory, name.as_str(), Mode::RWXU)) {
            Ok(()) | Err(Errno::EXIST) => Ok(()),
            Err(errno) => Err(self.failed("create", name, errno)),
        }
    }

    /// Takes the container's name away; what it was is deleted by [`UserContainers::delete_removed`]. The caller, root or
    /// the owner, has it locked.
    pub fn remove(&self, name: &FullName) -> Result<()> {
        self.set_aside(self.directory.as_fd(), name.as_str()).map_err(|errno| self.failed("remove", name, errno))
    }

    fn set_aside(&self, from: BorrowedFd<'_>, name: &str) -> std::result::Result<(), Errno> {
        for number in 0.. {
            let target = format!("{REMOVED}{}-{number}", std::process::id());
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(from, name, &self.directory, target, flags) {
                Err(Errno::EXIST) => {}
                other => return other,
            }
        }
        Ok(())
    }

    /// Deletes what was removed, by whomever. As the owner: root calls it in a child that has become the user.
    pub fn delete_removed(&self) -> Result<()> {
        let mut first = None;
        for name in names(self.directory.as_fd(), &self.path)?.iter().filter(|name| name.starts_with(REMOVED)) {
            if let Err(errno) = remove_tree(self.directory.as_fd(), name) {
                let path = self.path.join(name);
                first.get_or_insert(KeptError { action: "delete", path, source: errno.into() });
            }
        }
        first.map_or(Ok(()), Err)
    }

    /// Whether something waits to be deleted.
    pub fn has_removed(&self) -> bool {
        names(self.directory.as_fd(), &self.path).is_ok_and(|names| names.iter().any(|name| name.starts_with(REMOVED)))
    }

    /// Primary group of the owner, as far as the directory tells.
    pub fn owner(&self) -> Result<User> {
        let status = rustix::fs::fstat(&self.directory).map_err(|errno| KeptError {
            action: "examine",
            path: self.path.clone(),
            source: errno.into(),
        })?;
        Ok(User { uid: self.uid, gid: status.st_gid, groups: Vec::new() })
    }

    fn failed(&self, action: &'static str, name: &FullName, source: impl Into<io::Error>) -> KeptError {
        KeptError { action, path: self.path.join(name.as_str()), source: source.into() }
    }
}

impl KeptContainer {
    /// What the container was made from; `None` if it never was a whole one.
    pub fn record(&self) -> Result<Option<Record>> {
        Record::read(self.directory.as_fd(), self.uid).map_err(|source| self.failed("read the record in", source))
    }

    /// Makes the container whole.
    pub fn write_record(&self, record: &Record) -> Result<()> {
        record.write(self.directory.as_fd()).map_err(|source| self.failed("write the record in", source))
    }

    /// The container's directory.
    pub fn directory(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }

    /// Path of the directory, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes the directories of overlayfs, empty. What a container that was never whole has left goes aside.
    pub fn make_layers(&self, containers: &UserContainers, user: &User) -> Result<()> {
        for name in [UPPER, WORK] {
            match containers.set_aside(self.directory.as_fd(), name) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(self.failed("empty", errno)),
            }
        }
        with_file_system_identity(user, || {
            [UPPER, WORK]
                .into_iter()
                .try_for_each(|name| rustix::fs::mkdirat(&self.directory, name, Mode::from_raw_mode(0o755)))
        })
        .map_err(|errno| self.failed("make layers in", errno))
    }

    fn failed(&self, action: &'static str, source: impl Into<io::Error>) -> KeptError {
        KeptError { action, path: self.path.clone(), source: source.into() }
    }
}

impl Drop for KeptContainer {
    fn drop(&mut self) {
        // Explicitly: a process forked meanwhile may have a duplicate of the descriptor.
        let _ = rustix::fs::flock(&self.directory, FlockOperation::Unlock);
    }
}

fn open_directory(parent: impl AsFd, name: impl rustix::path::Arg) -> std::result::Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn make_with_parents(path: &Path) -> std::result::Result<(), Errno> {
    let mode = Mode::from_raw_mode(0o755);
    match rustix::fs::mkdir(path, mode) {
        Err(Errno::NOENT) => {
            make_with_parents(path.parent().ok_or(Errno::NOENT)?)?;
            make_with_parents(path)
        }
        Err(Errno::EXIST) => Ok(()),
        other => other.and_then(|()| rustix::fs::chmod(path, mode)),
    }
}

/// Names in a directory that are UTF-8: all that is made here is.
fn names(directory: BorrowedFd<'_>, path: &Path) -> Result<Vec<String>> {
    let failed = |errno: Errno| KeptError { action: "list", path: path.to_owned(), source: errno.into() };
    let mut names = Vec::new();
    for entry in Dir::read_from(directory).map_err(failed)? {
        if let Ok(name) = entry.map_err(failed)?.file_name().to_str()
            && !matches!(name, "." | "..")
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};

    use super::*;

    const UID: u32 = 4711;

    fn user() -> User {
        User { uid: UID, gid: 815, groups: Vec::new() }
    }

    fn name(name: &str) -> FullName {
        FullName::new(name, None).unwrap()
    }

    /// A directory that users may pass through, with the containers of one of them.
    fn containers() -> (tempfile::TempDir, PathBuf, UserContainers) {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let path = directory.path().join("a/containers");
        assert!(Containers::open(&path).unwrap().is_none());
        let user = Containers::create(&path).unwrap().make_user(&user()).unwrap();
        (directory, path, user)
    }

    #[test]
    fn what_is_made_is_the_users() {
        let (_directory, path, containers) = containers();
        assert!(matches!(containers.try_lock(&name("x")).unwrap(), Lock::Absent));
        containers.make(&name("x"), &user()).unwrap();
        containers.make(&name("x"), &user()).unwrap();
        let Lock::Taken(kept) = containers.try_lock(&name("x")).unwrap() else { panic!("not locked") };
        kept.make_layers(&containers, &user()).unwrap();
        for (below, mode) in [("", 0o700), ("pyxis_x", 0o700), ("pyxis_x/upper", 0o755), ("pyxis_x/work", 0o755)] {
            let status = fs::metadata(path.join("4711").join(below)).unwrap();
            assert_eq!((status.uid(), status.gid(), status.mode() & 0o7777), (UID, 815, mode), "{below}");
        }
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(kept.record().unwrap(), None);
        assert_eq!(containers.names().unwrap(), []);
        assert_eq!(containers.all_names().unwrap(), [name("x")]);
        assert_eq!(Containers::open(&path).unwrap().unwrap().users().unwrap(), [UID]);
    }

    #[test]
    fn one_decides_at_a_time() {
        let (_directory, path, containers) = containers();
        containers.make(&name("x"), &user()).unwrap();
        let Lock::Taken(kept) = containers.try_lock(&name("x")).unwrap() else { panic!("not locked") };
        let other = Containers::open(&path).unwrap().unwrap().user(UID).unwrap().unwrap();
        assert!(matches!(other.try_lock(&name("x")).unwrap(), Lock::Busy));
        other.remove(&name("x")).unwrap();
        assert!(matches!(other.try_lock(&name("x")).unwrap(), Lock::Absent));
        drop(kept);
        other.make(&name("x"), &user()).unwrap();
        assert!(matches!(containers.try_lock(&name("x")).unwrap(), Lock::Taken(_)));
        assert!(containers.has_removed());
        containers.delete_removed().unwrap();
        assert!(!containers.has_removed());
    }

    #[test]
    fn leftovers_go_aside() {
        let (_directory, path, containers) = containers();
        containers.make(&name("x"), &user()).unwrap();
        let Lock::Taken(kept) = containers.try_lock(&name("x")).unwrap() else { panic!("not locked") };
        let own = path.join("4711/pyxis_x");
        fs::create_dir_all(own.join("upper/old")).unwrap();
        symlink("/etc", own.join("work")).unwrap();
        kept.make_layers(&containers, &user()).unwrap();
        assert_eq!(fs::read_dir(own.join("upper")).unwrap().count(), 0);
        assert!(fs::symlink_metadata(own.join("work")).unwrap().is_dir());
        containers.delete_removed().unwrap();
        assert!(fs::metadata("/etc").unwrap().is_dir());
    }

    #[test]
    fn links_and_strangers_are_refused() {
        let (directory, path, containers) = containers();
        let outside = directory.path().join("outside");
        fs::create_dir(&outside).unwrap();
        symlink(&outside, path.join("4711/pyxis_link")).unwrap();
        containers.try_lock(&name("link")).unwrap_err();
        fs::create_dir(path.join("4711/pyxis_root")).unwrap();
        let error = containers.try_lock(&name("root")).unwrap_err().to_string();
        assert!(error.starts_with("cannot lock ") && error.ends_with("pyxis_root: Operation not permitted"), "{error}");
        symlink(&outside, path.join("1")).unwrap();
        Containers::open(&path).unwrap().unwrap().user(1).unwrap_err();
        chown(&path, Some(UID), None).unwrap();
        assert!(Containers::open(&path).unwrap_err().to_string().contains("not root's alone"));
        chown(&path, Some(0), None).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o777)).unwrap();
        Containers::open(&path).unwrap_err();
    }
}
