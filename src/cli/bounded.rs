//! Work that may hang where nothing can interrupt it, as what touches a file system whose server is gone: it is done in a
//! process of its own, which is left behind if it takes too long.

use std::io::{self, Read, Write};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::sys::process::{Forked, exit_now, fork};

/// Most bytes of a result.
const MAX_RESULT: u64 = 1 << 20;

/// What `work` returns, or `None` if it is not done after `limit`. Single-threaded callers only.
pub fn run<T: Serialize + DeserializeOwned>(limit: Duration, work: impl FnOnce() -> T) -> io::Result<Option<T>> {
    let deadline = Instant::now() + limit;
    let (mut result, mut report) = io::pipe()?;
    // SAFETY: the caller has one thread.
    match unsafe { fork(0) }? {
        Forked::Child => {
            drop(result);
            // A group of its own, which ends as a whole.
            let _ = rustix::process::setpgid(None, None);
            let told = serde_json::to_vec(&work()).map_err(io::Error::from).and_then(|text| report.write_all(&text));
            exit_now(i32::from(told.is_err()))
        }
        Forked::Parent(child) => {
            drop(report);
            // Both do it, for whoever comes first.
            let _ = rustix::process::setpgid(Some(child), Some(child));
            let mut bytes = Vec::new();
            loop {
                let left = deadline.saturating_duration_since(Instant::now());
                let wait = Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
                let mut watched = [PollFd::new(&result, PollFlags::IN)];
                if rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, Some(&wait)))? == 0 {
                    let _ = rustix::process::kill_process_group(child, Signal::KILL);
                    wait_a_moment(child);
                    return Ok(None);
                }
                let mut buffer = [0; 4096];
                match result.read(&mut buffer)? {
                    0 => break,
                    length => bytes.extend(buffer.iter().take(length)),
                }
                if bytes.len() as u64 > MAX_RESULT {
                    break;
                }
            }
            let _ = rustix::process::kill_process_group(child, Signal::KILL);
            let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), WaitOptions::empty()));
            Ok(Some(serde_json::from_slice(&bytes)?))
        }
    }
}

/// Waits for a process that was killed, and may be where even that does not reach it.
fn wait_a_moment(child: Pid) {
    let moment = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
    let ended = rustix::process::pidfd_open(child, PidfdFlags::empty())
        .and_then(|process| rustix::event::poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&moment)));
    if ended.is_ok_and(|count| count > 0) {
        let _ = rustix::process::waitpid(Some(child), WaitOptions::empty());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hangs_is_left_behind() {
        let long = Duration::from_secs(60);
        assert_eq!(run(long, || "x".repeat(100_000)).unwrap().unwrap().len(), 100_000);
        assert_eq!(
            run(Duration::from_millis(50), || loop {
                std::thread::sleep(long)
            })
            .unwrap(),
            None::<u8>
        );
        assert!(run::<u8>(long, || exit_now(0)).is_err());
    }
}
