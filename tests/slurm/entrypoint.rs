//! `--container-entrypoint`: what the image's entrypoint prepares reaches the tasks, and one that does not play along costs
//! a clear message and leaves nothing behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use testbed::image::{Compression, ImageBuilder};
use testbed::{Output, images, process, wait};

use crate::Case;
use crate::named;
use crate::world::{World, sorted};

pub const CASES: &[Case] = &[
    ("off_by_default", off_by_default),
    ("prepares_environment_and_directory_of_all_tasks", prepares_all_tasks),
    ("asked_for_by_variables", from_the_environment),
    ("a_site_may_turn_it_on", a_site_may_turn_it_on),
    ("sees_what_container_env_names", sees_what_container_env_names),
    ("is_shown_when_asked_for", is_shown),
    ("is_the_user_under_the_same_rules", under_the_same_rules),
    ("of_an_image_without_a_shell", without_a_shell),
    ("that_starts_a_child", that_starts_a_child),
    ("that_takes_a_command_line", that_takes_a_command_line),
    ("that_leaves_processes_behind", that_leaves_processes),
    ("that_fails", that_fails),
    ("that_ignores_its_arguments", that_ignores_its_arguments),
    ("that_cannot_be_executed", that_cannot_be_executed),
    ("that_never_ends", that_never_ends),
    ("that_never_stops_talking", that_never_stops_talking),
    ("cancelled", cancelled),
    ("that_kills_the_task", that_kills_the_task),
    ("that_kills_its_keeper", that_kills_its_keeper),
    ("batch_scripts", batch_scripts),
    ("of_containers_that_are_kept", kept_containers),
];

const ASKED: &str = "--container-entrypoint";
const HINT: &str = "pyxis: if the image has an unusual entrypoint, try using --no-container-entrypoint";

/// The image `library/NAME` with this entrypoint and, at `/entrypoint`, this script. Gives the option for it.
fn image(world: &mut World, name: &'static str, entrypoint: Value, script: &str) -> Result<String> {
    world.have(name, |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        fs::write(tree.join("entrypoint"), script)?;
        fs::set_permissions(tree.join("entrypoint"), fs::Permissions::from_mode(0o755))?;
        ImageBuilder::new(&layout)?
            .config("Env", json!([images::IMAGE_PATH, "FROM_IMAGE=image", "UNWANTED=image"]))
            .config("Entrypoint", entrypoint)
            .config("Cmd", json!(["never", "used"]))
            .config("WorkingDir", json!("/usr"))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")
    })?;
    Ok(format!("--container-image={name}"))
}

/// An image whose entrypoint is a shell script.
fn scripted(world: &mut World, name: &'static str, script: &str) -> Result<String> {
    image(world, name, json!(["/entrypoint", "first"]), &format!("#!/bin/sh\n{script}"))
}

fn preparing(world: &mut World) -> Result<String> {
    let script = "echo started with $1 in $PWD; echo complaint >&2; [ $# = 2 ] || exit 9; shift\n\
                  export FROM_ENTRYPOINT='two words' FROM_IMAGE=changed SLURM_PROCID=7 SEEN=${NAMED-none}/${PLAIN-none}\n\
                  unset UNWANTED; cd /etc; exec \"$@\"\n";
    scripted(world, "entry-prepares", script)
}

const SHOW: &str = "echo \"$FROM_ENTRYPOINT|$FROM_IMAGE|$UNWANTED|$PWD|$SLURM_PROCID\"";

/// Runs a shell script in an image with an entrypoint.
fn run(world: &World, image: &str, options: &[&str], script: &str) -> Result<Output> {
    world.srun(&[&[image, ASKED], options, &["sh", "-c", script]].concat())
}

fn off_by_default(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    for options in [&[][..], &["--no-container-entrypoint"], &["--container-entrypoint-log"]] {
        let output = world.srun(&[&[&*image], options, &["sh", "-c", SHOW]].concat())?.success()?;
        assert_eq!(output.stdout, "|image|image|/usr|0\n", "{options:?}");
        ensure!(!output.stderr.contains("started"), "{output}");
    }
    Ok(())
}

