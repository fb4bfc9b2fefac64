//! An inventory of the node's GPUs, when a container cannot do without ([`inventory`]): taken by a process of the service
//! account, kept for the containers that follow. The broker reads nothing of it.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Instant;

use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::process::{PidfdFlags, Signal, WaitOptions};
use rustix::thread::LinkNameSpaceType;

use super::import::service_identity;
use super::named::Patience;
use super::{BrokerError, failed};
use crate::cli;
use crate::config::Config;
use crate::devices::nvidia::inventory;
use crate::sys::spawn::spawn;
use crate::sys::{self, memfile};

/// Takes an inventory in the mount namespace `host`, where the broker then stays, and puts it where containers find it. Gives
/// the reason why there is none, one line; fails if the step is over.
pub(super) fn take(
    patience: Patience<'_>,
    host: BorrowedFd<'_>,
    config: &Config,
    job_user: u32,
) -> Result<Option<String>, BrokerError> {
    rustix::thread::move_into_link_name_space(host, Some(LinkNameSpaceType::Mount))
        .map_err(failed("the host's mount namespace"))?;
    match run(&patience, config, job_user)? {
        Ok(answer) => Ok(keep(&config.runtime.path, &answer).err()),
        Err(reason) => Ok(Some(reason)),
    }
}

/// The process's answer, or why it has none.
fn run(patience: &Patience<'_>, config: &Config, job_user: u32) -> Result<Result<Vec<u8>, String>, BrokerError> {
    let settings = config.import_settings();
    let account = match service_identity(&settings.importer_user, job_user, &mut |_| {}) {
        Ok(account) => account,
        Err(error) => return Ok(Err(error.to_string())),
    };
    let started = || -> std::io::Result<_> {
        let output = File::from(rustix::fs::memfd_create("pyxis-inventory", MemfdFlags::CLOEXEC)?);
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        let own = rustix::process::getpid().as_raw_nonzero().to_string();
        let (uid, gid) = (account.uid.to_string(), account.gid.to_string());
        let process = spawn(
            &settings.executable,
            &[cli::INVENTORY.as_bytes(), own.as_bytes(), uid.as_bytes(), gid.as_bytes()],
            &[c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), c"LANG=C.UTF-8".to_owned()],
            &[(null.as_fd(), 0), (output.as_fd(), 1), (null.as_fd(), 2)],
        )?;
        Ok((output, process, rustix::process::pidfd_open(process, PidfdFlags::empty())?))
    };
    let (output, process, pidfd) = match started() {
        Ok(started) => started,
        Err(error) => return Ok(Err(format!("the inventory of GPUs was not started: {}", sys::reason(error)))),
    };
    let deadline = Instant::now() + inventory::TIME;
    let waited = loop {
        match patience.has_ended(&pidfd) {
            Ok(false) if Instant::now() < deadline => {}
            other => break other,
        }
    };
    if !matches!(waited, Ok(true)) {
        let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
    }
    let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(process), WaitOptions::empty()));
    let ended = waited?;
    let status = status.map_err(failed("inventory of GPUs"))?.and_then(|(_, status)| status.exit_status());
    let text = memfile::read_all(output, inventory::MAX_FILE).unwrap_or_default();
    Ok(if status == Some(0) { Ok(text) } else { Err(inventory::failure(ended, &text)) })
}

/// Whoever comes next reads the old one or the new one.
fn keep(runtime: &Path, answer: &[u8]) -> Result<(), String> {
    let path = inventory::path(runtime);
    let own = path.with_extension(format!("new.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(&own, flags, Mode::from_raw_mode(0o644))?);
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
        file.write_all(answer)?;
        std::fs::rename(&own, &path)
    };
    write().map_err(|error| {
        let _ = std::fs::remove_file(&own);
        format!("the inventory of GPUs cannot be kept in {}: {}", path.display(), sys::reason(error))
    })
}
