//! Options: registered everywhere, judged before anything is submitted.

use anyhow::{Result, ensure};
use testbed::process;

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("help_lists_all", help_lists_all),
    ("judged_on_submission", judged_on_submission),
    ("repeated_and_opposite_ones", repeated_and_opposite_ones),
    ("without_image_are_ignored_aloud", without_image),
    ("from_the_environment", from_the_environment),
    ("workdir", workdir),
    ("writable_and_readonly", writable_and_readonly),
    ("mount_home", mount_home),
];

const NAMES: [&str; 18] = [
    "container-image",
    "container-mounts",
    "container-workdir",
    "container-name",
    "container-save",
    "container-mount-home",
    "no-container-mount-home",
    "container-remap-root",
    "no-container-remap-root",
    "container-entrypoint",
    "no-container-entrypoint",
    "container-entrypoint-log",
    "container-writable",
    "container-readonly",
    "container-env",
    "container-unshare",
    "container-device",
    "container-pull",
];

fn help_lists_all(world: &mut World) -> Result<()> {
    for program in ["srun", "sbatch", "salloc"] {
        let help = process::output_of(&mut world.bed.cluster.command(0, program, ["--help"]))?;
        for name in NAMES {
            let listed = help.lines().any(|line| {
                let option = line.trim_start().strip_prefix("--").unwrap_or_default();
                option.split(['=', ' ']).next() == Some(name)
            });
            ensure!(listed, "{program} --help does not list --{name}:\n{help}");
        }
        ensure!(help.matches("[pyxis]").count() == NAMES.len(), "{help}");
    }
    Ok(())
}

/// The exact complaint, from the command itself and in no time: nothing was submitted.
fn judged_on_submission(world: &mut World) -> Result<()> {
    for (option, text) in [
        ("--container-image=", "--container-image: argument required"),
        ("--container-image=Foo/Bar", "--container-image: "),
        ("--container-image=ubuntu@sha256:abcd", "--container-image: "),
        ("--container-mounts=", "--container-mounts: argument required"),
        ("--container-mounts=:", "--container-mounts: invalid format: :"),
        ("--container-mounts=/tmp:", "--container-mounts: invalid format: /tmp:"),
        ("--container-mounts=/a:/b,", "--container-mounts: invalid format: "),
        (
            "--container-mounts=devpts:/x",
            "mount source must be a relative path, an absolute path, \"tmpfs\" or \"umount\"",
        ),
        ("--container-mounts=/tmp:x", "mount target must be a relative path or an absolute path"),
        ("--container-workdir=", "--container-workdir: argument required"),
        ("--container-env=", "--container-env: argument required"),
        ("--container-env=A,", "--container-env: invalid format: A,"),
        ("--container-name=:exec", "--container-name: empty name"),
        ("--container-name=a:b", "--container-name: flag must be \"auto\", \"create\", \"exec\" or \"no_exec\""),
        ("--container-save=/tmp/", "--container-save: target is a directory"),
        ("--container-unshare=foo", "--container-unshare: unknown namespace 'foo'"),
        ("--container-unshare=net,", "--container-unshare: empty namespace argument"),
    ] {
        let others: &[&str] = if option.starts_with("--container-image") { &[] } else { &[IMAGE] };
        let error = world.refused(&[others, &[option]].concat(), &format!("pyxis: {text}"))?;
        ensure!(!error.contains("slurmstepd"), "judged on the node: {error}");
    }
    let garbage = format!("--container-image={}", "\u{1}x\u{7f}".repeat(700));
    world.refused(&[&garbage], "--container-image")?;
    Ok(())
}

fn repeated_and_opposite_ones(world: &mut World) -> Result<()> {
    world.refused(&[IMAGE, "--container-image=debian"], "pyxis: --container-image specified multiple times")?;
    world.refused(
        &[IMAGE, "--container-workdir=/a", "--container-workdir=/b"],
        "pyxis: --container-workdir specified multiple times",
    )?;
    for (one, other) in [
        ("--container-mount-home", "--no-container-mount-home"),
        ("--container-remap-root", "--no-container-remap-root"),
        ("--container-writable", "--container-readonly"),
    ] {
        world.refused(&[IMAGE, other, one], &format!("pyxis: both {one} and {other} were specified"))?;
    }
    assert_eq!(world.sh(&[IMAGE, IMAGE, "--container-workdir=/tmp", "--container-workdir=/tmp"], "pwd")?, "/tmp");
    Ok(())
}

fn without_image(world: &mut World) -> Result<()> {
    let output = world.srun(&[
        "--container-workdir=/tmp",
        "--container-mounts=/tmp:/x",
        "--container-remap-root",
        "--container-writable",
        "sh",
        "-c",
        "id -u",
    ])?;
    let output = output.success()?;
    assert_eq!(output.stdout.trim(), world.user(0).uid.to_string());
    for name in ["--container-workdir", "--container-mounts", "--[no-]container-remap-root", "--container-writable"] {
        let line = format!("pyxis: ignoring {name} because neither --container-image nor --container-name is set");
        ensure!(output.stderr.contains(&line), "no \"{line}\": {output}");
    }
    Ok(())
}

