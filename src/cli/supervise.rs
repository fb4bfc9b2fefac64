//! A command in a child process of ours, for as long as it runs: signals go through, and we end as it did.

use std::convert::Infallible;
use std::fmt::Display;
use std::io;

use rustix::process::{Pid, Signal, WaitOptions, WaitStatus};

use crate::sys::process::{Forked, block_signals_to_forward, exit_now, fork, restore_signals, wait_for_signal};

/// Runs `program`, which becomes another one, in a child. If it returns, `report` is told why.
///
/// The process has one thread.
pub fn in_child<E: Display>(program: impl FnOnce() -> Result<Infallible, E>, report: impl FnOnce(E)) -> io::Result<u8> {
    let inherited = block_signals_to_forward();
    // SAFETY: nothing has started a thread, as the caller promises.
    match unsafe { fork(0) }? {
        Forked::Child => {
            restore_signals(&inherited);
            match program() {
                Ok(never) => match never {},
                Err(error) => report(error),
            }
            exit_now(1)
        }
        Forked::Parent(child) => Ok(supervise(child)),
    }
}

/// Waits for the child, passing on signals, and ends as it did (128 + N for signal N, as shells have it).
fn supervise(child: Pid) -> u8 {
    loop {
        match wait_for_signal() {
            Ok(Signal::CHILD) => {}
            Ok(signal) => {
                let _ = rustix::process::kill_process(child, signal);
                continue;
            }
            Err(_) => continue,
        }
        // Others too: the first process of a PID namespace inherits them.
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) if pid == child => return exit_code(status),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(_) => return 1,
            }
        }
    }
}

fn exit_code(status: WaitStatus) -> u8 {
    let code = status.exit_status().or_else(|| status.terminating_signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}
