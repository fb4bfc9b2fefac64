//! MPI programs, started by Slurm through PMIx and PMI-2: several tasks on several nodes.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use testbed::image::{Compression, ImageBuilder};
use testbed::{Output, Running, images, mpi, process, wait};

use crate::Case;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("openmpi_through_pmix", pmix),
    ("mpich_through_pmi2", pmi2),
    ("pmix_says_each_task_who_it_is", pmix_variables),
    ("pmi_descriptors_are_each_tasks_own", pmi_variables),
    ("pmix_directories_elsewhere", directories_elsewhere),
    ("pmix_directory_that_cannot_be_mounted", unmountable),
    ("leftovers_of_an_outer_step", leftovers),
];

const MPI_IMAGE: &str = "--container-image=mpi";
/// Two tasks on each of two nodes.
const FOUR: [&str; 3] = ["-N2", "-n4", "--ntasks-per-node=2"];
/// What the ranks of four tasks say.
const SUMS: [&str; 4] = ["rank 0 of 4: sum 6", "rank 1 of 4: sum 6", "rank 2 of 4: sum 6", "rank 3 of 4: sum 6"];

fn have_image(world: &mut World) -> Result<()> {
    world.have("mpi", |_| mpi::image())
}

/// The ranks of `output` have met, and nothing was said that is not said without MPI.
fn met(output: &Output) -> Result<()> {
    assert_eq!(sorted(&output.stdout), SUMS, "{output}");
    let usual = |line: &&str| line.starts_with("pyxis: imported docker image") || line.starts_with("srun: job ");
    let others: Vec<_> = output.stderr.lines().filter(|line| !usual(line)).collect();
    ensure!(others.is_empty(), "{output}");
    Ok(())
}

/// A step of four ranks on two nodes. The nodes are one machine, and have one name: ranks on different ones would try to
/// share memory, too.
fn on_two_nodes(world: &World, how: &str, program: &[&str]) -> Command {
    let arguments = [&[how], &FOUR[..], &[MPI_IMAGE], program].concat();
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    command.envs([("OMPI_MCA_btl", "self,tcp"), ("UCX_TLS", "^sysv")]);
    command
}

/// On two nodes, and on one, where the ranks share memory.
fn pmix(world: &mut World) -> Result<()> {
    have_image(world)?;
    met(&process::run(&mut on_two_nodes(world, "--mpi=pmix", &[mpi::PMIX_PROGRAM]), wait::DEADLINE)?.success()?)?;
    met(&world.srun(&["--mpi=pmix", "-N1", "-n4", MPI_IMAGE, mpi::PMIX_PROGRAM])?.success()?)
}

fn pmi2(world: &mut World) -> Result<()> {
    have_image(world)?;
    let mut command = on_two_nodes(world, "--mpi=pmi2", &[mpi::PMI_PROGRAM, "until-end-of-input"]);
    let mut step = Running::start(command.stdin(Stdio::piped()))?;
    for line in SUMS {
        step.wait_for_text(line, wait::DEADLINE)?;
    }
    step.write_stdin(b"")?;
    met(&step.wait(wait::DEADLINE)?.success()?)?;
    met(&world.srun(&["--mpi=pmi2", "-N1", "-n4", MPI_IMAGE, mpi::PMI_PROGRAM])?.success()?)
}

fn pmix_variables(world: &mut World) -> Result<()> {
    let script = "echo $PMIX_RANK $SLURM_PROCID $SLURM_LOCALID $PMIX_MCA_gds; test -d $PMIX_SERVER_TMPDIR && ls $PMIX_SERVER_TMPDIR | grep -c dstor";
    let output = world.srun(&[&["--mpi=pmix"], &FOUR[..], &[IMAGE, "sh", "-c", script]].concat())?.success()?;
    let lines = sorted(&output.stdout);
    let (modules, ranks): (Vec<_>, Vec<_>) = lines.into_iter().partition(|line| !line.contains(' '));
    assert_eq!(modules, ["2"; 4], "{output}");
    for (rank, line) in ranks.iter().enumerate() {
        ensure!(line.starts_with(&format!("{rank} {rank} {} ", rank % 2)) && line.contains("hash"), "{output}");
    }
    Ok(())
}

fn pmi_variables(world: &mut World) -> Result<()> {
    // The descriptor is a socket, and Slurm's server answers on it.
    let script = "test -S /proc/self/fd/$PMI_FD && printf 'cmd=init pmi_version=1 pmi_subversion=1\\n' >&$PMI_FD && read answer <&$PMI_FD
        echo $PMI_RANK $SLURM_PROCID $PMI_SIZE $answer";
    let output = world.srun(&[&["--mpi=pmi2"], &FOUR[..], &[IMAGE, "sh", "-c", script]].concat())?.success()?;
    let lines = sorted(&output.stdout);
    assert_eq!(lines.len(), 4);
    for (rank, line) in lines.iter().enumerate() {
        let expected = format!("{rank} {rank} 4 cmd=response_to_init ");
        ensure!(line.starts_with(&expected) && line.contains("rc=0"), "{output}");
    }
    Ok(())
}

fn directories_elsewhere(world: &mut World) -> Result<()> {
    have_image(world)?;
    for directory in ["/dev/shm", "/var/tmp"] {
        let script = format!(
            "test -w {directory}/spmix_appdir_$(id -u)_$SLURM_JOB_ID.$SLURM_STEP_ID && exec {}",
            mpi::PMIX_PROGRAM
        );
        // On one node: those of the testbed share this directory.
        let arguments = ["--mpi=pmix", "-N1", "-n2", MPI_IMAGE, "sh", "-c", &script];
        let mut command = world.bed.cluster.command(0, "srun", arguments);
        let output = process::run(command.env("SLURM_PMIX_TMPDIR", directory), wait::DEADLINE)?.success()?;
        assert_eq!(sorted(&output.stdout), ["rank 0 of 2: sum 1", "rank 1 of 2: sum 1"], "{directory}");
    }
    Ok(())
}

/// An image in which the server's directory has no place: programs that do not use MPI run.
fn unmountable(world: &mut World) -> Result<()> {
    world.have("no-place", |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        fs::write(tree.join("var/tmp"), "a file\n")?;
        ImageBuilder::new(&layout)?.layer_from_tree(&tree, Compression::Gzip)?.finish("latest")
    })?;
    let output = world.srun(&["--mpi=pmix", "--container-image=no-place", "/bin/cat", "/var/tmp"])?.success()?;
    assert_eq!(output.stdout, "a file\n");
    let said: Vec<_> = output.stderr.lines().filter(|line| line.contains("PMIx")).collect();
    ensure!(said.len() == 1 && said[0].contains("MPI programs may not start in this container"), "{output}");
    ensure!(said[0].contains("/pmix.") && said[0].contains("Not a directory"), "{output}");
    Ok(())
}

/// Variables of a step that is none of ours do no harm.
fn leftovers(world: &mut World) -> Result<()> {
    let mut command = world.bed.cluster.command(0, "srun", [IMAGE, "sh", "-c", "echo $PMIX_RANK"]);
    command.env("PMIX_NAMESPACE", "slurm.pmix.99999.0").env("PMIX_SERVER_TMPDIR", "/nowhere/pmix.99999.0");
    command.env("PMIX_RANK", "3").env("SLURM_PMIX_TMPDIR", "/nowhere");
    let output = process::run(&mut command, wait::DEADLINE)?.success()?;
    assert_eq!(output.stdout, "3\n");
    ensure!(!output.stderr.contains("PMIx"), "{output}");
    Ok(())
}
