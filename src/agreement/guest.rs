//! The node's side: asks the host beside `srun`, as the user, and reports to the broker.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{MAX_LINE, Message, Seal, Side, random};
use crate::request::{Meaning, Place, User};
use crate::sys;
use crate::sys::channel::Channel;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long to wait for what another node learns. A registry that takes longer is in trouble.
pub const WAIT: Duration = Duration::from_secs(60);

/// From the broker.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToGuest {
    /// The first message.
    Join {
        /// Whom to become.
        user: User,
        /// Where `srun` is.
        address: IpAddr,
        /// Where its host is.
        place: Place,
    },
    /// What this node has learned, after [`FromGuest::Ask`].
    Learned(Meaning),
}

/// To the broker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FromGuest {
    /// It is this node's turn.
    Ask,
    /// What another node has learned.
    Is(Meaning),
    /// No node has learned anything.
    Nobody,
    /// The host cannot be asked: why.
    Unreachable(String),
}

/// The channel to the broker, as this end has it.
pub type BrokerChannel = Channel<FromGuest, ToGuest>;

/// Asks, tells the broker, and if it is this node's turn passes on what the broker has to tell.
pub fn run(channel: &BrokerChannel, address: IpAddr, place: &Place) -> io::Result<()> {
    let joined = Conversation::begin(SocketAddr::new(address, place.port), &place.key);
    let (mut conversation, answer) = match joined {
        Ok((conversation, message)) => (conversation, answer(message)),
        Err(error) => return channel.send(&FromGuest::Unreachable(sys::reason(error)), &[]),
    };
    channel.send(&answer, &[])?;
    if answer == FromGuest::Ask {
        // A broker that goes without a word has failed: so does this conversation.
        if let Some((ToGuest::Learned(meaning), _)) = channel.receive()? {
            conversation.say(&Message::Is(meaning))?;
        }
    }
    Ok(())
}

fn answer(message: Message) -> FromGuest {
    match message {
        Message::Ask => FromGuest::Ask,
        Message::Is(meaning) => FromGuest::Is(meaning),
        Message::None => FromGuest::Nobody,
        Message::Hello(_) => FromGuest::Unreachable("a wrong answer".into()),
    }
}

pub(super) struct Conversation {
    stream: TcpStream,
    seal: Seal,
    nonce: String,
}

impl Conversation {
    /// Connects, and waits for what the host says.
    pub(super) fn begin(host: SocketAddr, key: &str) -> io::Result<(Self, Message)> {
        let stream = TcpStream::connect_timeout(&host, CONNECT_TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(WAIT))?;
        stream.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        let mut this = Self { stream, seal: Seal::new(key), nonce: random()? };
        this.say(&Message::Hello(this.nonce.clone()))?;
        let mut line = Vec::new();
        BufReader::new((&this.stream).take(MAX_LINE as u64)).read_until(b'\n', &mut line).map_err(|error| {
            match error.kind() {
                // What a timeout of a socket is called.
                io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
                _ => error,
            }
        })?;
        if line.is_empty() {
            return Err(io::Error::other("it has hung up"));
        }
        let message = this.seal.open(Side::Host, Some(&this.nonce), &line);
        message.map(|message| (this, message)).ok_or_else(|| io::Error::other("a wrong answer"))
    }

    pub(super) fn say(&mut self, message: &Message) -> io::Result<()> {
        let line = self.seal.line(Side::Node, &self.nonce, message);
        self.stream.write_all(line.as_bytes())
    }
}
