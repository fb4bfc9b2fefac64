//! `enroot export`: a root filesystem as a squashfs file.

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::process::ExitCode;

use super::import::{output_path, squashfs_options};
use super::known::Known;
use super::{Context, Error, say};
use crate::container::FullName;
use crate::enroot::conf::Identity;
use crate::export;
use crate::export::target::Target;
use crate::namespaces;
use crate::namespaces::running::enter_root;
use crate::request::User;
use crate::sys;
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

/// Where the root filesystem is.
enum Source {
    /// A directory of the user's.
    Unpacked(PathBuf),
    /// A step's container that runs, and the process id of its init.
    Running(FullName, i32),
}

/// Runs the command.
pub fn run(args: &ExportArgs, context: &Context) -> Result<ExitCode, Error> {
    let known = Known::new(context);
    let source = match known.running(&args.name)? {
        Some((name, init)) => Source::Running(name, init),
        None => Source::Unpacked(known.find_unpacked(&args.name, "--container-save=FILE")?),
    };
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
    let (root, start) = match &source {
        Source::Running(name, init) => {
            let start = export::start_files(&context.config.runtime.path, context.identity.uid, name);
            let root = enter_root(*init).map_err(|error| format!("cannot enter {name}: {}", sys::reason(error)))?;
            (root, start)
        }
        Source::Unpacked(path) => {
            read_everything(context);
            let root = open_root(path).map_err(|error| format!("{}: {}", sys::reason(error), path.display()))?;
            (root, Vec::new())
        }
    };
    say::info("Creating squashfs filesystem...");
    export::write(root.as_fd(), &new, &options, &start)?;
    match force {
        true => new.publish()?,
        false if !new.publish_new()? => return Err(exists()),
        false => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Lets this process read what belongs to its user, also without permission, as in a container. Where the host has no
/// user namespaces for users, such files make the export fail.
fn read_everything(context: &Context) {
    let Identity { uid, gid, .. } = context.identity;
    if uid != 0 {
        let _ = namespaces::enter_container(&User { uid, gid, groups: Vec::new() }, false);
    }
}
