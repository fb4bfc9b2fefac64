//! An existing enroot configuration of the site's and of the users': `enroot.conf`, `environ.d`, `mounts.d`, `hooks.d`.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use testbed::{process, wait};

use crate::Case;
use crate::named;
use crate::world::{IMAGE, World, sorted};

pub const CASES: &[Case] = &[
    ("settings", settings),
    ("a_job_cannot_move_the_sites_paths", paths),
    ("default_mounts_are_the_sites", default_mounts),
    ("mounts_of_site_and_user", mounts),
    ("variables_of_site_and_user", variables),
    ("hooks_see_the_step_and_change_the_container", hooks),
    ("hooks_run_once_for_all_who_join", joined),
    ("hooks_of_the_user", user_hooks),
    ("a_hook_that_fails", failing_hook),
    ("a_hook_that_hangs", hanging_hook),
    ("cancel_while_a_hook_runs", cancel_in_hook),
    ("hostile_files_of_the_user", hostile_files),
    ("broken_files_of_the_site", broken_files),
];

/// Runs `test` with these files (executable if they end in `.sh`) in the site's enroot directory.
fn with_site(world: &mut World, files: &[(&str, &str)], test: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let directory = world.bed.site.path("etc/enroot");
    let _ = fs::remove_dir_all(&directory);
    for (name, text) in files {
        write(&directory.join(name), text.as_bytes())?;
    }
    let enroot = format!("[enroot]\nsysconf_path = {directory:?}\n[hooks]\ntimeout_seconds = 3\n");
    world.bed.pyxis.configure(&(world.configuration() + &enroot))?;
    let result = test(world);
    world.bed.pyxis.configure(&world.configuration())?;
    let _ = fs::remove_dir_all(&directory);
    result
}

fn write(path: &Path, text: &[u8]) -> Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    fs::write(path, text)?;
    let mode = if path.extension().is_some_and(|extension| extension == "sh") { 0o755 } else { 0o644 };
    Ok(fs::set_permissions(path, fs::Permissions::from_mode(mode))?)
}

/// Writes a file of user 0's own enroot configuration. Gives the directory.
fn write_users(world: &World, name: &str, text: &[u8]) -> Result<PathBuf> {
    let directory = world.user(0).home.join(".config/enroot");
    let path = directory.join(name);
    write(&path, text)?;
    for path in path.ancestors().take_while(|path| *path != world.user(0).home) {
        world.user(0).own(path)?;
    }
    Ok(directory)
}

fn forget_users(world: &World) -> Result<()> {
    match fs::remove_dir_all(world.user(0).home.join(".config/enroot")) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}

/// A script in a step of user 0 with these variables in its environment.
fn run(world: &World, variables: &[(&str, &str)], options: &[&str], script: &str) -> Result<String> {
    let arguments = [&[IMAGE], options, &["sh", "-c", script]].concat();
    let mut command = world.bed.cluster.command(0, "srun", arguments);
    let output = process::run(command.envs(variables.iter().copied()), wait::DEADLINE * 2)?;
    Ok(output.success()?.stdout.trim_end_matches('\n').to_owned())
}

fn settings(world: &mut World) -> Result<()> {
    let conf = "# of the site\nENROOT_REMAP_ROOT y\nENROOT_ROOTFS_WRITABLE = yes\nENROOT_MOUNT_HOME no\n";
    let drop_in = "ENROOT_REMAP_ROOT no\n";
    with_site(world, &[("enroot.conf", conf), ("enroot.conf.d/10.conf", drop_in)], |world| {
        let script = "id -u; touch /x 2>/dev/null && echo writable || echo read-only";
        assert_eq!(run(world, &[], &[], script)?, "0\nwritable");
        let uid = world.user(0).uid;
        let off = [("ENROOT_REMAP_ROOT", "n"), ("ENROOT_ROOTFS_WRITABLE", "N")];
        assert_eq!(run(world, &off, &[], script)?, format!("{uid}\nread-only"));
        assert_eq!(run(world, &off, &["--container-remap-root"], script)?, "0\nread-only");
        let options = ["--no-container-remap-root", "--container-readonly"];
        assert_eq!(run(world, &[], &options, script)?, format!("{uid}\nread-only"));
        Ok(())
    })
}

/// What the hooks are told is what holds.
fn paths(world: &mut World) -> Result<()> {
    let conf = "ENROOT_DATA_PATH /data/user-$(id -u)\nENROOT_CACHE_PATH ${HOME}/cache\n";
    let hook = "#!/bin/sh\necho \"PATHS=$ENROOT_DATA_PATH|$ENROOT_CACHE_PATH|$ENROOT_ALLOW_HTTP|$SLURM_PROCID\" >>\"$ENROOT_ENVIRON\"\n";
    with_site(world, &[("enroot.conf", conf), ("hooks.d/10.sh", hook)], |world| {
        let job = [("ENROOT_DATA_PATH", "/mine"), ("ENROOT_CACHE_PATH", "/mine"), ("ENROOT_ALLOW_HTTP", "y")];
        let user = world.user(0);
        let expected = format!("/data/user-{}|{}/cache||", user.uid, user.home.display());
        assert_eq!(run(world, &job, &[], "echo \"$PATHS\"")?, expected);
        Ok(())
    })
}

