//! `--container-save`: what is in the image, where it goes, and what becomes of it when something goes wrong.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::image::{Compression, ImageBuilder};
use testbed::{Output, Running, images, process, wait};

use crate::Case;
use crate::named;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("what_the_user_changed_is_in_the_image", content),
    ("absolute_and_relative_paths", paths),
    ("the_image_says_how_to_start_it", start_files),
    ("the_last_of_several_tasks_saves", several_tasks),
    ("every_node_saves", two_nodes),
    ("the_tasks_exit_code_counts", exit_codes),
    ("a_failure_is_the_steps", failures),
    ("a_full_disk_leaves_the_old_image", full_disk),
    ("cancel_while_saving", cancel_saving),
    ("kill_while_saving", kill_saving),
    ("nothing_is_saved_of_a_container_that_did_not_start", no_start),
    ("signals_reach_the_task_once", signals),
    ("a_task_ends_with_its_saver", killed_saver),
    ("named_containers", named_containers),
    ("running_containers_can_be_exported", running),
    ("batch_scripts", batch),
    ("pty", pty),
];

/// A new place for images, empty.
fn place(world: &World, name: &str) -> Result<PathBuf> {
    let path = world.make_directory(0, &format!("work/save-{name}"))?;
    for entry in fs::read_dir(&path)? {
        fs::remove_file(entry?.path())?;
    }
    Ok(path)
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names: Vec<String> = fs::read_dir(directory)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

fn unsquashfs(arguments: &[&str], image: &Path, rest: &[&str]) -> Result<String> {
    process::output_of(Command::new("unsquashfs").args(arguments).arg(image).args(rest))
}

/// The listing of an image: mode and name of everything in it.
fn listing(image: &Path) -> Result<Vec<(String, String)>> {
    let lines = unsquashfs(&["-lls", "-no-progress", "-dest", ""], image, &[])?;
    Ok(lines
        .lines()
        .filter_map(|line| {
            let mode = line.split(' ').next()?.to_owned();
            let name = line.split_once(" /")?.1.split(" -> ").next()?.to_owned();
            Some((mode, format!("/{name}")))
        })
        .collect())
}

fn file(image: &Path, name: &str) -> Result<String> {
    unsquashfs(&["-cat"], image, &[name])
}

/// Saves the container of a step with a script.
fn save(world: &World, target: &Path, options: &[&str], script: &str) -> Result<Output> {
    let target = format!("--container-save={}", target.display());
    let image = options.iter().all(|option| !option.starts_with("--container-image")).then_some(IMAGE);
    let arguments = [&["-w", "node1", target.as_str()], image.as_slice(), options, &["sh", "-c", script]].concat();
    process::run(&mut world.bed.cluster.command(0, "srun", arguments), wait::DEADLINE * 2)
}

fn content(world: &mut World) -> Result<()> {
    let place = place(world, "content")?;
    let image = place.join("image.sqsh");
    let mounts = format!("--container-mounts={0}:/mnt/a/b,{0}:{0}", world.user(0).home.join("work").display());
    let script = "set -e
        echo new > /etc/new; mkdir -p /opt/dir; chmod 700 /opt/dir
        echo secret > /opt/secret; chmod 0 /opt/secret
        echo tool > /opt/tool; chmod 4751 /opt/tool; ln /opt/tool /opt/tool-2; ln -s /nowhere /opt/link
        mkfifo /opt/fifo; rm /etc/group; echo in-a-mount > /mnt/a/b/in-a-mount; echo tmp > /tmp/file
        mkdir /opt/stub; chmod 0 /opt/stub; : > /opt/empty; touch -d @1234567890 /opt/empty
        dd if=/dev/zero of=/opt/holes bs=1 count=1 seek=10000000 2> /dev/null";
    for options in [&["--container-writable"][..], &["--container-writable", "--container-remap-root"]] {
        let output = save(world, &image, &[options, &[&mounts]].concat(), script)?.success()?;
        ensure!(output.stderr.lines().count() == 3, "{output}");
        let last = output.stderr.lines().last().unwrap_or_default();
        let container = last.strip_prefix("pyxis: exported container pyxis_").context("the last line")?;
        let (container, path) = container.split_once(" to ").context("the last line")?;
        ensure!(container.ends_with(".0") && path == image.to_str().context("path")?, "{output}");
        let list = listing(&image)?;
        let mode = |name: &str| list.iter().find(|(_, other)| other == name).map(|(mode, _)| mode.as_str());
        for (name, expected) in [
            ("/etc/new", Some("-rw-r--r--")),
            ("/opt/dir", Some("drwx------")),
            ("/opt/secret", Some("----------")),
            ("/opt/tool", Some("-rwsr-x--x")),
            ("/opt/tool-2", Some("-rwsr-x--x")),
            ("/opt/link", Some("lrwxrwxrwx")),
            ("/opt/fifo", Some("prw-r--r--")),
            ("/opt/empty", Some("-rw-r--r--")),
            ("/tmp", Some("drwxrwxrwt")),
            ("/bin/busybox", Some("-rwxr-xr-x")),
            ("/mnt/a", Some("drwxr-xr-x")),
            // What was mounted, where it was mounted, and what looks like it.
            ("/mnt/a/b", None),
            ("/opt/stub", None),
            ("/dev", None),
            ("/proc", None),
            ("/sys", None),
            ("/etc/group", if options.len() > 1 { mode("/etc/group") } else { None }),
        ] {
            ensure!(mode(name) == expected, "{name}: {:?}, not {expected:?}", mode(name));
        }
        ensure!(!list.iter().any(|(_, name)| name.contains("in-a-mount")), "{list:#?}");
        assert_eq!(file(&image, "opt/secret")?, "secret\n");
        assert_eq!(file(&image, "opt/tool-2")?, "tool\n");
        ensure!(fs::metadata(&image)?.len() < 9_000_000, "the hole takes room");
        // As enroot makes them, unless told otherwise.
        let about = unsquashfs(&["-stat"], &image, &[])?;
        ensure!(about.contains("Compression lzo") && about.contains("Data is uncompressed"), "{about}");
        assert_eq!(names(&place)?, ["image.sqsh"]);
    }
    Ok(())
}

fn paths(world: &mut World) -> Result<()> {
    let place = place(world, "paths")?;
    let other = world.make_directory(0, "work/elsewhere")?;
    // A relative path is relative to the directory that the job was started in, wherever the step runs.
    let options =
        ["-w", "node1", IMAGE, "--container-save=relative.sqsh", "--container-writable", "--chdir", "/", "true"];
    let mut command = world.bed.cluster.command(0, "srun", options);
    let output = process::run(command.current_dir(&other).env("PWD", &place), wait::DEADLINE)?.success()?;
    ensure!(output.stderr.contains(&format!(" to {}/relative.sqsh\n", place.display())), "{output}");
    assert_eq!(names(&place)?, ["relative.sqsh"]);
    let mut command = world.bed.cluster.command(0, "srun", options);
    let output = process::run(command.env_remove("PWD").arg("--").env("PWD", ""), wait::DEADLINE)?;
    ensure!(output.code() == 1, "{output}");
    ensure!(
        output.stderr.contains("pyxis: container export: relative path used, but job's cwd is unset\n"),
        "{output}"
    );
    // Settings of enroot's.
    let image = place.join("zstd.sqsh");
    let target = format!("--container-save={}", image.display());
    let mut command = world.bed.cluster.command(0, "srun", ["-w", "node1", IMAGE, &target, "true"]);
    command
        .env("ENROOT_SQUASH_OPTIONS", "-comp zstd -Xcompression-level 3 -b 1M -hmm")
        .env("SOURCE_DATE_EPOCH", "86400");
    let output = process::run(&mut command, wait::DEADLINE)?.success()?;
    ensure!(output.stderr.contains("pyxis: ENROOT_SQUASH_OPTIONS: ignored: -hmm\n"), "{output}");
    let about = unsquashfs(&["-stat"], &image, &[])?;
    ensure!(about.contains("Compression zstd") && about.contains("Block size 1048576"), "{about}");
    ensure!(about.contains("1970"), "{about}");
    Ok(())
}

fn start_files(world: &mut World) -> Result<()> {
    world.have("start", |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        // What the image ships is for other tools.
        fs::write(tree.join("etc/environment"), "SHIPPED=1\n")?;
        ImageBuilder::new(&layout)?
            .config("Env", json!([images::IMAGE_PATH, "GREETING=hello world"]))
            .config("Entrypoint", json!(["/bin/echo", "it's"]))
            .config("Cmd", json!(["me"]))
            .config("WorkingDir", json!("/srv/work"))
            .config("Volumes", json!({ "/data": {} }))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")
    })?;
    let image = place(world, "start")?.join("image.sqsh");
    let script = "echo MINE=2 >> /etc/environment; cat /etc/rc";
    let output = save(world, &image, &["--container-image=start", "--container-writable"], script)?.success()?;
    let rc = file(&image, "etc/rc")?;
    assert_eq!(output.stdout, rc);
    ensure!(rc.contains("# enroot-provenance: docker://"), "{rc}");
    ensure!(rc.contains("exec '/bin/echo' 'it'\\''s' \"$@\""), "{rc}");
    assert_eq!(file(&image, "etc/environment")?, format!("{}\nGREETING=hello world\nMINE=2\n", images::IMAGE_PATH));
    let fstab = file(&image, "etc/fstab")?;
    assert_eq!(fstab, "${ENROOT_ROOTFS}/data /data none x-create=dir,bind,rw,nosuid,nodev\n");
    ensure!(file(&image, "etc/rc.local")?.starts_with('#'));
    Ok(())
}

