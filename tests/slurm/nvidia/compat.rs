//! An image for a newer CUDA than the node's driver has, with the newer driver's part of user space in it.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Result, ensure};

use super::node::{self, compile};
use super::{LIBRARIES, gpus};
use crate::Case;
use crate::world::World;

pub const CASES: &[Case] = &[("the_images_newer_cuda_is_used", newer)];

/// A `libcuda` that says which one it is.
fn add_compat(tree: &Path, version: &str) -> Result<()> {
    let directory = tree.join("usr/local/cuda-13.1/compat");
    fs::create_dir_all(&directory)?;
    symlink("cuda-13.1", tree.join("usr/local/cuda"))?;
    let file = format!("libcuda.so.{version}");
    let source = "int cuInit(unsigned flags) { return (int)flags + 590; }\n";
    compile(source, &directory.join(&file), &["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"])?;
    symlink(&file, directory.join("libcuda.so.1"))?;
    symlink("libcuda.so.1", directory.join("libcuda.so"))?;
    Ok(())
}

fn newer(world: &mut World) -> Result<()> {
    let directories = ["newer", "older"].map(|name| world.directory(&format!("cuda-{name}")));
    let gpus = gpus(world)?;
    for ((name, version, says), directory) in
        [("newer", "590.44.01", "cuInit 590"), ("older", "580.65.06", "cuInit 0")].into_iter().zip(directories)
    {
        let image = node::make_image_with(&directory?, |tree| add_compat(tree, version))?;
        gpus.bed.hub.push(&image, &format!("library/cuda-{name}:latest"))?;
        let run = |variables: &[(&str, &str)], script: &str| -> Result<String> {
            let image = format!("--container-image=cuda-{name}");
            let output = gpus.srun(variables, &["--gpus-per-node=1", &image, "sh", "-c", script])?.success()?;
            Ok(output.stdout.trim_end().to_owned())
        };
        assert_eq!(run(&[], "cuda-program")?, says, "{name}");
        // In the library directory, as the node's would be; and nothing else has changed.
        let script = format!("ldconfig -p | grep -c 'libcuda.so.1 .*{LIBRARIES}/libcuda.so.1'; nvidia-smi");
        assert_eq!(run(&[], &script)?, "1\nthe fake nvidia-smi");
        // Without CUDA there is none.
        let script = format!("ls {LIBRARIES} | grep -c libcuda || true");
        assert_eq!(run(&[("NVIDIA_DRIVER_CAPABILITIES", "utility")], &script)?, "0");
    }
    // An administrator may not want it.
    let configuration = testbed::install::hub_mirror(&gpus.bed.hub.host());
    gpus.bed.pyxis.configure(&format!("{configuration}[devices]\ncuda_compat = false\n"))?;
    let output = gpus.srun(&[], &["--gpus-per-node=1", "--container-image=cuda-newer", "cuda-program"]);
    gpus.bed.pyxis.configure(&configuration)?;
    let output = output?.success()?;
    ensure!(output.stdout == "cuInit 0\n", "{output}");
    Ok(())
}
