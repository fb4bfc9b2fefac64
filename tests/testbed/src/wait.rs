//! Waiting for conditions, never for time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Longest wait for anything on an idle machine to happen; generous, because the machine may be a busy one.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// Pause between two looks at a condition.
const INTERVAL: Duration = Duration::from_millis(10);

/// Waits until `condition` gives something. The error names `what` did not come.
pub fn until<T>(what: &str, deadline: Duration, mut condition: impl FnMut() -> Option<T>) -> Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return Ok(value);
        }
        if start.elapsed() > deadline {
            bail!("waited {} s in vain for {what}", deadline.as_secs());
        }
        std::thread::sleep(INTERVAL);
    }
}
