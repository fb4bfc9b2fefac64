//! From what Slurm has given a step to names of CDI devices: the administrator says how his generic resources are called in
//! the vendors' files (`[devices.gres]`).
//!
//! Slurm tells a step what it has in `SLURM_STEP_GPUS`, `SLURM_STEP_NICS` and their like, and a batch script or an
//! interactive step in `SLURM_JOB_GPUS` (gres.conf(5); numbers of the node's devices, whatever a task's binding makes of
//! them). Parts of GPUs have identifiers instead, in the variable that the vendor's programs read.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use super::cdi::name::{InvalidName, Kind, QualifiedName};
use crate::request::Environment;

/// `SLURM_INTERACTIVE_STEP` and `SLURM_BATCH_SCRIPT`: they have all that the job has on the node.
const STEPS_WITH_ALL_OF_THE_JOB: std::ops::RangeInclusive<u32> = 0xffff_fffa..=0xffff_fffb;
/// What stands for a device's number, and for its identifier.
const INDEX: &str = "{index}";
const UUID: &str = "{uuid}";
/// Where Slurm puts identifiers, if it uses them.
const IDENTIFIERS: [&str; 3] = ["CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "ZE_AFFINITY_MASK"];

/// Names of generic resources, and what their devices are called: `gpu = "amd.com/gpu={index}"`.
pub type Mapping = BTreeMap<String, String>;

/// A step, as far as its resources go.
#[derive(Debug, Clone, Copy)]
pub struct Step<'a> {
    /// Its id; none outside Slurm.
    pub id: Option<u32>,
    /// Its variables.
    pub variables: &'a Environment,
}

/// Judges `[devices.gres]`.
pub fn check(mapping: &Mapping) -> Result<(), String> {
    for (gres, template) in mapping {
        let is_name = !gres.is_empty() && gres.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        if !is_name {
            return Err(format!("devices.gres.{gres:?}: is no name of a generic resource"));
        }
        name(template, "0").map_err(|error| format!("devices.gres.{gres}: {error}"))?;
    }
    Ok(())
}

/// The devices of what the step has, by the mapping. Of what it has not, nothing.
pub fn devices(mapping: &Mapping, step: Step<'_>) -> Result<Vec<QualifiedName>, InvalidName> {
    let mut devices = Vec::new();
    for (gres, template) in mapping {
        for item in items(gres, template, step) {
            let device = name(template, &item)?;
            if !devices.contains(&device) {
                devices.push(device);
            }
        }
    }
    Ok(devices)
}

/// What a container gets: the devices that were `asked` for, then those of what the step has. Where the mapping knows a
/// kind, all of its devices are all of the step's.
pub fn wanted(asked: &[QualifiedName], mapping: &Mapping, step: Step<'_>) -> Result<Vec<QualifiedName>, InvalidName> {
    let of_step = devices(mapping, step)?;
    let is_every = |name: &&QualifiedName| name.name() == "all" && step.id.is_some() && maps(mapping, &name.kind);
    let mut wanted: Vec<QualifiedName> = Vec::new();
    for name in asked.iter().filter(|name| !is_every(name)).chain(&of_step) {
        if !wanted.contains(name) {
            wanted.push(name.clone());
        }
    }
    Ok(wanted)
}

/// Whether the mapping says how devices of this kind are called.
fn maps(mapping: &Mapping, kind: &Kind) -> bool {
    mapping.values().any(|template| name(template, "0").is_ok_and(|device| device.kind == *kind))
}

/// Numbers or identifiers, as the template wants them. Without either it is good for any that the step has.
fn items(gres: &str, template: &str, step: Step<'_>) -> Vec<String> {
    let Some(id) = step.id else { return Vec::new() };
    let whose = if STEPS_WITH_ALL_OF_THE_JOB.contains(&id) { "JOB" } else { "STEP" };
    let variable = format!("SLURM_{whose}_{}S", gres.to_ascii_uppercase());
    let Some(list) = step.variables.get_str(&variable) else { return Vec::new() };
    if !template.contains(UUID) {
        let numbers = list.split(',').map(str::trim).filter(|item| item.parse::<u32>().is_ok());
        return numbers.map(str::to_owned).collect();
    }
    let identifiers = IDENTIFIERS.iter().find_map(|name| step.variables.get_str(name));
    let identifiers = identifiers.unwrap_or(list).split(',').map(str::trim);
    identifiers.filter(|item| item.contains('-')).map(str::to_owned).collect()
}

