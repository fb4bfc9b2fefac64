//! What is on the disk of a container with a name: when it counts, whose it is, and when it goes.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testbed::proxy::Behaviour;
use testbed::{Running, images, process, wait};

use crate::Case;
use crate::named::{end, new_name, option, sh, start};
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("a_half_made_container_is_none", half_made),
    ("a_step_that_waits_for_a_container_can_be_cancelled", cancel_waiting),
    ("another_step_creates_it_if_the_first_is_cancelled", take_over),
    ("the_collector_keeps_its_layers", collector),
    ("lost_layers_are_imported_again", lost_layers),
    ("its_user_may_delete_it", deleted_by_user),
    ("its_user_cannot_make_one_up", forged),
    ("it_ends_with_its_job_where_the_site_says_so", job_scope),
    ("a_directory_that_is_not_roots_is_refused", broken_path),
    ("a_tree_that_enroot_made_is_a_container", tree_of_enroot),
];

/// `/var/lib/pyxis/containers/UID` of user `index` on node1.
fn directory(world: &World, index: usize) -> PathBuf {
    let uid = world.user(index).uid.to_string();
    world.bed.cluster.nodes()[0].private("/var/lib/pyxis").join("containers").join(uid)
}

fn names(world: &World, index: usize) -> BTreeSet<String> {
    let entries = fs::read_dir(directory(world, index)).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn gc(world: &World, arguments: &[&str]) -> Result<String> {
    let mut command = world.bed.cluster.nodes()[0].command(&world.bed.pyxis.executable.display().to_string());
    process::output_of(command.arg("--config").arg(&world.bed.pyxis.config).arg("gc").args(arguments))
}

/// Starts a step in a new image on node1 and waits until its import stalls. Gives the image, too.
fn start_stalled(world: &World, options: &[&str]) -> Result<(Running, String)> {
    let image = format!("--container-image={}/library/{}", world.proxy.host(), world.new_image(1 << 20)?);
    world.proxy.set(Behaviour::StallAfter(200_000));
    let step = world.start(&[&["-w", "node1", image.as_str()], options, &["echo", "it ran"]].concat())?;
    world.proxy.wait_until_held(wait::DEADLINE).with_context(|| format!("srun says: {}", step.stderr()))?;
    Ok((step, image))
}

fn half_made(world: &mut World) -> Result<()> {
    let name = new_name();
    let (step, image) = start_stalled(world, &[&option(&name, ":create")])?;
    let processes = world.bed.cluster.nodes()[0].processes();
    let broker = processes.iter().find(|process| process.command.starts_with("pyxis-broker")).context("no broker")?;
    kill(Pid::from_raw(broker.pid), Signal::SIGKILL)?;
    ensure!(!step.wait(Duration::from_secs(20))?.status.success());
    world.proxy.set(Behaviour::Pass);
    let full = format!("pyxis_{name}");
    ensure!(names(world, 0).contains(&full), "nothing was left: this test shows nothing");
    world.refused(&["-w", "node1", &option(&name, "")], "does not exist, and --container-image is not set")?;
    // Also with something in it.
    let upper = directory(world, 0).join(&full).join("upper");
    fs::create_dir_all(upper.join("old"))?;
    sh(world, &[&option(&name, ":create"), &image], "ls -d /old 2>/dev/null; cat /etc/os-release")?;
    ensure!(!upper.join("old").exists() && upper.exists());
    // The collector removes such things, and nothing else.
    let other = directory(world, 0).join("pyxis_other");
    fs::create_dir_all(other.join("upper/a"))?;
    for path in [&other, &other.join("upper"), &other.join("upper/a")] {
        world.user(0).own(path)?;
    }
    let report = gc(world, &["--dry-run"])?;
    ensure!(other.exists(), "{report}");
    let report = gc(world, &[])?;
    ensure!(!other.exists() && upper.exists(), "{report}");
    sh(world, &[&option(&name, "")], "true").map(drop)
}

fn cancel_waiting(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let (first, image) = start_stalled(world, &[&name, "--job-name=first"])?;
    let second = world.start(&["-w", "node1", "--job-name=second", &name, &image, "echo", "second ran"])?;
    let brokers = || {
        let processes = world.bed.cluster.nodes()[0].processes();
        (processes.iter().filter(|process| process.command.starts_with("pyxis-broker")).count() == 2).then_some(())
    };
    wait::until("two brokers", wait::DEADLINE, brokers)?;
    world.bed.cluster.admin("scancel", ["--name=second"])?;
    let output = second.wait(Duration::from_secs(20))?;
    ensure!(!output.status.success() && !output.stdout.contains("ran"), "{output}");
    world.proxy.set(Behaviour::Pass);
    assert_eq!(first.wait(wait::DEADLINE)?.success()?.stdout, "it ran\n");
    Ok(())
}

fn take_over(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let (first, image) = start_stalled(world, &[&name, "--job-name=first"])?;
    let second = world.start(&["-w", "node1", "--job-name=second", &name, &image, "echo", "second ran"])?;
    world.bed.cluster.admin("scancel", ["--name=first"])?;
    ensure!(!first.wait(Duration::from_secs(20))?.status.success());
    world.proxy.set(Behaviour::Pass);
    assert_eq!(second.wait(wait::DEADLINE)?.success()?.stdout, "second ran\n");
    Ok(())
}

/// Names of the layers in node1's store.
fn layers(world: &World) -> BTreeSet<PathBuf> {
    let directory = world.bed.cluster.nodes()[0].private("/var/lib/pyxis").join("layers/sha256");
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// A new image of the registry behind the proxy, whose name and layers nobody else has.
fn image_of_its_own(world: &World) -> Result<(String, String)> {
    let image = world.new_image(1 << 20)?;
    Ok((format!("--container-image={}/library/{image}", world.proxy.host()), image))
}

fn collector(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let (image, _) = image_of_its_own(world)?;
    sh(world, &[&name, &image, "--container-writable"], "echo kept >/root/file")?;
    gc(world, &["--all"])?;
    let before = layers(world);
    ensure!(!before.is_empty());
    // Without the registry.
    world.proxy.set(Behaviour::HangUpAfter(0));
    let result = sh(world, &[&name], "cat /root/file; wc -c </payload");
    world.proxy.set(Behaviour::Pass);
    assert_eq!(result?.stdout, format!("kept\n{}\n", 1 << 20));
    fs::remove_dir_all(directory(world, 0).join(name.replace("--container-name=", "pyxis_")))?;
    gc(world, &["--all"])?;
    ensure!(layers(world).len() < before.len(), "a container that is gone keeps its layers");
    Ok(())
}

fn lost_layers(world: &mut World) -> Result<()> {
    let name = option(&new_name(), "");
    let (image, _) = image_of_its_own(world)?;
    let before = layers(world);
    sh(world, &[&name, &image, "--container-writable"], "echo kept >/root/file")?;
    let own: Vec<_> = layers(world).difference(&before).cloned().collect();
    ensure!(!own.is_empty());
    let lose = || own.iter().try_for_each(fs::remove_file);
    lose()?;
    let output = sh(world, &[&name], "cat /root/file; wc -c </payload")?;
    assert_eq!((output.stdout, output.stderr.as_str()), (format!("kept\n{}\n", 1 << 20), ""));
    // They cannot be had.
    lose()?;
    world.proxy.set(Behaviour::HangUpAfter(0));
    let full = name.replace("--container-name=", "pyxis_");
    let result = world.refused(&["-w", "node1", &name], &format!("\"pyxis remove {full}\" removes the container"));
    world.proxy.set(Behaviour::Pass);
    ensure!(result?.contains("are no longer in the store and cannot be had again"));
    assert_eq!(sh(world, &[&name], "cat /root/file")?.stdout, "kept\n");
    Ok(())
}

fn deleted_by_user(world: &mut World) -> Result<()> {
    let name = new_name();
    let path = format!("/var/lib/pyxis/containers/{}/pyxis_{name}", world.user(0).uid);
    let script = "mkdir -p /root/closed/a; touch /root/closed/a/b; chmod 0 /root/closed; rm /etc/motd; mv /bin /bin2; ln -s /x /root/l";
    sh(world, &[&option(&name, ""), IMAGE, "--container-writable"], script)?;
    // Nobody else may even look.
    let output = process::run(&mut world.bed.cluster.command(1, "srun", ["-w", "node1", "ls", &path]), wait::DEADLINE)?;
    ensure!(output.stderr.contains("Permission denied"), "{output}");
    let remove = format!(
        "ls {path}; chmod -R u+rwx {path} 2>/dev/null; rm -rf {path}; ls -a $(dirname {path}) | grep -c {name}"
    );
    let output = world.srun(&["-w", "node1", "sh", "-c", &remove])?;
    assert_eq!(output.stdout, "record\nupper\nwork\n0\n", "{output}");
    world.refused(&["-w", "node1", &option(&name, "")], "does not exist")?;
    sh(world, &[&option(&name, ":create"), IMAGE], "ls /bin/sh").map(drop)
}

fn forged(world: &mut World) -> Result<()> {
    let (name, mine) = (new_name(), new_name());
    sh(world, &[&option(&name, ""), IMAGE], "true")?;
    let base = format!("/var/lib/pyxis/containers/{}", world.user(0).uid);
    let script = format!(
        "cd {base}; mkdir -p pyxis_{mine}/upper pyxis_{mine}/work; cp pyxis_{name}/record pyxis_{mine}/record; \
         ln pyxis_{name}/record pyxis_{mine}/link; rm pyxis_{mine}/link 2>/dev/null; \
         echo x >>pyxis_{name}/record; setfattr -n trusted.pyxis -v 1 pyxis_{mine}/record; ls pyxis_{mine}"
    );
    let output = world.srun(&["-w", "node1", "sh", "-c", &script])?;
    ensure!(output.stdout.contains("record") && output.stderr.contains("Permission denied"), "{output}");
    world.refused(&["-w", "node1", &option(&mine, "")], "does not exist")?;
    // A link in the place of the upper layer leads nowhere.
    let script = format!("cd {base}/pyxis_{name}; mv upper real; ln -s /var/lib/pyxis/containers/0/x upper");
    world.srun(&["-w", "node1", "sh", "-c", &script])?.success()?;
    world.refused(&["-w", "node1", &option(&name, "")], "cannot start container")?;
    let script = format!("cd {base}/pyxis_{name}; rm upper; mv real upper");
    world.srun(&["-w", "node1", "sh", "-c", &script])?.success()?;
    sh(world, &[&option(&name, "")], "true").map(drop)
}

/// C048, C124.
fn job_scope(world: &mut World) -> Result<()> {
    let plain = world.bed.pyxis.plugstack.clone();
    let scoped = site_line(world)? + " container_scope=job\n";
    world.bed.cluster.set_plugstack(&scoped)?;
    restart_slurmd(world)?;
    let result = scoped_jobs(world);
    world.end_all_jobs();
    let idle = world.bed.cluster.wait_until_idle();
    world.bed.cluster.set_plugstack(&plain)?;
    restart_slurmd(world)?;
    result?;
    idle
}

/// slurmd looks only at its start which hooks there are.
fn restart_slurmd(world: &mut World) -> Result<()> {
    world.bed.cluster.wait_until_idle()?;
    let node = &mut world.bed.cluster.nodes_mut()[0];
    node.stop_slurmd();
    node.start_slurmd(&world.bed.site)?;
    wait::until("node1 to take steps again", wait::DEADLINE, || {
        world.bed.cluster.srun(["-w", "node1", "--immediate=1", "true"]).ok()?.success().ok()
    })
    .map(drop)
}

/// The line of the installed plugstack file.
fn site_line(world: &World) -> Result<String> {
    let include = world.bed.pyxis.plugstack.trim().trim_start_matches("include ").replace('*', "pyxis.conf");
    let text = fs::read_to_string(&include).context(include)?;
    let line = text.lines().find(|line| line.starts_with("required")).context("no line")?;
    Ok(line.to_owned())
}

fn scoped_jobs(world: &World) -> Result<()> {
    let name = new_name();
    let global = names(world, 0);
    let option = option(&name, "");
    let other = start(world, &[&option, IMAGE, "--container-writable"], "echo other >/root/whose; echo $SLURM_JOB_ID")?;
    let id = other.stdout().lines().next().context("no job")?.to_owned();
    let hostile = "mkdir -p /root/a/b; touch /root/a/b/c; chmod 0 /root/a/b; ln -s /etc /root/etc";
    let fifo = world.make_directory(0, "work")?.join("fifo");
    let fifo = fifo.display();
    let script = format!(
        "srun {option} {IMAGE} --container-writable sh -c 'cat /root/whose; echo mine >/root/whose; {hostile}'; \
         srun {option} cat /root/whose; \
         rm -f {fifo}; mkfifo {fifo}; srun --overlap {IMAGE} sh -c 'echo $SLURM_STEP_ID; exec sleep 1000' >{fifo} & \
         read id <{fifo}; srun --overlap --container-name=$SLURM_JOB_ID.$id:exec echo attached; \
         scancel $SLURM_JOB_ID.$id; wait"
    );
    let arguments = ["-w", "node1", "--quiet", "--overcommit", "sh", "-c", &script];
    let output = process::run(&mut world.bed.cluster.command(0, "salloc", arguments), wait::DEADLINE)?;
    assert_eq!(output.stdout, "mine\nattached\n", "{output}");
    let kept: BTreeSet<_> = global.iter().cloned().chain([format!("pyxis_{id}_{name}")]).collect();
    wait::until("the end of the job's containers", wait::DEADLINE, || (names(world, 0) == kept).then_some(()))
        .with_context(|| format!("{:?}", names(world, 0)))?;
    // The other job's is untouched.
    end(other)?;
    wait::until("the end of the other one's", wait::DEADLINE, || (names(world, 0) == global).then_some(()))
}

/// Somebody else could change what root makes there.
fn broken_path(world: &mut World) -> Result<()> {
    let tmpfs = "/var/lib/pyxis/no-uppers";
    let node = &world.bed.cluster.nodes()[0];
    let path = node.private("/var/lib/pyxis").join("no-uppers");
    fs::create_dir_all(&path)?;
    std::os::unix::fs::chown(&path, Some(world.user(0).uid), None)?;
    let configuration = format!("[container]\npath = \"{tmpfs}\"\n{}", world.configuration());
    world.bed.pyxis.configure(&configuration)?;
    let name = option(&new_name(), "");
    let result = world.refused(&["-w", "node1", &name, IMAGE], "it is not root's alone");
    world.bed.pyxis.configure(&world.configuration())?;
    fs::remove_dir_all(&path)?;
    result.map(drop)
}

/// What a site has when it changes over, and what `pyxis create --name pyxis_NAME` makes.
fn tree_of_enroot(world: &mut World) -> Result<()> {
    let name = new_name();
    let data = world.make_directory(0, ".local/share/enroot")?;
    let tree = data.join(format!("pyxis_{name}"));
    images::busybox_tree(&tree)?;
    let owner = format!("{}:{}", world.user(0).uid, world.user(0).gid);
    process::output_of(Command::new("chown").args(["-R", &owner]).arg(&tree))?;
    let auto = option(&name, "");
    world.refused(&["-w", "node1", &option(&name, ":create"), IMAGE], "the container already exists")?;
    world.refused(&["-w", "node1", &option(&name, ":exec")], "the container is not running")?;
    let written = sh(world, &[&auto, "--container-writable"], "echo x >/root/file; stat -c %u /bin/busybox; id -u")?;
    let uid = world.user(0).uid;
    assert_eq!((written.stdout, written.stderr.as_str()), (format!("{uid}\n{uid}\n"), ""));
    assert_eq!(fs::read_to_string(tree.join("root/file"))?, "x\n");
    // Its flags are the same as of any other.
    let first = start(world, &[&auto, "--container-remap-root"], "mount -t tmpfs none /root; touch /root/first")?;
    assert_eq!(
        sh(world, &[&option(&name, ":exec")], "ls /root; touch /x 2>/dev/null || echo read-only")?.stdout,
        "first\nread-only\n"
    );
    let second = sh(world, &[&option(&name, ":no_exec")], "ls /root")?;
    ensure!(second.stdout.starts_with("file\n"), "{second}");
    end(first)?;
    // Others do not see it.
    let output =
        process::run(&mut world.bed.cluster.command(1, "srun", ["-w", "node1", &auto, "true"]), wait::DEADLINE)?;
    ensure!(output.stderr.contains("does not exist"), "{output}");
    fs::remove_dir_all(&tree)?;
    world.refused(&["-w", "node1", &auto], "does not exist").map(drop)
}