fn prepares_all_tasks(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let output = run(world, &image, &["-N2", "-n4", "--ntasks-per-node=2"], SHOW)?.success()?;
    let expected: Vec<_> = (0..4).map(|task| format!("two words|changed||/etc|{task}")).collect();
    assert_eq!(sorted(&output.stdout), expected);
    // Nothing is said that is not said without it.
    assert_eq!(sorted(&output.stderr).len(), 2, "{output}");
    let output = run(world, &image, &["--container-workdir=/bin"], "pwd; echo $SHLVL$OLDPWD")?.success()?;
    assert_eq!(output.stdout.lines().next(), Some("/bin"));
    Ok(())
}

fn from_the_environment(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let run = |variables: &[(&str, &str)], options: &[&str]| -> Result<Output> {
        let arguments = [&[&*image], options, &["sh", "-c", "echo $FROM_ENTRYPOINT"]].concat();
        let mut command = world.bed.cluster.command(0, "srun", arguments);
        process::run(command.envs(variables.iter().copied()), wait::DEADLINE)?.success()
    };
    let on = ("PYXIS_CONTAINER_ENTRYPOINT", "1");
    assert_eq!(run(&[on], &[])?.stdout, "two words\n");
    assert_eq!(run(&[on], &["--no-container-entrypoint"])?.stdout, "\n");
    assert_eq!(run(&[("PYXIS_CONTAINER_ENTRYPOINT", "no")], &[ASKED])?.stdout, "two words\n");
    let shown = |log| {
        Ok::<_, anyhow::Error>(run(&[on, ("PYXIS_CONTAINER_ENTRYPOINT_LOG", log)], &[])?.stderr.contains("started"))
    };
    ensure!(shown("true")? && !shown("0")?, "PYXIS_CONTAINER_ENTRYPOINT_LOG");
    Ok(())
}

fn a_site_may_turn_it_on(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let line = world.bed.pyxis.plugstack.clone();
    let plugin = world.bed.pyxis.plugin.display().to_string();
    let loaded = fs::read_to_string(line.trim_start_matches("include ").trim().replace('*', "pyxis.conf"))?;
    ensure!(loaded.contains(&plugin), "{loaded}");
    world.bed.cluster.set_plugstack(&format!("{} execute_entrypoint=1\n", loaded.trim_end()))?;
    let results =
        (world.srun(&[&image, "sh", "-c", SHOW]), world.srun(&[&image, "--no-container-entrypoint", "sh", "-c", SHOW]));
    world.bed.cluster.set_plugstack(&line)?;
    assert_eq!(results.0?.success()?.stdout, "two words|changed||/etc|0\n");
    assert_eq!(results.1?.success()?.stdout, "|image|image|/usr|0\n");
    Ok(())
}

fn sees_what_container_env_names(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let run = |options: &[&str]| -> Result<String> {
        let arguments = [&[&*image, ASKED], options, &["sh", "-c", "echo $SEEN $NAMED $PLAIN"]].concat();
        let mut command = world.bed.cluster.command(0, "srun", arguments);
        command.envs([("NAMED", "n"), ("PLAIN", "p")]);
        Ok(process::run(&mut command, wait::DEADLINE)?.success()?.stdout)
    };
    assert_eq!(run(&[])?, "none/none n p\n");
    assert_eq!(run(&["--container-env=NAMED"])?, "n/none n p\n");
    assert_eq!(run(&["--container-env=NAMED=given"])?, "given/none given p\n");
    // What the entrypoint changes is the container's, except where the host's was asked for.
    assert_eq!(run(&["--container-env=SEEN,NAMED"])?, "n/none n p\n");
    Ok(())
}

fn is_shown(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let output = run(world, &image, &["--container-entrypoint-log"], "echo task")?.success()?;
    assert_eq!(output.stdout, "task\n");
    ensure!(output.stderr.ends_with("\nstarted with first in /usr\ncomplaint\n"), "{output}");
    Ok(())
}

