//! What the user asked: the option table, the pure parsers behind it, the environment variables that stand in for
//! options, and the administrator's arguments in plugstack.conf (behaviour reference, sections 3 and 4).
//!
//! [`Options`] is filled by Slurm's option callbacks, on the submit side and again on each node, in an order that Slurm
//! chooses: inherited from the job's environment, `#SBATCH` lines, command line. An option that takes a single value may
//! come more than once with the same text, never with two.

#![forbid(unsafe_code)]

pub mod arguments;
mod container_env;
mod environment;
pub mod table;

use std::path::PathBuf;

use crate::image::reference::{ImageReference, InvalidReference};
use crate::mounts::entry::{InvalidEntry, MountEntry};
use crate::mounts::spec::{InvalidMounts, MountSpec};
use crate::request::{ContainerEnv, ImageSource};

pub use environment::FromEnvironmentError;
use table::OptionId;

/// The options of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// `--container-image`.
    pub image: Option<ImageSource>,
    /// `--container-mounts`, in order.
    pub mounts: Vec<MountSpec>,
    /// `--container-workdir`.
    pub workdir: Option<String>,
    /// `--container-env`.
    pub env: Vec<ContainerEnv>,
    /// `--[no-]container-mount-home`.
    pub mount_home: Option<bool>,
    /// `--[no-]container-remap-root`.
    pub remap_root: Option<bool>,
    /// `--container-writable` / `--container-readonly`.
    pub writable: Option<bool>,
    image_text: Option<String>,
    /// The lists that came as several arguments: Slurm relays only the last one to the nodes.
    split: Vec<OptionId>,
    lists: Vec<(OptionId, String)>,
}

