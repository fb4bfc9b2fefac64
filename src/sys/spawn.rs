//! Starting the internal roles as processes of their own.
//!
//! By posix_spawn(3): callers may have much memory (slurmstepd), which glibc does not copy, and no code runs between fork
//! and exec. A role gives up what it may not have as its first act; it is this same, trusted executable until then.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::spawn::{PosixSpawnAttr, PosixSpawnFileActions, PosixSpawnFlags};
use nix::sys::signal::{SigSet, Signal};
use rustix::process::Pid;

/// Starts `executable` with `arguments` (from `argv[0]` on) and exactly this `environment`. Each descriptor of
/// `descriptors` gets the number beside it; others are inherited unless they are close-on-exec. Signal mask and
/// dispositions are the default ones.
pub fn spawn(
    executable: &Path,
    arguments: &[&[u8]],
    environment: &[CString],
    descriptors: &[(BorrowedFd<'_>, RawFd)],
) -> io::Result<Pid> {
    // Sources above the targets: a dup2 to 3 must not destroy the source of a later one.
    let end = descriptors.iter().map(|(_, target)| target + 1).max().unwrap_or(0);
    let mut actions = PosixSpawnFileActions::init()?;
    let mut raised = Vec::new();
    for (source, target) in descriptors {
        let source = rustix::io::fcntl_dupfd_cloexec(source, end)?;
        actions.add_dup2(source.as_raw_fd(), *target)?;
        raised.push(source);
    }
    let mut attributes = PosixSpawnAttr::init()?;
    let mut defaults = SigSet::all();
    // posix_spawn refuses to reset these two: they cannot be changed anyway.
    defaults.remove(Signal::SIGKILL);
    defaults.remove(Signal::SIGSTOP);
    attributes.set_sigdefault(&defaults)?;
    attributes.set_sigmask(&SigSet::empty())?;
    attributes.set_flags(PosixSpawnFlags::POSIX_SPAWN_SETSIGDEF | PosixSpawnFlags::POSIX_SPAWN_SETSIGMASK)?;

    let text = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::other);
    let path = text(executable.as_os_str().as_bytes())?;
    let arguments = arguments.iter().map(|argument| text(argument)).collect::<io::Result<Vec<_>>>()?;
    let process = nix::spawn::posix_spawn(path.as_c_str(), &actions, &attributes, &arguments, environment)
        .map_err(|error| io::Error::new(io::Error::from(error).kind(), format!("{}: {error}", executable.display())))?;
    Pid::from_raw(process.as_raw()).ok_or_else(|| io::Error::other("pid out of range"))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;
    use std::os::fd::AsFd;

    use rustix::pipe::{PipeFlags, pipe_with};
    use rustix::process::WaitOptions;

    use super::*;

    #[test]
    fn a_process_gets_what_it_is_given_and_nothing_else() {
        let (read_a, write_a) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (read_b, write_b) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let script = "echo \"$0 $1\" >&3; env >&4";
        let pid = spawn(
            Path::new("/bin/sh"),
            &[b"name", b"-c", script.as_bytes(), b"zero", b"one"],
            &[c"A=b".to_owned()],
            // Crosswise to the numbers that they are likely to have.
            &[(write_b.as_fd(), 4), (write_a.as_fd(), 3)],
        )
        .unwrap();
        drop((write_a, write_b));
        let mut text = String::new();
        File::from(read_a).read_to_string(&mut text).unwrap();
        assert_eq!(text, "zero one\n");
        text.clear();
        File::from(read_b).read_to_string(&mut text).unwrap();
        // The shell adds PWD.
        assert_eq!(text.lines().filter(|line| !line.starts_with("PWD=")).collect::<Vec<_>>(), ["A=b"]);
        let (_, status) = rustix::process::waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap();
        assert_eq!(status.exit_status(), Some(0));
        assert!(spawn(Path::new("/nonexistent"), &[b"x"], &[], &[]).unwrap_err().to_string().contains("/nonexistent"));
    }
}
