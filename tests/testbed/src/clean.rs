//! Nothing is left after a step: no process, no mount, no scratch directory, no node in trouble.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::node::Node;
use crate::wait;

/// Waits until `cluster` is idle and every node is as clean as before its first step. The error lists what is left.
pub fn check(cluster: &mut Cluster) -> Result<()> {
    cluster.wait_until_idle()?;
    for node in cluster.nodes() {
        let mut left = Vec::new();
        wait::until("a clean node", wait::DEADLINE / 4, || {
            left = leftovers(node);
            left.is_empty().then_some(())
        })
        .with_context(|| format!("{}: left behind:\n{}", node.name(), left.join("\n")))?;
    }
    Ok(())
}

/// What stays on a node from one step to the next, below the run directory: the namespace with the layers' mounts, its
/// lock, the empty directories on which containers see their root and hooks their files, which containers run or did lately,
/// counters, and what the kernel can do.
const PERMANENT: [&str; 7] = ["mounts", "lock", "root", "hooks", "running", "metrics", "kernel"];

fn leftovers(node: &Node) -> Vec<String> {
    let processes = node.processes().into_iter().map(|process| format!("process {process:?}"));
    let mounts = node.extra_mounts().into_iter().filter(|point| !point.starts_with("/run/pyxis/mounts"));
    let run = node.private("/run/pyxis");
    // A site's importer has a directory for each user there.
    let is_user = |name: &str| name.parse::<u32>().is_ok() && names(&run.join(name)).is_empty();
    let runtime = names(&run).into_iter().filter(|name| !PERMANENT.contains(&name.as_str()) && !is_user(name));
    let attached = ["root", "hooks"].map(|name| (name, names(&run.join(name))));
    let attached =
        attached.into_iter().flat_map(|(at, names)| names.into_iter().map(move |name| format!("{at}/{name}")));
    let jobs = names(&node.spool()).into_iter().filter(|name| name.starts_with("job"));
    let mut unfinished = Vec::new();
    find_unfinished(&node.private("/var/lib/pyxis"), &mut unfinished);
    processes
        .chain(mounts.map(|point| format!("mount {point}")))
        .chain(runtime.map(|name| format!("/run/pyxis/{name}")))
        .chain(attached.map(|name| format!("/run/pyxis/{name}")))
        .chain(jobs.map(|name| format!("spool directory {name}")))
        .chain(unfinished)
        .collect()
}

/// Files of a store that somebody began to write.
fn find_unfinished(directory: &Path, found: &mut Vec<String>) {
    for name in names(directory) {
        let path = directory.join(&name);
        if name.starts_with(".tmp-") {
            found.push(path.display().to_string());
        } else if path.is_dir() && !path.is_symlink() {
            find_unfinished(&path, found);
        }
    }
}

fn names(directory: &Path) -> Vec<String> {
    fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into_owned()))
        .collect()
}
