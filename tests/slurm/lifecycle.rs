//! The end of steps, also of those that end badly. That nothing is left is checked after every test.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::node::NodeProcess;
use testbed::proxy::Behaviour;
use testbed::{Output, Running, wait};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("cancel_a_running_step", cancel_running),
    ("interrupt_srun", interrupt),
    ("cancel_while_importing", cancel_importing),
    ("cancel_one_of_two_that_import_the_same", cancel_one_importer),
    ("cancel_the_one_that_waits_for_another", cancel_one_waiting),
    ("cancel_at_once", cancel_at_once),
    ("kill_a_task", kill_task),
    ("kill_the_leader_while_importing", kill_leader),
    ("kill_the_broker", kill_broker),
    ("kill_the_importer", kill_importer),
    ("kill_slurmstepd_while_running", kill_stepd_running),
    ("kill_slurmstepd_while_importing", kill_stepd_importing),
    ("daemons_left_by_a_task_end_with_the_step", stray_daemon),
    ("restart_slurmd_under_a_step", restart_slurmd),
    ("broken_configuration", broken_configuration),
    ("missing_executable", missing_executable),
];

/// Starts a step on node1 that says "up" and then waits for its standard input to end.
fn start_waiting(world: &World, options: &[&str]) -> Result<Running> {
    let arguments = [&["-w", "node1", IMAGE], options, &["sh", "-c", "echo up; exec cat"]].concat();
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    let mut step = Running::start(command.stdin(std::process::Stdio::piped()))?;
    step.wait_for_text("up", wait::DEADLINE)?;
    Ok(step)
}

/// Starts a step on node1 in a new image and waits until its import stalls. Gives the image, too.
fn start_stalled(world: &World, options: &[&str]) -> Result<(Running, String)> {
    start_stalled_after(world, options, 200_000)
}

/// The same with each connection stalling after `bytes`: with none, the registry does not even say what the image is.
fn start_stalled_after(world: &World, options: &[&str], bytes: u64) -> Result<(Running, String)> {
    let image = format!("--container-image={}/library/{}", world.proxy.host(), world.new_image(1 << 20)?);
    world.proxy.set(Behaviour::StallAfter(bytes));
    let step = world.start(&[&["-w", "node1", image.as_str()], options, &["echo", "it ran"]].concat())?;
    world.proxy.wait_until_held(wait::DEADLINE).with_context(|| format!("srun says: {}", step.stderr()))?;
    Ok((step, image))
}

/// The stalled step ends, unsuccessfully and soon; the same image can be had afterwards.
fn ended_and_recovered(world: &World, step: Running, image: &str) -> Result<Output> {
    // Well before the 30 s after which the importer itself would notice a stalled connection.
    let output = step.wait(Duration::from_secs(20))?;
    ensure!(!output.status.success() && !output.stdout.contains("it ran"), "{output}");
    world.proxy.set(Behaviour::Pass);
    wait::until("node1 to take steps again", wait::DEADLINE, || {
        world.srun(&["-w", "node1", image, "cat", "/etc/os-release"]).ok()?.success().ok()
    })?;
    Ok(output)
}

fn find(world: &World, name: &str) -> Result<NodeProcess> {
    let find =
        || world.bed.cluster.nodes()[0].processes().into_iter().find(|process| process.command.starts_with(name));
    wait::until(&format!("a process {name}"), wait::DEADLINE, find)
        .with_context(|| format!("{:#?}", world.bed.cluster.nodes()[0].processes()))
}

fn slay(process: &NodeProcess) -> Result<()> {
    kill(Pid::from_raw(process.pid), Signal::SIGKILL).with_context(|| format!("{process:?}"))
}

fn cancel_job(world: &World) -> Result<()> {
    let uid = world.user(0).uid.to_string();
    world.bed.cluster.admin("scancel", ["--user", &uid]).map(drop)
}

fn cancel_running(world: &mut World) -> Result<()> {
    let step = start_waiting(world, &["-n3"])?;
    cancel_job(world)?;
    ensure!(!step.wait(wait::DEADLINE)?.status.success());
    Ok(())
}

