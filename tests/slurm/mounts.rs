//! `--container-mounts`, and what every container has mounted.

use std::fs;

use anyhow::{Result, ensure};
use testbed::process;

use crate::Case;
use crate::images::have_features;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("binds", binds),
    ("flags", flags),
    ("relative_sources_and_blanks", relative_sources_and_blanks),
    ("tmpfs_and_umount", tmpfs_and_umount),
    ("order_and_duplicates", order_and_duplicates),
    ("missing_sources", missing_sources),
    ("targets_stay_inside", targets_stay_inside),
    ("unreadable_sources_stay_unreadable", unreadable_sources),
    ("default_mounts", default_mounts),
    ("host_files", host_files),
    ("nothing_leaks_to_the_host", nothing_leaks),
];

/// Runs a script with `--container-mounts=MOUNTS` from a working directory that holds `dir/inner`, `file` and a name
/// with blanks.
fn mounted(world: &World, mounts: &str, script: &str) -> Result<String> {
    world.sh(&[&prepare(world)?, &format!("--container-mounts={mounts}")], script)
}

fn prepare(world: &World) -> Result<String> {
    let work = world.make_directory(0, "work/mounts")?;
    let script = "mkdir -p dir 'a b' && echo inner >dir/inner && echo file >file && echo blank >'a b/c d'";
    process::output_of(world.as_user(0, "sh").args(["-c", script]).current_dir(&work))?;
    Ok(format!("--chdir={}", work.display()))
}

fn work(world: &World) -> String {
    world.user(0).home.join("work/mounts").display().to_string()
}

fn binds(world: &mut World) -> Result<()> {
    let work = work(world);
    assert_eq!(mounted(world, &format!("{work}/dir:/new/place"), "cat /new/place/inner")?, "inner");
    assert_eq!(mounted(world, &format!("{work}/dir"), &format!("cat {work}/dir/inner"))?, "inner");
    assert_eq!(mounted(world, &format!("{work}/file:/etc/os-release"), "cat /etc/os-release")?, "file");
    assert_eq!(mounted(world, &format!("{work}/file:/made/here:"), "cat /made/here")?, "file");
    assert_eq!(mounted(world, "/dev/zero:/zeroes", "head -c 3 /zeroes | wc -c")?, "3");
    let both = format!("{work}/dir:/one,{work}/file:/two");
    assert_eq!(mounted(world, &both, "cat /one/inner /two; echo x >/one/written")?, "inner\nfile");
    assert_eq!(fs::read_to_string(format!("{work}/dir/written"))?, "x\n");
    Ok(())
}

fn flags(world: &mut World) -> Result<()> {
    let work = work(world);
    let text = mounted(world, &format!("{work}/dir:/d:ro"), "cat /d/inner; touch /d/x 2>&1; true")?;
    ensure!(text.starts_with("inner") && text.contains("Read-only file system"), "{text}");
    let propagation = "awk '$5 == \"/d\" { print $7 }' /proc/self/mountinfo";
    assert_eq!(mounted(world, &format!("{work}/dir:/d:unbindable+ro"), propagation)?, "unbindable");
    let options = "awk '$2 == \"/d\" { print $4 }' /proc/mounts";
    let text = mounted(world, &format!("{work}/dir:/d:nosuid+nodev+noexec"), options)?;
    for flag in ["nosuid", "nodev", "noexec"] {
        ensure!(text.contains(flag), "{text}");
    }
    let text = mounted(world, "/bin/true:/t:noexec", "/t 2>&1 || echo refused")?;
    ensure!(text.contains("refused"), "{text}");
    assert_eq!(mounted(world, &format!("{work}/dir:/forced/dir:x-create=dir"), "cat /forced/dir/inner")?, "inner");
    Ok(())
}

fn relative_sources_and_blanks(world: &mut World) -> Result<()> {
    let work = work(world);
    assert_eq!(mounted(world, "./:/here", "cat /here/file")?, "file");
    assert_eq!(mounted(world, "./dir/inner:/here", "cat /here")?, "inner");
    assert_eq!(mounted(world, "../mounts/file:/here", "cat /here")?, "file");
    assert_eq!(mounted(world, &format!("{work}/a b:/c d"), "cat '/c d/c d'")?, "blank");
    assert_eq!(mounted(world, "./a b/c d:/x\ty", "cat \"/x\ty\"")?, "blank");
    Ok(())
}

fn tmpfs_and_umount(world: &mut World) -> Result<()> {
    let kind = "stat -f -c %T /x; touch /x/y && echo ok";
    assert_eq!(mounted(world, "tmpfs:/x", kind)?, "tmpfs\nok");
    let size = "awk '$2 == \"/x\" { print $4 }' /proc/mounts | tr , '\\n' | grep size";
    assert_eq!(mounted(world, "tmpfs:/x:size=64k", size)?, "size=64k");
    let full = "head -c 100000 /dev/zero >/x/big 2>&1 || echo full";
    ensure!(mounted(world, "tmpfs:/x:size=64k", full)?.ends_with("full"));
    let work = work(world);
    let detached = format!("{work}/dir:/x,umount:/x");
    assert_eq!(mounted(world, &detached, "ls /x 2>/dev/null; grep -c ' /x ' /proc/mounts; true")?, "0");
    Ok(())
}

fn order_and_duplicates(world: &mut World) -> Result<()> {
    let work = work(world);
    let shadow = format!("{work}/dir:/x,tmpfs:/x,{work}/file:/x/file");
    assert_eq!(mounted(world, &shadow, "ls /x; cat /x/file")?, "file\nfile");
    let twice = format!("{work}/dir:/x,{work}/dir:/x");
    assert_eq!(mounted(world, &twice, "grep -c ' /x ' /proc/mounts")?, "1");
    Ok(())
}

