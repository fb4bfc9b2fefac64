//! Whose variables a task sees: the image's, the host's, or those that `--container-env` says.

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::image::{Compression, ImageBuilder};
use testbed::{images, process, wait};

use crate::Case;
use crate::world::{World, sorted};

pub const CASES: &[Case] = &[
    ("image_beats_host", image_beats_host),
    ("the_host_passes_through", host_passes_through),
    ("container_env_names", container_env_names),
    ("container_env_sets", container_env_sets),
    ("login_variables", login_variables),
    ("locale_is_dropped_unless_named", locale),
    ("slurm_variables_are_each_tasks_own", slurm_variables),
    ("pytorch_gets_its_ranks", pytorch),
    ("workdir_and_volumes_of_the_image", workdir_and_volumes),
];

const ENV_IMAGE: &str = "--container-image=env";

fn have_image(world: &mut World) -> Result<()> {
    world.have("env", |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        std::fs::create_dir_all(tree.join("data"))?;
        std::fs::write(tree.join("data/shipped"), "with the image\n")?;
        ImageBuilder::new(&layout)?
            .config("Env", json!([images::IMAGE_PATH, "BOTH=image", "ONLY_IMAGE=a b=c", "EMPTY=", "PYTORCH_VERSION=2"]))
            .config("WorkingDir", json!("/srv/made/for it"))
            .config("Volumes", json!({ "/data": {}, "/missing/volume": {} }))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")
    })
}

/// Runs a script in the image with these variables set where `srun` is started.
fn run(world: &mut World, variables: &[(&str, &str)], options: &[&str], script: &str) -> Result<String> {
    have_image(world)?;
    let arguments = [&[ENV_IMAGE], options, &["sh", "-c", script]].concat();
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    command.envs(variables.iter().copied());
    Ok(process::run(&mut command, wait::DEADLINE)?.success()?.stdout)
}

fn image_beats_host(world: &mut World) -> Result<()> {
    let host = [("BOTH", "host"), ("EMPTY", "host"), ("PATH", "/usr/bin:/bin:/host/path")];
    let seen = run(world, &host, &[], "echo \"$BOTH|$ONLY_IMAGE|$EMPTY|$PATH\"")?;
    assert_eq!(seen, format!("image|a b=c||{}\n", images::IMAGE_PATH.trim_start_matches("PATH=")));
    Ok(())
}

fn host_passes_through(world: &mut World) -> Result<()> {
    let host = [("ONLY_HOST", "one\ntwo  three"), ("TERM", "vt220")];
    assert_eq!(run(world, &host, &[], "echo \"$ONLY_HOST|$TERM\"")?, "one\ntwo  three|vt220\n");
    Ok(())
}

fn container_env_names(world: &mut World) -> Result<()> {
    let script = "echo \"$BOTH|$ONLY_IMAGE\"";
    let host = [("BOTH", "host")];
    assert_eq!(run(world, &host, &["--container-env=BOTH"], script)?, "host|a b=c\n");
    // A name without a value on the host changes nothing, and neither does the order.
    assert_eq!(run(world, &host, &["--container-env=ONLY_IMAGE,BOTH,NOWHERE"], script)?, "host|a b=c\n");
    assert_eq!(run(world, &[], &["--container-env=BOTH"], script)?, "image|a b=c\n");
    Ok(())
}

fn container_env_sets(world: &mut World) -> Result<()> {
    let script = "echo \"$BOTH|$MY_VAR|$ONLY_IMAGE\"";
    let host = [("BOTH", "host"), ("MY_VAR", "host")];
    let options = ["--container-env=MY_VAR=value,BOTH=given=here,ONLY_IMAGE="];
    assert_eq!(run(world, &host, &options, script)?, "given=here|value|\n");
    Ok(())
}

fn login_variables(world: &mut World) -> Result<()> {
    let name = world.user(0).name.clone();
    let seen = run(world, &[("SHELL", "/bin/bash")], &[], "echo \"$USER|$LOGNAME|$SHELL\"")?;
    assert_eq!(seen, format!("{name}|{name}|/bin/sh\n"));
    Ok(())
}

fn locale(world: &mut World) -> Result<()> {
    let host = [("LANG", "xx"), ("LC_ALL", "yy"), ("LANGUAGE", "zz")];
    let script = "echo \"$LANG|$LC_ALL|$LANGUAGE\"";
    assert_eq!(run(world, &host, &[], script)?, "||\n");
    assert_eq!(run(world, &host, &["--container-env=LANG,LC_ALL"], script)?, "xx|yy|\n");
    Ok(())
}

fn slurm_variables(world: &mut World) -> Result<()> {
    let script = "echo $SLURM_PROCID $SLURM_LOCALID $SLURM_NODEID $SLURM_NTASKS; [ $SLURM_TASK_PID = $$ ] && echo own";
    let seen = run(world, &[], &["-N2", "-n4", "--ntasks-per-node=2"], script)?;
    assert_eq!(sorted(&seen), ["0 0 0 4", "1 1 0 4", "2 0 1 4", "3 1 1 4", "own", "own", "own", "own"]);
    Ok(())
}

fn pytorch(world: &mut World) -> Result<()> {
    let seen = run(world, &[], &["-N2", "-n4", "--ntasks-per-node=2"], "echo $RANK $LOCAL_RANK")?;
    assert_eq!(sorted(&seen), ["0 0", "1 1", "2 0", "3 1"]);
    Ok(())
}

/// The working directory is made; volumes can be written to although the root cannot.
fn workdir_and_volumes(world: &mut World) -> Result<()> {
    let script = "pwd; echo $PWD; cat /data/shipped; touch /data/new /missing/volume/new && ls /data; touch /x 2>&1";
    let arguments = [ENV_IMAGE, "sh", "-c", script];
    have_image(world)?;
    let output = world.srun(&arguments)?;
    let expected = "/srv/made/for it\n/srv/made/for it\nwith the image\nnew\nshipped\n";
    ensure!(output.stdout.starts_with(expected) && output.stdout.contains("Read-only file system"), "{output}");
    Ok(())
}
