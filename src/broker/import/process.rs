//! The importer and the credentials reader as child processes.
//!
//! ```text
//! broker ── Command, Report ──▶ importer            service identity, no capabilities, no_new_privs
//!    └── CredentialsRequest ──▶ credentials reader  the job's user
//!                                   ▲
//!                                   └── a channel ── Query, Answer ── importer
//! ```
//!
//! The broker has no end of that channel. Both are this executable under other names ([`super::roles`]).

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

use super::roles::{self, CredentialsRequest};
use super::{AcquireRequest, ImportError, ImportEvent, ImportSettings, one_line};
use crate::cli;
use crate::importer::protocol::{Command, Report};
use crate::registry::credentials::{Answer, Query};
use crate::registry::site::{self, SiteFile};
use crate::request::User;
use crate::sys::channel::{self, Channel};
use crate::sys::spawn::spawn;
use crate::sys::{self, memfile};

/// How long a process that has closed its channel may take to end.
const END_TIMEOUT: Duration = Duration::from_secs(1);
/// The account that is there when the configured one is not.
const FALLBACK: &str = "nobody";
/// How long directory services may take to find a user or a group.
const ACCOUNT_TIMEOUT: Duration = Duration::from_secs(20);
/// Diagnostics of one importer that reach the log.
const MAX_LINES: usize = 50;
const MAX_LINE: usize = 500;

