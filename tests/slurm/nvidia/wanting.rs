//! Nodes on which something is missing: libraries that vanish, an NVML that hangs or cannot be loaded.

use anyhow::{Result, ensure};

use super::gpus;
use super::node::VERSION;
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[("libraries_that_vanish", vanished), ("an_nvml_that_cannot_be_loaded", no_nvml)];

const ARGUMENTS: [&str; 4] = ["--gpus-per-node=1", "--container-image=cuda", "echo", "started"];

fn vanished(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let library = format!("$1/lib64/libcuda.so.{VERSION}");
    gpus.on_node(&format!("mv {library} {library}.away"))?;
    let output = gpus.srun(&[], &ARGUMENTS);
    gpus.on_node(&format!("mv {library}.away {library}"))?;
    let output = output?.success()?;
    let said: Vec<_> = output.stderr.lines().filter(|line| line.contains("libcuda")).collect();
    ensure!(output.stdout == "started\n" && said.len() == 1, "{output}");
    ensure!(said[0].starts_with("pyxis: NVIDIA: libraries in this node's /etc/ld.so.cache are gone, "), "{output}");
    ensure!(said[0].contains("lib64/libcuda.so.1; install the driver's libraries again"), "{output}");
    Ok(())
}

/// As where the driver is installed without its tools.
fn no_nvml(world: &mut World) -> Result<()> {
    let gpus = gpus(world)?;
    let library = format!("$1/lib64/libnvidia-ml.so.{VERSION}");
    gpus.on_node(&format!("rm -f /run/pyxis/nvidia.json; mv {library} {library}.away"))?;
    let output = gpus.srun(&[], &ARGUMENTS);
    gpus.on_node(&format!("mv {library}.away {library}"))?;
    let output = output?.success()?;
    let text = "pyxis: NVIDIA: whether the GPUs are what the image requires was not checked: NVML cannot be loaded: \
                libnvidia-ml.so.1: cannot open shared object file: No such file or directory\n";
    ensure!(output.stdout == "started\n" && output.stderr.contains(text), "{output}");
    Ok(())
}
