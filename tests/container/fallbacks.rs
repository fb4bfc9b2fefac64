//! The ways that containers go on kernels which lack something: each is forced, and all tests of this suite have to pass.

use std::process::Command;

use crate::seed::{Node, WITHOUT};
use crate::{stdout, text};

/// Runs the suite without `feature`, but for the tests that are about that feature.
fn again(feature: &str, about_it: &[&str]) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.env(WITHOUT, feature).args(["--skip", "fallbacks::"]);
    // It looks for a process by its command line, on a machine on which the suites run side by side.
    command.args(["--skip", "a_hook_that_hangs_is_killed_with_all_it_started"]);
    command.args(about_it.iter().flat_map(|test| ["--skip", test]));
    let output = command.output().unwrap();
    assert!(output.status.success(), "without {feature}: {}{}", text(&output.stdout), text(&output.stderr));
    assert!(!text(&output.stdout).contains(" 0 passed"), "{}", text(&output.stdout));
}

fn node_without(feature: &str) -> Node {
    let node = Node::new();
    node.append_config(&format!("[debug]\nwithout = [{feature:?}]\n"));
    node
}

fn stored_layers(node: &Node) -> usize {
    std::fs::read_dir(node.layer_files()).unwrap().count()
}

#[test]
fn users_have_copies_of_layers_that_cannot_be_idmapped() {
    let node = node_without("idmapped-layers");
    let layers = stored_layers(&node);
    assert_eq!(stdout(node.run(&[], "stat -c %u:%g /bin/busybox; cat /layered")), "4242:4243\nupper");
    // One of each, for all starts of this user.
    assert_eq!(stored_layers(&node), 2 * layers);
    assert_eq!(stdout(node.run(&["--container-writable"], "rm /bin/only; ls /bin/only || echo gone")), "gone");
    assert_eq!(stored_layers(&node), 2 * layers);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert_eq!(stdout(node.run(&[], "id -u")), "4242"));
        }
    });
    // They go when nobody uses them.
    assert!(node.pyxis(&["gc", "--all"]).status.success());
    assert_eq!(stored_layers(&node), 0);
}

#[test]
fn the_suite_without_idmapped_layers() {
    again("idmapped-layers", &["metrics::"]);
}

#[test]
fn layers_may_be_mounted_over_loop_devices() {
    let node = node_without("layers-from-files");
    let _running = node.start("read x");
    assert!(node.layers_on_loop_devices() > 0);
    let usual = Node::new();
    let _other = usual.start("read x");
    assert_eq!(usual.layers_on_loop_devices(), 0);
}

#[test]
fn the_suite_with_loop_devices() {
    again("layers-from-files", &[]);
}

#[test]
fn containers_may_mount_their_layers_for_themselves() {
    let node = node_without("shared-layers");
    let _running = node.start("read x");
    assert_eq!(node.pinned_layers(), 0);
}

#[test]
fn the_suite_without_shared_layers() {
    again(
        "shared-layers",
        &[
            "a_layer_that_was_imported_anew_is_mounted_anew",
            "layers_that_erofs_cannot_read_directly_are_mounted_over_loop_devices",
        ],
    );
}

/// What the kernel can do is found once.
#[test]
fn the_kernel_is_tried_once() {
    let node = Node::new();
    assert_eq!(stdout(node.run(&[], "echo first")), "first");
    let known = node.runtime_file("kernel");
    assert_eq!(std::fs::read_to_string(&known).unwrap(), "{\"idmapped_layers\":true}");
    // What is written there counts until the next boot.
    std::fs::write(&known, "{\"idmapped_layers\":false}").unwrap();
    let layers = stored_layers(&node);
    assert_eq!(stdout(node.run(&[], "stat -c %u /bin/busybox")), "4242");
    assert_eq!(stored_layers(&node), 2 * layers);
    std::fs::write(&known, "no JSON").unwrap();
    assert_eq!(stdout(node.run(&[], "echo again")), "again");
    assert_eq!(std::fs::read_to_string(&known).unwrap(), "{\"idmapped_layers\":true}");
}
