//! `enroot list`: containers by name.

use std::process::ExitCode;

use super::{Context, Error, say};
use crate::unpacked::Containers;

/// List container root filesystems.
#[derive(Debug, clap::Args)]
pub struct ListArgs {
    /// Also what runs in them
    #[arg(short, long)]
    fancy: bool,
}

/// Runs the command.
pub fn run(_args: &ListArgs, context: &Context) -> Result<ExitCode, Error> {
    let containers = Containers::new(context.settings.data_path());
    for name in containers.names()? {
        say::line(name.display())?;
    }
    Ok(ExitCode::SUCCESS)
}
