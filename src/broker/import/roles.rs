//! The first steps of the importer and of the two processes that read for it as the user: all start as root, know nothing
//! yet, and give up what they may not have before they read a single byte.

use std::ffi::OsString;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{DumpableBehavior, Pid, Resource, Rlimit};
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use crate::agreement::guest::{self, ToGuest};
use crate::devices::host::Host;
use crate::devices::nvidia::inventory;
use crate::registry::credentials::remote::{Answerer, serve};
use crate::registry::credentials::{SiteHelpers, UserKeys};
use crate::request::{Environment, LocalImage, StepRequest, User};
use crate::source::importer::ImporterCall;
use crate::source::{self, ToReader};
use crate::squashfuse::{self, ToServer};
use crate::sys::channel::Channel;
use crate::sys::memfile;
use crate::sys::process::{become_user, block_all_signals, close_from, die_with_parent, take_inherited};
use crate::task::importer;

/// The descriptor of the channel to the broker. 0 to 2 are as usual, others are closed.
pub(super) const CHANNEL: RawFd = 3;
/// Most bytes of a job's environment.
const MAX_ENVIRONMENT: u64 = 16 << 20;

/// What the credentials reader is told, with two descriptors: the job's environment in a memory file, and the end of a
/// channel on which to answer the importer.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct CredentialsRequest {
    /// Whom to become.
    pub user: User,
    /// The image's registry and its mirrors, `HOST[:PORT]`.
    pub registries: Vec<String>,
    /// The site's helpers for them.
    pub helpers: SiteHelpers,
}

/// The importer: becomes the service account and serves the broker. Its arguments are the broker's process id, the uid
/// and the gid to take, and the most bytes of a file.
pub fn importer_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(parent), Some(uid), Some(gid), Some(file_size)) = (
        number(&mut arguments).and_then(Pid::from_raw),
        number(&mut arguments),
        number(&mut arguments),
        number(&mut arguments),
    ) else {
        return by_hand();
    };
    let prepared = || -> io::Result<OwnedFd> {
        let channel = take_descriptor()?;
        drop_bounding_set()?;
        limit(Resource::Fsize, file_size)?;
        become_somebody(&User { uid, gid, groups: vec![] }, parent)?;
        rustix::thread::set_no_new_privs(true)?;
        Ok(channel)
    };
    match prepared() {
        Ok(channel) => crate::importer::run(Channel::from(channel)),
        Err(error) => failed("importer", &error),
    }
}

/// Who asks NVML ([`inventory`](crate::devices::nvidia::inventory)): becomes the service account and writes the answer as JSON,
/// or why there is none, to its standard output. Its arguments are the broker's process id, the uid and the gid to take;
/// without any it stays who it is.
pub fn inventory_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let parent = number(&mut arguments).and_then(Pid::from_raw);
    let mut prepare = || -> io::Result<()> {
        if let Some(parent) = parent {
            let (Some(uid), Some(gid)) = (number(&mut arguments), number(&mut arguments)) else {
                return Err(io::ErrorKind::InvalidInput.into());
            };
            close_from(CHANNEL)?;
            drop_bounding_set()?;
            limit(Resource::Fsize, inventory::MAX_FILE)?;
            become_somebody(&User { uid, gid, groups: vec![] }, parent)?;
        }
        rustix::thread::set_no_new_privs(true)?;
        Ok(())
    };
    let taken = prepare().map_err(crate::sys::reason).and_then(|()| inventory::take(&Host::default()));
    let (text, status) = match taken {
        Ok(taken) => (serde_json::to_vec(&taken).unwrap_or_default(), ExitCode::SUCCESS),
        Err(reason) => (reason.into_bytes(), ExitCode::FAILURE),
    };
    match io::stdout().write_all(&text) {
        Ok(()) => status,
        Err(_) => ExitCode::FAILURE,
    }
}

/// The credentials reader: becomes the job's user, and looks for what the importer asks for ([`serve`]). Its argument is
/// the broker's process id.
pub fn credentials_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(parent) = number(&mut arguments).and_then(Pid::from_raw) else { return by_hand() };
    match read_credentials(parent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("credentials reader", &error),
    }
}

