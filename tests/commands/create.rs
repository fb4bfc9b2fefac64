//! `enroot create`, from files of several tools, and from hostile ones.

use std::path::Path;
use std::process::Command;

use testbed::images;
use testbed::process::output_of;

use crate::tree;
use crate::world::World;

fn mksquashfs(tree: &Path, file: &Path, options: &[&str]) {
    let mut command = Command::new("mksquashfs");
    output_of(command.arg(tree).arg(file).args(["-no-progress", "-quiet"]).args(options)).unwrap();
}

#[test]
fn images_of_mksquashfs_become_containers() {
    let world = World::new("create");
    let trees = images::feature_trees(&world.site.path("trees"), 300).unwrap();
    let mut expected = tree::as_imported(tree::read(&trees[0]), false);
    // Left out only where images of registries are concerned.
    expected.retain(|path, _| !path.starts_with("dev/"));
    for compression in ["gzip", "lzo", "lz4", "xz", "zstd"] {
        let file = world.site.path(&format!("{compression}.sqsh"));
        mksquashfs(&trees[0], &file, &["-comp", compression]);
        world.ok(&["create", file.to_str().unwrap()]);
        let root = world.home.join(".local/share/enroot").join(compression);
        tree::assert_same(&tree::read(&root), &expected);
        world.ok(&["remove", "-f", compression]);
    }
}

#[test]
fn names_and_files_that_cannot_be_are_named() {
    let world = World::new("create-names");
    let tree = world.site.make_directory("tree").unwrap();
    std::fs::write(tree.join("file"), "one").unwrap();
    let file = world.site.path("image.squashfs");
    mksquashfs(&tree, &file, &[]);
    let image = file.to_str().unwrap();
    world.ok(&["create", image]);
    world.ok(&["create", "--name", "named", image]);
    assert_eq!(world.ok(&["list"]), "image.squashfs\nnamed\n");
    let data = world.home.join(".local/share/enroot");
    let exists = format!("File already exists: {}", data.join("named").display());
    assert_eq!(world.error(&["create", "-n", "named", image]), exists);
    world.ok(&["create", "-f", "-n", "named", image]);
    let mut forced = world.command(&["create", "-n", "named", image]);
    output_of(forced.env("ENROOT_FORCE_OVERRIDE", "yes")).unwrap();
    assert_eq!(world.error(&["create", "-n", "a/b", image]), "Invalid argument: a/b");
    assert_eq!(world.error(&["create", "-n", "..", image]), "Invalid argument: ..");

    let missing = world.home.join("missing.sqsh");
    let missing = missing.to_str().unwrap();
    assert_eq!(world.error(&["create", missing]), format!("No such file or directory: {missing}"));
    assert_eq!(world.error(&["create", "/dev/urandom"]), "No such file or directory: /dev/urandom");
    assert_eq!(world.error(&["create", "/etc"]), "No such file or directory: /etc");
    assert_eq!(world.error(&["create", "/etc/passwd"]), "Invalid image format: /etc/passwd");
    assert_eq!(world.names(".local/share/enroot"), ["image.squashfs", "named"]);
}

#[test]
fn damaged_images_leave_nothing() {
    let world = World::new("create-damaged");
    let tree = world.site.make_directory("tree").unwrap();
    images::busybox_tree(&tree).unwrap();
    let file = world.site.path("good.sqsh");
    mksquashfs(&tree, &file, &[]);
    let good = std::fs::read(&file).unwrap();
    let bad = world.site.path("bad.sqsh");
    std::fs::write(&bad, &good[..good.len() / 2]).unwrap();
    let error = world.error(&["create", bad.to_str().unwrap()]);
    assert!(error.contains("truncated"), "{error}");
    // Somewhere in the data of busybox, and in the inode and directory tables near the end.
    for at in [1000, good.len() / 2, good.len() - 5000] {
        let mut bytes = good.clone();
        bytes[at..at + 64].iter_mut().for_each(|byte| *byte ^= 0xa5);
        std::fs::write(&bad, &bytes).unwrap();
        let output = world.run(&["create", "-n", "x", bad.to_str().unwrap()]);
        if output.status.success() {
            // It hit nothing that counts.
            world.ok(&["remove", "-f", "x"]);
        } else {
            assert!(output.stderr.lines().last().unwrap().starts_with("[ERROR] "), "{output}");
        }
        assert_eq!(world.names(".local/share/enroot"), [] as [&str; 0]);
    }
}

#[test]
fn an_image_may_not_be_larger_than_allowed() {
    let world = World::new("create-limits");
    let tree = world.site.make_directory("tree").unwrap();
    std::fs::write(tree.join("large"), vec![7; 3 << 20]).unwrap();
    let file = world.site.path("large.sqsh");
    mksquashfs(&tree, &file, &[]);
    for (limit, message) in [
        ("max_layer_bytes = 1000000", "the image unpacks to more than 1000000 bytes"),
        ("max_layer_entries = 0", "more than 0 files and directories"),
    ] {
        let config = world.site.write("etc/pyxis.toml", format!("[import]\n{limit}\n")).unwrap();
        let mut command = world.pyxis(&["--config", config.to_str().unwrap(), "create", file.to_str().unwrap()]);
        let output = testbed::process::run(&mut command, testbed::wait::DEADLINE).unwrap();
        assert!(output.code() == 1 && output.stderr.contains(message), "{output}");
        assert_eq!(world.names(".local/share/enroot"), [] as [&str; 0]);
    }
}
