//! What registries have to bear, as Markdown: the figures of the README.
//!
//! * A pull through a proxy that cuts every connection: how much is downloaded, of what the image has.
//! * A thousand steps of a user's on one node, sixteen at a time: how many requests the registry gets.
//! * A registry that is slow on each connection: what several of them bring.
//!
//! Each pull and each step is what the broker does: a store, an importer process, confirmation. `cargo bench --bench
//! registry`; needs root, as the tests do.

use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use spank_pyxis::broker::import::{AcquireRequest, ImportSettings, acquire};
use spank_pyxis::image::digest::Digest;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::registry::config::RegistryEntry;
use spank_pyxis::request::{Environment, User};
use spank_pyxis::store::{PinnedMounts, Store};
use testbed::image::{Compression, ImageBuilder};
use testbed::proxy::{Behaviour, Proxy};
use testbed::registry::{Registry, RegistryOptions};
use testbed::{Site, images};

/// Least unpacked size of the large image.
const SIZE: u64 = 2 << 30;
/// What passes on each connection before it is cut.
const CUT: u64 = 50 << 20;
const STEPS: usize = 1000;
const AT_ONCE: usize = 16;
/// The slow registry: bytes a second of each connection, and of the layer.
const RATE: u64 = 16 << 20;
const LAYER: u64 = 256 << 20;
/// The account of the steps.
const UID: u32 = 1001;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["step", store, image, connections] => step(Path::new(store), image, connections),
        // Cargo's own argument is "--bench".
        _ => bench(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("registry: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Nothing is mounted.
#[derive(Debug)]
struct NoMounts;

impl PinnedMounts for NoMounts {
    fn release(&self, _: &Digest) -> std::io::Result<()> {
        Ok(())
    }
}

/// What the broker of one step does for its image.
fn step(store: &Path, image: &str, connections: &str) -> Result<()> {
    let reference = ImageReference::parse(image)?;
    let mut settings = ImportSettings { executable: env!("CARGO_BIN_EXE_pyxis").into(), ..ImportSettings::default() };
    settings
        .registries
        .registry
        .insert(reference.registry.clone(), RegistryEntry { insecure: true, ..RegistryEntry::default() });
    settings.registries.network.blob_connections = connections.parse()?;
    let user = User { uid: UID, gid: UID, groups: vec![] };
    let request = AcquireRequest { user: &user, reference: &reference, environment: &Environment::default() };
    acquire(&Store::open(store)?, &settings, request, &NoMounts, &[], &mut |_| {})?;
    Ok(())
}

fn start_step(store: &Path, image: &str, connections: u32) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    Ok(command.arg("step").arg(store).args([image, &connections.to_string()]).spawn()?)
}

/// Seconds that a step takes.
fn time(store: &Path, image: &str, connections: u32) -> Result<f64> {
    let began = Instant::now();
    ensure!(start_step(store, image, connections)?.wait()?.success(), "the import of {image} failed");
    Ok(began.elapsed().as_secs_f64())
}

fn steps(store: &Path, image: &str) -> Result<()> {
    let mut running = std::collections::VecDeque::new();
    for _ in 0..STEPS {
        if running.len() == AT_ONCE
            && let Some(mut oldest) = running.pop_front()
        {
            ensure!(Child::wait(&mut oldest)?.success(), "a step failed");
        }
        running.push_back(start_step(store, image, 4)?);
    }
    running.into_iter().try_for_each(|mut step| {
        ensure!(step.wait()?.success(), "a step failed");
        Ok(())
    })
}

fn bench() -> Result<()> {
    let site = Site::create(&format!("bench-registry-{}", std::process::id()))?;
    let registry = Registry::start(&site, "hub", RegistryOptions::default())?;
    registry.push(&images::installed(SIZE)?, "large:latest")?;
    registry.push(&images::busybox(&site.path("layout-small"))?, "small:latest")?;
    registry.push(&one_layer(&site.path("layout-layer"))?, "layer:latest")?;
    let store = |name: &str| site.path(&format!("state/store-{name}"));
    let proxy = Proxy::start(registry.port())?;
    let image = |name: &str| format!("{}/{name}", proxy.host());

    println!("| figure | |\n| --- | ---: |");
    let before = proxy.bytes();
    time(&store("whole"), &image("large"), 4)?;
    let whole = proxy.bytes() - before;
    let connections = proxy.connections();
    proxy.set(Behaviour::HangUpAfter(CUT));
    time(&store("cut"), &image("large"), 4)?;
    let cut = proxy.bytes() - before - whole;
    proxy.set(Behaviour::Pass);
    println!(
        "| bytes downloaded through a proxy that cuts each connection after 50 MiB, of the {:.2} GiB of an image | {:.4} |",
        whole as f64 / f64::from(1 << 30),
        cut as f64 / whole as f64
    );
    println!("| connections that it took | {} |", proxy.connections() - connections);

    let requests = |what: &str| -> Result<()> {
        let before = proxy.requests();
        steps(&store("array"), &image("small"))?;
        println!("| requests for {STEPS} steps, {AT_ONCE} at a time, {what} | {} |", proxy.requests() - before);
        Ok(())
    };
    requests("the image being new")?;
    requests("before the revalidation time is over")?;
    age(&store("array"), ImportSettings::default().confirmation.as_secs() + 1)?;
    requests("after it")?;

    proxy.set(Behaviour::Throttle(RATE));
    for connections in [1, 4] {
        let seconds = time(&store(&format!("slow-{connections}")), &image("layer"), connections)?;
        println!(
            "| a layer of {} MiB at {} MiB/s a connection, at most {connections} for a layer | {seconds:.1} s |",
            LAYER >> 20,
            RATE >> 20
        );
    }
    Ok(())
}

/// An image with one layer of bytes that do not compress.
fn one_layer(layout: &Path) -> Result<String> {
    let tree = layout.join("tree");
    std::fs::create_dir_all(&tree)?;
    let mut random = std::io::Read::take(std::fs::File::open("/dev/urandom")?, LAYER);
    std::io::copy(&mut random, &mut std::fs::File::create(tree.join("file"))?)?;
    ImageBuilder::new(layout)?.layer_from_tree(&tree, Compression::None)?.finish("latest")
}

/// Makes everything that the store has noted `seconds` older.
fn age(store: &Path, seconds: u64) -> Result<()> {
    for kind in ["references", "manifests"] {
        for entry in std::fs::read_dir(store.join(format!("confirmed/{UID}/{kind}")))? {
            let path = entry?.path();
            let mut record: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
            let confirmed = record["confirmed_at"].as_u64().context("no time in a record")?;
            record["confirmed_at"] = (confirmed - seconds).into();
            std::fs::write(&path, serde_json::to_vec(&record)?)?;
        }
    }
    Ok(())
}
