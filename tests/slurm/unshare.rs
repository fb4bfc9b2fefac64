//! `--container-unshare`: namespaces of the container's own.

use std::fs;

use anyhow::{Context, Result, ensure};
use testbed::process;

use crate::Case;
use crate::named;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("none_by_default", none_by_default),
    ("net", net),
    ("ipc_system_v", system_v),
    ("ipc_shared_memory_and_queues", shared_memory),
    ("uts", uts),
    ("all_at_once_for_all_tasks", all_at_once),
    ("attached_tasks_are_where_the_container_is", attached),
    ("a_running_container_may_lack_what_is_asked_for", lacking),
];

const NAMESPACES: &str = "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; readlink /proc/self/ns/uts";

/// The namespaces of the machine, as the script above prints them.
fn of_the_machine() -> Result<Vec<String>> {
    ["net", "ipc", "uts"]
        .into_iter()
        .map(|kind| Ok(fs::read_link(format!("/proc/self/ns/{kind}"))?.display().to_string()))
        .collect()
}

fn none_by_default(world: &mut World) -> Result<()> {
    let inside = world.sh(&[], NAMESPACES)?;
    assert_eq!(inside.lines().collect::<Vec<_>>(), of_the_machine()?);
    Ok(())
}

/// Loopback only, and it works; nobody outside can be reached.
fn net(world: &mut World) -> Result<()> {
    let script = "readlink /proc/self/ns/net; ls /sys/class/net; cat /sys/class/net/lo/operstate; \
                  ifconfig lo | grep -c 'inet addr:127.0.0.1'; ifconfig lo | grep -o UP; \
                  grep ' /sys ' /proc/mounts | tail -n 1; touch /sys/x 2>&1; ls /sys/fs/cgroup | head -n 1; \
                  nc -w 5 192.0.2.1 80 2>&1 </dev/null; \
                  (nc -l -p 7777 >/tmp/heard &) ; until echo word | nc -w 5 127.0.0.1 7777 2>/dev/null; do :; done; \
                  until grep word /tmp/heard; do :; done";
    let text = world.sh(&["--container-unshare=net"], script)?;
    let lines: Vec<_> = text.lines().collect();
    let [namespace, interfaces, state, address, up, sys, touched, cgroup, rest @ ..] = &lines[..] else {
        anyhow::bail!("{text}")
    };
    ensure!(*namespace != of_the_machine()?[0], "the host's network: {text}");
    assert_eq!([*interfaces, *state, *address, *up], ["lo", "unknown", "1", "UP"], "{text}");
    ensure!(sys.starts_with("sysfs ") && sys.contains("ro,nosuid,nodev,noexec"), "{text}");
    ensure!(touched.contains("Read-only file system") && !cgroup.is_empty(), "{text}");
    ensure!(rest[0].contains("Network unreachable") || rest[0].contains("Network is unreachable"), "{text}");
    assert_eq!(rest[1..], ["word"], "{text}");
    Ok(())
}

/// A message queue of the user's on the machine is there without the option only.
fn system_v(world: &mut World) -> Result<()> {
    let made = process::output_of(world.as_user(0, "ipcmk").arg("-Q"))?;
    let id = made.rsplit(' ').next().context("ipcmk -Q")?.trim().to_owned();
    let count = format!("awk '$2 == {id}' /proc/sysvipc/msg | wc -l");
    let (shared, private) = (world.sh(&[], &count), world.sh(&["--container-unshare=ipc"], &count));
    process::output_of(world.as_user(0, "ipcrm").args(["-q", &id]))?;
    assert_eq!((shared?.as_str(), private?.as_str()), ("1", "0"));
    Ok(())
}