fn several_tasks(world: &mut World) -> Result<()> {
    let image = place(world, "tasks")?.join("image.sqsh");
    // The first task waits for the others to be done.
    let script = "echo $SLURM_PROCID > /task-$SLURM_PROCID
        test $SLURM_TASK_PID = $$ || echo wrong pid
        test $SLURM_PROCID = 0 && until test -e /task-1 && test -e /task-2; do sleep 0.1; done; true";
    let output = save(world, &image, &["-n3", "--container-writable"], script)?.success()?;
    assert_eq!(output.stderr.matches("pyxis: exported container").count(), 1, "{output}");
    assert_eq!(output.stdout, "");
    for task in ["0", "1", "2"] {
        assert_eq!(file(&image, &format!("task-{task}"))?, format!("{task}\n"));
    }
    Ok(())
}

fn two_nodes(world: &mut World) -> Result<()> {
    let place = place(world, "nodes")?;
    let target = format!("--container-save={}/image.sqsh", place.display());
    let arguments = ["-N2", IMAGE, &target, "--container-writable", "sh", "-c", "echo $SLURMD_NODENAME > /node"];
    let output = world.srun(&arguments)?.success()?;
    assert_eq!(output.stderr.matches("pyxis: exported container").count(), 2, "{output}");
    assert_eq!(names(&place)?, ["image.sqsh"]);
    let node = file(&place.join("image.sqsh"), "node")?;
    ensure!(["node1\n", "node2\n"].contains(&node.as_str()), "{node}");
    Ok(())
}