fn read_credentials(parent: Pid) -> io::Result<()> {
    let channel: Channel<(), CredentialsRequest> = take_descriptor()?.into();
    // Gone before it said anything: there is nobody to read for.
    let Some((request, mut descriptors)) = channel.receive()? else { return Ok(()) };
    become_somebody(&request.user, parent)?;
    // Nor can the user's other processes look on. What he has stored he can read anyway; the site's helper may know more.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let answerer = descriptors.pop().map(Answerer::from).ok_or(io::ErrorKind::InvalidData)?;
    let environment = job_environment(descriptors)?;
    let home = match environment.get_str("HOME") {
        Some(home) => PathBuf::from(home),
        None => home_directory(request.user.uid)?,
    };
    serve(&answerer, &UserKeys::new(environment, home, request.helpers), &request.registries)
}

/// Looks up a user or a group under the account for imports, and writes `=` and the number, or `=` alone if there is none.
/// Its arguments are the broker's process id, the uid and the gid to take, `user` or `group`, and the name.
pub fn account_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let (Some(parent), Some(uid), Some(gid), Some(kind), Some(name)) = (
        number(&mut arguments).and_then(Pid::from_raw),
        number(&mut arguments),
        number(&mut arguments),
        number::<String>(&mut arguments),
        number::<String>(&mut arguments),
    ) else {
        return by_hand();
    };
    let look_up = || -> io::Result<()> {
        close_from(CHANNEL)?;
        become_somebody(&User { uid, gid, groups: vec![] }, parent)?;
        let found = match kind.as_str() {
            "user" => nix::unistd::User::from_name(&name)?.map(|user| user.uid.as_raw()),
            _ => nix::unistd::Group::from_name(&name)?.map(|group| group.gid.as_raw()),
        };
        let answer = format!("={}", found.map(|number| number.to_string()).unwrap_or_default());
        io::stdout().write_all(answer.as_bytes())
    };
    match look_up() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("account look-up", &error),
    }
}

/// The source reader: becomes the job's user and opens an image of his ([`source`]). Its argument is the broker's process
/// id.
pub fn source_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(parent) = number(&mut arguments).and_then(Pid::from_raw) else { return by_hand() };
    match read_source(parent) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("source reader", &error),
    }
}

fn read_source(parent: Pid) -> io::Result<()> {
    let channel: source::reader::BrokerChannel = take_descriptor()?.into();
    let Some((message, descriptors)) = channel.receive()? else { return Ok(()) };
    match message {
        ToReader::Open { user, image, cwd } => {
            become_somebody(&user, parent)?;
            if matches!(image, LocalImage::Engine { .. }) {
                outlive_parent()?;
            }
            source::reader::run(&channel, &image, &cwd, &job_environment(descriptors)?)
        }
        ToReader::Import { call, uri } => {
            become_somebody(&call.user, parent)?;
            outlive_parent()?;
            source::importer::get(&channel, &call, &uri, &job_environment(descriptors)?)
        }
        ToReader::Save => Ok(()),
    }
}

/// For a role that sees the end of its channel, and has to tidy up then.
fn outlive_parent() -> io::Result<()> {
    Ok(rustix::process::set_parent_process_death_signal(None)?)
}

/// Who asks, at `srun`'s machine, what the image's tag means ([`guest`]): becomes the job's user. Its argument is the broker's
/// process id.
pub fn guest_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(parent) = number(&mut arguments).and_then(Pid::from_raw) else { return by_hand() };
    let ask = || -> io::Result<()> {
        let channel: guest::BrokerChannel = take_descriptor()?.into();
        let Some((ToGuest::Join { user, address, place }, _)) = channel.receive()? else { return Ok(()) };
        become_somebody(&user, parent)?;
        rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
        guest::run(&channel, address, &place)
    };
    match ask() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("guest", &error),
    }
}

fn job_environment(mut descriptors: Vec<OwnedFd>) -> io::Result<Environment> {
    match descriptors.pop() {
        Some(file) => Ok(Environment::from_block(&memfile::read_all(file, MAX_ENVIRONMENT)?)),
        None => Ok(Environment::default()),
    }
}

