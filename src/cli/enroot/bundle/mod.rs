//! `enroot bundle`: an image and this executable in one file, which is a container when it is run: where there is neither
//! pyxis nor enroot. It needs what the executable needs: Linux, the same architecture, and a C library that is not older.

pub mod bundled;
mod format;

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::Mode;
use sha2::{Digest as _, Sha256};

use super::import::output_path;
use super::{Context, Error, say};
use crate::export::target::Target;
use crate::sys;
use format::About;

/// Bytes that are hashed at once.
const BUFFER: usize = 1 << 20;

/// Create a self-extracting bundle from an image.
#[derive(Debug, clap::Args)]
pub struct BundleArgs {
    /// What the bundle says about itself
    #[arg(short, long, value_name = "TEXT")]
    desc: Option<String>,
    /// Output file, if not one named after the image in the working directory
    #[arg(short, long, value_name = "BUNDLE")]
    output: Option<PathBuf>,
    /// Where the bundle unpacks itself for --keep and --extract, if not in a directory named after the image
    #[arg(short, long, value_name = "DIR")]
    target: Option<String>,
    /// Not provided
    #[arg(short, long, hide = true)]
    all: bool,
    /// Squashfs file
    image: PathBuf,
}

/// Runs the command.
pub fn create(args: &BundleArgs, context: &Context) -> Result<ExitCode, Error> {
    if args.all || context.settings.switch("ENROOT_BUNDLE_ALL") == Some(true) {
        let text = "--all is not provided: whoever runs a bundle does it with his own configuration, and gives it more with --conf";
        return Err(text.into());
    }
    let size = super::create::open(&args.image)?.size();
    let mut image = File::open(&args.image).map_err(sys::reason)?;
    let name = name_of(&args.image);
    let typed = args.output.clone().unwrap_or_else(|| format!("{name}.run").into());
    let path = output_path(&typed)?;
    let exists = || format!("File already exists: {}", path.display());
    let force = context.settings.force_override();
    if !force && path.symlink_metadata().is_ok() {
        return Err(exists().into());
    }
    let wants_checksum = context.settings.switch("ENROOT_BUNDLE_CHECKSUM") == Some(true);
    let checksum = wants_checksum.then(|| checksum(&image, size)).transpose()?;
    let new = Target::open(&path)?.create()?;
    let mut file = new.file().map_err(|error| new.failed("write", error))?;
    say::info("Generating bundle...");
    let write = || -> io::Result<()> {
        let length = io::copy(&mut File::open("/proc/self/exe")?, &mut file)?;
        let start = length + io::copy(&mut io::repeat(0).take(format::padding(length)), &mut file)?;
        image.seek(SeekFrom::Start(0))?;
        let end = start + io::copy(&mut image.take(size), &mut file)?;
        if end - start != size {
            return Err(io::Error::other("the image has become shorter meanwhile"));
        }
        let about = About { name, description: args.desc.clone(), target: args.target.clone(), checksum };
        format::finish(&mut file, &about, start, end)?;
        make_executable(&file)
    };
    write().map_err(|error| new.failed("write", error))?;
    match force {
        true => new.publish()?,
        false if !new.publish_new()? => return Err(exists().into()),
        false => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// What an image is called: its file's name, without `.sqsh`.
fn name_of(image: &Path) -> String {
    let name: OsString = match image.extension() {
        Some(extension) if extension == "sqsh" => image.file_stem().unwrap_or_default().to_owned(),
        _ => image.file_name().unwrap_or_default().to_owned(),
    };
    name.to_string_lossy().into_owned()
}

/// For everybody who may read it.
fn make_executable(file: impl AsFd) -> io::Result<()> {
    let mode = rustix::fs::fstat(&file)?.st_mode & 0o777;
    Ok(rustix::fs::fchmod(&file, Mode::from_raw_mode(mode | (mode & 0o444) >> 2))?)
}

/// Of the first `size` bytes from where `file` is.
fn checksum(file: &File, size: u64) -> io::Result<String> {
    let (mut hash, mut buffer, mut rest) = (Sha256::new(), vec![0; BUFFER], file.take(size));
    loop {
        match rest.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => hash.update(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(crate::image::digest::Digest::from_bytes(hash.finalize().into()).to_string())
}
