//! Devices by CDI specifications: what every machine has in `/dev` stands for hardware.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::{process, wait};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("by_option_variable_and_script", asked),
    ("all_that_a_device_needs", edits),
    ("what_vendors_tools_write", vendors),
    ("what_fabrics_describe", fabrics),
    ("what_slurm_has_given", gres),
    ("names_that_match_nothing", unknown),
    ("malformed_files_and_what_has_vanished", broken),
];

/// Runs `test` with these files in the nodes' directories of specifications, and `more` in the section `[devices]`.
pub fn with_files(
    world: &mut World,
    files: &[(&str, String)],
    more: &str,
    test: impl FnOnce(&mut World, PathBuf) -> Result<()>,
) -> Result<()> {
    let base = world.bed.site.path("etc/cdi");
    let _ = fs::remove_dir_all(&base);
    let directories = ["etc", "run"].map(|name| base.join(name));
    for directory in &directories {
        fs::create_dir_all(directory)?;
    }
    for (name, text) in files {
        fs::write(base.join(name), text)?;
    }
    let devices = format!("[devices]\ncdi_directories = {directories:?}\n{more}");
    world.bed.pyxis.configure(&(world.configuration() + &devices))?;
    let result = test(world, base.clone());
    world.bed.pyxis.configure(&world.configuration())?;
    let _ = fs::remove_dir_all(&base);
    result
}

/// A file with two devices that set a variable each.
fn variables(kind: &str, value: &str) -> String {
    let device =
        |name: &str, variable: &str| json!({"name": name, "containerEdits": {"env": [format!("{variable}={value}")]}});
    json!({"cdiVersion": "0.6.0", "kind": kind, "devices": [device("a", "A"), device("b", "B")],
           "containerEdits": {"env": [format!("ALL={value}")]}})
    .to_string()
}

const SHOW: &str = "echo $ALL-$A-$B";

fn asked(world: &mut World) -> Result<()> {
    let files = [
        ("etc/v.json", variables("vendor.com/device", "etc")),
        (
            "run/v.yaml",
            "cdiVersion: 0.6.0\nkind: vendor.com/device\ndevices:\n- name: b\n  containerEdits:\n    env: [B=run]\n"
                .into(),
        ),
    ];
    with_files(world, &files, "", |world, _| {
        assert_eq!(world.sh(&[], SHOW)?, "--");
        assert_eq!(world.sh(&["--container-device=vendor.com/device=a"], SHOW)?, "etc-etc-");
        assert_eq!(world.sh(&["--container-device=vendor.com/device=b"], SHOW)?, "--run");
        let both = ["--container-device=vendor.com/device=a", "--container-device=vendor.com/device=b"];
        assert_eq!(world.sh(&both, SHOW)?, "etc-etc-run");
        assert_eq!(world.sh(&["--container-device=vendor.com/device=a,vendor.com/device=b"], SHOW)?, "etc-etc-run");
        let mut command = world.bed.cluster.command(0, "srun", [IMAGE, "sh", "-c", SHOW]);
        command.env("PYXIS_CONTAINER_DEVICE", "vendor.com/device=b,vendor.com/device=a");
        assert_eq!(process::run(&mut command, wait::DEADLINE)?.success()?.stdout, "etc-etc-run\n");
        let script = format!(
            "#!/bin/sh\n#SBATCH {IMAGE}\n#SBATCH --container-device=vendor.com/device=a\n#SBATCH --container-device=vendor.com/device=b\n{SHOW}\n"
        );
        let (code, text) = crate::jobs::submit(world, &[], &script)?;
        ensure!(code == 0 && text.ends_with("\netc-etc-run\n"), "{code}: {text}");
        Ok(())
    })
}