/// Becomes the job's user and has the site's importer release what it has for the step: now, or after the step. Its
/// arguments are the process id of who started it, and [`AFTER`](crate::task::importer::AFTER) in the second case.
pub fn release_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(parent) = number(&mut arguments).and_then(Pid::from_raw) else { return by_hand() };
    let after = arguments.next().is_some_and(|argument| argument == importer::AFTER);
    let released = || -> io::Result<bool> {
        close_from(if after { importer::LIFE + 1 } else { importer::LIFE })?;
        let environment = inherited(importer::ENVIRONMENT)?;
        let life = if after { Some(inherited(importer::LIFE)?) } else { None };
        let request = memfile::read_all(io::stdin().as_fd().try_clone_to_owned()?, MAX_ENVIRONMENT)?;
        let request: StepRequest = serde_json::from_slice(&request)?;
        let Some(call) = ImporterCall::new(&request) else { return Ok(true) };
        become_somebody(&call.user, parent)?;
        if let Some(life) = life {
            rustix::process::set_parent_process_death_signal(None)?;
            if ended_in_order(&life)? {
                return Ok(true);
            }
        }
        source::importer::release(&call, &job_environment(vec![environment])?)
    };
    match released() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => failed("importer release", &error),
    }
}

/// Waits for the end of a step; whether its manager has ended it and was not killed ([`crate::task::LifePipe::end`]).
fn ended_in_order(life: &OwnedFd) -> io::Result<bool> {
    let mut watched = [PollFd::new(life, PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None))?;
    Ok(watched[0].revents().contains(PollFlags::IN))
}

/// The FUSE server: becomes the job's user and serves a squashfs file of his ([`squashfuse`]). Its argument is the broker's
/// process id.
pub fn squashfuse_role(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(parent) = number(&mut arguments).and_then(Pid::from_raw) else { return by_hand() };
    let serve = || -> io::Result<()> {
        let channel: squashfuse::BrokerChannel = take_descriptor()?.into();
        let Some((ToServer::Open { user }, descriptors)) = channel.receive()? else { return Ok(()) };
        become_somebody(&user, parent)?;
        // The step's signals are for its tasks, which read while they end.
        block_all_signals();
        squashfuse::run(channel, descriptors, 0)
    };
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("FUSE server", &error),
    }
}

fn home_directory(uid: u32) -> io::Result<PathBuf> {
    let account = nix::unistd::User::from_uid(uid.into())?;
    Ok(account.map_or_else(|| "/".into(), |account| account.dir))
}

/// Becomes `user` for good and ends with the broker. Secrets pass through: no core dumps.
fn become_somebody(user: &User, parent: Pid) -> io::Result<()> {
    limit(Resource::Core, 0)?;
    // Slurm's daemons may be spared; what runs as the user is not. Some kernels are built without.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    rustix::process::chdir("/")?;
    // A group of its own, so that the broker can end it with all that it started.
    rustix::process::setsid()?;
    become_user(user)?;
    if user.uid != 0 && !rustix::thread::capabilities(None)?.permitted.is_empty() {
        return Err(io::Error::other("privileges were not dropped"));
    }
    // Last: a change of identity forgets it.
    die_with_parent(parent)
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    Ok(rustix::process::setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) })?)
}

/// No program that is started later can get a capability from its file.
fn drop_bounding_set() -> io::Result<()> {
    for capability in CapabilitySet::all().iter() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// The one descriptor that the process starts with, besides the usual three.
fn take_descriptor() -> io::Result<OwnedFd> {
    close_from(CHANNEL + 1)?;
    inherited(CHANNEL)
}

fn inherited(descriptor: RawFd) -> io::Result<OwnedFd> {
    take_inherited(descriptor).ok_or_else(|| io::Error::from(io::ErrorKind::BrokenPipe))
}

/// The next argument.
fn number<T: FromStr>(arguments: &mut impl Iterator<Item = OsString>) -> Option<T> {
    arguments.next()?.to_str()?.parse().ok()
}

fn by_hand() -> ExitCode {
    eprintln!("pyxis: this part of pyxis is started by its broker, not by hand");
    ExitCode::from(2)
}

fn failed(role: &str, error: &io::Error) -> ExitCode {
    eprintln!("pyxis: {role}: {}", crate::sys::reason(error));
    ExitCode::FAILURE
}
