//! Removes a tree that its owner has made unwritable, and that may change meanwhile: by descriptors, following no link,
//! within one file system.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// A directory on the way down.
struct Level {
    directory: OwnedFd,
    name: CString,
    left: Vec<(CString, FileType)>,
}

/// Removes `name` in `parent`, whatever it is, with everything below. What somebody else removes meanwhile is no error; a
/// mount is.
pub fn remove_tree(parent: BorrowedFd<'_>, name: &OsStr) -> io::Result<()> {
    let name = CString::new(name.as_bytes())?;
    let status = match rustix::fs::statat(parent, &name, AtFlags::SYMLINK_NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(()),
        other => other?,
    };
    if FileType::from_raw_mode(status.st_mode) != FileType::Directory {
        return Ok(unlink(parent, &name, AtFlags::empty())?);
    }
    let device = status.st_dev;
    let mut levels = vec![enter(parent, name, device)?];
    while let Some(level) = levels.last_mut() {
        match level.left.pop() {
            Some((name, FileType::Directory)) => {
                let below = match enter(level.directory.as_fd(), name, device) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                    other => other?,
                };
                levels.push(below);
            }
            Some((name, _)) => unlink(level.directory.as_fd(), &name, AtFlags::empty())?,
            None => {
                let done = levels.pop();
                let above = levels.last().map_or(parent, |level| level.directory.as_fd());
                if let Some(done) = done {
                    unlink(above, &done.name, AtFlags::REMOVEDIR)?;
                }
            }
        }
    }
    Ok(())
}

/// Opens the directory `name` and lists it; made readable if it is not.
fn enter(parent: BorrowedFd<'_>, name: CString, device: u64) -> io::Result<Level> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let open = || rustix::fs::openat(parent, &name, flags | OFlags::RDONLY, Mode::empty());
    let directory = match open() {
        Err(Errno::ACCESS) => {
            let reference = rustix::fs::openat(parent, &name, flags | OFlags::PATH, Mode::empty())?;
            allow(reference.as_fd())?;
            open()?
        }
        other => other?,
    };
    if rustix::fs::fstat(&directory)?.st_dev != device {
        let text = format!("{} is a mount", OsStr::from_bytes(name.to_bytes()).display());
        return Err(io::Error::new(io::ErrorKind::CrossesDevices, text));
    }
    let mut left = Vec::new();
    for entry in Dir::read_from(&directory)? {
        let entry = entry?;
        let name = entry.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let file_type = match entry.file_type() {
            FileType::Unknown => match rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
                Err(Errno::NOENT) => continue,
                other => FileType::from_raw_mode(other?.st_mode),
            },
            known => known,
        };
        left.push((name, file_type));
    }
    Ok(Level { directory, name, left })
}

fn unlink(parent: BorrowedFd<'_>, name: &CString, flags: AtFlags) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, name, flags) {
        Err(Errno::NOENT) => Ok(()),
        Err(Errno::ACCESS) => {
            allow(parent)?;
            rustix::fs::unlinkat(parent, name, flags)
        }
        other => other,
    }
}

/// The owner may do everything in the directory.
fn allow(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    // A descriptor that is only a reference cannot be changed itself.
    rustix::fs::chmod(format!("/proc/self/fd/{}", directory.as_raw_fd()), Mode::RWXU)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;

    fn chmod(path: &Path, mode: u32) {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    #[test]
    fn everything_goes_and_nothing_else() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("kept"), "").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        let deep = (0..300).fold(tree.clone(), |path, _| path.join("d"));
        std::fs::create_dir_all(&deep).unwrap();
        std::fs::create_dir_all(tree.join("locked/below")).unwrap();
        std::fs::write(tree.join("locked/below/file"), "").unwrap();
        symlink(outside.path(), tree.join("link")).unwrap();
        symlink(outside.path(), tree.join("locked/link")).unwrap();
        chmod(&tree.join("locked/below"), 0o500);
        chmod(&tree.join("locked"), 0);
        // As somebody to whom modes mean something.
        rustix::fs::chown(&tree, None, None).unwrap();
        let parent = super::super::open_root(directory.path()).unwrap();
        remove_tree(parent.as_fd(), OsStr::new("tree")).unwrap();
        remove_tree(parent.as_fd(), OsStr::new("tree")).unwrap();
        assert!(!tree.exists() && outside.path().join("kept").exists());
        std::fs::write(directory.path().join("file"), "").unwrap();
        remove_tree(parent.as_fd(), OsStr::new("file")).unwrap();
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }
}
