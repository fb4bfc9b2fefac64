//! `enroot bundle`, and what it makes: run as a user who has nothing else.

use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;

use testbed::process::{Output, run};
use testbed::wait;

use crate::world::World;

/// The small image as `x.sqsh`, and the path of what these arguments make of it.
fn bundle(name: &str, arguments: &[&str], variables: &[(&str, &str)]) -> (World, PathBuf) {
    let world = World::new(&format!("bundle-{name}"));
    world.push_busybox();
    world.ok(&["import", "-o", "x.sqsh", &world.uri("busybox")]);
    let mut command = world.command(&[&["bundle"], arguments, &["x.sqsh"]].concat());
    let output = run(command.envs(variables.iter().copied()), wait::DEADLINE).unwrap().success().unwrap();
    assert_eq!(output.stderr, "[INFO] Generating bundle...\n");
    std::fs::remove_file(world.home.join("x.sqsh")).unwrap();
    // Anywhere, under any name.
    let path = world.home.join("pyxis");
    std::fs::rename(world.home.join("x.run"), &path).unwrap();
    (world, path)
}

fn finish(mut command: Command) -> Output {
    run(&mut command, wait::DEADLINE).unwrap()
}

#[test]
fn a_bundle_is_a_container() {
    let (world, path) = bundle("runs", &["--desc", "a small\none"], &[]);
    let script = "id -u; head -n 1 /etc/os-release; touch /x 2>/dev/null || echo read-only; exit 4";
    let arguments = ["-e", "A=1", "sh", "-c", script];
    let expected = format!("{}\nID=busybox\nread-only\n", world.user.uid);
    // Without FUSE it is unpacked meanwhile.
    for (mode, progress) in [("0666", ""), ("0600", "[INFO] Extracting squashfs filesystem...\n")] {
        let output = finish(world.with_device(mode, &world.program(&path, &arguments)));
        assert_eq!((output.code(), output.stdout.as_str()), (4, expected.as_str()), "{output}");
        assert_eq!(output.stderr, progress);
        let root = ["-q", "--root", "--rw", "sh", "-c", "touch /x && id -u"];
        let output = finish(world.with_device(mode, &world.program(&path, &root))).success().unwrap();
        assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("0\n", ""));
        assert_eq!(crate::world::names(&world.site.path("tmp")), [] as [&str; 0]);
    }
    let info = finish(world.program(&path, &["--info"])).success().unwrap().stdout;
    assert!(info.starts_with("Name: x\nDescription: a small one\nImage: squashfs, "), "{info}");
    let help = finish(world.program(&path, &["--help"])).success().unwrap().stdout;
    assert!(help.contains("--extract") && help.contains("--conf") && !help.contains("import"), "{help}");
    assert_eq!(finish(world.program(&path, &["--nonsense"])).code(), 1);
    let verified = finish(world.with_device("0600", &world.program(&path, &["--verify"]))).success().unwrap().stdout;
    assert!(verified.starts_with("User namespaces: OK\nFUSE: not for this user"), "{verified}");
}

#[test]
fn a_bundle_can_be_unpacked() {
    let (world, path) = bundle("unpacked", &["--target", "unpacked"], &[("ENROOT_BUNDLE_CHECKSUM", "y")]);
    let verified = finish(world.program(&path, &["--verify"])).success().unwrap().stdout;
    assert!(verified.starts_with("Checksum: OK\n"), "{verified}");
    let keep = ["--keep", "--rw", "sh", "-c", "cat /kept; echo kept > /kept"];
    let first = finish(world.program(&path, &keep)).success().unwrap();
    assert_eq!((first.stdout.as_str(), first.stderr.lines().count()), ("", 2), "{first}");
    assert_eq!(finish(world.program(&path, &keep)).success().unwrap().stdout, "kept\n");
    assert_eq!(std::fs::read_to_string(world.home.join("unpacked/kept")).unwrap(), "kept\n");
    let output = finish(world.program(&path, &["--extract"]));
    let exists = format!("[ERROR] File already exists: {}\n", world.home.join("unpacked").display());
    assert_eq!((output.code(), output.stderr.as_str()), (1, exists.as_str()));
    std::fs::remove_dir_all(world.home.join("unpacked")).unwrap();
    finish(world.program(&path, &["--quiet", "-x"])).success().unwrap();
    assert!(world.home.join("unpacked/bin/busybox").exists());

    // One byte of the image is another one.
    let mut bytes = std::fs::read(&path).unwrap();
    let start = bytes.windows(4).rposition(|window| window == b"hsqs").unwrap();
    bytes[start + 200] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let output = finish(world.program(&path, &["--verify"]));
    assert!(output.code() == 1 && output.stderr.contains("Checksum mismatch"), "{output}");
}

#[test]
fn what_cannot_be_bundled_is_named() {
    let world = World::new("bundle-errors");
    let path = world.home.join("x");
    std::fs::write(&path, "no image").unwrap();
    assert_eq!(world.error(&["bundle", "x"]), format!("Invalid image format: {}", path.display()));
    let missing = world.error(&["bundle", "none"]);
    assert_eq!(missing, "No such file or directory: none");
    assert!(world.error(&["bundle", "--all", "x"]).starts_with("--all is not provided: "));
    world.push_busybox();
    world.ok(&["import", "-o", "y.sqsh", &world.uri("busybox")]);
    world.ok(&["bundle", "y.sqsh"]);
    let made = world.home.join("y.run");
    assert_eq!(std::fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o755);
    assert_eq!(world.error(&["bundle", "y.sqsh"]), format!("File already exists: {}", made.display()));
}