fn name(template: &str, item: &str) -> Result<QualifiedName, InvalidName> {
    template.replace(INDEX, item).replace(UUID, item).parse()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mapping(entries: &[(&str, &str)]) -> Mapping {
        entries.iter().map(|(gres, template)| ((*gres).to_owned(), (*template).to_owned())).collect()
    }

    fn shown(mapping: &Mapping, id: Option<u32>, variables: &[&str]) -> String {
        let variables = variables.iter().collect();
        let devices = devices(mapping, Step { id, variables: &variables }).unwrap();
        devices.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn what_the_step_has() {
        let amd = mapping(&[("gpu", "amd.com/gpu={index}"), ("nic", "vendor.com/nic=port{index}")]);
        let variables = ["SLURM_STEP_GPUS=1,3,1", "SLURM_JOB_GPUS=0", "SLURM_STEP_NICS=2"];
        assert_eq!(shown(&amd, Some(0), &variables), "amd.com/gpu=1 amd.com/gpu=3 vendor.com/nic=port2");
        assert_eq!(shown(&amd, Some(0xffff_fffb), &variables), "amd.com/gpu=0");
        for nothing in [&["SLURM_JOB_GPUS=0"][..], &["SLURM_STEP_GPUS=NoDevFiles"], &["SLURM_STEP_GPUS="], &[]] {
            assert_eq!(shown(&amd, Some(3), nothing), "", "{nothing:?}");
        }
        // Outside Slurm nobody has given anything.
        assert_eq!(shown(&amd, None, &variables), "");
    }

    #[test]
    fn identifiers_and_fixed_names() {
        let parts = mapping(&[("gpu", "nvidia.com/gpu={uuid}")]);
        let variables = ["SLURM_STEP_GPUS=0", "CUDA_VISIBLE_DEVICES=MIG-1-2,MIG-3-4"];
        assert_eq!(shown(&parts, Some(0), &variables), "nvidia.com/gpu=MIG-1-2 nvidia.com/gpu=MIG-3-4");
        assert_eq!(shown(&parts, Some(0), &["SLURM_STEP_GPUS=0", "CUDA_VISIBLE_DEVICES=0"]), "");
        let all = mapping(&[("fpga", "vendor.com/fpga=all")]);
        assert_eq!(shown(&all, Some(0), &["SLURM_STEP_FPGAS=0,1"]), "vendor.com/fpga=all");
        assert!(maps(&all, &"vendor.com/fpga".parse().unwrap()) && !maps(&all, &"vendor.com/x".parse().unwrap()));
    }

    #[test]
    fn all_devices_are_all_of_the_steps() {
        let amd = mapping(&[("gpu", "amd.com/gpu={index}")]);
        let asked: Vec<QualifiedName> =
            ["amd.com/gpu=all", "v.com/x=all", "amd.com/gpu=1"].iter().map(|name| name.parse().unwrap()).collect();
        let variables = ["SLURM_STEP_GPUS=1,2"].iter().collect();
        let shown = |id| {
            let wanted = wanted(&asked, &amd, Step { id, variables: &variables }).unwrap();
            wanted.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(shown(Some(0)), "v.com/x=all amd.com/gpu=1 amd.com/gpu=2");
        assert_eq!(shown(None), "amd.com/gpu=all v.com/x=all amd.com/gpu=1");
    }

    #[test]
    fn a_mapping_that_is_none() {
        assert_eq!(check(&mapping(&[("gpu", "amd.com/gpu={index}"), ("x_1", "a.b/c={uuid}")])), Ok(()));
        let error = check(&mapping(&[("gpu", "amd.com/gpu")])).unwrap_err();
        assert!(error.starts_with("devices.gres.gpu: \"amd.com/gpu\" is no device name"), "{error}");
        assert!(check(&mapping(&[("gpu", "amd.com/gpu={number}")])).is_err());
        assert!(check(&mapping(&[("g pu", "amd.com/gpu=0")])).unwrap_err().starts_with("devices.gres.\"g pu\""));
    }
}
