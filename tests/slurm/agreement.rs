//! All nodes of a step use the same image, though each has a store of its own and a tag may move between two looks.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::image::{Compression, ImageBuilder};
use testbed::images;

use crate::Case;
use crate::server::{Reply, Request, Server};
use crate::world::{World, sorted};

pub const CASES: &[Case] = &[("a_step_has_one_digest", one_digest), ("a_single_node_asks_by_itself", single)];

/// A registry in which the tag `latest` means two images by turns.
struct Moving {
    server: Server,
    looks: Arc<AtomicUsize>,
}

impl Moving {
    fn start(world: &World) -> Result<Self> {
        let mut layouts = Vec::new();
        for version in ["1", "2"] {
            let name = format!("moving-{version}");
            // What another test has left.
            let _ = fs::remove_dir_all(world.directory(&name)?);
            let directory = world.directory(&name)?;
            let tree = directory.join("tree");
            images::busybox_tree(&tree)?;
            fs::write(tree.join("version"), version)?;
            let mut builder = ImageBuilder::new(&directory)?;
            builder = builder.config("Env", json!([images::IMAGE_PATH]));
            builder.layer_from_tree(&tree, Compression::Gzip)?.finish("latest")?;
            let index: Value = serde_json::from_slice(&fs::read(directory.join("index.json"))?)?;
            let digest = index["manifests"][0]["digest"].as_str().context("no manifest")?.to_owned();
            layouts.push((directory, digest));
        }
        let looks = Arc::new(AtomicUsize::new(0));
        let server = Server::start({
            let looks = Arc::clone(&looks);
            move |request| answer(request, &layouts, &looks)
        });
        Ok(Self { server, looks })
    }

    fn looks(&self) -> usize {
        self.looks.load(Ordering::SeqCst)
    }
}

fn answer(request: &Request, layouts: &[(PathBuf, String)], looks: &AtomicUsize) -> Reply {
    let name = request.path.rsplit('/').next().unwrap_or_default();
    let digest = if request.path.ends_with("/manifests/latest") {
        layouts[looks.fetch_add(1, Ordering::SeqCst) % 2].1.as_str()
    } else {
        name
    };
    let Some(hex) = digest.strip_prefix("sha256:") else { return Reply::status(404) };
    let blob = layouts.iter().find_map(|(layout, _)| fs::read(layout.join("blobs/sha256").join(hex)).ok());
    let Some(bytes) = blob else { return Reply::status(404) };
    let reply = Reply::ok(bytes).header("Docker-Content-Digest", digest);
    match request.path.contains("/manifests/") {
        true => reply.header("Content-Type", "application/vnd.oci.image.manifest.v1+json"),
        false => reply,
    }
}

fn with_moving(world: &mut World, more: &str, work: impl FnOnce(&World, &Moving) -> Result<()>) -> Result<()> {
    let moving = Moving::start(world)?;
    let usual = world.configuration();
    let host = moving.server.host();
    world.bed.pyxis.configure(&format!("{usual}[registry.\"{host}\"]\ninsecure = true\n{more}"))?;
    let result = work(world, &moving);
    world.bed.pyxis.configure(&usual)?;
    result
}

/// The digests that the tasks of a step with these options see, and how often the tag was looked up for it.
fn digests(world: &World, moving: &Moving, options: &[&str]) -> Result<(Vec<String>, usize)> {
    let before = moving.looks();
    let image = format!("--container-image={}/moving:latest", moving.server.host());
    let command = ["sh", "-c", "echo $PYXIS_IMAGE_DIGEST $(cat /version) ${SLURM_PYXIS_CONTAINER_MEANING-unset}"];
    let output = world.srun(&[options, &[&image], &command].concat())?.success()?;
    let lines: Vec<String> = sorted(&output.stdout).into_iter().map(str::to_owned).collect();
    ensure!(lines.iter().all(|line| line.starts_with("sha256:") && line.ends_with(" unset")), "{output}");
    Ok((lines, moving.looks() - before))
}

fn one_digest(world: &mut World) -> Result<()> {
    with_moving(world, "", |world, moving| {
        let (first, looks) = digests(world, moving, &["-N2"])?;
        assert_eq!((first.len(), looks), (2, 1));
        assert_eq!(first[0], first[1]);
        // What was learned a short time ago counts, also where it is not what a node has learned by itself.
        world
            .srun(&[
                "-w",
                "node2",
                "--container-pull=always",
                &format!("--container-image={}/moving", moving.server.host()),
                "true",
            ])?
            .success()?;
        let (again, looks) = digests(world, moving, &["-N2"])?;
        assert_eq!((again, looks), (first, 0));
        for _ in 0..2 {
            let (always, looks) = digests(world, moving, &["-N2", "--container-pull=always"])?;
            assert_eq!((&always[0], looks), (&always[1], 1));
        }
        // The commands in a job's script are steps as others; each asks where it is typed.
        let (exported, _) = digests(world, moving, &["-N2", "--export=NONE"])?;
        assert_eq!(exported[0], exported[1]);
        Ok(())
    })?;
    // Where srun does not ask, each node does: what this is about.
    with_moving(world, "[network]\nsubmit_timeout = 0\n", |world, moving| {
        let (each, looks) = digests(world, moving, &["-N2", "--container-pull=always"])?;
        assert_eq!(looks, 2);
        ensure!(each[0] != each[1], "{each:?}");
        Ok(())
    })
}

fn single(world: &mut World) -> Result<()> {
    with_moving(world, "", |world, moving| {
        let before = moving.server.requests().len();
        let (_, looks) = digests(world, moving, &["-N1", "-w", "node1"])?;
        assert_eq!(looks, 1);
        ensure!(moving.server.requests()[before..].iter().all(|request| request.method == "GET"), "srun has asked");
        assert_eq!(digests(world, moving, &["-N1", "-w", "node1"])?.1, 0);
        Ok(())
    })
}
