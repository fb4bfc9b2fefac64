//! What an image is called and what it consists of: reference, digest, platform, manifest, config.
//!
//! Pure parsers, no I/O.

pub mod config;
pub mod digest;
pub mod docker_archive;
pub mod local;
pub mod manifest;
pub mod platform;
pub mod reference;
