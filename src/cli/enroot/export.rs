//! `enroot export`: a root filesystem as a squashfs file.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use super::import::{output_path, squashfs_options};
use super::known::Known;
use super::{Context, Error, say};
use crate::export;
use crate::export::target::Target;
use crate::unpacked::open_root;

/// Create an image from a container root filesystem.
#[derive(Debug, clap::Args)]
pub struct ExportArgs {
    /// Output file, if not one named after the container in the working directory
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Overwrite an existing file
    #[arg(short, long)]
    force: bool,
    /// Name of the container
    name: OsString,
}

/// Runs the command.
pub fn run(args: &ExportArgs, context: &Context) -> Result<ExitCode, Error> {
    let root = Known::new(context).find_unpacked(&args.name, "--container-save=FILE")?;
    let typed = args.output.clone().unwrap_or_else(|| {
        let mut name = args.name.clone();
        name.push(".sqsh");
        name.into()
    });
    let path = output_path(&typed)?;
    let force = args.force || context.settings.force_override();
    let exists = || -> Error { format!("File already exists: {}", path.display()).into() };
    if !force && path.symlink_metadata().is_ok() {
        return Err(exists());
    }
    let options = squashfs_options(context)?;
    let new = Target::open(&path)?.create()?;
    let root = open_root(&root).map_err(|error| format!("{}: {}", crate::sys::reason(error), root.display()))?;
    say::info("Creating squashfs filesystem...");
    export::write(root.as_fd(), &new, &options)?;
    match force {
        true => new.publish()?,
        false if !new.publish_new()? => return Err(exists()),
        false => {}
    }
    Ok(ExitCode::SUCCESS)
}
