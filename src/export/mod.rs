//! Export: a container's root filesystem as a squashfs file of the user's, for `--container-save` and `pyxis export`
//! (behaviour reference, sections 3.7 and 11).
//!
//! * `walk` reads the root filesystem, given as a descriptor, and leaves out what belongs to this container only.
//! * `target` is the file: there is nothing under its name until it is complete, and then everything at once.
//! * [`saver`] is the process that Slurm runs in place of a task of a step that will be saved.

#![forbid(unsafe_code)]

pub mod saver;
pub mod target;
mod walk;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use crate::container::FullName;
use crate::container::running::Running;
use crate::enroot::generated::{self, GeneratedFile};
use crate::image::config::ImageConfig;
use crate::squashfs::writer::{self, Attributes, Options, Writer};
use crate::sys;
use target::{NewFile, TargetError};

/// Why there is no image. What was at the target's path before is still there.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The file cannot be made, written or named.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// The image cannot be written.
    #[error(transparent)]
    Write(#[from] writer::Error),
    /// Something in the root filesystem cannot be read.
    #[error("cannot read {path} in the container: {}", sys::reason(.cause))]
    Read {
        /// Absolute in the container.
        path: String,
        /// Why not.
        cause: io::Error,
    },
}

/// Writes the root filesystem behind `root` into `file`, which still has to be published. `root` may be a detached mount;
/// of other file systems mounted below it nothing is read. `start` are the files that say how to start it: they take the
/// place of what has their paths, unless such files are there already.
pub fn write(
    root: BorrowedFd<'_>,
    file: &NewFile,
    options: &Options,
    start: &[GeneratedFile],
) -> Result<(), ExportError> {
    let output = file.file().map_err(|error| file.failed("write", error))?;
    let mut writer = Writer::new(output, options)?;
    let start = if walk::wants_start_files(root) { start } else { &[] };
    for file in start {
        let attributes = Attributes { mode: file.mode, mtime: writer.time().into(), xattrs: Vec::new() };
        writer.file(file.path.as_bytes(), attributes, &mut file.content.as_bytes())?;
    }
    walk::walk(root, &mut writer)?;
    writer.finish()?;
    Ok(())
}

/// The files that say how to start the running container `name` of `uid`, from what it was made from. None if that is
/// not known, or is no image with a config.
pub fn start_files(runtime: &Path, uid: u32, name: &FullName) -> Vec<GeneratedFile> {
    let record = || {
        let running = Running::open(runtime, uid).ok()??;
        let instance = running.instances(name).ok()?.into_iter().next()?;
        running.record(name, &instance).ok()
    };
    let Some(record) = record() else { return Vec::new() };
    let Ok(image) = ImageConfig::parse(&record.config) else { return Vec::new() };
    generated::files(&image, record.source().as_deref()).into()
}
