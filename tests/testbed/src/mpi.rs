//! An image with Debian's MPI libraries and a program that uses them.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::json;

use crate::image::{Compression, ImageBuilder};
use crate::{images, process};

/// What the program does.
const PROGRAM: &str = include_str!("mpi.c");

/// Path in the image of the program that speaks PMIx: it is linked to OpenMPI.
pub const PMIX_PROGRAM: &str = "/usr/local/bin/allreduce-openmpi";
/// Path in the image of the program that speaks PMI-1 and PMI-2: it is linked to MPICH. (Debian's OpenMPI has neither.)
pub const PMI_PROGRAM: &str = "/usr/local/bin/allreduce-mpich";

/// Packages in the image: what programs need at run time.
const LIBRARIES: &str = "libopenmpi3,libmpich12";
/// Extracts, beside the image, what it takes to compile: without what these packages depend on, Fortran and the like.
const DEVELOPMENT: &str = r#"mkdir "$1/development" && cd "$1/development" &&
    APT_CONFIG=$MMDEBSTRAP_APT_CONFIG apt-get -qq -o APT::Sandbox::User=root download libopenmpi-dev libmpich-dev &&
    for package in *.deb; do dpkg-deb --extract "$package" . || exit 1; done"#;

/// The image: busybox for the shell, OpenMPI, MPICH, and a program for each. Kept between runs.
pub fn image() -> Result<String> {
    images::cached("mpi-4", |layout| {
        let (tree, development) = (layout.join("tree"), layout.join("development"));
        let mut command = Command::new("mmdebstrap");
        // Nothing is configured: libraries need no more than to lie where they belong.
        command.args(["--variant=extract", "--quiet", &format!("--include={LIBRARIES}")]);
        command.args([
            "--dpkgopt=path-exclude=/usr/share/*",
            // They want libraries that configuring would have linked to their place.
            "--dpkgopt=path-exclude=*/mca_mtl_*",
            "--dpkgopt=path-exclude=*/mca_btl_ofi*",
            &format!("--extract-hook={DEVELOPMENT}"),
            "bookworm",
        ]);
        command.arg(&tree).args(images::package_sources());
        process::run(&mut command, Duration::from_secs(600))?.success()?;
        fs::rename(tree.join("development"), &development)?;
        let source = layout.join("allreduce.c");
        fs::write(&source, PROGRAM)?;
        let triplet = process::output_of(Command::new("cc").arg("-print-multiarch"))?;
        let triplet = triplet.trim();
        for (headers, library, program) in [
            (format!("usr/lib/{triplet}/openmpi/include"), "libmpi.so.40", PMIX_PROGRAM),
            (format!("usr/include/{triplet}/mpich"), "libmpich.so.12", PMI_PROGRAM),
        ] {
            let library = tree.join("usr/lib").join(triplet).join(library);
            let program = tree.join(program.trim_start_matches('/'));
            compile(&source, &development.join(headers), &library, &program)?;
        }
        images::busybox_tree(&tree)?;
        let image = ImageBuilder::new(layout)?
            .config("Env", json!([images::IMAGE_PATH]))
            .layer_from_tree(&tree, Compression::Zstd)?;
        fs::remove_dir_all(&tree)?;
        fs::remove_dir_all(&development)?;
        image.finish("latest")
    })
}

/// Compiles `source` with the headers in `headers` against `library`, as `program`.
fn compile(source: &Path, headers: &Path, library: &Path, program: &Path) -> Result<()> {
    fs::create_dir_all(program.parent().context("a program is in a directory")?)?;
    let mut cc = Command::new("cc");
    cc.arg("-O1").arg("-I").arg(headers).arg("-o").arg(program).arg(source).arg(library);
    // What the library itself needs is in the image.
    cc.arg("-Wl,--allow-shlib-undefined");
    process::output_of(&mut cc).map(drop)
}
