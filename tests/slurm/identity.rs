//! Who a task is inside: ids, names, capabilities, seccomp, namespaces.

use anyhow::{Result, ensure};

use crate::Case;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("the_user_stays_the_user", stays_the_user),
    ("remapped_root", remapped_root),
    ("files_belong_to_the_user", files_belong_to_the_user),
    ("passwd_and_group", passwd_and_group),
    ("seccomp_fakes_ownership", seccomp),
    ("capabilities", capabilities),
    ("root_is_nosuid_nodev_for_good", nosuid_nodev),
    ("another_user_cannot_look_in", another_user),
    ("tasks_share_a_container", tasks_share),
    ("no_descriptors_of_ours_reach_the_task", descriptors),
    ("supplementary_groups_stay", supplementary_groups),
];

fn fields(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

fn stays_the_user(world: &mut World) -> Result<()> {
    let (uid, gid) = (world.user(0).uid.to_string(), world.user(0).gid.to_string());
    for options in [&[][..], &["--no-container-remap-root"]] {
        let seen = world.sh(options, "id -u; id -g; id -un; cat /proc/self/uid_map /proc/self/gid_map")?;
        assert_eq!(fields(&seen), [&uid, &gid, "pyxis-test-1", &uid, &uid, "1", &gid, &gid, "1"]);
    }
    Ok(())
}

fn remapped_root(world: &mut World) -> Result<()> {
    let (uid, gid) = (world.user(0).uid.to_string(), world.user(0).gid.to_string());
    let script = "id -u; id -g; id -un; cat /proc/self/uid_map /proc/self/gid_map; echo $HOME";
    let seen = world.sh(&["--container-remap-root"], script)?;
    assert_eq!(fields(&seen), ["0", "0", "root", "0", &uid, "1", "0", &gid, "1", "/root"]);
    // What it makes outside is the user's.
    let work = world.user(0).home.join("work");
    let mount = format!("--container-mounts={}:/work", work.display());
    world.sh(&["--container-remap-root", &mount], "touch /work/by-root")?;
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(work.join("by-root"))?);
    assert_eq!(owner, world.user(0).uid);
    Ok(())
}

fn files_belong_to_the_user(world: &mut World) -> Result<()> {
    let (uid, gid) = (world.user(0).uid, world.user(0).gid);
    let script = "stat -c %u:%g / /bin/busybox /root /etc/os-release | sort -u";
    assert_eq!(world.sh(&[], script)?, format!("{uid}:{gid}"));
    assert_eq!(world.sh(&["--container-remap-root"], script)?, "0:0");
    // Another user sees the same layers as his own.
    assert_eq!(world.sh_as(1, &[], script)?, format!("{}:{}", world.user(1).uid, world.user(1).gid));
    let chmod = "chmod 700 /bin && echo x >>/etc/os-release && mv /root /moved && rm -r /usr && ls -d /moved";
    assert_eq!(world.sh(&["--container-writable"], chmod)?, "/moved");
    Ok(())
}

fn passwd_and_group(world: &mut World) -> Result<()> {
    let user = world.user(0).clone();
    let passwd = world.sh(&[], "cat /etc/passwd")?;
    let own = passwd.lines().find(|line| line.starts_with(&format!("{}:", user.name))).unwrap_or_default();
    let own: Vec<_> = own.split(':').collect();
    ensure!(own.len() == 7 && own[2] == user.uid.to_string() && own[3] == user.gid.to_string(), "{passwd}");
    // The login shell if the image has it.
    assert_eq!((own[5], own[6]), (user.home.to_str().unwrap_or_default(), "/bin/sh"));
    ensure!(
        passwd.contains("imageuser:x:4242:") && passwd.contains("root:x:0:0:"),
        "the image's entries stay: {passwd}"
    );
    let group = world.sh(&[], "cat /etc/group; id -gn")?;
    ensure!(group.contains("imagegroup:x:4242:") && group.contains(&format!(":{}:", user.gid)), "{group}");
    ensure!(group.ends_with(&user.name), "{group}");
    assert_eq!(world.sh(&[], "cd ~ && pwd")?, user.home.display().to_string(), "the home directory exists");
    Ok(())
}

