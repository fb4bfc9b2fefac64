//! Slurm's own features, unchanged by the container around a task.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use testbed::{Running, process, wait};

use crate::Case;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("exit_codes_and_signals", exit_codes),
    ("commands_only_the_image_has", commands),
    ("stdin_is_forwarded", stdin),
    ("pty", pty),
    ("pty_input_and_exit_code", pty_input),
    ("batch_script_runs_inside", batch),
    ("salloc_passes_the_image_on", salloc),
    ("requeued", requeued),
    ("steps_of_a_batch_job", steps_of_a_batch_job),
    ("many_steps_at_once", many_steps),
    ("many_jobs_of_two_users_at_once", many_jobs),
    ("one_import_for_all_that_want_it", one_import),
    ("arrays_and_chdir", arrays),
    ("limits_apply", limits),
    ("extern_steps", extern_steps),
    ("several_programs", several_programs),
    ("export_none_keeps_the_container", export_none),
];

fn exit_codes(world: &mut World) -> Result<()> {
    for code in [0, 1, 7, 126] {
        let output = world.srun(&[IMAGE, "sh", "-c", &format!("exit {code}")])?;
        assert_eq!(output.code(), code, "{output}");
    }
    for (signal, code) in [("TERM", 143), ("SEGV", 139), ("KILL", 137)] {
        let output = world.srun(&[IMAGE, "sh", "-c", &format!("kill -{signal} $$")])?;
        assert_eq!(output.code(), code, "{output}");
    }
    let output = world.srun(&["-n2", "-N1", IMAGE, "sh", "-c", "exit $SLURM_PROCID"])?;
    assert_eq!(output.code(), 1, "{output}");
    // A signal through Slurm reaches the command itself.
    let trap = "trap 'echo trapped; exit 9' USR1; echo ready; while :; do sleep 0.1; done";
    let mut step = world.start(&["--job-name=trap", IMAGE, "sh", "-c", trap])?;
    step.wait_for_text("ready", wait::DEADLINE)?;
    world.bed.cluster.admin("scancel", ["--signal=USR1", "--name=trap"])?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(output.stdout.contains("trapped") && output.code() == 9, "{output}");
    Ok(())
}

fn commands(world: &mut World) -> Result<()> {
    // `ash` is no program of the machine; relative commands are the container's too.
    let output = world.srun(&[IMAGE, "ash", "-c", "echo found"])?.success()?;
    assert_eq!(output.stdout, "found\n");
    let output = world.srun(&[IMAGE, "--container-workdir=/bin", "./busybox", "echo", "found"])?.success()?;
    assert_eq!(output.stdout, "found\n");
    let output = world.srun(&[IMAGE, "/usr/bin/perl", "-v"])?;
    ensure!(!output.status.success() && output.stderr.contains("No such file or directory"), "{output}");
    Ok(())
}

fn stdin(world: &mut World) -> Result<()> {
    let mut command = world.bed.cluster.command(0, "srun", [IMAGE, "sh", "-c", "wc -c; echo done"]);
    let mut step = Running::start(command.stdin(Stdio::piped()))?;
    step.write_stdin(&vec![b'x'; 300_000])?;
    assert_eq!(step.wait(wait::DEADLINE)?.success()?.stdout, "300000\ndone\n");
    Ok(())
}

fn pty(world: &mut World) -> Result<()> {
    let line =
        format!("srun --pty {IMAGE} sh -c 'tty; test -t 0 && test -t 1 && test -t 2 && echo terminal; stty size'");
    let mut command = world.bed.cluster.command(0, "script", ["-qec", &line, "/dev/null"]);
    let output = process::run(&mut command, wait::DEADLINE)?.success()?;
    ensure!(output.stdout.contains("/dev/pts/") && output.stdout.contains("terminal"), "{output}");
    Ok(())
}

/// What is typed arrives, and the exit code comes back.
fn pty_input(world: &mut World) -> Result<()> {
    let line = format!("srun --pty {IMAGE} sh -c 'echo ready; read line; echo \"got $line\"; exit 7'");
    let mut command = world.bed.cluster.command(0, "script", ["-qec", &line, "/dev/null"]);
    let mut step = Running::start(command.stdin(Stdio::piped()))?;
    step.wait_for_text("ready", wait::DEADLINE)?;
    step.write_stdin(b"typed\n")?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(output.stdout.contains("got typed") && output.code() == 7, "{output}");
    Ok(())
}

