//! All nodes of a step use the same image, though each has a store of its own and a tag may move between two looks.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use serde_json::{Value, json};
use spank_pyxis::cli::RENDEZVOUS;
use testbed::image::{Compression, ImageBuilder};
use testbed::{images, process, wait};

use crate::Case;
use crate::server::{Reply, Request, Server};
use crate::world::{World, sorted};

pub const CASES: &[Case] = &[
    ("a_step_has_one_digest", one_digest),
    ("the_first_node_asks_where_srun_cannot", first_node),
    ("a_job_script_is_a_place_to_agree", in_a_script),
    ("nodes_that_cannot_agree_say_so", alone),
    ("a_single_node_asks_by_itself", single),
];

/// A registry in which the tag `latest` means two images by turns.
struct Moving {
    server: Server,
    looks: Arc<AtomicUsize>,
    /// As long as it is locked, looks are not answered.
    gate: Arc<Mutex<()>>,
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
        let (looks, gate) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(())));
        let server = Server::start({
            let (looks, gate) = (Arc::clone(&looks), Arc::clone(&gate));
            move |request| answer(request, &layouts, &looks, &gate)
        });
        Ok(Self { server, looks, gate })
    }

    fn looks(&self) -> usize {
        self.looks.load(Ordering::SeqCst)
    }
}

fn answer(request: &Request, layouts: &[(PathBuf, String)], looks: &AtomicUsize, gate: &Mutex<()>) -> Reply {
    let name = request.path.rsplit('/').next().unwrap_or_default();
    let digest = if request.path.ends_with("/manifests/latest") {
        let look = looks.fetch_add(1, Ordering::SeqCst);
        drop(gate.lock());
        layouts[look % 2].1.as_str()
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
    })
}

/// Processes beside srun where nodes agree.
fn hosts(world: &World) -> Vec<i32> {
    let is_one = |pid: &i32| {
        let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let owner = fs::metadata(format!("/proc/{pid}")).map(|metadata| metadata.uid());
        command.starts_with(RENDEZVOUS.as_bytes()) && owner.is_ok_and(|owner| owner == world.user(0).uid)
    };
    process::pids().into_iter().filter(is_one).collect()
}

fn no_hosts(world: &World) -> Result<()> {
    wait::until("the end of what was beside srun", wait::DEADLINE, || hosts(world).is_empty().then_some(()))
}

/// What makes the tag move between two nodes' looks.
const NOT_ASKED: &str = "[network]\nsubmit_timeout = 0\n";

fn first_node(world: &mut World) -> Result<()> {
    with_moving(world, NOT_ASKED, |world, moving| {
        for _ in 0..2 {
            let (always, looks) = digests(world, moving, &["-N2", "--container-pull=always"])?;
            assert_eq!((always.len(), &always[0], looks), (2, &always[1], 1));
        }
        // What a node has learned a short time ago counts for the others, whatever they know themselves.
        let (node1, _) = digests(world, moving, &["-w", "node1", "--container-pull=always"])?;
        let (node2, _) = digests(world, moving, &["-w", "node2", "--container-pull=always"])?;
        ensure!(node1 != node2, "the tag has not moved");
        let (recent, looks) = digests(world, moving, &["-N2"])?;
        assert_eq!((&recent[0], looks), (&recent[1], 0));
        // Components are of one step.
        let image = format!("--container-image={}/moving:latest", moving.server.host());
        let script = ["sh", "-c", "echo $PYXIS_IMAGE_DIGEST"];
        let (first, second) = (["-w", "node1", "--container-pull=always", &image], [":", "-w", "node2"]);
        let before = moving.looks();
        let output = world.srun(&[&first[..], &script, &second, &script].concat())?.success()?;
        let lines = sorted(&output.stdout);
        assert_eq!((lines.len(), lines[0], moving.looks() - before), (2, lines[1], 1), "{output}");
        no_hosts(world)
    })?;
    // Because the way there is closed to srun: the job's proxy is never one to a registry with plain HTTP.
    with_moving(world, "", |world, moving| {
        let image = format!("--container-image={}/moving:latest", moving.server.host());
        let arguments = ["-N2", "--container-pull=always", &image, "sh", "-c", "echo $PYXIS_IMAGE_DIGEST"];
        let mut command = world.bed.cluster.command(0, "srun", arguments);
        command.env("http_proxy", "http://127.0.0.1:1");
        let output = process::run(&mut command, wait::DEADLINE * 2)?.success()?;
        let lines = sorted(&output.stdout);
        assert_eq!((lines.len(), lines[0], moving.looks()), (2, lines[1], 1));
        ensure!(!output.stderr.contains("cannot agree"), "{output}");
        no_hosts(world)
    })
}

/// Where srun runs on a node, that is where nodes agree.
fn in_a_script(world: &mut World) -> Result<()> {
    with_moving(world, NOT_ASKED, |world, moving| {
        let directory = world.make_directory(0, "work/agreement")?;
        let image = format!("{}/moving:latest", moving.server.host());
        let step = format!("srun --container-pull=always --container-image={image} sh -c 'echo $PYXIS_IMAGE_DIGEST'");
        let script = directory.join("job.sh");
        let output = directory.join("output");
        fs::write(&script, format!("#!/bin/sh\n{step}\n"))?;
        let options = ["-N2".to_owned(), "--wait".into(), format!("--output={}", output.display())];
        let mut command = world.bed.cluster.command(0, "sbatch", options);
        process::run(command.arg(&script).current_dir(&directory), wait::DEADLINE * 2)?.success()?;
        let text = fs::read_to_string(&output)?;
        let lines: Vec<&str> = sorted(&text).into_iter().filter(|line| line.starts_with("sha256:")).collect();
        assert_eq!((lines.len(), lines.first(), moving.looks()), (2, lines.last(), 1), "{text}");
        no_hosts(world)
    })
}

/// Whoever is beside srun is killed while the first node asks.
fn alone(world: &mut World) -> Result<()> {
    with_moving(world, NOT_ASKED, |world, moving| {
        let held = moving.gate.lock().map_err(|_| anyhow::anyhow!("the server has panicked"))?;
        let image = format!("--container-image={}/moving:latest", moving.server.host());
        let script = ["sh", "-c", "echo $PYXIS_IMAGE_DIGEST"];
        let running = world.start(&[&["-N2", "--container-pull=always", &image][..], &script].concat())?;
        wait::until("the first node's question", wait::DEADLINE, || (moving.looks() > 0).then_some(()))?;
        for host in hosts(world) {
            nix::sys::signal::kill(Pid::from_raw(host), Signal::SIGKILL)?;
        }
        no_hosts(world)?;
        drop(held);
        let output = running.wait(wait::DEADLINE * 2)?.success()?;
        let lines = sorted(&output.stdout);
        ensure!(lines.len() == 2 && lines[0] != lines[1] && moving.looks() == 2, "{output}");
        let typed = image.trim_start_matches("--container-image=");
        let line =
            format!("pyxis: {typed}: cannot agree with the step's other nodes on what the tag means (127.0.0.1, port ");
        assert_eq!(output.stderr.matches(&line).count(), 1, "{output}");
        ensure!(output.stderr.contains("): this node asks the registry for itself\n"), "{output}");
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
