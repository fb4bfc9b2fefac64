//! Squashfs files as images, in each of the three ways to run them: by FUSE, by the kernel, converted.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::{images, process, wait};

use crate::Case;
use crate::world::{World, sorted};

pub const CASES: &[Case] = &[
    ("three_ways", three_ways),
    ("every_compression", every_compression),
    ("writing", writing),
    ("several_tasks_and_nodes", several_tasks_and_nodes),
    ("the_automatic_way", the_automatic_way),
    ("converted_once", converted_once),
    ("two_users_share_the_bytes", two_users),
    ("steps_that_convert_at_once", at_once),
    ("kept_containers", kept_containers),
    ("the_server_is_part_of_the_step", server_of_the_step),
    ("a_killed_server", killed_server),
    ("a_cancelled_step", cancelled),
    ("hostile_files", hostile_files),
    ("a_bomb", bomb),
    ("a_bare_name", bare_name),
];

const MODES: [&str; 3] = ["fuse", "kernel", "convert"];

/// Has squashfs files run by `mode` on all nodes while `test` runs; with `more` lines of configuration.
fn configured(world: &mut World, mode: &str, more: &str, test: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let usual = world.configuration();
    world.bed.pyxis.configure(&format!("{usual}[squashfs]\nmode = \"{mode}\"\n{more}"))?;
    let result = test(world).with_context(|| format!("mode {mode}"));
    world.bed.pyxis.configure(&usual)?;
    result
}

/// A directory of user 0's in which files are made.
fn directory(world: &World) -> Result<PathBuf> {
    world.make_directory(0, "work/squashfs")
}

/// Packs `tree` as a file of user 0's, which only he may read.
fn pack(world: &World, tree: &Path, name: &str, options: &[&str]) -> Result<PathBuf> {
    let file = directory(world)?.join(name);
    let _ = fs::remove_file(&file);
    let fixed = ["-noappend", "-no-progress", "-quiet", "-all-root", "-processors", "2"];
    process::output_of(Command::new("mksquashfs").arg(tree).arg(&file).args(fixed).args(options))?;
    give(world, &file)?;
    Ok(file)
}

