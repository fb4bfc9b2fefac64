//! Containers from squashfs files without privilege: a FUSE server that reads the file as the job's user.
//!
//! ```text
//! broker ── spawns ──▶ server, as the user, confined: has the file and the life pipe
//! broker ── forks ───▶ init, in the user's namespaces: opens /dev/fuse, mounts it, overlay on top
//!    init ── FromInit::Squashfuse + device ──▶ broker ── ToServer::Serve ──▶ server
//! ```
//!
//! The device has to be opened in the user namespace of the mount, and the server must not be in the mount namespace that
//! its file system is in, which would never end then. So init opens it and the broker passes it on.
//!
//! The server ends with the step (the life pipe), or when the file system is unmounted. Signals to the step do not reach
//! it: its tasks may want to read while they end.

#![forbid(unsafe_code)]

mod abi;
pub mod server;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use serde::{Deserialize, Serialize};

use crate::importer::confine;
use crate::request::User;
use crate::squashfs::reader::{self, Image};
use crate::sys::channel::Channel;
use crate::sys::process::exit_now;
use server::Server;

/// Most threads that answer. Each can be unpacking a block.
const MAX_THREADS: usize = 16;

/// From the broker to the server.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToServer {
    /// The first message. Two descriptors: the file, and the read end of the life pipe.
    Open {
        /// Whom to become.
        user: User,
    },
    /// Go on without the broker. One descriptor: `/dev/fuse`, mounted.
    Serve {
        /// Whose all files are inside the user namespace.
        owner: (u32, u32),
    },
}

/// From the server to the broker.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromServer {
    /// The file is an image.
    Opened,
    /// It is none: one line that says why.
    Failed {
        /// For the user.
        message: String,
    },
}

/// The channel as the server has it.
pub type BrokerChannel = Channel<FromServer, ToServer>;

/// The server's whole life, from `Open` on: the process is the user's already. The image begins at byte `start` of the
/// file.
pub fn run(channel: BrokerChannel, descriptors: Vec<OwnedFd>, start: u64) -> io::Result<()> {
    let mut descriptors = descriptors.into_iter();
    let (Some(file), Some(life)) = (descriptors.next(), descriptors.next()) else {
        return Err(io::Error::other("the broker sent no file"));
    };
    // Before anything reads the file; asks for the number of processors first, which reads files of the system.
    let threads = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, MAX_THREADS);
    confine::confine()?;
    let image = match Image::open_at(File::from(file), start) {
        Ok(image) => image,
        Err(error) => return channel.send(&FromServer::Failed { message: refusal(&error) }, &[]),
    };
    channel.send(&FromServer::Opened, &[])?;
    let Some((ToServer::Serve { owner }, descriptors)) = channel.receive()? else { return Ok(()) };
    let device = descriptors.into_iter().next().ok_or_else(|| io::Error::other("the broker sent no device"))?;
    // From now on the step counts, and the mount.
    rustix::process::set_parent_process_death_signal(None)?;
    let served = serve(&image, owner, &device, &life, threads);
    // Open to the end: until the container is ready, the broker looks whether there is still somebody there.
    drop(channel);
    served
}

fn refusal(error: &reader::Error) -> String {
    match error {
        reader::Error::NotSquashfs => String::new(),
        error => error.to_string(),
    }
}

/// Never returns while both the step lives and the file system is mounted.
fn serve(image: &Image, owner: (u32, u32), device: &OwnedFd, life: &OwnedFd, threads: usize) -> io::Result<()> {
    let server = Server::new(image, owner);
    std::thread::scope(|scope| {
        for number in 0..threads {
            let work = || {
                // A thread that panics would leave a request without an answer.
                let served = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| server.serve(device.as_fd())));
                exit_now(i32::from(!matches!(served, Ok(Ok(())))))
            };
            let started = std::thread::Builder::new().name("squashfuse".into()).spawn_scoped(scope, work);
            if let (Err(error), 0) = (started, number) {
                return Err(error);
            }
        }
        loop {
            let mut watched = [PollFd::new(life, PollFlags::empty())];
            match rustix::event::poll(&mut watched, None) {
                Err(rustix::io::Errno::INTR) => {}
                // The threads wait in the kernel: nothing else ends them.
                Ok(_) | Err(_) => exit_now(0),
            }
        }
    })
}
