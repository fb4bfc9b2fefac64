//! Processes and their identities: fork(2), becoming a user for good, capabilities.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::process::{DumpableBehavior, Pid, Signal, WaitStatus};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::request::User;

/// Which side of a [`fork`] this is.
#[derive(Debug)]
pub enum Forked {
    /// The new process.
    Child,
    /// The caller.
    Parent(Pid),
}

/// fork(2), or clone(2) into new namespaces (`CLONE_NEW*`) with the same result.
///
/// # Safety
///
/// The process must have one thread: locks that another thread holds would stay locked in the child for ever.
pub unsafe fn fork(namespaces: i32) -> io::Result<Forked> {
    // SAFETY: without CLONE_VM and with a null stack, clone(2) is fork(2); the caller promises a single thread.
    let result = unsafe { libc::syscall(libc::SYS_clone, namespaces | libc::SIGCHLD, 0, 0, 0, 0) };
    match result {
        ..0 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent(
            i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(|| io::Error::other("pid out of range"))?,
        )),
    }
}

/// Ends the process without running destructors or exit handlers that belong to the parent.
pub fn exit_now(status: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Becomes `user` for good: real, effective and saved ids and the group list; capabilities go with uid 0.
///
/// Single-threaded callers only: the ids of other threads would stay.
pub fn become_user(user: &User) -> io::Result<()> {
    let id = |id| rustix::thread::Gid::from_raw(id);
    let groups: Vec<_> = user.groups.iter().copied().map(id).collect();
    rustix::thread::set_thread_groups(&groups)?;
    rustix::thread::set_thread_res_gid(id(user.gid), id(user.gid), id(user.gid))?;
    let uid = rustix::thread::Uid::from_raw(user.uid);
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}

/// Like [`become_user`], but keeps `kept` as permitted and effective capabilities until the next execve(2).
pub fn become_user_keeping(user: &User, kept: CapabilitySet) -> io::Result<()> {
    rustix::thread::set_keep_capabilities(true)?;
    become_user(user)?;
    rustix::thread::set_keep_capabilities(false)?;
    set_capabilities(kept)
}

/// Runs `f`, in which files are looked up, made and charged as if `user` did it (setfsuid(2)): without root's right to
/// override permissions, and with his primary group only.
pub fn with_file_system_identity<T>(user: &User, f: impl FnOnce() -> T) -> T {
    /// Root's again, also after a panic. Changing the identity makes the process undumpable, and its children's files in
    /// /proc out of reach.
    struct Restore(Option<DumpableBehavior>);
    impl Drop for Restore {
        fn drop(&mut self) {
            // SAFETY: these calls take a number and change nothing but this thread's credentials.
            unsafe {
                libc::setfsuid(libc::geteuid());
                libc::setfsgid(libc::getegid());
            }
            if let Some(before) = self.0 {
                let _ = rustix::process::set_dumpable_behavior(before);
            }
        }
    }
    let _restore = Restore(rustix::process::dumpable_behavior().ok());
    // SAFETY: as above.
    unsafe {
        libc::setfsgid(user.gid);
        libc::setfsuid(user.uid);
    }
    f()
}

/// Runs `f` in a child that is `user` for good and dies with the caller, and waits for it. Whether `f` says that it worked.
///
/// # Safety
///
/// As for [`fork`].
pub unsafe fn run_as(user: &User, f: impl FnOnce() -> bool) -> io::Result<bool> {
    let parent = rustix::process::getpid();
    // SAFETY: the caller's promise.
    match unsafe { fork(0) }? {
        Forked::Child => {
            // Changing the identity clears the signal.
            let worked = become_user(user).and_then(|()| die_with_parent(parent)).is_ok() && f();
            exit_now(i32::from(!worked))
        }
        Forked::Parent(child) => {
            let options = rustix::process::WaitOptions::empty();
            let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(child), options))?;
            Ok(status.and_then(|(_, status)| status.exit_status()) == Some(0))
        }
    }
}

/// Sets permitted and effective capabilities to `kept`, inheritable to none.
pub fn set_capabilities(kept: CapabilitySet) -> io::Result<()> {
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

/// Dies by SIGKILL when the process that forked this one ends. Returns an error if it has ended already.
pub fn die_with_parent(parent: Pid) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    if rustix::process::getppid() == Some(parent) {
        Ok(())
    } else {
        Err(io::Error::new(io::ErrorKind::BrokenPipe, "the parent process has ended"))
    }
}

/// Takes the descriptor `number`, which was there when this process began; `None` if it was not.
///
/// For the first thing a role does, once for each number: nothing else in the process may own it.
pub fn take_inherited(number: RawFd) -> Option<OwnedFd> {
    // SAFETY: fcntl takes numbers only; the descriptor, if it is open, was put there for this process before it began,
    // and roles call this first thing, when nothing owns a descriptor yet.
    unsafe { (libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) == 0).then(|| OwnedFd::from_raw_fd(number)) }
}

/// Closes every descriptor from `first` on.
pub fn close_from(first: RawFd) -> io::Result<()> {
    // SAFETY: close_range(2) takes numbers only. Callers own no Rust descriptor in the range (it is called first thing in
    // a fresh process, or names the descriptors it keeps below `first`).
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, 0) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Closes every descriptor but `kept`. For a process that shall not have what its parent had.
pub fn close_all_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<u32> = kept.iter().map(|fd| fd.as_raw_fd().unsigned_abs()).collect();
    kept.sort_unstable();
    let mut first = 0;
    for number in kept.into_iter().chain([u32::MAX]) {
        if first < number {
            let last = if number == u32::MAX { number } else { number - 1 };
            // SAFETY: close_range(2) takes numbers only. The caller's own values of the range are never used again: what
            // they belong to stays in the parent.
            if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = number.saturating_add(1);
    }
    Ok(())
}

