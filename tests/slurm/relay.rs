//! How options get to a step: from scripts, commands, allocations and the environment, and which of them counts.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use testbed::{Output, process, wait};

use crate::Case;
use crate::jobs::submit;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("lists_are_merged", lists_are_merged),
    ("the_command_line_overrides_the_script", command_line_overrides_script),
    ("salloc", salloc),
    ("each_variable", each_variable),
    ("long_variables", long_variables),
    ("variables_reach_scripts_and_their_steps", variables_reach_scripts),
    ("components_of_heterogeneous_steps", heterogeneous_steps),
    ("components_of_heterogeneous_jobs", heterogeneous_jobs),
    ("jobs_without_a_command_line", without_a_command_line),
    ("jobs_through_slurmrestd", through_slurmrestd),
];

const COMPONENTS_DIFFER: &str = "pyxis: Slurm gives all components of a heterogeneous job the same container options";
const ID: &str = ". /etc/os-release; echo $ID";

/// Runs `srun` as user 0 with these variables.
fn srun_with(world: &World, variables: &[(&str, &str)], arguments: &[&str]) -> Result<Output> {
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    process::run(command.envs(variables.iter().copied()), wait::DEADLINE)
}

/// Directories of the user's, each with a file that bears its name.
fn marked_directories(world: &World, names: &[&str]) -> Result<Vec<PathBuf>> {
    names
        .iter()
        .map(|name| {
            let directory = world.make_directory(0, &format!("work/relay/{name}"))?;
            fs::write(directory.join(name), "")?;
            Ok(directory)
        })
        .collect()
}

fn lists_are_merged(world: &mut World) -> Result<()> {
    let directories = marked_directories(world, &["a", "b", "c"])?;
    let mount = |index: usize| format!("--container-mounts={}:/m{index}", directories[index].display());
    let (a, b, c) = (mount(0), mount(1), mount(2));
    let list = "ls /m0 /m1 /m2 2>/dev/null | grep -v : | xargs";
    assert_eq!(world.sh(&[&a, &b, &c], list)?, "a b c");
    let options = [&*a, "--container-env=ONE=1", &b, "--container-env=TWO=2"];
    assert_eq!(world.sh(&options, &format!("{list}; echo $ONE$TWO"))?, "a b\n12");
    // A script's and the command line's.
    let script = format!("#!/bin/sh\n#SBATCH {IMAGE}\n#SBATCH {a}\n#SBATCH {b}\n{list}\n");
    let (code, text) = submit(world, &[&c], &script)?;
    ensure!(code == 0 && text.ends_with("\na b c\n"), "{code}: {text}");
    let (code, text) = submit(world, &[], &script)?;
    ensure!(code == 0 && text.ends_with("\na b\n"), "{code}: {text}");
    Ok(())
}

fn command_line_overrides_script(world: &mut World) -> Result<()> {
    let script = "#!/bin/sh\n#SBATCH --container-image=no-such-image\n#SBATCH --container-workdir=/usr\n\
                  #SBATCH --container-remap-root\n#SBATCH --container-writable\n\
                  . /etc/os-release; echo $ID $PWD $(id -u); touch /x 2>/dev/null && echo written\n";
    let options = [IMAGE, "--container-workdir=/bin", "--no-container-remap-root", "--container-readonly"];
    let (code, text) = submit(world, &options, script)?;
    let uid = world.user(0).uid;
    ensure!(code != 0 && text.ends_with(&format!("\nbusybox /bin {uid}\n")), "{code}: {text}");
    let (code, text) = submit(world, &[IMAGE], script)?;
    ensure!(code == 0 && text.ends_with("\nbusybox /usr 0\nwritten\n"), "{code}: {text}");
    // What the job has inherited in which sbatch runs does not: which of the two counts is not for Slurm to say.
    let file = world.make_directory(0, "work/relay")?.join("script");
    fs::write(&file, script)?;
    let mut command = world.bed.cluster.command(0, "sbatch", [file]);
    command.env("SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_container_image", "alpine");
    let output = process::run(&mut command, wait::DEADLINE)?;
    let text = "pyxis: --container-image specified multiple times";
    ensure!(!output.status.success() && output.stderr.contains(text), "{output}");
    Ok(())
}

