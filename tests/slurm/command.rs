//! The `pyxis` command on a node: the same containers without Slurm, and the administrator's view.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use testbed::images::PRETTY_NAME;
use testbed::{Output, process, wait};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("run", run),
    ("run_as_a_step_would", run_options),
    ("run_fails_in_one_line", run_fails),
    ("doctor", doctor),
    ("gc_leaves_what_is_in_use", gc),
];

/// Runs `pyxis ARGUMENTS` as root on node1.
fn pyxis(world: &World, arguments: &[&str]) -> Result<Output> {
    let program = world.bed.pyxis.executable.display().to_string();
    let mut command = world.bed.cluster.nodes()[0].command(&program);
    command.arg("--config").arg(&world.bed.pyxis.config).args(arguments);
    process::run(&mut command, wait::DEADLINE)
}

fn run(world: &mut World) -> Result<()> {
    let output = pyxis(
        world,
        &["run", "--user", "pyxis-test-2", "alpine", "--", "sh", "-c", "grep PRETTY /etc/os-release; id -un"],
    )?;
    assert_eq!(output.success()?.stdout, format!("PRETTY_NAME=\"{PRETTY_NAME}\"\npyxis-test-2\n"));
    for code in [0, 7] {
        assert_eq!(pyxis(world, &["run", "--user=1", "alpine", "sh", "-c", &format!("exit {code}")])?.code(), code);
    }
    assert_eq!(pyxis(world, &["run", "--user", "pyxis-test-1", "alpine", "sh", "-c", "kill -TERM $$"])?.code(), 143);
    Ok(())
}

fn run_options(world: &mut World) -> Result<()> {
    let user = world.user(0).clone();
    let mount = format!("--container-mounts={}:/work", user.home.join("work").display());
    let script = "id -u; pwd; echo $GREETING; touch /new /work/by-run && echo written";
    let output = pyxis(
        world,
        &[
            "run",
            "--user",
            &user.name,
            "--container-remap-root",
            "--container-writable",
            "--container-workdir=/usr",
            "--container-env=GREETING=hello",
            &mount,
            "alpine",
            "--",
            "sh",
            "-c",
            script,
        ],
    )?;
    assert_eq!(output.success()?.stdout, "0\n/usr\nhello\nwritten\n");
    std::fs::remove_file(user.home.join("work/by-run"))?;
    Ok(())
}

fn run_fails(world: &mut World) -> Result<()> {
    for (arguments, text) in [
        (&["run", "--user=nobody-of-that-name", "alpine", "true"][..], "no such user"),
        (&["run", "no-such-image", "true"], "no-such-image"),
        (&["run", "alpine", "no-such-command"], "no-such-command"),
        (&["run", "--container-mounts=:", "alpine", "true"], "--container-mounts: invalid format: :"),
        (&["run", "--container-workdir=/nowhere", "alpine", "true"], "couldn't chdir to /nowhere"),
    ] {
        let output = pyxis(world, arguments)?;
        ensure!(!output.status.success() && output.stderr.contains(text), "{text}: {output}");
        ensure!(!output.stderr.contains("panicked"), "{output}");
    }
    ensure!(pyxis(world, &["run"])?.code() == 2, "a wrong command line");
    Ok(())
}

fn doctor(world: &mut World) -> Result<()> {
    let text = pyxis(world, &["doctor"])?.success()?.stdout;
    ensure!(text.lines().count() > 4, "{text}");
    let checks: Value = serde_json::from_str(&pyxis(world, &["doctor", "--json"])?.success()?.stdout)?;
    let checks = checks.as_array().context("a list")?;
    ensure!(checks.iter().all(|check| check["name"].is_string() && check["status"].is_string()), "{checks:?}");
    Ok(())
}

fn gc(world: &mut World) -> Result<()> {
    let collect = |world: &World| -> Result<Value> {
        Ok(serde_json::from_str(&pyxis(world, &["gc", "--all", "--json"])?.success()?.stdout)?)
    };
    // Containers that other tests have kept hold their layers.
    let kept = world.bed.cluster.nodes()[0].private("/var/lib/pyxis").join("containers");
    match std::fs::remove_dir_all(&kept) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
        _ => {}
    }
    collect(world)?;
    let mut command =
        world.bed.cluster.command(0, "srun", ["-w", "node1", IMAGE, "sh", "-c", "echo up; cat; ls /bin/ash"]);
    let mut step = testbed::Running::start(command.stdin(std::process::Stdio::piped()))?;
    step.wait_for_text("up", wait::DEADLINE)?;
    let report = collect(world)?;
    ensure!(report["removed"].as_array().is_some_and(Vec::is_empty), "{report}");
    step.write_stdin(b"")?;
    assert_eq!(step.wait(wait::DEADLINE)?.success()?.stdout, "up\n/bin/ash\n");
    world.bed.cluster.wait_until_idle()?;
    let removed = wait::until("the layer to be free", wait::DEADLINE, || {
        let report = collect(world).ok()?;
        report["removed"].as_array().filter(|layers| !layers.is_empty()).cloned()
    })?;
    assert_eq!(removed.len(), 1);
    world.srun(&["-w", "node1", IMAGE, "true"])?.success()?;
    Ok(())
}
