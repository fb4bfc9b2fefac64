//! Counters that many processes add to at once, and that outlive them: 64-bit words in a shared mapping of a file. There is
//! no lock to wait for, and who is killed in the middle leaves every word whole.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{FallocateFlags, Mode, OFlags};

/// The words of a file, mapped.
#[derive(Debug)]
pub struct Counters {
    words: NonNull<AtomicU64>,
    count: usize,
}

impl Counters {
    /// Maps the file at `path`, which nobody but root may change, with `count` words; makes it, or makes it longer.
    pub fn open(path: &Path, count: usize) -> io::Result<Self> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = File::from(rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?);
        let bytes = count * size_of::<u64>();
        if file.metadata()?.len() < bytes as u64 {
            // Not only longer: a page that finds no space when it is written to would end this process.
            rustix::fs::fallocate(&file, FallocateFlags::empty(), 0, bytes as u64)?;
        }
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a new mapping, of a file that has that many bytes, at an address of the kernel's choice.
        let address =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, kind, std::os::fd::AsRawFd::as_raw_fd(&file), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { words, count })
    }

    /// Adds to the word with this index; to none if there is no such word.
    pub fn add(&self, index: usize, value: u64) {
        if index < self.count {
            // SAFETY: within the mapping, which is aligned to a page, is never unmapped, and holds integers that all
            // processes change atomically.
            unsafe { self.words.add(index).as_ref() }.fetch_add(value, Ordering::Relaxed);
        }
    }
}

/// The first `count` words of the file at `path`; those that it does not have are 0.
pub fn read(path: &Path, count: usize) -> io::Result<Vec<u64>> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take((count * size_of::<u64>()) as u64).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    let mut words: Vec<u64> =
        bytes.chunks_exact(8).map(|word| u64::from_ne_bytes(word.try_into().unwrap_or_default())).collect();
    words.resize(count, 0);
    Ok(words)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::process::{Forked, exit_now, fork};

    #[test]
    fn many_processes_count_together() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("counters");
        assert_eq!(read(&path, 2).unwrap(), [0, 0]);
        let children: Vec<_> = (0..8)
            .map(|_| {
                // SAFETY: the child makes system calls and counts; it takes no lock.
                match unsafe { fork(0) }.unwrap() {
                    Forked::Child => {
                        let Ok(counters) = Counters::open(&path, 600) else { exit_now(1) };
                        (0..1000).for_each(|_| counters.add(599, 1));
                        counters.add(600, 1);
                        exit_now(0)
                    }
                    Forked::Parent(child) => child,
                }
            })
            .collect();
        for child in children {
            let status = rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty()).unwrap();
            assert_eq!(status.unwrap().1.exit_status(), Some(0));
        }
        let found = read(&path, 600).unwrap();
        assert_eq!((found[599], found.iter().sum::<u64>()), (8000, 8000));
        // A later release has more of them.
        Counters::open(&path, 700).unwrap().add(699, 5);
        assert_eq!(read(&path, 700).unwrap()[599..].iter().sum::<u64>(), 8005);
    }
}
