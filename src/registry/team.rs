//! Several connections for one blob: each fetches a part ahead of the reader, who gets them in order.
//!
//! What is ahead is bounded, in parts for each team and in connections for the whole import, so the memory is, too. A
//! member that fails ends the team: whoever reads goes on with one connection, which knows what to do about failures.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::io::Read;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use super::blob::BlobReader;
use super::client::Client;
use crate::image::manifest::Descriptor;

/// Most connections beyond the first of each blob, for all blobs of an import.
const MOST_EXTRA: u32 = 6;
/// Enough for TLS, also without optimisation.
const STACK: usize = 512 << 10;

/// The connections that an import has beyond one for each blob, and whether they were worth it.
#[derive(Debug, Default)]
pub(super) struct Extra {
    taken: AtomicU32,
    useless: AtomicBool,
}

impl Extra {
    /// Takes up to `wanted`; none once they have turned out to be of no use.
    fn take(&self, wanted: u32) -> u32 {
        let mut granted = 0;
        if self.useless.load(Ordering::Relaxed) {
            return granted;
        }
        let _ = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
            granted = wanted.min(MOST_EXTRA.saturating_sub(taken));
            Some(taken + granted)
        });
        granted
    }

    fn give_back(&self, count: u32) {
        self.taken.fetch_sub(count, Ordering::Relaxed);
    }

    /// They bring nothing here.
    pub fn are_useless(&self) {
        self.useless.store(true, Ordering::Relaxed);
    }
}

/// Connections at work on the end of a blob.
#[derive(Debug)]
pub(super) struct Team {
    shared: Arc<Shared>,
    /// Members beyond the connection that was there before.
    extra: u32,
    /// The part that is being read, and how far.
    current: (Vec<u8>, usize),
}

#[derive(Debug)]
struct Shared {
    client: Arc<Client>,
    blob: Descriptor,
    /// What the team has to bring, in parts of this size.
    range: Range<u64>,
    part: u64,
    /// Parts that may be ahead of the reader.
    window: u64,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The part that somebody fetches next.
    next: u64,
    /// Parts that the reader has taken.
    read: u64,
    arrived: BTreeMap<u64, Vec<u8>>,
    /// No part is begun any more.
    stopped: bool,
    failed: bool,
}

/// How reading from a team ends.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// So many bytes.
    Bytes(usize),
    /// All that it was to bring, or was begun when it was stopped.
    Finished,
    /// A member has failed.
    Failed,
}

impl Team {
    /// A team of up to `connections` for the bytes `range` of a blob; one of them begins with [`Team::complete`]. None if
    /// there may be no more.
    pub fn start(
        client: &Arc<Client>,
        blob: &Descriptor,
        range: Range<u64>,
        part: u64,
        connections: u32,
    ) -> Option<Self> {
        let extra = client.extra_connections().take(connections.saturating_sub(1));
        if extra == 0 {
            return None;
        }
        let shared = Shared {
            client: Arc::clone(client),
            blob: blob.clone(),
            range,
            part: part.max(1),
            window: u64::from(extra) + 2,
            state: Mutex::default(),
            changed: Condvar::new(),
        };
        let team = Self { shared: Arc::new(shared), extra, current: (Vec::new(), 0) };
        (0..extra).for_each(|_| team.add_member());
        Some(team)
    }

    /// The connection that the blob had before joins.
    pub fn complete(&self) {
        self.add_member();
    }

    fn add_member(&self) {
        let shared = Arc::clone(&self.shared);
        let started = thread::Builder::new().name("download".into()).stack_size(STACK).spawn(move || shared.work());
        if started.is_err() {
            self.shared.fail();
        }
    }

    /// Begins no further part: what was begun can still be read.
    pub fn stop(&self) {
        self.shared.lock().stopped = true;
    }

    /// Bytes that were begun and not read yet are lost when it is dropped.
    pub fn read(&mut self, buffer: &mut [u8]) -> Outcome {
        if self.current.1 == self.current.0.len() {
            let mut state = self.shared.lock();
            loop {
                let at = state.read;
                if let Some(part) = state.arrived.remove(&at) {
                    state.read += 1;
                    self.current = (part, 0);
                    self.shared.changed.notify_all();
                    break;
                }
                if state.failed {
                    return Outcome::Failed;
                }
                if at >= self.shared.parts() || (state.stopped && at >= state.next) {
                    return Outcome::Finished;
                }
                state = self.shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        }
        let (part, position) = &mut self.current;
        let rest = &part[*position..];
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        *position += count;
        Outcome::Bytes(count)
    }
}

impl Drop for Team {
    fn drop(&mut self) {
        self.shared.lock().stopped = true;
        self.shared.changed.notify_all();
        self.shared.client.extra_connections().give_back(self.extra);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Every change is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn parts(&self) -> u64 {
        (self.range.end - self.range.start).div_ceil(self.part)
    }

    fn fail(&self) {
        self.lock().failed = true;
        self.changed.notify_all();
    }

    /// A member: fetches one part after the other.
    fn work(&self) {
        // If it ends in any other way than by having nothing to do, the reader must know.
        let alarm = Alarm(self);
        while let Some(number) = self.next() {
            let start = self.range.start + number * self.part;
            let range = start..(start + self.part).min(self.range.end);
            let mut reader = BlobReader::new(&*self.client, &self.blob, range.clone());
            let Some(part) = read_part(&mut reader, range.end - range.start) else { return };
            self.lock().arrived.insert(number, part);
            self.changed.notify_all();
            // Sees the end of the answer.
            let _ = reader.read(&mut [0]);
        }
        std::mem::forget(alarm);
    }

    /// The next part, as soon as there is room for it.
    fn next(&self) -> Option<u64> {
        let mut state = self.lock();
        loop {
            if state.stopped || state.failed || state.next >= self.parts() {
                return None;
            }
            if state.next < state.read + self.window {
                state.next += 1;
                return Some(state.next - 1);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

struct Alarm<'a>(&'a Shared);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        self.0.fail();
    }
}

/// Exactly `size` bytes. None for any failure, lack of memory included.
fn read_part(reader: &mut impl Read, size: u64) -> Option<Vec<u8>> {
    let size = usize::try_from(size).ok()?;
    let mut part = Vec::new();
    part.try_reserve_exact(size).ok()?;
    part.resize(size, 0);
    reader.read_exact(&mut part).ok()?;
    Some(part)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extra_connections_are_bounded() {
        let extra = Extra::default();
        assert_eq!((extra.take(3), extra.take(5), extra.take(1)), (3, 3, 0));
        extra.give_back(2);
        assert_eq!(extra.take(5), 2);
        extra.give_back(2);
        extra.are_useless();
        assert_eq!(extra.take(1), 0);
    }
}
