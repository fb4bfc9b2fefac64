//! `[devices]` of the configuration: what of the node's hardware appears in containers.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use serde::Deserialize;

use super::cdi::registry::DIRECTORIES;
use super::gres;

/// `[devices]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceSettings {
    /// `infiniband`: InfiniBand and RoCE devices, as `MELLANOX_VISIBLE_DEVICES` says.
    pub infiniband: bool,
    /// `sharp`: variables for SHARP in jobs with `--network=sharp`, as enroot's hook `50-sharp` has them.
    pub sharp: bool,
    /// `mig_config`: containers of whole GPUs may divide them, as with enroot's hook `50-mig-config`.
    pub mig_config: bool,
    /// `cuda_compat`: an image's CUDA that is newer than the driver's is used.
    pub cuda_compat: bool,
    /// `cdi_directories`: directories of CDI specifications, of which the last one counts most.
    pub cdi_directories: Vec<PathBuf>,
    /// `[devices.gres]`: what devices of a generic resource are called in CDI specifications.
    pub gres: gres::Mapping,
}

impl Default for DeviceSettings {
    fn default() -> Self {
        Self {
            infiniband: true,
            sharp: true,
            mig_config: false,
            cuda_compat: true,
            cdi_directories: DIRECTORIES.map(PathBuf::from).into(),
            gres: gres::Mapping::new(),
        }
    }
}
