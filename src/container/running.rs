//! Which containers run on this node.
//!
//! ```text
//! RUNTIME/running/UID/        root's; the user may read it
//!   pyxis_NAME/               or pyxis_JOBID.STEPID
//!     PID-START-LIFE[.new]    one container init: see [`Instance`]; its content is the container's record
//! ```
//!
//! A process is recognised by its id and the time it was started at, which no other process of this boot has. An flock
//! held by container init would say less: init is a process of the user's, who could take the descriptor out of it and
//! keep it locked, until the process id belongs to somebody else.
//!
//! Container init cannot remove its registration, which is root's: brokers sweep now and then, `pyxis gc` does it always.

#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use super::FullName;
use super::record::{Record, read_bounded};
use crate::sys;

/// Suffix of an init that cannot be joined yet.
const NEW: &str = ".new";
/// One in so many brokers sweeps.
const SWEEPERS: i32 = 16;
/// `PF_EXITING` of <linux/sched.h>, in the flags of `/proc/PID/stat`: it has begun to end.
const EXITING: u64 = 0x4;

/// The running containers of one user.
#[derive(Debug)]
pub struct Running {
    directory: OwnedFd,
    proc: OwnedFd,
}

/// A container init that runs, or did a moment ago.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance {
    /// When the process was started: clock ticks since the boot.
    started: u64,
    /// Its process id.
    pid: i32,
    /// Number of its descriptor of the step's life pipe.
    life: RawFd,
    /// It can be joined.
    ready: bool,
}