fn edits(world: &mut World) -> Result<()> {
    let home = world.make_directory(0, "work/cdi")?;
    fs::write(home.join("tool"), "the tool\n")?;
    let hook = world.bed.site.path("etc/cdi-hook");
    let text = "#!/bin/sh\nroot=$(sed 's/.*\"root\":{\"path\":\"\\([^\"]*\\)\".*/\\1/' \"$(sed 's/.*\"bundle\":\"\\([^\"]*\\)\".*/\\1/')/config.json\")\n\
                echo \"$0 $1 $OF_HOOK\" >$root/hooked\n";
    fs::write(&hook, text)?;
    fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let group = world.user(0).gid;
    let file = json!({
        "cdiVersion": "1.1.0", "kind": "vendor.com/device",
        "devices": [{"name": "0", "containerEdits": {
            "deviceNodes": [
                {"path": "/dev/vendor0", "hostPath": "/dev/zero", "type": "c", "major": 1, "minor": 5, "permissions": "r"},
                {"path": "/dev/null"}
            ],
            "env": ["DEVICE=zero"],
        }}, {"name": "closed", "containerEdits": {
            "deviceNodes": [{"path": "/dev/kmsg"}], "additionalGids": [group, 4242]
        }}],
        "containerEdits": {
            "mounts": [
                {"hostPath": home.join("tool"), "containerPath": "/opt/vendor/tool", "options": ["ro", "nosuid", "bind"]},
                {"hostPath": "tmpfs", "containerPath": "/opt/scratch", "type": "tmpfs", "options": ["size=1m", "nodev"]}
            ],
            "hooks": [{"hookName": "createContainer", "path": hook, "args": ["vendor-hook", "called"],
                       "env": ["OF_HOOK=yes"]}],
            "additionalGids": [group],
            "intelRdt": {"closID": "x"},
            "netDevices": [{"hostInterfaceName": "lo", "name": "net0"}]
        }
    });
    let result = with_files(world, &[("etc/v.json", file.to_string())], "", |world, _| {
        let script = "[ $(head -c 3 /dev/vendor0 | tr '\\0' x) = xxx ] && echo lost >/dev/null && echo $DEVICE && \
                      cat /opt/vendor/tool /hooked && ! touch /opt/vendor/tool 2>/dev/null && touch /opt/scratch/x && \
                      grep -o ' /opt/[a-z/]* [a-z0-9]* r[ow]' /proc/mounts";
        let mut arguments = vec![IMAGE, "--container-device=vendor.com/device=0", "sh", "-c", script];
        let mut command = world.bed.cluster.command(0, "srun", &arguments);
        let output = process::run(command.env("ENROOT_RESTRICT_DEV", "y"), wait::DEADLINE)?.success()?;
        let lines: Vec<&str> = output.stdout.lines().collect();
        assert_eq!(&lines[..3], ["zero", "the tool", &format!("{} called yes", hook.display())]);
        assert_eq!(lines.iter().filter(|line| line.starts_with(" /opt/")).count(), 2, "{lines:?}");
        let notice = "pyxis: vendor.com/device=0: the network interface \"lo\" is not moved into the container";
        ensure!(output.stderr.contains(notice), "{output}");
        // What its permissions keep from the user is said, and no reason to fail.
        let closed =
            world.srun(&[IMAGE, "--container-device=vendor.com/device=closed", "ls", "/dev/kmsg"])?.success()?;
        ensure!(
            closed.stderr.contains(
                "pyxis: you may not open /dev/kmsg, so that programs cannot use it; members of the groups 4242 may\n"
            ),
            "{closed}"
        );
        // What Slurm does is in the node's log.
        let node = &world.bed.cluster.nodes()[0];
        let mut command = node.command(&world.bed.pyxis.executable.display().to_string());
        command.arg("--config").arg(&world.bed.pyxis.config).args(["run", "--verbose", "--user", &world.user(0).name]);
        command.args(["--container-device=vendor.com/device=0", "alpine:latest", "true"]);
        let output = process::run(command.env("ENROOT_RESTRICT_DEV", "y"), wait::DEADLINE)?.success()?;
        ensure!(output.stderr.contains("etc/v.json: intelRdt: left to Slurm's plugins\n"), "{output}");
        // In the host's own /dev nothing is made.
        arguments.remove(0);
        arguments.insert(0, IMAGE);
        let error = world.refused(&arguments[..2], "cannot show a device node at /dev/vendor0")?;
        ensure!(error.contains("ENROOT_RESTRICT_DEV=y"), "{error}");
        Ok(())
    });
    fs::remove_file(hook)?;
    result
}

