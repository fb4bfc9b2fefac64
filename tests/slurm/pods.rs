//! Nodes that are pods of Kubernetes, as Slinky starts them: a root file system that is an overlay itself, `/etc/slurm` a
//! read-only volume, neither systemd nor anything under `/run`, a `/proc` and a small `/dev/shm` of their own, the store on a
//! volume. And a login pod, which has no privilege at all.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use testbed::install::Build;
use testbed::node::Pod;
use testbed::{ClusterOptions, Output, Testbed, images, process, wait};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("steps_start", steps),
    ("a_named_container_stays_on_the_volume", named),
    ("squashfs_files", squashfs),
    ("without_a_volume", no_volume),
    ("without_privileges_it_says_which", unprivileged),
    ("a_login_pod_needs_no_privilege", login),
];

/// A node with privileges, one that has them but sees little of `/proc`, one without, and one without a volume.
const PODS: [Pod; 4] = [
    Pod { privileged: true, masked: false, volume: true },
    Pod { privileged: true, masked: true, volume: true },
    Pod { privileged: false, masked: true, volume: true },
    Pod { privileged: true, masked: false, volume: false },
];

/// The cluster, started by the first test that wants it.
fn pods(world: &mut World) -> Result<&mut Testbed> {
    if world.pods.is_none() {
        let name = format!("pods-{}", std::process::id());
        let options = ClusterOptions { nodes: PODS.len(), pods: PODS.into(), ..ClusterOptions::default() };
        let bed = Testbed::start(&name, &Build::of(env!("CARGO_BIN_EXE_pyxis")), &options)?;
        let image = images::busybox(&bed.site.make_directory("state/alpine")?)?;
        bed.hub.push(&image, "library/alpine:latest")?;
        world.pods = Some(bed);
    }
    world.pods.as_mut().context("just made")
}

fn srun(bed: &Testbed, node: usize, arguments: &[&str]) -> Result<Output> {
    let node = format!("--nodelist=node{node}");
    process::run(&mut bed.cluster.command(0, "srun", [&["-n1", &node], arguments].concat()), wait::DEADLINE * 2)
}

fn steps(world: &mut World) -> Result<()> {
    let bed = pods(world)?;
    for node in [1, 2] {
        // It is what it is meant to be.
        let script =
            "stat -f -c %T / /etc/slurm; touch /etc/slurm/x 2>&1 | grep -c Read-only; ls -A /run | grep -v -e '^pyxis$' -e '^mount$';
                      df -k /dev/shm | tail -n 1 | awk '{ print $2 }'; stat -c %t:%T /proc/keys";
        let pod = srun(bed, node, &["sh", "-c", script])?.success()?;
        let keys = if node == 1 { "0:0" } else { "1:3" };
        assert_eq!(pod.stdout, format!("overlayfs\next2/ext3\n1\n65536\n{keys}\n"));
        let script = "grep ^ID= /etc/os-release; id -u; echo x >/file && cat /file; ls /proc/self/fd >/dev/null && echo proc;
                      touch /proc/sys/kernel/hostname 2>/dev/null || echo no; cat /etc/slurm/slurm.conf 2>/dev/null | wc -l";
        let step = srun(bed, node, &[IMAGE, "--container-writable", "sh", "-c", script])?.success()?;
        let uid = bed.cluster.user(0).uid;
        assert_eq!(step.stdout, format!("ID=busybox\n{uid}\nx\nproc\nno\n0\n"), "node {node}");
        let step =
            srun(bed, node, &[IMAGE, "--container-remap-root", "sh", "-c", "id -u; ls -di /proc/1"])?.success()?;
        ensure!(step.stdout.starts_with("0\n"), "{step}");
        let mount = format!("--container-mounts={}:/mnt:ro,/etc/slurm:/mnt2", bed.cluster.user(0).home.display());
        let script = "touch /mnt/x 2>&1 | grep -c Read-only; touch /mnt2/x 2>&1 | grep -c Read-only";
        assert_eq!(srun(bed, node, &[IMAGE, &mount, "sh", "-c", script])?.success()?.stdout, "1\n1\n");
        // Its second container is made of what the volume has.
        let store = bed.cluster.nodes()[node - 1].private("/var/lib/pyxis");
        ensure!(fs::read_dir(store.join("layers"))?.next().is_some(), "{}", store.display());
        let quiet = srun(bed, node, &[IMAGE, "true"])?.success()?;
        ensure!(!quiet.stderr.contains("WARN"), "{quiet}");
    }
    Ok(())
}

fn named(world: &mut World) -> Result<()> {
    let bed = pods(world)?;
    for node in [1, 2] {
        let name = format!("--container-name={}", crate::named::new_name());
        srun(bed, node, &[IMAGE, &name, "--container-writable", "sh", "-c", "echo here >/kept"])?.success()?;
        let step = srun(bed, node, &[&name, "cat", "/kept"])?.success()?;
        assert_eq!(step.stdout, "here\n");
    }
    Ok(())
}

fn squashfs(world: &mut World) -> Result<()> {
    let bed = pods(world)?;
    let tree = bed.site.make_directory("state/squashfs")?.join("tree");
    images::busybox_tree(&tree)?;
    let file = bed.cluster.user(0).home.join(format!("pods-{}.sqsh", std::process::id()));
    process::output_of(Command::new("mksquashfs").arg(&tree).arg(&file).args(["-quiet", "-no-progress", "-all-root"]))?;
    let image = format!("--container-image={}", file.display());
    for node in [1, 2] {
        let step = srun(bed, node, &[&image, "grep", "^ID=", "/etc/os-release"])?.success()?;
        assert_eq!(step.stdout, "ID=busybox\n");
    }
    fs::remove_file(file).map_err(Into::into)
}

