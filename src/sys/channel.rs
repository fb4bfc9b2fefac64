//! Messages between the processes of a container start: JSON over a `SOCK_SEQPACKET` socket pair, with file
//! descriptors (`SCM_RIGHTS`, unix(7)).
//!
//! One packet is one message of at most [`MAX_MESSAGE`] bytes; what may be larger (environments, image configs) travels
//! as a memory file. Every end knows its peer: the sockets have no name and are inherited.

use std::io::{self, IoSlice, IoSliceMut};
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most bytes of one message: room for the layers of the largest image, and below the kernel's default socket buffer
/// (`net.core.wmem_default`, 208 KiB), which a message has to fit into.
pub const MAX_MESSAGE: usize = 128 * 1024;
/// Most descriptors of one message (the kernel's own limit is 253).
pub const MAX_DESCRIPTORS: usize = 250;

/// One end of a socket pair that sends `S` and receives `R`.
#[derive(Debug)]
pub struct Channel<S, R> {
    socket: OwnedFd,
    messages: PhantomData<fn(S) -> R>,
}

/// Both ends of a new channel, close-on-exec.
pub fn pair<S, R>() -> io::Result<(Channel<S, R>, Channel<R, S>)> {
    let (a, b) = rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    Ok((Channel::from(a), Channel::from(b)))
}

impl<S, R> From<OwnedFd> for Channel<S, R> {
    fn from(socket: OwnedFd) -> Self {
        Self { socket, messages: PhantomData }
    }
}

impl<S, R> From<Channel<S, R>> for OwnedFd {
    fn from(channel: Channel<S, R>) -> Self {
        channel.socket
    }
}

impl<S, R> AsFd for Channel<S, R> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl<S: Serialize, R: DeserializeOwned> Channel<S, R> {
    /// Sends a message with `descriptors`. A peer that is gone is `BrokenPipe`.
    pub fn send(&self, message: &S, descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MAX_MESSAGE || descriptors.len() > MAX_DESCRIPTORS {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "message too large"));
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too many descriptors"));
        }
        rustix::io::retry_on_intr(|| {
            rustix::net::sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)
        })?;
        Ok(())
    }

    /// The next message and its descriptors (close-on-exec); `None` when the peer is gone.
    pub fn receive(&self) -> io::Result<Option<(R, Vec<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_MESSAGE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        // A unix socket reports ECONNRESET *before* a message that is still queued: ask again for the message.
        let mut resets = 0;
        let received = loop {
            let result = rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut control,
                RecvFlags::CMSG_CLOEXEC,
            );
            match result {
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::CONNRESET) if resets == 0 => resets += 1,
                Err(rustix::io::Errno::CONNRESET) => return Ok(None),
                other => break other?,
            }
        };
        let descriptors: Vec<OwnedFd> = control
            .drain()
            .filter_map(|message| match message {
                RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
                _ => None,
            })
            .flatten()
            .collect();
        if received.bytes == 0 {
            return Ok(None);
        }
        let message = serde_json::from_slice(&bytes[..received.bytes])?;
        Ok(Some((message, descriptors)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_and_descriptors_arrive() {
        let (a, b) = pair::<String, u32>().unwrap();
        let file = crate::sys::memfile::sealed("x", b"inside").unwrap();
        a.send(&"hello".into(), &[file.as_fd()]).unwrap();
        let (text, mut descriptors) = b.receive().unwrap().unwrap();
        assert_eq!(text, "hello");
        assert_eq!(crate::sys::memfile::read_all(descriptors.remove(0), 100).unwrap(), b"inside");
        b.send(&7, &[]).unwrap();
        assert_eq!(a.receive().unwrap().unwrap().0, 7);
        drop(b);
        assert!(a.receive().unwrap().is_none());
        assert_eq!(a.send(&"x".into(), &[]).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_last_message_survives_unread_data_of_the_peer() {
        let (a, b) = pair::<String, String>().unwrap();
        a.send(&"never read".into(), &[]).unwrap();
        b.send(&"last words".into(), &[]).unwrap();
        drop(b);
        assert_eq!(a.receive().unwrap().unwrap().0, "last words");
    }

    #[test]
    fn an_oversized_message_is_refused() {
        let (a, _b) = pair::<String, String>().unwrap();
        assert!(a.send(&"x".repeat(MAX_MESSAGE), &[]).is_err());
    }
}
