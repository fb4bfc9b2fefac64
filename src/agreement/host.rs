//! `srun`'s side: a process of the user's that gives each node that asks what the first of them has learned, and ends with
//! `srun`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::Resource;

use super::{MAX_LINE, Message, Seal, Side, random};
use crate::request::{Meaning, Place};

/// How long a connection may take to say who it is.
const GREETING: Duration = Duration::from_secs(5);
/// How long not to accept connections after that has failed.
const PAUSE: Duration = Duration::from_millis(20);
/// How many nodes ask the registry, one after the other, if none of them learns anything.
const MAX_FAILURES: usize = 3;
/// Most connections at a time: more have to wait until they are accepted.
const MAX_CONNECTIONS: usize = 8192;
/// Descriptors that are no connections.
const OTHER_DESCRIPTORS: u64 = 16;

/// Listens at a port of `range`, or at one that the kernel chooses.
pub fn listen(range: Option<RangeInclusive<u16>>) -> io::Result<(TcpListener, Place)> {
    let listener = match range {
        None => bind(0)?,
        Some(range) => {
            // Where the processes that srun's own ports are taken by do not all look at first.
            let count = u32::from(range.end() - range.start()) + 1;
            let first = std::process::id() % count;
            let mut found = Err(io::ErrorKind::AddrInUse.into());
            for offset in 0..count {
                // Below the end of the range.
                found = bind(range.start() + ((first + offset) % count) as u16);
                if !found.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::AddrInUse) {
                    break;
                }
            }
            found?
        }
    };
    listener.set_nonblocking(true)?;
    let place = Place { port: listener.local_addr()?.port(), key: random()? };
    Ok((listener, place))
}

fn bind(port: u16) -> io::Result<TcpListener> {
    // Which is also for IPv4, unless there is no IPv6.
    match TcpListener::bind((IpAddr::from(Ipv6Addr::UNSPECIFIED), port)) {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)),
        outcome => outcome,
    }
}

/// The range of ports that `SrunPortRange` in the text of slurm.conf names: `60001-63000`.
pub fn port_range(value: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = value.split_once('-')?;
    let (first, last): (u16, u16) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
    (first > 0 && first <= last).then_some(first..=last)
}

/// Serves nodes until `srun`, of which `owner` is a pidfd, has ended, or `nodes` of them have been answered if that is not 0.
pub fn serve(listener: &TcpListener, key: &str, owner: BorrowedFd<'_>, nodes: usize) -> io::Result<()> {
    let mut host = Host { seal: Seal::new(key), guests: Vec::new(), outcome: Outcome::Open, failures: 0, answered: 0 };
    let most = most_connections();
    loop {
        let mut watched = vec![PollFd::from_borrowed_fd(owner, PollFlags::IN)];
        watched.extend(host.guests.iter().map(|guest| PollFd::new(&guest.stream, PollFlags::IN)));
        if host.guests.len() < most {
            watched.push(PollFd::new(listener, PollFlags::IN));
        }
        let timeout = host.patience();
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, timeout.as_ref()))?;
        let mut ready = watched.iter().map(|descriptor| !descriptor.revents().is_empty());
        if ready.next().unwrap_or(true) {
            return Ok(());
        }
        let ready: Vec<bool> = ready.collect();
        drop(watched);
        host.listen_to_guests(&ready);
        if ready.get(host.guests.len()).copied().unwrap_or(false) {
            host.accept(listener, most);
        }
        host.answer();
        host.guests.retain(|guest| !guest.done);
        if nodes > 0 && host.answered >= nodes {
            return Ok(());
        }
    }
}

fn most_connections() -> usize {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    // None is no limit.
    let allowed = limit.maximum.unwrap_or(u64::MAX);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    let allowed = match rustix::process::setrlimit(Resource::Nofile, raised) {
        Ok(()) => allowed,
        Err(_) => limit.current.unwrap_or(u64::MAX),
    };
    usize::try_from(allowed.saturating_sub(OTHER_DESCRIPTORS)).unwrap_or(usize::MAX).clamp(1, MAX_CONNECTIONS)
}

