//! What a container was made from: beside a kept container, and in the registration of a running one.
//!
//! One line of JSON, then the image's config as it came from the registry: hostile input, parsed by container init only.
//! The record of a kept container lies in a directory of its user's, who could put anything there. It counts only if it
//! is root's and has the extended attribute `trusted.pyxis`, which only root can give a file: so it says what root wrote,
//! and a user cannot gain layers by it that no registry has given him.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::image::config::MAX_CONFIG_BYTES;
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::policy::{Evidence, Source};

/// Its name in a container's directory.
pub const RECORD: &str = "record";
const TEMPORARY: &str = ".record";
const MARK: &str = "trusted.pyxis";
/// Most bytes of the first line: 500 layers take about 40 kB.
const MAX_HEADER: u64 = 1 << 20;

/// What a container was made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Whose it is.
    pub uid: u32,
    /// When it was made: seconds since 1970.
    pub created: u64,
    /// Its image, for people.
    pub image: String,
    /// What is below its upper layer.
    pub lower: Lower,
    /// Where the image came from.
    #[serde(default = "from_file")]
    pub source: Source,
    /// What rules may want to know of the image.
    #[serde(default)]
    pub evidence: Evidence,
    /// The image config, not parsed.
    #[serde(skip)]
    pub config: Vec<u8>,
}

/// The read-only part of a container's root filesystem.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lower {
    /// Layers in the store.
    Layers {
        /// Where the image can be had again, if it came from a registry. Without a password.
        reference: Option<ImageReference>,
        /// The platform's manifest.
        manifest: Digest,
        /// DiffIDs, lowest layer first.
        layers: Vec<Digest>,
    },
    /// An unpacked tree of the user's, which is the whole root filesystem. Only of what runs: such a container is kept by
    /// itself.
    Tree(PathBuf),
}

/// Of a record that does not say it: what has least rights.
fn from_file() -> Source {
    Source::File
}

impl Record {
    /// The layers in the store that the container needs.
    pub fn layers(&self) -> &[Digest] {
        match &self.lower {
            Lower::Layers { layers, .. } => layers,
            Lower::Tree(_) => &[],
        }
    }

    /// The image's manifest, if it has one: a squashfs file has no config either.
    pub fn digest(&self) -> Option<Digest> {
        match &self.lower {
            Lower::Layers { manifest, .. } if !self.config.is_empty() => Some(*manifest),
            Lower::Layers { .. } | Lower::Tree(_) => None,
        }
    }

    /// Where the image came from, as `docker://…`, if that was a registry.
    pub fn source(&self) -> Option<String> {
        match &self.lower {
            Lower::Layers { reference, .. } => reference.as_ref().map(|reference| format!("docker://{reference}")),
            Lower::Tree(_) => None,
        }
    }

    /// The content of a record file.
    pub fn to_bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec(self)?;
        bytes.push(b'\n');
        bytes.extend(&self.config);
        Ok(bytes)
    }

    /// Reads what [`Record::to_bytes`] wrote.
    pub fn from_bytes(bytes: &[u8]) -> io::Result<Self> {
        let end = bytes.iter().position(|&byte| byte == b'\n').ok_or(io::ErrorKind::UnexpectedEof)?;
        let (header, config) = bytes.split_at(end);
        let mut record: Self = serde_json::from_slice(header)?;
        record.config = config.get(1..).unwrap_or_default().to_vec();
        Ok(record)
    }

    /// The record in `directory`, the directory of a kept container of `uid`'s. `None` if there is none, or a file that
    /// is no record of root's; an error if it is one that cannot be read.
    pub fn read(directory: BorrowedFd<'_>, uid: u32) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(directory, RECORD, flags, Mode::empty()) {
            Err(Errno::NOENT | Errno::LOOP) => return Ok(None),
            other => other?,
        };
        if !is_genuine(&file)? {
            return Ok(None);
        }
        Ok(Some(read_bounded(file)?).filter(|record| record.uid == uid))
    }

    /// Makes `directory` the directory of a whole container: the record appears complete, and on the disk, or not at
    /// all.
    pub fn write(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        // Of a broker that was killed, or the user's: the directory is locked.
        match rustix::fs::unlinkat(directory, TEMPORARY, AtFlags::empty()) {
            Err(Errno::NOENT) => {}
            other => other?,
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let mode = Mode::from_raw_mode(0o444);
        let mut file = File::from(rustix::fs::openat(directory, TEMPORARY, flags, mode)?);
        rustix::fs::fsetxattr(&file, MARK, b"1", XattrFlags::empty())?;
        file.write_all(&self.to_bytes()?)?;
        file.sync_all()?;
        rustix::fs::renameat(directory, TEMPORARY, directory, RECORD)?;
        // The directory may be open as a mere reference.
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::fsync(rustix::fs::openat(directory, ".", flags, Mode::empty())?)?)
    }

    /// Whether there seems to be a record in `directory`, for its owner, who cannot see the mark.
    pub fn seems_present(directory: BorrowedFd<'_>) -> bool {
        rustix::fs::statat(directory, RECORD, AtFlags::SYMLINK_NOFOLLOW)
            .is_ok_and(|status| FileType::from_raw_mode(status.st_mode) == FileType::RegularFile && status.st_uid == 0)
    }

    /// What [`Record::read`] reads, for the container's owner: he deceives nobody but himself.
    pub fn read_as_owner(directory: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        read_bounded(rustix::fs::openat(directory, RECORD, flags, Mode::empty())?)
    }
}

