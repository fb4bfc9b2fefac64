//! Trying again: exponential backoff with jitter, and the server's own wish (`Retry-After`).

#![forbid(unsafe_code)]

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use super::TROUBLE;

const FIRST: Duration = Duration::from_millis(500);
const LONGEST: Duration = Duration::from_secs(15);
/// A server that wants us to wait longer than this gets no second try.
pub(super) const LONGEST_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Counts the tries of one thing.
#[derive(Debug)]
pub(super) struct Backoff {
    most: u32,
    failed: u32,
}

impl Backoff {
    /// At most `attempts` tries.
    pub fn new(attempts: u32) -> Self {
        Self { most: attempts, failed: 0 }
    }

    /// Waits before the next try, and says whether there is one: of at most `attempts` for this kind of failure, which
    /// `trouble` describes.
    pub fn wait(&mut self, attempts: u32, retry_after: Option<Duration>, trouble: impl FnOnce() -> String) -> bool {
        self.failed += 1;
        if self.failed >= self.most.min(attempts) || retry_after.is_some_and(|wish| wish > LONGEST_RETRY_AFTER) {
            return false;
        }
        let delay = self.delay(RandomState::new().hash_one(self.failed)).max(retry_after.unwrap_or_default());
        match delay.as_secs() {
            0 | 1 => tracing::info!(target: TROUBLE, "{}: trying again", trouble()),
            seconds => tracing::info!(target: TROUBLE, "{}: trying again in {seconds} s", trouble()),
        }
        std::thread::sleep(delay);
        true
    }

    /// Half of the delay is fixed, the other half random, so that a thousand nodes do not come back at once.
    fn delay(&self, random: u64) -> Duration {
        let full = FIRST.saturating_mul(1 << (self.failed - 1).min(16)).min(LONGEST);
        full / 2 + (full / 2).mul_f64(random as f64 / u64::MAX as f64)
    }

    /// Something arrived: the tries count from the beginning.
    pub fn reset(&mut self) {
        self.failed = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_grow_to_a_limit() {
        let delay = |failed, random| Backoff { most: 99, failed }.delay(random);
        assert_eq!(delay(1, 0), FIRST / 2);
        assert_eq!(delay(1, u64::MAX), FIRST);
        assert_eq!(delay(3, u64::MAX), FIRST * 4);
        assert_eq!(delay(u32::MAX, u64::MAX), LONGEST);
    }

    #[test]
    fn the_last_try_is_not_waited_for() {
        let wait = |backoff: &mut Backoff, attempts, wish| backoff.wait(attempts, wish, || panic!("none"));
        assert!(!wait(&mut Backoff::new(1), 5, None));
        assert!(!wait(&mut Backoff::new(5), 1, None));
        assert!(!wait(&mut Backoff::new(5), 5, Some(LONGEST_RETRY_AFTER + Duration::from_secs(1))));
        let mut backoff = Backoff { most: 3, failed: 2 };
        assert!(!wait(&mut backoff, 5, None));
        backoff.reset();
        assert_eq!(backoff.failed, 0);
    }
}
