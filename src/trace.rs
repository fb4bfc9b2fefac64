//! A listener of trace events that are for people: each is one line of text.

#![forbid(unsafe_code)]

use std::fmt::{self, Write};

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// Hears the events of this process that it wants. Spans are not recorded.
#[derive(Debug)]
pub struct Listener<W, H> {
    wanted: W,
    heard: H,
}

impl<W, H> Listener<W, H>
where
    W: Fn(&Metadata<'_>) -> bool + Send + Sync + 'static,
    H: Fn(&str) + Send + Sync + 'static,
{
    /// Calls `heard` with the message of each event that is `wanted`, and its fields as `name=value`.
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
    H: Fn(&str) + Send + Sync + 'static,
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
        let mut line = Line(String::new());
        event.record(&mut line);
        (self.heard)(&line.0);
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

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
