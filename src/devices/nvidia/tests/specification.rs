//! GPUs by a CDI specification in place of our own search.

use super::*;

/// A specification of both GPUs, by number and by identifier, and of what is not one.
fn specification(nodes: &[(&str, &str)]) -> tempfile::TempDir {
    let device = |(name, node): &(&str, &str)| serde_json::json!({"name": name, "containerEdits": {"deviceNodes": [{"path": node}]}});
    let devices: Vec<_> = nodes.iter().map(device).collect();
    let text = serde_json::json!({"cdiVersion": "0.5.0", "kind": "nvidia.com/gpu", "devices": devices});
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("nvidia.json"), text.to_string()).unwrap();
    directory
}

#[test]
fn a_specification_takes_the_place_of_our_search() {
    use by_cdi::Way;
    let node = Node::with_gpus();
    let nodes = [
        ("0", "/dev/nvidia1"),
        ("1", "/dev/nvidia0"),
        (UUIDS[1], "/dev/nvidia1"),
        (UUIDS[0], "/dev/nvidia0"),
        ("all", "/dev/nvidia0"),
    ];
    let directory = specification(&nodes);
    let choose = |variables: &[&str], names: &[&str], directory: &Path| {
        let host = Host::at(node.directory.path());
        let variables: Environment = variables.iter().collect();
        let names: Vec<_> = names.iter().map(|name| name.parse().unwrap()).collect();
        let request = Request {
            host: &host,
            variables: &variables,
            container: &Environment::default(),
            job: &variables,
            step: Some(&StepFacts { job_id: 1, step_id: 0, local_tasks: 1, total_tasks: 1 }),
            refused: &DeviceAccess::default(),
            image: None,
        };
        match by_cdi::choose(&request, &[directory.to_owned()], &names, &mut || Err("NVML is not asked".into())) {
            Ok(Way::Cdi { names, edits, .. }) => {
                let names = names.iter().map(|name| name.to_string()).collect::<Vec<_>>();
                let hidden = edits.hidden.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
                format!("{} hides {}", names.join(" "), hidden.join(" "))
            }
            Ok(Way::Native(note)) => format!("native{}", note.map(|note| format!(": {note}")).unwrap_or_default()),
            Err(error) => error.to_string(),
        }
    };
    let with = |variables: &[&str], names: &[&str]| choose(variables, names, directory.path());
    // NVML's order is that of the bus, where number 1 comes first.
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=all"], &[]), "nvidia.com/gpu=0 nvidia.com/gpu=1 hides ");
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=0"], &[]), "nvidia.com/gpu=0 hides /dev/nvidia0");
    let given = "SLURM_STEP_GPUS=0";
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=all", given], &[]), "nvidia.com/gpu=1 hides /dev/nvidia1");
    // Not wanted, and wanted by name: then also without the variable.
    assert_eq!(with(&["NVIDIA_VISIBLE_DEVICES=void"], &[]), "native");
    assert_eq!(with(&[given], &["v.com/x=1", "nvidia.com/gpu=all"]), "v.com/x=1 nvidia.com/gpu=1 hides /dev/nvidia1");
    assert_eq!(with(&[given], &["nvidia.com/gpu=0"]), "nvidia.com/gpu=0 hides /dev/nvidia1");
    assert_eq!(with(&["SLURM_STEP_GPUS=NoDevFiles"], &["nvidia.com/gpu=all"]), " hides /dev/nvidia1 /dev/nvidia0");
    // Without one, or with one that is too old.
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(choose(&["NVIDIA_VISIBLE_DEVICES=all"], &[], empty.path()), "native");
    let old = specification(&nodes[1..2]);
    let note = choose(&["NVIDIA_VISIBLE_DEVICES=all"], &[], old.path());
    assert!(
        note.starts_with("native: the CDI specification of nvidia.com/gpu has no device for /dev/nvidia1"),
        "{note}"
    );
    let error = choose(&[], &["nvidia.com/gpu=all"], old.path());
    assert!(error.starts_with("the CDI specification of nvidia.com/gpu has no device for /dev/nvidia1"), "{error}");
}
