//! `[devices]` of the configuration: what of the node's hardware appears in containers.

#![forbid(unsafe_code)]

use serde::Deserialize;

/// `[devices]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DeviceSettings {
    /// `infiniband`: InfiniBand and RoCE devices, as `MELLANOX_VISIBLE_DEVICES` says.
    pub infiniband: bool,
}

impl Default for DeviceSettings {
    fn default() -> Self {
        Self { infiniband: true }
    }
}
