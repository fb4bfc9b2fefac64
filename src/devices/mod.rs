//! What a container needs of the host's devices and services, worked out as data and applied by container init.

pub mod cdi;
pub mod edits;
pub mod pmix;
pub mod private;