fn exit_codes(world: &mut World) -> Result<()> {
    let place = place(world, "codes")?;
    for (script, code) in [("exit 7", 7), ("kill -TERM $$", 143), ("kill -SEGV $$", 139)] {
        // srun does not wait for the last words of a step of which a task has ended by a signal.
        let says = |output: &Output, text: &str| code > 128 || output.stderr.contains(text);
        let image = place.join(code.to_string());
        let output = save(world, &image, &[], script)?;
        assert_eq!(output.code(), code, "{output}");
        ensure!(says(&output, "pyxis: exported container") && image.exists(), "{output}");
        let output = save(world, Path::new("/nowhere/x.sqsh"), &[], script)?;
        assert_eq!(output.code(), code, "{output}");
        ensure!(says(&output, "pyxis: failed to export container"), "{output}");
    }
    // The command that is not there.
    let image = place.join("missing");
    let target = format!("--container-save={}", image.display());
    let output = world.srun(&["-w", "node1", IMAGE, &target, "/no/such/command"])?;
    ensure!(output.code() == 2 && image.exists(), "{output}");
    Ok(())
}

fn failures(world: &mut World) -> Result<()> {
    let place = place(world, "failures")?;
    fs::create_dir_all(place.join("directory"))?;
    let shown = place.display();
    let result = || -> Result<()> {
        for (target, reason) in [
            (format!("{shown}/no/x.sqsh"), "No such file or directory"),
            (format!("{shown}/directory"), "Is a directory"),
            ("/etc/x.sqsh".into(), "Permission denied"),
        ] {
            let output = save(world, Path::new(&target), &[], "echo done")?;
            assert_eq!((output.code(), output.stdout.as_str()), (1, "done\n"), "{output}");
            let lines: Vec<&str> = output.stderr.lines().filter(|line| line.starts_with("pyxis: ")).collect();
            let [.., why, what] = lines[..] else { anyhow::bail!("{output}") };
            assert_eq!(why, format!("pyxis: cannot create {target}: {reason}"));
            ensure!(what.starts_with("pyxis: failed to export container pyxis_"), "{output}");
            ensure!(what.ends_with(&format!(" to {target}")), "{output}");
        }
        Ok(())
    };
    let result = result();
    fs::remove_dir(place.join("directory"))?;
    result?;
    let mut command = world.bed.cluster.command(
        0,
        "srun",
        ["-w", "node1", IMAGE, &format!("--container-save={shown}/x.sqsh"), "true"],
    );
    let output = process::run(command.env("ENROOT_SQUASH_OPTIONS", "-comp lzma"), wait::DEADLINE)?;
    ensure!(output.code() == 1 && output.stderr.contains("unknown compression \"lzma\""), "{output}");
    assert_eq!(names(&place)?, [""; 0]);
    Ok(())
}

