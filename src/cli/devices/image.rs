//! An image, looked at as a container of it: started as by `pyxis run`, without any device.

use std::convert::Infallible;
use std::os::fd::AsFd;
use std::path::Path;

use super::super::run;
use super::super::supervise::in_child;
use super::Error;
use crate::devices::plan::{GPUS, INFINIBAND};
use crate::options::Options;
use crate::options::table::OptionId;
use crate::request::{Environment, StepRequest};
use crate::sys::process::{become_user, exit_now};
use crate::task::{LifePipe, Outcome, UserMessage, start_broker};

/// Calls `look` with the environment and the root filesystem of a container of `image`, as the user `user`. Gives the exit
/// code that `look` gives.
pub fn look(
    image: &str,
    user: &str,
    config: &Path,
    look: impl FnOnce(&Environment, &Path) -> Result<u8, Error>,
) -> Result<u8, Error> {
    if !rustix::process::geteuid().is_root() {
        return Err("\"pyxis devices IMAGE\" mounts images from the store and needs root: sudo pyxis devices --user \
                    \"$USER\" IMAGE; or say what the image has with --env and --root"
            .into());
    }
    let mut options = Options::default();
    options.set(OptionId::Image, image.as_bytes())?;
    let bare = StepRequest::bare(run::look_up(user)?, std::env::current_dir()?);
    let request = StepRequest { image: options.image, ..bare };
    // What looks at it decides on devices.
    let mut environment: Environment = std::env::vars_os().map(|(name, value)| run::join(name, value)).collect();
    for name in [GPUS, INFINIBAND] {
        environment.set(name, "void");
    }
    let LifePipe { read, write } = LifePipe::create()?;
    let program = || -> Result<Infallible, Error> {
        drop(write);
        let starting = start_broker(&std::env::current_exe()?, config, &request, &environment, read.as_fd())?;
        become_user(&request.user)?;
        let outcome = starting.finish(&environment, &mut |message| match message {
            UserMessage::Notice(text) | UserMessage::Error(text) => eprintln!("{text}"),
            UserMessage::Log(_) => {}
        });
        let Outcome::Ready(container) = outcome else { exit_now(1) };
        exit_now(look(container.environment(), &container.root())?.into())
    };
    Ok(in_child(program, |error: Error| eprintln!("pyxis: {error}"))?)
}
