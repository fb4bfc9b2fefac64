//! `enroot info`: the settings in force.

use std::process::ExitCode;

use super::{Context, Error, say, settings};

/// Runs the command.
pub fn run(context: &Context) -> Result<ExitCode, Error> {
    for (name, value) in settings::all(&context.settings) {
        say::line(format_args!("{name}={value}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
