//! The testbed itself, without Pyxis: steps run, images arrive, nothing is left.

use std::path::PathBuf;
use std::process::Command;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::image::Compression;
use testbed::registry::{Account, Registry, RegistryOptions};
use testbed::{Cluster, ClusterOptions, Site, clean, images, node, process, wait};

#[test]
fn steps_run_on_separate_nodes_and_leave_nothing() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create(&format!("plain-{}", std::process::id())).unwrap();
    let directory = site.path("");
    let mut cluster = Cluster::start(&site, &ClusterOptions::default()).unwrap();

    let output = cluster.srun(["-N2", "sh", "-c", "id -un; readlink /proc/self/ns/pid; ls -di /run/pyxis"]).unwrap();
    let output = output.success().unwrap().stdout;
    assert_eq!(output.matches("pyxis-test-1").count(), 2, "{output}");
    let distinct: std::collections::BTreeSet<_> = output.lines().filter(|line| !line.contains("test-1")).collect();
    assert_eq!(distinct.len(), 4, "nodes share nothing: {output}");
    assert_eq!(cluster.srun(["sh", "-c", "exit 7"]).unwrap().code(), 7);

    // A process that a step leaves behind is seen.
    cluster.srun(["sh", "-c", "setsid sleep 1000 >/dev/null 2>&1 </dev/null &"]).unwrap().success().unwrap();
    // (The step's manager may still be on its way out.)
    let mut stray: Vec<node::NodeProcess> = cluster.nodes().iter().flat_map(node::Node::processes).collect();
    stray.retain(|process| process.uid != 0);
    assert_eq!(stray.len(), 1, "{stray:?}");
    kill(Pid::from_raw(stray[0].pid), Signal::SIGKILL).unwrap();
    clean::check(&mut cluster).unwrap();

    // A stopped slurmd comes back.
    cluster.nodes_mut()[0].stop_slurmd();
    cluster.nodes_mut()[0].start_slurmd(&site).unwrap();
    wait::until("a step on node1", wait::DEADLINE, || cluster.srun(["-w", "node1", "true"]).ok()?.success().ok())
        .unwrap();

    drop(cluster);
    drop(site);
    assert!(!directory.exists());
}

#[test]
fn registries_take_images_and_ask_for_passwords() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create(&format!("registry-{}", std::process::id())).unwrap();
    let open = Registry::start(&site, "open", RegistryOptions::default()).unwrap();
    let account = Account { user: "somebody".into(), password: "secret word".into() };
    let options = RegistryOptions { accounts: vec![account.clone()], tokens: true, ..RegistryOptions::default() };
    let with_tokens = Registry::start(&site, "tokens", options).unwrap();
    let closed = Registry::start(
        &site,
        "closed",
        RegistryOptions { accounts: vec![account.clone()], tls: true, ..RegistryOptions::default() },
    )
    .unwrap();

    let mixed = [Compression::Gzip, Compression::Zstd, Compression::None];
    let trees = images::feature_trees(&site.path("trees"), 500).unwrap();
    let image = images::features(&site.path("mixed"), &trees, mixed).unwrap();
    open.push(&image, "library/features:latest").unwrap();
    with_tokens.push(&image, "public/features:latest").unwrap();
    assert!(with_tokens.tokens().unwrap().issued() > 0);
    closed.push(&image, "library/features:latest").unwrap();
    assert_eq!(open.digest("library/features").unwrap(), closed.digest("library/features").unwrap());

    // Independent judge of the layout: umoci (which knows no zstd) understands it, and the whiteouts do what they should.
    let image = images::features(&site.path("features"), &trees, [Compression::Gzip; 3]).unwrap();
    let bundle: PathBuf = site.path("bundle");
    let mut unpack = Command::new("umoci");
    unpack.args(["unpack", "--image", image.trim_start_matches("oci:")]).arg(&bundle);
    process::output_of(&mut unpack).unwrap();
    let root = bundle.join("rootfs");
    assert!(root.join("kept/file").exists() && root.join("opaque/new").exists());
    assert!(!root.join("gone-file").exists() && !root.join("opaque/old").exists());
    assert_eq!(std::fs::read_dir(root.join("crowd")).unwrap().count(), 500);
}
