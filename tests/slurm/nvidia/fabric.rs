//! InfiniBand devices, on the same node: it pretends to have some, too (behaviour reference, section 19).

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::Value;
use testbed::image::{Compression, ImageBuilder};
use testbed::process;

use super::node::{GpuBed, compile, make_image_with, write};
use super::{LIBRARIES, gpus};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[
    ("infiniband_devices_as_the_variable_says", devices),
    ("images_without_verbs_get_the_nodes", verbs),
    ("sharp_for_jobs_that_ask_for_it", sharp),
];

/// Two of mlx5 and one of mlx4; addresses are not in the order of the numbers.
const DEVICES: [(&str, &str, u32); 3] =
    [("mlx5", "0000:81:00.0", 0), ("mlx5", "0000:12:00.0", 1), ("mlx4", "0000:99:00.0", 2)];
/// Private ABI of the node's libibverbs.
const ABI: &str = "34";

/// A `/sys` with these devices beside what the kernel has there, their nodes, and the node's libraries for them.
const SETUP: &str = r#"
    cd $1/fabric
    mkdir -p sys && mount -t tmpfs -o mode=755 tmpfs sys
    for name in fs kernel module devices; do mkdir sys/$name && mount --rbind /sys/$name sys/$name; done
    cp -a tree/* sys/
    mount --rbind sys /sys
    mkdir /dev/infiniband
    for number in 0 1 2; do
        mknod -m 666 /dev/infiniband/uverbs$number c 1 $((3 + 2 * number))
        mknod -m 666 /dev/infiniband/umad$number c 1 9
    done
    mknod -m 666 /dev/infiniband/rdma_cm c 1 3
    mount --bind ld.so.cache /etc/ld.so.cache
"#;
const TEARDOWN: &str = "if [ -e /dev/infiniband ]; then
        umount /etc/ld.so.cache; rm -r /dev/infiniband; umount -l /sys; umount -l $1/fabric/sys
    fi";

/// Runs `test` while the node has the devices.
fn with_fabric(gpus: &GpuBed, test: impl FnOnce() -> Result<()>) -> Result<()> {
    let directory = gpus.bed.site.path("driver/fabric");
    // What a test that has failed has left.
    gpus.on_node(TEARDOWN)?;
    let _ = fs::remove_dir_all(&directory);
    let tree = directory.join("tree");
    for class in ["infiniband", "infiniband_verbs", "infiniband_mad"] {
        write(&tree.join(format!("class/{class}/abi_version")), "6\n")?;
    }
    for (driver, address, number) in DEVICES {
        for (class, name) in [
            ("infiniband", format!("{driver}_{number}")),
            ("infiniband_verbs", format!("uverbs{number}")),
            ("infiniband_mad", format!("umad{number}")),
        ] {
            write(&tree.join(format!("bus/pci/drivers/{driver}_core/{address}/{class}/{name}/device")), &name)?;
            fs::create_dir_all(tree.join(format!("bus/pci/devices/{address}/{class}/{name}")))?;
        }
    }
    let libraries = directory.join("lib64");
    fs::create_dir_all(libraries.join("libibverbs"))?;
    let library = |name: &str, soname: &str, text: &str| {
        let source = format!("const char text[] = \"{text}\";\n");
        compile(&source, &libraries.join(name), &["-shared", "-fPIC", "-nostdlib", &format!("-Wl,-soname,{soname}")])
    };
    library("libibverbs.so.1.14.44", "libibverbs.so.1", &format!("IBVERBS_PRIVATE_{ABI}"))?;
    library("librdmacm.so.1.3.44", "librdmacm.so.1", "rdmacm")?;
    library("libmlx5.so.1.24.44", "libmlx5.so.1", "mlx5")?;
    library(&format!("libibverbs/libmlx5-rdmav{ABI}.so"), "libmlx5-rdmav34.so", "provider")?;
    let conf = directory.join("ld.so.conf");
    write(&conf, &format!("include {}\n{}\n", gpus.bed.site.path("driver/ld.so.conf").display(), libraries.display()))?;
    process::output_of(
        std::process::Command::new("ldconfig").arg("-f").arg(conf).arg("-C").arg(directory.join("ld.so.cache")),
    )?;
    gpus.on_node(SETUP)?;
    let result = test();
    gpus.on_node(TEARDOWN)?;
    result
}

fn devices(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    with_fabric(gpus, || {
        let script = "echo $(cd /dev/infiniband; for node in *; do true 2>/dev/null <$node && echo $node; done)
                      for class in infiniband infiniband_verbs infiniband_mad; do ls /sys/class/$class | xargs; done";
        let seen = |value: Option<&str>, variables: &[(&str, &str)]| {
            let variable = value.map(|value| ("MELLANOX_VISIBLE_DEVICES", value));
            let variables = [&[("NVIDIA_VISIBLE_DEVICES", "void")], variable.as_slice(), variables].concat();
            gpus.sh(0, &variables, script)
        };
        let all = "rdma_cm umad0 umad1 umad2 uverbs0 uverbs1 uverbs2\nabi_version\nabi_version\nabi_version";
        // The node's own /dev and /sys; our fake has no links in its classes.
        for nothing in [None, Some("void"), Some("none"), Some("")] {
            assert_eq!(seen(nothing, &[])?, all, "{nothing:?}");
        }
        // mlx4 comes first, then by address. Nodes for management are for root.
        let classes = |number: u32, driver: &str| {
            format!("abi_version {driver}_{number}\nabi_version uverbs{number}\nabi_version umad{number}")
        };
        assert_eq!(seen(Some("0"), &[])?, format!("rdma_cm umad2 uverbs2\n{}", classes(2, "mlx4")));
        assert_eq!(seen(Some("1"), &[])?, format!("rdma_cm umad1 uverbs1\n{}", classes(1, "mlx5")));
        let two = seen(Some("2, 0"), &[])?;
        ensure!(two.starts_with("rdma_cm umad0 umad2 uverbs0 uverbs2\nabi_version mlx4_2 mlx5_0\n"), "{two}");
        let every = seen(Some("all"), &[])?;
        let expected = "rdma_cm umad0 umad1 umad2 uverbs0 uverbs1 uverbs2\nabi_version mlx4_2 mlx5_0 mlx5_1\n";
        ensure!(every.starts_with(expected), "{every}");
        // In a /dev of its own nothing else is.
        let own = seen(Some("1"), &[("ENROOT_RESTRICT_DEV", "y")])?;
        assert_eq!(own, format!("rdma_cm uverbs1\n{}", classes(1, "mlx5")));
        for (value, id) in [("3", "3"), ("0,mlx5_0", "mlx5_0"), ("-1", "-1")] {
            let output = gpus.srun(&[("MELLANOX_VISIBLE_DEVICES", value)], &["--container-image=cuda", "true"])?;
            let text = format!(
                "[ERROR] Unknown MELLANOX device id: {id}; MELLANOX_VISIBLE_DEVICES counts the node's 3 devices"
            );
            ensure!(!output.status.success() && output.stderr.contains(&text), "{output}");
        }
        // An image may ask, and the job may know better.
        let image = image_that_wants(&gpus.bed.site.make_directory("state/fabric")?, "0")?;
        gpus.bed.hub.push(&image, "library/fabric:latest")?;
        let run = |variables: &[(&str, &str)]| -> Result<String> {
            let arguments = ["--container-image=fabric", "sh", "-c", "ls /sys/class/infiniband | xargs"];
            Ok(gpus.srun(variables, &arguments)?.success()?.stdout)
        };
        assert_eq!(run(&[])?, "abi_version mlx4_2\n");
        assert_eq!(run(&[("MELLANOX_VISIBLE_DEVICES", "1")])?, "abi_version mlx5_1\n");
        // Beforehand.
        let mut command = gpus.bed.cluster.nodes()[0].command(&gpus.bed.pyxis.executable.display().to_string());
        command.arg("--config").arg(&gpus.bed.pyxis.config).args(["devices", "--json", "fabric"]);
        let report: Value = serde_json::from_str(&process::output_of(&mut command)?)?;
        assert_eq!(report["container"]["variables"][0]["source"], "image");
        let names: Vec<_> =
            report["node"]["infiniband"].as_array().into_iter().flatten().map(|one| &one["name"]).collect();
        assert_eq!(names, ["mlx4_2", "mlx5_1", "mlx5_0"]);
        assert_eq!(report["container"]["device_nodes"][0][0], "/dev/infiniband/uverbs2");
        Ok(())
    })
}

fn image_that_wants(layout: &Path, value: &str) -> Result<String> {
    let tree = layout.join("tree");
    testbed::images::busybox_tree(&tree)?;
    let environment = [testbed::images::IMAGE_PATH.to_owned(), format!("MELLANOX_VISIBLE_DEVICES={value}")];
    ImageBuilder::new(layout)?
        .config("Env", serde_json::json!(environment))
        .layer_from_tree(&tree, Compression::Gzip)?
        .finish("latest")
}

/// Libraries of user space: the node's, unless the image has its own.
fn verbs(world: &mut World) -> Result<()> {
    let directories = ["own", "bare"].map(|name| world.directory(&format!("verbs-{name}")));
    let gpus = gpus(world)?;
    with_fabric(gpus, || {
        let [own, _] = directories;
        // Of another version, and without a provider.
        let image = make_image_with(&own?, |tree| {
            let library = tree.join("usr/lib/x86_64-linux-gnu/libibverbs.so.1");
            let arguments = ["-shared", "-fPIC", "-nostdlib", "-Wl,-soname,libibverbs.so.1"];
            compile("const char version[] = \"IBVERBS_PRIVATE_25\";\n", &library, &arguments)
        })?;
        gpus.bed.hub.push(&image, "library/verbs:latest")?;
        let variables = [("MELLANOX_VISIBLE_DEVICES", "1"), ("NVIDIA_VISIBLE_DEVICES", "void")];
        let script = format!(
            "cd {LIBRARIES}; ls | grep -E 'verbs|rdmacm|mlx' | xargs; ldconfig -p | grep -cE 'libibverbs.so.1 |libmlx5.so.1 '
             find / -xdev -name 'libmlx5-rdmav*' 2>/dev/null | wc -l; grep -c 'libmlx5-rdmav{ABI}' /proc/mounts"
        );
        let seen = gpus.sh(0, &variables, &script)?;
        // The provider is where the node's libibverbs looks for it.
        let names =
            "libibverbs.so.1 libibverbs.so.1.14.44 libmlx5.so.1 libmlx5.so.1.24.44 librdmacm.so.1 librdmacm.so.1.3.44";
        ensure!(seen.starts_with(&format!("{names}\n2\n")) && seen.ends_with("\n1"), "{seen}");
        let output = gpus.srun(&variables, &["--container-image=verbs", "sh", "-c", &script])?;
        let text = "pyxis: the image's libibverbs has no provider for mlx5, and the node's is for another version";
        ensure!(output.status.success() || output.stdout.ends_with("\n0\n"), "{output}");
        ensure!(output.stderr.contains(text) && output.stdout.starts_with("libibverbs.so.1\n"), "{output}");
        // mlx4 has no provider here: what there is appears all the same.
        let seen = gpus.sh(0, &[("MELLANOX_VISIBLE_DEVICES", "0")], &format!("ls {LIBRARIES} | grep -c libibverbs"))?;
        assert_eq!(seen, "2");
        Ok(())
    })
}

/// Variables for the network's own reductions, unless they have a value already, or the administrator wants none. Slurm tells
/// steps of `sbatch` and `salloc` about the network; those of `srun` alone it does not.
fn sharp(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    with_fabric(gpus, || {
        let script = "echo $SHARP_COLL_LOCK_ON_COMM_INIT-$SHARP_COLL_NUM_COLL_GROUP_RESOURCE_ALLOC_THRESHOLD-\
                      $NCCL_COLLNET_ENABLE-$NCCL_SHARP_GROUP_SIZE_THRESH";
        let run = |devices: &str, network: Option<&str>, options: &[&str]| -> Result<String> {
            let image = ["srun", "--container-image=cuda"];
            let arguments = [network.as_slice(), &image, options, &["sh", "-c", script]].concat();
            let mut command = gpus.bed.cluster.command(0, "salloc", arguments);
            command.env("NVIDIA_VISIBLE_DEVICES", "void").env("MELLANOX_VISIBLE_DEVICES", devices);
            Ok(process::run(&mut command, testbed::wait::DEADLINE * 2)?.success()?.stdout.trim_end().to_owned())
        };
        let network = Some("--network=sharp");
        assert_eq!(run("all", network, &[])?, "1-0-1-1");
        assert_eq!(run("all", network, &["--container-env=NCCL_COLLNET_ENABLE=0"])?, "1-0-0-1");
        assert_eq!(run("all", None, &[])?, "---");
        assert_eq!(run("void", network, &[])?, "---");
        let configuration = testbed::install::hub_mirror(&gpus.bed.hub.host());
        gpus.bed.pyxis.configure(&format!("{configuration}[devices]\nsharp = false\n"))?;
        let off = run("all", network, &[]);
        gpus.bed.pyxis.configure(&configuration)?;
        assert_eq!(off?, "---");
        Ok(())
    })
}