/// Steps inherit what the allocation was given, unless they are given something else.
fn salloc(world: &mut World) -> Result<()> {
    let directories = marked_directories(world, &["a", "b"])?;
    let mount = |index: usize| format!("--container-mounts={}:/m{index}", directories[index].display());
    let list = "echo $PWD $(ls /m0 /m1 2>/dev/null | grep -v :)";
    let run = |options: &[&str], steps: &str| -> Result<String> {
        let arguments = [&["--quiet"], options, &["sh", "-c", steps]].concat();
        let output = process::run(&mut world.bed.cluster.command(0, "salloc", arguments), wait::DEADLINE)?;
        Ok(output.success()?.stdout)
    };
    let steps = format!(
        "srun sh -c '{ID}; {list}'; srun --container-workdir=/bin {} sh -c '{list}'; srun {IMAGE} --container-workdir=/etc sh -c '{list}'",
        mount(1)
    );
    let found = run(&[IMAGE, "--container-workdir=/usr", &mount(0)], &steps)?;
    assert_eq!(found, "busybox\n/usr a\n/bin b\n/etc a\n");
    // What the shell is given is no option of the step's that it starts in the container of its own.
    assert_eq!(run(&[], &format!("srun sh -c '{ID}'; srun {IMAGE} sh -c '{ID}'"))?, "debian\nbusybox\n");
    Ok(())
}

fn each_variable(world: &mut World) -> Result<()> {
    let run = |variables: &[(&str, &str)], options: &[&str], script: &str| -> Result<String> {
        let variables = [&[("PYXIS_CONTAINER_IMAGE", "alpine")], variables].concat();
        let output = srun_with(world, &variables, &[options, &["sh", "-c", script]].concat())?.success()?;
        Ok(output.stdout.trim_end().to_owned())
    };
    let writes = "touch /x 2>/dev/null && echo written; true";
    let uid = world.user(0).uid.to_string();
    let network = fs::read_link("/proc/self/ns/net")?.display().to_string();
    for (variables, options, script, expected) in [
        (&[("PYXIS_CONTAINER_WORKDIR", "/etc")][..], &[][..], "pwd", "/etc"),
        (&[("PYXIS_CONTAINER_WRITABLE", "1")], &[], writes, "written"),
        (&[("PYXIS_CONTAINER_WRITABLE", "y")], &["--container-readonly"], writes, ""),
        (&[("PYXIS_CONTAINER_READONLY", "false")], &[], writes, "written"),
        (&[("PYXIS_CONTAINER_WRITABLE", "true"), ("PYXIS_CONTAINER_READONLY", "true")], &[], writes, "written"),
        (&[("PYXIS_CONTAINER_WRITABLE", "Yes")], &[], writes, ""),
        (&[("PYXIS_CONTAINER_REMAP_ROOT", "yes")], &[], "id -u", "0"),
        (&[("PYXIS_CONTAINER_REMAP_ROOT", "yes")], &["--no-container-remap-root"], "id -u", &uid),
        (&[("PYXIS_CONTAINER_MOUNT_HOME", "true")], &[], "[ -d ~/work ] && echo home", "home"),
        (&[("PYXIS_CONTAINER_MOUNT_HOME", "true")], &["--no-container-mount-home"], "ls ~", ""),
        (&[("PYXIS_CONTAINER_UNSHARE", "net")], &[], "ls /sys/class/net", "lo"),
        (&[("PYXIS_CONTAINER_UNSHARE", "net")], &["--container-unshare=uts"], "readlink /proc/self/ns/net", &network),
        (&[("PYXIS_CONTAINER_ENV", "A=1,B=2")], &[], "echo $A$B", "12"),
        // Replaced, not merged.
        (&[("PYXIS_CONTAINER_ENV", "A=1,B=2")], &["--container-env=A=3"], "echo $A$B", "3"),
        (&[("PYXIS_CONTAINER_MOUNTS", "/usr:/m1")], &["--container-mounts=/usr:/m2"], "ls -d /m?", "/m2"),
    ] {
        assert_eq!(run(variables, options, script)?, expected, "{variables:?} {options:?}");
    }
    for variable in ["PYXIS_CONTAINER_MOUNTS", "PYXIS_CONTAINER_UNSHARE", "PYXIS_CONTAINER_NAME"] {
        let output = srun_with(world, &[("PYXIS_CONTAINER_IMAGE", "alpine"), (variable, ":")], &["echo", "it ran"])?;
        ensure!(!output.status.success() && output.stdout.is_empty(), "{output}");
        ensure!(output.stderr.contains(&format!("(from the environment variable {variable})")), "{output}");
    }
    Ok(())
}

/// Longer than a path may be.
fn long_variables(world: &mut World) -> Result<()> {
    let mounts: Vec<_> = (0..250).map(|number| format!("/usr/bin:/mounts/number{number}")).collect();
    let mounts = mounts.join(",");
    ensure!(mounts.len() > 6000);
    let variables = [("PYXIS_CONTAINER_IMAGE", "alpine"), ("PYXIS_CONTAINER_MOUNTS", &mounts)];
    let script = "ls /mounts | wc -l; ls /mounts/number249/srun";
    let output = srun_with(world, &variables, &["sh", "-c", script])?.success()?;
    assert_eq!(output.stdout, "250\n/mounts/number249/srun\n");
    // So may an option be, and a merged list.
    let (one, two) = mounts.split_at(mounts.len() / 2);
    let (one, two) =
        (one.rsplit_once(',').map_or(one, |(list, _)| list), two.split_once(',').map_or(two, |(_, list)| list));
    let count = mounts.split(',').count() - 1;
    let options = [format!("--container-mounts={one}"), format!("--container-mounts={two}")];
    assert_eq!(world.sh(&[&*options[0], &*options[1]], "ls /mounts | wc -l")?, count.to_string());
    Ok(())
}

