//! Tells the site's importer (`importer=` in plugstack.conf; behaviour reference, section 4) that a step needs its files
//! no more. What it does before that is [`crate::source::importer`]'s business.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, WaitOptions};

use super::shared::environment_file;
use crate::request::{Engine, Environment, ImageSource, LocalImage, StepRequest};
use crate::sys::memfile;
use crate::sys::spawn::spawn;

/// The descriptor with the job's environment; the request is the process's standard input.
pub const ENVIRONMENT: i32 = 3;
/// The descriptor of the step's life pipe, for a process whose second argument is [`AFTER`].
pub const LIFE: i32 = 4;
/// "When the step is over."
pub const AFTER: &str = "after";

/// Whether the site's importer is asked for the image: one of a registry's or of docker's.
pub fn is_asked(request: &StepRequest) -> bool {
    let of_importer = match &request.image {
        Some(ImageSource::Registry { .. }) => true,
        Some(ImageSource::Local { image: LocalImage::Engine { engine, .. }, .. }) => *engine == Engine::Docker,
        _ => false,
    };
    request.importer.is_some() && of_importer
}

/// Has `executable` run the importer's `release` as the user, and waits for it; the importer has a limited time. As root.
pub fn release(executable: &Path, request: &StepRequest, job: &Environment) -> io::Result<()> {
    let process = start(executable, request, job, None)?;
    let waited = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(process), WaitOptions::empty()))?;
    match waited.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err(io::Error::other("it failed")),
    }
}

/// Has `executable` do the same once the step whose life pipe this is the read end of is over, unless the step manager
/// has ended it in order ([`super::LifePipe::end`]): that calls [`release`]. The process outlives its parent. As root.
pub fn release_after(
    executable: &Path,
    request: &StepRequest,
    job: &Environment,
    life: BorrowedFd<'_>,
) -> io::Result<Pid> {
    start(executable, request, job, Some(life))
}

fn start(executable: &Path, request: &StepRequest, job: &Environment, life: Option<BorrowedFd<'_>>) -> io::Result<Pid> {
    let request = memfile::sealed("pyxis-request", &serde_json::to_vec(request)?)?;
    let environment = environment_file(job)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let own = rustix::process::getpid().as_raw_nonzero().to_string();
    let mut arguments = vec![crate::cli::RELEASE.as_bytes(), own.as_bytes()];
    let mut descriptors =
        vec![(request.as_fd(), 0), (null.as_fd(), 1), (null.as_fd(), 2), (environment.as_fd(), ENVIRONMENT)];
    if let Some(life) = life {
        arguments.push(AFTER.as_bytes());
        descriptors.push((life, LIFE));
    }
    spawn(executable, &arguments, &[], &descriptors)
}
