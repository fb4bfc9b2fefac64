//! How the nodes of a step agree on what an image's tag means where `srun` could not find out: the first node that comes
//! asks the registry, and the others use what it has learned.
//!
//! `srun`'s side leaves a process of the user's beside `srun` that listens ([`host`]), at a port from `SrunPortRange`; nodes
//! reach it where they reach `srun`, by a process of the user's ([`guest`]):
//!
//! ```text
//! node → hello NONCE
//!        host → ask              it is this node's turn
//!        host → is MEANING       another node has found out
//!        host → none             nobody finds out: ask for yourself
//! node → is MEANING, or none     after `ask`; one that goes without a word leaves its turn to the next
//! ```
//!
//! Each is a line with a code behind it (HMAC with SHA-256, RFC 2104) of the key that the step's nodes have got from `srun`: who
//! has not got it changes nothing, on either side.

#![forbid(unsafe_code)]

pub mod guest;
pub mod host;

use std::io::{self, Read};

use ring::hmac;

use crate::image::digest::Digest;
use crate::request::{MAX_MEANING, Meaning};

/// Most bytes of a line.
const MAX_LINE: usize = MAX_MEANING + 128;

/// Who says something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Node,
    Host,
}

/// What is said.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Message {
    Hello(String),
    Ask,
    Is(Meaning),
    None,
}

impl Message {
    fn text(&self) -> String {
        match self {
            Self::Hello(nonce) => format!("hello {nonce}"),
            Self::Ask => "ask".into(),
            Self::Is(meaning) => format!("is {meaning}"),
            Self::None => "none".into(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        match text.split_once(' ').unwrap_or((text, "")) {
            ("hello", nonce) if is_hex(nonce, 32) => Some(Self::Hello(nonce.to_owned())),
            ("ask", "") => Some(Self::Ask),
            ("is", meaning) => Meaning::parse(meaning).map(Self::Is),
            ("none", "") => Some(Self::None),
            _ => None,
        }
    }
}

/// Writes and reads lines with codes.
struct Seal(hmac::Key);

impl Seal {
    fn new(key: &str) -> Self {
        Self(hmac::Key::new(hmac::HMAC_SHA256, key.as_bytes()))
    }

    fn signed(side: Side, nonce: &str, text: &str) -> String {
        format!("{side:?} {nonce} {text}")
    }

    /// The line for `message` in the conversation that began with `nonce`.
    fn line(&self, side: Side, nonce: &str, message: &Message) -> String {
        let text = message.text();
        let code = hmac::sign(&self.0, Self::signed(side, nonce, &text).as_bytes());
        let code = <[u8; 32]>::try_from(code.as_ref()).map(|bytes| Digest::from_bytes(bytes).hex()).unwrap_or_default();
        format!("{text} {code}\n")
    }

    /// What a line says. A conversation begins with one that names its `nonce`.
    fn open(&self, side: Side, nonce: Option<&str>, line: &[u8]) -> Option<Message> {
        let (text, code) = std::str::from_utf8(line).ok()?.trim_end_matches('\n').rsplit_once(' ')?;
        let code: Digest = format!("sha256:{code}").parse().ok()?;
        let message = Message::parse(text)?;
        let nonce = match (&message, nonce) {
            (Message::Hello(nonce), None) => nonce,
            (Message::Hello(_), Some(_)) | (_, None) => return None,
            (_, Some(nonce)) => nonce,
        };
        hmac::verify(&self.0, Self::signed(side, nonce, text).as_bytes(), code.as_bytes()).ok()?;
        Some(message)
    }
}

/// Thirty-two digits that nobody can guess.
fn random() -> io::Result<String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn is_hex(text: &str, length: usize) -> bool {
    text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

#[cfg(test)]
mod tests;
