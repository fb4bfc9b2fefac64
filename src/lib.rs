//! Containers in Slurm steps.
//!
//! Built twice from these sources: as `spank_pyxis.so`, the SPANK plugin (`plugin`), and as the library behind the
//! `pyxis` executable, which runs everything that does not have to happen inside Slurm's own processes.
//!
//! Data goes one way: `options` → `request` → `broker` (→ `importer`) → `init` → `task`.
//!
//! * `plugin/` depends only on `options`, `request`, `task`, `image::reference`, `mounts::{spec, entry}`, `devices::access` and
//!   `sys`: network, archive and crypto code is never linked into the plugin.
//! * `broker`, `importer` and `init` are the three processes of a container start, each with an identity of its own.

pub mod agreement;
pub mod broker;
pub mod cli;
pub mod config;
pub mod container;
pub mod devices;
pub mod enroot;
pub mod erofs;
pub mod export;
pub mod hooks;
pub mod image;
pub mod import;
pub mod importer;
pub mod init;
pub mod metrics;
pub mod mounts;
pub mod namespaces;
pub mod options;
pub mod plugin;
pub mod policy;
pub mod progress;
pub mod pull;
pub mod registry;
pub mod request;
pub mod rootfs;
pub mod source;
pub mod squashfs;
pub mod squashfuse;
pub mod store;
pub mod sys;
pub mod task;
pub mod trace;
pub mod unpacked;