struct Host {
    seal: Seal,
    guests: Vec<Guest>,
    outcome: Outcome,
    failures: usize,
    answered: usize,
}

enum Outcome {
    /// It is the next node's turn.
    Open,
    /// It is that of the guest that `asks`.
    Asked,
    Known(Meaning),
    /// Nobody learns anything.
    Nobody,
}

/// A node's connection.
struct Guest {
    stream: TcpStream,
    since: Instant,
    received: Vec<u8>,
    /// Once it has said who it is.
    nonce: Option<String>,
    asks: bool,
    done: bool,
}

impl Host {
    /// How long nobody has to be sent away for not saying anything.
    fn patience(&self) -> Option<Timespec> {
        let oldest = self.guests.iter().filter(|guest| guest.nonce.is_none()).map(|guest| guest.since).min()?;
        let left = (oldest + GREETING).saturating_duration_since(Instant::now()) + Duration::from_millis(1);
        left.try_into().ok()
    }

    fn accept(&mut self, listener: &TcpListener, most: usize) {
        while self.guests.len() < most {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It hung up before its turn came, or there are no descriptors now.
                Err(_) => return std::thread::sleep(PAUSE),
            };
            let ready = stream.set_nonblocking(true).and_then(|()| stream.set_nodelay(true));
            if ready.is_ok() {
                let (since, received) = (Instant::now(), Vec::new());
                self.guests.push(Guest { stream, since, received, nonce: None, asks: false, done: false });
            }
        }
    }

    /// `ready`: of which guests there is something to read, in their order.
    fn listen_to_guests(&mut self, ready: &[bool]) {
        for (guest, ready) in self.guests.iter_mut().zip(ready) {
            let said = if *ready { guest.read(&self.seal) } else { Ok(None) };
            match (said, guest.asks) {
                (Ok(Some(Message::Hello(nonce))), false) => guest.nonce = Some(nonce),
                (Ok(Some(Message::Is(meaning))), true) => {
                    (self.outcome, guest.done) = (Outcome::Known(meaning), true);
                    self.answered += 1;
                }
                (Ok(None), _) => guest.done |= guest.nonce.is_none() && guest.since.elapsed() > GREETING,
                (Ok(Some(_)) | Err(_), asks) => {
                    guest.done = true;
                    if asks {
                        self.failures += 1;
                        self.outcome = if self.failures < MAX_FAILURES { Outcome::Open } else { Outcome::Nobody };
                    }
                }
            }
        }
    }

    /// Gives those who wait what there is.
    fn answer(&mut self) {
        for guest in self.guests.iter_mut().filter(|guest| !guest.done && !guest.asks) {
            let Some(nonce) = &guest.nonce else { continue };
            let message = match &self.outcome {
                Outcome::Open => Message::Ask,
                Outcome::Asked => return,
                Outcome::Known(meaning) => Message::Is(meaning.clone()),
                Outcome::Nobody => Message::None,
            };
            let line = self.seal.line(Side::Host, nonce, &message);
            // A line fits into the buffer of a socket to which nothing has been written.
            let told = (&guest.stream).write_all(line.as_bytes()).is_ok();
            if message == Message::Ask && told {
                (self.outcome, guest.asks) = (Outcome::Asked, true);
            } else {
                guest.done = true;
                self.answered += usize::from(told);
            }
        }
    }
}

impl Guest {
    /// What it says, if that has arrived. An error ends the conversation.
    fn read(&mut self, seal: &Seal) -> io::Result<Option<Message>> {
        let mut buffer = [0; MAX_LINE];
        match (&self.stream).read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => self.received.extend(buffer.iter().take(count)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
        let complete = self.received.iter().position(|&byte| byte == b'\n');
        if complete.is_none() && self.received.len() < MAX_LINE {
            return Ok(None);
        }
        // Whatever follows a line was said out of turn.
        if complete.is_none_or(|end| end + 1 < self.received.len()) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let line = std::mem::take(&mut self.received);
        let message = seal.open(Side::Node, self.nonce.as_deref(), &line);
        message.map(Some).ok_or_else(|| io::ErrorKind::PermissionDenied.into())
    }
}
