//! What a user sees when all goes well.

use anyhow::Result;
use testbed::images::PRETTY_NAME;

use crate::Case;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("seed", seed),
    ("a_second_step_says_the_same", seed),
    ("several_tasks_hide_the_first_line", several_tasks),
    ("every_node_reports_its_import", two_nodes),
    ("without_options_nothing_changes", without_options),
    ("plugin_listed_twice_is_harmless", listed_twice),
];

/// The session in the README, to the letter.
fn seed(world: &mut World) -> Result<()> {
    let output = world.srun(&[IMAGE, "grep", "PRETTY", "/etc/os-release"])?.success()?;
    assert_eq!(output.stdout, format!("PRETTY_NAME=\"{PRETTY_NAME}\"\n"));
    assert_eq!(
        output.stderr,
        "pyxis: importing docker image: alpine:latest\npyxis: imported docker image: alpine:latest\n"
    );
    Ok(())
}

fn several_tasks(world: &mut World) -> Result<()> {
    let output = world.srun(&["-n3", "-N1", IMAGE, "echo", "hello"])?.success()?;
    assert_eq!(output.stdout, "hello\n".repeat(3));
    assert_eq!(output.stderr, "pyxis: imported docker image: alpine:latest\n");
    Ok(())
}

fn two_nodes(world: &mut World) -> Result<()> {
    let output = world.srun(&["-N2", "--label", IMAGE, "cat", "/etc/os-release"])?.success()?;
    let names: Vec<_> = sorted(&output.stdout).into_iter().filter(|line| line.contains("PRETTY")).collect();
    assert_eq!(names, [format!("0: PRETTY_NAME=\"{PRETTY_NAME}\""), format!("1: PRETTY_NAME=\"{PRETTY_NAME}\"")]);
    assert_eq!(output.stderr.matches("pyxis: imported docker image: alpine:latest\n").count(), 2, "{output}");
    Ok(())
}

fn without_options(world: &mut World) -> Result<()> {
    let output = world.srun(&["-N2", "sh", "-c", ". /etc/os-release; echo $ID"])?.success()?;
    assert_eq!((output.stdout.as_str(), output.stderr.as_str()), ("debian\ndebian\n", ""));
    Ok(())
}

fn listed_twice(world: &mut World) -> Result<()> {
    let line = &world.bed.pyxis.plugstack;
    world.bed.cluster.set_plugstack(&line.repeat(2))?;
    let result = world.srun(&["-n2", "-N1", IMAGE, "sh", "-c", "grep -c . /etc/os-release"]);
    world.bed.cluster.set_plugstack(line)?;
    let output = result?.success()?;
    assert_eq!(output.stdout, "2\n2\n");
    assert_eq!(output.stderr.matches("pyxis: imported docker image").count(), 1, "{output}");
    Ok(())
}
