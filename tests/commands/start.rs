//! `enroot start`: as an ordinary user, without anything of root's.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::Signal;
use testbed::image::{Compression, ImageBuilder};
use testbed::process::{Output, Running, output_of, run};
use testbed::{images, wait};

use crate::images::{Tar, image};
use crate::world::World;

/// A world with the container `box` of the small image.
fn world(name: &str) -> World {
    let world = World::new(&format!("start-{name}"));
    world.push_busybox();
    world.ok(&["load", "-n", "box", &world.uri("busybox")]);
    world
}

/// What `enroot start ARGUMENTS` prints, without the last end of a line.
#[track_caller]
fn started(world: &World, arguments: &[&str]) -> String {
    world.ok(&[&["start"], arguments].concat()).trim_end().to_owned()
}

fn shell(world: &World, arguments: &[&str], script: &str) -> Output {
    world.run(&[&["start"], arguments, &["box", "sh", "-c", script]].concat())
}

/// A directory that is not there stays away: nothing but the tree is left.
#[track_caller]
fn assert_tidy(world: &World) {
    assert_eq!(world.names(""), [".cache", ".local"]);
    assert_eq!(crate::world::names(&world.site.path("tmp")), [] as [&str; 0]);
}

#[test]
fn a_command_runs_as_the_user() {
    let world = world("user");
    let (uid, gid) = (world.user.uid, world.user.gid);
    let script = "id -u; id -g; pwd; tr -s ' ' < /proc/self/uid_map; cat /etc/os-release | head -n 1; \
                  grep -e Seccomp: -e NoNewPrivs: /proc/self/status; touch /x 2>&1; touch /tmp/x && ls -d /tmp/x; exit 7";
    let output = shell(&world, &[], script);
    assert_eq!(output.code(), 7, "{output}");
    assert_eq!(
        output.stdout,
        format!(
            "{uid}\n{gid}\n/\n {uid} {uid} 1\nID=busybox\nNoNewPrivs:\t1\nSeccomp:\t2\n\
             touch: /x: Read-only file system\n/tmp/x\n"
        )
    );
    assert_eq!(output.stderr, "");
    let root = shell(&world, &["--root", "--rw"], "id -u; touch /x && chown 5:5 /x && stat -c %u:%g /x");
    assert_eq!(root.stdout, "0\n0:0\n", "{root}");
    assert!(world.home.join(".local/share/enroot/box/x").exists());
    assert_tidy(&world);
}

#[test]
fn what_every_container_has_is_there() {
    let world = world("mounts");
    let mounts = started(&world, &["box", "cat", "/proc/self/mounts"]);
    for (path, options) in [
        ("/", &["ro", "nosuid", "nodev"][..]),
        ("/proc", &["rw", "nosuid", "nodev", "noexec"]),
        ("/sys", &["ro", "nosuid", "nodev", "noexec"]),
        ("/dev", &["rw", "nosuid", "noexec"]),
        ("/tmp", &["rw", "nosuid", "nodev", "mode=755"]),
        ("/etc/hosts", &["ro"]),
    ] {
        let line = mounts.lines().rfind(|line| line.split(' ').nth(1) == Some(path));
        let line = line.unwrap_or_else(|| panic!("{path} is not mounted:\n{mounts}"));
        let found: Vec<&str> = line.split(' ').nth(3).unwrap().split(',').collect();
        assert!(options.iter().all(|option| found.contains(option)), "{line}");
    }
    let passwd = started(&world, &["box", "grep", &world.user.name, "/etc/passwd"]);
    assert!(passwd.starts_with(&format!("{}:x:{}:{}:", world.user.name, world.user.uid, world.user.gid)), "{passwd}");
    // Nothing of the host's but what is meant to be seen.
    let script = "cut -d ' ' -f 5 /proc/self/mountinfo | grep -c testbed; ls /var/tmp 2>&1; ls -l /proc/self/fd";
    let output = shell(&world, &[], script);
    let lines: Vec<&str> = output.stdout.lines().collect();
    assert!(lines[0] == "0" && lines[1].contains("No such file"), "{output}");
    let open = lines[2..].iter().filter_map(|line| line.split_once(" -> ")).map(|(_, target)| target);
    assert!(!open.clone().any(|target| target.contains(".lock") || target.contains("pyxis")), "{output}");
}

