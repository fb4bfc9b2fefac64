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

/// Every file below `root` with its mode, but for man pages and completions.
fn files(root: &Path) -> BTreeMap<String, u32> {
    let listing =
        output_of(Command::new("find").args([".", "-type", "f", "-printf", "%m %p\\n"]).current_dir(root)).unwrap();
    let lines = listing.lines().filter_map(|line| line.split_once(" .")).filter(|(_, path)| !is_generated(path));
    lines.map(|(mode, path)| (path.to_owned(), u32::from_str_radix(mode, 8).unwrap())).collect()
}

fn is_generated(path: &str) -> bool {
    ["/man/", "/bash-completion/", "/zsh/", "/fish/"].iter().any(|part| path.contains(part))
}

/// Man pages and completions of what is installed, for shells that are there to judge.
#[test]
fn every_command_has_a_man_page() {
    let root = tempfile::tempdir().unwrap();
    install(&[format!("DESTDIR={}", root.path().display())]);
    let share = root.path().join("usr/share");
    let help = output_of(Command::new(root.path().join("usr/bin/pyxis")).arg("help")).unwrap();
    let commands =
        help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| line.starts_with("  "));
    let commands: Vec<&str> =
        commands.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").collect();
    assert!(commands.contains(&"inspect") && commands.contains(&"import"), "{help}");
    let completion = fs::read_to_string(share.join("bash-completion/completions/pyxis")).unwrap();
    for command in commands {
        let page = share.join(format!("man/man1/pyxis-{command}.1"));
        assert_eq!(fs::metadata(&page).unwrap().permissions().mode() & 0o777, 0o644, "{command}");
        assert!(fs::read_to_string(&page).unwrap().contains(".SH DESCRIPTION"), "{command}");
        assert!(completion.contains(command), "{command}");
    }
    output_of(Command::new("bash").arg("-n").arg(share.join("bash-completion/completions/pyxis"))).unwrap();
    assert!(share.join("zsh/site-functions/_pyxis").is_file());
    assert!(share.join("fish/vendor_completions.d/pyxis.fish").is_file());
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