/// How an importer is started. The tests have importers of their own.
pub trait StartImporter {
    /// Starts one. `events` is told of each process before it gets to work.
    fn start(
        &self,
        settings: &ImportSettings,
        request: AcquireRequest<'_>,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<Importer, ImportError>;
}

/// A running importer. Ended when dropped.
#[derive(Debug)]
pub struct Importer {
    /// The conversation.
    pub channel: Channel<Command, Report>,
    /// What goes with the first command: the channel on which to ask for the user's credentials, for `Command::Resolve`.
    pub descriptors: Vec<OwnedFd>,
    /// What each of them but the first is.
    pub site_files: Vec<SiteFile>,
    /// The importer itself, if it is a process.
    pub process: Option<Child>,
    /// The credentials reader, if there is one.
    pub reader: Option<Child>,
}

/// A child process. Killed with its process group and reaped when dropped.
#[derive(Debug)]
pub struct Child {
    pid: Pid,
    pidfd: OwnedFd,
    diagnostics: Option<Diagnostics>,
    reaped: bool,
}

/// What a process writes to its standard error, line by line. Hostile: an importer may be talked into anything.
#[derive(Debug)]
struct Diagnostics {
    pipe: File,
    partial: Vec<u8>,
    lines: usize,
}

/// Starts the real processes.
#[derive(Debug, Clone, Copy)]
pub struct Processes;

impl StartImporter for Processes {
    fn start(
        &self,
        settings: &ImportSettings,
        request: AcquireRequest<'_>,
        events: &mut dyn FnMut(ImportEvent),
    ) -> Result<Importer, ImportError> {
        let failed = |what: &'static str| move |error: io::Error| ImportError::start(what, &error);
        let (asker, answerer) = channel::pair::<Query, Answer>().map_err(failed("channel"))?;
        let (reader_channel, reader) = start_reader::<CredentialsRequest, ()>(settings, cli::CREDENTIALS)?;
        let (channel, process) = start_importer(settings, request.user.uid, events)?;

        // Both wait for their first message.
        for child in [&reader, &process] {
            events(child.event());
        }
        let environment = memfile::sealed("pyxis-environment", &request.environment.to_block())
            .map_err(failed("user's environment"))?;
        let registries = &settings.registries;
        let endpoints = registries.endpoints(request.reference);
        let message = CredentialsRequest {
            user: request.user.clone(),
            registries: endpoints.into_iter().map(|endpoint| endpoint.host).collect(),
            helpers: registries.site_helpers(request.reference),
        };
        reader_channel
            .send(&message, &[environment.as_fd(), answerer.as_fd()])
            .map_err(failed("credentials reader"))?;
        let mut descriptors = vec![asker.into()];
        let site_files = registries.site_files(request.reference);
        for file in &site_files {
            let opened = site::open(file);
            let opened = opened.map_err(|error| ImportError::start(&file.path.display().to_string(), &error))?;
            descriptors.push(opened.into());
        }
        Ok(Importer { channel, descriptors, site_files, process: Some(process), reader: Some(reader) })
    }
}

/// Starts the part of this executable called `role`, which is going to be the user, and its channel. It does nothing
/// before its first message.
pub(in crate::broker) fn start_reader<S, R>(
    settings: &ImportSettings,
    role: &'static str,
) -> Result<(Channel<S, R>, Child), ImportError> {
    let failed = |error: io::Error| ImportError::start(role, &error);
    let null = null().map_err(failed)?;
    let (channel, end) = channel::pair::<S, R>().map_err(failed)?;
    let pid = spawn(
        &settings.executable,
        &[role.as_bytes(), own_pid().as_bytes()],
        &[],
        &[(null.as_fd(), 0), (null.as_fd(), 1), (null.as_fd(), 2), (end.as_fd(), roles::CHANNEL)],
    )
    .map_err(failed)?;
    drop(end);
    Ok((channel, Child::adopt(pid, None).map_err(failed)?))
}

/// Starts an importer for an image of `user`'s. It does nothing before its first command.
pub(super) fn start_importer(
    settings: &ImportSettings,
    user: u32,
    events: &mut dyn FnMut(ImportEvent),
) -> Result<(Channel<Command, Report>, Child), ImportError> {
    let failed = |error: io::Error| ImportError::start("importer", &error);
    let service = service_identity(&settings.importer_user, user, events)?;
    let null = null().map_err(failed)?;
    let (channel, importer_end) = channel::pair().map_err(failed)?;
    let (diagnostics, diagnostics_write) = pipe().map_err(failed)?;
    let (parent, uid, gid) = (own_pid(), service.uid.to_string(), service.gid.to_string());
    // Blocks, directories and inodes come on top of the content.
    let limits = &settings.limits;
    let file_size = limits.max_layer_bytes.saturating_add(limits.max_layer_entries.saturating_mul(8192)).to_string();
    let pid = spawn(
        &settings.executable,
        &[cli::IMPORTER.as_bytes(), parent.as_bytes(), uid.as_bytes(), gid.as_bytes(), file_size.as_bytes()],
        &environment(&settings.importer_environment)
            .map_err(|error| ImportError::start("importer's environment", &error))?,
        &[(null.as_fd(), 0), (null.as_fd(), 1), (diagnostics_write.as_fd(), 2), (importer_end.as_fd(), roles::CHANNEL)],
    )
    .map_err(failed)?;
    drop((diagnostics_write, importer_end));
    Ok((channel, Child::adopt(pid, Some(diagnostics)).map_err(failed)?))
}

fn null() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?)
}

fn own_pid() -> String {
    rustix::process::getpid().as_raw_nonzero().to_string()
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?)
}

/// What the importer has of an environment: nothing of the job's, nothing of the broker's.
fn environment(configured: &[(String, String)]) -> io::Result<Vec<CString>> {
    let fixed = [("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"), ("LANG", "C.UTF-8")];
    let configured = configured.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    fixed.into_iter().chain(configured).map(|(name, value)| Ok(CString::new(format!("{name}={value}"))?)).collect()
}