/// Makes `file` one of user 0's, changed some time ago: what was changed just now is not remembered.
fn give(world: &World, file: &Path) -> Result<()> {
    let user = world.user(0);
    std::os::unix::fs::chown(file, Some(user.uid), Some(user.gid))?;
    fs::set_permissions(file, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    Ok(())
}

/// Waits until what is made of `file` is remembered.
fn settle(file: &Path) -> Result<()> {
    let changed = fs::metadata(file)?.ctime();
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    wait::until("a file that was not changed just now", wait::DEADLINE, || {
        (now().cast_signed() - changed > 4).then_some(())
    })
}

/// A small system, and the file that most tests use.
fn tree(world: &World) -> Result<PathBuf> {
    let tree = world.directory("squashfs")?.join("tree");
    if !tree.exists() {
        images::busybox_tree(&tree)?;
        fs::write(tree.join("etc/numbers"), (0..100_000).map(|number| format!("{number}\n")).collect::<String>())?;
        fs::write(tree.join("etc/shadow"), "root:*:1::::::\n")?;
        fs::set_permissions(tree.join("etc/shadow"), std::os::unix::fs::PermissionsExt::from_mode(0o000))?;
        fs::create_dir(tree.join("removed"))?;
        fs::write(tree.join("removed/file"), "x")?;
    }
    Ok(tree)
}

fn usual(world: &World) -> Result<PathBuf> {
    let file = directory(world)?.join("usual.sqsh");
    if !file.exists() {
        pack(world, &tree(world)?, "usual.sqsh", &["-comp", "zstd", "-Xcompression-level", "3"])?;
        settle(&file)?;
    }
    Ok(file)
}

/// Option for the usual file.
fn image(world: &World) -> Result<String> {
    Ok(format!("--container-image={}", usual(world)?.display()))
}

fn three_ways(world: &mut World) -> Result<()> {
    let file = usual(world)?;
    let chdir = format!("--chdir={}", directory(world)?.display());
    for mode in MODES {
        configured(world, mode, "", |world| {
            let script = "id -u; stat -c '%u %a' /etc/os-release /root /etc/shadow; tail -n 1 /etc/numbers; \
                          readlink /bin/sh; cat /removed/file; echo; touch /x || echo read-only";
            let uid = world.user(0).uid;
            // Files that nobody could read are the user's, as if he had unpacked them.
            let shadow = if mode == "kernel" { 0 } else { 400 };
            let expected = format!("{uid}\n{uid} 644\n{uid} 700\n{uid} {shadow}\n99999\nbusybox\nx\nread-only\n");
            for image in ["--container-image=./usual.sqsh", &format!("--container-image={}", file.display())] {
                let output = world.srun(&[&chdir, image, "sh", "-c", script])?.success()?;
                assert_eq!(output.stdout, expected, "{image}");
                // Nothing is imported, and nothing is said.
                assert!(output.stderr.lines().all(|line| line.contains("Read-only file system")), "{output}");
            }
            let root = world.sh(&[&image(world)?], "grep ' / ' /proc/self/mountinfo")?;
            assert_eq!(root.contains("userxattr"), mode == "fuse", "{root}");
            Ok(())
        })?;
    }
    Ok(())
}

fn every_compression(world: &mut World) -> Result<()> {
    let tree = tree(world)?;
    for compression in ["gzip", "lzma", "lzo", "xz", "lz4", "zstd"] {
        let options: &[&str] = if compression == "lzo" { &["-Xalgorithm", "lzo1x_1"] } else { &["-b", "65536"] };
        let file = pack(world, &tree, "compressed.sqsh", &[&["-comp", compression], options].concat())?;
        let image = format!("--container-image={}", file.display());
        // No kernel reads lzma: that is converted.
        for mode in MODES {
            configured(world, mode, "", |world| {
                let sum = world.sh(&[&image], "md5sum </etc/numbers").with_context(|| compression.to_owned())?;
                assert_eq!(sum, world.sh(&[&self::image(world)?], "md5sum </etc/numbers")?);
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn writing(world: &mut World) -> Result<()> {
    for mode in MODES {
        configured(world, mode, "", |world| {
            let image = image(world)?;
            let script = "echo new >/etc/new && echo more >>/etc/os-release && rm -r /removed && mkdir /removed && \
                          ls /removed && mv /etc/group /etc/group.old && chmod 600 /etc/passwd && rm /bin/ls && \
                          cat /etc/new && tail -n 1 /etc/os-release && ! test -e /bin/ls && stat -c %u / /etc/new";
            let uid = world.user(0).uid;
            let output = world.sh(&[&image, "--container-writable"], script)?;
            assert_eq!(output, format!("new\nmore\n{uid}\n{uid}"));
            let output = world.sh(&[&image, "--container-writable", "--container-remap-root"], script)?;
            assert_eq!(output, "new\nmore\n0\n0");
            // The file is as it was.
            assert_eq!(
                world.sh(&[&image], "ls /bin/ls /removed/file; test -e /etc/new || echo none")?,
                "/bin/ls\n/removed/file\nnone"
            );
            Ok(())
        })?;
    }
    Ok(())
}

fn several_tasks_and_nodes(world: &mut World) -> Result<()> {
    for mode in MODES {
        configured(world, mode, "", |world| {
            let image = image(world)?;
            let lines = world.sh(&["-N2", "-n8", &image], "tail -n 1 /etc/numbers; readlink /proc/self/ns/mnt")?;
            assert_eq!(lines.matches("99999").count(), 8);
            let namespaces: std::collections::HashSet<_> = lines.lines().filter(|line| line.contains("mnt")).collect();
            // One a node: but each has a kernel of its own only in the real world, where numbers may be equal.
            assert_eq!(namespaces.len(), 2, "{lines}");
            Ok(())
        })?;
    }
    Ok(())
}

fn the_automatic_way(world: &mut World) -> Result<()> {
    let image = image(world)?;
    let way = |world: &World| -> Result<bool> {
        Ok(world.sh(&["-w", "node1", &image], "grep ' / ' /proc/self/mountinfo")?.contains("userxattr"))
    };
    assert!(way(world)?, "not FUSE although everybody may use it");
    let node = &world.bed.cluster.nodes()[0];
    process::output_of(node.command("chmod").args(["600", "/dev/fuse"]))?;
    let converted = way(world).map(|fuse| !fuse);
    let node = &world.bed.cluster.nodes()[0];
    process::output_of(node.command("chmod").args(["666", "/dev/fuse"]))?;
    assert!(converted?, "FUSE although root alone may use it");
    Ok(())
}

fn converted_once(world: &mut World) -> Result<()> {
    let file = pack(world, &tree(world)?, "once.sqsh", &["-comp", "lz4"])?;
    settle(&file)?;
    let image = format!("--container-image={}", file.display());
    let step = ["-w", "node1", &image];
    configured(world, "convert", "", |world| world.sh(&step, "cat /etc/os-release").map(drop))?;
    // Without an importer: nothing is read again.
    let no_importer = "[import]\nuser = \"root\"\n";
    configured(world, "convert", no_importer, |world| {
        assert_eq!(world.sh(&step, "tail -n 1 /etc/numbers")?, "99999");
        Ok(())
    })?;
    // But when it has changed.
    let tree = world.directory("squashfs")?.join("other");
    if !tree.exists() {
        images::busybox_tree(&tree)?;
    }
    pack(world, &tree, "once.sqsh", &["-comp", "lz4"])?;
    configured(world, "convert", no_importer, |world| {
        world.refused(&[&image], "the account \"root\" for imports is root").map(drop)
    })?;
    configured(world, "convert", "", |world| {
        assert_eq!(world.sh(&step, "test -e /etc/numbers || echo another")?, "another");
        Ok(())
    })
}

/// The layers of node 1.
fn layers(world: &World) -> Result<usize> {
    Ok(fs::read_dir(world.bed.cluster.nodes()[0].private("/var/lib/pyxis").join("layers/sha256"))?.count())
}

fn two_users(world: &mut World) -> Result<()> {
    let tree = world.directory("squashfs")?.join("shared");
    if !tree.exists() {
        images::busybox_tree(&tree)?;
        fs::write(tree.join("etc/shared"), "shared\n")?;
    }
    let file = pack(world, &tree, "shared.sqsh", &["-comp", "zstd", "-Xcompression-level", "1"])?;
    let image = format!("--container-image={}", file.display());
    configured(world, "convert", "", |world| {
        let before = layers(world)?;
        world.sh(&["-w", "node1", &image], "cat /etc/shared")?;
        assert_eq!(layers(world)?, before + 1);
        // He may not read it, whatever is in the store.
        let arguments = ["-w", "node1", &*image, "true"];
        let output = process::run(&mut world.bed.cluster.command(1, "srun", arguments), wait::DEADLINE * 2)?;
        ensure!(!output.status.success() && output.stderr.contains("Permission denied"), "{output}");
        // The same content, compressed otherwise, is the same layer.
        let copy = world.make_directory(1, "work/squashfs")?.join("copy.sqsh");
        let _ = fs::remove_file(&copy);
        let fixed = ["-noappend", "-no-progress", "-quiet", "-all-root", "-comp", "gzip", "-b", "65536"];
        process::output_of(Command::new("mksquashfs").arg(&tree).arg(&copy).args(fixed))?;
        let user = world.user(1);
        std::os::unix::fs::chown(&copy, Some(user.uid), Some(user.gid))?;
        let own = format!("--container-image={}", copy.display());
        assert_eq!(world.sh_as(1, &["-w", "node1", &own], "cat /etc/shared")?, "shared");
        assert_eq!(layers(world)?, before + 1);
        Ok(())
    })
}

fn at_once(world: &mut World) -> Result<()> {
    let tree = world.directory("squashfs")?.join("at-once");
    if !tree.exists() {
        images::busybox_tree(&tree)?;
        fs::write(tree.join("etc/at-once"), "at once\n")?;
    }
    let file = pack(world, &tree, "at-once.sqsh", &["-comp", "zstd", "-Xcompression-level", "1"])?;
    settle(&file)?;
    let image = format!("--container-image={}", file.display());
    for mode in ["convert", "fuse"] {
        configured(world, mode, "", |world| {
            let before = layers(world)?;
            let steps: Vec<_> = (0..6)
                .map(|_| world.start(&["-w", "node1", "--exact", "-n1", &image, "cat", "/etc/at-once"]))
                .collect::<Result<_>>()?;
            for step in steps {
                assert_eq!(step.wait(wait::DEADLINE * 2)?.success()?.stdout, "at once\n");
            }
            assert_eq!(layers(world)?, before + usize::from(mode == "convert"));
            Ok(())
        })?;
    }
    Ok(())
}

fn kept_containers(world: &mut World) -> Result<()> {
    for mode in MODES {
        configured(world, mode, "", |world| {
            let name = format!("--container-name=squashfs-{mode}");
            let image = image(world)?;
            let node = ["-w", "node1"];
            world.sh(&[&node[..], &[&image, &name, "--container-writable"]].concat(), "echo kept >/etc/kept")?;
            let again = [&["-w", "node1"][..], &[&*name]].concat();
            let output = world.srun(&[&again[..], &["cat", "/etc/kept", "/etc/os-release"]].concat())?.success()?;
            assert!(output.stdout.starts_with("kept\nID=busybox\n"), "{output}");
            Ok(())
        })?;
    }
    Ok(())
}

fn go_on(world: &World) -> Result<PathBuf> {
    Ok(directory(world)?.join("go"))
}

/// A step that waits in a container behind a FUSE server, and the server.
///
/// When a file `go` appears, it reads a file that has not been read before.
fn waiting_step(world: &World) -> Result<(testbed::Running, testbed::node::NodeProcess)> {
    let marker = directory(world)?.join("waiting");
    let go = go_on(world)?;
    for file in [&marker, &go] {
        let _ = fs::remove_file(file);
    }
    let mount = format!("--container-mounts={0}:{0}", directory(world)?.display());
    let script =
        format!("touch {}; while ! test -e {}; do sleep 0.2; done; cat /etc/numbers", marker.display(), go.display());
    let running = world.start(&["-w", "node1", &image(world)?, &mount, "sh", "-c", &script])?;
    wait::until("a container", wait::DEADLINE, || marker.exists().then_some(()))?;
    let processes = world.bed.cluster.nodes()[0].processes();
    let servers: Vec<_> =
        processes.iter().filter(|process| process.command.starts_with("pyxis-squashfuse")).cloned().collect();
    let [server] = <[_; 1]>::try_from(servers).map_err(|_| anyhow::anyhow!("no server, or several: {processes:?}"))?;
    Ok((running, server))
}

fn server_of_the_step(world: &mut World) -> Result<()> {
    configured(world, "fuse", "", |world| {
        let (running, server) = waiting_step(world)?;
        assert_eq!(server.uid, world.user(0).uid);
        let status = fs::read_to_string(format!("/proc/{}/status", server.pid))?;
        let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim();
        assert_eq!((field("CapEff:"), field("CapPrm:")), ("0000000000000000", "0000000000000000"));
        assert_eq!(field("NoNewPrivs:"), "1");
        // It is no task's child, and does not hear the step's signals.
        let tasks: Vec<_> = world.bed.cluster.nodes()[0].processes();
        let tasks: Vec<_> = tasks.iter().filter(|process| process.command.contains("while !")).collect();
        assert!(tasks.iter().all(|task| task.pid.to_string() != field("PPid:")));
        let blocked = u64::from_str_radix(field("SigBlk:"), 16)?;
        assert_eq!(blocked >> 14 & 1, 1, "SIGTERM is not blocked");
        running.signal(nix::sys::signal::Signal::SIGTERM)?;
        running.wait(wait::DEADLINE)?;
        Ok(())
    })
}

fn killed_server(world: &mut World) -> Result<()> {
    configured(world, "fuse", "", |world| {
        let (running, server) = waiting_step(world)?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(server.pid), nix::sys::signal::Signal::SIGKILL)?;
        fs::write(go_on(world)?, "")?;
        let output = running.wait(wait::DEADLINE)?;
        ensure!(!output.status.success(), "{output}");
        world.nodes_work()
    })
}

fn cancelled(world: &mut World) -> Result<()> {
    configured(world, "fuse", "", |world| {
        let (running, _) = waiting_step(world)?;
        let uid = world.user(0).uid.to_string();
        world.bed.cluster.admin("scancel", ["--user", &uid])?;
        let output = running.wait(wait::DEADLINE)?;
        ensure!(!output.status.success(), "{output}");
        world.nodes_work()
    })
}

fn hostile_files(world: &mut World) -> Result<()> {
    let good = fs::read(pack(world, &tree(world)?, "good.sqsh", &["-noI", "-noId", "-b", "16384"])?)?;
    let number = |at: usize| u64::from_le_bytes(good[at..at + 8].try_into().unwrap_or_default()) as usize;
    let changed = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        image
    };
    let garbage: Vec<u8> = good.iter().enumerate().map(|(at, byte)| if at < 4 { *byte } else { byte ^ 0xa5 }).collect();
    for (name, bytes, reason) in [
        ("empty", Vec::new(), "(the file is empty)"),
        ("text", b"#!/bin/sh\n".repeat(1000), "(neither a squashfs file nor an archive of an image)"),
        ("half", good[..good.len() / 2].to_vec(), "(truncated: "),
        ("garbage", garbage, "(squashfs version "),
        ("blocks", changed(12, &[1, 0, 0, 0]), "(damaged squashfs image: superblock"),
        ("root", changed(32, &[0xff; 8]), "(damaged squashfs image: inode"),
        ("inodes", changed(64, &(good.len() as u64 - 1).to_le_bytes()), "(damaged squashfs image: "),
        ("ids", changed(number(48), &[0xff; 8]), "(damaged squashfs image: id table"),
    ] {
        let file = directory(world)?.join("hostile.sqsh");
        fs::write(&file, bytes)?;
        give(world, &file)?;
        let shown = file.display();
        let image = format!("--container-image={shown}");
        for mode in MODES {
            configured(world, mode, "", |world| {
                let text = format!("pyxis: failed to create container filesystem for image: {shown}\n");
                let error = world.refused(&[&image], &text).with_context(|| name.to_owned())?;
                let line = format!("pyxis:     [ERROR] Invalid image format: {shown} ");
                ensure!(error.contains(&line) && error.contains(reason), "{name}: {error}");
                ensure!(error.matches("[ERROR]").count() == 1, "{name}: {error}");
                Ok(())
            })?;
        }
    }
    // What is damaged further down: the conversion finds it, FUSE answers EIO where it is.
    let listing = number(72) + 2;
    let file = directory(world)?.join("hostile.sqsh");
    fs::write(&file, changed(listing, &[0xff; 12]))?;
    give(world, &file)?;
    let image = format!("--container-image={}", file.display());
    configured(world, "convert", "", |world| world.refused(&[&image], "Invalid image format: ").map(drop))?;
    configured(world, "fuse", "", |world| {
        let output = world.srun(&[&image, "true"])?;
        ensure!(output.stderr.matches("[ERROR]").count() <= 1, "{output}");
        Ok(())
    })?;
    fs::remove_file(&file)?;
    world.nodes_work()
}

fn bomb(world: &mut World) -> Result<()> {
    let tree = world.directory("squashfs")?.join("bomb");
    if !tree.exists() {
        images::busybox_tree(&tree)?;
        // Not a hole: blocks of zeros, a few bytes each.
        let mut bomb = fs::File::create(tree.join("bomb"))?;
        std::io::copy(&mut std::io::Read::take(std::io::repeat(b'0'), 200 << 20), &mut bomb)?;
    }
    let file = pack(world, &tree, "bomb.sqsh", &["-comp", "lz4", "-b", "1048576", "-no-duplicates"])?;
    ensure!(fs::metadata(&file)?.len() < 10 << 20);
    let image = format!("--container-image={}", file.display());
    let limit = "[import]\nmax_layer_bytes = 100000000\n";
    configured(world, "convert", limit, |world| {
        let error = world.refused(&[&image], "unpacks to more bytes than import.max_layer_bytes")?;
        ensure!(error.matches("[ERROR]").count() == 1, "{error}");
        world.nodes_work()
    })?;
    let limit = "[import]\nmax_layer_entries = 20\n";
    configured(world, "convert", limit, |world| {
        world.refused(&[&image], "more files and directories than import.max_layer_entries").map(drop)
    })?;
    configured(world, "fuse", "", |world| {
        assert_eq!(world.sh(&[&image], "wc -c </bomb")?, (200 << 20).to_string());
        Ok(())
    })
}

fn bare_name(world: &mut World) -> Result<()> {
    usual(world)?;
    let directory = directory(world)?;
    let chdir = format!("--chdir={}", directory.display());
    let error =
        world.refused(&[&chdir, "--container-image=usual.sqsh"], "pyxis: failed to import docker image: usual.sqsh")?;
    let hint = format!(
        "pyxis:     [INFO] usual.sqsh is a file in {}: --container-image=./usual.sqsh runs it",
        directory.display()
    );
    let lines: Vec<&str> = error.lines().collect();
    assert!(lines.iter().any(|line| line.contains(&hint)), "{error}");
    let error = world.refused(&[&chdir, "--container-image=none.sqsh"], "failed to import docker image: none.sqsh")?;
    assert!(!error.contains("[INFO]"), "{error}");
    assert!(!sorted(&error).is_empty());
    Ok(())
}
