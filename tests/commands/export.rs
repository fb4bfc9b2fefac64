//! `enroot export`, and the round trip.

use std::process::Command;

use testbed::process::output_of;

use crate::tree;
use crate::world::World;

#[test]
fn a_container_goes_round() {
    let world = World::new("export");
    world.push_busybox();
    world.ok(&["load", "-n", "box", &world.uri("busybox")]);
    let root = world.home.join(".local/share/enroot/box");
    // What a start leaves behind, and what a user adds.
    let script = "cd ~/.local/share/enroot/box && mkdir -m 0 stub && touch file-stub .lock && chmod 0 file-stub && \
                  mkdir dev && touch dev/null && echo mine > mine && ln mine mine-too && chmod 600 mine && \
                  echo secret > secret && chmod 0 secret";
    output_of(world.user.command("sh").args(["-c", script]).env("HOME", &world.home)).unwrap();
    let output = world.run(&["export", "box"]).success().unwrap();
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("", "[INFO] Creating squashfs filesystem...\n"));

    let exists = format!("File already exists: {}", world.home.join("box.sqsh").display());
    assert_eq!(world.error(&["export", "box"]), exists);
    world.ok(&["export", "--force", "--output", "box.sqsh", "box"]);
    assert_eq!(world.names(""), [".cache", ".local", "box.sqsh"]);

    world.ok(&["create", "-n", "again", "box.sqsh"]);
    let mut expected = tree::read(&root);
    expected.retain(|path, _| !["stub", "file-stub", ".lock", "dev/null"].contains(&path.as_str()));
    // As every unpacked file is.
    expected.get_mut("secret").unwrap().mode = 0o400;
    let again = tree::read(&world.home.join(".local/share/enroot/again"));
    tree::assert_same(&again, &expected);
    let listing = output_of(Command::new("unsquashfs").args(["-lln"]).arg(world.home.join("box.sqsh"))).unwrap();
    assert!(
        listing.lines().filter(|line| line.contains("squashfs-root")).all(|line| line.contains(" 0/0 ")),
        "{listing}"
    );
}

#[test]
fn what_cannot_be_exported_is_named() {
    let world = World::new("export-errors");
    let data = world.home.join(".local/share/enroot");
    assert_eq!(world.error(&["export", "none"]), format!("No such file or directory: {}", data.join("none").display()));
    assert_eq!(world.error(&["export", "../x"]), "Invalid argument: ../x");
    world.push_busybox();
    world.ok(&["load", "-n", "box", &world.uri("busybox")]);
    assert_eq!(world.error(&["export", "-o", "no/where.sqsh", "box"]), "No such file or directory: no");
    std::fs::write(world.home.join("old.sqsh"), "old").unwrap();
    assert!(world.error(&["export", "-o", "old.sqsh", "box"]).starts_with("File already exists: "));
    let mut command = world.command(&["export", "-f", "-o", "old.sqsh", "box"]);
    let output =
        testbed::process::run(command.env("ENROOT_SQUASH_OPTIONS", "-comp lzma"), testbed::wait::DEADLINE).unwrap();
    assert!(output.code() == 1 && output.stderr.contains("[ERROR] ENROOT_SQUASH_OPTIONS: "), "{output}");
    assert_eq!(std::fs::read(world.home.join("old.sqsh")).unwrap(), b"old");
}
