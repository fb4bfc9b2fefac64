//! A squashfs file as the root filesystem of `pyxis start`: read through FUSE ([`crate::squashfuse`]), by a process that is
//! started before there is a container.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use rustix::process::WaitOptions;

use super::{Alone, Failure};
use crate::rootfs::{overlay, squashfuse};
use crate::squashfuse::{BrokerChannel, FromServer, ToServer};
use crate::sys::channel::{self, Channel};
use crate::sys::mount::MountError;
use crate::sys::process::{Forked, block_all_signals, close_all_but, exit_now, fork};

/// The process that reads a squashfs file for a container that is made of it (`squashfuse`). It is nobody's child, and
/// ends when the container's file system is gone.
#[derive(Debug)]
pub struct ImageServer {
    channel: Channel<ToServer, FromServer>,
    path: PathBuf,
}

impl ImageServer {
    /// Starts it, before the caller, which has one thread, is in namespaces of its own: what is in the mount namespace
    /// with the file system keeps it alive. The image begins at byte `start` of the file.
    pub fn start(path: &Path, start: u64) -> Result<Self, Failure> {
        let failed = |error: io::Error| {
            Failure::line(format!("Failed to mount: {}: {}", path.display(), crate::sys::reason(error)))
        };
        let file = File::open(path).map_err(failed)?;
        let (channel, its_channel) = channel::pair::<ToServer, FromServer>().map_err(failed)?;
        // SAFETY: the caller has one thread.
        match unsafe { fork(0) }.map_err(failed)? {
            Forked::Child => {
                // SAFETY: as above. The grandchild is adopted by whoever adopts orphans.
                match unsafe { fork(0) } {
                    Ok(Forked::Child) => {}
                    other => exit_now(i32::from(other.is_err())),
                }
                drop(channel);
                exit_now(i32::from(serve(file, start, its_channel).is_err()))
            }
            Forked::Parent(child) => {
                rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()))
                    .map_err(|errno| failed(errno.into()))?;
            }
        }
        drop(its_channel);
        match channel.receive().map_err(failed)? {
            Some((FromServer::Opened, _)) => Ok(Self { channel, path: path.to_owned() }),
            Some((FromServer::Failed { message }, _)) if message.is_empty() => {
                Err(Failure::line(format!("Invalid image format: {}", path.display())))
            }
            Some((FromServer::Failed { message }, _)) => Err(Failure::line(format!("{}: {message}", path.display()))),
            None => Err(failed(io::Error::other("the process that reads it has ended"))),
        }
    }

    /// The root filesystem, with everything that is written in memory, as a detached mount.
    pub fn mount(&self, alone: &Alone<'_>) -> Result<OwnedFd, Failure> {
        let owner = alone.owner();
        let size = alone.start.settings.scratch_size.as_deref();
        let workspace = overlay::attach_point(alone.start.runtime);
        let mounted = squashfuse::mount(owner, size, &workspace, |device| {
            self.channel
                .send(&ToServer::Serve { owner }, &[device.as_fd()])
                .map_err(|error| MountError::new("squashfuse", Errno::from_io_error(&error).unwrap_or(Errno::IO)))
        });
        mounted.map_err(|error: MountError| {
            let advice = match error.errno() {
                Some(Errno::ACCESS | Errno::NOENT) => "; \"pyxis create\" it, and start that",
                _ => "",
            };
            Failure::line(format!("Failed to mount: {}: {error}{advice}", self.path.display()))
        })
    }
}

/// The server's life.
fn serve(file: File, start: u64, channel: BrokerChannel) -> io::Result<()> {
    // It lives as long as the mount: nobody hangs this pipe up.
    let (life, kept) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    close_all_but(&[file.as_fd(), channel.as_fd(), life.as_fd(), kept.as_fd()])?;
    // Numbers 0 to 2 are free now, and what is opened next is not for output of ours.
    for _ in 0..3 {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty())?;
        if null.as_raw_fd() < 3 {
            std::mem::forget(null);
        }
    }
    // Away from the terminal, and from its signals: what the command still reads while it ends is answered.
    let _ = rustix::process::setsid();
    block_all_signals();
    let _ = rustix::thread::set_name(c"pyxis-squashfs");
    let served = crate::squashfuse::run(channel, vec![file.into(), life], start);
    drop(kept);
    served
}