/// `PYXIS_*` hold for the script and for every step in it; so does what `sbatch` was given.
fn variables_reach_scripts(world: &mut World) -> Result<()> {
    // What Slurm's commands need is the machine's.
    let conf = world.bed.cluster.config().display().to_string();
    let site = world.bed.site.path("").display().to_string();
    let mounts = format!("--container-mounts=/usr,/lib,/lib64,/etc/passwd:/etc/passwd:nofail,{site}");
    let script = format!(
        "#!/bin/sh\n{ID}\nexport SLURM_CONF={conf} PATH=$PATH:/usr/bin\n\
         srun sh -c '{ID}; [ -d /usr/sbin ] && echo host'\nsrun {IMAGE} --container-mounts=/usr:/other sh -c '{ID}; ls -d /other'\n"
    );
    let (code, text) = submit(world, &["-N1", IMAGE, &mounts], &script)?;
    let found: Vec<_> = text.lines().filter(|line| !line.starts_with("pyxis:") && !line.starts_with("srun:")).collect();
    ensure!(code == 0, "{code}: {text}");
    assert_eq!(found, ["busybox", "busybox", "host", "busybox", "/other"], "{text}");
    // A variable holds where no option does.
    let script = format!("#!/bin/sh\n{ID}\nexport SLURM_CONF={conf} PATH=$PATH:/usr/bin\nsrun sh -c '{ID}'\n");
    let work = world.make_directory(0, "work/variables")?;
    fs::write(work.join("script"), script)?;
    let arguments = [
        "--wait".into(),
        "--quiet".into(),
        format!("--output={}/log", work.display()),
        format!("{}/script", work.display()),
    ];
    let mut command = world.bed.cluster.command(0, "sbatch", arguments);
    command
        .env("PYXIS_CONTAINER_IMAGE", "alpine")
        .env("PYXIS_CONTAINER_MOUNTS", mounts.split_once('=').unwrap_or_default().1);
    process::run(&mut command, wait::DEADLINE * 2)?.success()?;
    assert_eq!(fs::read_to_string(work.join("log"))?.matches("busybox\n").count(), 2);
    Ok(())
}

fn heterogeneous_steps(world: &mut World) -> Result<()> {
    let run = |first: &[&str], second: &[&str]| {
        let (one, two) = (["-w", "node1"], ["-w", "node2"]);
        let command = ["sh", "-c", ID];
        world.srun(&[&one, first, &command, &[":"], &two, second, &command].concat())
    };
    for (first, second) in [(&[IMAGE][..], &[IMAGE][..]), (&[IMAGE], &[]), (&[], &[IMAGE])] {
        assert_eq!(run(first, second)?.success()?.stdout, "busybox\nbusybox\n", "{first:?} : {second:?}");
    }
    for (first, second) in [
        (&[IMAGE][..], &["--container-image=debian"][..]),
        (&[IMAGE], &[IMAGE, "--container-mounts=/usr:/x"]),
        (&[IMAGE], &["--container-writable"]),
    ] {
        let output = run(first, second)?;
        ensure!(!output.status.success() && output.stdout.is_empty(), "{output}");
        ensure!(output.stderr.contains(COMPONENTS_DIFFER), "{first:?} : {second:?}: {output}");
    }
    Ok(())
}

fn heterogeneous_jobs(world: &mut World) -> Result<()> {
    let script = |second: &str| format!("#!/bin/sh\n#SBATCH -N1 {IMAGE}\n#SBATCH hetjob\n#SBATCH -N1 {second}\n{ID}\n");
    for second in ["", IMAGE] {
        let (code, text) = submit(world, &[], &script(second))?;
        ensure!(code == 0 && text.ends_with("busybox\n"), "{code}: {text}");
    }
    let work = world.make_directory(0, "work/batch")?;
    fs::write(work.join("het.sh"), script("--container-image=debian"))?;
    let output = process::run(&mut world.bed.cluster.command(0, "sbatch", [work.join("het.sh")]), wait::DEADLINE)?;
    ensure!(!output.status.success() && output.stderr.contains(COMPONENTS_DIFFER), "{output}");
    // Each component its own, within one job.
    let steps = format!(
        "srun --het-group=0 {IMAGE} sh -c '{ID}'; srun --het-group=1 sh -c '{ID}'; srun --het-group=0,1 {IMAGE} sh -c '{ID}'"
    );
    let arguments = ["--quiet", "-N1", ":", "-N1", "sh", "-c", &steps];
    let output = process::run(&mut world.bed.cluster.command(0, "salloc", arguments), wait::DEADLINE)?.success()?;
    assert_eq!(output.stdout, "busybox\ndebian\nbusybox\nbusybox\n");
    Ok(())
}