/// Submits a script as user 0, waits for its end and gives its exit code and what it wrote.
pub fn submit(world: &World, options: &[&str], script: &str) -> Result<(i32, String)> {
    let work = world.make_directory(0, "work/batch")?;
    let (file, log) = (work.join("script.sh"), work.join("log"));
    fs::write(&file, script)?;
    world.user(0).own(&file)?;
    let (output, path) = (format!("--output={}", log.display()), file.display().to_string());
    let arguments = [&["--parsable", &output], options, &[&path]].concat();
    let job = process::output_of(&mut world.bed.cluster.command(0, "sbatch", arguments))?;
    // `sbatch --wait` would look every few seconds only.
    let code = wait::until("the end of the job", wait::DEADLINE * 2, || {
        let job = world.bed.cluster.admin("scontrol", ["--oneliner", "show", "job", job.trim()]).ok()?;
        let field = |name: &str| job.split(' ').find_map(|field| field.strip_prefix(name)?.strip_prefix('='));
        let over = ["COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT"].contains(&field("JobState")?);
        let (code, signal) = field("ExitCode")?.split_once(':')?;
        over.then(|| Some(code.parse::<i32>().ok()? | signal.parse::<i32>().ok()? << 8))?
    })?;
    let text = fs::read_to_string(&log).unwrap_or_default();
    let _ = fs::remove_file(log);
    Ok((code, text))
}

fn batch(world: &mut World) -> Result<()> {
    let script = "#!/bin/sh\n. /etc/os-release; echo $ID $0; test -r $0 && echo readable; exit 5\n";
    let (code, text) = submit(world, &[IMAGE], script)?;
    ensure!(code == 5 && text.contains("busybox ") && text.contains("readable"), "{code}: {text}");
    let script =
        format!("#!/bin/sh\n#SBATCH {IMAGE}\n#SBATCH --container-remap-root\n. /etc/os-release; echo $ID $(id -u)\n");
    let (code, text) = submit(world, &[], &script)?;
    ensure!(code == 0 && text.contains("busybox 0"), "{code}: {text}");
    // A batch job whose image cannot be had fails, and takes no node with it.
    let (code, text) = submit(world, &["--container-image=no-such-image"], "#!/bin/sh\necho it ran\n")?;
    ensure!(code != 0 && !text.contains("it ran"), "{code}: {text}");
    ensure!(text.contains("pyxis: failed to import docker image: no-such-image"), "{text}");
    Ok(())
}

/// The second run of a job is refused nothing; what the first has written is there if the container has a name.
fn requeued(world: &mut World) -> Result<()> {
    let mount = format!("--container-mounts={}", world.make_directory(0, "work/requeued")?.display());
    let name = format!("--container-name={}", crate::named::new_name());
    // Side by side: Slurm lets a requeued job wait until the credential of its first run has expired.
    let mut jobs = Vec::new();
    for (directory, options, expected) in
        [("unnamed", &[][..], "run 0\nrun 1\n"), ("named", &[name.as_str()], "run 0\nrun 1\nof the first\n")]
    {
        let work = world.make_directory(0, &format!("work/requeued/{directory}"))?;
        let (file, log) = (work.join("script.sh"), work.join("log"));
        let script = format!(
            "#!/bin/sh\nexec >>{log} 2>&1\necho run ${{SLURM_RESTART_COUNT:-0}}\n\
             [ -n \"$SLURM_RESTART_COUNT\" ] || {{ echo of the first >/root/file; exec sleep 1000; }}\n\
             [ ! -e /root/file ] || cat /root/file\necho end >{end}\n",
            log = log.display(),
            end = work.join("end").display(),
        );
        fs::write(&file, script)?;
        world.user(0).own(&file)?;
        let path = file.display().to_string();
        let fixed =
            ["--parsable", "--requeue", "-w", "node1", "--output=/dev/null", IMAGE, "--container-writable", &mount];
        let arguments = [&fixed[..], options, &[&path]].concat();
        let job = process::output_of(&mut world.bed.cluster.command(0, "sbatch", arguments))?;
        jobs.push((job.trim().to_owned(), work, expected));
    }
    let text = |work: &Path| fs::read_to_string(work.join("log")).unwrap_or_default();
    for (job, work, _) in &jobs {
        wait::until("the first run", wait::DEADLINE, || text(work).contains("run 0").then_some(()))?;
        world.bed.cluster.admin("scontrol", ["requeue", job])?;
    }
    for (job, work, expected) in &jobs {
        wait::until("the second run", wait::DEADLINE * 4, || work.join("end").exists().then_some(()))
            .with_context(|| world.bed.cluster.admin("scontrol", ["show", "job", job]).unwrap_or_default())?;
        assert_eq!(text(work), *expected);
    }
    Ok(())
}