/// The account that the importer runs under: never root, never the job's user, who could trace it.
pub(in crate::broker) fn service_identity(
    configured: &str,
    job_user: u32,
    events: &mut dyn FnMut(ImportEvent),
) -> Result<User, ImportError> {
    // Not by NSS: the account is local, and a root process has no business in LDAP libraries.
    let accounts = std::fs::read_to_string("/etc/passwd")
        .map_err(|error| ImportError::start("cannot read /etc/passwd", &error))?;
    let mut service = find_account(&accounts, configured);
    if service.is_none() {
        events(ImportEvent::Log(format!(
            "the account \"{configured}\" for imports does not exist, \"{FALLBACK}\" is used: create it with \
             useradd --system --no-create-home --shell /usr/sbin/nologin {configured}"
        )));
        service = find_account(&accounts, FALLBACK);
    }
    match service {
        Some(User { uid: 0, .. }) => Err(ImportError::Start(format!(
            "the account \"{configured}\" for imports is root: set import.user to an account of its own"
        ))),
        Some(user) if user.uid == job_user => Err(ImportError::Start(format!(
            "the account for imports (uid {job_user}) is the job's user: set import.user to an account of its own"
        ))),
        Some(user) => Ok(user),
        None => Err(ImportError::Start(format!(
            "neither the account \"{configured}\" nor \"{FALLBACK}\" exists in /etc/passwd: create the first, or set \
             import.user"
        ))),
    }
}

/// Whose number is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AccountKind {
    User,
    Group,
}

impl AccountKind {
    /// As it is called in messages, and among a role's arguments.
    pub fn name(self) -> &'static str {
        match self {
            Self::User => "user",
            Self::Group => "group",
        }
    }
}

/// The number of the user or group `name`. What the node's own files do not know is asked of its directory services, by a
/// process under the account for imports, which `job_user` cannot trace.
pub(super) fn account_number(
    settings: &ImportSettings,
    job_user: u32,
    kind: AccountKind,
    name: &str,
) -> Result<u32, String> {
    let file = match kind {
        AccountKind::User => "/etc/passwd",
        AccountKind::Group => "/etc/group",
    };
    let known = std::fs::read_to_string(file).ok().and_then(|text| number_of(&text, name));
    let failed = |error: &dyn std::fmt::Display| format!("cannot look up the {} {name}: {error}", kind.name());
    let answer = match known {
        Some(number) => return Ok(number),
        None => ask_for_account(settings, job_user, kind, name).map_err(|error| failed(&error))?,
    };
    match answer.strip_prefix('=') {
        Some("") => Err(format!("this node knows no {} {name}", kind.name())),
        Some(number) => number.parse().map_err(|_| failed(&"malformed answer")),
        None => Err(failed(&"no answer")),
    }
}

fn ask_for_account(
    settings: &ImportSettings,
    job_user: u32,
    kind: AccountKind,
    name: &str,
) -> Result<String, ImportError> {
    let failed = |error: io::Error| ImportError::start(cli::ACCOUNT, &error);
    let service = service_identity(&settings.importer_user, job_user, &mut |_| {})?;
    let (parent, uid, gid) = (own_pid(), service.uid.to_string(), service.gid.to_string());
    let null = null().map_err(failed)?;
    let (answer, answer_write) = pipe().map_err(failed)?;
    let arguments = [cli::ACCOUNT, &parent, &uid, &gid, kind.name(), name].map(str::as_bytes);
    let descriptors = [(null.as_fd(), 0), (answer_write.as_fd(), 1), (null.as_fd(), 2)];
    let pid = spawn(&settings.executable, &arguments, &[], &descriptors).map_err(failed)?;
    drop(answer_write);
    let _child = Child::adopt(pid, None).map_err(failed)?;
    let mut ready = [PollFd::new(&answer, PollFlags::IN)];
    let timeout = ACCOUNT_TIMEOUT.try_into().ok();
    match rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, timeout.as_ref())) {
        Ok(1..) => {}
        Ok(0) => return Err(failed(io::ErrorKind::TimedOut.into())),
        Err(errno) => return Err(failed(errno.into())),
    }
    // It writes the answer at once.
    let mut text = [0; 32];
    let length =
        rustix::io::retry_on_intr(|| rustix::io::read(&answer, &mut text)).map_err(|errno| failed(errno.into()))?;
    Ok(String::from_utf8_lossy(text.get(..length).unwrap_or_default()).into_owned())
}

