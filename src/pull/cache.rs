//! Blobs that were downloaded, in `ENROOT_CACHE_PATH`: complete, and checked each time they are used.
//!
//! ```text
//! ENROOT_CACHE_PATH/blobs/sha256/HEX     as the registry has it
//! ENROOT_CACHE_PATH/HEX                  enroot's own: compressed anew, not used here
//! ```
//!
//! A group of users may share the directory: what is made in it has the group's permissions that it has itself.

use std::fs::{DirBuilder, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use sha2::{Digest as _, Sha256};

use crate::export::target::{NewFile, Target, TargetError};
use crate::image::digest::Digest;
use crate::sys;
use crate::unpacked::make_private_directory;

/// Bytes read at once.
const BUFFER: usize = 256 << 10;

/// Why a blob cannot be kept.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory.
    #[error("cannot make the cache directory {}: {} (ENROOT_CACHE_PATH names another one)", .0.display(), sys::reason(.1))]
    Directory(PathBuf, #[source] io::Error),
    /// A file in it.
    #[error(transparent)]
    File(#[from] TargetError),
}

/// The cache.
#[derive(Debug, Clone)]
pub struct Cache {
    blobs: PathBuf,
}

impl Cache {
    /// Opens the cache in `path`, which is made if it is missing.
    pub fn open(path: &Path) -> Result<Self, CacheError> {
        let mut blobs = path.to_owned();
        let mut make = || -> io::Result<()> {
            make_private_directory(path)?;
            let permissions = std::fs::metadata(path)?.permissions().mode() & 0o2770;
            for name in ["blobs", "sha256"] {
                blobs.push(name);
                match DirBuilder::new().mode(0o700).create(&blobs) {
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    other => {
                        other?;
                        std::fs::set_permissions(&blobs, PermissionsExt::from_mode(permissions | 0o700))?;
                    }
                }
            }
            Ok(())
        };
        match make() {
            Ok(()) => Ok(Self { blobs }),
            Err(error) => Err(CacheError::Directory(path.to_owned(), error)),
        }
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// Whether there is a file for this blob.
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        self.look_up(digest, size).is_some()
    }

    fn look_up(&self, digest: &Digest, size: u64) -> Option<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(self.path(digest), flags, rustix::fs::Mode::empty()).ok()?);
        let metadata = file.metadata().ok()?;
        (metadata.is_file() && metadata.size() == size).then_some(file)
    }

    /// A blob that is here, at its beginning. One that is damaged is removed.
    pub fn get(&self, digest: &Digest, size: u64) -> Option<File> {
        let mut file = self.look_up(digest, size)?;
        if hash(&mut file).is_ok_and(|actual| actual == *digest) && file.rewind().is_ok() {
            return Some(file);
        }
        // If it cannot be removed, it will be replaced.
        let _ = std::fs::remove_file(self.path(digest));
        None
    }

    /// Begins the file of a blob.
    pub fn begin(&self, digest: &Digest) -> Result<NewFile, CacheError> {
        Ok(Target::open(&self.path(digest))?.create()?)
    }

    /// The blob is complete, and it is the right one. Returns it at its beginning.
    pub fn keep(&self, blob: NewFile) -> Result<File, CacheError> {
        let mut file = blob.file().map_err(|error| blob.failed("read", error))?;
        // A cache that a group shares: who may write to the directory may read the file.
        let mode = std::fs::metadata(&self.blobs).map_or(0o600, |directory| directory.mode() & 0o060 & 0o440 | 0o600);
        rustix::fs::fchmod(&file, rustix::fs::Mode::from_raw_mode(mode))
            .map_err(|error| blob.failed("write", error))?;
        file.rewind().map_err(|error| blob.failed("read", error))?;
        blob.publish_unsynced()?;
        Ok(file)
    }
}

fn hash(file: &mut File) -> io::Result<Digest> {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; BUFFER];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(Digest::from_bytes(hash.finalize().into())),
            Ok(count) => hash.update(&buffer[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::registry::sha256;

    fn put(cache: &Cache, content: &[u8]) -> Digest {
        let digest = sha256(content);
        let new = cache.begin(&digest).unwrap();
        new.file().unwrap().write_all(content).unwrap();
        let mut text = Vec::new();
        cache.keep(new).unwrap().read_to_end(&mut text).unwrap();
        assert_eq!(text, content);
        digest
    }

    #[test]
    fn blobs_are_found_again_unless_they_are_damaged() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(&directory.path().join("cache/enroot")).unwrap();
        let digest = put(&cache, b"a blob");
        // Twice: another process was faster.
        put(&cache, b"a blob");
        assert!(cache.has(&digest, 6) && !cache.has(&digest, 7));
        let mut text = String::new();
        cache.get(&digest, 6).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "a blob");
        assert_eq!(cache.path(&digest).metadata().unwrap().mode() & 0o777, 0o600);
        std::fs::write(cache.path(&digest), "b blob").unwrap();
        assert!(cache.get(&digest, 6).is_none() && !cache.has(&digest, 6));
        assert!(cache.get(&sha256(b"other"), 6).is_none());
    }

    #[test]
    fn a_group_shares_its_directory() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o2770)).unwrap();
        let cache = Cache::open(directory.path()).unwrap();
        let digest = put(&cache, b"a blob");
        let mode = |path: &Path| path.metadata().unwrap().mode() & 0o7777;
        assert_eq!((mode(&cache.blobs), mode(&cache.path(&digest))), (0o2770, 0o640));
    }

    #[test]
    fn a_directory_that_cannot_be_is_named() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        let error = Cache::open(&directory.path().join("file/cache")).unwrap_err().to_string();
        assert!(error.starts_with("cannot make the cache directory /") && error.contains("Not a directory"), "{error}");
    }
}