#[test]
fn the_image_says_what_to_start() {
    let world = World::new("start-image");
    let tree = world.site.make_directory("tree").unwrap();
    images::busybox_tree(&tree).unwrap();
    let image = ImageBuilder::new(&world.site.path("layout"))
        .unwrap()
        .config("Env", serde_json::json!(["PATH=/bin", "COLOUR=light blue", "TERM=vt100"]))
        .config("Entrypoint", serde_json::json!(["/bin/echo", "it's", "$HOME"]))
        .config("Cmd", serde_json::json!(["the default"]))
        .config("WorkingDir", serde_json::json!("/work/here"))
        .config("Volumes", serde_json::json!({"/data": {}}))
        .layer_from_tree(&tree, Compression::Gzip)
        .unwrap()
        .finish("latest")
        .unwrap();
    world.registry.push(&image, "image:latest").unwrap();
    world.ok(&["import", "-o", "x.sqsh", &world.uri("image")]);
    world.ok(&["create", "x.sqsh"]);
    assert_eq!(started(&world, &["x"]), "it's $HOME the default");
    assert_eq!(started(&world, &["x", "a", "b  c"]), "it's $HOME a b  c");
    // The supported way to start something else: also where a variable is needed.
    let local = world.home.join(".local/share/enroot/x/etc/rc.local");
    std::fs::write(&local, "echo $COLOUR in $PWD on $TERM; touch /data/x && ls /data; exec \"$@\"\n").unwrap();
    assert_eq!(started(&world, &["x", "echo", "mine"]), "light blue in /work/here on vt100\nx\nmine");
    // A script of the user's instead of the image's.
    let rc = world.home.join("my rc");
    std::fs::write(&rc, "echo rc \"$@\" in $PWD\n").unwrap();
    assert_eq!(started(&world, &["--rc", "my rc", "x", "a b"]), "rc a b in /");
    let missing = world.error(&["start", "--rc", "nonsense", "x"]);
    assert_eq!(missing, "No such file or directory: nonsense");
}

#[test]
fn containers_without_a_script_run_what_they_are_told() {
    let world = world("direct");
    let rc = world.home.join(".local/share/enroot/box/etc/rc");
    std::fs::remove_file(rc).unwrap();
    assert_eq!(started(&world, &["box", "echo", "a b"]), "a b");
    assert_eq!(started(&world, &["box", "echo one; echo $0"]), "one\n/bin/sh");
    let mut command = world.command(&["start", "box"]);
    let mut running = Running::start(command.stdin(Stdio::piped())).unwrap();
    running.write_stdin(b"echo from $PWD\nexit 3\n").unwrap();
    let output = running.wait(wait::DEADLINE).unwrap();
    assert_eq!((output.stdout.as_str(), output.code()), ("from /\n", 3), "{output}");
    assert_eq!(world.error(&["start", "box", "nonsense"]), "Command not found: nonsense");
}

#[test]
fn an_image_without_a_shell_can_be_started() {
    let world = World::new("start-distroless");
    let layout = images::distroless(&world.site.path("layout")).unwrap();
    world.registry.push(&layout, "distroless:latest").unwrap();
    world.ok(&["load", &world.uri("distroless")]);
    assert_eq!(started(&world, &["distroless", "/busybox", "echo", "here"]), "here");
    assert!(world.error(&["start", "distroless"]).contains("has no shell"));
}

#[test]
fn variables_and_mounts_are_added() {
    let world = world("options");
    let shared = world.site.make_directory("shared place").unwrap();
    std::fs::write(shared.join("file"), "shared\n").unwrap();
    let link = world.home.join("shared");
    std::os::unix::fs::symlink(&shared, &link).unwrap();
    let mount = format!("{}:/mnt/here:none:x-create=dir,rbind,ro", link.display());
    let mut command = world.command(&["start", "-e", "A=one two", "--env", "HOSTS", "-e", "NONE", "-m", &mount]);
    command.args(["--mount", "tmpfs:/t:tmpfs:x-create=dir,size=1m", "box", "sh", "-c"]);
    command.arg(
        "echo $A $HOSTS ${NONE-unset} ${OTHER-unset}; cat /mnt/here/file; touch /mnt/here/x 2>&1; touch /t/x && ls /t",
    );
    let output = run(command.env("HOSTS", "passed on").env("OTHER", "x"), wait::DEADLINE).unwrap();
    assert_eq!(
        output.stdout, "one two passed on unset unset\nshared\ntouch: /mnt/here/x: Read-only file system\nx\n",
        "{output}"
    );
    assert_eq!(world.error(&["start", "-m", "/a b:/c", "box", "true"]), "Invalid argument: /a b:/c");
    let output = world.run(&["start", "-m", "/nonexistent:/x:none:bind", "box", "true"]);
    assert_eq!(output.code(), 1, "{output}");
    let expected = "enroot-mount: failed to mount: /nonexistent at ";
    assert!(output.stderr.contains(expected) && output.stderr.contains("No such file or directory"), "{output}");
}

