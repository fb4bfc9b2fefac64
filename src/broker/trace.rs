//! The broker's trace events, as lines of the node's log: it has no log of its own, and the leading task writes to
//! slurmd's.

use std::fmt::{self, Write};
use std::os::fd::AsFd;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::sys::channel::Channel;
use crate::task::UserMessage;
use crate::task::protocol::{ToBroker, ToLeader};

/// Sends every event of its level to the leader. Spans are not recorded.
#[derive(Debug)]
struct ToNodeLog {
    channel: Channel<ToLeader, ToBroker>,
    level: Level,
}

/// Sends the events of this process, up to `level`, to the leader from now on.
pub fn install(channel: &Channel<ToLeader, ToBroker>, level: Level) {
    // Without it the log lacks some lines, and the container starts all the same.
    let Ok(copy) = channel.as_fd().try_clone_to_owned() else { return };
    let _ = tracing::subscriber::set_global_default(ToNodeLog { channel: copy.into(), level });
}

impl Subscriber for ToNodeLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // Libraries trace as well; what they say is about themselves.
        *metadata.level() <= self.level && metadata.target().starts_with(env!("CARGO_CRATE_NAME"))
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line("pyxis: ".to_owned());
        event.record(&mut line);
        // A leader that is gone is noticed where the broker waits.
        let _ = self.channel.send(&ToLeader::Say(UserMessage::Log(line.0)), &[]);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// The message, then the fields as `name=value`.
struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String cannot fail.
        let _ = match field.name() {
            "message" => write!(self.0, "{value:?}"),
            name => write!(self.0, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::channel;

    #[test]
    fn events_arrive_as_lines() {
        let (broker, leader) = channel::pair::<ToLeader, ToBroker>().unwrap();
        let subscriber = ToNodeLog { channel: broker, level: Level::INFO };
        tracing::subscriber::with_default(subscriber, || {
            tracing::debug!("too quiet");
            tracing::info!(layers = 3, "mounted");
        });
        match leader.receive().unwrap() {
            Some((ToLeader::Say(UserMessage::Log(line)), _)) => assert_eq!(line, "pyxis: mounted layers=3"),
            other => panic!("{other:?}"),
        }
        assert!(leader.receive().unwrap().is_none());
    }
}
