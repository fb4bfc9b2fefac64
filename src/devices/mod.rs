//! What a container needs of the host's devices and services, worked out as data and applied by container init.

pub mod access;
pub mod apply;
pub mod cdi;
pub mod edits;
pub mod elf;
pub mod extras;
pub mod gres;
pub mod host;
pub mod infiniband;
pub mod ldcache;
pub mod nvidia;
pub mod plan;
pub mod pmix;
pub mod private;
pub mod remains;
pub mod root;
pub mod settings;
pub mod slurm_config;
pub mod verbs;
