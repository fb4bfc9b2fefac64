//! The bytes of a blob in order, over one connection or, where that pays, over several.
//!
//! It begins with one request for the whole blob, which every proxy and cache on the way understands. Where the reader does
//! little but wait for it, and there is much left, other connections fetch parts of the rest ([`super::team`]); if they do
//! not bring clearly more, it goes back to one, and no other blob of the import tries it again.

#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::blob::BlobReader;
use super::client::Client;
use super::error::RegistryError;
use super::team::{Outcome, Team};
use crate::image::manifest::Descriptor;

/// How long to look at a rate before judging it.
const SAMPLE: Duration = Duration::from_millis(1500);
/// Less than this at the present rate is not worth more connections.
const LEAST_LEFT: Duration = Duration::from_secs(4);
/// Bounds of a part: what a connection brings in about a second.
const PARTS: std::ops::RangeInclusive<u64> = 256 << 10..=4 << 20;
/// How much more a team has to bring.
const LEAST_GAIN: f64 = 1.3;
/// Of the time how much the reader waits if the network is what limits it.
const WAITING: f64 = 0.7;

/// A blob's bytes, exactly as many as its descriptor says. Errors are
/// [`RegistryError`](super::error::RegistryError)s inside [`io::Error`].
#[derive(Debug)]
pub struct BlobStream {
    client: Arc<Client>,
    blob: Descriptor,
    position: u64,
    source: Source,
    rate: Rate,
    /// Whether more connections may still be tried.
    may_grow: bool,
    /// Connections that were lost when the rate began to be measured.
    breaks: u32,
}

#[derive(Debug)]
enum Source {
    One(BlobReader<Arc<Client>>),
    /// One until `end`, while the team begins behind it.
    Both {
        one: BlobReader<Arc<Client>>,
        end: u64,
        team: Team,
        rate: f64,
    },
    /// A team and, until it has been judged, the rate before it.
    Team(Team, Option<f64>),
}

impl BlobStream {
    pub(super) fn new(client: Arc<Client>, blob: &Descriptor) -> Self {
        let source = Source::One(BlobReader::new(Arc::clone(&client), blob, 0..blob.size));
        let may_grow = client.network().blob_connections > 1;
        Self { client, blob: blob.clone(), position: 0, source, rate: Rate::begin(), may_grow, breaks: 0 }
    }

    /// The error behind a failed read.
    pub fn read_error(&self, error: io::Error) -> RegistryError {
        self.client.read_error(error)
    }

    fn alone(&self) -> Source {
        Source::One(BlobReader::new(Arc::clone(&self.client), &self.blob, self.position..self.blob.size))
    }

    /// Looks at the rate, now and then, and draws the consequences.
    fn adapt(&mut self) {
        match &self.source {
            // Time that is spent on getting a connection again says nothing about the rate of one.
            Source::One(one) if one.breaks() != self.breaks => {
                self.breaks = one.breaks();
                self.rate = Rate::begin();
            }
            Source::One(_) if self.may_grow => {
                if let Some((rate, waiting)) = self.rate.sample()
                    && waiting >= WAITING
                {
                    self.grow(rate);
                }
            }
            Source::Team(team, Some(before)) => {
                let Some((rate, waiting)) = self.rate.sample() else { return };
                if waiting >= WAITING && rate < before * LEAST_GAIN {
                    self.client.extra_connections().are_useless();
                    team.stop();
                }
                // Once is enough: a rate that changes later has other reasons.
                if let Source::Team(_, before) = &mut self.source {
                    *before = None;
                }
            }
            _ => {}
        }
    }

    /// Starts a team if enough is left for one.
    fn grow(&mut self, rate: f64) {
        let left = self.blob.size - self.position;
        // Saturates at the bounds of u64.
        let part = (rate as u64).clamp(*PARTS.start(), *PARTS.end());
        // The first connection works on until the others have begun.
        let begin = self.position.saturating_add(part);
        if (left as f64) < rate * LEAST_LEFT.as_secs_f64() || begin >= self.blob.size {
            return;
        }
        self.may_grow = false;
        let connections = self.client.network().blob_connections;
        let Some(team) = Team::start(&self.client, &self.blob, begin..self.blob.size, part, connections) else {
            return;
        };
        let alone = self.alone();
        if let Source::One(one) = std::mem::replace(&mut self.source, alone) {
            self.source = Source::Both { one, end: begin, team, rate };
        }
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match &mut self.source {
                Source::One(one) => return one.read(buffer),
                Source::Both { one, end, .. } => {
                    let left = usize::try_from(*end - self.position).unwrap_or(usize::MAX);
                    if left > 0 {
                        let most = left.min(buffer.len());
                        return one.read(&mut buffer[..most]);
                    }
                    let alone = self.alone();
                    if let Source::Both { team, rate, .. } = std::mem::replace(&mut self.source, alone) {
                        team.complete();
                        self.source = Source::Team(team, Some(rate));
                        self.rate = Rate::begin();
                    }
                }
                Source::Team(team, _) => match team.read(buffer) {
                    Outcome::Bytes(count) => return Ok(count),
                    Outcome::Finished if self.position == self.blob.size => return Ok(0),
                    Outcome::Finished => self.source = self.alone(),
                    Outcome::Failed => {
                        self.client.extra_connections().are_useless();
                        self.source = self.alone();
                    }
                },
            }
        }
    }
}

impl Read for BlobStream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        let began = Instant::now();
        let count = self.read_some(buffer)?;
        self.position += count as u64;
        self.rate.add(count, began.elapsed());
        self.adapt();
        Ok(count)
    }
}

/// Bytes and waiting of a while.
#[derive(Debug)]
struct Rate {
    began: Instant,
    bytes: u64,
    waited: Duration,
}

impl Rate {
    fn begin() -> Self {
        Self { began: Instant::now(), bytes: 0, waited: Duration::ZERO }
    }

    fn add(&mut self, count: usize, waited: Duration) {
        self.bytes += count as u64;
        self.waited += waited;
    }

    /// Bytes a second and the part of the time that was spent waiting, once there is enough to judge; then it begins anew.
    fn sample(&mut self) -> Option<(f64, f64)> {
        let elapsed = self.began.elapsed();
        if elapsed < SAMPLE {
            return None;
        }
        let seconds = elapsed.as_secs_f64();
        let sample = (self.bytes as f64 / seconds, self.waited.as_secs_f64() / seconds);
        *self = Self::begin();
        Some(sample)
    }
}
