//! Containers with a name (behaviour reference, section 3.6).

use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};
use testbed::{Output, Running, process, wait};

use crate::Case;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("what_is_written_stays", persistence),
    ("auto_creates_reuses_and_attaches", auto),
    ("create_wants_an_absent_container", create),
    ("exec_wants_a_running_container", exec),
    ("no_exec_shares_the_root_filesystem_only", no_exec),
    ("without_image_the_container_has_to_exist", without_image),
    ("names_that_no_container_can_have", impossible_names),
    ("attach_to_an_unnamed_container", attach_unnamed),
    ("attach_changes_nothing_inside", attach_changes_nothing),
    ("attached_tasks_outlive_the_first_step", outlives),
    ("other_users_have_containers_of_their_own", other_user),
    ("nodes_have_containers_of_their_own", two_nodes),
    ("many_reuse_one_name_at_once", many_reuse),
    ("several_create_one_name_at_once", many_create),
];

/// A name that no other test has.
pub fn new_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("test{}", COUNT.fetch_add(1, Ordering::SeqCst))
}

pub fn option(name: &str, flag: &str) -> String {
    format!("--container-name={name}{flag}")
}

/// A step of user 0 on node1 that says "up" when `script` is through, and then waits for its standard input to end.
pub fn start(world: &World, options: &[&str], script: &str) -> Result<Running> {
    let script = format!("{script}\necho up; exec cat");
    let arguments = [&["-w", "node1"], options, &["sh", "-c", &script]].concat();
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    let mut step = Running::start(command.stdin(Stdio::piped()))?;
    step.wait_for_text("up", wait::DEADLINE).with_context(|| step.stderr())?;
    Ok(step)
}

pub fn end(mut step: Running) -> Result<Output> {
    step.write_stdin(b"")?;
    step.wait(wait::DEADLINE)?.success()
}

/// What a script says in a step on node1, without what srun itself says while it waits. The image is not named.
pub fn sh(world: &World, options: &[&str], script: &str) -> Result<Output> {
    let mut output = world.srun(&[&["-w", "node1"], options, &["sh", "-c", script]].concat())?.success()?;
    let lines = output.stderr.lines().filter(|line| !line.starts_with("srun: "));
    output.stderr = lines.map(|line| format!("{line}\n")).collect();
    Ok(output)
}

fn persistence(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let writable = "--container-writable";
    let first = sh(world, &[&name, IMAGE, writable], "echo kept >/root/file; mkdir -m 700 /d; rm /etc/motd; ls /etc")?;
    ensure!(first.stderr.contains("pyxis: imported docker image: alpine:latest"), "{first}");
    // A job of its own, without an image, and read-only; then remapped.
    let second = sh(world, &[&name], "cat /root/file; ls -d /d; ls /etc; touch /x 2>&1 || true")?;
    assert_eq!(second.stderr, "");
    ensure!(second.stdout.starts_with("kept\n/d\n") && second.stdout.contains("Read-only file system"), "{second}");
    assert_eq!(first.stdout.lines().count() + 3, second.stdout.lines().count(), "{first}{second}");
    let third =
        sh(world, &[&name, "--container-remap-root", writable], "id -u; stat -c %u:%a /root/file /d; rm -r /d")?;
    assert_eq!(third.stdout, "0\n0:644\n0:700\n");
    // pyxis ignores an image that differs, without a word.
    let fourth =
        sh(world, &[&name, "--container-image=no-such-image"], "cat /root/file; ls -d /d 2>/dev/null || true")?;
    assert_eq!((fourth.stdout.as_str(), fourth.stderr.as_str()), ("kept\n", ""));
    Ok(())
}

fn auto(world: &mut World) -> Result<()> {
    for flag in ["", ":", ":auto"] {
        let name = option(&new_name(), flag);
        let mounted = "mkdir -p /mnt && mount -t tmpfs none /mnt && touch /mnt/of-the-first /root/left";
        let options = [&name, IMAGE, "--container-writable", "--container-remap-root"];
        let first = start(world, &options, mounted)?;
        // C042. Mounts of the second are ignored, and it says so.
        let ignored = [&*name, "--container-mounts=/etc:/host-etc", "--container-device=none.com/x=0"];
        let second = sh(world, &ignored, "ls /mnt; ls -d /host-etc 2>&1; id -u")?;
        ensure!(second.stdout.starts_with("of-the-first\nls: ") && second.stdout.ends_with("\n0\n"), "{second}");
        let line =
            |option: &str| format!("pyxis: ignoring --container-{option} when attaching to a running container\n");
        assert_eq!(second.stderr, line("mounts") + &line("device"));
        end(first)?;
        let third = sh(world, &[&name, "--container-mounts=/etc:/host-etc"], "ls /mnt /root; ls -d /host-etc")?;
        assert_eq!((third.stdout.as_str(), third.stderr.as_str()), ("/mnt:\n\n/root:\nleft\n/host-etc\n", ""));
    }
    Ok(())
}

