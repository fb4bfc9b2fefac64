//! Loop devices (loop(4)), for kernels whose EROFS reads only block devices, and for squashfs, which does so on all.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::mount::{FsContext, MountError};

const LOOP_CTL_GET_FREE: libc::Ioctl = 0x4C82;
const LOOP_CONFIGURE: libc::Ioctl = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// How often another process may take the free device before we do.
const ATTEMPTS: u32 = 64;

/// `struct loop_info64` of `<linux/loop.h>`.
#[repr(C)]
struct LoopInfo64 {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of `<linux/loop.h>`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

/// A detached mount of the image in `file`, of a file system of this type (`erofs`, `squashfs`), over a loop device that
/// goes away with the last mount. Until then the device has the open file description, with its locks and credentials.
pub fn mount(
    file: BorrowedFd<'_>,
    file_system: &'static str,
    attributes: MountAttrFlags,
) -> Result<OwnedFd, MountError> {
    let (device, path) = attach(file)
        .map_err(|error| MountError::new("loop device", Errno::from_io_error(&error).unwrap_or(Errno::IO)))?;
    let context = FsContext::open(file_system)?;
    context.set("source", &path)?;
    // The device is read-only, and would be opened for writing.
    context.flag("ro")?;
    let mount = context.mount(attributes);
    drop(device);
    mount
}

/// Attaches `file`, read-only, to a free loop device. It clears itself when the returned descriptor and all mounts of it
/// are gone.
fn attach(file: BorrowedFd<'_>) -> io::Result<(File, String)> {
    let control = rustix::fs::open("/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    for attempt in 1..=ATTEMPTS {
        // SAFETY: the ioctl takes no argument and returns a number.
        let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
        if number < 0 {
            return Err(io::Error::last_os_error());
        }
        let path = format!("/dev/loop{number}");
        let device = File::from(rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?);
        // SAFETY: integers and arrays of them: all bytes zero is a valid value.
        let mut config: LoopConfig = unsafe { std::mem::zeroed() };
        config.fd = file.as_raw_fd().unsigned_abs();
        config.block_size = 4096;
        config.info.flags = LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO;
        match configure(&device, &config) {
            Ok(()) => return Ok((device, path)),
            // Somebody else took it.
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && attempt < ATTEMPTS => {}
            // The backing file system has no direct I/O.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                config.info.flags &= !LO_FLAGS_DIRECT_IO;
                config.block_size = 0;
                configure(&device, &config)?;
                return Ok((device, path));
            }
            Err(error) => return Err(error),
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn configure(device: &File, config: &LoopConfig) -> io::Result<()> {
    // SAFETY: LOOP_CONFIGURE reads one `struct loop_config`, which `config` is, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), LOOP_CONFIGURE, &raw const *config) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