fn default_mounts(world: &mut World) -> Result<()> {
    let system = "/proc /proc none x-create=dir,rbind,rw,nosuid,nodev,noexec,rslave 0 -1\n\
                  /dev /dev none x-create=dir,rbind,rw,nosuid,noexec,rslave 0 -1\n\
                  tmpfs /tmp tmpfs x-create=dir,rw,nosuid,nodev,mode=700,size=1m 0 -1\n";
    with_site(world, &[("mounts.d/10-system.fstab", system)], |world| {
        let script = "awk '$2 == \"/tmp\" { print $4 }' /proc/mounts; grep -c ' /sys ' /proc/mounts";
        let output = run(world, &[], &[], &format!("{script} || true"))?;
        ensure!(output.contains("size=1024k") && output.contains("mode=700") && output.ends_with("\n0"), "{output}");
        Ok(())
    })
}

fn mounts(world: &mut World) -> Result<()> {
    let work = world.make_directory(0, "work/mounts d")?;
    write(&work.join("file"), b"from the host\n")?;
    let escaped = work.display().to_string().replace(' ', "\\040");
    let site =
        format!("# of the site\n{escaped} /site none x-create=dir,bind,ro 0 0\n/nowhere /never none bind,nofail\n");
    write_users(
        world,
        "mounts.d/50.fstab",
        b"${HOME}/work /mine none x-create=auto,rbind\nnone /site none remount,bind,nosuid\n",
    )?;
    let result = with_site(world, &[("mounts.d/50-site.fstab", &site)], |world| {
        let script = "cat /site/file '/mine/mounts d/file'; touch /site/x 2>&1; touch /mine/written; ls -d /never; \
                      awk '$2 == \"/site\" { print $4 }' /proc/mounts";
        let output = world.sh(&[], &format!("exec 2>&1; {script}"))?;
        ensure!(output.starts_with("from the host\nfrom the host\n"), "{output}");
        ensure!(output.contains("/site/x: Read-only file system") && output.contains("nosuid"), "{output}");
        ensure!(output.contains("/never: No such file"), "{output}");
        ensure!(world.user(0).home.join("work/written").exists());
        // Somebody else's own mounts are not his.
        assert_eq!(world.sh_as(1, &[], "ls -d /site /mine 2>/dev/null || true")?, "/site");
        Ok(())
    });
    forget_users(world)?;
    result
}

fn variables(world: &mut World) -> Result<()> {
    write_users(world, "environ.d/20.env", b"BOTH=user\nMINE='a  b'\nMULTI=\"x\n")?;
    let site = "SITE=${HOME}/${NOT_SET}x\nBOTH=site\nENROOT_REMAP_ROOT=y\n# C=1\nPATH=${NOT_SET}/bin:/usr/bin\n";
    let result = with_site(world, &[("environ.d/10.env", site)], |world| {
        let script = "echo \"$SITE|$BOTH|$MINE|$MULTI|$PATH|$(id -u)\"";
        let user = world.user(0);
        let expected = format!("{}/x|user|a  b|\"x|/bin:/usr/bin|{}", user.home.display(), user.uid);
        assert_eq!(run(world, &[], &[], script)?, expected);
        assert_eq!(run(world, &[("BOTH", "host")], &["--container-env=BOTH"], "echo $BOTH")?, "host");
        Ok(())
    });
    forget_users(world)?;
    result
}

