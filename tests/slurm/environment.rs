//! Whose variables a task sees: the image's, the host's, or those that `--container-env` says.

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::image::{Compression, ImageBuilder};
use testbed::{images, process, wait};

use crate::Case;
use crate::named;
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
    ("pytorch_learns_about_the_job", pytorch_job),
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

/// Where the administrator asks for it: by an option, or by the file that enroot's hook of that name is.
fn pytorch_job(world: &mut World) -> Result<()> {
    let script = "echo \"$MASTER_ADDR|$MASTER_PORT|$WORLD_SIZE|$OMP_NUM_THREADS|$((61000 + SLURM_JOB_ID % 4536))\"";
    let two_nodes = ["-N2", "-n4", "--ntasks-per-node=2"];
    // Not what the machine has on which `srun` was called.
    let host = [("MASTER_ADDR", "elsewhere"), ("MASTER_PORT", "1")];
    assert_eq!(run(world, &host, &["-N1"], script)?.split_once("||").map(|(before, _)| before), Some("elsewhere|1"));
    let sysconf = world.bed.site.make_directory("etc/enroot-pytorch/hooks.d")?;
    let hook = sysconf.join("50-slurm-pytorch.sh");
    std::fs::write(&hook, "#!/bin/sh\nexit 1\n")?;
    std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let sysconf = sysconf.parent().unwrap_or(&sysconf).display().to_string();
    for asked in ["[hooks]\nslurm_pytorch = true\n".to_owned(), format!("[enroot]\nsysconf_path = \"{sysconf}\"\n")] {
        world.bed.pyxis.configure(&(asked + &world.configuration()))?;
        let seen = run(world, &host, &two_nodes, script);
        let alone = run(world, &host, &["-N2", "-n2"], script);
        world.bed.pyxis.configure(&world.configuration())?;
        let (seen, alone) = (seen?, alone?);
        for (text, tasks, threads) in [(&seen, "4", "1"), (&alone, "2", "")] {
            let lines = sorted(text);
            assert_eq!(lines.len().to_string(), tasks, "{text}");
            let fields: Vec<_> = lines[0].split('|').collect();
            assert_eq!([fields[0], fields[2], fields[3]], ["node1", tasks, threads], "{text}");
            ensure!(fields[1] == fields[4] && lines.iter().all(|line| *line == lines[0]), "{text}");
        }
    }
    // A step that joins a running container is another one, with ranks of its own.
    world.bed.pyxis.configure(&("[hooks]\nslurm_pytorch = true\n".to_owned() + &world.configuration()))?;
    let joined = join(world, "echo $MASTER_ADDR $WORLD_SIZE");
    world.bed.pyxis.configure(&world.configuration())?;
    assert_eq!(joined?, ["first node1 2", "first node1 2", "second node1 1"]);
    Ok(())
}

/// What `script` says in two tasks that start a container, and in one that joins it.
fn join(world: &World, script: &str) -> Result<Vec<String>> {
    let name = named::option(&named::new_name(), "");
    let mut first = named::start(world, &["-n2", ENV_IMAGE, &name], script)?;
    let both = || (first.stdout().matches("up").count() == 2).then_some(());
    wait::until("both tasks", wait::DEADLINE, both)?;
    let second = named::sh(world, &[&name], script)?;
    first.write_stdin(b"")?;
    let first = first.wait(wait::DEADLINE)?.success()?.stdout.replace("up\n", "");
    let said = [("first", first), ("second", second.stdout)];
    Ok(said.iter().flat_map(|(who, out)| out.lines().map(move |line| format!("{who} {line}"))).collect())
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