const EXISTS: &str = "pyxis: error: \"create\" flag was passed to --container-name but the container already exists";
const NOT_RUNNING: &str = "pyxis: error: \"exec\" flag was passed to --container-name but the container is not running";

fn create(world: &mut World) -> Result<()> {
    let name = new_name();
    let create = option(&name, ":create");
    let first = start(world, &[&create, IMAGE], "")?;
    world.refused(&["-w", "node1", &create, IMAGE], EXISTS)?;
    end(first)?;
    world.refused(&["-w", "node1", &create, IMAGE], EXISTS)?;
    // Elsewhere there is none.
    world.srun(&["-w", "node2", &create, IMAGE, "true"])?.success()?;
    // A start that fails makes no container.
    let create = option(&new_name(), ":create");
    world.refused(&["-w", "node1", &create, IMAGE, "--container-mounts=/nonexistent:/x"], "does not exist")?;
    world.refused(&["-w", "node1", &create, "--container-image=no-such-image"], "failed to import")?;
    world.srun(&["-w", "node1", &create, IMAGE, "true"])?.success().map(drop)
}

fn exec(world: &mut World) -> Result<()> {
    let name = new_name();
    let exec = option(&name, ":exec");
    world.refused(&["-w", "node1", &exec, IMAGE], NOT_RUNNING)?;
    let first = start(world, &[&option(&name, ""), IMAGE], "cd /tmp; touch private")?;
    // C044: not where the other one is.
    assert_eq!(sh(world, &[&exec], "pwd; ls /tmp")?.stdout, "/\nprivate\n");
    assert_eq!(sh(world, &[&exec, "--container-workdir=/tmp"], "pwd")?.stdout, "/tmp\n");
    end(first)?;
    world.refused(&["-w", "node1", &exec], NOT_RUNNING).map(drop)
}

fn no_exec(world: &mut World) -> Result<()> {
    let name = new_name();
    let no_exec = option(&name, ":no_exec");
    let identity = "stat -Lc %i /proc/self/ns/mnt /proc/self/ns/user";
    let first =
        start(world, &[&no_exec, IMAGE, "--container-writable"], &format!("{identity}; touch /root/first /tmp/first"))?;
    let script = format!("{identity}; cat /root/first && touch /root/second; ls /tmp; ls -d /host-etc");
    let second = sh(world, &[&no_exec, "--container-writable", "--container-mounts=/etc:/host-etc"], &script)?;
    let (ours, theirs) = (second.stdout.clone(), first.stdout());
    let ours: Vec<_> = ours.lines().collect();
    let theirs: Vec<_> = theirs.lines().collect();
    ensure!(ours.len() == 3 && ours[2] == "/host-etc", "{second}");
    ensure!(ours[0] != theirs[0] && ours[1] != theirs[1], "{theirs:?} {ours:?}");
    // Read-only for one and writable for the other, at once.
    let third = sh(world, &[&no_exec], "ls /root; touch /root/third 2>&1 || true")?;
    ensure!(third.stdout.starts_with("first\nsecond\n") && third.stdout.contains("Read-only file system"), "{third}");
    end(first)?;
    assert_eq!(sh(world, &[&no_exec], "ls /root")?.stdout, "first\nsecond\n");
    Ok(())
}

fn without_image(world: &mut World) -> Result<()> {
    let name = new_name();
    for flag in ["", ":create", ":no_exec"] {
        let text = format!(
            "pyxis: error: a container with name \"pyxis_{name}\" does not exist, and --container-image is not set"
        );
        world.refused(&[&option(&name, flag)], &text)?;
    }
    Ok(())
}

fn impossible_names(world: &mut World) -> Result<()> {
    for name in ["a/b", "/", "../x", &"n".repeat(250)] {
        world.refused(&[&option(name, ""), IMAGE], "pyxis: --container-name: ")?;
    }
    for name in ["..", "a b", "ümlaut,comma\\", &"n".repeat(249)] {
        let name = option(name, "");
        sh(world, &[&name, IMAGE, "--container-writable"], "touch /root/here")?;
        assert_eq!(sh(world, &[&name], "ls /root")?.stdout, "here\n");
    }
    Ok(())
}

fn attach_unnamed(world: &mut World) -> Result<()> {
    let first = start(world, &[IMAGE], "touch /tmp/first; echo $SLURM_JOB_ID.$SLURM_STEP_ID")?;
    let id = first.stdout().lines().next().context("no output")?.to_owned();
    let exec = option(&id, ":exec");
    assert_eq!(sh(world, &[&exec], "ls /tmp")?.stdout, "first\n");
    assert_eq!(sh(world, &[&option(&id, "")], "ls /tmp")?.stdout, "first\n");
    // Only its user may.
    let output =
        process::run(&mut world.bed.cluster.command(1, "srun", ["-w", "node1", &exec, "ls", "/tmp"]), wait::DEADLINE)?;
    ensure!(!output.status.success() && output.stderr.contains(NOT_RUNNING), "{output}");
    end(first)?;
    world.refused(&["-w", "node1", &exec], NOT_RUNNING).map(drop)
}