fn missing_sources(world: &mut World) -> Result<()> {
    let work = work(world);
    let text = "pyxis: --container-mounts: source path does not exist: /pyxis/missing";
    world.refused(&[IMAGE, "--container-mounts=/pyxis/missing:/x"], text)?;
    world.refused(&[IMAGE, &format!("--container-mounts={work}:/y,/pyxis/missing:/x")], text)?;
    world.refused(&[IMAGE, "--container-mounts=./pyxis-missing:/x"], "./pyxis-missing")?;
    assert_eq!(mounted(world, "./pyxis-missing:/x:nofail", "echo alive")?, "alive");
    Ok(())
}

/// Whatever the target says, and whatever links the image holds, the host's file system is out of reach.
fn targets_stay_inside(world: &mut World) -> Result<()> {
    let error = world.refused(&[IMAGE, "--container-mounts=/tmp:../outside"], "")?;
    ensure!(error.to_lowercase().contains("cross-device link"), "{error}");
    let work = work(world);
    let through_a_link = format!("{work}/dir:/linked,{work}/file:/linked/../../../escaped");
    let error = world.refused(&[IMAGE, &format!("--container-mounts={through_a_link}")], "")?;
    ensure!(error.to_lowercase().contains("cross-device link"), "{error}");
    // A link in the image leads to a file in the image.
    have_features(world)?;
    let options = ["--container-image=features", &format!("--container-mounts={work}/file:/symlink")];
    assert_eq!(world.sh(&options, "cat /kept/file")?, "file");
    ensure!(!std::path::Path::new("/escaped").exists());
    Ok(())
}

fn unreadable_sources(world: &mut World) -> Result<()> {
    for options in [&[][..], &["--container-remap-root"]] {
        let options = [options, &["--container-mounts=/etc/shadow:/x"]].concat();
        let text = world.sh(&options, "cat /x 2>&1 || echo refused")?;
        ensure!(text.contains("Permission denied") && text.ends_with("refused"), "{text}");
    }
    // What the user cannot reach cannot be mounted.
    let hidden = world.make_directory(1, "work/hidden")?;
    process::output_of(
        world.as_user(1, "chmod").args(["700", hidden.parent().and_then(|work| work.to_str()).unwrap_or_default()]),
    )?;
    world.refused(&[IMAGE, &format!("--container-mounts={}:/x", hidden.display())], "Permission denied")?;
    Ok(())
}

/// Flags as administrators and scripts know them.
fn default_mounts(world: &mut World) -> Result<()> {
    let table = world.sh(&[], "cat /proc/self/mountinfo")?;
    let mount = |point: &str| {
        let line = table.lines().rev().find(|line| line.split(' ').nth(4) == Some(point));
        line.map(|line| {
            let (left, right) = line.split_once(" - ").unwrap_or((line, ""));
            let options: Vec<_> = left.split(' ').nth(5).unwrap_or_default().split(',').collect();
            (options, right.split(' ').next().unwrap_or_default().to_owned())
        })
    };
    for (point, kind, flags) in [
        ("/", "overlay", &["ro", "nosuid", "nodev"][..]),
        ("/proc", "proc", &["rw", "nosuid", "nodev", "noexec"]),
        ("/sys", "sysfs", &["ro", "nosuid", "nodev", "noexec"]),
        ("/dev", "", &["rw", "nosuid", "noexec"]),
        ("/tmp", "tmpfs", &["rw", "nosuid", "nodev"]),
        ("/var/run", "tmpfs", &["rw", "nosuid", "nodev"]),
        ("/var/lock", "tmpfs", &["rw", "nosuid", "nodev"]),
        ("/etc/hosts", "", &["ro", "nosuid", "nodev", "noexec"]),
        ("/etc/resolv.conf", "", &["ro", "nosuid", "nodev", "noexec"]),
    ] {
        let Some((options, file_system)) = mount(point) else { anyhow::bail!("{point} is not mounted:\n{table}") };
        ensure!(kind.is_empty() || file_system == kind, "{point} is {file_system}");
        for flag in flags {
            ensure!(options.contains(flag), "{point} is not {flag}: {options:?}");
        }
    }
    ensure!(!table.contains("erofs"), "layers show up inside:\n{table}");
    ensure!(!table.contains("/var/lib/pyxis"), "the store shows up inside:\n{table}");
    assert_eq!(world.sh(&[], "ls /tmp | wc -l; stat -c %a /tmp; touch /tmp/x && echo mine")?, "0\n755\nmine");
    assert_eq!(
        world.sh(&[], "echo x >/dev/null && head -c1 /dev/zero | wc -c && ls /proc/self/status")?,
        "1\n/proc/self/status"
    );
    Ok(())
}

fn host_files(world: &mut World) -> Result<()> {
    for file in ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname"] {
        let text = world.sh(&[], &format!("cat {file}"))?;
        assert_eq!(text.trim_end(), fs::read_to_string(file).unwrap_or_default().trim_end(), "{file}");
    }
    Ok(())
}

fn nothing_leaks(world: &mut World) -> Result<()> {
    let before = fs::read_to_string("/proc/self/mountinfo")?;
    let mount = "mkdir /tmp/m && mount -t tmpfs none /tmp/m && mount --bind /tmp/m /mnt && echo mounted";
    assert_eq!(world.sh(&["--container-remap-root", "--container-mounts=tmpfs:/mnt"], mount)?, "mounted");
    assert_eq!(fs::read_to_string("/proc/self/mountinfo")?, before);
    Ok(())
}
