//! A site's own importer: what it is told, what becomes of its file, and what users read when it fails.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::{images, process, wait};

use crate::Case;
use crate::lifecycle;
use crate::named;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("gets_the_image", gets_the_image),
    ("is_not_asked_for_files", not_for_files),
    ("keeps_a_file_that_is_in_use", in_use),
    ("is_told_when_slurmstepd_was_killed", killed_manager),
    ("that_fails", that_fails),
    ("is_ended_with_the_job", cancelled),
];

/// Notes how it was called, in a file of its user's, and makes the file of the step from one that is there.
const WELL_BEHAVED: &str = r#"#!/bin/sh
log=$HOME/work/importer.log
file=$PYXIS_RUNTIME_PATH/$SLURM_JOB_UID/$SLURM_JOB_ID.$SLURM_STEP_ID.image
case $1 in
get)
    { echo "get $2 $(id -u)"; env | grep -E '^(PYXIS_|SLURM_(JOB_[UG]ID|STEP_ID|PROCID)|ENROOT_|LD_PRELOAD|MINE)' | sort; } >>$log
    [ "$(stat -c '%a %u' $PYXIS_RUNTIME_PATH/$SLURM_JOB_UID)" = "700 $(id -u)" ] || exit 9
    read line && exit 8
    cp $HOME/work/image $file && echo $file && echo ignored;;
release) echo "release $(id -u) $(test -e $file && echo removed)" >>$log; rm -f $file;;
esac
"#;