fn full_disk(world: &mut World) -> Result<()> {
    let place = place(world, "full")?;
    let node = &world.bed.cluster.nodes()[0];
    let owner = format!("size=1m,uid={}", world.user(0).uid);
    process::output_of(node.command("mount").args(["-t", "tmpfs", "-o", &owner, "small"]).arg(&place))?;
    let image = place.join("image.sqsh");
    let result = || -> Result<()> {
        // The binary alone is larger.
        let script = format!("echo old > {}", image.display());
        world.srun(&["-w", "node1", "sh", "-c", &script])?.success()?;
        let output = save(world, &image, &[], "true")?;
        ensure!(output.code() == 1 && output.stderr.contains("No space left on device"), "{output}");
        let script = format!("ls -A {0}; cat {1}; df -k {0} | tail -1", place.display(), image.display());
        let seen = world.srun(&["-w", "node1", "sh", "-c", &script])?.success()?.stdout;
        ensure!(seen.starts_with("image.sqsh\nold\nsmall "), "{seen}");
        let used = seen.split_ascii_whitespace().nth(4).context("df")?.to_owned();
        ensure!(used.parse::<u32>()? < 100, "something is left: {seen}");
        Ok(())
    };
    let result = result();
    process::output_of(node.command("umount").arg(&place))?;
    result
}

/// Starts a step that is busy saving for long, and waits until it is.
fn start_saving(world: &World, image: &Path) -> Result<Running> {
    let target = format!("--container-save={}", image.display());
    let script = "dd if=/dev/urandom of=/noise bs=1M count=150 2> /dev/null; echo done";
    let arguments = ["-w", "node1", IMAGE, &target, "--container-writable", "sh", "-c", script];
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    command.env("ENROOT_SQUASH_OPTIONS", "-comp xz -b 1M -processors 1");
    let step = Running::start(&mut command)?;
    // The new file has no name yet.
    let is_saving = || {
        let saver = world.bed.cluster.nodes()[0].processes().into_iter().find(|process| {
            process.command.starts_with("pyxis-saver")
                && fs::read_dir(format!("/proc/{}/fd", process.pid)).into_iter().flatten().flatten().any(|fd| {
                    fs::read_link(fd.path()).is_ok_and(|link| {
                        link.to_string_lossy().ends_with("(deleted)")
                            && fs::metadata(fd.path()).is_ok_and(|file| file.len() > 1 << 20)
                    })
                })
        });
        saver.map(drop)
    };
    wait::until("the step to be saving", wait::DEADLINE, is_saving).with_context(|| step.stderr())?;
    Ok(step)
}

fn cancel_saving(world: &mut World) -> Result<()> {
    let place = place(world, "cancel")?;
    let image = place.join("image.sqsh");
    fs::write(&image, "old")?;
    let step = start_saving(world, &image)?;
    let uid = world.user(0).uid.to_string();
    world.bed.cluster.admin("scancel", ["--user", &uid])?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(!output.status.success() && !output.stderr.contains("pyxis: exported"), "{output}");
    world.bed.cluster.wait_until_idle()?;
    assert_eq!(names(&place)?, ["image.sqsh"]);
    assert_eq!(fs::read(&image)?, b"old");
    Ok(())
}

