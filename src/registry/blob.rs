//! A blob as a stream that survives broken connections: it goes on with a Range request (RFC 9110, section 14) where it
//! stopped, so that whoever hashes and unpacks it never notices.

#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::ops::{Deref, Range};
use std::time::{Duration, Instant};

use ureq::BodyReader;
use ureq::http::header::{CONTENT_LENGTH, CONTENT_RANGE, RANGE};
use ureq::http::{HeaderValue, Method, StatusCode};

use super::client::Client;
use super::error::{RegistryError, TransportError, TransportReason};
use super::http::Answer;
use super::retry::Backoff;
use crate::image::digest::Digest;
use crate::image::manifest::Descriptor;

/// A try that brings this much counts as progress: the number of failed tries starts again from none.
const PROGRESS: u64 = 256 * 1024;

/// Reads a blob, or a part of it. Ends after exactly as many bytes as the descriptor says, and fails if the registry has
/// fewer or more. Errors are [`RegistryError`]s inside [`io::Error`].
#[derive(Debug)]
pub struct BlobReader<C> {
    client: C,
    digest: Digest,
    size: u64,
    position: u64,
    /// Where to stop: `size`, except for a part.
    end: u64,
    body: Option<Source>,
    backoff: Backoff,
    /// Where the present run of tries began to count.
    counted_from: u64,
    /// Connections that were lost.
    breaks: u32,
}

/// An open answer, and how fast it comes.
struct Source {
    body: BodyReader<'static>,
    host: String,
    /// Bytes of the present window, and the time spent waiting for them.
    bytes: u64,
    waited: Duration,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("host", &self.host).finish_non_exhaustive()
    }
}

impl<C: Deref<Target = Client>> BlobReader<C> {
    /// Reads the bytes `range` of a blob. If they are not its last ones, a server without ranges is an error.
    pub(super) fn new(client: C, descriptor: &Descriptor, range: Range<u64>) -> Self {
        let backoff = client.backoff();
        Self {
            client,
            digest: descriptor.digest,
            size: descriptor.size,
            position: range.start,
            end: range.end.min(descriptor.size),
            body: None,
            backoff,
            counted_from: range.start,
            breaks: 0,
        }
    }

    /// Connections that were lost so far.
    pub(super) fn breaks(&self) -> u32 {
        self.breaks
    }

    fn is_part(&self) -> bool {
        self.end < self.size
    }

    fn what(&self) -> String {
        format!("blob {}", self.digest)
    }

    /// Asks for the blob from the present position on.
    fn open(&mut self) -> Result<Source, RegistryError> {
        let mut ask = self.client.blob_ask(Method::GET, &self.digest)?;
        if self.position > 0 || self.is_part() {
            // Both ends are in the range.
            let last = if self.is_part() { (self.end - 1).to_string() } else { String::new() };
            let range = HeaderValue::from_str(&format!("bytes={}-{last}", self.position));
            ask.headers.insert(RANGE, range.map_err(|_| self.wrong_answer("a bad range"))?);
        }
        let answer = self.client.send(&ask, &mut self.backoff).map_err(|error| match error {
            error if error.is_not_found() => RegistryError::BlobNotFound {
                host: self.client.endpoint().host.clone(),
                repository: self.client.endpoint().repository.clone(),
                digest: self.digest,
            },
            // The range begins behind the end.
            RegistryError::Status { host, status: StatusCode::RANGE_NOT_SATISFIABLE, .. } => self.truncated(host),
            error => error,
        })?;
        let skip = self.bytes_before(&answer)?;
        if self.is_part() && answer.response.status() != StatusCode::PARTIAL_CONTENT {
            return Err(self.wrong_answer("the whole blob instead of the range asked for"));
        }
        let Answer { response, host, .. } = answer;
        let mut source = Source { body: response.into_body().into_reader(), host, bytes: 0, waited: Duration::ZERO };
        // A server without ranges sends everything again.
        let skipped = io::copy(&mut Read::by_ref(&mut source.body).take(skip), &mut io::sink());
        match skipped {
            Ok(bytes) if bytes == skip => Ok(source),
            Ok(_) => Err(self.truncated(source.host)),
            Err(error) => Err(self.client.broken(error).into()),
        }
    }

