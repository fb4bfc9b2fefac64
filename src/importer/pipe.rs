//! A pipe between two threads of an import: large buffers that go round, so that nothing is allocated per chunk and what
//! is under way is bounded.

#![forbid(unsafe_code)]

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

/// Bytes of a buffer: small enough that what one thread has filled is still in the cache when the next one reads it.
pub const BUFFER: usize = 256 << 10;
/// Buffers of a pipe.
const BUFFERS: usize = 6;

/// The end that fills buffers.
#[derive(Debug)]
pub struct Writer {
    full: SyncSender<Vec<u8>>,
    empty: Receiver<Vec<u8>>,
}

/// The end that reads them. Dropping it makes the writer fail.
#[derive(Debug)]
pub struct Reader {
    full: Receiver<Vec<u8>>,
    empty: SyncSender<Vec<u8>>,
    buffer: Vec<u8>,
    position: usize,
    ended: bool,
}

/// The other end is gone without having finished. Whoever sees this is not the one who knows why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("another stage of the import failed")]
pub struct Broken;

/// A new pipe.
pub fn pipe() -> (Writer, Reader) {
    let (full_sender, full_receiver) = sync_channel(BUFFERS + 1);
    let (empty_sender, empty_receiver) = sync_channel(BUFFERS);
    for _ in 0..BUFFERS {
        // Memory comes with the first use. There is room for all of them: this cannot fail.
        let _ = empty_sender.send(Vec::new());
    }
    let reader = Reader { full: full_receiver, empty: empty_sender, buffer: Vec::new(), position: 0, ended: false };
    (Writer { full: full_sender, empty: empty_receiver }, reader)
}

impl Writer {
    /// Reads a buffer full from `source`, shows it to `inspect` and passes it on; false at the end of `source`.
    pub fn pump<E: From<Broken>>(
        &self,
        source: &mut impl Read,
        failed: impl FnOnce(io::Error) -> E,
        inspect: impl FnOnce(&[u8]),
    ) -> Result<bool, E> {
        let mut buffer = self.empty.recv().map_err(|_| Broken)?;
        buffer.resize(BUFFER, 0);
        let mut filled = 0;
        while filled < BUFFER {
            match source.read(&mut buffer[filled..]) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        buffer.truncate(filled);
        inspect(&buffer);
        if filled > 0 {
            self.full.send(buffer).map_err(|_| Broken)?;
        }
        Ok(filled > 0)
    }

    /// Everything was passed on. Without this the reader fails instead of seeing the end.
    pub fn finish(self) {
        // There is room for it beyond all buffers. A reader that is gone does not want it.
        let _ = self.full.send(Vec::new());
    }
}

impl BufRead for Reader {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.position == self.buffer.len() && !self.ended {
            let next = self.full.recv().map_err(|_| io::Error::other(Broken))?;
            let last = std::mem::replace(&mut self.buffer, next);
            self.position = 0;
            self.ended = self.buffer.is_empty();
            if last.capacity() > 0 {
                // A writer that has finished wants no more buffers.
                let _ = self.empty.send(last);
            }
        }
        Ok(&self.buffer[self.position..])
    }

    fn consume(&mut self, count: usize) {
        self.position = (self.position + count).min(self.buffer.len());
    }
}

impl Read for Reader {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(to.len());
        to[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// Whether a read failed because the writer is gone.
pub fn is_broken(error: &io::Error) -> bool {
    error.get_ref().is_some_and(|inner| inner.is::<Broken>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pump_all(writer: &Writer, mut source: impl Read) -> Result<(), Broken> {
        while writer.pump(&mut source, |_| Broken, |_| {})? {}
        Ok(())
    }

    #[test]
    fn bytes_arrive_in_order() {
        let sent: Vec<u8> = (0..20 * BUFFER + 17).map(|at| (at % 251) as u8).collect();
        let (writer, mut reader) = pipe();
        let mut received = Vec::new();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                pump_all(&writer, &sent[..]).unwrap();
                writer.finish();
            });
            reader.read_to_end(&mut received).unwrap();
        });
        assert!(received == sent);
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }

    #[test]
    fn a_writer_that_gives_up_is_no_end() {
        let (writer, mut reader) = pipe();
        pump_all(&writer, &b"some"[..]).unwrap();
        drop(writer);
        let error = reader.read_to_end(&mut Vec::new()).unwrap_err();
        assert!(is_broken(&error));
    }

    #[test]
    fn a_reader_that_gives_up_stops_the_writer() {
        let (writer, reader) = pipe();
        drop(reader);
        assert_eq!(pump_all(&writer, io::repeat(0)), Err(Broken));
    }

    #[test]
    fn an_empty_stream_has_an_end() {
        let (writer, mut reader) = pipe();
        pump_all(&writer, io::empty()).unwrap();
        writer.finish();
        assert_eq!(reader.read(&mut [0]).unwrap(), 0);
    }
}
