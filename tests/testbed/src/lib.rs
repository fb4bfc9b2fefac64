//! A real Slurm cluster and real container registries on one machine, for the tests, the benchmarks and the demo.
//!
//! Everything is Debian's: `slurmctld`, `slurmd`, `munged` and `docker-registry`, started here on loopback with ports,
//! keys and directories of their own, so that neither a Slurm of the machine nor a second testbed is disturbed. It needs
//! root, and no systemd.
//!
//! ```text
//! /var/tmp/pyxis-testbed/NAME/     one testbed; `lock` is held while its process lives
//!     processes                    every daemon: pid, start time, what it is
//!     etc/  log/  state/           slurm.conf, plugstack.conf, pyxis.toml, keys · logs · slurmctld, munge, registries
//!     install/                     what `make install` put there: the plugin and `pyxis`, reachable by every user
//!     nodeN/                       the disk of a node: spool, store and run directory
//! ```
//!
//! A *node* is a `slurmd` in a PID and a mount namespace of its own, over which its store and run directory are mounted:
//! nodes share nothing but the image of the machine, and killing the first process of a node is pulling its plug.
//!
//! A testbed that was killed leaves processes and files; the next one to start ends and removes them (by the recorded
//! pid and start time, never by name).

#![forbid(unsafe_code)]

pub mod allocation;
pub mod clean;
pub mod cluster;
pub mod connect;
pub mod docker;
pub mod image;
pub mod images;
pub mod install;
pub mod mpi;
pub mod node;
pub mod prerequisites;
pub mod process;
pub mod proxy;
pub mod registry;
pub mod rpm;
pub mod site;
pub mod testbed;
pub mod token;
pub mod users;
pub mod wait;

pub use cluster::{Cluster, ClusterOptions};
pub use process::{Output, Running};
pub use registry::Registry;
pub use site::Site;
pub use testbed::Testbed;
pub use users::TestUser;