/// Why an option cannot be used. The texts are pyxis's where it has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// An empty argument.
    #[error("--{0}: argument required")]
    ArgumentRequired(&'static str),
    /// Two values for an option that has one.
    #[error("--{0} specified multiple times")]
    Repeated(&'static str),
    /// A switch and its opposite.
    #[error("both --{0} and --{1} were specified")]
    Conflict(&'static str, &'static str),
    /// An argument that is not text.
    #[error("--{0}: argument is not valid UTF-8")]
    Encoding(&'static str),
    /// An empty item of a list.
    #[error("--{0}: invalid format: {1}")]
    Format(&'static str, String),
    /// `--container-image` is neither a path nor a reference.
    #[error("--container-image: {0}")]
    Image(#[from] InvalidReference),
    /// `--container-mounts`.
    #[error(transparent)]
    Mounts(#[from] InvalidMounts),
    /// A flag in `--container-mounts` that means nothing.
    #[error("--container-mounts: {0}")]
    MountFlag(#[from] InvalidEntry),
    /// `--container-name=:flag`.
    #[error("--container-name: empty name")]
    EmptyName,
    /// `--container-name=name:` and an unknown word.
    #[error("--container-name: flag must be \"auto\", \"create\", \"exec\" or \"no_exec\"")]
    NameFlag,
    /// `--container-save` names a directory.
    #[error("--container-save: target is a directory")]
    SaveTarget,
    /// An empty item of `--container-unshare`.
    #[error("--container-unshare: empty namespace argument")]
    EmptyNamespace,
    /// A namespace that cannot be asked for.
    #[error("--container-unshare: unknown namespace '{0}'")]
    UnknownNamespace(String),
    /// Correct, but this version cannot do it.
    #[error("--{0} is not available yet in this version of pyxis")]
    NotAvailable(&'static str),
    /// A squashfs file as image.
    #[error(
        "--container-image={0}: image files are not available yet in this version of pyxis; \
         push the image to a registry and name it there"
    )]
    FileNotAvailable(String),
}

impl Options {
    /// Takes over one option as typed. `argument` is ignored by an option without one.
    pub fn set(&mut self, id: OptionId, argument: &[u8]) -> Result<(), OptionError> {
        if id.spec().argument.is_none() {
            return self.switch(id);
        }
        let name = id.name();
        if argument.is_empty() {
            return Err(OptionError::ArgumentRequired(name));
        }
        let text = std::str::from_utf8(argument).map_err(|_| OptionError::Encoding(name))?;
        match id {
            OptionId::Image => self.set_image(text),
            OptionId::Mounts => {
                for mount in MountSpec::parse_list(text)? {
                    MountEntry::try_from(&mount)?;
                    if !self.mounts.contains(&mount) {
                        self.mounts.push(mount);
                    }
                }
                self.note_list(id, text);
                Ok(())
            }
            OptionId::Env => {
                container_env::parse_into(&mut self.env, text)?;
                self.note_list(id, text);
                Ok(())
            }
            OptionId::Workdir => match &self.workdir {
                Some(before) if before != text => Err(OptionError::Repeated(name)),
                _ => {
                    self.workdir = Some(text.to_owned());
                    Ok(())
                }
            },
            OptionId::Name => check_name(text).and(Err(OptionError::NotAvailable(name))),
            OptionId::Save if text.ends_with('/') => Err(OptionError::SaveTarget),
            OptionId::Unshare => check_namespaces(text).and(Err(OptionError::NotAvailable(name))),
            _ => Err(OptionError::NotAvailable(name)),
        }
    }

    fn set_image(&mut self, text: &str) -> Result<(), OptionError> {
        match &self.image_text {
            Some(before) if before == text => return Ok(()),
            Some(_) => return Err(OptionError::Repeated(OptionId::Image.name())),
            None => {}
        }
        let image = parse_image(text)?;
        if matches!(image, ImageSource::File(_)) {
            return Err(OptionError::FileNotAvailable(text.to_owned()));
        }
        self.image = Some(image);
        self.image_text = Some(text.to_owned());
        Ok(())
    }

    fn switch(&mut self, id: OptionId) -> Result<(), OptionError> {
        use OptionId::{MountHome, NoMountHome, NoRemapRoot, Readonly, RemapRoot, Writable};
        let (field, value, names) = match id {
            MountHome => (&mut self.mount_home, true, (MountHome, NoMountHome)),
            NoMountHome => (&mut self.mount_home, false, (MountHome, NoMountHome)),
            RemapRoot => (&mut self.remap_root, true, (RemapRoot, NoRemapRoot)),
            NoRemapRoot => (&mut self.remap_root, false, (RemapRoot, NoRemapRoot)),
            Writable => (&mut self.writable, true, (Writable, Readonly)),
            Readonly => (&mut self.writable, false, (Writable, Readonly)),
            _ => return Err(OptionError::NotAvailable(id.name())),
        };
        if *field == Some(!value) {
            return Err(OptionError::Conflict(names.0.name(), names.1.name()));
        }
        *field = Some(value);
        Ok(())
    }

    fn note_list(&mut self, id: OptionId, text: &str) {
        let differs = self.lists.iter().any(|(other, before)| *other == id && before != text);
        if differs && !self.split.contains(&id) {
            self.split.push(id);
        }
        self.lists.push((id, text.to_owned()));
    }

    /// `--container-image` as typed.
    pub fn image_text(&self) -> Option<&str> {
        self.image_text.as_deref()
    }

    /// Whether the step is to run in a container.
    pub fn enabled(&self) -> bool {
        self.image.is_some()
    }

    /// The options that were given although no container was asked for, as pyxis spells them.
    pub fn without_container(&self) -> Vec<&'static str> {
        if self.enabled() {
            return Vec::new();
        }
        let writable = if self.writable == Some(false) { "--container-readonly" } else { "--container-writable" };
        [
            (!self.mounts.is_empty(), "--container-mounts"),
            (self.workdir.is_some(), "--container-workdir"),
            (self.mount_home.is_some(), "--[no-]container-mount-home"),
            (self.remap_root.is_some(), "--[no-]container-remap-root"),
            (self.writable.is_some(), writable),
        ]
        .into_iter()
        .filter_map(|(given, name)| given.then_some(name))
        .collect()
    }

    /// The list options that were given several times with different texts, of which Slurm relays only the last.
    pub fn split_lists(&self) -> &[OptionId] {
        &self.split
    }
}

/// Classifies what follows `--container-image=`.
pub fn parse_image(text: &str) -> Result<ImageSource, InvalidReference> {
    if text.starts_with(['.', '/']) {
        return Ok(ImageSource::File(PathBuf::from(text)));
    }
    let reference = ImageReference::parse(text)?;
    reference.check()?;
    Ok(ImageSource::Registry { typed: text.to_owned(), reference })
}

fn check_name(text: &str) -> Result<(), OptionError> {
    let (name, flag) = text.split_once(':').unwrap_or((text, ""));
    if name.is_empty() {
        return Err(OptionError::EmptyName);
    }
    match flag {
        "" | "auto" | "create" | "exec" | "no_exec" => Ok(()),
        _ => Err(OptionError::NameFlag),
    }
}

fn check_namespaces(text: &str) -> Result<(), OptionError> {
    for namespace in text.split(',') {
        match namespace {
            "" => return Err(OptionError::EmptyNamespace),
            "net" | "ipc" | "uts" => {}
            other => return Err(OptionError::UnknownNamespace(other.to_owned())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
