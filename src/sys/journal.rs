//! systemd's journal, in its own protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL): a datagram for each entry.

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::Path;

/// Where journald listens.
pub const SOCKET: &str = "/run/systemd/journal/socket";
/// Longest value: an entry is far from what a datagram can hold.
const MAX_VALUE: usize = 16 << 10;

/// A connection.
#[derive(Debug)]
pub struct Journal(UnixDatagram);

impl Journal {
    /// To the journald that listens at `socket`. What comes later reaches it from any mount namespace.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let connection = UnixDatagram::unbound()?;
        connection.connect(socket)?;
        // A journald that is stuck keeps nobody waiting.
        connection.set_nonblocking(true)?;
        Ok(Self(connection))
    }

    /// One entry. Names of fields are upper case letters, digits and underscores; values are any text.
    pub fn send(&self, fields: &[(&str, &str)]) -> io::Result<()> {
        self.0.send(&entry(fields)).map(drop)
    }
}

fn entry(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut entry = Vec::new();
    for (name, value) in fields {
        let value = value.as_bytes().get(..MAX_VALUE).unwrap_or(value.as_bytes());
        entry.extend(name.as_bytes());
        // Otherwise a value with a line break could add fields of its own.
        if value.contains(&b'\n') {
            entry.push(b'\n');
            entry.extend((value.len() as u64).to_le_bytes());
        } else {
            entry.push(b'=');
        }
        entry.extend(value);
        entry.push(b'\n');
    }
    entry
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_arrive_and_values_stay_values() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(Journal::connect(&path).is_err());
        let journald = UnixDatagram::bind(&path).unwrap();
        let long = "x".repeat(100_000);
        Journal::connect(&path).unwrap().send(&[("A", "b=c"), ("M", "one\nPRIORITY=0"), ("L", &long)]).unwrap();
        let mut buffer = vec![0; 1 << 20];
        let length = journald.recv(&mut buffer).unwrap();
        let expected =
            [&b"A=b=c\nM\n\x0e\0\0\0\0\0\0\0one\nPRIORITY=0\nL="[..], &vec![b'x'; MAX_VALUE], b"\n"].concat();
        assert_eq!(&buffer[..length], expected);
    }
}
