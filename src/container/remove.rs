//! Deleting a tree of files, a container's directory say, as the user whose files they are: the tree is his, so it may be as odd as he likes,
//! and change meanwhile. No link is followed, no other file system is entered, and however deep it is, it takes a fixed
//! number of descriptors: what lies deeper is first moved up.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// Deletes the directory `name` in `parent` and all that is in it. What cannot be deleted is left, and the first reason is
/// the error.
pub fn remove_tree(parent: BorrowedFd<'_>, name: impl rustix::path::Arg + Copy) -> Result<(), Errno> {
    let top = match open(parent, name) {
        Err(Errno::NOENT) => return Ok(()),
        // No directory.
        Err(Errno::NOTDIR | Errno::LOOP) => return rustix::fs::unlinkat(parent, name, AtFlags::empty()),
        other => other?,
    };
    let device = rustix::fs::fstat(&top)?.st_dev;
    let mut state = Removal { top: top.as_fd(), device, moved: 0, error: None };
    // Each round deletes what lies one level down and moves up what lies two levels down, until a round does nothing.
    while state.round()? {}
    let error = state.error;
    match rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(error.unwrap_or(errno)),
    }
}

/// Opens a directory, and makes it one that can be emptied.
fn open(parent: BorrowedFd<'_>, name: impl rustix::path::Arg + Copy) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Err(Errno::ACCESS) => {
            // A link would be followed here; but one can be opened, so that this is none, unless it has just become one:
            // then the user has changed the mode of a file of his.
            rustix::fs::chmodat(parent, name, Mode::RWXU, AtFlags::empty())?;
            rustix::fs::openat(parent, name, flags, Mode::empty())
        }
        other => other,
    }
    .inspect(|directory| {
        if rustix::fs::fstat(directory).is_ok_and(|status| status.st_mode & 0o700 != 0o700) {
            let _ = rustix::fs::fchmod(directory, Mode::RWXU);
        }
    })
}

struct Removal<'a> {
    top: BorrowedFd<'a>,
    device: u64,
    /// Names given to directories that were moved up.
    moved: u64,
    error: Option<Errno>,
}

impl Removal<'_> {
    /// Whether another round may do more.
    fn round(&mut self) -> Result<bool, Errno> {
        let mut progress = false;
        for (name, is_directory) in entries(self.top)? {
            if !is_directory {
                progress |= self.note(rustix::fs::unlinkat(self.top, &name, AtFlags::empty()));
                continue;
            }
            if rustix::fs::unlinkat(self.top, &name, AtFlags::REMOVEDIR).is_ok() {
                progress = true;
                continue;
            }
            let directory = match open(self.top, &name) {
                Ok(directory) => directory,
                Err(errno) => {
                    self.note(Err(errno));
                    continue;
                }
            };
            progress |= self.empty(directory.as_fd())?;
            progress |= self.note(rustix::fs::unlinkat(self.top, &name, AtFlags::REMOVEDIR));
        }
        Ok(progress)
    }

    /// Whether `directory` holds less now.
    fn empty(&mut self, directory: BorrowedFd<'_>) -> Result<bool, Errno> {
        if rustix::fs::fstat(directory)?.st_dev != self.device {
            return Ok(self.note(Err(Errno::XDEV)));
        }
        let mut progress = false;
        for (name, is_directory) in entries(directory)? {
            if !is_directory {
                progress |= self.note(rustix::fs::unlinkat(directory, &name, AtFlags::empty()));
            } else if rustix::fs::unlinkat(directory, &name, AtFlags::REMOVEDIR).is_ok() {
                progress = true;
            } else {
                progress |= self.move_up(directory, &name);
            }
        }
        Ok(progress)
    }

    fn move_up(&mut self, directory: BorrowedFd<'_>, name: &CString) -> bool {
        loop {
            // To move a directory one must be allowed to write to it.
            drop(open(directory, name));
            let target = format!(".{}", self.moved);
            self.moved += 1;
            let flags = rustix::fs::RenameFlags::NOREPLACE;
            match rustix::fs::renameat_with(directory, name, self.top, target, flags) {
                Err(Errno::EXIST) => {}
                other => return self.note(other),
            }
        }
    }

    fn note(&mut self, result: Result<(), Errno>) -> bool {
        match result {
            Ok(()) => true,
            // Somebody else deletes as well.
            Err(Errno::NOENT) => false,
            Err(errno) => {
                self.error.get_or_insert(errno);
                false
            }
        }
    }
}

/// Names in a directory, and whether each is a directory.
fn entries(directory: BorrowedFd<'_>) -> Result<Vec<(CString, bool)>, Errno> {
    let mut found = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_owned();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW)
                .map_or(FileType::Unknown, |status| FileType::from_raw_mode(status.st_mode)),
            known => known,
        };
        found.push((name, kind == FileType::Directory));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::path::Path;

    use super::*;

    fn remove(path: &Path) -> Result<(), Errno> {
        let parent = File::open(path.parent().unwrap()).unwrap();
        remove_tree(parent.as_fd(), path.file_name().unwrap().to_str().unwrap())
    }

    #[test]
    fn a_tree_goes_and_what_it_points_to_stays() {
        let directory = tempfile::tempdir().unwrap();
        let outside = directory.path().join("outside");
        fs::create_dir_all(outside.join("kept")).unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir_all(tree.join("a/b/c")).unwrap();
        for name in ["x", "a/x", "a/b/.0", ".0", "a/b/c/with\nnewline"] {
            fs::write(tree.join(name), "x").unwrap();
        }
        for link in ["link", "a/link", "a/b/link"] {
            symlink(&outside, tree.join(link)).unwrap();
        }
        for closed in ["a/b/c", "a/b", "a"] {
            fs::set_permissions(tree.join(closed), fs::Permissions::from_mode(0o000)).unwrap();
        }
        remove(&tree).unwrap();
        assert!(!tree.exists() && outside.join("kept").exists());
        remove(&tree).unwrap();
        symlink(&outside, &tree).unwrap();
        remove(&tree).unwrap();
        assert!(!tree.is_symlink() && outside.join("kept").exists());
    }

    #[test]
    fn depth_takes_no_descriptors() {
        let directory = tempfile::tempdir().unwrap();
        let tree = directory.path().join("tree");
        fs::create_dir(&tree).unwrap();
        let mut at: OwnedFd = File::open(&tree).unwrap().into();
        for _ in 0..3000 {
            rustix::fs::mkdirat(&at, "d", Mode::RWXU).unwrap();
            rustix::fs::openat(&at, "file", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
            at = rustix::fs::openat(&at, "d", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        drop(at);
        remove(&tree).unwrap();
        assert!(!tree.exists());
    }
}