    /// How many bytes of this answer come before the present position. Also sees early that the length is wrong.
    fn bytes_before(&self, answer: &Answer) -> Result<u64, RegistryError> {
        let header = |name| answer.response.headers().get(name).and_then(|value| value.to_str().ok());
        let (start, total) = match answer.response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let (start, total) = header(CONTENT_RANGE)
                    .and_then(parse_content_range)
                    .ok_or_else(|| self.wrong_answer("a malformed Content-Range"))?;
                if start > self.position {
                    return Err(self.wrong_answer("another range than the one asked for"));
                }
                (start, total)
            }
            StatusCode::OK => (0, header(CONTENT_LENGTH).and_then(|length| length.parse().ok())),
            status => {
                return Err(RegistryError::Status {
                    host: answer.host.clone(),
                    status,
                    what: self.what(),
                    detail: String::new(),
                });
            }
        };
        match total {
            Some(total) if total > self.size => Err(self.too_long(answer.host.clone())),
            Some(total) if total < self.size => Err(RegistryError::Truncated {
                host: answer.host.clone(),
                what: self.what(),
                received: total,
                size: self.size,
            }),
            _ => Ok(self.position - start),
        }
    }

    fn wrong_answer(&self, reason: &str) -> RegistryError {
        let host = self.client.endpoint().host.clone();
        TransportError { host, reason: TransportReason::Broken(reason.to_owned()) }.into()
    }

    fn truncated(&self, host: String) -> RegistryError {
        RegistryError::Truncated { host, what: self.what(), received: self.position, size: self.size }
    }

    fn too_long(&self, host: String) -> RegistryError {
        RegistryError::TooLong { host, what: self.what(), limit: self.size }
    }

    /// The connection is lost: whether to go on with another.
    fn try_again(&mut self, host: &str, reason: &TransportReason) -> bool {
        self.body = None;
        self.breaks += 1;
        if self.position - self.counted_from >= PROGRESS {
            self.backoff.reset();
        }
        self.counted_from = self.position;
        self.backoff.wait(reason.attempts(u32::MAX), None, || format!("{host}: {reason}"))
    }

    fn read_some(&mut self, buffer: &mut [u8]) -> Result<usize, RegistryError> {
        if self.is_part() && self.position == self.end {
            // The end of the answer: the connection can be used again.
            if let Some(mut source) = self.body.take() {
                let _ = source.body.read(&mut [0]);
            }
            return Ok(0);
        }
        loop {
            let source = match &mut self.body {
                Some(source) => source,
                None => {
                    let source = self.open()?;
                    self.body.insert(source)
                }
            };
            // One byte more than there may be, to see that the blob ends where it should.
            let left = self.end - self.position;
            let wanted = if self.end < self.size { left } else { left.saturating_add(1) };
            let most = usize::try_from(wanted).unwrap_or(usize::MAX).min(buffer.len());
            let mut probe = [0];
            let target = if left == 0 { &mut probe[..] } else { &mut buffer[..most] };
            let began = Instant::now();
            let outcome = source.body.read(target);
            let reason = match outcome {
                Ok(0) if left == 0 => return Ok(0),
                Ok(0) => TransportReason::Broken(format!("it ended after {} of {} bytes", self.position, self.size)),
                Ok(count) if count as u64 > left => {
                    let host = source.host.clone();
                    return Err(self.too_long(host));
                }
                Ok(count) => {
                    self.position += count as u64;
                    if !source.is_too_slow(count, began.elapsed(), &self.client) {
                        return Ok(count);
                    }
                    // What came is good all the same; the next read opens a new connection.
                    let reason = TransportReason::Stalled(format!("{} of {} bytes", self.position, self.size));
                    let host = source.host.clone();
                    return if self.try_again(&host, &reason) {
                        Ok(count)
                    } else {
                        Err(TransportError { host, reason }.into())
                    };
                }
                // All is here; how the connection ends does not matter.
                Err(_) if left == 0 => return Ok(0),
                Err(error) => super::http::io_reason(error),
            };
            let host = source.host.clone();
            if !self.try_again(&host, &reason) {
                return Err(TransportError { host, reason }.into());
            }
        }
    }
}

impl Source {
    /// Counts `count` bytes for which we waited; true if a whole window of waiting brought less than the least rate.
    fn is_too_slow(&mut self, count: usize, waited: Duration, client: &Client) -> bool {
        let network = client.network();
        self.bytes += count as u64;
        self.waited += waited;
        if self.waited < Duration::from_secs(network.stall_timeout.into()) {
            return false;
        }
        let least = u64::from(network.min_rate) * self.waited.as_secs();
        let slow = self.bytes < least;
        (self.bytes, self.waited) = (0, Duration::ZERO);
        slow
    }
}

impl<C: Deref<Target = Client>> Read for BlobReader<C> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        self.read_some(buffer).map_err(io::Error::other)
    }
}

/// First byte and total length of a `Content-Range: bytes 5-9/10`; the length may be unknown (`*`).
fn parse_content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.trim().strip_prefix("bytes")?.trim_start().split_once('/')?;
    let (start, end) = range.split_once('-')?;
    let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    (start <= end && total.is_none_or(|total| end < total)).then_some((start, total))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges() {
        for (text, parsed) in [
            ("bytes 5-9/10", Some((5, Some(10)))),
            ("bytes 5-9/*", Some((5, None))),
            ("bytes=5-9/10", None),
            ("bytes 9-5/10", None),
            ("bytes 5-10/10", None),
            ("bytes */10", None),
            ("lines 5-9/10", None),
            ("", None),
        ] {
            assert_eq!(parse_content_range(text), parsed, "{text}");
        }
    }
}
