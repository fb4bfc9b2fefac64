//! Images of docker and podman, for `enroot import`: saved by their own commands, with the user's environment, to a file
//! without a name.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::fs::{Mode, OFlags};

use super::{Error, say};
use crate::image::platform::Platform;
use crate::importer::local::{self, LocalImage};
use crate::request::Engine;
use crate::source::SourceForm;
use crate::sys;

/// The image that `engine` calls `name`, which is pulled if it is not there. `temporary` is where there is room for it;
/// `shown` is what the user calls it.
pub fn save(
    engine: Engine,
    name: &str,
    shown: &str,
    platform: &Platform,
    temporary: &Path,
) -> Result<LocalImage, Error> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = rustix::fs::open(temporary, flags, Mode::RUSR | Mode::WUSR)
        .map_err(|errno| format!("cannot make a file in {}: {}", temporary.display(), sys::reason(errno)))?;
    say::info("Fetching image");
    if !run(engine, &["image", "inspect", name], Output::Nothing)? && !run(engine, &["pull", name], Output::Errors)? {
        return Err(failed(engine, "pull", name));
    }
    let arguments: &[&str] = match engine {
        Engine::Docker => &["save", name],
        Engine::Podman => &["save", "--quiet", "--format", "docker-archive", name],
    };
    if !run(engine, arguments, Output::To(&file))? {
        return Err(failed(engine, "save", name));
    }
    local::find((SourceForm::Archive, file, None), None, None, shown, platform)
        .map_err(|failure| failure.into_message().into())
}

/// It has said why.
fn failed(engine: Engine, what: &str, name: &str) -> Error {
    format!("{} {what} {name} failed", engine.command()).into()
}

/// What becomes of a command's output.
enum Output<'a> {
    /// Complaints, too.
    Nothing,
    /// It is shown as progress is.
    Errors,
    To(&'a OwnedFd),
}

/// Whether it succeeds.
fn run(engine: Engine, arguments: &[&str], output: Output<'_>) -> Result<bool, Error> {
    let mut command = Command::new(engine.command());
    command.args(arguments).stdin(Stdio::null());
    match output {
        Output::Nothing => command.stdout(Stdio::null()).stderr(Stdio::null()),
        Output::Errors => command.stdout(Stdio::from(rustix::io::dup(rustix::stdio::stderr())?)),
        Output::To(file) => command.stdout(File::from(file.try_clone()?)),
    };
    match command.status() {
        Ok(status) => Ok(status.success()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(format!("Command not found: {}", engine.command()).into())
        }
        Err(error) => Err(format!("cannot run {}: {}", engine.command(), sys::reason(error)).into()),
    }
}