/// Put into the environment what commands put there, or `PYXIS_*`.
fn without_a_command_line(world: &mut World) -> Result<()> {
    for variable in ["_SLURM_SPANK_OPTION_pyxis_container_image", "PYXIS_CONTAINER_IMAGE"] {
        let work = world.make_directory(0, "work/rest")?;
        let log = work.join("log");
        let arguments =
            ["--wait".into(), "--quiet".into(), format!("--output={}", log.display()), format!("--wrap={ID}; pwd")];
        let mut command = world.bed.cluster.command(0, "sbatch", arguments);
        command.env(variable, "alpine").env("_SLURM_SPANK_OPTION_pyxis_container_workdir", "/etc");
        process::run(&mut command, wait::DEADLINE * 2)?.success()?;
        let text = fs::read_to_string(&log)?;
        ensure!(text.ends_with("busybox\n/etc\n"), "{variable}: {text}");
        fs::remove_dir_all(work)?;
    }
    // What a site or a user sets for every step.
    let name = "SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_container_image";
    let found = srun_with(world, &[(name, "alpine")], &["sh", "-c", ID])?.success()?;
    assert_eq!(sorted(&found.stdout), ["busybox"]);
    Ok(())
}

/// Which knows no options of plugins: the job's environment asks for the container.
fn through_slurmrestd(world: &mut World) -> Result<()> {
    // From 23.02 on the interface is the same in several releases, and a name of it is said on its own.
    let mut list = world.bed.cluster.command(0, "/usr/sbin/slurmrestd", ["-d", "list"]);
    let known = process::run(&mut list, wait::DEADLINE)?;
    let is_new = format!("{}{}", known.stdout, known.stderr).contains("v0.0.42");
    let (version, plugins) = match is_new {
        true => ("v0.0.42", "-s openapi/slurmctld -d v0.0.42"),
        false => ("v0.0.38", "-s openapi/v0.0.38"),
    };
    for variable in ["_SLURM_SPANK_OPTION_pyxis_container_image", "PYXIS_CONTAINER_IMAGE"] {
        let work = world.make_directory(0, "work/slurmrestd")?;
        let log = work.join("log");
        let variables =
            [("PATH", "/usr/bin:/bin"), (variable, "alpine"), ("_SLURM_SPANK_OPTION_pyxis_container_workdir", "/etc")];
        let environment = match is_new {
            true => serde_json::json!(variables.map(|(name, value)| format!("{name}={value}"))),
            false => serde_json::Value::Object(
                variables.map(|(name, value)| (name.to_owned(), value.into())).into_iter().collect(),
            ),
        };
        let job = serde_json::json!({
            "script": format!("#!/bin/sh\n{ID}; pwd; echo done\n"),
            "job": {
                "name": "rest",
                "nodes": 1,
                "current_working_directory": &work,
                "standard_output": &log,
                "standard_error": &log,
                "environment": environment,
            },
        })
        .to_string();
        let request = format!(
            "POST /slurm/{version}/job/submit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n\
             Accept: application/json\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{job}",
            job.len()
        );
        fs::write(work.join("request"), request)?;
        // A connection on its standard input and output has to be the user's own, as these pipes are.
        let pipeline = format!("cat \"$0\" | /usr/sbin/slurmrestd -a rest_auth/local {plugins} | cat");
        let arguments = [PathBuf::from("-c"), PathBuf::from(pipeline), work.join("request")];
        let answer = process::run(&mut world.bed.cluster.command(0, "sh", arguments), wait::DEADLINE)?;
        // Headers may follow.
        let body = answer.stdout.split_once("\r\n\r\n").map_or("", |(_, body)| body);
        let body = serde_json::Deserializer::from_str(body).into_iter::<serde_json::Value>().next();
        ensure!(body.is_some_and(|body| body.is_ok_and(|body| body["job_id"].as_u64() > Some(0))), "{answer}");
        let text = wait::until("the end of the job", wait::DEADLINE * 2, || {
            let text = fs::read_to_string(&log).unwrap_or_default();
            text.ends_with("done\n").then_some(text)
        });
        let log = fs::read_to_string(&log).unwrap_or_default();
        ensure!(text?.ends_with("busybox\n/etc\ndone\n"), "{variable}: {log}");
        fs::remove_dir_all(work)?;
    }
    Ok(())
}
