//! What of the driver a container gets.

use std::os::unix::net::UnixListener;

use super::*;
use crate::devices::edits::Origin;
use crate::mounts::entry::Action;

#[test]
fn a_cuda_image_gets_the_driver_and_all_gpus() {
    let node = Node::with_gpus();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
    assert_eq!(nodes(&edits), ["nvidiactl", "nvidia1", "nvidia0", "nvidia-uvm", "nvidia-uvm-tools"]);
    assert!(edits.device_nodes.iter().all(|node| node.path == node.host_path && !node.optional));
    let names: Vec<Vec<&str>> =
        edits.libraries.iter().map(|library| library.names.iter().map(String::as_str).collect()).collect();
    assert_eq!(
        names,
        [
            vec!["libcuda.so.580.159.04", "libcuda.so", "libcuda.so.1"],
            vec!["libnvidia-ml.so.580.159.04", "libnvidia-ml.so.1"],
            vec!["libnvidia-nvvm.so.580.159.04", "libnvidia-nvvm.so.4"],
        ]
    );
    assert_eq!(edits.libraries[0].path, PathBuf::from("/usr/local/nvidia/lib64/libcuda.so.580.159.04"));
    assert_eq!(
        targets(&edits),
        [
            "/proc/driver/nvidia",
            "/proc/driver/nvidia/gpus/0000:00:06.0",
            "/proc/driver/nvidia/gpus/0000:00:07.0",
            "/usr/bin/nvidia-smi",
            "/usr/bin/nvidia-cuda-mps-control",
            "/lib/firmware/nvidia/580.159.04/gsp_ga10x.bin",
            "/lib/firmware/nvidia/580.159.04/gsp_tu10x.bin",
        ]
    );
    let read_only = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;
    for mount in edits.mounts.iter().filter(|mount| matches!(mount.action, Action::Bind { .. })) {
        assert_eq!(mount.set & read_only, read_only, "{mount:?}");
    }
    assert_eq!((hidden(&edits), edits.gpu_numbers.len(), edits.notices.len()), (vec![], 0, 0));
}

#[test]
fn capabilities_choose_libraries_and_nodes() {
    let node = Node::with_gpus();
    node.write("/dev/nvidia-modeset", "");
    node.write("/dev/gdrdrv", "");
    let of = |capabilities: &str| {
        node.plan(&["NVIDIA_VISIBLE_DEVICES=0", &format!("NVIDIA_DRIVER_CAPABILITIES={capabilities}")])
    };
    let has = |edits: &ContainerEdits, names: &[&str]| names.iter().all(|name| library(edits, name).is_some());
    let utility = of("");
    assert_eq!(utility.libraries.len(), 1);
    assert!(has(&utility, &["libnvidia-ml"]));
    assert_eq!(nodes(&utility), ["nvidiactl", "nvidia1"]);
    let compute = of("compute");
    assert_eq!(compute.libraries.len(), 2);
    assert!(nodes(&compute).ends_with(&["nvidia-uvm", "nvidia-uvm-tools", "gdrdrv"]), "{:?}", nodes(&compute));
    let video = of("video");
    assert!(has(&video, &["libcuda", "libnvidia-encode"]));
    assert_eq!(
        library(&video, "libnvidia-opticalflow").unwrap().names,
        ["libnvidia-opticalflow.so.580.159.04", "libnvidia-opticalflow.so", "libnvidia-opticalflow.so.1"]
    );
    for (capability, has_modeset) in [("graphics", false), ("display", true)] {
        let edits = of(capability);
        let names = ["libGLX_nvidia.so.580.159.04", "libGLX_indirect.so.0", "libGLX_nvidia.so.0"];
        assert_eq!(library(&edits, "libGLX_nvidia").unwrap().names, names);
        assert_eq!(library(&edits, "libnvidia-glcore").unwrap().names, ["libnvidia-glcore.so.580.159.04"]);
        assert_eq!(nodes(&edits).contains(&"nvidia-modeset"), has_modeset);
        let profile = edits.files.last().unwrap();
        let content: serde_json::Value =
            serde_json::from_str(&String::from_utf8_lossy(&profile.content).replace("0x2]", "2]")).unwrap();
        assert_eq!(content["profiles"][0]["settings"][1], 2);
    }
}