/// `PYXIS_CONTAINER_*` stand for options; the command line wins.
fn from_the_environment(world: &mut World) -> Result<()> {
    let run = |variables: &[(&str, &str)], options: &[&str], script: &str| {
        let arguments = [options, &["sh", "-c", script]].concat();
        let mut command = world.bed.cluster.command(0, "srun", arguments);
        command.envs(variables.iter().copied());
        process::run(&mut command, testbed::wait::DEADLINE)?.success()
    };
    let image = ("PYXIS_CONTAINER_IMAGE", "alpine");
    let here = run(&[image, ("PYXIS_CONTAINER_WORKDIR", "/etc")], &[], ". ./os-release; echo $ID; pwd")?;
    assert_eq!(here.stdout, "busybox\n/etc\n");
    assert_eq!(
        run(&[image, ("PYXIS_CONTAINER_WORKDIR", "/etc")], &["--container-workdir=/usr"], "pwd")?.stdout,
        "/usr\n"
    );
    assert_eq!(run(&[image, ("PYXIS_CONTAINER_REMAP_ROOT", "1")], &[], "id -u")?.stdout, "0\n");
    assert_eq!(run(&[image, ("PYXIS_CONTAINER_WRITABLE", "yes")], &[], "echo x >/x && cat /x")?.stdout, "x\n");
    assert_eq!(
        run(&[image, ("PYXIS_CONTAINER_MOUNTS", "/usr/bin:/host")], &[], "ls /host/srun")?.stdout,
        "/host/srun\n"
    );
    let garbage = run(&[image, ("PYXIS_CONTAINER_REMAP_ROOT", "perhaps")], &[], "id -u")?;
    assert_eq!(garbage.stdout.trim(), world.user(0).uid.to_string());
    Ok(())
}

fn workdir(world: &mut World) -> Result<()> {
    assert_eq!(world.sh(&[], "pwd; echo $PWD")?, "/\n/");
    assert_eq!(world.sh(&["--container-workdir=/usr/bin"], "pwd; echo $PWD")?, "/usr/bin\n/usr/bin");
    assert_eq!(world.sh(&["--container-workdir=../"], "pwd")?, "/");
    assert_eq!(world.sh(&["--container-workdir=usr"], "pwd")?, "/usr");
    world.refused(
        &[IMAGE, "--container-workdir=/pyxis"],
        "pyxis: couldn't chdir to /pyxis: No such file or directory",
    )?;
    Ok(())
}

fn writable_and_readonly(world: &mut World) -> Result<()> {
    let write = "touch /new 2>&1 && echo written; touch /tmp/x && echo tmp";
    for readonly in [&[][..], &["--container-readonly"]] {
        let text = world.sh(readonly, write)?;
        ensure!(text.contains("Read-only file system") && text.ends_with("tmp"), "{text}");
    }
    assert_eq!(world.sh(&["--container-writable"], write)?, "written\ntmp");
    // Changes are the step's, not the image's.
    assert_eq!(
        world.sh(&["--container-writable"], "ls /new 2>/dev/null; rm /etc/os-release && echo removed")?,
        "removed"
    );
    assert_eq!(world.sh(&[], "ls /etc/os-release")?, "/etc/os-release");
    Ok(())
}

fn mount_home(world: &mut World) -> Result<()> {
    let home = world.user(0).home.clone();
    let file = home.join("work/at-home");
    process::output_of(world.as_user(0, "touch").arg(&file))?;
    let here = home.display().to_string();
    for absent in [&[][..], &["--no-container-mount-home"]] {
        assert_eq!(world.sh(absent, &format!("ls {} 2>/dev/null; true", file.display()))?, "");
    }
    let mounted = world.sh(&["--container-mount-home"], "ls ~/work/at-home; echo $HOME; touch ~/work/new")?;
    assert_eq!(mounted, format!("{}\n{here}", file.display()));
    ensure!(home.join("work/new").exists());
    let remapped = world.sh(&["--container-mount-home", "--container-remap-root"], "ls ~/work/at-home; echo $HOME")?;
    assert_eq!(remapped, "/root/work/at-home\n/root");
    // HOME says which directory that is.
    for (options, target) in
        [(&["--container-remap-root"][..], "/root"), (&[], &*home.join("work").display().to_string())]
    {
        let arguments = [&[IMAGE, "--container-mount-home"], options, &["sh", "-c", "ls ~; echo $HOME"]].concat();
        let mut command = world.bed.cluster.command(0, "srun", arguments);
        let output = process::run(command.env("HOME", home.join("work")), testbed::wait::DEADLINE)?.success()?;
        ensure!(output.stdout.contains("at-home\n") && output.stdout.ends_with(&format!("\n{target}\n")), "{output}");
    }
    std::fs::remove_file(home.join("work/new"))?;
    std::fs::remove_file(file)?;
    Ok(())
}
