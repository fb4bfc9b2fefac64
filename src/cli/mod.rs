//! The `pyxis` executable: subcommands that people type, and the internal roles, which are started under names of their
//! own so that they stay off the path through the command-line parser. Called `enroot`, it is enroot.

mod bounded;
mod devices;
mod docker_config;
mod doctor;
mod enroot;
pub mod gc;
mod generate;
mod inspect;
mod login;
mod meaning;
mod metrics;
mod prompt;
mod pull;
mod rendezvous;
mod run;
mod supervise;
mod unprivileged;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{self, Config};
use crate::container::{self, InUse};
use crate::hooks::workspace::ENROOT_MOUNT;
use crate::rootfs::layers::LayerMounts;
use crate::store::Store;

/// `argv[0]` of the process that mounts containers; see [`crate::broker`].
pub const BROKER: &str = "pyxis-broker";
/// `argv[0]` of the process that talks to registries; see [`crate::importer`].
pub const IMPORTER: &str = "pyxis-importer";
/// `argv[0]` of the process that reads the user's credentials; see [`crate::registry::credentials`].
pub const CREDENTIALS: &str = "pyxis-credentials";
/// `argv[0]` of the process that opens the user's own images; see [`crate::source`].
pub const SOURCE: &str = "pyxis-source";
/// `argv[0]` of the process that saves containers; see [`crate::export::saver`].
pub const SAVER: &str = "pyxis-saver";
/// `argv[0]` of the process that looks up users and groups; see [`crate::broker::import`].
pub const ACCOUNT: &str = "pyxis-account";
/// `argv[0]` under which scripts written for enroot find its commands.
pub const ENROOT: &str = "enroot";
/// `argv[0]` of the process that removes the containers of a job that is over; see [`crate::container::collect`].
pub const EPILOG: &str = "pyxis-epilog";
/// `argv[0]` of the process that lets a site's importer clean up; see [`crate::task::importer`].
pub const RELEASE: &str = "pyxis-release";

/// `argv[0]` of the process that asks what a tag means; see `meaning`.
pub const MEANING: &str = "pyxis-meaning";
/// `argv[0]` of the process beside `srun` where nodes agree on what a tag means; see [`crate::agreement::host`].
pub const RENDEZVOUS: &str = "pyxis-rendezvous";
/// `argv[0]` of a node's process that asks it; see [`crate::agreement::guest`].
pub const GUEST: &str = "pyxis-guest";

/// `argv[0]` of the process that asks NVML; see [`crate::devices::nvidia::inventory`].
pub const INVENTORY: &str = "pyxis-inventory";
/// `argv[0]` of the process that serves a squashfs file; see [`crate::squashfuse`].
pub const SQUASHFUSE: &str = "pyxis-squashfuse";

/// Containers in Slurm steps, and on this machine.
#[derive(Debug, Parser)]
#[command(name = "pyxis", version, max_term_width = 100)]
struct Arguments {
    /// Configuration file
    #[arg(long, global = true, value_name = "PATH", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run a command in a container of an image, as a step of Slurm would
    Run(run::RunArgs),
    /// Bring images into this node's store
    Pull(pull::PullArgs),
    /// Show what an image is made of
    Inspect(inspect::InspectArgs),
    /// Keep a password for a registry, after checking it
    Login(login::LoginArgs),
    /// Forget the password for a registry
    Logout(login::LogoutArgs),
    /// Check this node, or the way to an image
    Doctor(doctor::DoctorArgs),
    /// Show the devices of this node, and what of them a container would get
    Devices(devices::DevicesArgs),
    /// Print what happened since the node was booted, in Prometheus' text format
    Metrics(metrics::MetricsArgs),
    /// Remove layers that no job uses from the store
    Gc(gc::GcArgs),
    /// Write man pages and shell completions
    #[command(hide = true)]
    Generate(generate::GenerateArgs),
    #[command(flatten)]
    Enroot(enroot::Command),
}