/// The third field of the entry `name`, in the text of a passwd(5) or group(5) file.
fn number_of(text: &str, name: &str) -> Option<u32> {
    let mut entries = text.lines().map(|line| line.split(':'));
    entries.find_map(|mut fields| (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten())
}

/// An account by name or number, in the text of a passwd(5) file. A number needs no entry.
fn find_account(accounts: &str, wanted: &str) -> Option<User> {
    let number: Option<u32> = wanted.parse().ok();
    let user = |uid, gid| User { uid, gid, groups: vec![] };
    let mut entries = accounts.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        Some((name, user(uid, gid)))
    });
    let entry = entries.find(|(name, entry)| *name == wanted || number == Some(entry.uid));
    entry.map(|(_, entry)| entry).or(number.map(|number| user(number, number)))
}

impl Child {
    /// Takes charge of a child that has not been waited for.
    fn adopt(pid: Pid, diagnostics: Option<OwnedFd>) -> io::Result<Self> {
        let pidfd = rustix::process::pidfd_open(pid, PidfdFlags::empty())?;
        let diagnostics = diagnostics.map(|pipe| Diagnostics { pipe: pipe.into(), partial: Vec::new(), lines: 0 });
        Ok(Self { pid, pidfd, diagnostics, reaped: false })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Lets it outlive the broker.
    pub fn leave_running(mut self) {
        self.reaped = true;
    }

    /// Tells of it.
    pub(super) fn event(&self) -> ImportEvent {
        ImportEvent::Process { pid: self.id() }
    }

    /// The pipe with its diagnostics, while there may be more.
    pub(super) fn diagnostics(&self) -> Option<&File> {
        self.diagnostics.as_ref().map(|diagnostics| &diagnostics.pipe)
    }

    /// Reads the diagnostics that are there and returns the complete lines. Called when the pipe is ready.
    pub(super) fn read_diagnostics(&mut self) -> Vec<String> {
        let Some(diagnostics) = &mut self.diagnostics else { return vec![] };
        let (lines, ended) = diagnostics.read();
        if ended {
            self.diagnostics = None;
        }
        lines
    }

    /// How the process ended, which has closed its channel; it is killed if it does not end. `None` if it was killed
    /// here, or if nobody knows.
    pub(super) fn ended(&mut self) -> Option<WaitStatus> {
        let mut ready = [PollFd::new(&self.pidfd, PollFlags::IN)];
        let timeout = END_TIMEOUT.try_into().ok();
        let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, timeout.as_ref()));
        if !matches!(ended, Ok(1..)) {
            self.kill();
        }
        let status = self.reap();
        matches!(ended, Ok(1..)).then_some(status).flatten()
    }

    fn kill(&mut self) {
        if !self.reaped {
            // The group has what the reader started; it does not exist before the role has made it.
            let _ = rustix::process::kill_process_group(self.pid, Signal::KILL);
            let _ = rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    fn reap(&mut self) -> Option<WaitStatus> {
        if self.reaped {
            return None;
        }
        self.reaped = true;
        let waited = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(self.pid), WaitOptions::empty()));
        waited.ok().flatten().map(|(_, status)| status)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
        self.reap();
    }
}

impl Diagnostics {
    /// Complete lines, and whether there is nothing more to come.
    fn read(&mut self) -> (Vec<String>, bool) {
        let mut buffer = [0; 4096];
        let count = match self.pipe.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => return (vec![], false),
            Err(_) => 0,
        };
        let ended = count == 0;
        if ended {
            self.partial.push(b'\n');
        }
        self.partial.extend_from_slice(&buffer[..count]);
        let mut lines = Vec::new();
        while let Some(end) = self.partial.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let line = one_line(&String::from_utf8_lossy(&line), MAX_LINE);
            if !line.is_empty() && self.lines < MAX_LINES {
                self.lines += 1;
                lines.push(line);
            }
        }
        // A line without end: the rest of it will be a line of its own.
        if self.partial.len() > MAX_LINE {
            self.partial.push(b'\n');
        }
        (lines, ended)
    }
}

