//! `PYXIS_CONTAINER_*`: environment variables that stand in for options that were not given (behaviour reference,
//! section 3.15).
//!
//! They also reach steps whose options Slurm cannot relay, such as jobs submitted through slurmrestd. A value that
//! cannot be used fails the step, where pyxis goes on without it: what was asked to run in a container must not run
//! elsewhere. Only switches with an unknown word are ignored, as pyxis ignores them.

use super::table::OptionId;
use super::{OptionError, Options};

/// Which variable could not be used, and why.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{error} (from the environment variable {variable})")]
pub struct FromEnvironmentError {
    /// Its name.
    pub variable: &'static str,
    /// What is wrong.
    pub error: OptionError,
}

/// Options with an argument, in the order of the table.
const ARGUMENTS: [(&str, OptionId); 9] = [
    ("PYXIS_CONTAINER_IMAGE", OptionId::Image),
    ("PYXIS_CONTAINER_MOUNTS", OptionId::Mounts),
    ("PYXIS_CONTAINER_WORKDIR", OptionId::Workdir),
    ("PYXIS_CONTAINER_NAME", OptionId::Name),
    ("PYXIS_CONTAINER_SAVE", OptionId::Save),
    ("PYXIS_CONTAINER_ENV", OptionId::Env),
    ("PYXIS_CONTAINER_UNSHARE", OptionId::Unshare),
    ("PYXIS_CONTAINER_DEVICE", OptionId::Device),
    ("PYXIS_CONTAINER_PULL", OptionId::Pull),
];

/// Switches: what "yes" means, and what "no" means. `PYXIS_CONTAINER_WRITABLE` comes before its opposite.
const SWITCHES: [(&str, OptionId, Option<OptionId>); 6] = [
    ("PYXIS_CONTAINER_MOUNT_HOME", OptionId::MountHome, Some(OptionId::NoMountHome)),
    ("PYXIS_CONTAINER_REMAP_ROOT", OptionId::RemapRoot, Some(OptionId::NoRemapRoot)),
    ("PYXIS_CONTAINER_ENTRYPOINT", OptionId::Entrypoint, Some(OptionId::NoEntrypoint)),
    ("PYXIS_CONTAINER_ENTRYPOINT_LOG", OptionId::EntrypointLog, None),
    ("PYXIS_CONTAINER_WRITABLE", OptionId::Writable, Some(OptionId::Readonly)),
    ("PYXIS_CONTAINER_READONLY", OptionId::Readonly, Some(OptionId::Writable)),
];

impl Options {
    /// These options, and for each one not given what the environment says. An empty variable says nothing.
    pub fn with_environment(mut self, get: impl Fn(&str) -> Option<Vec<u8>>) -> Result<Self, FromEnvironmentError> {
        let get = |variable: &str| get(variable).filter(|value| !value.is_empty());
        for (variable, id) in ARGUMENTS {
            if self.is_given(id) {
                continue;
            }
            if let Some(value) = get(variable) {
                self.set(id, &value).map_err(|error| FromEnvironmentError { variable, error })?;
            }
        }
        for (variable, yes, no) in SWITCHES {
            if self.is_given(yes) {
                continue;
            }
            let Some(chosen) = get(variable).and_then(|value| parse_bool(&value)) else { continue };
            if let Some(id) = if chosen { Some(yes) } else { no } {
                self.set(id, b"").map_err(|error| FromEnvironmentError { variable, error })?;
            }
        }
        Ok(self)
    }

    pub(super) fn is_given(&self, id: OptionId) -> bool {
        match id {
            OptionId::Image => self.image.is_some(),
            OptionId::Mounts => !self.mounts.is_empty(),
            OptionId::Workdir => self.workdir.is_some(),
            OptionId::Env => !self.env.is_empty(),
            OptionId::MountHome | OptionId::NoMountHome => self.mount_home.is_some(),
            OptionId::RemapRoot | OptionId::NoRemapRoot => self.remap_root.is_some(),
            OptionId::Writable | OptionId::Readonly => self.writable.is_some(),
            OptionId::Name => self.name.is_some(),
            OptionId::Save => self.save.is_some(),
            OptionId::Entrypoint | OptionId::NoEntrypoint => self.entrypoint.is_some(),
            OptionId::EntrypointLog => self.entrypoint_log.is_some(),
            OptionId::Unshare => self.unshare.any(),
            OptionId::Device => !self.devices.is_empty(),
            OptionId::Pull => self.pull.is_some(),
        }
    }
}

/// pyxis's words for yes and no, case-sensitive.
pub(super) fn parse_bool(text: &[u8]) -> Option<bool> {
    match text {
        b"1" | b"true" | b"yes" | b"y" => Some(true),
        b"0" | b"false" | b"no" | b"n" => Some(false),
        _ => None,
    }
}
