//! `enroot list`, `remove` and the command line itself.

use std::process::Stdio;

use testbed::process::Running;
use testbed::wait;

use crate::world::World;

#[test]
fn containers_are_listed_and_removed() {
    let world = World::new("containers");
    world.push_busybox();
    assert_eq!(world.ok(&["list"]), "");
    for name in ["b", "a"] {
        world.ok(&["load", "-n", name, &world.uri("busybox")]);
    }
    assert_eq!(world.ok(&["list"]), "a\nb\n");
    let data = world.home.join(".local/share/enroot");
    let existing = world.error(&["load", "-n", "a", &world.uri("busybox")]);
    assert_eq!(existing, format!("File already exists: {}", data.join("a").display()));
    std::fs::write(data.join("a/marker"), "").unwrap();
    world.ok(&["load", "-f", "-n", "a", &world.uri("busybox")]);
    assert!(!data.join("a/marker").exists() && data.join("a/bin/busybox").exists());

    // Asked, and answered.
    let path = data.join("a").display().to_string();
    for (answer, left) in [("n\n", true), ("\n", true), ("y\n", false)] {
        let mut running = Running::start(world.command(&["remove", "a"]).stdin(Stdio::piped())).unwrap();
        running.write_stdin(answer.as_bytes()).unwrap();
        let output = running.wait(wait::DEADLINE).unwrap().success().unwrap();
        assert_eq!(output.stderr, format!("Do you really want to delete {path}? [y/N] "));
        assert_eq!(data.join("a").exists(), left, "{answer:?}");
    }
    assert_eq!(world.error(&["remove", "-f", "a"]), format!("No such file or directory: {path}"));
    assert_eq!(world.error(&["remove", "-f", "../x"]), "Invalid argument: ../x");
    let output = world.run(&["remove", "-f", "gone", "b"]);
    assert_eq!((output.code(), world.ok(&["list"])), (1, String::new()));
    assert_eq!(world.names(".local/share/enroot"), [] as [&str; 0]);
}

#[test]
fn a_tree_that_its_owner_locked_can_be_removed() {
    let world = World::new("locked");
    world.push_busybox();
    world.ok(&["load", &world.uri("busybox")]);
    let script = "cd ~/.local/share/enroot/busybox && mkdir -p x/y && touch x/y/z && chmod 000 x/y && chmod 555 x .";
    let mut shell = world.user.command("sh");
    testbed::process::output_of(shell.args(["-c", script]).env("HOME", &world.home)).unwrap();
    world.ok(&["remove", "--force", "busybox"]);
    assert_eq!(world.names(".local/share/enroot"), [] as [&str; 0]);
}

#[test]
fn mistakes_print_the_usage() {
    let world = World::new("usage");
    for arguments in [&[][..], &["nonsense"], &["import"], &["remove"], &["list", "--nonsense"], &["load", "a", "b"]] {
        let output = world.run(arguments);
        assert_eq!(output.code(), 1, "{output}");
        assert!(output.stderr.contains("Usage: enroot") && output.stdout.is_empty(), "{output}");
    }
    let help = world.run(&["--help"]).success().unwrap();
    assert!(help.stdout.contains("import"), "{help}");
    assert_eq!(world.ok(&["version"]), "4.2.0\n");
    assert!(world.ok(&["help"]).contains("import"));
}

#[test]
fn settings_come_from_the_environment_and_from_files() {
    let world = World::new("settings");
    let sysconf = world.site.make_directory("etc/enroot").unwrap();
    std::fs::write(sysconf.join("enroot.conf"), "ENROOT_DATA_PATH /data/${USER}\nENROOT_CACHE_PATH=/cache\n").unwrap();
    let mut command = world.command(&["info"]);
    command.env("ENROOT_SYSCONF_PATH", &sysconf).env("ENROOT_CACHE_PATH", "/mine");
    let output = testbed::process::run(&mut command, wait::DEADLINE).unwrap().success().unwrap();
    let lines: Vec<&str> = output.stdout.lines().collect();
    for line in [
        format!("ENROOT_DATA_PATH=/data/{}", world.user.name),
        "ENROOT_CACHE_PATH=/mine".into(),
        format!("ENROOT_CONFIG_PATH={}/.config/enroot", world.home.display()),
        "ENROOT_MAX_CONNECTIONS=10".into(),
    ] {
        assert!(lines.contains(&line.as_str()), "{line}: {output}");
    }
}

/// The programs that make containers are others here: what counts is what proc(5) says.
#[test]
fn what_runs_is_listed_and_can_be_entered() {
    let world = World::new("running");
    world.push_busybox();
    world.ok(&["load", "-n", "box", &world.uri("busybox")]);
    world.ok(&["load", "-n", "other", &world.uri("busybox")]);
    let root = world.home.join(".local/share/enroot/box");
    std::fs::create_dir_all(root.join("proc")).unwrap();
    testbed::process::output_of(std::process::Command::new("mkfifo").arg("--mode=666").arg(root.join("fifo"))).unwrap();
    let mut bwrap = world.user.command("bwrap");
    bwrap.args(["--unshare-user", "--uid", "0", "--unshare-pid", "--bind"]).arg(&root);
    bwrap.args(["/", "--proc", "/proc", "--chdir", "/etc"]).env("COLOUR", "blue");
    bwrap.args(["sh", "-c", "echo ready; read -r x < /fifo"]);
    let mut running = Running::start(bwrap.stdin(Stdio::null())).unwrap();
    running.wait_for_text("ready", wait::DEADLINE).unwrap();

    let text = world.ok(&["list", "--fancy"]);
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(lines[0], ["NAME", "PID", "COMM", "STATE", "STARTED", "TIME", "MNTNS", "USERNS", "COMMAND"]);
    let row = lines.iter().find(|row| row[0] == "box" && row.len() > 1).unwrap_or_else(|| panic!("{text}"));
    assert!(lines.contains(&vec!["other"]), "{text}");
    let pid = row[1];

    let script = "echo $COLOUR $MORE $PWD; id -u; ls -d /bin/busybox; echo $0; exit 7";
    let output = world.run(&["exec", "-e", "MORE=than that", pid, "sh", "-c", script, "zero"]);
    assert_eq!(
        (output.stdout.as_str(), output.code()),
        ("blue than that /etc\n0\n/bin/busybox\nzero\n", 7),
        "{output}"
    );
    let seccomp = world.ok(&["exec", pid, "grep", "Seccomp:", "/proc/self/status"]);
    assert_eq!(seccomp, "Seccomp:\t2\n");
    assert_eq!(world.error(&["exec", pid, "nonsense"]), "Command not found: nonsense");
    for bad in ["0", "-1", "x", "999999999"] {
        assert_eq!(world.error(&["exec", "--", bad, "true"]), format!("Process not found: {bad}"));
    }
    let own = std::process::id().to_string();
    let error = world.error(&["exec", &own, "true"]);
    assert!(error.contains("Permission denied") || error.contains("in no container"), "{error}");
    drop(running);
}
