//! Containers without Slurm and without a registry: `pyxis run` on images that the tests put into a store themselves,
//! built by mkfs.erofs, so that what is judged here is the mount path, container init and the join alone.

mod enroot;
mod fallbacks;
mod log;
mod metrics;
mod rc;
mod seed;

use std::process::Output;

use seed::Node;

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end().to_owned()
}

#[track_caller]
fn stdout(output: Output) -> String {
    assert!(output.status.success(), "{}: {}{}", output.status, text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn a_command_runs_in_the_image_as_the_user() {
    let node = Node::new();
    assert_eq!(stdout(node.run(&[], "cat /etc/os-release; id -u; id -g; pwd")), "NAME=seed\n4242\n4243\n/work");
    assert_eq!(
        stdout(node.run(&["--container-remap-root"], "id -u; cat /proc/self/uid_map | tr -s ' '")),
        "0\n 0 4242 1"
    );
    assert_eq!(text(&node.run(&[], "exit 7").stderr), "");
    assert_eq!(node.run(&[], "exit 7").status.code(), Some(7));
    assert_eq!(node.run(&[], "kill -TERM $$").status.code(), Some(128 + 15));
}

#[test]
fn the_entrypoint_prepares_the_environment_of_the_command() {
    let node = Node::new();
    let script = "echo $FROM_ENTRYPOINT; read children </proc/$$/task/$$/children; echo \"<$children>\"";
    assert_eq!(stdout(node.run(&["--container-entrypoint"], script)), "yes\n<>");
    assert_eq!(stdout(node.run(&[], script)), "\n<>");
}

#[test]
fn root_gets_a_user_namespace_like_everybody() {
    let node = Node::new();
    let arguments = ["run", "--user", "root", seed::IMAGE, "sh", "-c", "id -u; cat /proc/self/uid_map | tr -s ' '"];
    assert_eq!(stdout(node.pyxis(&arguments)), "0\n 0 0 1");
}

#[test]
fn the_log_tells_how_long_a_start_took() {
    let node = Node::new();
    let log = text(&node.run(&["--verbose"], "true").stderr);
    assert!(log.lines().any(|line| line.starts_with("pyxis: completed container setup in ")), "{log}");
    assert!(!log.contains("mounted the root filesystem"), "{log}");
}

#[test]
fn container_init_has_nothing_of_the_brokers() {
    let node = Node::new();
    let _running = node.start("read x");
    let init = node.inits()[0];
    let descriptors = std::fs::read_dir(format!("/proc/{init}/fd")).unwrap().flatten();
    let mut open: Vec<String> =
        descriptors.map(|fd| std::fs::read_link(fd.path()).unwrap().to_string_lossy().into_owned()).collect();
    open.retain(|target| !target.contains("/layers/sha256/") && !target.starts_with("/dev/null"));
    assert_eq!(open.len(), 1, "{open:?}");
    assert!(open[0].starts_with("pipe:"), "{open:?}");
    let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap();
    for line in ["CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "Uid:\t4242\t4242\t4242\t4242"] {
        assert!(status.contains(line), "{status}");
    }
}

#[test]
fn the_root_is_read_only_unless_asked_otherwise() {
    let node = Node::new();
    let refused = node.run(&[], "touch /x");
    assert!(!refused.status.success());
    assert!(text(&refused.stderr).contains("Read-only file system"), "{}", text(&refused.stderr));
    assert_eq!(stdout(node.run(&[], "touch /tmp/x /volume/x && echo ok")), "ok");
    let script =
        "echo new > /x && rm /bin/only && mv /dir /moved && cat /x /moved/file && ls /bin/only; stat -c %u:%g /x";
    let writable = node.run(&["--container-writable"], script);
    assert_eq!(text(&writable.stdout), "new\nlower\n4242:4243");
    // The layer is as it was.
    assert_eq!(stdout(node.run(&[], "cat /dir/file; ls /bin/only")), "lower\n/bin/only");
}

#[test]
fn upper_layers_hide_and_replace() {
    let node = Node::new();
    assert_eq!(stdout(node.run(&[], "cat /layered; ls /gone 2>/dev/null; ls /opaque")), "upper\nnew");
}

#[test]
fn locked_flags_cannot_be_taken_off_by_a_remapped_root() {
    let node = Node::new();
    let script = "grep ' / / ' /proc/self/mountinfo; mount -o remount,bind,suid,dev / 2>&1 || echo refused; \
                  mount -t tmpfs none /mnt && echo mounted";
    let output = stdout(node.run(&["--container-remap-root", "--container-writable"], script));
    assert!(output.contains("nosuid,nodev"), "{output}");
    assert!(output.contains("refused"), "{output}");
    assert!(output.ends_with("mounted"), "{output}");
}

#[test]
fn ownership_changes_are_pretended() {
    let node = Node::new();
    let script = "grep Seccomp: /proc/self/status; touch /tmp/x; chown 5:5 /tmp/x && stat -c %u /tmp/x";
    assert_eq!(stdout(node.run(&[], script)), "Seccomp:\t2\n4242");
}

#[test]
fn default_mounts_are_there() {
    let node = Node::new();
    let mounts = stdout(node.run(&[], "cat /proc/self/mounts"));
    for (path, options) in [
        ("/proc", &["rw", "nosuid", "nodev", "noexec"][..]),
        ("/sys", &["ro", "nosuid", "nodev", "noexec"]),
        ("/dev", &["rw", "nosuid", "noexec"]),
        ("/tmp", &["rw", "nosuid", "nodev", "mode=755"]),
        ("/run", &["rw", "nosuid", "nodev", "mode=755"]),
        ("/dev/shm", &["rw", "nosuid", "nodev", "noexec"]),
        ("/etc/hosts", &["ro", "nosuid", "nodev", "noexec"]),
    ] {
        let line = mounts.lines().rfind(|line| line.split(' ').nth(1) == Some(path));
        let line = line.unwrap_or_else(|| panic!("{path} is not mounted:\n{mounts}"));
        let found: Vec<&str> = line.split(' ').nth(3).unwrap().split(',').collect();
        assert!(options.iter().all(|option| found.contains(option)), "{line}");
    }
    assert!(!mounts.contains("layers/sha256"), "the store shows: {mounts}");
}

#[test]
fn the_user_has_a_name_and_a_home() {
    let node = Node::new();
    let script = "grep 4242 /etc/passwd; grep 4243 /etc/group; echo $HOME; stat -c %a:%u $HOME; cat $HOME/.profile";
    let output = stdout(node.run(&[], script));
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].starts_with("pyxis-seed:x:4242:4243:"), "{output}");
    assert!(lines[1].contains(":x:4243:"), "{output}");
    assert_eq!(lines[2..], ["/home/pyxis-seed", "700:4242", "skeleton"]);
    assert_eq!(stdout(node.run(&["--container-remap-root"], "echo $HOME $USER")), "/root root");
}

