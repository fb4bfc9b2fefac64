//! Mounts of a container: the grammar users and fstab files speak, the plan, and its execution.

pub mod apply;
pub mod defaults;
pub mod entry;
pub mod fstab;
pub mod rootdir;
pub mod spec;
pub mod unshared;
