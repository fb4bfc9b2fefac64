//! Squashfs files as images: which of the three ways, and what the broker has to do for two of them. The third, to
//! convert, is an import ([`import::convert`](super::import)).
//!
//! The broker never reads the file: it passes the descriptor on, or gives it to the kernel where the administrator wants
//! that.

use std::os::fd::{AsFd, OwnedFd};

use rustix::mount::MountAttrFlags;
use rustix::process::Pid;

use super::import::{self, Child, ImportError, ImportSettings};
use super::{BrokerError, failed};
use crate::cli;
use crate::config::SquashfsMode;
use crate::namespaces;
use crate::request::{StepRequest, User};
use crate::rootfs::{cgroups, overlay, squashfuse};
use crate::squashfuse::{FromServer, ToServer};
use crate::sys;
use crate::sys::channel::Channel;
use crate::sys::loopdev;

/// What is to be done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Method {
    Fuse,
    Kernel,
    Convert,
}

impl Method {
    /// Containers that are kept, or saved, need layers that stay.
    pub fn choose(mode: SquashfsMode, request: &StepRequest) -> Self {
        if request.name.is_some() || request.save.is_some() {
            return Self::Convert;
        }
        match mode {
            SquashfsMode::Auto if squashfuse::is_usable(&request.user) => Self::Fuse,
            SquashfsMode::Auto | SquashfsMode::Convert => Self::Convert,
            SquashfsMode::Fuse => Self::Fuse,
            SquashfsMode::Kernel => Self::Kernel,
        }
    }
}

/// A detached mount of `file` by the kernel's squashfs, with root's files shown as the user's.
pub(super) fn mount(file: &OwnedFd, user: &User) -> Result<OwnedFd, String> {
    let status = rustix::fs::fstat(file).map_err(sys::reason)?;
    if rustix::fs::FileType::from_raw_mode(status.st_mode) != rustix::fs::FileType::RegularFile {
        return Err("not a regular file".into());
    }
    let attributes =
        MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
    let mount = loopdev::mount(file.as_fd(), "squashfs", attributes).map_err(|error| error.to_string())?;
    let idmap = namespaces::idmap(user).map_err(sys::reason)?;
    overlay::show_as(&mount, &idmap).map_err(|error| error.to_string())?;
    Ok(mount)
}

/// A FUSE server that is about to serve one container. Ended when dropped, unless it was left running.
#[derive(Debug)]
pub(super) struct FuseServer {
    channel: Channel<ToServer, FromServer>,
    process: Child,
    /// The image, as the user typed it.
    typed: String,
}

impl FuseServer {
    /// Starts one for `file`.
    pub fn start(
        settings: &ImportSettings,
        user: &User,
        file: &OwnedFd,
        life: &OwnedFd,
        typed: &str,
    ) -> Result<Self, ImportError> {
        let (channel, process) = import::start_reader::<ToServer, FromServer>(settings, cli::SQUASHFUSE)?;
        channel
            .send(&ToServer::Open { user: user.clone() }, &[file.as_fd(), life.as_fd()])
            .map_err(|error| ImportError::Start(format!("{}: {}", cli::SQUASHFUSE, sys::reason(error))))?;
        Ok(Self { channel, process, typed: typed.to_owned() })
    }

    /// Where it may say something.
    pub fn channel(&self) -> &Channel<ToServer, FromServer> {
        &self.channel
    }

    /// Hears what it says. Fails if there will be no file system.
    pub fn receive(&self) -> Result<(), BrokerError> {
        match self.channel.receive().map_err(failed("FUSE server"))? {
            Some((FromServer::Opened, _)) => Ok(()),
            Some((FromServer::Failed { message }, _)) => {
                let detail = import::one_line(&message, 300);
                let reason = format!("Invalid image format: {} ({detail})", self.typed);
                Err(BrokerError::Create { image: self.typed.clone(), reason })
            }
            None => Err(BrokerError::Start("the FUSE server ended unexpectedly".into())),
        }
    }

    /// Has it answer on `device`; from now on it lives as long as the step does.
    pub fn serve(&self, owner: (u32, u32), device: &OwnedFd) {
        // If it is gone, it has said why.
        let _ = self.channel.send(&ToServer::Serve { owner }, &[device.as_fd()]);
    }

    /// Moves it to the cgroups of `task`: what it uses is the job's.
    pub fn join(&self, task: Pid) {
        if let Err(error) = cgroups::join(self.process.id(), task) {
            tracing::warn!("the FUSE server stays outside the job's cgroup: {}", sys::reason(error));
        }
    }

    /// The container is ready.
    pub fn leave_running(self) {
        self.process.leave_running();
    }
}