fn interrupt(world: &mut World) -> Result<()> {
    let mut step = start_waiting(world, &[])?;
    // Twice within a second is what ends a step.
    step.signal(Signal::SIGINT)?;
    step.wait_for_text("one more within", wait::DEADLINE)?;
    step.signal(Signal::SIGINT)?;
    ensure!(!step.wait(wait::DEADLINE)?.status.success());
    Ok(())
}

fn cancel_importing(world: &mut World) -> Result<()> {
    for (options, bytes) in [(["-n1"], 200_000), (["-n3"], 200_000), (["-n3"], 0)] {
        let (step, image) = start_stalled_after(world, &options, bytes)?;
        cancel_job(world)?;
        ended_and_recovered(world, step, &image)?;
    }
    Ok(())
}

/// Whatever a start is doing when the job is cancelled: nothing stays, and no node is lost.
fn cancel_at_once(world: &mut World) -> Result<()> {
    for number in 0..12 {
        let name = format!("--job-name=early{number}");
        let step = world.start(&[&name, "-N2", "-n4", IMAGE, "sh", "-c", "echo up; exec sleep 1000"])?;
        let running = || {
            let jobs = world.bed.cluster.admin("squeue", ["--noheader", "--states=RUNNING", "--format=%j"]).ok()?;
            jobs.lines().any(|job| job.trim() == name.trim_start_matches("--job-name=")).then_some(())
        };
        wait::until("the job", wait::DEADLINE, running)?;
        // Later and later after Slurm has given it its nodes.
        for _ in 0..number {
            world.bed.cluster.node_states()?;
        }
        cancel_job(world)?;
        let output = step.wait(wait::DEADLINE)?;
        ensure!(!output.status.success(), "{output}");
    }
    world.nodes_work()
}

/// The other one takes the import over.
fn cancel_one_importer(world: &mut World) -> Result<()> {
    let (first, image) = start_stalled(world, &["--job-name=first"])?;
    let second = world.start(&["-w", "node1", "--job-name=second", &image, "echo", "second ran"])?;
    world.bed.cluster.admin("scancel", ["--name=first"])?;
    ensure!(!first.wait(Duration::from_secs(20))?.status.success());
    world.proxy.set(Behaviour::Pass);
    assert_eq!(second.wait(wait::DEADLINE)?.success()?.stdout, "second ran\n");
    Ok(())
}

/// It waits for what another step downloads, and goes; the other one is not disturbed.
fn cancel_one_waiting(world: &mut World) -> Result<()> {
    let (first, image) = start_stalled(world, &["--job-name=first"])?;
    let second = world.start(&["-w", "node1", "-n2", "--job-name=second", &image, "echo", "second ran"])?;
    let brokers = || world.bed.cluster.nodes()[0].processes();
    let waiting = || brokers().iter().filter(|process| process.command.starts_with("pyxis-broker")).count() == 2;
    wait::until("the second step to wait", wait::DEADLINE, || waiting().then_some(()))?;
    world.bed.cluster.admin("scancel", ["--name=second"])?;
    let output = second.wait(Duration::from_secs(20))?;
    ensure!(!output.status.success() && !output.stdout.contains("second ran"), "{output}");
    world.proxy.set(Behaviour::Pass);
    assert_eq!(first.wait(wait::DEADLINE)?.success()?.stdout, "it ran\n");
    Ok(())
}

fn kill_task(world: &mut World) -> Result<()> {
    let mut step = start_waiting(world, &["-n2"])?;
    slay(&find(world, "cat")?)?;
    // The other one ends by itself.
    step.write_stdin(b"")?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(output.code() == 137, "{output}");
    Ok(())
}

/// The task that waits for the import is not a program yet: it is still a copy of slurmstepd.
fn kill_leader(world: &mut World) -> Result<()> {
    let (step, image) = start_stalled(world, &["-n2"])?;
    let broker = find(world, "pyxis-broker")?;
    let leader = testbed::process::parent(broker.pid).context("the broker has no parent")?;
    kill(Pid::from_raw(leader), Signal::SIGKILL)?;
    let output = ended_and_recovered(world, step, &image)?;
    ensure!(output.stderr.contains("a previous task terminated unexpectedly during container setup"), "{output}");
    Ok(())
}