/// What a process that ended before its time is accused of.
pub(super) fn describe_end(status: Option<WaitStatus>) -> String {
    let Some(status) = status else { return "the importer closed its channel".into() };
    match (status.terminating_signal(), status.exit_status()) {
        (Some(9), _) => {
            "the importer was killed (signal 9): out of memory? See dmesg and the job's memory limit".into()
        }
        (Some(25), _) => {
            "the importer was ended for writing too large a file (signal 25): see import.max-layer-bytes".into()
        }
        (Some(signal), _) => format!("the importer crashed (signal {signal}): please report this"),
        (None, Some(code)) => format!("the importer ended unexpectedly (exit status {code}): see the node's log"),
        (None, None) => "the importer ended unexpectedly".into(),
    }
}

impl ImportError {
    pub(super) fn start(what: &str, error: &io::Error) -> Self {
        Self::Start(format!("{what}: {}", sys::reason(error)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACCOUNTS: &str = "root:x:0:0:root:/root:/bin/bash\nbroken\npyxis:x:998:997::/:/usr/sbin/nologin\n\
                            nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n";

    #[test]
    fn accounts_are_found_by_name_and_number() {
        let ids = |wanted| find_account(ACCOUNTS, wanted).map(|user| (user.uid, user.gid));
        assert_eq!(ids("pyxis"), Some((998, 997)));
        assert_eq!(ids("998"), Some((998, 997)));
        assert_eq!(ids("1234"), Some((1234, 1234)));
        assert_eq!(ids("nobody"), Some((65534, 65534)));
        assert_eq!(ids("broken"), None);
        assert_eq!(ids("pyx"), None);
    }

    #[test]
    fn numbers_stand_in_files() {
        assert_eq!(number_of(ACCOUNTS, "pyxis"), Some(998));
        assert_eq!(number_of("staff:x:50:a,b\nx:y\n", "staff"), Some(50));
        assert_eq!(number_of("staff:x:50:a,b\nx:y\n", "x"), None);
        assert_eq!(number_of(ACCOUNTS, "x"), None);
    }

    #[test]
    fn the_importer_is_neither_root_nor_the_user() {
        let mut events = Vec::new();
        let mut identity = |name: &str, job_user| service_identity(name, job_user, &mut |event| events.push(event));
        assert!(identity("root", 1000).unwrap_err().to_string().contains("is root"));
        assert!(identity("0", 1000).unwrap_err().to_string().contains("is root"));
        assert!(identity("nobody", 65534).unwrap_err().to_string().contains("is the job's user"));
        assert_eq!(identity("no such account", 1000).unwrap().uid, 65534);
        assert_eq!(events.len(), 1);
    }

    #[test]
    fn diagnostics_are_bounded_lines() {
        use std::io::Write;
        let (read, write) = pipe().unwrap();
        let mut write = File::from(write);
        let mut diagnostics = Diagnostics { pipe: read.into(), partial: Vec::new(), lines: 0 };
        write.write_all(b"one\n\x1b[31mtwo\nthr").unwrap();
        assert_eq!(diagnostics.read(), (vec!["one".into(), "[31mtwo".into()], false));
        write.write_all(b"ee\n").unwrap();
        assert_eq!(diagnostics.read(), (vec!["three".into()], false));
        write.write_all(&b"x".repeat(4000)).unwrap();
        assert_eq!(diagnostics.read(), (vec![], false));
        assert!(diagnostics.partial.len() <= 4001);
        write.write_all(b"rest").unwrap();
        drop(write);
        let (lines, _) = diagnostics.read();
        assert_eq!((lines.len(), lines[0].len()), (1, MAX_LINE));
        assert_eq!(diagnostics.read(), (vec!["rest".into()], true));
    }
}