fn hooks(world: &mut World) -> Result<()> {
    let first = "#!/bin/bash\nset -eu\nsource \"${ENROOT_LIBRARY_PATH}/common.sh\"\n\
                 common::checkcmd enroot-mount\n\
                 echo \"not for the user\"\ncommon::log WARN \"nor this\"\n\
                 enroot-mount --root \"${ENROOT_ROOTFS}\" - <<EOF\n\
                 tmpfs /hook tmpfs x-create=dir,mode=755\n\
                 EOF\n\
                 echo \"$SLURM_JOB_ID.$SLURM_STEP_ID ${SLURM_PROCID-none} $(id -u)\" >\"$ENROOT_ROOTFS/hook/first\"\n\
                 echo \"ORDER='first'\" >>\"$ENROOT_ENVIRON\"\n";
    let second = "#!/bin/sh\nset -eu\necho \"ORDER=$(grep ^ORDER= \"$ENROOT_ENVIRON\" | tail -n 1 | cut -d= -f2 | tr -d \\')-second\" >>\"$ENROOT_ENVIRON\"\n\
                  echo \"$ENROOT_ROOTFS/hook /again none x-create=dir,bind,ro\" >>\"$ENROOT_MOUNTS\"\n";
    let files = [
        ("hooks.d/10-first.sh", first),
        ("hooks.d/20-second.sh", second),
        ("hooks.d/15-off.txt", "exit 1\n"),
        ("hooks.d/98-nvidia.sh", "#!/bin/sh\nexit 1\n"),
    ];
    with_site(world, &files, |world| {
        let script =
            "[ \"$(cat /again/first)\" = \"$SLURM_JOB_ID.$SLURM_STEP_ID none $(id -u)\" ] && echo $ORDER $SLURM_PROCID";
        let output = world.srun(&["-N2", "-n4", "--ntasks-per-node=2", IMAGE, "sh", "-c", script])?.success()?;
        let expected = ["first-second 0", "first-second 1", "first-second 2", "first-second 3"];
        assert_eq!(sorted(&output.stdout), expected, "{output}");
        let said: Vec<&str> = output.stderr.lines().filter(|line| !line.contains("imported docker image")).collect();
        ensure!(said.is_empty(), "{said:?}");
        Ok(())
    })
}

/// A step that joins a running container has its variables, also those of hooks, which do not run again.
fn joined(world: &mut World) -> Result<()> {
    let count = world.make_directory(0, "work")?.join("hook-count");
    let hook = format!("#!/bin/sh\necho BY_HOOK=yes >>$ENROOT_ENVIRON\necho run >>{}\n", count.display());
    let files = [("hooks.d/10.sh", hook.as_str()), ("environ.d/10.env", "SITE=site\n")];
    with_site(world, &files, |world| {
        let _ = fs::remove_file(&count);
        let name = named::new_name();
        let first = named::start(world, &[&named::option(&name, ""), IMAGE], "true")?;
        let exec = named::option(&name, ":exec");
        let second = named::start(world, &[&exec], "echo $BY_HOOK $SITE")?;
        named::end(first)?;
        // Also from one that has itself joined.
        assert_eq!(named::sh(world, &[&exec], "echo $BY_HOOK $SITE")?.stdout, "yes site\n");
        ensure!(named::end(second)?.stdout.starts_with("yes site\n"));
        assert_eq!(fs::read_to_string(&count)?, "run\n");
        Ok(())
    })
}

fn user_hooks(world: &mut World) -> Result<()> {
    let own = write_users(world, "hooks.d/10.sh", b"#!/bin/sh\necho MINE=${SITE-}user >>$ENROOT_ENVIRON\n")?;
    write_users(world, "hooks.d/20.off", b"#!/bin/sh\nexit 1\n")?;
    fs::rename(own.join("hooks.d/20.off"), own.join("hooks.d/20.sh"))?;
    let other = world.make_directory(0, "work/other")?;
    write(&other.join("hooks.d/10.sh"), b"#!/bin/sh\necho MINE=elsewhere >>$ENROOT_ENVIRON\n")?;
    let site = [("hooks.d/90.sh", "#!/bin/sh\necho MINE=site >>$ENROOT_ENVIRON\n")];
    let result = with_site(world, &site, |world| {
        assert_eq!(run(world, &[], &[], "echo $MINE")?, "user");
        let directory = other.display().to_string();
        assert_eq!(run(world, &[("ENROOT_CONFIG_PATH", &directory)], &[], "echo $MINE")?, "elsewhere");
        assert_eq!(world.sh_as(1, &[], "echo $MINE")?, "site");
        Ok(())
    });
    forget_users(world)?;
    result
}

fn failing_hook(world: &mut World) -> Result<()> {
    let files = [("hooks.d/50-bad.sh", "#!/bin/sh\necho out; echo 'the reason' >&2\nexit 3\n")];
    with_site(world, &files, |world| {
        let path = world.bed.site.path("etc/enroot/hooks.d/50-bad.sh");
        let reason = format!("pyxis:     [ERROR] {} exited with return code 3", path.display());
        let error = world.refused(&["-N2", "-n4", IMAGE], &reason)?;
        for line in [
            "pyxis: container start failed with error code: 1",
            "pyxis: printing enroot log file:",
            "pyxis:     the reason",
        ] {
            assert_eq!(error.matches(line).count(), 2, "once for each node: {error}");
        }
        ensure!(!error.contains("out"), "{error}");
        Ok(())
    })?;
    world.nodes_work()
}

fn hanging_hook(world: &mut World) -> Result<()> {
    let files = [("hooks.d/50.sh", "#!/bin/bash\nsetsid sleep 1000 & disown\necho waiting >&2\nsleep 1000\n")];
    with_site(world, &files, |world| {
        let error = world.refused(&[IMAGE], "did not end within 3 seconds ([hooks] timeout_seconds) and was killed")?;
        ensure!(error.contains("pyxis:     waiting"), "{error}");
        Ok(())
    })?;
    world.nodes_work()
}

