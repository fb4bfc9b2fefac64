//! A bundle that is run: `NAME.run [OPTIONS] [COMMAND]`. The image is read where it is, in the bundle, through FUSE; where
//! the user has no FUSE it is unpacked for as long as the command runs.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use super::format::{self, Bundle};
use crate::cli::enroot::start::{StartOptions, Target, start};
use crate::cli::enroot::{Context, Error, say, usage};
use crate::cli::supervise::in_child;
use crate::config::DEFAULT_PATH;
use crate::import::LayerLimits;
use crate::namespaces;
use crate::request::User;
use crate::rootfs::squashfuse;
use crate::squashfs::reader::Image;
use crate::sys;
use crate::sys::process::exit_now;
use crate::unpacked::squashfs::unpack;
use crate::unpacked::tree::TreeWriter;
use crate::unpacked::{Containers, Unfinished, UnpackedError};

/// A container in a file.
#[derive(Debug, Parser)]
#[command(name = "bundle", disable_version_flag = true, max_term_width = 100)]
struct Arguments {
    /// Show what is in the bundle
    #[arg(short, long)]
    info: bool,
    /// Unpack the bundle, unless that is done, and start what is unpacked
    #[arg(short, long)]
    keep: bool,
    /// Say nothing about progress
    #[arg(short, long)]
    quiet: bool,
    /// Look whether the bundle is whole and can be run on this machine
    #[arg(short, long)]
    verify: bool,
    /// Only unpack the bundle
    #[arg(short = 'x', long)]
    extract: bool,
    #[command(flatten)]
    options: StartOptions,
    /// What to run
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// This process's own bundle, if it was started from one.
pub fn own() -> Option<Result<Bundle, std::io::Error>> {
    let file = File::open("/proc/self/exe").ok()?;
    format::read(&file).transpose()
}

/// Runs the bundle.
pub fn main(bundle: &Bundle) -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error),
    };
    run(&arguments, bundle).unwrap_or_else(|error| {
        say::error(error);
        ExitCode::FAILURE
    })
}

fn run(arguments: &Arguments, bundle: &Bundle) -> Result<ExitCode, Error> {
    let file = std::env::current_exe()?;
    let image = || -> Result<Image, Error> { Ok(Image::open_at(File::open("/proc/self/exe")?, bundle.start)?) };
    if arguments.info {
        return show(bundle, &image()?);
    }
    let context = Context::load(Path::new(DEFAULT_PATH))?;
    if arguments.verify {
        return verify(bundle, &context);
    }
    let unpack = |unfinished: &Unfinished| -> Result<(), Error> {
        if !arguments.quiet {
            say::info("Extracting squashfs filesystem...");
        }
        let import = &context.config.import;
        let limits = LayerLimits { max_bytes: import.max_layer_bytes, max_entries: import.max_layer_entries };
        Ok(unpack(&image()?, &mut TreeWriter::new(unfinished.root()), &limits)?)
    };
    let go = |target: &Target| start(&arguments.options, target, &arguments.command, &context).map(ExitCode::from);
    if arguments.extract || arguments.keep {
        let target = target(bundle)?;
        if !arguments.keep || target.symlink_metadata().is_err() {
            let (parent, name) = (target.parent().unwrap_or(Path::new("/")), target.file_name().unwrap_or_default());
            let unfinished = Containers::new(parent.to_owned()).begin(name, false)?;
            unpack(&unfinished)?;
            match unfinished.publish() {
                // Another one was faster.
                Err(UnpackedError::Exists(_)) if arguments.keep => {}
                other => drop(other?),
            }
        }
        return if arguments.extract { Ok(ExitCode::SUCCESS) } else { go(&Target::Unpacked(target)) };
    }
    if squashfuse::is_usable(&user(&context)) {
        return go(&Target::Image(file, bundle.start));
    }
    let unfinished = Containers::new(context.settings.temp_path()).begin(bundle.about.name.as_ref(), true)?;
    unpack(&unfinished)?;
    let target = Target::Unpacked(unfinished.hidden_path());
    // This process stays, to remove it.
    let command = || -> Result<Infallible, Error> {
        exit_now(start(&arguments.options, &target, &arguments.command, &context)?.into())
    };
    let code = in_child(command, say::error)?;
    drop(unfinished);
    Ok(ExitCode::from(code))
}

fn user(context: &Context) -> User {
    let groups = nix::unistd::getgroups().unwrap_or_default().into_iter().map(nix::unistd::Gid::as_raw).collect();
    User { uid: context.identity.uid, gid: context.identity.gid, groups }
}

/// Where the bundle is unpacked: an absolute path, whose directory exists.
fn target(bundle: &Bundle) -> Result<PathBuf, Error> {
    let typed = bundle.about.target.as_ref().unwrap_or(&bundle.about.name);
    crate::cli::enroot::import::output_path(Path::new(typed))
}

fn show(bundle: &Bundle, image: &Image) -> Result<ExitCode, Error> {
    let about = &bundle.about;
    let printable = |text: &str| text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>();
    say::line(format_args!("Name: {}", printable(&about.name)))?;
    if let Some(description) = &about.description {
        say::line(format_args!("Description: {}", printable(description)))?;
    }
    if let Some(checksum) = &about.checksum {
        say::line(format_args!("Checksum: {}", printable(checksum)))?;
    }
    say::line(format_args!("Image: squashfs, {} bytes, {} inodes", bundle.size, image.inodes()))?;
    say::line(format_args!("Made by: pyxis {}", env!("CARGO_PKG_VERSION")))?;
    Ok(ExitCode::SUCCESS)
}

/// Says what is wrong with the first thing that is, and what unpacking will cost where there is no FUSE.
fn verify(bundle: &Bundle, context: &Context) -> Result<ExitCode, Error> {
    if let Some(expected) = &bundle.about.checksum {
        let mut file = File::open("/proc/self/exe")?;
        file.seek(SeekFrom::Start(bundle.start))?;
        if super::checksum(&file, bundle.size)? != *expected {
            return Err("Checksum mismatch: the bundle is damaged".into());
        }
        say::line("Checksum: OK")?;
    }
    let user = user(context);
    let enter = || -> Result<Infallible, String> {
        namespaces::enter_container(&user, false).map_err(sys::reason)?;
        exit_now(0)
    };
    let report = |reason| say::error(format_args!("User namespaces: {reason}"));
    if in_child(enter, report)? != 0 {
        return Ok(ExitCode::FAILURE);
    }
    say::line("User namespaces: OK")?;
    say::line(match squashfuse::is_usable(&user) {
        true => "FUSE: OK",
        false => "FUSE: not for this user, so each start unpacks the image (--keep does it once)",
    })?;
    Ok(ExitCode::SUCCESS)
}