fn salloc(world: &mut World) -> Result<()> {
    let arguments = ["-N2", "--quiet", IMAGE, "srun", "sh", "-c", ". /etc/os-release; echo $ID"];
    let output = process::run(&mut world.bed.cluster.command(0, "salloc", arguments), wait::DEADLINE)?.success()?;
    assert_eq!(output.stdout, "busybox\nbusybox\n");
    Ok(())
}

fn steps_of_a_batch_job(world: &mut World) -> Result<()> {
    let inside = "sh -c '. /etc/os-release; echo $ID'";
    let script = format!(
        "#!/bin/bash\nsrun {inside}\nsrun {IMAGE} {inside}\nsrun -n2 {IMAGE} {inside}\n. /etc/os-release; echo batch $ID\n"
    );
    let (code, text) = submit(world, &["-N1", "-n2"], &script)?;
    // On a busy machine srun says that it waits for the step before it to be gone.
    let found: Vec<_> = text.lines().filter(|line| !line.starts_with("pyxis:") && !line.starts_with("srun:")).collect();
    ensure!(code == 0, "{code}: {text}");
    assert_eq!(found, ["debian", "debian", "busybox", "busybox", "busybox", "busybox", "batch debian"]);
    Ok(())
}

fn many_steps(world: &mut World) -> Result<()> {
    const STEPS: usize = 50;
    let step = format!("srun --overlap -N1 -n1 {IMAGE} sh -c 'echo inside; exit 3'");
    let script = format!(
        "#!/bin/bash\nfor i in {{1..{STEPS}}}; do {step} & done\nfails=0\nwhile wait -n; r=$?; [ $r -ne 127 ]; do [ $r -eq 3 ] && fails=$((fails + 1)); done\necho fails $fails\n"
    );
    let (code, text) = submit(world, &["-N2", "-n2"], &script)?;
    assert_eq!(text.matches("inside").count(), STEPS, "{text}");
    ensure!(code == 0 && text.contains(&format!("fails {STEPS}")), "{code}: {text}");
    Ok(())
}

fn many_jobs(world: &mut World) -> Result<()> {
    let jobs: Vec<_> = (0..12)
        .map(|number| {
            let script = "id -u; echo $SLURM_PROCID >/tmp/private; cat /tmp/private";
            let arguments = ["-n2", "-N1", IMAGE, "sh", "-c", script];
            Ok((number % 2, Running::start(&mut world.bed.cluster.command(number % 2, "srun", arguments))?))
        })
        .collect::<Result<_>>()?;
    for (user, job) in jobs {
        let output = job.wait(wait::DEADLINE * 2)?.success()?;
        let uid = world.user(user).uid.to_string();
        assert_eq!(output.stdout.lines().filter(|line| **line == uid).count(), 2, "{output}");
    }
    Ok(())
}

/// Single flight: steps that start at once fetch a layer once on each node.
fn one_import(world: &mut World) -> Result<()> {
    let name = world.new_image(2 << 20)?;
    let image = format!("--container-image={name}");
    let steps: Vec<_> = (0..6)
        .map(|number| {
            let arguments = ["-n1", "-w", "node1", &image, "sh", "-c", "wc -c </payload"];
            Running::start(&mut world.bed.cluster.command(number % 2, "srun", arguments))
        })
        .collect::<Result<_>>()?;
    for step in steps {
        assert_eq!(step.wait(wait::DEADLINE)?.success()?.stdout.trim(), (2 << 20).to_string());
    }
    let log = world.bed.hub.log(&world.bed.site);
    let downloads = |line: &&str| line.contains("\"GET ") && line.contains(&format!("/library/{name}/blobs/"));
    let sizes = log.lines().filter(downloads).filter(|line| {
        // An access log line: … "GET PATH HTTP/1.1" STATUS BYTES …
        let after = line.split("HTTP/1.1\" ").nth(1).unwrap_or_default();
        after.split(' ').nth(1).and_then(|bytes| bytes.parse::<u64>().ok()).is_some_and(|bytes| bytes > 1 << 20)
    });
    // The second user has to prove that he may have it, which takes no download from the same registry.
    assert_eq!(sizes.count(), 1, "{}", log.lines().filter(downloads).collect::<Vec<_>>().join("\n"));
    Ok(())
}