/// As `nvidia-ctk` and `amd-ctk` write it: hooks of theirs do not exist here, and are not missed.
fn vendors(world: &mut World) -> Result<()> {
    let driver = world.make_directory(0, "work/cdi-driver")?;
    // Libraries need not be more than an ELF header to be bound and named.
    let header = [&b"\x7fELF\x02\x01\x01"[..], &[0; 57]].concat();
    fs::write(driver.join("libvendor.so.1.2.3"), header)?;
    fs::write(driver.join("vendor-smi"), "#!/bin/sh\necho smi\n")?;
    fs::set_permissions(driver.join("vendor-smi"), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
    let hook = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": arguments})
    };
    let options = ["ro", "nosuid", "nodev", "rbind", "rprivate"];
    let file = json!({
        "cdiVersion": "0.5.0", "kind": "nvidia.com/gpu",
        "devices": [{"name": "0", "containerEdits": {"deviceNodes": [{"path": "/dev/zero", "major": 1, "minor": 5}]}}],
        "containerEdits": {
            "env": ["NVIDIA_VISIBLE_DEVICES=void"],
            "deviceNodes": [{"path": "/dev/full"}],
            "mounts": [
                {"hostPath": driver.join("libvendor.so.1.2.3"), "containerPath": "/usr/lib64/libvendor.so.1.2.3", "options": options},
                {"hostPath": driver.join("vendor-smi"), "containerPath": "/usr/bin/vendor-smi", "options": options}
            ],
            "hooks": [
                hook("nvidia-cdi-hook create-symlinks --link libvendor.so.1::/usr/lib64/libvendor.so --link libvendor.so.1.2.3::/usr/lib64/libvendor.so.1 --link ../bin/vendor-smi::/opt/smi"),
                hook("nvidia-cdi-hook update-ldcache --folder /usr/lib64"),
                hook("nvidia-cdi-hook disable-device-node-modification"),
                hook("nvidia-cdi-hook enable-cuda-compat --host-driver-version=1.2.3")
            ]
        }
    });
    with_files(world, &[("run/nvidia.json", file.to_string())], "", |world, _| {
        let script = "vendor-smi; readlink /opt/smi; ls /usr/lib*/*/libvendor* /usr/lib*/libvendor* 2>/dev/null | \
                      sed 's,.*/,,' | sort | xargs; grep -a -o 'libvendor.so.1.2.3' /etc/ld.so.cache | head -1; \
                      echo $NVIDIA_VISIBLE_DEVICES";
        let options = ["--container-device=nvidia.com/gpu=0"];
        assert_eq!(
            world.sh(&options, script)?,
            "smi\n../bin/vendor-smi\nlibvendor.so libvendor.so.1 libvendor.so.1.2.3\nlibvendor.so.1.2.3\nvoid"
        );
        Ok(())
    })
}

/// As the operators for Elastic Fabric Adapters and Slingshot do: nodes, a library and its directory, a variable.
fn fabrics(world: &mut World) -> Result<()> {
    let fabric = world.make_directory(0, "work/cdi-fabric")?;
    let header = [&b"\x7fELF\x02\x01\x01"[..], &[0; 57]].concat();
    fs::write(fabric.join("libcxi.so.1.5.0"), header)?;
    let node = |path: &str, host: &str| json!({"path": path, "hostPath": host, "permissions": "rw"});
    let device =
        |name: &str, nodes: &[serde_json::Value]| json!({"name": name, "containerEdits": {"deviceNodes": nodes}});
    let efa = json!({
        "cdiVersion": "0.6.0", "kind": "aws.amazon.com/efa",
        "devices": [device("0", &[node("/dev/infiniband/uverbs0", "/dev/zero")]),
                    device("all", &[node("/dev/infiniband/uverbs0", "/dev/zero"), node("/dev/infiniband/uverbs1", "/dev/full")])],
        "containerEdits": {"env": ["FI_PROVIDER=efa"], "deviceNodes": [node("/dev/infiniband/rdma_cm", "/dev/null")]}
    });
    let hook = |arguments: &[&str]| json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": arguments});
    let cxi = json!({
        "cdiVersion": "0.6.0", "kind": "hpe.com/cxi",
        "devices": [device("cxi0", &[node("/dev/cxi0", "/dev/zero")])],
        "containerEdits": {
            "mounts": [{"hostPath": fabric.join("libcxi.so.1.5.0"), "containerPath": "/usr/lib64/libcxi.so.1.5.0",
                        "options": ["ro", "nosuid", "nodev", "bind"]}],
            "hooks": [hook(&["nvidia-cdi-hook", "create-symlinks", "--link", "libcxi.so.1.5.0::/usr/lib64/libcxi.so.1"]),
                      hook(&["nvidia-cdi-hook", "update-ldcache", "--folder", "/usr/lib64"])]
        }
    });
    let files = [("etc/efa.json", efa.to_string()), ("run/cxi.json", cxi.to_string())];
    with_files(world, &files, "", |world, _| {
        let script = "cd /dev; echo $(ls cxi* infiniband/* 2>/dev/null); echo $FI_PROVIDER \
                      $(find / -xdev -name 'libcxi*' | sed 's,.*/,,' | sort) $(grep -a -o -m1 libcxi.so.1.5.0 /etc/ld.so.cache)";
        let step = |devices: &str| -> Result<String> {
            let devices = format!("--container-device={devices}");
            let mut command = world.bed.cluster.command(0, "srun", [IMAGE, &devices, "sh", "-c", script]);
            Ok(process::run(command.env("ENROOT_RESTRICT_DEV", "y"), wait::DEADLINE)?.success()?.stdout)
        };
        assert_eq!(step("aws.amazon.com/efa=0")?, "infiniband/rdma_cm infiniband/uverbs0\nefa\n");
        let library = "libcxi.so.1 libcxi.so.1.5.0 libcxi.so.1.5.0";
        assert_eq!(
            step("hpe.com/cxi=cxi0,aws.amazon.com/efa=all")?,
            format!("cxi0 infiniband/rdma_cm infiniband/uverbs0 infiniband/uverbs1\nefa {library}\n")
        );
        Ok(())
    })
}