impl Running {
    /// The running containers of `uid`; `None` if he never had any since the boot, or nobody may know.
    pub fn open(runtime: &Path, uid: u32) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let proc = rustix::fs::open("/proc", flags, Mode::empty())?;
        match rustix::fs::open(runtime.join("running").join(uid.to_string()), flags, Mode::empty()) {
            Ok(directory) => Ok(Some(Self { directory, proc })),
            Err(Errno::NOENT | Errno::ACCESS) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The same for root, who makes the directories.
    pub fn create(runtime: &Path, uid: u32) -> io::Result<Self> {
        if let Some(running) = Self::open(runtime, uid)? {
            return Ok(running);
        }
        let base = runtime.join("running");
        for (path, mode) in [(runtime, 0o755), (&base, 0o711)] {
            make_directory(CWD, path, mode)?;
        }
        make_directory(CWD, &base.join(uid.to_string()), 0o700)?;
        let running = Self::open(runtime, uid)?.ok_or(io::ErrorKind::NotFound)?;
        // Without it the user cannot list what runs, and everything else works.
        let _ = sys::file::let_read(running.directory.as_fd(), uid);
        Ok(running)
    }

    /// The users that have had containers since the boot.
    pub fn users(runtime: &Path) -> Vec<u32> {
        let entries = std::fs::read_dir(runtime.join("running")).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// Names under which something runs, sorted.
    pub fn names(&self) -> io::Result<Vec<FullName>> {
        let mut found = Vec::new();
        for name in names(&self.directory)? {
            if let Some(name) = FullName::parse(&name)
                && !self.instances(&name)?.is_empty()
            {
                found.push(name);
            }
        }
        found.sort();
        Ok(found)
    }

    /// What runs under `name`, the oldest first.
    pub fn instances(&self, name: &FullName) -> io::Result<Vec<Instance>> {
        let mut found = self.registered(name.as_str())?;
        found.retain(|instance| self.is_alive(instance));
        found.sort();
        Ok(found)
    }

    fn registered(&self, name: &str) -> io::Result<Vec<Instance>> {
        match open_directory(&self.directory, name) {
            Ok(directory) => Ok(names(&directory)?.iter().filter_map(|name| Instance::parse(name)).collect()),
            Err(Errno::NOENT) => Ok(Vec::new()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// What an instance was made from.
    pub fn record(&self, name: &FullName, instance: &Instance) -> io::Result<Record> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let directory = open_directory(&self.directory, name.as_str())?;
        read_bounded(rustix::fs::openat(directory, instance.to_string(), flags, Mode::empty())?)
    }

    /// Registers process `pid`, which holds the read end of its step's life pipe as descriptor `life`.
    pub fn register(&self, name: &FullName, pid: Pid, life: RawFd, record: &Record) -> io::Result<Instance> {
        let pid = pid.as_raw_nonzero().get();
        if pid % SWEEPERS == 0 {
            self.sweep();
        }
        let (started, _) = self.process(pid)?;
        let instance = Instance { started, pid, life, ready: false };
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        loop {
            make_directory(&self.directory, name.as_str(), 0o755)?;
            let file = open_directory(&self.directory, name.as_str()).and_then(|directory| {
                rustix::fs::openat(directory, instance.to_string(), flags, Mode::from_raw_mode(0o644))
            });
            match file {
                Ok(file) => {
                    io::Write::write_all(&mut std::fs::File::from(file), &record.to_bytes()?)?;
                    return Ok(instance);
                }
                // Somebody has swept the empty directory away.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// From now on others may join.
    pub fn set_ready(&self, name: &FullName, instance: &Instance) -> io::Result<Instance> {
        let ready = Instance { ready: true, ..*instance };
        let directory = open_directory(&self.directory, name.as_str())?;
        rustix::fs::renameat(&directory, instance.to_string(), &directory, ready.to_string())?;
        Ok(ready)
    }

    /// Removes the registrations of processes that have ended. Returns how many.
    pub fn sweep(&self) -> usize {
        let mut removed = 0;
        for name in names(&self.directory).unwrap_or_default() {
            let dead = self.registered(&name).unwrap_or_default().into_iter().filter(|one| !self.is_alive(one));
            for instance in dead {
                let path = format!("{name}/{instance}");
                removed += usize::from(rustix::fs::unlinkat(&self.directory, path, AtFlags::empty()).is_ok());
            }
            // Unless something is in it.
            let _ = rustix::fs::unlinkat(&self.directory, &name, AtFlags::REMOVEDIR);
        }
        removed
    }

    fn is_alive(&self, instance: &Instance) -> bool {
        self.process(instance.pid).is_ok_and(|(started, ending)| started == instance.started && !ending)
    }

    /// When process `pid` was started, and whether it has begun to end.
    fn process(&self, pid: i32) -> io::Result<(u64, bool)> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mut text = String::new();
        let file = rustix::fs::openat(&self.proc, format!("{pid}/stat"), flags, Mode::empty())?;
        std::fs::File::from(file).take(4096).read_to_string(&mut text)?;
        parse_stat(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat: not understood")))
    }

    /// A descriptor of the instance's process; `None` if it has ended.
    pub fn pidfd(&self, instance: &Instance) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(instance.pid) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(None),
            other => other?,
        };
        // Looked at afterwards: so it is the process that was registered, and not another one with its number.
        Ok(self.is_alive(instance).then_some(pidfd))
    }
}

impl Instance {
    /// Process id of container init.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether it can be joined.
    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Whether its step is over and it is about to end. For a process of its user's; what cannot be seen is `false`.
    pub fn is_ending(&self) -> bool {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(life) = rustix::fs::open(format!("/proc/{}/fd/{}", self.pid, self.life), flags, Mode::empty()) else {
            return false;
        };
        let mut watched = [PollFd::new(&life, PollFlags::empty())];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let _ = rustix::event::poll(&mut watched, Some(&now));
        watched[0].revents().contains(PollFlags::HUP)
    }

    fn parse(name: &str) -> Option<Self> {
        let (numbers, ready) = match name.strip_suffix(NEW) {
            Some(numbers) => (numbers, false),
            None => (name, true),
        };
        let mut numbers = numbers.split('-');
        let (pid, started, life) = (numbers.next()?, numbers.next()?, numbers.next()?);
        let instance = Self { started: started.parse().ok()?, pid: pid.parse().ok()?, life: life.parse().ok()?, ready };
        numbers.next().is_none().then_some(instance)
    }
}

/// Its file name.
impl std::fmt::Display for Instance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { started, pid, life, ready } = self;
        write!(f, "{pid}-{started}-{life}{}", if *ready { "" } else { NEW })
    }
}

/// From `/proc/PID/stat` (proc_pid_stat(5)): the start time, and whether the process has begun to end.
fn parse_stat(text: &str) -> Option<(u64, bool)> {
    // The second field is the program's name in parentheses, which may hold anything.
    let (_, rest) = text.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let (state, flags, started) = (fields.first()?, fields.get(6)?, fields.get(19)?);
    let ending = matches!(*state, "Z" | "X") || flags.parse::<u64>().ok()? & EXITING != 0;
    Some((started.parse().ok()?, ending))
}

fn make_directory(parent: impl AsFd, name: impl rustix::path::Arg + Copy, mode: u32) -> Result<(), Errno> {
    let mode = Mode::from_raw_mode(mode);
    match rustix::fs::mkdirat(&parent, name, mode) {
        Ok(()) => rustix::fs::chmodat(&parent, name, mode, AtFlags::empty()),
        Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn open_directory(parent: impl AsFd, name: &str) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    rustix::fs::openat(parent, name, flags, Mode::empty())
}

fn names(directory: &OwnedFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        if let Ok(name) = entry?.file_name().to_str()
            && !matches!(name, "." | "..")
        {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use proptest::prelude::*;

    use super::*;
    use crate::container::record::Lower;
    use crate::image::digest::Digest;
    use crate::policy::{Evidence, Source};

    fn record() -> Record {
        let lower = Lower::Layers { reference: None, manifest: Digest::from_bytes([1; 32]), layers: Vec::new() };
        let (source, evidence) = (Source::File, Evidence::default());
        Record { uid: 1000, created: 1, image: "x".into(), lower, source, evidence, config: b"{}".to_vec() }
    }

    fn sleeper() -> (Child, Pid) {
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let pid = Pid::from_raw(child.id().cast_signed()).unwrap();
        (child, pid)
    }

    #[test]
    fn a_process_is_registered_until_it_ends() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Running::open(directory.path(), 1000).unwrap().is_none());
        let running = Running::create(directory.path(), 1000).unwrap();
        let name = FullName::new("x", None).unwrap();
        assert_eq!(running.instances(&name).unwrap(), []);

        let (mut child, pid) = sleeper();
        let instance = running.register(&name, pid, 4, &record()).unwrap();
        assert!(!instance.is_ready());
        assert_eq!(running.instances(&name).unwrap(), [instance]);
        let instance = running.set_ready(&name, &instance).unwrap();
        assert_eq!(running.instances(&name).unwrap(), [instance]);
        assert_eq!(running.names().unwrap(), std::slice::from_ref(&name));
        assert_eq!(running.record(&name, &instance).unwrap(), record());
        assert!(running.pidfd(&instance).unwrap().is_some());

        child.kill().unwrap();
        // A zombie is no container.
        while running.pidfd(&instance).unwrap().is_some() {}
        assert_eq!(running.instances(&name).unwrap(), []);
        child.wait().unwrap();
        assert_eq!(running.instances(&name).unwrap(), []);
        assert_eq!((running.sweep(), running.sweep()), (1, 0));
        assert_eq!(std::fs::read_dir(directory.path().join("running/1000")).unwrap().count(), 0);
    }

    /// W16.
    #[test]
    fn another_process_with_the_same_id_is_another_one() {
        let directory = tempfile::tempdir().unwrap();
        let running = Running::create(directory.path(), 1000).unwrap();
        let name = FullName::new("x", None).unwrap();
        let (mut child, pid) = sleeper();
        let instance = running.register(&name, pid, 4, &record()).unwrap();
        let other = Instance { started: instance.started - 1, ..instance };
        assert!(running.pidfd(&other).unwrap().is_none());
        let path = directory.path().join("running/1000/pyxis_x");
        std::fs::rename(path.join(instance.to_string()), path.join(other.to_string())).unwrap();
        assert_eq!(running.instances(&name).unwrap(), []);
        assert_eq!(running.sweep(), 1);
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn the_program_s_name_may_be_anything() {
        let stat = |name: &str, state: &str, flags: u64| {
            format!("7 ({name}) {state} 1 7 7 0 -1 {flags} 1 2 3 4 5 6 7 8 20 0 1 0 4711 9 9\n")
        };
        assert_eq!(parse_stat(&stat("sh", "S", 0)), Some((4711, false)));
        assert_eq!(parse_stat(&stat("a) R 1 (\n) Z 1", "S", 0x400_000)), Some((4711, false)));
        assert_eq!(parse_stat(&stat("sh", "Z", 0)), Some((4711, true)));
        assert_eq!(parse_stat(&stat("sh", "R", 0x404)), Some((4711, true)));
        assert_eq!(parse_stat("7 (sh) S 1"), None);
        assert_eq!(parse_stat(""), None);
    }

    proptest! {
        #[test]
        fn names_are_read_as_they_are_written(
            started in any::<u64>(), pid in 1..i32::MAX, life in 0..i32::MAX, ready in any::<bool>(),
        ) {
            let instance = Instance { started, pid, life, ready };
            prop_assert_eq!(Instance::parse(&instance.to_string()), Some(instance));
        }

        #[test]
        fn any_name_is_judged(name in "[0-9.new-]{0,30}") {
            let _ = Instance::parse(&name);
        }
    }
}
