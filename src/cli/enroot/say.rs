//! enroot's lines: `[INFO]`, `[WARN]` and `[ERROR]` on standard error, coloured on a terminal, results on standard output.

use std::fmt::Display;
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::{Level, Metadata};

use crate::registry::{AUTHENTICATED, PROGRESS, TROUBLE};
use crate::trace::{Heard, Listener};

/// Progress.
pub fn info(text: impl Display) {
    say("[INFO]", "\x1b[1;34m", text);
}

/// Something that may be wrong.
pub fn warn(text: impl Display) {
    say("[WARN]", "\x1b[1;33m", text);
}

/// Why the command failed.
pub fn error(text: impl Display) {
    say("[ERROR]", "\x1b[1;31m", text);
}

/// A line of a program that has its own form.
pub fn plain(text: impl Display) {
    say("", "", text);
}

fn say(prefix: &str, colour: &str, text: impl Display) {
    // One line, whatever a registry or an image put into it.
    let text: String = text.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let stderr = io::stderr();
    let line = match stderr.is_terminal() {
        _ if prefix.is_empty() => format!("{text}\n"),
        true => format!("{colour}{prefix}\x1b[0m {text}\n"),
        false => format!("{prefix} {text}\n"),
    };
    // If nobody listens, nobody is missing it.
    let _ = stderr.lock().write_all(line.as_bytes());
}

/// A line of the result.
pub fn line(text: impl Display) -> io::Result<()> {
    match writeln!(io::stdout().lock(), "{text}") {
        // `enroot list | head -1`
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// From now on, what the registry client says about its progress and its troubles is shown, each once.
pub fn follow_the_registry() {
    let asked = AtomicBool::new(false);
    let heard = move |heard: &Heard| {
        let message = heard.to_string();
        // A token that is renewed is no news.
        let authentication = message.starts_with("Authenticat") || message.starts_with("Using credentials");
        if !(authentication && asked.load(Ordering::Relaxed)) {
            info(&message);
        }
        if message == AUTHENTICATED {
            asked.store(true, Ordering::Relaxed);
        }
    };
    let wanted = |event: &Metadata<'_>| {
        (event.target() == PROGRESS || event.target() == TROUBLE) && *event.level() <= Level::INFO
    };
    Listener::new(wanted, heard).install();
}