/// Gives every signal its default action and unblocks it, as a program expects that starts anew.
pub fn default_signals() {
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: SIG_DFL is no function of ours. KILL, STOP and the two numbers that the C library keeps for itself are
        // refused, which changes nothing.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    // SAFETY: the set is initialised by sigemptyset before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigprocmask(libc::SIG_SETMASK, &set, std::ptr::null_mut());
    }
}

/// The children of the calling, single-threaded process, ended ones included.
pub fn children() -> io::Result<Vec<Pid>> {
    let own = rustix::process::getpid();
    match std::fs::read_to_string(format!("/proc/self/task/{}/children", own.as_raw_nonzero())) {
        Ok(list) => Ok(list.split_whitespace().filter_map(|pid| Pid::from_raw(pid.parse().ok()?)).collect()),
        // A kernel without CONFIG_PROC_CHILDREN.
        Err(_) => children_among_all(own),
    }
}

/// The same by looking at everybody.
fn children_among_all(parent: Pid) -> io::Result<Vec<Pid>> {
    let parent_of = |pid: Pid| {
        let status = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).ok()?;
        // PID (NAME) STATE PARENT …
        status.rsplit_once(") ")?.1.split(' ').nth(1)?.parse().ok()
    };
    let names = std::fs::read_dir("/proc")?.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let pids = names.filter_map(|name| Pid::from_raw(name.parse().ok()?));
    Ok(pids.filter(|&pid| parent_of(pid) == Some(parent.as_raw_nonzero().get())).collect())
}

/// Blocks every signal that can be blocked.
pub fn block_all_signals() {
    // SAFETY: the set is initialised by sigfillset before it is used.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&mut set);
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
    }
}

/// The signal mask of a process, as it was.
#[derive(Debug)]
pub struct SignalMask(libc::sigset_t);

/// Blocks every signal, for [`wait_for_signal`], and returns the mask that a child restores.
pub fn block_signals_to_forward() -> SignalMask {
    // SAFETY: sigprocmask fills in the old mask, and sigfillset the new one, before they are read.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::sigprocmask(libc::SIG_BLOCK, &all, &mut before);
        SignalMask(before)
    }
}

/// Sets the mask.
pub fn restore_signals(mask: &SignalMask) {
    // SAFETY: the mask was filled in by the kernel.
    unsafe { libc::sigprocmask(libc::SIG_SETMASK, &mask.0, std::ptr::null_mut()) };
}

/// Waits for one of the blocked signals.
pub fn wait_for_signal() -> io::Result<Signal> {
    // SAFETY: the set is initialised by sigfillset before it is used; no pointer is kept.
    let signal = unsafe {
        let mut all = std::mem::zeroed();
        libc::sigfillset(&mut all);
        libc::sigwaitinfo(&all, std::ptr::null_mut())
    };
    Signal::from_named_raw(signal).ok_or_else(io::Error::last_os_error)
}

/// Replaces the program of this process. Returns only if that fails.
pub fn exec(executable: &Path, arguments: &[&[u8]], environment: &[CString]) -> io::Error {
    let text = |bytes: &[u8]| CString::new(bytes).map_err(io::Error::other);
    let run = || -> io::Result<Infallible> {
        let path = text(executable.as_os_str().as_bytes())?;
        let arguments = arguments.iter().map(|argument| text(argument)).collect::<io::Result<Vec<_>>>()?;
        Ok(nix::unistd::execve(&path, &arguments, environment)?)
    };
    match run() {
        Ok(never) => match never {},
        Err(error) => io::Error::new(error.kind(), format!("{}: {}", executable.display(), super::reason(error))),
    }
}

/// Lets the capabilities of `kept` that this process has survive execve(2), which otherwise takes them from everybody but
/// root: a process that has entered a user namespace of its user's cannot get them again there.
pub fn keep_capabilities_across_exec(kept: CapabilitySet) -> io::Result<()> {
    let sets = rustix::thread::capabilities(None)?;
    let kept = kept & sets.permitted;
    rustix::thread::set_capabilities(None, CapabilitySets { inheritable: kept, ..sets })?;
    for capability in kept.iter() {
        rustix::thread::configure_capability_in_ambient_set(capability, true)?;
    }
    Ok(())
}

/// Ends this process as another one has ended: with its exit status, or by its signal, but without leaving another core
/// file.
pub fn end_like(status: WaitStatus) -> ! {
    if let Some(number) = status.terminating_signal()
        && let Some(signal) = Signal::from_named_raw(number)
    {
        let none = rustix::process::Rlimit { current: Some(0), maximum: Some(0) };
        let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
        // SAFETY: the default action needs no handler, and the set is initialised before it is used.
        unsafe {
            libc::signal(number, libc::SIG_DFL);
            let mut none = std::mem::zeroed();
            libc::sigemptyset(&mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &none, std::ptr::null_mut());
        }
        let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        exit_now(128 + number);
    }
    exit_now(status.exit_status().unwrap_or(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn children_are_found() {
        // Of a thread that has none: the tests run in many.
        assert_eq!(children().unwrap(), []);
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        assert!(children_among_all(rustix::process::getpid()).unwrap().contains(&pid));
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
