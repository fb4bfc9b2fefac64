//! `make install`: what lands where.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use testbed::install::Build;
use testbed::process::output_of;

/// Runs `make install` with these variables besides the build's.
fn install(variables: &[String]) {
    let build = Build::of(env!("CARGO_BIN_EXE_pyxis"));
    let mut make = Command::new("make");
    make.args(["--directory", env!("CARGO_MANIFEST_DIR"), "--silent", "install"])
        .arg(format!("PLUGIN={}", build.plugin.display()))
        .arg(format!("EXECUTABLE={}", build.executable.display()))
        .args(variables)
        .env_remove("MAKEFLAGS");
    output_of(&mut make).unwrap();
}

/// Every file below `root` with its mode.
fn files(root: &Path) -> BTreeMap<String, u32> {
    let listing =
        output_of(Command::new("find").args([".", "-type", "f", "-printf", "%m %p\\n"]).current_dir(root)).unwrap();
    let lines = listing.lines().filter_map(|line| line.split_once(" ."));
    lines.map(|(mode, path)| (path.to_owned(), u32::from_str_radix(mode, 8).unwrap())).collect()
}

#[test]
fn a_package_gets_the_four_files() {
    let root = tempfile::tempdir().unwrap();
    let destination = [format!("DESTDIR={}", root.path().display())];
    install(&destination);
    let expected = [
        ("/etc/pyxis/pyxis.toml", 0o644),
        ("/usr/bin/pyxis", 0o755),
        ("/usr/lib/spank-pyxis/spank_pyxis.so", 0o644),
        ("/usr/share/pyxis/pyxis.conf", 0o644),
    ];
    assert_eq!(files(root.path()), expected.map(|(path, mode)| (path.to_owned(), mode)).into());
    assert_eq!(fs::read_link(root.path().join("usr/bin/enroot-mount")).unwrap(), Path::new("pyxis"));
    let line = fs::read_to_string(root.path().join("usr/share/pyxis/pyxis.conf")).unwrap();
    assert_eq!(line, "required /usr/lib/spank-pyxis/spank_pyxis.so\n");
    let enroot = root.path().join("usr/bin/enroot");
    assert_eq!(fs::read_link(&enroot).unwrap(), Path::new("pyxis"));
    // A real one stays.
    fs::remove_file(&enroot).unwrap();
    fs::write(&enroot, "real").unwrap();

    // Again: an administrator's configuration stays, running processes keep the file that they have mapped.
    let config = root.path().join("etc/pyxis/pyxis.toml");
    fs::write(&config, "# mine\n").unwrap();
    let plugin = root.path().join("usr/lib/spank-pyxis/spank_pyxis.so");
    let inode = || std::os::unix::fs::MetadataExt::ino(&fs::metadata(&plugin).unwrap());
    let before = inode();
    install(&destination);
    assert_eq!(fs::read_to_string(&config).unwrap(), "# mine\n");
    assert_ne!(inode(), before);
    assert_eq!(fs::read(&enroot).unwrap(), b"real");
    assert_eq!(files(root.path()).len(), 5);
}

#[test]
fn another_prefix_is_told_to_the_plugin() {
    let root = tempfile::tempdir().unwrap();
    let prefix = root.path().display();
    install(&[format!("PREFIX={prefix}")]);
    assert_eq!(
        fs::read_to_string(root.path().join("share/pyxis/pyxis.conf")).unwrap(),
        format!(
            "required {prefix}/lib/spank-pyxis/spank_pyxis.so executable={prefix}/bin/pyxis config={prefix}/etc/pyxis/pyxis.toml\n"
        )
    );
    assert_eq!(fs::metadata(root.path().join("etc/pyxis")).unwrap().permissions().mode() & 0o777, 0o755);
}