/// Same user, same filter, same read-only root; `/tmp` and the host name are the container's.
fn under_the_same_rules(world: &mut World) -> Result<()> {
    let script = "shift; exec >/tmp/log 2>&1; id -u; grep Seccomp: /proc/self/status; touch /x; cat; hostname inside; \
                  tty; ls /proc/self/fd | wc -l; grep -h . /proc/self/oom_score_adj; exec \"$@\"\n";
    let image = scripted(world, "entry-rules", script)?;
    let uid = world.user(0).uid;
    let output = run(world, &image, &[], "cat /tmp/log; cat /proc/self/oom_score_adj")?.success()?;
    let [id, filter, root, name, terminal, descriptors, score, own_score] =
        output.stdout.lines().collect::<Vec<_>>()[..]
    else {
        anyhow::bail!("{output}")
    };
    assert_eq!([id, filter, terminal], [&*uid.to_string(), "Seccomp:\t2", "not a tty"], "{output}");
    ensure!(root.contains("Read-only file system") && name.contains("not permitted"), "{output}");
    // The standard ones and that of `ls` itself.
    assert_eq!(descriptors, "4", "{output}");
    assert_eq!(score, own_score, "{output}");
    let options = ["--container-remap-root", "--container-writable", "--container-unshare=uts", "-n2", "-N1"];
    let output = run(world, &image, &options, "echo $(head -n 1 /tmp/log; ls /x; hostname)")?.success()?;
    assert_eq!(output.stdout, "0 /x inside\n".repeat(2));
    Ok(())
}

fn without_a_shell(world: &mut World) -> Result<()> {
    world.have("entry-shell-less", |layout| {
        let tree = layout.join("tree");
        fs::create_dir_all(tree.join("bin"))?;
        fs::copy("/bin/busybox", tree.join("bin/busybox"))?;
        ImageBuilder::new(&layout)?
            .config("Entrypoint", json!(["busybox", "env", "ADDED=by the entrypoint"]))
            .config("Env", json!(["PATH=/nowhere:/bin"]))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")
    })?;
    let output =
        world.srun(&["--container-image=entry-shell-less", ASKED, "busybox", "sh", "-c", "echo $ADDED; exit 3"])?;
    assert_eq!((output.stdout.as_str(), output.code()), ("by the entrypoint\n", 3), "{output}");
    Ok(())
}

/// As tini and other supervisors do.
fn that_starts_a_child(world: &mut World) -> Result<()> {
    let script = "shift; export DEPTH=1; sh -c 'export DEPTH=2; \"$@\" & wait; echo after' x \"$@\"; echo never\n";
    let image = scripted(world, "entry-forks", script)?;
    let output = run(world, &image, &["--container-entrypoint-log"], "echo $DEPTH")?.success()?;
    assert_eq!(output.stdout, "2\n");
    ensure!(!output.stderr.contains("after") && !output.stderr.contains("never"), "{output}");
    // One that leaves the work to an orphan.
    let image = scripted(world, "entry-orphans", "shift; (export DEPTH=3; sleep 0.2; setsid \"$@\") & exit 0\n")?;
    assert_eq!(run(world, &image, &[], "echo $DEPTH")?.success()?.stdout, "3\n");
    Ok(())
}

/// Shell form with a place for a command, and a script that the kernel does not know how to run.
fn that_takes_a_command_line(world: &mut World) -> Result<()> {
    let shell = image(world, "entry-shell", json!(["/bin/sh", "-c"]), "")?;
    assert_eq!(run(world, &shell, &[], "echo fine")?.success()?.stdout, "fine\n");
    let eval = image(world, "entry-eval", json!(["/entrypoint"]), "export FROM=eval; eval \"$*\"\n")?;
    assert_eq!(run(world, &eval, &[], "echo $FROM")?.success()?.stdout, "eval\n");
    Ok(())
}

/// Daemons of its own, in sessions of their own, deaf to signals: all gone when the task starts.
fn that_leaves_processes(world: &mut World) -> Result<()> {
    let script = "shift; trap '' TERM HUP INT; setsid sh -c 'touch /tmp/started; exec sleep 98765' & \
                  (sleep 98764 & sleep 98763 &); until [ -e /tmp/started ]; do :; done; exec \"$@\"\n";
    let image = scripted(world, "entry-daemons", script)?;
    let left = "read children </proc/$$/task/$$/children; echo \"<$children>\"; ps | grep -c 'sleep 9876[345]'; true";
    assert_eq!(run(world, &image, &[], left)?.success()?.stdout, "<>\n0\n");
    Ok(())
}