fn no_volume(world: &mut World) -> Result<()> {
    let bed = pods(world)?;
    let step = srun(bed, 4, &[IMAGE, "--container-writable", "sh", "-c", "grep ^ID= /etc/os-release; echo x >/file"])?;
    assert_eq!(step.success()?.stdout, "ID=busybox\n");
    let name = format!("--container-name={}", crate::named::new_name());
    let step = srun(bed, 4, &[IMAGE, &name, "true"])?;
    ensure!(
        !step.status.success()
            && step.stderr.contains("container.path must be on a file system that can hold upper layers"),
        "{step}"
    );
    Ok(())
}

fn unprivileged(world: &mut World) -> Result<()> {
    let bed = pods(world)?;
    let step = srun(bed, 3, &[IMAGE, "true"])?;
    let text = "pyxis: cannot start container: slurmd runs without CAP_DAC_READ_SEARCH, CAP_SYS_ADMIN on this node, which \
                mounting images takes; a pod has it by securityContext.privileged\n";
    ensure!(!step.status.success() && step.stderr.contains(text), "{step}");
    // Steps without containers are none of our business, and the node stays.
    srun(bed, 3, &["true"])?.success()?;
    bed.cluster.wait_until_idle()
}

/// What the strictest of pods may not: namespaces and mounts, as the default filter of containerd and CRI-O has it.
fn filter() -> serde_json::Value {
    let refused =
        ["unshare", "setns", "mount", "umount2", "pivot_root", "fsopen", "fsmount", "open_tree", "move_mount"];
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": refused, "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM},
            {"names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSYS},
            {"names": ["clone"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EPERM, "args": [{
                "index": 0, "value": libc::CLONE_NEWUSER, "valueTwo": libc::CLONE_NEWUSER, "op": "SCMP_CMP_MASKED_EQ",
            }]},
        ],
    })
}

/// What `podman run` makes: no capabilities, masks over `/proc`, and a filter.
fn login(world: &mut World) -> Result<()> {
    let bed = pods(world)?;
    let root = bed.site.make_directory("state/login")?;
    for directory in ["usr", "etc/pyxis", "home", "tmp", "proc", "sys", "dev", "run", "var/tmp"] {
        fs::create_dir_all(root.join(directory))?;
    }
    for link in ["bin", "lib", "lib64", "sbin"] {
        std::os::unix::fs::symlink(format!("usr/{link}"), root.join(link))?;
    }
    for file in ["passwd", "group", "nsswitch.conf"] {
        fs::copy(format!("/etc/{file}"), root.join("etc").join(file))?;
    }
    fs::copy(&bed.pyxis.config, root.join("etc/pyxis/pyxis.toml"))?;
    let user = bed.cluster.user(0);
    let work = user.home.join(format!("login-{}", std::process::id()));
    fs::create_dir(&work)?;
    user.own(&work)?;
    let filter = bed.site.write("etc/seccomp.json", filter().to_string())?;
    let programs = bed.pyxis.executable.parent().context("a directory")?;
    let pod = |script: &str| -> Result<Output> {
        let mut command = Command::new("podman");
        command.arg("--root").arg(bed.site.path("state/podman"));
        command.args([
            "--runtime=runc",
            "--cgroup-manager=cgroupfs",
            "run",
            "--rm",
            "--network=host",
            "--log-driver=none",
        ]);
        command.args(["--ulimit=nofile=1024:1024", "--ulimit=nproc=1000:1000", "--rootfs"]);
        command.arg("--security-opt").arg(format!("seccomp={}", filter.display()));
        // Options come before the root, which is the first of what follows.
        command.args(["--user", &format!("{}:{}", user.uid, user.gid), "--workdir"]).arg(&work);
        command.args(["--env", &format!("HOME={}", work.display())]);
        command.args(["--env", &format!("PATH={}:/usr/bin", programs.display())]);
        for (volume, mode) in [("/usr".into(), "ro"), (programs.to_owned(), "ro"), (work.clone(), "rw")] {
            command.arg("--volume").arg(format!("{0}:{0}:{mode}", volume.display()));
        }
        command.arg(&root).args(["/bin/sh", "-c", script]);
        process::run(&mut command, wait::DEADLINE * 2)
    };
    // There is nothing to be had there: no namespace, no mount.
    let bare = pod("grep CapEff /proc/self/status; unshare --user true 2>&1 | grep -c 'not permitted'")?;
    ensure!(bare.stdout == "CapEff:\t0000000000000000\n1\n", "{bare}");
    pod("enroot import docker://alpine:latest && ls")?.success()?;
    pod("pyxis import --output other.sqsh docker://alpine:latest")?.success()?;
    for file in ["alpine+latest.sqsh", "other.sqsh"] {
        process::output_of(Command::new("unsquashfs").args(["-stat"]).arg(work.join(file)))?;
        let image = format!("--container-image={}", work.join(file).display());
        assert_eq!(srun(bed, 1, &[&image, "grep", "^ID=", "/etc/os-release"])?.success()?.stdout, "ID=busybox\n");
    }
    fs::remove_dir_all(work).map_err(Into::into)
}