fn kill_broker(world: &mut World) -> Result<()> {
    let (step, image) = start_stalled(world, &["-n2"])?;
    slay(&find(world, "pyxis-broker")?)?;
    ended_and_recovered(world, step, &image).map(drop)
}

fn kill_importer(world: &mut World) -> Result<()> {
    let (step, image) = start_stalled(world, &[])?;
    slay(&find(world, "pyxis-importer")?)?;
    ended_and_recovered(world, step, &image).map(drop)
}

/// The step manager of the one step on node1.
fn stepd(world: &World) -> Result<NodeProcess> {
    let processes = world.bed.cluster.nodes()[0].processes();
    // Tasks that are not programs yet are copies of it: it is the one that is nobody's child here.
    let pids: Vec<_> = processes.iter().map(|process| process.pid).collect();
    let manager = |process: &&NodeProcess| {
        process.name.starts_with("slurmstepd")
            && testbed::process::parent(process.pid).is_none_or(|parent| !pids.contains(&parent))
    };
    processes.iter().find(manager).cloned().with_context(|| format!("no slurmstepd: {processes:#?}"))
}

/// Kills it.
pub fn kill_stepd(world: &World) -> Result<()> {
    slay(&stepd(world)?)
}

fn kill_stepd_running(world: &mut World) -> Result<()> {
    let step = start_waiting(world, &["-n2"])?;
    kill_stepd(world)?;
    cancel_job(world)?;
    // Its tasks end with their standard input. (srun gives up waiting, and says 0, also without a container.)
    drop(step.wait(wait::DEADLINE * 2)?);
    world.srun(&["-w", "node1", IMAGE, "true"])?.success()?;
    Ok(())
}

fn kill_stepd_importing(world: &mut World) -> Result<()> {
    let (step, image) = start_stalled(world, &["-n2"])?;
    kill_stepd(world)?;
    cancel_job(world)?;
    drop(step.wait(wait::DEADLINE * 2)?);
    world.proxy.set(Behaviour::Pass);
    wait::until("node1 to take steps again", wait::DEADLINE, || {
        world.srun(&["-w", "node1", &image, "true"]).ok()?.success().ok()
    })?;
    Ok(())
}

/// What a task leaves in the background is Slurm's to kill, with the process tracker that the cluster has; the container
/// itself must not survive.
fn stray_daemon(world: &mut World) -> Result<()> {
    world
        .srun(&["-w", "node1", IMAGE, "sh", "-c", "sleep 1000 </dev/null >/dev/null 2>&1 & echo started"])?
        .success()?;
    for process in world.bed.cluster.nodes()[0].processes() {
        // proctrack/linuxproc loses orphans, in containers and outside.
        if process.command.starts_with("sleep 1000") {
            slay(&process)?;
        }
    }
    Ok(())
}

fn restart_slurmd(world: &mut World) -> Result<()> {
    let mut step = start_waiting(world, &[])?;
    let node = &mut world.bed.cluster.nodes_mut()[0];
    node.stop_slurmd();
    node.start_slurmd(&world.bed.site)?;
    step.write_stdin(b"still here\n")?;
    let output = step.wait(wait::DEADLINE)?.success()?;
    assert_eq!(output.stdout, "up\nstill here\n");
    Ok(())
}

/// An error of the administrator's: steps fail with a line that names it, nodes stay up, other steps do not care.
fn broken_configuration(world: &mut World) -> Result<()> {
    world.bed.pyxis.configure("[container]\nwriteable = true\n")?;
    let result = world.refused(&[IMAGE], "pyxis.toml:2");
    let bare = world.nodes_work();
    world.bed.pyxis.configure(&world.configuration())?;
    result?;
    bare
}

fn missing_executable(world: &mut World) -> Result<()> {
    let executable = world.bed.pyxis.executable.clone();
    let hidden = executable.with_extension("hidden");
    std::fs::rename(&executable, &hidden)?;
    let result = world.refused(&[IMAGE], "pyxis: ");
    let bare = world.nodes_work();
    std::fs::rename(&hidden, &executable)?;
    result?;
    bare
}