/// A step whose entrypoint fails. Gives what it said.
fn refused(world: &World, image: &str, options: &[&str], text: &str) -> Result<String> {
    let stderr = world.refused(&[&[image, ASKED], options].concat(), &format!("pyxis: {text}"))?;
    ensure!(stderr.contains(HINT), "{stderr}");
    Ok(stderr)
}

fn that_fails(world: &mut World) -> Result<()> {
    let image = scripted(world, "entry-fails", "echo what is wrong; sleep 98765 & exit 3\n")?;
    let stderr = refused(world, &image, &["-n3", "-N1"], "container start failed with error code: 3")?;
    assert_eq!(stderr.matches("container start failed").count(), 1, "{stderr}");
    assert_eq!(stderr.matches("container was not started successfully by another task").count(), 2, "{stderr}");
    ensure!(stderr.contains("pyxis: printing enroot log file:"), "{stderr}");
    ensure!(stderr.contains("pyxis:     what is wrong\n"), "{stderr}");
    let killed = scripted(world, "entry-killed", "kill -KILL $$\n")?;
    refused(world, &killed, &[], "container exited too soon")?;
    world.nodes_work()
}

fn that_ignores_its_arguments(world: &mut World) -> Result<()> {
    let image = image(world, "entry-ignores", json!(["/bin/sh", "-c", "echo working"]), "")?;
    let stderr = refused(world, &image, &[], "container exited too soon")?;
    ensure!(stderr.contains("pyxis:     working\n"), "{stderr}");
    Ok(())
}

fn that_cannot_be_executed(world: &mut World) -> Result<()> {
    let missing = image(world, "entry-missing", json!(["/not/there", "x"]), "")?;
    let stderr = refused(world, &missing, &[], "container start failed with error code: 127")?;
    ensure!(stderr.contains("pyxis:     [ERROR] /not/there: No such file or directory\n"), "{stderr}");
    let directory = image(world, "entry-directory", json!(["/etc"]), "")?;
    let stderr = refused(world, &directory, &[], "container start failed with error code: 126")?;
    ensure!(stderr.contains("pyxis:     [ERROR] /etc: Permission denied\n"), "{stderr}");
    Ok(())
}

/// Runs `test` with this time limit for entrypoints.
fn with_limit(world: &mut World, seconds: u32, test: impl FnOnce(&World) -> Result<()>) -> Result<()> {
    let configuration = world.configuration();
    world.bed.pyxis.configure(&format!("{configuration}[container]\nentrypoint_timeout_seconds = {seconds}\n"))?;
    let result = test(world);
    world.bed.pyxis.configure(&configuration)?;
    result
}

fn that_never_ends(world: &mut World) -> Result<()> {
    let image = scripted(world, "entry-hangs", "echo so far; trap '' TERM; while :; do sleep 98765; done\n")?;
    with_limit(world, 1, |world| {
        let text = "container start error: /entrypoint has not executed its arguments within 1 seconds";
        let stderr = refused(world, &image, &["-n2", "-N1"], text)?;
        ensure!(stderr.contains("pyxis:     so far\n"), "{stderr}");
        world.nodes_work()
    })
}

/// Output is bounded, whether it ends or not; the end of it is what is shown.
fn that_never_stops_talking(world: &mut World) -> Result<()> {
    let lines =
        "i=0; while [ $i -lt 40 ]; do echo line $i; head -c 65536 /dev/zero | tr '\\0' x; echo; i=$((i + 1)); done";
    let fine = scripted(world, "entry-talks", &format!("shift; {lines}; exec \"$@\"\n"))?;
    assert_eq!(run(world, &fine, &[], "echo fine")?.success()?.stdout, "fine\n");
    let fails = scripted(world, "entry-talks-and-fails", &format!("{lines}; echo end; exit 1\n"))?;
    let stderr = refused(world, &fails, &[], "container start failed with error code: 1")?;
    ensure!(stderr.contains("bytes left out]\n") && stderr.contains("pyxis:     end\n"), "{:.1000}", stderr);
    ensure!(!stderr.contains("line 5\n") && stderr.contains("line 39\n"), "{:.1000}", stderr);
    let forever = scripted(world, "entry-talks-for-ever", "yes\n")?;
    with_limit(world, 1, |world| {
        let stderr = refused(world, &forever, &[], "container start error: ")?;
        ensure!(stderr.len() < 64 << 20, "{} bytes", stderr.len());
        Ok(())
    })
}

