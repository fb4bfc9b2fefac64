//! Job script context: `slurmstepd spank epilog`, which slurmd starts on each node when a job is over.
//!
//! Neither `slurm_spank_init` nor the job's environment are there. Where containers end with their job
//! (`container_scope=job`), the executable removes them; nothing that goes wrong drains the node: what is left is the
//! collector's.

use std::io;
use std::os::unix::ffi::OsStrExt;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, WaitStatus};

use super::{Item, Spank};
use crate::options::arguments::Arguments;
use crate::sys;
use crate::sys::spawn::spawn;
use crate::task::UserMessage;

/// How long it may take, in seconds: the node is not idle before. Far below Slurm's own limit for the jobs after it.
const LIMIT: i64 = 60;

/// `slurm_spank_job_epilog`.
pub fn epilog(spank: &mut dyn Spank, arguments: &[&str]) {
    // What is wrong with plugstack.conf, slurmd has said at its start.
    let Ok(arguments) = Arguments::parse(arguments.iter().copied()) else { return };
    if !arguments.job_scope {
        return;
    }
    if let Err(reason) = remove_containers(spank, &arguments) {
        spank.say(UserMessage::error(format!("epilog: {reason}")));
    }
}

fn remove_containers(spank: &dyn Spank, arguments: &Arguments) -> Result<(), String> {
    let uid = spank.number(Item::Uid).map_err(|error| format!("couldn't get job uid: {error}"))?;
    let job = spank.number(Item::JobId).map_err(|error| format!("couldn't get job ID: {error}"))?;
    let failed = |reason: &str| format!("couldn't cleanup pyxis containers for job {job}: {reason}");
    let (uid, number) = (uid.to_string(), job.to_string());
    let role =
        [crate::cli::EPILOG.as_bytes(), arguments.config.as_os_str().as_bytes(), uid.as_bytes(), number.as_bytes()];
    let variables = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), c"LANG=C.UTF-8".to_owned()];
    let process = spawn(&arguments.executable, &role, &variables, &[]).map_err(|error| failed(&error.to_string()))?;
    match wait(process) {
        Ok(Some(status)) if status.exit_status() == Some(0) => Ok(()),
        Ok(Some(_)) => Err(failed("\"pyxis gc\" tells why")),
        Ok(None) => Err(failed(&format!("it took longer than {LIMIT} s"))),
        Err(error) => Err(failed(&sys::reason(error))),
    }
}

/// How the process ended; `None` if it had to be killed.
fn wait(process: Pid) -> io::Result<Option<WaitStatus>> {
    let pidfd = rustix::process::pidfd_open(process, PidfdFlags::empty())?;
    let mut watched = [PollFd::new(&pidfd, PollFlags::IN)];
    let limit = Timespec { tv_sec: LIMIT, tv_nsec: 0 };
    let ended = rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, Some(&limit)))? > 0;
    if !ended {
        rustix::process::pidfd_send_signal(&pidfd, Signal::KILL)?;
    }
    let status = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(process), WaitOptions::empty()))?;
    Ok(status.map(|(_, status)| status).filter(|_| ended))
}