fn is_genuine(file: &OwnedFd) -> Result<bool, Errno> {
    let status = rustix::fs::fstat(file)?;
    let root_alone = FileType::from_raw_mode(status.st_mode) == FileType::RegularFile
        && (status.st_uid, status.st_nlink) == (0, 1)
        && status.st_mode & 0o022 == 0;
    match rustix::fs::fgetxattr(file, MARK, &mut [0_u8; 8]) {
        Ok(_) => Ok(root_alone),
        Err(Errno::NODATA | Errno::RANGE | Errno::OPNOTSUPP) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The record in `file`, wherever it is.
pub(super) fn read_bounded(file: impl AsFd) -> io::Result<Record> {
    let limit = MAX_HEADER + MAX_CONFIG_BYTES;
    let mut bytes = Vec::new();
    File::from(file.as_fd().try_clone_to_owned()?).take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
    }
    Record::from_bytes(&bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn record(config: &[u8]) -> Record {
        Record {
            uid: 1000,
            created: 7,
            image: "docker.io#library/alpine:latest".into(),
            lower: Lower::Layers {
                reference: ImageReference::parse("alpine").ok(),
                manifest: Digest::from_bytes([1; 32]),
                layers: vec![Digest::from_bytes([2; 32]), Digest::from_bytes([3; 32])],
            },
            source: Source::Registry,
            evidence: Evidence::default(),
            config: config.to_vec(),
        }
    }

    fn directory() -> (tempfile::TempDir, OwnedFd) {
        let directory = tempfile::tempdir().unwrap();
        let fd = rustix::fs::open(directory.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        (directory, fd)
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let (path, directory) = directory();
        assert_eq!(Record::read(directory.as_fd(), 1000).unwrap(), None);
        std::fs::write(path.path().join(TEMPORARY), "of somebody who was killed").unwrap();
        record(b"{\n}\n\xff").write(directory.as_fd()).unwrap();
        assert_eq!(Record::read(directory.as_fd(), 1000).unwrap(), Some(record(b"{\n}\n\xff")));
        assert_eq!(Record::read(directory.as_fd(), 1001).unwrap(), None);
        assert!(Record::seems_present(directory.as_fd()));
        assert_eq!(Record::read_as_owner(directory.as_fd()).unwrap(), record(b"{\n}\n\xff"));
    }

    #[test]
    fn nothing_else_is_taken_for_a_record() {
        let (path, directory) = directory();
        let file = path.path().join(RECORD);
        let bytes = record(b"").to_bytes().unwrap();
        let read = || Record::read(directory.as_fd(), 1000).unwrap();
        // Root's, but not marked.
        std::fs::write(&file, &bytes).unwrap();
        assert_eq!(read(), None);
        // Marked, but with another name or another owner.
        record(b"").write(directory.as_fd()).unwrap();
        std::fs::hard_link(&file, path.path().join("other")).unwrap();
        assert_eq!(read(), None);
        std::fs::remove_file(path.path().join("other")).unwrap();
        assert!(read().is_some());
        std::os::unix::fs::chown(&file, Some(1000), None).unwrap();
        assert_eq!(read(), None);
        assert!(!Record::seems_present(directory.as_fd()));
        // A link to a genuine one, a pipe, a directory.
        record(b"").write(directory.as_fd()).unwrap();
        std::fs::rename(&file, path.path().join("genuine")).unwrap();
        std::os::unix::fs::symlink("genuine", &file).unwrap();
        assert_eq!(read(), None);
        std::fs::remove_file(&file).unwrap();
        rustix::fs::mkfifoat(&directory, RECORD, Mode::from_raw_mode(0o644)).unwrap();
        assert_eq!(read(), None);
        std::fs::remove_file(&file).unwrap();
        std::fs::create_dir(&file).unwrap();
        assert_eq!(read(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Record::from_bytes(&bytes);
        }
    }
}