/// Entry point of the `pyxis` executable.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    match Path::new(&name).file_name().map(OsStrExt::as_bytes) {
        Some(role) if role == BROKER.as_bytes() => crate::broker::main(arguments.next().map(PathBuf::from)),
        Some(role) if role == IMPORTER.as_bytes() => crate::broker::import::importer_role(arguments),
        Some(role) if role == CREDENTIALS.as_bytes() => crate::broker::import::credentials_role(arguments),
        Some(role) if role == SQUASHFUSE.as_bytes() => crate::broker::import::squashfuse_role(arguments),
        Some(role) if role == SOURCE.as_bytes() => crate::broker::import::source_role(arguments),
        Some(role) if role == INVENTORY.as_bytes() => crate::broker::import::inventory_role(arguments),
        Some(role) if role == ACCOUNT.as_bytes() => crate::broker::import::account_role(arguments),
        Some(role) if role == SAVER.as_bytes() => crate::export::saver::main(arguments),
        Some(name) if name == ENROOT.as_bytes() => enroot::main(),
        Some(role) if role == ENROOT_MOUNT.as_bytes() => crate::hooks::mount::main(arguments),
        Some(role) if role == EPILOG.as_bytes() => container::collect::epilog_role(arguments),
        Some(role) if role == RELEASE.as_bytes() => crate::broker::import::release_role(arguments),
        Some(role) if role == MEANING.as_bytes() => meaning::main(arguments),
        Some(role) if role == RENDEZVOUS.as_bytes() => rendezvous::main(arguments),
        Some(role) if role == GUEST.as_bytes() => crate::broker::import::guest_role(arguments),
        _ => typed(),
    }
}

/// A command that somebody typed.
fn typed() -> ExitCode {
    match enroot::bundled::own() {
        None => {}
        Some(Ok(bundle)) => return enroot::bundled::main(&bundle),
        Some(Err(error)) => {
            eprintln!("[ERROR] {}", crate::sys::reason(error));
            return ExitCode::FAILURE;
        }
    }
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) if first_word().is_some_and(|word| enroot::is_command(&word)) => return enroot::usage(&error),
        Err(error) => error.exit(),
    };
    let json = arguments.command.is_json();
    let result = match arguments.command {
        Command::Run(run) => run::run(&run, &arguments.config),
        Command::Pull(pull) => pull::run(&pull, &arguments.config),
        Command::Inspect(inspect) => inspect::run(&inspect, &arguments.config),
        Command::Login(login) => login::login(&login, &arguments.config),
        Command::Logout(logout) => login::logout(&logout, &arguments.config),
        Command::Generate(generate) => generate::run(&generate),
        Command::Doctor(doctor) => doctor::run(&doctor, &arguments.config),
        Command::Devices(devices) => devices::run(&devices, &arguments.config),
        Command::Metrics(metrics) => metrics::run(&metrics, &arguments.config),
        Command::Gc(gc) => collect(&gc, &arguments.config),
        Command::Enroot(command) => return enroot::run(command, &arguments.config, enroot::CalledAs::Pyxis),
    };
    result.unwrap_or_else(|error| {
        eprintln!("pyxis: {error}");
        if json {
            println!("{}", serde_json::json!({ "error": error.to_string() }));
        }
        ExitCode::FAILURE
    })
}

impl Command {
    /// Whether the result is for a program.
    fn is_json(&self) -> bool {
        match self {
            Self::Pull(args) => args.json,
            Self::Inspect(args) => args.json,
            Self::Login(args) => args.json,
            Self::Logout(args) => args.json,
            Self::Doctor(args) => args.json,
            Self::Devices(args) => args.json,
            Self::Gc(args) => args.json,
            Self::Run(_) | Self::Metrics(_) | Self::Generate(_) | Self::Enroot(_) => false,
        }
    }
}

/// The subcommand, as far as it can be told from a command line with mistakes in it.
fn first_word() -> Option<OsString> {
    let mut words = std::env::args_os().skip(1);
    while let Some(word) = words.next() {
        if word == "--config" {
            words.next();
        } else if !word.as_bytes().starts_with(b"-") {
            return Some(word);
        }
    }
    None
}

fn collect(args: &gc::GcArgs, config: &Path) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let config = Config::load(config)?;
    let store = Store::open(&config.store.path)?;
    let mounts = LayerMounts::open(&config.runtime.path)?;
    let in_use = InUse::new(&mounts, &config.container.path);
    let collected = container::collect::collect(&config.container.path, &config.runtime.path, args.dry_run);
    gc::run(args, &store, config.store.watermarks, &in_use, collected)
}