#[test]
fn mounts_follow_their_flags() {
    let node = Node::new();
    let host = node.host_directory();
    std::fs::write(host.join("file"), "from the host\n").unwrap();
    let path = host.display();
    let run = |mounts: &str, script: &str| node.run(&["--container-mounts", mounts], script);
    assert_eq!(stdout(run(&format!("{path}:/new/dir"), "cat /new/dir/file; stat -c %a /new")), "from the host\n755");
    assert_eq!(stdout(run(&format!("{path}/file:/link"), "cat /target")), "from the host");
    let refused = run(&format!("{path}:/m:ro"), "touch /m/x");
    assert!(text(&refused.stderr).contains("Read-only file system"));
    let escaping = run(&format!("{path}:../x"), "true");
    assert!(text(&escaping.stderr).to_lowercase().contains("cross-device link"), "{}", text(&escaping.stderr));
    assert!(!escaping.status.success());
    let missing = run("/nonexistent/x:/m", "true");
    assert_eq!(text(&missing.stderr), "pyxis: --container-mounts: source path does not exist: /nonexistent/x");
    assert_eq!(stdout(run("tmpfs:/t:size=64k", "df -k /t | tail -1 | awk '{print $2}'")), "64");
    assert_eq!(stdout(run(&format!("{path}:/m,umount:/m"), "ls /m | wc -l")), "0");
}