fn gres(world: &mut World) -> Result<()> {
    let device = |name: &str| json!({"name": name, "containerEdits": {"env": [format!("GPU{name}=yes")]}});
    let file =
        json!({"cdiVersion": "0.6.0", "kind": "amd.com/gpu", "devices": [device("0"), device("1"), device("all")]});
    let mapping = "[devices.gres]\ngpu = \"amd.com/gpu={index}\"\n";
    with_files(world, &[("etc/amd.json", file.to_string())], mapping, |world, _| {
        // Slurm sets the variable in a step that has GPUs. This cluster has none.
        let step = |variables: &[(&str, &str)], options: &[&str]| -> Result<String> {
            let arguments = [&[IMAGE], options, &["sh", "-c", "echo $GPU0-$GPU1-$GPUall"]].concat();
            let mut command = world.bed.cluster.command(0, "srun", arguments);
            Ok(process::run(command.envs(variables.iter().copied()), wait::DEADLINE)?.success()?.stdout)
        };
        assert_eq!(step(&[], &[])?, "--\n");
        assert_eq!(step(&[("SLURM_STEP_GPUS", "1")], &[])?, "-yes-\n");
        assert_eq!(step(&[("SLURM_STEP_GPUS", "0,1")], &["--container-device=amd.com/gpu=all"])?, "yes-yes-\n");
        assert_eq!(step(&[], &["--container-device=amd.com/gpu=0"])?, "yes--\n");
        Ok(())
    })
}

fn unknown(world: &mut World) -> Result<()> {
    let files = [("etc/v.json", variables("vendor.com/device", "x")), ("etc/w.json", variables("other.org/nic", "x"))];
    with_files(world, &files, "", |world, _| {
        for (name, expected) in [
            (
                "vendor.com/device=c",
                "there is no device vendor.com/device=c on this node: of vendor.com/device it has a, b",
            ),
            (
                "none.com/x=0",
                "there is no device none.com/x=0 on this node: it has devices of other.org/nic, vendor.com/device",
            ),
        ] {
            world.refused(&[IMAGE, &format!("--container-device={name}")], expected)?;
        }
        // Before there is a job.
        let error = world.refused(&[IMAGE, "--container-device=gpu0"], "\"gpu0\" is no device name")?;
        ensure!(!error.contains("job"), "{error}");
        Ok(())
    })?;
    world.nodes_work()
}

fn broken(world: &mut World) -> Result<()> {
    let node = |path: &str| {
        json!({"cdiVersion": "0.6.0", "kind": "vendor.com/gone", "devices":
               [{"name": "0", "containerEdits": {"deviceNodes": [{"path": path}]}}]})
        .to_string()
    };
    let files = [
        ("etc/good.json", variables("vendor.com/device", "x")),
        (
            "etc/bad.yaml",
            "cdiVersion: 0.6.0\nkind: vendor.com/bad\ndevices:\n  - name: \"0\"\n    containerEdits: [\n".into(),
        ),
        ("etc/gone.json", node("/dev/has-vanished")),
        ("etc/one.json", variables("vendor.com/twice", "1")),
        ("etc/two.json", variables("vendor.com/twice", "2")),
    ];
    with_files(world, &files, "", |world, base| {
        // A file that cannot be read takes nothing from the others.
        assert_eq!(world.sh(&["--container-device=vendor.com/device=a"], SHOW)?, "x-x-");
        let path = |name: &str| base.join(name).display().to_string();
        for (name, expected) in [
            ("vendor.com/bad=0", format!("not understood: {}:5:", path("etc/bad.yaml"))),
            (
                "vendor.com/gone=0",
                format!(
                    "the device vendor.com/gone=0 ({}): there is no device node /dev/has-vanished",
                    path("etc/gone.json")
                ),
            ),
            (
                "vendor.com/twice=a",
                format!(
                    "the device vendor.com/twice=a is in more than one file, so that nobody knows which one counts: {}, {}",
                    path("etc/one.json"),
                    path("etc/two.json")
                ),
            ),
        ] {
            world.refused(&[IMAGE, &format!("--container-device={name}")], &expected)?;
        }
        Ok(())
    })?;
    world.nodes_work()
}
