//! A job that does nothing itself: tests and benchmarks start steps in it.

use std::ffi::OsStr;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

use crate::cluster::Cluster;
use crate::{process, wait};

/// The job. It ends with this.
#[derive(Debug)]
pub struct Allocation<'a> {
    cluster: &'a Cluster,
    job: String,
}

impl<'a> Allocation<'a> {
    /// A job of user 0 with these options of `salloc`, as soon as its resources are free.
    pub fn new(cluster: &'a Cluster, options: &[&str]) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("--name=allocation-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::SeqCst));
        let job_name = name.replace("--name", "--job-name");
        let arguments = [&["--no-shell", "--quiet", job_name.as_str()], options].concat();
        process::run(&mut cluster.command(0, "salloc", arguments), wait::DEADLINE * 2)?.success()?;
        let job = cluster.admin("squeue", ["--noheader", &name, "--format=%i"])?.trim().to_owned();
        Ok(Self { cluster, job })
    }

    /// `srun ARGUMENTS` in it.
    pub fn srun<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Command {
        let mut command = self.cluster.command(0, "srun", [format!("--jobid={}", self.job)]);
        command.args(arguments);
        command
    }
}

impl Drop for Allocation<'_> {
    fn drop(&mut self) {
        let _ = self.cluster.admin("scancel", [&self.job]);
        // What it had is free for the next one. A job that nobody knows any more is an error of squeue's.
        let _ = wait::until("the end of the job", wait::DEADLINE, || {
            let jobs = self.cluster.admin("squeue", ["--noheader", "--jobs", &self.job]).unwrap_or_default();
            jobs.trim().is_empty().then_some(())
        });
    }
}
