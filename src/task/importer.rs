//! Tells the site's importer (`importer=` in plugstack.conf; behaviour reference, section 4) that a step needs its files
//! no more. What it does before that is [`crate::source::importer`]'s business.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::WaitOptions;

use super::shared::environment_file;
use crate::request::{Engine, Environment, ImageSource, LocalImage, StepRequest};
use crate::sys::memfile;
use crate::sys::spawn::spawn;

/// The descriptor with the job's environment; the request is the process's standard input.
pub const ENVIRONMENT: i32 = 3;

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
    let request = memfile::sealed("pyxis-request", &serde_json::to_vec(request)?)?;
    let environment = environment_file(job)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    let own = rustix::process::getpid().as_raw_nonzero().to_string();
    let process = spawn(
        executable,
        &[crate::cli::RELEASE.as_bytes(), own.as_bytes()],
        &[],
        &[(request.as_fd(), 0), (null.as_fd(), 1), (null.as_fd(), 2), (environment.as_fd(), ENVIRONMENT)],
    )?;
    let waited = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(process), WaitOptions::empty()))?;
    match waited.and_then(|(_, status)| status.exit_status()) {
        Some(0) => Ok(()),
        _ => Err(io::Error::other("it failed")),
    }
}