fn arrays(world: &mut World) -> Result<()> {
    let work = world.make_directory(0, "work/array")?;
    let arguments = [
        "--wait".into(),
        "--quiet".into(),
        "--array=1-4".into(),
        IMAGE.to_owned(),
        format!("--chdir={}", work.display()),
        "--output=out.%a".into(),
        "--container-mounts=./:/here".into(),
        "--wrap=echo $SLURM_ARRAY_TASK_ID; pwd; touch /here/seen$SLURM_ARRAY_TASK_ID".into(),
    ];
    process::run(&mut world.bed.cluster.command(0, "sbatch", arguments), wait::DEADLINE * 2)?.success()?;
    for task in 1..=4 {
        let text = fs::read_to_string(work.join(format!("out.{task}")))?;
        ensure!(text.ends_with(&format!("{task}\n/\n")), "{text}");
        ensure!(work.join(format!("seen{task}")).exists());
    }
    fs::remove_dir_all(work)?;
    Ok(())
}

fn limits(world: &mut World) -> Result<()> {
    let mut command = world.bed.cluster.command(
        0,
        "sh",
        ["-c", &format!("ulimit -n 333; umask 027; srun {IMAGE} sh -c 'ulimit -n; umask'")],
    );
    let output = process::run(&mut command, wait::DEADLINE)?.success()?;
    assert_eq!(sorted(&output.stdout), ["0027", "333"]);
    Ok(())
}

/// With `PrologFlags=Contain` every job has a step more on each node, in which the plugin has nothing to do.
fn extern_steps(world: &mut World) -> Result<()> {
    world.bed.cluster.reconfigure("PrologFlags=Contain\n")?;
    let result = (|| {
        let (code, text) = submit(world, &[IMAGE, "-N2"], "#!/bin/sh\n. /etc/os-release; echo $ID\n")?;
        ensure!(code == 0 && text.contains("busybox"), "{code}: {text}");
        let output = world.srun(&["-N2", IMAGE, "cat", "/etc/os-release"])?.success()?;
        ensure!(output.stdout.matches("ID=busybox").count() == 2, "{output}");
        Ok(())
    })();
    world.bed.cluster.wait_until_idle()?;
    world.bed.cluster.reconfigure("")?;
    result
}

/// `--multi-prog` and heterogeneous steps.
fn several_programs(world: &mut World) -> Result<()> {
    let file = world.make_directory(0, "work/batch")?.join("programs");
    fs::write(&file, "0 ash -c pwd\n1-2 busybox echo others\n")?;
    world.user(0).own(&file)?;
    let output = world.srun(&["-n3", "-N1", IMAGE, "--multi-prog", &file.display().to_string()])?.success()?;
    assert_eq!(sorted(&output.stdout), ["/", "others", "others"]);
    // Slurm knows one set of a plugin's options for all components.
    let id = ". /etc/os-release; echo $ID";
    let output = world.srun(&["-w", "node1", IMAGE, "sh", "-c", id, ":", "-w", "node2", "sh", "-c", id])?.success()?;
    assert_eq!(output.stdout, "busybox\nbusybox\n");
    Ok(())
}

/// What takes no variables along does not run on the bare host instead.
fn export_none(world: &mut World) -> Result<()> {
    for export in ["--export=NONE", "--export=NIL", "--export=HOME"] {
        // Slurm from 23.11 on passes the options on; before that the job fails and says why.
        let (code, text) = submit(world, &[IMAGE, export], "#!/bin/sh\n. /etc/os-release; echo $ID\n")?;
        let refused = code != 0 && text.contains("submit the job with --export=ALL");
        ensure!(text.contains("busybox") || refused, "{export}: {code}: {text}");
        let nested =
            format!("#!/bin/sh\nexport PATH=/usr/bin:/bin SLURM_CONF={}\n", world.bed.cluster.config().display());
        let script = nested
            + "sbatch --wait --quiet --output=$HOME/work/batch/nested --wrap='echo nested $?' && cat ~/work/batch/nested";
        let (code, text) = submit(world, &["--export=ALL"], &script)?;
        ensure!(code == 0 && text.contains("nested 0"), "{code}: {text}");
        let output = world.srun(&[export, IMAGE, "/bin/sh", "-c", ". /etc/os-release; echo $ID"])?.success()?;
        assert_eq!(output.stdout, "busybox\n", "{export}");
    }
    Ok(())
}
