//! End to end: real users, real steps, a real registry. Every test is written from the user's side, commands in, output
//! and exit code out, so that most of it would pass against pyxis with enroot too.
//!
//! One cluster serves all tests, one after the other; after each one every node has to be as clean as before it.

#![forbid(unsafe_code)]

mod agreement;
mod bad_input;
mod cdi;
mod command;
mod devices;
mod enroot_world;
mod entrypoint;
mod environment;
mod failures;
mod identity;
mod images;
mod importer;
mod injected;
mod jobs;
mod kept;
mod layouts;
mod lifecycle;
mod mounts;
mod mpi;
mod named;
mod nvidia;
mod oci_hooks;
mod options;
mod packages;
mod pods;
mod policy;
mod progress;
mod proxies;
mod pull;
mod registries;
mod relay;
mod save;
#[path = "../registry/server.rs"]
#[allow(dead_code, reason = "other tests use the rest")]
mod server;
mod session;
#[path = "../commands/shape.rs"]
mod shape;
mod sources;
mod squashfs;
mod unshare;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use libtest_mimic::{Arguments, Failed, Trial};

use world::World;

/// A test: its name and what it does.
type Case = (&'static str, fn(&mut World) -> anyhow::Result<()>);

/// The cluster, started by the first test that runs: `None` before, an error if it did not start.
type Shared = Arc<Mutex<Option<Result<World, String>>>>;

/// Where and why a test panicked.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They share nodes, and look at what is left there.
    arguments.test_threads = Some(1);
    let shared = Shared::default();
    let modules: &[(&str, &[Case])] = &[
        ("session", session::CASES),
        ("options", options::CASES),
        ("environment", environment::CASES),
        ("enroot_world", enroot_world::CASES),
        ("oci_hooks", oci_hooks::CASES),
        ("identity", identity::CASES),
        ("mounts", mounts::CASES),
        ("images", images::CASES),
        ("layouts", layouts::CASES),
        ("progress", progress::CASES),
        ("registries", registries::CASES),
        ("failures", failures::CASES),
        ("proxies", proxies::CASES),
        ("agreement", agreement::CASES),
        ("policy", policy::CASES),
        ("pull", pull::CASES),
        ("sources", sources::CASES),
        ("importer", importer::CASES),
        ("squashfs", squashfs::CASES),
        ("packages", packages::CASES),
        ("jobs", jobs::CASES),
        ("mpi", mpi::CASES),
        ("relay", relay::CASES),
        ("named", named::CASES),
        ("kept", kept::CASES),
        ("bad_input", bad_input::CASES),
        ("command", command::CASES),
        ("unshare", unshare::CASES),
        ("devices", devices::CASES),
        ("cdi", cdi::CASES),
        ("nvidia", &nvidia::cases()),
        ("injected", injected::CASES),
        ("entrypoint", entrypoint::CASES),
        ("save", save::CASES),
        ("pods", pods::CASES),
        ("lifecycle", lifecycle::CASES),
    ];
    let trials = modules
        .iter()
        .flat_map(|&(module, cases)| cases.iter().map(move |&(name, case)| (format!("{module}::{name}"), case)))
        .map(|(name, case)| {
            let shared = Arc::clone(&shared);
            Trial::test(name, move || run(&shared, case))
        })
        .collect();
    // What a test that panics says is its result: it must not come between the lines of the report.
    std::panic::set_hook(Box::new(|panic| {
        *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = panic.to_string();
    }));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Takes the cluster down; `exit` would not.
    shared.lock().unwrap_or_else(PoisonError::into_inner).take();
    conclusion.exit_code()
}

fn run(shared: &Shared, case: fn(&mut World) -> anyhow::Result<()>) -> Result<(), Failed> {
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    let world = shared.get_or_insert_with(|| World::create().map_err(|error| format!("{error:#}")));
    let world = world.as_mut().map_err(|error| error.clone())?;
    // An assertion that fails must not keep the cluster from being looked at.
    let result = catch_unwind(AssertUnwindSafe(|| case(world))).unwrap_or_else(|_| {
        let panic = std::mem::take(&mut *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner));
        Err(anyhow::anyhow!(panic))
    });
    if result.is_err() {
        world.end_all_jobs();
    }
    let clean = testbed::clean::check(&mut world.bed.cluster);
    let error = match (result, clean) {
        (Ok(()), Ok(())) => return Ok(()),
        (Ok(()), Err(unclean)) => unclean,
        (Err(error), Ok(())) => error,
        (Err(error), Err(unclean)) => error.context(format!("{unclean:#}")),
    };
    Err(format!("{error:#}").into())
}
