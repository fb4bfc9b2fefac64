//! Images of every kind start: without what most have, with links where most have directories, with odd modes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::image::{Compression, ImageBuilder};
use testbed::images;

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("ancient", ancient),
    ("directories_that_are_links", links),
    ("links_to_nowhere", dangling),
    ("etc_elsewhere", etc_elsewhere),
    ("programs_behind_absolute_links", merged_usr),
    ("files_where_names_are_kept", odd_names),
    ("directories_nobody_may_write", odd_modes),
    ("no_shell_and_no_names", no_shell),
    ("nothing_at_all", empty),
];

/// Runs a script in the small system in which `change` was made, as the user and as root, read-only and writable: all say
/// the same.
fn run(
    world: &mut World,
    name: &'static str,
    change: impl FnOnce(&Path) -> Result<()>,
    script: &str,
) -> Result<String> {
    world.have(name, |layout| {
        let tree = layout.join("tree");
        images::busybox_tree(&tree)?;
        change(&tree)?;
        ImageBuilder::new(&layout)?
            .config("Env", json!([images::IMAGE_PATH]))
            .layer_from_tree(&tree, Compression::Gzip)?
            .finish("latest")
    })?;
    let image = format!("--container-image={name}");
    let seen = world.sh(&[&image], script)?;
    for options in [&["--container-remap-root"][..], &["--container-writable"], &["--container-mount-home"]] {
        let other = world.sh(&[&[image.as_str()], options].concat(), script)?;
        ensure!(other == seen, "{name}, {options:?}: {other}\nelse: {seen}");
    }
    Ok(seen)
}

fn remove(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(kind) if kind.is_dir() => Ok(fs::remove_dir_all(path)?),
        Ok(_) => Ok(fs::remove_file(path)?),
        Err(_) => Ok(()),
    }
}

/// What every container has to offer, whatever the image has.
const WORKS: &str = "set -e
    [ -r /proc/self/stat ] && [ -d /sys/kernel ] && echo x >/dev/null
    for d in /tmp /var/run /var/lock; do echo kept >$d/file && cat $d/file && rm $d/file; done | uniq
    grep -c ^root: /etc/passwd; id -un >/dev/null; [ -s /etc/resolv.conf ] && [ -s /etc/hosts ] && echo works";

/// Before there were `/proc`, `/sys`, `/run` and a populated `/var` in every image.
fn ancient(world: &mut World) -> Result<()> {
    let change = |tree: &Path| {
        for gone in ["tmp", "var", "root", "usr/local", "etc/os-release", "etc/group"] {
            remove(&tree.join(gone))?;
        }
        // And `/var/run` a directory with something in it.
        fs::create_dir_all(tree.join("var/run"))?;
        Ok(fs::write(tree.join("var/run/utmp"), "")?)
    };
    assert_eq!(run(world, "ancient", change, &format!("{WORKS}; ls /var/run"))?, "kept\n1\nworks");
    Ok(())
}

fn links(world: &mut World) -> Result<()> {
    let change = |tree: &Path| {
        remove(&tree.join("tmp"))?;
        for directory in ["run/lock", "var/tmp", "usr/lib/shared"] {
            fs::create_dir_all(tree.join(directory))?;
        }
        for (link, target) in [
            ("tmp", "var/tmp"),
            ("var/run", "/run"),
            ("var/lock", "../run/lock"),
            ("dev", "/usr/lib/shared"),
            ("home", "../../../var"),
        ] {
            symlink(target, tree.join(link))?;
        }
        Ok(())
    };
    assert_eq!(run(world, "links", change, &format!("{WORKS}; readlink /tmp"))?, "kept\n1\nworks\nvar/tmp");
    Ok(())
}

/// What they point to is made.
fn dangling(world: &mut World) -> Result<()> {
    let change = |tree: &Path| {
        for (link, target) in [
            ("tmp", "/private/tmp"),
            ("var/run", "/run"),
            ("var/lock", "/run/lock"),
            ("sys", "../../../system/sys"),
            ("root", "/users/root"),
            ("home", "/users"),
            ("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf"),
            ("etc/hosts", "/private/etc/hosts"),
            ("etc/passwd", "/private/etc/passwd"),
            ("etc/group", "../private/etc/group"),
            ("etc/localtime", "/nowhere/localtime"),
        ] {
            remove(&tree.join(link))?;
            symlink(target, tree.join(link))?;
        }
        Ok(())
    };
    let script =
        format!("{WORKS}; ls -d /private/tmp /system/sys; grep -c : /private/etc/group >/dev/null && echo group");
    assert_eq!(run(world, "dangling", change, &script)?, "kept\n1\nworks\n/private/tmp\n/system/sys\ngroup");
    Ok(())
}