/// Deaf to polite signals, and ended by them all the same.
fn cancelled(world: &mut World) -> Result<()> {
    let script = "trap '' TERM INT HUP; setsid sleep 98765 & touch /marks/started; while :; do sleep 98765; done\n";
    let image = scripted(world, "entry-cancelled", script)?;
    let marks = world.make_directory(0, "work/marks")?;
    let mount = format!("--container-mounts={}:/marks", marks.display());
    let step = world.start(&["--job-name=entry", &image, ASKED, &mount, "echo", "it ran"])?;
    wait::until("the entrypoint", wait::DEADLINE, || marks.join("started").exists().then_some(()))?;
    // This one alone: nothing worse follows after a while.
    world.bed.cluster.admin("scancel", ["--signal=TERM", "--name=entry"])?;
    let output = step.wait(wait::DEADLINE)?;
    ensure!(!output.status.success() && !output.stdout.contains("it ran"), "{output}");
    ensure!(output.stderr.contains("pyxis: container start was interrupted"), "{output}");
    fs::remove_dir_all(marks)?;
    Ok(())
}

/// Nothing of an entrypoint is left when the task that runs it is killed: the look at the nodes that follows would tell.
fn that_kills_the_task(world: &mut World) -> Result<()> {
    // Whoever the parent is: the task is the first above that is not in the entrypoint's keeping.
    let script = "parent() { while read -r key value; do [ $key = PPid: ] && echo $value; done </proc/$1/status; }\n\
                  setsid sleep 98765 & (sleep 98764 & sleep 98763 &); kill -KILL $(parent $PPID); sleep 98762\n";
    let image = scripted(world, "entry-kills-task", script)?;
    let output = world.srun(&[&image, ASKED, "-n2", "-N1", "echo", "it ran"])?;
    ensure!(!output.status.success() && !output.stdout.contains("it ran"), "{output}");
    ensure!(output.stderr.contains("a previous task terminated unexpectedly during container setup"), "{output}");
    world.nodes_work()
}

fn that_kills_its_keeper(world: &mut World) -> Result<()> {
    let script = "setsid sleep 98765 & (sleep 98764 & sleep 98763 &); kill -KILL $PPID; sleep 98762\n";
    let image = scripted(world, "entry-kills-keeper", script)?;
    refused(world, &image, &[], "container exited too soon")?;
    world.nodes_work()
}

fn batch_scripts(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let work = world.make_directory(0, "work/entry")?;
    let output = format!("--output={}", work.join("log").display());
    let arguments = ["--wait", "--quiet", &output, &image, ASKED, "--wrap", SHOW];
    process::run(&mut world.bed.cluster.command(0, "sbatch", arguments), wait::DEADLINE * 2)?.success()?;
    let text = fs::read_to_string(work.join("log"))?;
    ensure!(text.ends_with("two words|changed||/etc|0\n"), "{text}");
    fs::remove_dir_all(work)?;
    Ok(())
}

/// Each step decides for itself, also one that joins a running container, and none leaves anything for the next.
fn kept_containers(world: &mut World) -> Result<()> {
    let image = preparing(world)?;
    let name = named::option(&named::new_name(), "");
    let show = "echo \"$FROM_ENTRYPOINT|$FROM_IMAGE|$PWD\"";
    let (with, without) = ("two words|changed|/etc\n", "|image|/usr\n");
    let first = named::start(world, &[&name, &image], show)?;
    let attached = (named::sh(world, &[&name, ASKED], show), named::sh(world, &[&name], show));
    assert_eq!(named::end(first)?.stdout, format!("{without}up\n"));
    assert_eq!((attached.0?.stdout.as_str(), attached.1?.stdout.as_str()), (with, without));
    assert_eq!(named::sh(world, &[&name, ASKED], show)?.stdout, with);
    assert_eq!(named::sh(world, &[&name], show)?.stdout, without);
    Ok(())
}
