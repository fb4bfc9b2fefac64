//! What users see of an import that takes its time.

use anyhow::{Result, ensure};
use testbed::proxy::Behaviour;
use testbed::{process, wait};

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("lines_now_and_then", lines),
    ("trouble_is_told", trouble),
    ("a_terminal_has_one_line", terminal),
    ("none_if_the_site_wants_none", quiet),
];

/// Bytes of the image, and how many a second come: a few seconds' worth.
const SIZE: usize = 4 << 20;
const RATE: u64 = 1 << 20;

/// The output of a step in an image that comes slowly, with lines each second.
fn slow(
    world: &mut World,
    behaviour: Behaviour,
    run: impl FnOnce(&World, &str) -> Result<process::Output>,
) -> Result<(String, process::Output)> {
    slow_with(world, "after_seconds = 1\ninterval_seconds = 1\n", behaviour, run)
}

/// The same with other settings.
fn slow_with(
    world: &mut World,
    settings: &str,
    behaviour: Behaviour,
    run: impl FnOnce(&World, &str) -> Result<process::Output>,
) -> Result<(String, process::Output)> {
    let image = format!("{}/library/{}", world.proxy.host(), world.new_image(SIZE)?);
    let often = world.configuration() + "[progress]\n" + settings;
    world.bed.pyxis.configure(&often)?;
    world.proxy.set(behaviour);
    let output = run(world, &image);
    world.proxy.set(Behaviour::Pass);
    world.bed.pyxis.configure(&world.configuration())?;
    Ok((image, output?.success()?))
}

fn lines(world: &mut World) -> Result<()> {
    let (image, output) = slow(world, Behaviour::Throttle(RATE), |world, image| {
        world.srun(&["-N2", &format!("--container-image={image}"), "true"])
    })?;
    let lines: Vec<&str> = output.stderr.lines().collect();
    let (own, progress): (Vec<&str>, Vec<&str>) = lines.iter().partition(|line| line.contains("docker image"));
    assert_eq!(own, vec![format!("pyxis: imported docker image: {image}"); 2], "{output}");
    // Those of one of the two nodes.
    ensure!((1..12).contains(&progress.len()), "{output}");
    let about = format!("pyxis: {image}: ");
    ensure!(progress.iter().all(|line| line.starts_with(&about)), "{output}");
    ensure!(progress.iter().any(|line| line.contains(" MiB of ") && line.contains("/s, ")), "{output}");
    ensure!(progress.iter().any(|line| line.ends_with(", 0 of 1 layer")), "{output}");
    Ok(())
}

fn trouble(world: &mut World) -> Result<()> {
    let answer = Behaviour::Answer("503 Service Unavailable\r\nRetry-After: 3");
    let (image, output) = slow(world, answer, |world, image| {
        let step = world.start(&["-N1", &format!("--container-image={image}"), "true"])?;
        let requests = world.proxy.requests();
        wait::until("a request", wait::DEADLINE, || (world.proxy.requests() > requests).then_some(()))?;
        world.proxy.set(Behaviour::Pass);
        step.wait(wait::DEADLINE)
    })?;
    let expected = format!(
        "pyxis: {image}: waiting for the registry; {} answers 503 Service Unavailable to the request for manifest latest: \
         trying again in 3 s\n",
        world.proxy.host()
    );
    ensure!(output.stderr.contains(&expected), "{output}");
    Ok(())
}

fn terminal(world: &mut World) -> Result<()> {
    let (image, output) = slow(world, Behaviour::Throttle(RATE), |world, image| {
        let line = format!("srun -N1 --pty --container-image={image} echo done");
        process::run(&mut world.bed.cluster.command(0, "script", ["-qec", &line, "/dev/null"]), wait::DEADLINE)
    })?;
    // What the terminal shows: each line replaces the one before, and none stays.
    let live = format!("\r\x1b[K{image}: ");
    ensure!(output.stdout.matches(&live).count() >= 2, "{output:?}");
    let kept: Vec<&str> =
        output.stdout.lines().filter_map(|line| line.rsplit("\x1b[K").next()).map(str::trim_end).collect();
    ensure!(kept.contains(&"done") && !kept.iter().any(|line| line.contains("MiB")), "{kept:?}");
    Ok(())
}

fn quiet(world: &mut World) -> Result<()> {
    let settings = "after_seconds = 0\ninterval_seconds = 0\n";
    let (image, output) = slow_with(world, settings, Behaviour::Throttle(RATE), |world, image| {
        world.srun(&["-N1", &format!("--container-image={image}"), "true"])
    })?;
    let own = format!("pyxis: importing docker image: {image}\npyxis: imported docker image: {image}\n");
    assert_eq!(output.stderr, own);
    let (image, output) = slow_with(world, settings, Behaviour::Throttle(RATE), |world, image| {
        let line = format!("srun -N1 --pty --container-image={image} echo done");
        process::run(&mut world.bed.cluster.command(0, "script", ["-qec", &line, "/dev/null"]), wait::DEADLINE)
    })?;
    ensure!(output.stdout.contains("done") && !output.stdout.contains(&format!("{image}: ")), "{output:?}");
    Ok(())
}