/// As where the system's files are immutable and the configuration lies beside them.
fn etc_elsewhere(world: &mut World) -> Result<()> {
    for (name, target) in [("etc-absolute", "/usr/etc"), ("etc-relative", "../../usr/etc"), ("etc-missing", "/opt/etc")]
    {
        let change = |tree: &Path| {
            let etc = tree.join("etc");
            match name {
                "etc-missing" => remove(&etc)?,
                _ => fs::rename(&etc, tree.join("usr/etc"))?,
            }
            Ok(symlink(target, etc)?)
        };
        assert_eq!(run(world, name, change, WORKS)?, "kept\n1\nworks", "{name}");
    }
    Ok(())
}

fn merged_usr(world: &mut World) -> Result<()> {
    let change = |tree: &Path| {
        for file in fs::read_dir(tree.join("bin"))? {
            let file = file?;
            let _ = fs::remove_file(tree.join("usr/bin").join(file.file_name()));
            fs::rename(file.path(), tree.join("usr/bin").join(file.file_name()))?;
        }
        fs::remove_dir(tree.join("bin"))?;
        Ok(symlink("/usr/bin", tree.join("bin"))?)
    };
    assert_eq!(
        run(world, "merged", change, &format!("{WORKS}; /bin/sh -c 'readlink /bin'"))?,
        "kept\n1\nworks\n/usr/bin"
    );
    Ok(())
}

/// Programs that look for names there will complain; others run.
fn odd_names(world: &mut World) -> Result<()> {
    let change = |tree: &Path| {
        for name in ["passwd", "group", "hosts", "resolv.conf", "hostname", "localtime"] {
            remove(&tree.join("etc").join(name))?;
            fs::create_dir_all(tree.join("etc").join(name).join("below"))?;
        }
        Ok(())
    };
    assert_eq!(run(world, "odd-names", change, "ls -d /etc/passwd/below; echo $USER >/dev/null")?, "/etc/passwd/below");
    let change = |tree: &Path| {
        for (name, target) in [("passwd", "group"), ("group", "passwd"), ("localtime", "localtime")] {
            remove(&tree.join("etc").join(name))?;
            symlink(target, tree.join("etc").join(name))?;
        }
        Ok(())
    };
    assert_eq!(run(world, "circular-names", change, "cat /etc/passwd 2>&1; echo runs")?.lines().last(), Some("runs"));
    Ok(())
}

fn odd_modes(world: &mut World) -> Result<()> {
    let change = |tree: &Path| {
        fs::create_dir_all(tree.join("closed/below"))?;
        for (path, mode) in [("closed", 0), ("etc/passwd", 0o400), ("etc", 0o555), ("var", 0o500), ("", 0o555)] {
            fs::set_permissions(tree.join(path), fs::Permissions::from_mode(mode))?;
        }
        Ok(())
    };
    assert_eq!(run(world, "odd-modes", change, WORKS)?, "kept\n1\nworks");
    Ok(())
}

/// One static program and not even a place for it in `PATH`, with all that mounts and joins.
fn no_shell(world: &mut World) -> Result<()> {
    world.have("distroless", |layout| images::distroless(&layout))?;
    let work = world.make_directory(0, "work/no-shell")?;
    let mounts = format!("--container-mounts={}:/data/in/depth", work.display());
    let image = "--container-image=distroless";
    let options = ["--container-mount-home", "--container-writable", "--container-workdir=/data", &mounts];
    let command = ["/busybox", "touch", "in/depth/made"];
    world.srun(&[&[image, "-n2", "-N1"], &options[..], &command].concat())?.success()?;
    ensure!(work.join("made").exists());
    fs::remove_file(work.join("made"))?;
    let output =
        world.srun(&[image, "--container-unshare=ipc,uts,net", "/busybox", "cat", "/etc/passwd"])?.success()?;
    ensure!(output.stdout.contains(&format!("{}:x:", world.user(0).name)), "{output}");
    Ok(())
}

/// An empty image has nothing to run; that is all that fails.
fn empty(world: &mut World) -> Result<()> {
    world.have("empty", |layout| {
        let tree = layout.join("tree");
        fs::create_dir_all(&tree)?;
        ImageBuilder::new(&layout)?.layer_from_tree(&tree, Compression::Gzip)?.finish("latest")
    })?;
    let output = world.srun(&["--container-image=empty", "/bin/true"])?;
    ensure!(!output.status.success() && output.stderr.contains("No such file or directory"), "{output}");
    ensure!(!output.stderr.contains("pyxis: container start failed"), "{output}");
    let program =
        ["--container-image=empty", "--container-mounts=/bin/busybox:/opt/bin/sh", "/opt/bin/sh", "-c", "ls /"];
    let output = world.srun(&program)?.success()?;
    assert_eq!(output.stdout.lines().filter(|line| *line == "opt").count(), 1, "{output}");
    world.nodes_work()
}
