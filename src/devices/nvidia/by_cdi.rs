//! GPUs that come by a CDI specification of the vendor's (`nvidia-ctk cdi generate`): where there is one for the kind
//! `nvidia.com/gpu`, it takes the place of our own search for driver and devices. Which GPUs a container gets is the same:
//! those of the job, and of these what `NVIDIA_VISIBLE_DEVICES` says.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use super::select::TakeInventory;
use super::{NvidiaError, Request, hide_others, select};
use crate::devices::cdi::{Kind, QualifiedName, Registry};
use crate::devices::edits::ContainerEdits;

/// What has NVIDIA's GPUs in specifications.
const KIND: &str = "nvidia.com/gpu";

/// How a container gets its GPUs.
#[derive(Debug)]
pub enum Way {
    /// By our own search; and a line for the node's log, if it could have been otherwise.
    Native(Option<String>),
    /// By the specifications.
    Cdi {
        /// The devices: what was asked for, and the GPUs.
        names: Vec<QualifiedName>,
        /// What there is to do besides.
        edits: Box<ContainerEdits>,
        /// What was read of the specifications of all these names' vendors.
        registry: Option<Registry>,
    },
}

/// Decides for a container that has been asked to have the devices `names`, among them maybe some of NVIDIA's:
/// `nvidia.com/gpu=all` are all of the job's.
pub fn choose(
    request: &Request<'_>,
    directories: &[PathBuf],
    names: &[QualifiedName],
    take: &mut TakeInventory<'_>,
) -> Result<Way, NvidiaError> {
    // It is a kind.
    let Ok(kind) = KIND.parse::<Kind>() else { return Ok(Way::Native(None)) };
    let is_every = |name: &&QualifiedName| name.kind == kind && name.name() == "all";
    let asked = names.iter().any(|name| name.kind.vendor() == kind.vendor());
    let all = names.iter().any(|name| is_every(&name));
    let as_asked = |edits| Way::Cdi { names: names.to_vec(), edits: Box::new(edits), registry: None };
    if asked && !all {
        return Ok(as_asked(hide_others(request)));
    }
    let Some(selection) = select(request, all, take)? else {
        return Ok(if asked { as_asked(ContainerEdits::default()) } else { Way::Native(None) });
    };
    let vendors: Vec<&str> = names.iter().map(|name| name.kind.vendor()).chain([kind.vendor()]).collect();
    let registry = Registry::load(directories, Some(&vendors));
    if !asked && (selection.nodes.is_empty() || !registry.has_kind(&kind)) {
        return Ok(Way::Native(None));
    }
    let mut names: Vec<QualifiedName> = names.iter().filter(|name| !is_every(name)).cloned().collect();
    for node in &selection.nodes {
        match registry.device_of_node(&kind, Path::new(node)) {
            Some(name) => names.push(name),
            None if asked => return Err(NvidiaError::NotDescribed(node.clone())),
            None => return Ok(Way::Native(Some(NvidiaError::NotDescribed(node.clone()).to_string()))),
        }
    }
    Ok(Way::Cdi { names, edits: Box::new(selection.edits), registry: Some(registry) })
}