/// Nothing of a hook outlives its step: that is looked at after every test.
fn cancel_in_hook(world: &mut World) -> Result<()> {
    let marker = world.make_directory(0, "work")?.join("hook-runs");
    let hook = format!("#!/bin/bash\nsetsid sleep 1000 & disown\ntouch {}\nsleep 1000\n", marker.display());
    with_site(world, &[("hooks.d/50.sh", &hook)], |world| {
        let _ = fs::remove_file(&marker);
        let generous = fs::read_to_string(&world.bed.pyxis.config)?.replace("seconds = 3", "seconds = 600");
        world.bed.pyxis.configure(&generous)?;
        let step = world.start(&["-w", "node1", IMAGE, "echo", "it ran"])?;
        wait::until("the hook", wait::DEADLINE, || marker.exists().then_some(()))?;
        let uid = world.user(0).uid.to_string();
        world.bed.cluster.admin("scancel", ["--user", &uid])?;
        let output = step.wait(Duration::from_secs(60))?;
        ensure!(!output.status.success() && !output.stdout.contains("it ran"), "{output}");
        Ok(())
    })?;
    world.nodes_work()
}

fn hostile_files(world: &mut World) -> Result<()> {
    let long = format!("/{} /x none bind\n", "y".repeat(5000));
    let garbage: Vec<u8> = (0..=255).cycle().take(70_000).collect();
    let refused: [(&str, &[u8], &str); 9] = [
        ("mounts.d/1.fstab", b"tmpfs\n", "enroot-mount: invalid fstab entry: \"tmpfs\" at "),
        ("mounts.d/1.fstab", long.as_bytes(), "is longer than 4095 bytes"),
        ("mounts.d/1.fstab", b"/etc ../../x none bind,x-create=auto\n", "ross-device link"),
        ("mounts.d/1.fstab", b"/dev/null /x ext4 x-create=dir\n", "enroot-mount: failed to mount: /dev/null at /x: "),
        ("mounts.d/1.fstab", b"none /x no-such-type x-create=dir\n", "enroot-mount: failed to mount: none at /x: "),
        ("mounts.d/1.fstab", b"umount /usr none x-detach\n", "enroot-mount: failed to unmount: umount at /usr: "),
        ("mounts.d/1.fstab", b"none / none remount,bind,suid,dev\nnone / none x-detach", "[ERROR] "),
        ("hooks.d/1.sh", b"#!/bin/sh\nrm -f $ENROOT_MOUNTS; ln -s $ENROOT_MOUNTS $ENROOT_MOUNTS\n", "ENROOT_MOUNTS: "),
        ("hooks.d/1.sh", b"#!/bin/sh\nhead -c 5000000 /dev/zero >$ENROOT_ENVIRON\n", "ENROOT_ENVIRON: more than "),
    ];
    for (name, text, reason) in refused {
        forget_users(world)?;
        write_users(world, name, text)?;
        world.refused(&["-w", "node1", IMAGE], reason)?;
    }
    forget_users(world)?;
    for name in ["mounts.d/1.fstab", "environ.d/1.env"] {
        let directory = write_users(world, name, b"")?;
        fs::remove_file(directory.join(name))?;
        process::output_of(world.as_user(0, "mkfifo").arg(directory.join(name)))?;
        world.refused(&["-w", "node1", IMAGE], "not a regular file")?;
        forget_users(world)?;
    }
    // What is only nonsense does nothing.
    write_users(world, "environ.d/1.env", &garbage)?;
    write_users(world, "mounts.d/1.fstab", b"#\xff\n\n/etc /x none bind 0 9\n")?;
    let result = world.sh(&[], "echo fine").map(|output| assert_eq!(output, "fine"));
    forget_users(world)?;
    result?;
    world.nodes_work()
}

fn broken_files(world: &mut World) -> Result<()> {
    for (name, text, reason) in [
        ("enroot.conf", "ENROOT_DATA_PATH \"/x\n", "enroot.conf (line 1: missing \")"),
        ("enroot.conf", "ENROOT_DATA_PATH $(sleep 1000)\n", "its evaluation took more than 5 s"),
        ("enroot.conf.d/x.conf", "\n\nENROOT_DATA_PATH $(exit 4)x;false\n", "x.conf (line 3: its evaluation failed"),
        ("mounts.d/1.fstab", "/nowhere /x none bind,x-create=dir\n", "failed to mount: /nowhere at /x: No such file"),
    ] {
        with_site(world, &[(name, text)], |world| world.refused(&["-w", "node1", IMAGE], reason).map(drop))?;
    }
    world.nodes_work()
}
