//! What enroot's extra hooks add to a container's environment for its devices (behaviour reference, section 17): `50-sharp`,
//! `50-mig-config`.

#![forbid(unsafe_code)]

use super::infiniband;
use crate::request::Environment;

/// SHARP, the network's own reductions, for jobs with `--network=sharp`: what NCCL and SHARP need for it, unless the
/// container has other values.
pub fn sharp(task: &Environment, devices: Option<&[u8]>, container: &Environment) -> Vec<(String, String)> {
    let asked = task.get_str("SLURM_NETWORK").is_some_and(|network| network.split(',').any(|word| word == "sharp"));
    if !asked || infiniband::is_nothing(devices) {
        return Vec::new();
    }
    let nodes = task.get_str("SLURM_STEP_NUM_NODES").map(|nodes| ("NCCL_SHARP_GROUP_SIZE_THRESH", nodes));
    [
        ("SHARP_COLL_LOCK_ON_COMM_INIT", "1"),
        ("SHARP_COLL_NUM_COLL_GROUP_RESOURCE_ALLOC_THRESHOLD", "0"),
        ("NCCL_COLLNET_ENABLE", "1"),
    ]
    .into_iter()
    .chain(nodes)
    .filter(|(name, _)| container.get(name).is_none())
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .collect()
}

/// Whether a container of whole GPUs, `devices` by `NVIDIA_VISIBLE_DEVICES`, may divide them.
pub fn may_divide(devices: Option<&[u8]>) -> bool {
    match devices.map(String::from_utf8_lossy).as_deref() {
        None | Some("" | "void" | "none") => false,
        // Parts, by UUID or by the numbers of a GPU and of its part.
        Some(list) => !list.split(',').any(|word| word.contains("MIG-") || word.contains(':') && !is_address(word)),
    }
}

/// Whether it is an address on the PCI bus: `00000000:81:00.0`.
fn is_address(word: &str) -> bool {
    word.contains('.')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn environment(lines: &[&str]) -> Environment {
        lines.iter().collect()
    }

    #[test]
    fn sharp_is_for_jobs_that_ask_for_it() {
        let task = environment(&["SLURM_NETWORK=sharp", "SLURM_STEP_NUM_NODES=4"]);
        let container = environment(&["NCCL_COLLNET_ENABLE=0"]);
        let set = sharp(&task, Some(b"all"), &container);
        let lines: Vec<String> = set.iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            lines,
            [
                "SHARP_COLL_LOCK_ON_COMM_INIT=1",
                "SHARP_COLL_NUM_COLL_GROUP_RESOURCE_ALLOC_THRESHOLD=0",
                "NCCL_SHARP_GROUP_SIZE_THRESH=4"
            ]
        );
        for (task, devices) in [
            (&environment(&[]), Some(&b"all"[..])),
            (&environment(&["SLURM_NETWORK=ip"]), Some(b"all")),
            (&task, None),
            (&task, Some(b"none")),
        ] {
            assert_eq!(sharp(task, devices, &container), []);
        }
    }

    #[test]
    fn whole_gpus_may_be_divided() {
        for whole in ["all", "0", "0,1", "GPU-1234", "00000000:81:00.0"] {
            assert!(may_divide(Some(whole.as_bytes())), "{whole}");
        }
        for not in [None, Some(""), Some("void"), Some("none"), Some("MIG-1234"), Some("0:1"), Some("0,1:0")] {
            assert!(!may_divide(not.map(str::as_bytes)), "{not:?}");
        }
    }
}
