//! Devices by the Container Device Interface: a vendor's files say what a container of a device needs
//! (<https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>), for GPUs of every vendor and for
//! whatever else ships such files. Read by container init, as the user: nothing of it grants what he could not do himself.

#![forbid(unsafe_code)]

pub mod document;
mod known;
pub mod name;
mod pattern;
mod planner;
pub mod registry;

#[cfg(test)]
mod tests;

pub use name::{Kind, QualifiedName};
pub use registry::{CdiError, Registry, plan};