#[test]
fn namespaces_are_the_containers_own() {
    let world = world("namespaces");
    let host = |kind: &str| std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap().display().to_string();
    let of = |options: &[&str], kind: &str| shell(&world, options, &format!("readlink /proc/self/ns/{kind}")).stdout;
    for (option, kind) in [("--net", "net"), ("--ipc", "ipc"), ("--uts", "uts"), ("--pid", "pid")] {
        assert_eq!(of(&[], kind).trim(), host(kind), "{kind}");
        assert_ne!(of(&[option], kind).trim(), host(kind), "{kind}");
    }
    let output =
        shell(&world, &["--root", "--uts", "--net"], "hostname inside && hostname; ip -o addr show lo | head -n 1");
    assert!(output.stdout.starts_with("inside\n") && output.stdout.contains("127.0.0.1"), "{output}");
    // The first process passes on how the command ends, and takes what it leaves behind with it: that would keep the
    // output open.
    let output = shell(&world, &["--pid"], "(sleep 1000 &) ; test -d /proc/1 && echo $$; kill -TERM $$");
    assert_eq!((output.stdout.as_str(), output.code()), ("2\n", 128 + 15), "{output}");
    let mut command = world.command(&["start", "box", "sh", "-c", "readlink /proc/self/ns/ipc"]);
    let output = run(command.env("ENROOT_UNSHARE_IPC", "yes"), wait::DEADLINE).unwrap();
    assert_ne!(output.stdout.trim(), host("ipc"), "{output}");
}