fn shared_memory(world: &mut World) -> Result<()> {
    let name = format!("pyxis-test-{}", std::process::id());
    let path = std::path::Path::new("/dev/shm").join(&name);
    process::output_of(world.as_user(0, "touch").arg(&path))?;
    let script =
        format!("ls /dev/shm; echo x >/dev/shm/inside && cat /dev/shm/inside; stat -c %a /dev/shm; echo {name}");
    let private = world.sh(&["--container-unshare=ipc"], &script);
    let shared = world.sh(&[], &format!("ls /dev/shm/{name}"));
    fs::remove_file(&path)?;
    assert_eq!(private?, format!("x\n1777\n{name}"));
    assert_eq!(shared?, path.display().to_string());
    ensure!(!path.with_file_name("inside").exists());
    let look = "for at in /dev /dev/shm /dev/mqueue; do grep \" $at \" /proc/mounts | tail -n 1 | cut -d' ' -f3; done; \
                ls -d /dev/null /dev/ptmx /dev/fd /dev/kmsg /dev/loop0 2>/dev/null | xargs";
    let devices = world.sh(&["--container-unshare=ipc"], look)?;
    assert_eq!(devices, "tmpfs\ntmpfs\nmqueue\n/dev/fd /dev/null /dev/ptmx");
    Ok(())
}

/// The host's name, which root of the container may change for itself.
fn uts(world: &mut World) -> Result<()> {
    let host = nix_hostname()?;
    let options = ["--container-unshare=uts", "--container-remap-root"];
    assert_eq!(world.sh(&options, "hostname; hostname inside; hostname")?, format!("{host}\ninside"));
    assert_eq!(nix_hostname()?, host);
    let refused = world.sh(&["--container-remap-root"], "hostname inside 2>&1; hostname")?;
    ensure!(refused.ends_with(&host) && refused.contains("not permitted"), "{refused}");
    Ok(())
}

fn nix_hostname() -> Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/hostname")?.trim().to_owned())
}

fn all_at_once(world: &mut World) -> Result<()> {
    let options = ["-n3", "-N1", "--container-unshare=net,ipc", "--container-unshare=uts"];
    let text = world.sh(&options, &format!("echo $({NAMESPACES})"))?;
    let lines = sorted(&text);
    assert_eq!(lines.len(), 3, "{text}");
    ensure!(lines.iter().all(|line| *line == lines[0]), "not shared by the tasks: {text}");
    for (own, machine) in lines[0].split(' ').zip(of_the_machine()?) {
        ensure!(own != machine, "{own} is the machine's");
    }
    Ok(())
}

fn attached(world: &mut World) -> Result<()> {
    let name = named::option(&named::new_name(), "");
    let all = "--container-unshare=net,ipc,uts";
    let first = named::start(world, &[&name, IMAGE, all, "--container-remap-root"], "hostname inside")?;
    let inside = named::sh(world, &[&name], &format!("{NAMESPACES}; hostname"))?.stdout;
    let again = named::sh(world, &[&name, all], &format!("{NAMESPACES}; hostname"))?.stdout;
    named::end(first)?;
    assert_eq!(inside, again);
    let lines: Vec<_> = inside.lines().collect();
    assert_eq!((lines.len(), lines.last()), (4, Some(&"inside")), "{inside}");
    for (own, machine) in lines.iter().zip(of_the_machine()?) {
        ensure!(**own != machine, "{own} is the machine's");
    }
    Ok(())
}

fn lacking(world: &mut World) -> Result<()> {
    let name = named::option(&named::new_name(), "");
    let first = named::start(world, &[&name, IMAGE, "--container-unshare=ipc"], "")?;
    let refused = |kind: &str, called: &str| {
        let option = format!("--container-unshare={kind}");
        let text =
            format!("pyxis: error: {option} requested but the container is not in a separate {called} namespace");
        world.refused(&["-w", "node1", &name, &option], &text)
    };
    let results = (refused("net", "network"), refused("uts", "UTS"));
    let fine = named::sh(world, &[&name, "--container-unshare=ipc"], "echo fine");
    named::end(first)?;
    results.0?;
    results.1?;
    assert_eq!(fine?.stdout, "fine\n");
    let first = named::start(world, &[&name], "")?;
    let result = refused("ipc", "IPC");
    named::end(first)?;
    result.map(drop)
}
