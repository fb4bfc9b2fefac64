//! Steps on kernels that lack something: each of the other ways is forced on the nodes (`[debug]`). `tests/container` runs all
//! of its tests that way; here is what Slurm has a part in.

use anyhow::{Context, Result, ensure};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("without_idmapped_layers", |world| without(world, "idmapped-layers")),
    ("without_layers_from_files", |world| without(world, "layers-from-files")),
    ("without_shared_layers", |world| without(world, "shared-layers")),
];

fn without(world: &mut World, feature: &str) -> Result<()> {
    let usual = world.configuration();
    world.bed.pyxis.configure(&format!("{usual}[debug]\nwithout = [{feature:?}]\n"))?;
    let result = steps(world).with_context(|| format!("without {feature}"));
    world.bed.pyxis.configure(&usual)?;
    result
}

fn steps(world: &mut World) -> Result<()> {
    // Two users, several tasks and nodes, an image that is not there yet.
    let image = format!("--container-image={}", world.new_image(1 << 20)?);
    for user in 0..2 {
        let uid = world.user(user).uid;
        let script = "stat -c %u /bin/busybox /payload; cksum </payload";
        let output = world.sh_as(user, &[&image, "--nodes=2", "--ntasks=4"], script)?;
        let lines: Vec<&str> = output.lines().collect();
        ensure!(lines.len() == 12, "{output}");
        ensure!(lines.iter().filter(|line| **line == uid.to_string()).count() == 8, "{output}");
    }
    // Writing, as oneself and as root; kept from one step to the next.
    let script = "rm /bin/cat && echo new >/etc/new && stat -c %u /etc/new";
    ensure!(world.sh(&["--container-writable", "--container-remap-root"], script)? == "0");
    let name = "--container-name=fallback";
    world.srun(&["-w", "node1", IMAGE, name, "--container-writable", "sh", "-c", "echo kept >/kept"])?.success()?;
    let again = world.srun(&["-w", "node1", name, "cat", "/kept", "/etc/os-release"])?.success()?;
    ensure!(again.stdout.starts_with("kept\n") && again.stdout.contains("PRETTY_NAME"), "{again}");
    let removed = world.bed.cluster.nodes()[0].private("/var/lib/pyxis").join("containers");
    match std::fs::remove_dir_all(&removed) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
        _ => Ok(()),
    }
}