/// An image for a newer CUDA than the driver's.
#[test]
fn the_newer_cuda_counts() {
    let node = Node::with_gpus();
    let image = tempfile::tempdir().unwrap();
    let directory = image.path().join("usr/local/cuda/compat");
    std::fs::create_dir_all(&directory).unwrap();
    let root = std::fs::File::open(image.path()).unwrap();
    let root = RootDir::new(std::os::fd::AsFd::as_fd(&root));
    let plan = |capabilities: &str, devices: &str, brand: &str| {
        let image = [format!("NVIDIA_VISIBLE_DEVICES={devices}"), format!("NVIDIA_DRIVER_CAPABILITIES={capabilities}")];
        node.plan_in(&[], &image.each_ref().map(String::as_str), &[], Some(root), brand).unwrap()
    };
    let of_image = |edits: &ContainerEdits| edits.libraries.iter().filter(|one| one.origin == Origin::Image).count();
    for (version, newer) in [("580.999.99", false), ("575.57.08", false), ("590.44.01", true)] {
        let file = directory.join(format!("libcuda.so.{version}"));
        std::fs::write(&file, "").unwrap();
        let edits = plan("compute,utility", "all", "tesla");
        assert_eq!((of_image(&edits), edits.log.len()), (usize::from(newer), usize::from(newer)), "{version}");
        if newer {
            assert_eq!(edits.libraries[0].names, ["libcuda.so.580.159.04"]);
            assert!(edits.log[0].contains("driver 590.44.01"), "{edits:?}");
            // GPUs that refuse it, and containers without CUDA or GPUs.
            let consumer = plan("compute", "all", "geforcertx");
            assert_eq!((of_image(&consumer), consumer.log.len()), (0, 1));
            assert_eq!(of_image(&plan("utility", "all", "tesla")) + of_image(&plan("compute", "none", "tesla")), 0);
        }
        std::fs::remove_file(file).unwrap();
    }
}

#[test]
fn services_channels_storage() {
    let node = Node::with_gpus();
    let directory = node.path("/run/nvidia-persistenced");
    std::fs::create_dir_all(&directory).unwrap();
    let _socket = UnixListener::bind(directory.join("socket")).unwrap();
    for path in ["/tmp/nvidia-mps/control", "/etc/cufile.json", "/dev/nvidia-fs0", "/dev/nvidia-fs1", "/dev/nvidia-fsx"]
    {
        node.write(path, "");
    }
    for channel in ["channel0", "channel1", "other"] {
        node.write(&format!("/dev/nvidia-caps-imex-channels/{channel}"), "");
    }
    for switch in ["nvidia-nvswitchctl", "nvidia-nvswitch0"] {
        node.write(&format!("/dev/{switch}"), "");
    }
    let all = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
    let services = ["/dev/nvidia-caps-imex-channels", "/run/nvidia-persistenced/socket", "/tmp/nvidia-mps"];
    let has: Vec<&str> = targets(&all).into_iter().filter(|target| services.contains(target)).collect();
    assert_eq!(has, services);
    assert!(!nodes(&all).iter().any(|node| node.contains("-fs") || node.contains("nvswitch")));
    let job = ["NVIDIA_GDS=enabled", "NVIDIA_NVSWITCH=enabled", "NVIDIA_IMEX_CHANNELS=1"];
    let some = node.plan_for(&job, &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap();
    assert_eq!(
        nodes(&some)[3..],
        ["nvidia-nvswitchctl", "nvidia-nvswitch0", "nvidia-fs0", "nvidia-fs1", "nvidia-caps-imex-channels/channel1"]
    );
    assert_eq!(hidden(&some), ["/dev/nvidia-caps-imex-channels/channel0"]);
    assert!(targets(&some).contains(&"/etc/cufile.json") && !targets(&some).contains(&"/tmp/nvidia-mps"));
    let error = node.plan_for(&["NVIDIA_IMEX_CHANNELS=7"], &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap_err();
    assert!(error.ends_with("NVIDIA_IMEX_CHANNELS: 7: unknown channel on this node"), "{error}");
}

#[test]
fn procfs_shows_the_chosen_gpus_only() {
    let edits = Node::with_gpus().plan(&["NVIDIA_VISIBLE_DEVICES=0"]);
    assert_eq!(targets(&edits)[..2], ["/proc/driver/nvidia", "/proc/driver/nvidia/gpus/0000:00:06.0"]);
    assert_eq!(targets(&edits).iter().filter(|target| target.contains("gpus")).count(), 1);
    let content = |name: &str| {
        let file = edits.files.iter().find(|file| file.path == Path::new(PROC).join(name)).unwrap();
        (String::from_utf8_lossy(&file.content).into_owned(), file.mode)
    };
    assert_eq!(content("params"), ("RmLogonRC: 1\nModifyDeviceFiles: 0\nDeviceFileMode: 438\n".into(), 0o444));
    assert!(content("version").0.contains(VERSION));
    assert_eq!(content("registry").0, "Binary: \"\"\n");
    assert_eq!(hidden(&edits), ["/dev/nvidia0"]);
}
