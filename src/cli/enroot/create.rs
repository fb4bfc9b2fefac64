//! `enroot create`: a root filesystem from a squashfs file.

use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};

use super::{Context, Error, say};
use crate::import::LayerLimits;
use crate::squashfs::reader::{self, Image};
use crate::unpacked::Containers;
use crate::unpacked::squashfs::unpack;
use crate::unpacked::tree::TreeWriter;

/// Create a container root filesystem from an image.
#[derive(Debug, clap::Args)]
pub struct CreateArgs {
    /// Name of the container, if not that of the file
    #[arg(short, long)]
    name: Option<OsString>,
    /// Overwrite an existing one
    #[arg(short, long)]
    force: bool,
    /// Squashfs file
    image: PathBuf,
}

/// Runs the command.
pub fn run(args: &CreateArgs, context: &Context) -> Result<ExitCode, Error> {
    let image = open(&args.image)?;
    let name = match &args.name {
        Some(name) => name.clone(),
        None if args.image.extension().is_some_and(|extension| extension == "sqsh") => {
            args.image.file_stem().unwrap_or_default().to_owned()
        }
        None => args.image.file_name().unwrap_or_default().to_owned(),
    };
    let containers = Containers::new(context.settings.data_path());
    let unfinished = containers.begin(&name, args.force || context.settings.force_override())?;
    say::info("Extracting squashfs filesystem...");
    let import = &context.config.import;
    let limits = LayerLimits { max_bytes: import.max_layer_bytes, max_entries: import.max_layer_entries };
    unpack(&image, &mut TreeWriter::new(unfinished.root()), &limits)?;
    unfinished.publish()?;
    Ok(ExitCode::SUCCESS)
}

/// Opens a squashfs file, in enroot's words where it is none.
pub fn open(path: &Path) -> Result<Image, Error> {
    let shown = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let missing = || format!("No such file or directory: {}", shown.display());
    // Not blocking: a named pipe is no file either.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Err(missing().into()),
        Err(errno) => return Err(format!("cannot open {}: {}", shown.display(), crate::sys::reason(errno)).into()),
    };
    if !file.metadata()?.is_file() {
        return Err(missing().into());
    }
    Image::open(file).map_err(|error| match error {
        reader::Error::NotSquashfs => format!("Invalid image format: {}", shown.display()).into(),
        error => format!("{}: {error}", shown.display()).into(),
    })
}
