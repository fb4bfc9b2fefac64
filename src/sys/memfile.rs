//! Anonymous memory files (memfd_create(2)): how data too large for a message goes from one process to the next.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

/// A sealed, read-only memory file with these bytes. `name` shows in `/proc/PID/fd`.
pub fn sealed(name: &str, bytes: &[u8]) -> io::Result<File> {
    seal(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?, bytes)
}

/// The same, for execve(2).
pub fn executable(name: &str, bytes: &[u8]) -> io::Result<File> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match rustix::fs::memfd_create(name, flags | MemfdFlags::EXEC) {
        // Before 6.3 every memory file is executable.
        Err(Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    };
    seal(file?, bytes)
}

fn seal(file: OwnedFd, bytes: &[u8]) -> io::Result<File> {
    let mut file = File::from(file);
    file.write_all(bytes)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    file.rewind()?;
    Ok(file)
}

/// Everything in `file`, at most `limit` bytes; more is an error, so that a sender cannot exhaust the reader.
pub fn read_all(file: impl Into<File>, limit: u64) -> io::Result<Vec<u8>> {
    let mut file: File = file.into();
    file.rewind()?;
    let mut bytes = Vec::new();
    Read::by_ref(&mut file).take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, format!("more than {limit} bytes")));
    }
    Ok(bytes)
}

/// Whether nobody can change `fd` any more.
pub fn is_sealed(fd: BorrowedFd<'_>) -> bool {
    rustix::fs::fcntl_get_seals(fd.as_fd())
        .is_ok_and(|seals| seals.contains(SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sealed_file_reads_back_and_cannot_be_written() {
        let mut file = sealed("test", b"hello").unwrap();
        assert!(is_sealed(file.as_fd()));
        assert!(file.write_all(b"x").is_err());
        assert_eq!(read_all(file.try_clone().unwrap(), 5).unwrap(), b"hello");
        assert!(read_all(file, 4).is_err());
    }
}
