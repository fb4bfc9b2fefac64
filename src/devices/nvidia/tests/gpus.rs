//! Which GPUs a container gets.

use super::*;

#[test]
fn void_leaves_everything_alone_but_what_is_not_the_jobs() {
    let node = Node::with_gpus();
    for image in [&["NVIDIA_VISIBLE_DEVICES=void"][..], &["NVIDIA_VISIBLE_DEVICES="], &[]] {
        assert_eq!(node.plan(image), ContainerEdits::default());
    }
    let edits = node.plan_for(&["SLURM_STEP_GPUS=1"], &[], &[]).unwrap();
    assert_eq!(hidden(&edits), ["/dev/nvidia0"]);
    assert_eq!(edits.gpu_numbers, [(1, 0)]);
    assert!(edits.device_nodes.is_empty() && edits.mounts.is_empty());
}

#[test]
fn none_is_the_driver_without_gpus() {
    let edits = Node::with_gpus().plan(&["NVIDIA_VISIBLE_DEVICES=none", "NVIDIA_REQUIRE_CUDA=cuda>=99"]);
    assert_eq!(nodes(&edits), ["nvidiactl"]);
    assert_eq!(hidden(&edits), ["/dev/nvidia1", "/dev/nvidia0"]);
    assert!(library(&edits, "libnvidia-ml").is_some() && targets(&edits).contains(&"/usr/bin/nvidia-smi"));
}

#[test]
fn a_job_sees_what_it_has() {
    let node = Node::with_gpus();
    let image = ["NVIDIA_VISIBLE_DEVICES=all"];
    // By the device cgroup: Slurm counts what the job can open.
    let edits = node.plan_for(&[], &image, &[1]).unwrap();
    assert_eq!((nodes(&edits), hidden(&edits)), (vec!["nvidiactl", "nvidia0"], vec!["/dev/nvidia1"]));
    assert_eq!(edits.gpu_numbers, []);
    // By what Slurm says: it means device nodes.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=1"], &image, &[]).unwrap();
    assert_eq!((nodes(&edits), hidden(&edits)), (vec!["nvidiactl", "nvidia1"], vec!["/dev/nvidia0"]));
    assert_eq!(edits.gpu_numbers, [(1, 0)]);
    // Both: as outside.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=0,1"], &image, &[]).unwrap();
    assert_eq!((hidden(&edits).len(), edits.gpu_numbers), (0, vec![]));
    // Of both the user wants one.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=0,1", "NVIDIA_VISIBLE_DEVICES=1"], &image, &[]).unwrap();
    assert_eq!((hidden(&edits), edits.gpu_numbers.clone()), (vec!["/dev/nvidia1"], vec![(0, 0)]));
    // None.
    let edits = node.plan_for(&[], &image, &[0, 1]).unwrap();
    assert_eq!((nodes(&edits), hidden(&edits)), (vec!["nvidiactl"], vec!["/dev/nvidia1", "/dev/nvidia0"]));
    let error = node.plan_for(&["NVIDIA_VISIBLE_DEVICES=0"], &[], &[0, 1]).unwrap_err();
    assert_eq!(error, "nvidia-container-cli: device error: 0: unknown device; this job has no GPU on this node");
}

#[test]
fn parts_of_gpus() {
    let node = Node::with_gpus();
    node.divide(0);
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=1:1", "NVIDIA_MIG_MONITOR_DEVICES=all"]);
    assert_eq!(nodes(&edits)[..2], ["nvidiactl", "nvidia0"]);
    assert_eq!(nodes(&edits)[2..], ["nvidia-caps/nvidia-cap5", "nvidia-caps/nvidia-cap6", "nvidia-caps/nvidia-cap2"]);
    assert_eq!(hidden(&edits), ["/dev/nvidia1", "/dev/nvidia-caps/nvidia-cap3", "/dev/nvidia-caps/nvidia-cap4"]);
    let mig = "/proc/driver/nvidia/capabilities/gpu0/mig";
    let capabilities: Vec<&str> =
        targets(&edits).into_iter().filter(|target| target.contains("capabilities")).collect();
    assert_eq!(
        capabilities,
        [
            format!("{mig}/gi2/access"),
            format!("{mig}/gi2/ci0/access"),
            "/proc/driver/nvidia/capabilities/mig/monitor".into()
        ]
    );
    // Slurm's numbers of parts are nobody else's.
    let edits = node.plan_for(&["SLURM_STEP_GPUS=5"], &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap();
    assert_eq!(edits.device_nodes.len(), 3 + 4);
}

/// Three GPUs with the minors 0, 1, 2, in a node that Slurm manages.
#[test]
fn a_step_that_joins_has_the_containers_numbers() {
    let gpu = |minor: u32| driver::Gpu {
        bus: driver::BusId::parse(&format!("{minor}:0.0")).unwrap(),
        directory: String::new(),
        uuid: None,
        minor,
        instances: vec![],
    };
    let driver = Driver { version: String::new(), gpus: (0..3).map(gpu).collect() };
    let joining = |own: &str, refused: &[u32], shown: &[u32]| {
        let refused = refused.iter().map(|minor| format!("nvidia{minor}")).collect();
        let job = [format!("SLURM_STEP_GPUS={own}")].iter().collect();
        let step = StepFacts { job_id: 1, step_id: 1, local_tasks: 1, total_tasks: 1 };
        let allocation = Allocation::of(&Host::at("/nonexistent"), &driver, Some(&step), &job, &refused);
        numbers_of_joining(&driver, &allocation, shown)
    };
    // Slurm's numbers are those of the nodes, and the container counts what it has.
    assert_eq!(joining("1", &[], &[1, 2]), (vec![(1, 0)], None));
    assert_eq!(joining("0,1", &[], &[0, 1]), (vec![], None));
    let (numbers, text) = joining("0,2", &[], &[1, 2]);
    assert_eq!(numbers, [(2, 1)]);
    let expected = "the running container has the GPUs of the step that made it, and not /dev/nvidia0 of this step";
    assert_eq!(text.as_deref(), Some(expected));
    // With a device cgroup both count what they can open.
    assert_eq!(joining("1", &[0, 2], &[0, 1]), (vec![], None));
    assert_eq!(joining("1,2", &[0], &[0, 2]).0, [(1, 0)]);
    // Without GPUs of Slurm's there is nothing to say.
    let nobody =
        Allocation::of(&Host::at("/nonexistent"), &driver, None, &Environment::default(), &DeviceAccess::default());
    assert_eq!(numbers_of_joining(&driver, &nobody, &[0]), (vec![], None));
}