/// W17, C046: whatever runs there.
fn attach_changes_nothing(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let script = "echo changed >/etc/passwd; echo changed >/etc/hostname2; mount -t tmpfs none /var; \
                  find / -xdev -type f -exec stat -c '%n %Y %i' {} + >/tmp/before; \
                  exec -a 'sshd: user [priv] (odd) \n)' sleep 300 & echo $! >/tmp/pid";
    let first = start(world, &[&name, IMAGE, "--container-writable", "--container-remap-root"], script)?;
    let look = "find / -xdev -type f -exec stat -c '%n %Y %i' {} + >/tmp/after; cmp /tmp/before /tmp/after && cat /etc/passwd; \
                echo $HOME $USER $PATH";
    let second = sh(world, &[&name], look)?;
    ensure!(second.stdout.starts_with("changed\n/root root /"), "{second}");
    sh(world, &[&name], "kill $(cat /tmp/pid)")?;
    end(first).map(drop)
}

fn outlives(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let first = start(world, &[&name, IMAGE, "--container-writable"], "touch /tmp/first")?;
    let second = start(world, &[&name], "")?;
    end(first)?;
    // The container runs on as long as somebody is in it: neither is it started anew nor its upper layer used twice.
    let third = sh(world, &[&name], "ls /tmp")?;
    assert_eq!(third.stdout, "first\n");
    end(second)?;
    assert_eq!(sh(world, &[&name], "ls /tmp")?.stdout, "");
    Ok(())
}

fn other_user(world: &mut World) -> Result<()> {
    let name = new_name();
    let first = start(world, &[&option(&name, ""), IMAGE, "--container-writable"], "touch /root/mine")?;
    let output = world.sh_as(
        1,
        &["-w", "node1", &option(&name, ""), "--container-writable"],
        "ls /root; touch /root/his; id -u",
    )?;
    assert_eq!(output, world.user(1).uid.to_string());
    end(first)?;
    assert_eq!(sh(world, &[&option(&name, "")], "ls /root")?.stdout, "mine\n");
    Ok(())
}

fn two_nodes(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    world
        .srun(&["-N2", &name, IMAGE, "--container-writable", "sh", "-c", "echo $SLURMD_NODENAME >/root/node"])?
        .success()?;
    let output = world.srun(&["-N2", &name, "sh", "-c", "cat /root/node"])?.success()?;
    assert_eq!(sorted(&output.stdout), ["node1", "node2"]);
    Ok(())
}

/// C051.
fn many_reuse(world: &mut World) -> Result<()> {
    let name = new_name();
    sh(world, &[&option(&name, ""), IMAGE, "--container-writable"], "touch /root/shared")?;
    let no_exec = option(&name, ":no_exec");
    let step = format!(
        "srun --overlap -N1 -n1 --quiet {no_exec} --container-writable sh -c 'ls /root/shared; echo $$ >/root/$SLURM_STEP_ID'"
    );
    let script = format!("for i in $(seq 50); do {step} & done; wait; srun {no_exec} sh -c 'ls /root | wc -l'");
    let arguments = ["-w", "node1", "--quiet", "sh", "-c", &script];
    let output = process::run(&mut world.bed.cluster.command(0, "salloc", arguments), wait::DEADLINE * 4)?.success()?;
    assert_eq!(output.stdout.matches("/root/shared\n").count(), 50, "{output}");
    ensure!(output.stdout.ends_with("51\n"), "{output}");
    Ok(())
}

fn many_create(world: &mut World) -> Result<()> {
    for flag in ["", ":no_exec"] {
        let name = option(&new_name(), flag);
        let image = format!("--container-image={}", world.new_image(1 << 20)?);
        let step = format!(
            "srun --overlap -N1 -n1 {name} {image} --container-writable sh -c 'echo in; echo $SLURM_STEP_ID >>/root/steps'"
        );
        let script = format!("for i in $(seq 5); do {step} & done; wait; srun {name} sh -c 'wc -l </root/steps'");
        let arguments = ["-w", "node1", "--quiet", "sh", "-c", &script];
        let output =
            process::run(&mut world.bed.cluster.command(0, "salloc", arguments), wait::DEADLINE * 4)?.success()?;
        assert_eq!(output.stdout.matches("in\n").count(), 5, "{output}");
        ensure!(output.stdout.ends_with("5\n"), "{output}");
        assert_eq!(output.stderr.matches("pyxis: imported docker image").count(), 1, "{output}");
    }
    Ok(())
}
