//! The root filesystem: shared layer mounts, the overlay over them, and the files that every container needs.

pub mod adapt;
pub mod cgroups;
pub mod identity;
pub mod kernel;
pub mod layers;
pub mod overlay;
pub mod probe;
pub mod squashfuse;
