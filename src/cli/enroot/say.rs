//! enroot's lines: `[INFO]`, `[WARN]` and `[ERROR]` on standard error, coloured on a terminal, results on standard output.

use std::fmt::{self, Display, Write as _};
use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

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

/// From now on, what the registry client says about its progress is shown.
pub fn follow_the_registry() {
    // Fails only if it was done already.
    let _ = tracing::subscriber::set_global_default(Progress::default());
}

/// Shows the events of [`crate::registry`], each once.
#[derive(Default)]
struct Progress {
    asked: AtomicBool,
}

impl Subscriber for Progress {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == crate::registry::PROGRESS && *metadata.level() <= Level::INFO
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut message = Message(String::new());
        event.record(&mut message);
        // A token that is renewed is no news.
        let authentication = message.0.starts_with("Authenticat") || message.0.starts_with("Using credentials");
        if !(authentication && self.asked.load(Ordering::Relaxed)) {
            info(&message.0);
        }
        if message.0 == crate::registry::AUTHENTICATED {
            self.asked.store(true, Ordering::Relaxed);
        }
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            // Writing to a String cannot fail.
            let _ = write!(self.0, "{value:?}");
        }
    }
}