#[test]
fn the_environment_is_the_images_and_the_hosts() {
    let node = Node::new();
    let script = "echo $FROM_IMAGE $FROM_HOST $LANG $BOTH";
    assert_eq!(stdout(node.run(&[], script)), "image host image");
    assert_eq!(stdout(node.run(&["--container-env", "BOTH,LANG"], script)), "image host de_DE host");
    assert_eq!(stdout(node.run(&["--container-env", "BOTH=set"], script)), "image host set");
}

#[test]
fn the_working_directory_must_exist() {
    let node = Node::new();
    assert_eq!(stdout(node.run(&["--container-workdir", "/dir"], "pwd; echo $PWD")), "/dir\n/dir");
    let missing = node.run(&["--container-workdir", "/pyxis"], "pwd");
    assert_eq!(text(&missing.stderr), "pyxis: couldn't chdir to /pyxis: No such file or directory");
}

#[test]
fn nothing_is_left_and_layers_are_mounted_once() {
    let node = Node::new();
    let before = node.mounts();
    stdout(node.run(&[], "true"));
    let mounted = node.mounts();
    let (one, two) = (node.start("cat /dir/file; read x"), node.start("read x"));
    // Both hold the layers now.
    assert_eq!(node.mounts(), mounted, "a running container shows in the host's mount table");
    let collected = stdout(node.pyxis(&["gc", "--all", "--json"]));
    assert!(collected.contains("\"removed\":[]"), "{collected}");
    drop((one, two));
    node.wait_until("container init ends", || node.inits().is_empty());
    let collected = stdout(node.pyxis(&["gc", "--all", "--json"]));
    assert!(!collected.contains("\"removed\":[]"), "{collected}");
    let pinned: Vec<&String> = mounted.iter().filter(|mount| !before.contains(mount)).collect();
    assert!(pinned.len() <= 2, "only the pinned namespace stays: {pinned:?}");
}

#[test]
fn a_layer_that_was_imported_anew_is_mounted_anew() {
    let node = Node::new();
    assert_eq!(stdout(node.run(&[], "cat /layered")), "upper");
    // As another node does to a store that both share.
    let running = node.start("read x; cat /layered");
    node.replace_layers();
    assert_eq!(stdout(node.run(&[], "cat /layered")), "upper");
    assert_eq!(node.pinned_layers(), 2, "the old files are let go");
    drop(running);
}

#[test]
fn layers_that_erofs_cannot_read_directly_are_mounted_over_loop_devices() {
    let node = Node::with_store_on_tmpfs();
    let running = node.start("read x");
    let loops = || node.layers_on_loop_devices();
    assert_eq!(loops(), 2);
    assert_eq!(stdout(node.run(&["--container-writable"], "cat /layered; rm /layered && echo gone")), "upper\ngone");
    assert_eq!(loops(), 2, "a second container shares the mounts");
    drop(running);
    node.wait_until("container init ends", || node.inits().is_empty());
    stdout(node.pyxis(&["gc", "--all"]));
    node.wait_until("the loop devices are free", || loops() == 0);
}

#[test]
fn the_doctor_tries_the_whole_mount_path() {
    let node = Node::new();
    let report = text(&node.pyxis(&["doctor"]).stdout);
    for line in ["ok       store: ", "ok       root filesystem: ", "ok       configuration: ", "ok       overlay: "] {
        assert!(report.contains(line), "{report}");
    }
    let json: serde_json::Value = serde_json::from_slice(&node.pyxis(&["doctor", "--json"]).stdout).unwrap();
    assert!(json.as_array().unwrap().iter().all(|check| check["status"] != "failed"), "{json}");
    node.write_config("[store]\npath = \"/proc/nothing\"\n");
    let broken = node.pyxis(&["doctor"]);
    assert!(!broken.status.success());
    assert!(text(&broken.stdout).contains("FAILED   store: "), "{}", text(&broken.stdout));
    node.write_config("[store]\npat = 1\n");
    let invalid = text(&node.pyxis(&["doctor"]).stdout);
    assert!(invalid.contains("pyxis.toml:2:1: unknown field `pat`"), "{invalid}");
    assert!(text(&node.run(&[], "true").stderr).contains("pyxis.toml:2:1: unknown field `pat`"));
}
