//! What the image's tag means where `srun` has not found out: asked of the process that it has left beside it, by one of the
//! user's on this node ([`crate::agreement`]).

#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::process::{Child, start_reader};
use super::{ImportError, ImportSettings};
use crate::agreement::guest::{FromGuest, ToGuest, WAIT};
use crate::cli;
use crate::request::{Meaning, Place, User};
use crate::sys::channel::Channel;

/// How long the guest may take to give up, after it should have.
const GRACE: Duration = Duration::from_secs(15);

/// What has to be done about a tag.
#[derive(Debug)]
pub enum Agreed {
    /// Another node has found out what it means.
    Known(Meaning),
    /// The registry has to be asked, for all nodes.
    Ours(Turn),
    /// The registry has to be asked; no other node has learned anything.
    Nobody,
    /// The same, because the others cannot be heard: why.
    Alone(String),
}

/// This node asks, and the others wait for it. Dropped, it leaves that to another one.
#[derive(Debug)]
pub struct Turn {
    channel: Channel<ToGuest, FromGuest>,
    process: Child,
}

impl Turn {
    /// Tells the others.
    pub fn tell(mut self, meaning: Meaning) {
        // Without it they ask for themselves.
        if self.channel.send(&ToGuest::Learned(meaning), &[]).is_ok() {
            self.process.ended();
        }
    }
}

/// Asks at `place` on the machine with `address`, as `user`. `started` is told of the process. Waits, but no longer than one of
/// `cancel` is open.
pub fn agree(
    settings: &ImportSettings,
    user: &User,
    (address, place): (IpAddr, &Place),
    cancel: &[BorrowedFd<'_>],
    started: impl FnOnce(u32),
) -> Result<Agreed, ImportError> {
    let failed = |error| ImportError::start(cli::GUEST, &error);
    let (channel, process) = start_reader::<ToGuest, FromGuest>(settings, cli::GUEST)?;
    started(process.id());
    let join = ToGuest::Join { user: user.clone(), address, place: place.clone() };
    channel.send(&join, &[]).map_err(failed)?;
    let mut watched = vec![PollFd::new(&channel, PollFlags::IN)];
    watched.extend(cancel.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::RDHUP)));
    let timeout = (WAIT + GRACE).try_into().ok();
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, timeout.as_ref()))
        .map_err(|errno| failed(errno.into()))?;
    let mut events = watched.iter().map(|fd| !fd.revents().is_empty());
    let answered = events.next().unwrap_or(false);
    if events.any(|ready| ready) {
        return Err(ImportError::Cancelled { image: String::new() });
    }
    if !answered {
        return Ok(Agreed::Alone("no answer".into()));
    }
    Ok(match channel.receive().map_err(failed)? {
        Some((FromGuest::Ask, _)) => Agreed::Ours(Turn { channel, process }),
        Some((FromGuest::Is(meaning), _)) => Agreed::Known(meaning),
        Some((FromGuest::Nobody, _)) => Agreed::Nobody,
        Some((FromGuest::Unreachable(reason), _)) => Agreed::Alone(super::one_line(&reason, 200)),
        None => Agreed::Alone("the process that asks has ended".into()),
    })
}