fn kill_saving(world: &mut World) -> Result<()> {
    let place = place(world, "kill")?;
    let image = place.join("image.sqsh");
    fs::write(&image, "old")?;
    let step = start_saving(world, &image)?;
    let uid = world.user(0).uid.to_string();
    world.bed.cluster.admin("scancel", ["--signal=KILL", "--user", &uid])?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(!output.status.success(), "{output}");
    world.bed.cluster.wait_until_idle()?;
    assert_eq!((names(&place)?, fs::read(&image)?), (vec!["image.sqsh".to_owned()], b"old".to_vec()));
    Ok(())
}

fn no_start(world: &mut World) -> Result<()> {
    let place = place(world, "start-fails")?;
    let target = format!("--container-save={}/x.sqsh", place.display());
    world.refused(&["-n2", "-N1", IMAGE, &target, "--container-mounts=/no/such:/x"], "source path does not exist")?;
    world.refused(&["-n2", "-N1", IMAGE, &target, "--container-workdir=/nowhere"], "couldn't chdir to /nowhere")?;
    assert_eq!(names(&place)?, [""; 0]);
    Ok(())
}

fn signals(world: &mut World) -> Result<()> {
    let image = place(world, "signals")?.join("image.sqsh");
    let target = format!("--container-save={}", image.display());
    let script = "trap 'echo trapped' USR1; trap 'echo ending; exit 9' USR2; echo ready; while :; do sleep 0.1; done";
    let mut step = world.start(&["-w", "node1", "--job-name=signals", IMAGE, &target, "sh", "-c", script])?;
    step.wait_for_text("ready", wait::DEADLINE)?;
    for (signal, answer) in [("USR1", "trapped"), ("USR2", "ending")] {
        world.bed.cluster.admin("scancel", [&format!("--signal={signal}"), "--name=signals"])?;
        step.wait_for_text(answer, wait::DEADLINE)?;
    }
    let output = step.wait(wait::DEADLINE)?;
    assert_eq!((output.code(), output.stdout.as_str()), (9, "ready\ntrapped\nending\n"), "{output}");
    ensure!(image.exists());
    Ok(())
}

/// Whoever kills the process that Slurm knows means the task.
fn killed_saver(world: &mut World) -> Result<()> {
    let place = place(world, "killed")?;
    let target = format!("--container-save={}/x.sqsh", place.display());
    let mut command =
        world.bed.cluster.command(0, "srun", ["-w", "node1", IMAGE, &target, "sh", "-c", "echo up; exec cat"]);
    let mut step = Running::start(command.stdin(Stdio::piped()))?;
    step.wait_for_text("up", wait::DEADLINE)?;
    let saver =
        world.bed.cluster.nodes()[0].processes().into_iter().find(|process| process.command.starts_with("pyxis-saver"));
    process::output_of(Command::new("kill").args(["-KILL", &saver.context("no saver")?.pid.to_string()]))?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(output.code() == 137, "{output}");
    assert_eq!(names(&place)?, [""; 0]);
    Ok(())
}

/// Made by a step that saves nothing, saved by one that uses it again, and by one that joins it.
fn named_containers(world: &mut World) -> Result<()> {
    let place = place(world, "named")?;
    let name = named::new_name();
    let (create, join) = (named::option(&name, ""), named::option(&name, ":exec"));
    let writable = "--container-writable";
    world.srun(&["-w", "node1", IMAGE, &create, writable, "sh", "-c", "echo 1 > /first"])?.success()?;
    let again = |file: &str| format!("echo 2 >> /first; echo x > /{file}");
    let (first, second) = (place.join("first.sqsh"), place.join("second.sqsh"));
    let target = |image: &Path| format!("--container-save={}", image.display());
    let step = ["-w", "node1", &create, writable, &target(&first), "sh", "-c", &again("second")];
    let output = world.srun(&step)?.success()?;
    ensure!(output.stderr.contains(&format!("exported container pyxis_{name} to {}", first.display())), "{output}");
    assert_eq!(file(&first, "first")?, "1\n2\n");
    let running = named::start(world, &[&create, writable], "echo 3 > /third")?;
    let saved = world.srun(&["-w", "node1", "--overlap", &join, &target(&second), "sh", "-c", &again("fourth")]);
    named::end(running)?;
    saved?.success()?;
    assert_eq!(file(&second, "first")?, "1\n2\n2\n");
    let names: Vec<String> = listing(&second)?.into_iter().map(|(_, name)| name).collect();
    for name in ["/second", "/third", "/fourth", "/etc/rc", "/etc/environment"] {
        ensure!(names.iter().any(|other| other == name), "{name}: {names:#?}");
    }
    Ok(())
}

