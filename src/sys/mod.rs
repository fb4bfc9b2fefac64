//! The system calls no crate has, and per-kernel differences, each in one function.

pub mod channel;
pub mod command;
pub mod counters;
pub mod exec;
pub mod file;
pub mod journal;
pub mod loopdev;
pub mod memfile;
pub mod mount;
pub mod network;
pub mod nvml;
pub mod probe;
pub mod process;
pub mod seccomp;
pub mod spawn;
pub mod terminal;
pub mod time;

/// The kernel's text for an error (an `io::Error` or an `Errno`), as strerror(3) has it: without the "(os error N)" that
/// Rust appends.
pub fn reason(error: impl std::fmt::Display) -> String {
    let text = error.to_string();
    match text.find(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}
