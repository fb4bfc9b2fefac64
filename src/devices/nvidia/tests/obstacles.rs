//! Nodes, drivers and images that do not fit together.

use super::*;

#[test]
fn requirements() {
    let node = Node::with_gpus();
    let plan = |requirement: &str| {
        let requirement = format!("NVIDIA_REQUIRE_CUDA={requirement}");
        node.plan_for(&[], &["NVIDIA_VISIBLE_DEVICES=all", &requirement], &[])
    };
    assert!(plan("cuda>=13.0 brand=tesla,driver>=535,driver<536").is_ok());
    assert!(plan("brand=nvidia,arch>=9.0").is_ok());
    assert_eq!(
        plan("cuda>=13.1 brand=tesla,driver>=535").unwrap_err(),
        "nvidia-container-cli: requirement error: unsatisfied condition: cuda>=13.1 brand=tesla,driver>=535, please update \
         your driver to a newer version, or use an earlier cuda container (this node has CUDA 13.0, driver 580.159.04, brand \
         nvidia, arch 9.0; NVIDIA_DISABLE_REQUIRE=1 starts it all the same)"
    );
    let job = ["NVIDIA_DISABLE_REQUIRE=1"];
    assert!(node.plan_for(&job, &["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99"], &[]).is_ok());
}

#[test]
fn an_nvml_that_does_not_answer_is_said_and_no_obstacle() {
    let node = Node::with_gpus();
    let job = Environment::default();
    let image = ["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_REQUIRE_CUDA=cuda>=99"].iter().collect();
    let request = Request {
        host: &Host::at(node.directory.path()),
        variables: &job,
        container: &image,
        job: &job,
        step: None,
        refused: &DeviceAccess::default(),
        image: None,
    };
    let edits = plan(&request, &mut || Err("nvmlInit: Unknown Error".into())).unwrap();
    assert!(edits.notices[0].ends_with("was not checked: nvmlInit: Unknown Error"), "{:?}", edits.notices);
    let image = ["NVIDIA_VISIBLE_DEVICES=MIG-4"].iter().collect();
    node.divide(0);
    let request = Request { container: &image, ..request };
    let error = plan(&request, &mut || Err("nvmlInit: Unknown Error".into())).unwrap_err();
    assert_eq!(error.to_string(), "nvidia-container-cli: nvml error: MIG-4: nvmlInit: Unknown Error");
}

#[test]
fn a_driver_that_was_upgraded_while_loaded() {
    let node = Node::with_gpus();
    node.install("585.10.01");
    for file in std::fs::read_dir(node.path("/usr/local/nvidia/lib64")).unwrap() {
        let path = file.unwrap().path();
        if path.to_str().unwrap().contains(VERSION) {
            std::fs::remove_file(path).unwrap();
        } else if path.is_symlink() {
            let name = path.file_name().unwrap().to_str().unwrap().split_once(".so").unwrap().0;
            std::fs::remove_file(&path).unwrap();
            symlink(format!("{name}.so.585.10.01"), &path).unwrap();
        }
    }
    let error = node.plan_for(&[], &["NVIDIA_VISIBLE_DEVICES=all"], &[]).unwrap_err();
    assert!(error.contains("version mismatch: kernel module 580.159.04, libraries 585.10.01:"), "{error}");
    // Nothing of it concerns a job without GPUs.
    assert!(node.plan_for(&[], &["NVIDIA_VISIBLE_DEVICES=all"], &[0, 1]).is_ok());
    std::fs::remove_file(node.path("/etc/ld.so.cache")).unwrap();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all"]);
    assert!(edits.notices[0].contains("run ldconfig there"), "{:?}", edits.notices);
}

#[test]
fn what_is_missing_on_the_node_is_said() {
    let node = Node::with_gpus();
    for name in ["nvidia-uvm", "nvidia0"] {
        std::fs::remove_file(node.path(&format!("/dev/{name}"))).unwrap();
    }
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute"]);
    assert!(edits.notices[0].contains("/dev/nvidia0 is missing"), "{:?}", edits.notices);
    assert!(edits.notices[1].contains("nvidia_uvm is not loaded"), "{:?}", edits.notices);
    assert_eq!(nodes(&edits), ["nvidiactl", "nvidia1", "nvidia-uvm-tools"]);
    // Libraries that the linker's cache has.
    let node = Node::with_gpus();
    let library = node.path(&format!("/usr/local/nvidia/lib64/libcuda.so.{VERSION}"));
    std::fs::remove_file(library).unwrap();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=compute,utility"]);
    assert_eq!((edits.notices.len(), edits.libraries.len()), (1, 2), "{edits:?}");
    let text = "NVIDIA: libraries in this node's /etc/ld.so.cache are gone, and programs will not find them: /usr/l";
    assert!(
        edits.notices[0].starts_with(text) && edits.notices[0].contains("/libcuda.so.1; install the driver's"),
        "{:?}",
        edits.notices
    );
    // What is not wanted is not missed.
    assert_eq!(node.plan(&["NVIDIA_VISIBLE_DEVICES=all"]).notices, [""; 0]);
}

#[test]
fn without_a_driver_images_start_and_wishes_fail() {
    let node = Node::bare();
    let edits = node.plan(&["NVIDIA_VISIBLE_DEVICES=all", "NVIDIA_DRIVER_CAPABILITIES=whatever"]);
    let notices = edits.notices.clone();
    assert_eq!(edits, ContainerEdits { notices, ..ContainerEdits::default() });
    assert!(edits.notices[0].starts_with("no NVIDIA driver is loaded on this node"), "{:?}", edits.notices);
    for value in ["", "void", "none", "all"] {
        let job = format!("NVIDIA_VISIBLE_DEVICES={value}");
        assert_eq!(node.plan_for(&[&job], &["NVIDIA_VISIBLE_DEVICES=all"], &[]), Ok(ContainerEdits::default()));
    }
    let error = node.plan_for(&["NVIDIA_VISIBLE_DEVICES=0"], &[], &[]).unwrap_err();
    assert!(error.contains("no NVIDIA driver is loaded on this node"), "{error}");
}