/// Writes the importer and tells the plugin of it, for as long as `test` runs.
fn with_importer(world: &mut World, script: &str, test: impl FnOnce(&World, &Path) -> Result<()>) -> Result<()> {
    let path = world.bed.site.write("etc/importer", script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    let line = world.bed.pyxis.plugstack.clone();
    let included = line.trim().strip_prefix("include ").context("plugstack.conf includes our line")?;
    let directory = Path::new(included).parent().context("a directory")?;
    let loaded = fs::read_to_string(directory.join("pyxis.conf"))?;
    world.bed.cluster.set_plugstack(&format!("{} importer={}\n", loaded.trim_end(), path.display()))?;
    let result = test(world, &path);
    world.bed.cluster.set_plugstack(&line)?;
    result
}

/// An archive of the small image, which the importer hands out, in the home directory of user 0.
fn image(world: &World) -> Result<PathBuf> {
    let work = world.make_directory(0, "work")?;
    let (layout, image) = (world.directory("importer")?, work.join("image"));
    if !image.exists() {
        let _ = fs::remove_dir_all(&layout);
        let from = images::busybox(&layout)?;
        let to = format!("docker-archive:{}:x:1", image.display());
        process::output_of(Command::new("skopeo").args(["copy", "--quiet", "--insecure-policy", &from, &to]))?;
        world.user(0).own(&image)?;
    }
    Ok(image)
}

/// What the importer has noted, which it then forgets.
fn log(world: &World) -> Result<Vec<String>> {
    let path = world.user(0).home.join("work/importer.log");
    let text = fs::read_to_string(&path).unwrap_or_default();
    let _ = fs::remove_file(path);
    Ok(text.lines().map(str::to_owned).collect())
}

fn gets_the_image(world: &mut World) -> Result<()> {
    image(world)?;
    log(world)?;
    with_importer(world, WELL_BEHAVED, |world, _| {
        let uid = world.user(0).uid;
        let options = ["--export=ALL,MINE=1,LD_PRELOAD=/x,ENROOT_DATA_PATH=/x", "--container-writable"];
        // The name is its business alone: no registry has such an image.
        let image = "--container-image=nowhere.invalid/any/name:1";
        let output = world.srun(&[&options[..], &[image, "cat", "/etc/os-release"]].concat())?.success()?;
        ensure!(output.stdout.starts_with("ID=busybox\n"), "{output}");
        let name = "nowhere.invalid/any/name:1";
        let told = format!("pyxis: importing docker image: {name}\npyxis: imported docker image: {name}\n");
        assert_eq!(output.stderr, told);
        let log = log(world)?;
        let job = log.iter().find_map(|line| line.strip_prefix("SLURM_STEP_ID=")).context("a step")?;
        assert_eq!(job, "0");
        let expected = [
            format!("get docker://{name} {uid}"),
            "ENROOT_ROOTFS_WRITABLE=y".into(),
            "MINE=1".into(),
            "PYXIS_RUNTIME_PATH=/run/pyxis".into(),
            format!("PYXIS_VERSION={}", env!("CARGO_PKG_VERSION")),
            format!("SLURM_JOB_GID={}", world.user(0).gid),
            format!("SLURM_JOB_UID={uid}"),
            "SLURM_STEP_ID=0".into(),
            // Once when the image is in the store, once at the end of the step.
            format!("release {uid} removed"),
            format!("release {uid} "),
        ];
        assert_eq!(log, expected);

        for typed in ["docker://alpine", "dockerd://alpine:1"] {
            world.srun(&["-n2", &format!("--container-image={typed}"), "true"])?.success()?;
            let asked: Vec<String> = self::log(world)?.into_iter().filter(|line| line.starts_with("get ")).collect();
            assert_eq!(asked, [format!("get {typed} {uid}")]);
        }
        Ok(())
    })
}

/// Runs `test` with an importer that hands out a squashfs file, which is run by `mode`.
fn with_squashfs(world: &mut World, mode: &str, test: impl FnOnce(&World) -> Result<()>) -> Result<()> {
    let work = world.make_directory(0, "work")?;
    let (tree, image) = (world.directory("importer-squashfs")?.join("tree"), work.join("image"));
    if !tree.exists() {
        images::busybox_tree(&tree)?;
    }
    let _ = fs::remove_file(&image);
    process::output_of(Command::new("mksquashfs").arg(&tree).arg(&image).args(["-quiet", "-no-progress"]))?;
    world.user(0).own(&image)?;
    log(world)?;
    let usual = world.configuration();
    world.bed.pyxis.configure(&format!("{usual}[squashfs]\nmode = \"{mode}\"\n"))?;
    let result = with_importer(world, WELL_BEHAVED, |world, _| test(world));
    world.bed.pyxis.configure(&usual)?;
    fs::remove_file(&image)?;
    log(world)?;
    result.with_context(|| format!("mode {mode}"))
}

/// How often `release` was called until now.
fn releases(world: &World) -> usize {
    let log = fs::read_to_string(world.user(0).home.join("work/importer.log")).unwrap_or_default();
    log.lines().filter(|line| line.starts_with("release ")).count()
}

/// A container that runs from the file itself has it to the end; one that was made from it does not need it.
fn in_use(world: &mut World) -> Result<()> {
    for (mode, during) in [("fuse", 0), ("kernel", 0), ("convert", 1)] {
        with_squashfs(world, mode, |world| {
            let step = named::start(world, &["-n2", "--container-image=any/name"], "cat /etc/os-release")?;
            assert_eq!(releases(world), during);
            named::end(step)?;
            wait::until("the last release", wait::DEADLINE, || (releases(world) == during + 1).then_some(()))?;
            // The step's own, and nobody else's: whoever waits for a step that was killed has gone.
            let watching = || world.bed.cluster.nodes()[0].processes();
            let gone = || watching().iter().all(|process| !process.command.starts_with("pyxis-release")).then_some(());
            wait::until("the end of pyxis-release", wait::DEADLINE, gone)?;
            assert_eq!(releases(world), during + 1);
            Ok(())
        })?;
    }
    Ok(())
}

fn killed_manager(world: &mut World) -> Result<()> {
    with_squashfs(world, "fuse", |world| {
        let step = named::start(world, &["--container-image=any/name"], "")?;
        assert_eq!(releases(world), 0);
        lifecycle::kill_stepd(world)?;
        let released = wait::until("release", wait::DEADLINE, || (releases(world) == 1).then_some(()));
        let uid = world.user(0).uid.to_string();
        world.bed.cluster.admin("scancel", ["--user", &uid])?;
        drop(step.wait(wait::DEADLINE * 2)?);
        released
    })
}

fn not_for_files(world: &mut World) -> Result<()> {
    let image = image(world)?;
    log(world)?;
    with_importer(world, WELL_BEHAVED, |world, _| {
        world.srun(&[&*format!("--container-image={}", image.display()), "true"])?.success()?;
        world.srun(&["true"])?.success()?;
        assert_eq!(log(world)?, [""; 0]);
        Ok(())
    })
}

fn that_fails(world: &mut World) -> Result<()> {
    image(world)?;
    for (script, problem) in [
        ("echo first >&2; echo second >&2; exit 3", "importer get failed with exit code 3"),
        ("echo first >&2; echo second >&2; kill -SEGV $$", "importer get terminated with signal 11"),
        ("echo first >&2; echo second >&2; echo", "importer did not return a squashfs path"),
    ] {
        log(world)?;
        let script =
            format!("#!/bin/sh\n[ $1 = release ] && {{ echo release >>$HOME/work/importer.log; exit 1; }}\n{script}\n");
        with_importer(world, &script, |world, path| {
            let error = world.refused(&["-n2", IMAGE], problem)?;
            let lines: Vec<&str> =
                error.lines().filter_map(|line| Some(line.split_once("error: pyxis: ")?.1)).collect();
            let last = format!("failed to import docker image: alpine:latest (importer: {})", path.display());
            let expected = [problem, "printing importer log file:", "    first", "    second", &*last];
            ensure!(lines.starts_with(&expected) || lines.ends_with(&expected), "{error}");
            assert_eq!(error.matches(problem).count(), 1, "{error}");
            // After the failure and at the step's end.
            wait::until("two calls of release", wait::DEADLINE, || {
                let log = fs::read_to_string(world.user(0).home.join("work/importer.log")).unwrap_or_default();
                (log == "release\nrelease\n").then_some(())
            })
        })?;
    }
    with_importer(world, "#!/bin/sh\necho /no/such/file", |world, _| {
        let error = world.refused(&[IMAGE], "failed to create container filesystem for image: alpine:latest")?;
        ensure!(error.contains("[ERROR] No such file or directory: /no/such/file"), "{error}");
        Ok(())
    })?;
    let line = world.bed.pyxis.plugstack.clone();
    with_importer(world, "#!/bin/sh\n", |world, path| {
        fs::remove_file(path)?;
        let error = world.refused(&[IMAGE], "pyxis: couldn't execute importer ")?;
        ensure!(error.contains("No such file or directory"), "{error}");
        Ok(())
    })?;
    world.bed.cluster.set_plugstack(&line)?;
    log(world)?;
    world.nodes_work()
}

fn cancelled(world: &mut World) -> Result<()> {
    log(world)?;
    let script = "#!/bin/sh\nif [ $1 = get ]; then echo get >>$HOME/work/importer.log; exec sleep 1000; fi\n\
                  echo release >>$HOME/work/importer.log\n";
    with_importer(world, script, |world, _| {
        let running = world.start(&[IMAGE, "true"])?;
        let noted = || fs::read_to_string(world.user(0).home.join("work/importer.log")).unwrap_or_default();
        wait::until("the importer", wait::DEADLINE, || noted().contains("get").then_some(()))?;
        let uid = world.user(0).uid.to_string();
        world.bed.cluster.admin("scancel", ["--user", &uid])?;
        let output = running.wait(wait::DEADLINE * 2)?;
        ensure!(!output.status.success(), "{output}");
        wait::until("release", wait::DEADLINE, || noted().contains("release").then_some(()))
    })?;
    log(world).map(drop)
}
