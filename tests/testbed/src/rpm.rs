//! An image in which packages are installed by dnf and rpm. Made of Debian's packages of both, since no other
//! distribution's are at hand.

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use anyhow::Result;
use serde_json::json;

use crate::image::{Compression, ImageBuilder};
use crate::{images, process};

/// dnf, what makes packages and repositories, and what their scripts need.
const PACKAGES: &str = "dnf,rpm,createrepo-c,bash,dash,coreutils,findutils,passwd,sed,grep";

/// The image. Kept between runs.
pub fn image() -> Result<String> {
    images::cached("rpm-2", |layout| {
        let tree = layout.join("tree");
        let mut command = Command::new("mmdebstrap");
        // Nothing is configured: these programs need no more than to lie where they belong.
        command.args(["--variant=extract", "--quiet", &format!("--include={PACKAGES}")]);
        for left_out in ["doc", "locale", "man", "perl"] {
            command.arg(format!("--dpkgopt=path-exclude=/usr/share/{left_out}/*"));
        }
        command.arg("bookworm").arg(&tree).args(images::package_sources());
        process::run(&mut command, Duration::from_secs(600))?.success()?;
        for file in ["passwd", "group", "shadow", "gshadow"] {
            File::create(tree.join("etc").join(file))?;
        }
        let image = ImageBuilder::new(layout)?
            .config("Env", json!([images::IMAGE_PATH]))
            .layer_from_tree(&tree, Compression::Zstd)?;
        fs::remove_dir_all(&tree)?;
        image.finish("latest")
    })
}
