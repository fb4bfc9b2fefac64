//! What a container needs of the host's devices and services, worked out as data and applied by container init.

pub mod apply;
pub mod cdi;
pub mod edits;
pub mod ldcache;
pub mod plan;
pub mod pmix;
pub mod private;
pub mod remains;
pub mod root;
pub mod settings;
