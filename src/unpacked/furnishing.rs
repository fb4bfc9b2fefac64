//! One process at a time furnishes a root filesystem: enroot's lock, which also marks what is a container's
//! (behaviour reference, section 14).

#![forbid(unsafe_code)]

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;

/// In the root directory.
pub const LOCK: &str = ".lock";
/// How long to wait for the others, and how often to look.
const PATIENCE: Duration = Duration::from_secs(30);
const INTERVAL: Duration = Duration::from_millis(5);

/// Waits until nobody else furnishes the root filesystem at `path`, and keeps others from it. None if it cannot be
/// written: then there is nothing to keep them from.
pub fn lock(path: &Path) -> Result<Option<OwnedFd>, &'static str> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(file) = rustix::fs::open(path.join(LOCK), flags, Mode::RUSR | Mode::WUSR) else { return Ok(None) };
    let began = Instant::now();
    loop {
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) if began.elapsed() < PATIENCE => std::thread::sleep(INTERVAL),
            Err(Errno::WOULDBLOCK) => return Err("Could not acquire rootfs lock"),
            // A file system without locks.
            Err(_) => return Ok(None),
            Ok(()) => return Ok(Some(file)),
        }
    }
}