fn seccomp(world: &mut World) -> Result<()> {
    for options in [&[][..], &["--container-remap-root"]] {
        assert_eq!(world.sh(options, "grep Seccomp: /proc/self/status | tr -d '\\t '")?, "Seccomp:2");
        let script = "touch /tmp/f; chown 12:34 /tmp/f && chgrp 99 /tmp/f && chown -h 1:1 /tmp && stat -c %u:%g /tmp/f";
        let expected = match options.is_empty() {
            true => format!("{}:{}", world.user(0).uid, world.user(0).gid),
            false => "0:0".into(),
        };
        assert_eq!(world.sh(options, script)?, expected);
    }
    Ok(())
}

fn capabilities(world: &mut World) -> Result<()> {
    let effective = "grep CapEff /proc/self/status | tr -d '\\t'";
    assert_eq!(world.sh(&[], effective)?, "CapEff:0000000000000000");
    let denied = world.sh(&[], "mount -t tmpfs none /tmp 2>&1 || echo refused")?;
    ensure!(denied.ends_with("refused"), "{denied}");
    let mounted =
        world.sh(&["--container-remap-root"], "mount -t tmpfs none /tmp && grep -c ' /tmp tmpfs' /proc/mounts")?;
    assert_eq!(mounted, "2");
    Ok(())
}

/// Remapped root may mount, but not undo what protects the host.
fn nosuid_nodev(world: &mut World) -> Result<()> {
    let options = "awk '$2 == \"/\" { print $4 }' /proc/mounts";
    let seen = world.sh(&["--container-remap-root", "--container-writable"], options)?;
    ensure!(seen.contains("nosuid") && seen.contains("nodev"), "{seen}");
    for change in ["suid", "dev", "suid,dev"] {
        let script = format!("mount -o remount,bind,{change} / 2>&1 || echo refused");
        let refused = world.sh(&["--container-remap-root", "--container-writable"], &script)?;
        ensure!(refused.ends_with("refused"), "{change}: {refused}");
    }
    let node =
        world.sh(&["--container-remap-root", "--container-writable"], "mknod /x b 254 0 2>&1 || echo refused")?;
    ensure!(node.ends_with("refused"), "{node}");
    Ok(())
}

fn another_user(world: &mut World) -> Result<()> {
    let mut step = world.start(&["-w", "node1", IMAGE, "sh", "-c", "echo up; exec sleep 1000"])?;
    step.wait_for_text("up", testbed::wait::DEADLINE)?;
    let processes = world.bed.cluster.nodes()[0].processes();
    let inside: Vec<_> = processes.iter().filter(|process| process.uid == world.user(0).uid).collect();
    ensure!(!inside.is_empty(), "{processes:?}");
    for process in inside {
        let mut look = world.as_user(1, "ls");
        let output = testbed::process::run(look.arg(format!("/proc/{}/root/", process.pid)), testbed::wait::DEADLINE)?;
        ensure!(!output.status.success(), "{output}");
    }
    step.signal(nix::sys::signal::Signal::SIGKILL)?;
    world.end_all_jobs();
    Ok(())
}

fn tasks_share(world: &mut World) -> Result<()> {
    let script = "for kind in mnt user cgroup; do readlink /proc/self/ns/$kind; done | tr '\\n' ' '; echo";
    let seen = world.sh(&["-N1", "-n4"], script)?;
    let lines = sorted(&seen);
    ensure!(lines.len() == 4 && lines[0] == lines[3] && lines[0].contains("mnt:"), "{seen}");
    // One task's files are there for the others.
    let meet =
        "touch /tmp/task$SLURM_PROCID; for i in 0 1 2; do until [ -e /tmp/task$i ]; do sleep 0.1; done; done; echo met";
    assert_eq!(world.sh(&["-N1", "-n3"], meet)?, "met\nmet\nmet");
    let host = std::fs::read_link("/proc/self/ns/net")?.display().to_string();
    assert_eq!(world.sh(&[], "readlink /proc/self/ns/net")?, host, "the network is the host's");
    Ok(())
}

/// Standard streams and nothing else, as in a step without a container.
fn descriptors(world: &mut World) -> Result<()> {
    let script = "for fd in /proc/$$/fd/*; do echo $(readlink $fd); done; echo end";
    let bare = world.srun(&["sh", "-c", script])?.success()?.stdout;
    let inside = world.sh(&[], script)?;
    assert_eq!(inside.lines().count(), bare.lines().count(), "{inside}");
    Ok(())
}

fn supplementary_groups(world: &mut World) -> Result<()> {
    // The kernel still knows them; ids that are not mapped show as the overflow id.
    let bare = world.srun(&["sh", "-c", "id -G | wc -w"])?.success()?.stdout;
    assert_eq!(world.sh(&[], "id -G | wc -w")?, bare.trim());
    Ok(())
}
