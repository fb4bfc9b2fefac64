//! A cluster and a registry together.

use anyhow::Result;

use crate::cluster::{Cluster, ClusterOptions};
use crate::install::{Build, Installation};
use crate::prerequisites;

use crate::registry::{Registry, RegistryOptions};
use crate::site::Site;

/// A cluster, a registry that stands in for Docker Hub, and Pyxis between them. Ended when dropped.
#[derive(Debug)]
pub struct Testbed {
    /// Slurm.
    pub cluster: Cluster,
    /// Open to everybody, plain HTTP. Holds nothing at first.
    pub hub: Registry,
    /// What is under test.
    pub pyxis: Installation,
    /// The directory of all this.
    pub site: Site,
}

impl Testbed {
    /// Starts a testbed whose nodes load the plugin of `build`.
    pub fn start(name: &str, build: &Build, options: &ClusterOptions) -> Result<Self> {
        prerequisites::check()?;
        let site = Site::create(name)?;
        let hub = Registry::start(&site, "hub", RegistryOptions::default())?;
        let pyxis = Installation::create(&site, build, &hub)?;
        let cluster = Cluster::start(&site, options)?;
        cluster.set_plugstack(&pyxis.plugstack)?;
        Ok(Self { cluster, hub, pyxis, site })
    }

    /// Leaves everything running after the end of this process, until [`crate::site::remove`].
    pub fn keep(self) -> Result<()> {
        let Self { cluster, hub, site, .. } = self;
        // Dropping them would end their daemons.
        std::mem::forget((cluster, hub));
        site.keep()
    }
}
