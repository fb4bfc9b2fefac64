//! A listener of trace events that are for people, or for programs that keep them.

#![forbid(unsafe_code)]

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// What is heard of an event. Shown as one line of text: the message, and its fields as `name=value`.
#[derive(Debug)]
pub struct Heard {
    /// How bad it is.
    pub level: Level,
    /// The message.
    pub message: String,
    /// The fields.
    pub fields: Vec<(&'static str, String)>,
}

impl fmt::Display for Heard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        self.fields.iter().try_for_each(|(name, value)| write!(f, " {name}={value}"))
    }
}

/// Hears the events of this process that it wants. Spans are not recorded.
#[derive(Debug)]
pub struct Listener<W, H> {
    wanted: W,
    heard: H,
}

impl<W, H> Listener<W, H>
where
    W: Fn(&Metadata<'_>) -> bool + Send + Sync + 'static,
    H: Fn(&Heard) + Send + Sync + 'static,
{
    /// Calls `heard` for each event that is `wanted`.
    pub fn new(wanted: W, heard: H) -> Self {
        Self { wanted, heard }
    }

    /// From now on, for the whole process. The first one stays.
    pub fn install(self) {
        let _ = tracing::subscriber::set_global_default(self);
    }
}

impl<W, H> Subscriber for Listener<W, H>
where
    W: Fn(&Metadata<'_>) -> bool + Send + Sync + 'static,
    H: Fn(&Heard) + Send + Sync + 'static,
{
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        (self.wanted)(metadata)
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut heard = Heard { level: *event.metadata().level(), message: String::new(), fields: Vec::new() };
        event.record(&mut heard);
        (self.heard)(&heard);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

impl Visit for Heard {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            // Writing to a String cannot fail.
            "message" => drop(write!(self.message, "{value:?}")),
            name => self.fields.push((name, format!("{value:?}"))),
        }
    }
}