#[test]
fn what_is_configured_for_containers_counts() {
    let world = world("configured");
    let config = world.home.join(".config/enroot");
    for (path, content) in [
        ("environ.d/10-mine.env", "MINE=${HOME}/x\nFROM_HOOK=no\n"),
        ("mounts.d/10-mine.fstab", "tmpfs /scratch tmpfs x-create=dir\n"),
        (
            "hooks.d/10-mine.sh",
            "#!/bin/sh\necho FROM_HOOK=yes >> $ENROOT_ENVIRON\necho \"tmpfs /hooked tmpfs x-create=dir\" >> $ENROOT_MOUNTS\n",
        ),
    ] {
        let path = config.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    let script = "echo $MINE $FROM_HOOK; grep -c -e ' /scratch ' -e ' /hooked ' /proc/self/mounts";
    let output = shell(&world, &[], script);
    assert_eq!(output.stdout, format!("{}/x yes\n2\n", world.home.display()), "{output}");
    let mut home = world.command(&["start", "box", "sh", "-c", "echo $HOME; ls -a $HOME | grep -c enroot-test"]);
    std::fs::write(world.home.join("enroot-test"), "").unwrap();
    let output = run(home.env("ENROOT_MOUNT_HOME", "y"), wait::DEADLINE).unwrap();
    assert_eq!(output.stdout, format!("{}\n1\n", world.home.display()), "{output}");

    let hook = config.join("hooks.d/20-fails.sh");
    std::fs::write(&hook, "#!/bin/sh\necho because >&2\nexit 3\n").unwrap();
    std::fs::set_permissions(&hook, PermissionsExt::from_mode(0o755)).unwrap();
    let output = shell(&world, &[], "echo never");
    assert_eq!((output.code(), output.stdout.as_str()), (1, ""), "{output}");
    let reason = format!("[ERROR] {} exited with return code 3\n", hook.display());
    assert!(output.stderr.contains("because\n") && output.stderr.ends_with(&reason), "{output}");
}

#[test]
fn configuration_scripts_are_understood() {
    let world = world("script");
    let script = "#ENROOT_REMAP_ROOT y\n# ENROOT_ROOTFS_WRITABLE yes\n\
                  environ() { echo A=from-script; echo \"B=$HOME\"; }\n\
                  mounts() { echo 'tmpfs /scripted tmpfs x-create=dir'; }\n\
                  hooks() { touch \"${ENROOT_ROOTFS}/hooked\"; echo C=3 >> \"${ENROOT_ENVIRON}\"; }\n\
                  rc() { echo \"rc: $A $B $C $(id -u)\"; exec \"$@\"; }\n";
    std::fs::write(world.home.join("conf.sh"), script).unwrap();
    let inside = "ls -d /hooked; grep -c ' /scripted ' /proc/self/mounts; touch /x && echo writable";
    let output = shell(&world, &["--conf", "conf.sh", "-e", "A=option"], inside);
    let home = world.home.display();
    assert_eq!(output.stdout, format!("rc: option {home} 3 0\n/hooked\n1\nwritable\n"), "{output}");
    // The same, called as a program: what it starts is in it.
    let batch = world.home.join("batch");
    let enroot = world.enroot();
    let text = format!("#!{} batch\n#ENROOT_ROOTFS ${{HOME:+box}}\n{script}", enroot.display());
    std::fs::write(&batch, text).unwrap();
    std::fs::set_permissions(&batch, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = world.program(&batch, &["sh", "-c", "echo $# \"$@\"", "x", "-a", "b c"]);
    let output = run(command.env("ENROOT_REMAP_ROOT", "no"), wait::DEADLINE).unwrap();
    assert_eq!(output.stdout, format!("rc: from-script {home} 3 0\n2 -a b c\n"), "{output}");
    assert!(world.error(&["batch", "conf.sh", "true"]).ends_with("no line #ENROOT_ROOTFS says what to start"));
    std::fs::write(world.home.join("conf.sh"), "if\n").unwrap();
    let invalid = world.error(&["start", "-c", "conf.sh", "box", "true"]);
    let path = world.home.join("conf.sh").canonicalize().unwrap();
    assert_eq!(invalid, format!("Invalid configuration file: {}", path.display()));
}

#[test]
fn signals_reach_the_command_and_terminals_are_its_own() {
    let world = world("signals");
    let script = "trap 'echo got it; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    for options in [&[][..], &["--pid"]] {
        let arguments = [&["start"], options, &["box", "sh", "-c", script]].concat();
        let mut running = Running::start(&mut world.command(&arguments)).unwrap();
        running.wait_for_text("ready", wait::DEADLINE).unwrap();
        running.signal(Signal::SIGTERM).unwrap();
        let output = running.wait(wait::DEADLINE).unwrap();
        assert_eq!((output.stdout.as_str(), output.code()), ("ready\ngot it\n", 5), "{output}");
    }
    let typed = format!("{} start box sh -c 'test -t 0 && test -t 1 && tty && stty size'", world.enroot().display());
    let mut as_user = world.user.command("script");
    as_user.args(["--quiet", "--return", "--command", &typed, "/dev/null"]).current_dir(&world.home);
    let variables = world.command(&[]);
    as_user.envs(variables.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = run(&mut as_user, wait::DEADLINE).unwrap();
    assert!(output.status.success() && output.stdout.contains("/dev/pts/"), "{output}");
}

#[test]
fn several_starts_of_one_container_do_not_disturb_each_other() {
    let world = world("several");
    let script = "grep -c . /etc/passwd; cat /etc/hostname > /dev/null && echo fine";
    let start = |_| Running::start(&mut world.command(&["start", "box", "sh", "-c", script])).unwrap();
    let running: Vec<Running> = (0..10).map(start).collect();
    let outputs: Vec<Output> = running.into_iter().map(|one| one.wait(wait::DEADLINE).unwrap()).collect();
    assert!(outputs.iter().all(|output| output.stdout == outputs[0].stdout && output.status.success()), "{outputs:?}");
    assert_tidy(&world);
}

#[test]
fn what_runs_is_listed_under_its_name() {
    let world = world("listed");
    let mut command = world.command(&["start", "-e", "COLOUR=blue", "box", "sh", "-c", "echo ready; read x"]);
    let mut running = Running::start(command.stdin(Stdio::piped())).unwrap();
    running.wait_for_text("ready", wait::DEADLINE).unwrap();
    let text = world.ok(&["list", "-f"]);
    let row: Vec<&str> = text.lines().find(|line| line.starts_with("box ")).unwrap().split_whitespace().collect();
    assert_eq!(row[1], running.pid().to_string(), "{text}");
    assert_eq!(world.ok(&["exec", row[1], "sh", "-c", "echo $COLOUR; id -u"]), format!("blue\n{}\n", world.user.uid));
    running.write_stdin(b"\n").unwrap();
    assert!(running.wait(wait::DEADLINE).unwrap().status.success());
    // Not what it leaves in the tree.
    world.ok(&["export", "box"]);
    let listing =
        output_of(std::process::Command::new("unsquashfs").arg("-ls").arg(world.home.join("box.sqsh"))).unwrap();
    assert!(!listing.contains(".lock") && listing.contains("bin/busybox"), "{listing}");
}

#[test]
fn what_cannot_be_started_is_named() {
    let world = world("errors");
    let missing = world.home.join(".local/share/enroot/none");
    assert_eq!(world.error(&["start", "none"]), format!("No such file or directory: {}", missing.display()));
    assert_eq!(world.error(&["start", "./none"]), "Invalid argument: ./none");
    // Hosts on which users may have no namespaces: one that this test makes.
    let script =
        format!("echo 0 > /proc/sys/user/max_user_namespaces && exec {} start box true", world.enroot().display());
    let mut command = world.user.command("unshare");
    command.args(["--user", "--map-root-user", "sh", "-c", &script]).current_dir(&world.home);
    let variables = world.command(&[]);
    command.envs(variables.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = run(&mut command, wait::DEADLINE).unwrap();
    assert!(output.code() == 1 && output.stderr.contains("the sysctl user.max_user_namespaces"), "{output}");
    // A tree whose links lead astray: what is written for the container stays in it.
    let layer = Tar::new().directory("bin").symlink("etc", "/var/tmp/astray").symlink("tmp", "/nowhere").done();
    let image = image(&world.site.path("astray"), &[layer]);
    world.registry.push(&image, "astray:latest").unwrap();
    world.ok(&["load", &world.uri("astray")]);
    let output = world.run(&["start", "astray", "/bin/none"]);
    assert!(output.code() == 1 && output.stderr.contains("Command not found: /bin/none"), "{output}");
    assert!(!Path::new("/var/tmp/astray").exists());
    assert!(world.home.join(".local/share/enroot/astray/var/tmp/astray/passwd").exists());
}

#[test]
fn a_squashfs_file_can_be_started_as_it_is() {
    let world = World::new("start-squashfs");
    world.push_busybox();
    world.ok(&["import", "-o", "x.sqsh", &world.uri("busybox")]);
    let before = std::fs::read(world.home.join("x.sqsh")).unwrap();
    let script = "id -u; head -n 1 /etc/os-release; touch /x 2>/dev/null || echo read-only; exit 4";
    let output = run(&mut world.with_fuse(&["start", "x.sqsh", "sh", "-c", script]), wait::DEADLINE).unwrap();
    let expected = format!("{}\nID=busybox\nread-only\n", world.user.uid);
    assert_eq!((output.code(), output.stdout.as_str()), (4, expected.as_str()), "{output}");
    // What is written is for this start only.
    let script = "ls -d /x /bin/cat; rm /bin/cat; echo new > /x && mv /etc/os-release /moved && ls /x /moved && id -u";
    for _ in 0..2 {
        let mut command = world.with_fuse(&["start", "--root", "--rw", "./x.sqsh", "sh", "-c", script]);
        let output = run(&mut command, wait::DEADLINE).unwrap();
        assert_eq!(output.stdout, "/bin/cat\n/moved\n/x\n0\n", "{output}");
    }
    assert!(std::fs::read(world.home.join("x.sqsh")).unwrap() == before);
    let mut command = world.with_fuse(&["start", "x.sqsh", "sh", "-c", "echo ready; read x; cat /etc/os-release"]);
    let mut running = Running::start(command.stdin(Stdio::piped())).unwrap();
    running.wait_for_text("ready", wait::DEADLINE).unwrap();
    assert!(world.ok(&["list", "-f"]).lines().any(|line| line.starts_with("<unknown> ")));
    running.write_stdin(b"\n").unwrap();
    assert!(running.wait(wait::DEADLINE).unwrap().stdout.contains("ID=busybox"));
    // The process that reads the file ends with the container.
    wait::until("the end of the servers", wait::DEADLINE, || {
        let servers = testbed::process::pids().into_iter().filter(|pid| {
            let of_user = std::fs::metadata(format!("/proc/{pid}"))
                .is_ok_and(|metadata| std::os::unix::fs::MetadataExt::uid(&metadata) == world.user.uid);
            let file = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            of_user
                && file.map(|fd| fd.path()).any(|fd| std::fs::read_link(fd).is_ok_and(|to| to.starts_with(&world.home)))
        });
        (servers.count() == 0).then_some(())
    })
    .unwrap();

    // Where users may not have FUSE: what they can do instead.
    let mut command = world.without_fuse(&["start", "x.sqsh", "true"]);
    let output = run(&mut command, wait::DEADLINE).unwrap();
    let path = world.home.join("x.sqsh");
    assert!(output.stderr.starts_with(&format!("[ERROR] Failed to mount: {}: ", path.display())), "{output}");
    assert!(output.code() == 1 && output.stderr.contains("\"pyxis create\" it"), "{output}");
    std::fs::write(&path, &before[..before.len() / 2]).unwrap();
    let error = world.error(&["start", "./x.sqsh", "true"]);
    assert!(error.starts_with("Invalid image format: ./x.sqsh ("), "{error}");
}
