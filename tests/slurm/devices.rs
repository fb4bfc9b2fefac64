//! `/dev`: the host's, or a private one with nothing but what every program expects.

use anyhow::{Result, ensure};
use testbed::{images, process, wait};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("the_hosts_by_default", host),
    ("restricted_by_the_user", restricted_by_user),
    ("restricted_by_the_administrator", restricted_by_administrator),
    ("restricted_with_an_ipc_namespace", restricted_with_ipc),
    ("the_hosts_is_gone_not_hidden", gone),
    ("terminals_work_in_a_restricted_one", terminals),
];

/// All that is in a private `/dev`; the last three only if the host has them.
const NAMES: &str = "fd full null ptmx pts random shm stderr stdin stdout tty urandom zero";
const LIST: &str = "echo $(ls /dev | grep -vxE 'hugepages|log|mqueue')";
/// What a program does with devices.
const USE: &str = "echo lost >/dev/null && [ $(head -c 5 /dev/zero | wc -c)$(head -c 3 /dev/urandom | wc -c) = 53 ] &&
    ! echo x 2>&- >/dev/full && echo through >/dev/stdout && cat </dev/fd/0 && echo shared >/dev/shm/pyxis-test-$$ &&
    rm /dev/shm/pyxis-test-$$ && mknod /dev/mine c 1 3 2>&1 | grep -c 'not permitted'";

fn restricted(world: &World, options: &[&str], script: &str) -> Result<String> {
    let arguments = [&[IMAGE], options, &["sh", "-c", script]].concat();
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    Ok(process::run(command.env("ENROOT_RESTRICT_DEV", "y"), wait::DEADLINE)?.success()?.stdout)
}

fn host(world: &mut World) -> Result<()> {
    let count = |directory: &str| Ok::<_, std::io::Error>(std::fs::read_dir(directory)?.count().to_string());
    assert_eq!(world.sh(&[], "ls -A /dev | wc -l")?, count("/dev")?);
    Ok(())
}

fn restricted_by_user(world: &mut World) -> Result<()> {
    assert_eq!(restricted(world, &[], LIST)?, format!("{NAMES}\n"));
    for remap in ["--container-remap-root", "--no-container-remap-root"] {
        assert_eq!(restricted(world, &[remap], USE)?, "through\n1\n", "{remap}");
    }
    // Shared memory is the host's.
    let name = format!("pyxis-test-{}", std::process::id());
    process::output_of(world.as_user(0, "touch").arg(format!("/dev/shm/{name}")))?;
    let seen = restricted(world, &[], &format!("rm /dev/shm/{name} && echo removed"));
    let _ = std::fs::remove_file(format!("/dev/shm/{name}"));
    assert_eq!(seen?, "removed\n");
    Ok(())
}

fn restricted_by_administrator(world: &mut World) -> Result<()> {
    world.bed.pyxis.configure(&format!("[container]\nrestrict_dev = true\n{}", world.configuration()))?;
    let mut command = world.bed.cluster.command(0, "srun", [IMAGE, "sh", "-c", LIST]);
    let seen = process::run(command.env("ENROOT_RESTRICT_DEV", "n"), wait::DEADLINE);
    world.bed.pyxis.configure(&world.configuration())?;
    assert_eq!(seen?.success()?.stdout, format!("{NAMES}\n"));
    Ok(())
}

fn restricted_with_ipc(world: &mut World) -> Result<()> {
    let script = format!("{LIST}; stat -c %a /dev/shm; grep -o '^mqueue /dev/mqueue' /proc/mounts; {USE}");
    let seen = world.sh(&["--container-unshare=ipc"], &script)?;
    assert_eq!(seen, format!("{NAMES}\n1777\nmqueue /dev/mqueue\nthrough\n1"));
    Ok(())
}

/// Root of the container may unmount what was mounted for it, and finds the image's directory.
fn gone(world: &mut World) -> Result<()> {
    let seen = restricted(world, &["--container-remap-root"], "umount -l /dev; echo $(ls -A /dev | wc -l)")?;
    assert_eq!(seen, "0\n");
    Ok(())
}

fn terminals(world: &mut World) -> Result<()> {
    // One that a program inside makes for itself, and the one that Slurm made.
    world.have("debian", |_| images::debian())?;
    let options = ["--container-image=debian", "--container-unshare=ipc"];
    assert_eq!(world.sh(&options, "script -qec tty /dev/null | tr -d '\\r'")?, "/dev/pts/0");
    let line = format!("srun --pty {IMAGE} sh -c 'test -t 0 && echo terminal >/dev/tty && stty size </dev/tty'");
    let mut command = world.bed.cluster.command(0, "script", ["-qec", &line, "/dev/null"]);
    let output = process::run(command.env("ENROOT_RESTRICT_DEV", "y"), wait::DEADLINE)?.success()?;
    ensure!(output.stdout.contains("terminal"), "{output}");
    Ok(())
}
