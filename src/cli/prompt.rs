//! Questions to who types a command: on the terminal, not on standard input, and secrets without showing them.

use std::fs::File;
use std::io::{self, Read, Write};

use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcsetattr};

/// Longest answer.
const MAX_LENGTH: usize = 16 << 10;

/// Asks for one line; `hidden` if it is a secret. Fails if there is no terminal.
pub fn ask(question: &str, hidden: bool) -> io::Result<String> {
    let mut terminal = File::options().read(true).write(true).open("/dev/tty")?;
    let quiet = if hidden { Some(Quiet::on(&terminal)?) } else { None };
    // Who sees the question may begin to type.
    terminal.write_all(question.as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while line.len() < MAX_LENGTH && terminal.read(&mut byte)? == 1 && byte != *b"\n" {
        line.push(byte[0]);
    }
    if quiet.is_some() {
        terminal.write_all(b"\n")?;
    }
    drop(quiet);
    String::from_utf8(line).map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "not UTF-8"))
}

/// A terminal that does not echo, until this is dropped.
struct Quiet {
    terminal: File,
    before: Termios,
}

impl Quiet {
    fn on(terminal: &File) -> io::Result<Self> {
        let before = tcgetattr(terminal)?;
        let mut quiet = before.clone();
        quiet.local_modes.remove(LocalModes::ECHO);
        // An interrupt would end us while the terminal is silent: it is a character like others here, and ends nothing.
        quiet.local_modes.remove(LocalModes::ISIG);
        tcsetattr(terminal, OptionalActions::Flush, &quiet)?;
        Ok(Self { terminal: terminal.try_clone()?, before })
    }
}

impl Drop for Quiet {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(&self.terminal, OptionalActions::Now, &self.before);
    }
}