/// By their user, without Slurm.
fn running(world: &mut World) -> Result<()> {
    let place = place(world, "running")?;
    let step = named::start(world, &[IMAGE, "--container-writable"], "echo mine > /mine; chmod 0 /mine")?;
    let job = world.bed.cluster.admin("squeue", ["--noheader", "--format=%i", "--states=RUNNING"])?;
    let (name, image) = (format!("pyxis_{}.0", job.trim()), place.join("image.sqsh"));
    let user = world.user(0);
    let export = |force: &str| {
        let mut command = world.bed.cluster.nodes()[0].command("setpriv");
        command
            .args(["--reuid", &user.uid.to_string(), "--regid", &user.gid.to_string(), "--init-groups", "--"])
            .arg(&world.bed.pyxis.executable)
            .arg("--config")
            .arg(&world.bed.pyxis.config)
            .args(["export", force, "--output"])
            .arg(&image)
            .arg(&name)
            .env("HOME", &user.home);
        process::run(&mut command, wait::DEADLINE)
    };
    let results = (export("--force"), export("--"));
    named::end(step)?;
    results.0?.success()?;
    assert_eq!(file(&image, "mine")?, "mine\n");
    ensure!(file(&image, "etc/environment")?.contains("PATH="));
    ensure!(file(&image, "etc/rc")?.contains("exec '/bin/sh'"));
    ensure!(!results.1?.status.success(), "it was there already");
    Ok(())
}

fn batch(world: &mut World) -> Result<()> {
    let place = place(world, "batch")?;
    let (image, log) = (place.join("image.sqsh"), place.join("log"));
    let script = format!(
        "#!/bin/sh\n#SBATCH {IMAGE}\n#SBATCH --container-writable\n#SBATCH --container-save={}\n\
         trap 'echo trapped > /trapped' USR1; echo ready\nuntil test -e /trapped; do sleep 0.1; done\nexit 5\n",
        image.display()
    );
    let file_name = place.join("script.sh");
    fs::write(&file_name, script)?;
    world.user(0).own(&file_name)?;
    let output = format!("--output={}", log.display());
    let arguments = ["--parsable", "-w", "node1", &output, file_name.to_str().context("path")?];
    let job = process::output_of(&mut world.bed.cluster.command(0, "sbatch", arguments))?;
    let log_has = |text: &str| {
        wait::until(&format!("{text} in the log"), wait::DEADLINE, || {
            fs::read_to_string(&log).ok().filter(|log| log.contains(text))
        })
    };
    log_has("ready")?;
    // To the script alone.
    world.bed.cluster.admin("scancel", ["--batch", "--signal=USR1", job.trim()])?;
    let text = log_has("pyxis: exported container")?;
    let container = format!("pyxis_{}.4294967291", job.trim());
    ensure!(text.contains(&format!("pyxis: exported container {container} to {}", image.display())), "{text}");
    assert_eq!(file(&image, "trapped")?, "trapped\n");
    let code = wait::until("the end of the job", wait::DEADLINE, || {
        let job = world.bed.cluster.admin("scontrol", ["--oneliner", "show", "job", job.trim()]).ok()?;
        job.contains("JobState=FAILED")
            .then(|| job.split(' ').find(|field| field.starts_with("ExitCode=")).map(str::to_owned))?
    })?;
    assert_eq!(code, "ExitCode=5:0");
    Ok(())
}

/// The terminal is the task's, also for an interactive shell with job control.
fn pty(world: &mut World) -> Result<()> {
    let image = place(world, "pty")?.join("image.sqsh");
    let line = format!(
        "srun -w node1 --pty {IMAGE} --container-writable --container-save={} sh -c 'tty; tty > /terminal; sh -m -c \"sleep 0 & wait; echo job\"'",
        image.display()
    );
    let mut command = world.bed.cluster.command(0, "script", ["-qec", &line, "/dev/null"]);
    let output = process::run(&mut command, wait::DEADLINE)?.success()?;
    ensure!(output.stdout.contains("/dev/pts/") && output.stdout.contains("job"), "{output}");
    ensure!(output.stdout.contains("pyxis: exported container"), "{output}");
    ensure!(file(&image, "terminal")?.starts_with("/dev/pts/"));
    Ok(())
}
