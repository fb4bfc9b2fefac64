//! The commands of enroot (behaviour reference, section 11), under their own names and as `enroot`: for users and their
//! scripts, on compute and login nodes alike. They need no privilege, no store and no daemon.
//!
//! One file each. Progress and errors go to standard error, results to standard output.

#![forbid(unsafe_code)]

mod asking;
mod bundle;
mod create;
mod digest;
mod engine;
mod exec;
mod export;
mod import;
mod info;
mod known;
mod list;
mod processes;
mod remove;
mod say;
mod settings;
mod start;

pub use asking::{Asking, is_a_no};
pub use bundle::bundled;

use std::ffi::OsStr;
use std::path::Path;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};

use crate::config::{self, Config, RegistryConfig};
use crate::enroot::conf::{EnrootConf, Identity};
use crate::image::reference::ImageReference;
use crate::request::Environment;

/// The version whose behaviour the commands have.
const ENROOT_VERSION: &str = "4.2.0";

/// What may go wrong: one line.
type Error = Box<dyn std::error::Error>;

/// As whom somebody called us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CalledAs {
    /// `pyxis COMMAND`
    Pyxis,
    /// `enroot COMMAND`
    Enroot,
}

/// Simple containers without privileges.
#[derive(Debug, Parser)]
#[command(name = "enroot", max_term_width = 100)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Import an image into a squashfs file
    Import(import::ImportArgs),
    /// Import an image into a container root filesystem
    Load(import::LoadArgs),
    /// Create a container root filesystem from an image
    Create(create::CreateArgs),
    /// Print the digest of an image
    Digest(digest::DigestArgs),
    /// Start a container and run a command in it
    Start(start::StartArgs),
    /// Execute a command inside a container that runs
    Exec(exec::ExecArgs),
    /// Create an image from a container root filesystem
    Export(export::ExportArgs),
    /// List container root filesystems
    List(list::ListArgs),
    /// Delete container root filesystems
    Remove(remove::RemoveArgs),
    /// Show the settings in force
    Info,
    /// Print the version
    Version,
    /// Create a self-extracting bundle from an image: an executable that is a container
    Bundle(bundle::BundleArgs),
    /// Start a container as a configuration script says
    Batch(start::BatchArgs),
}

/// What every command works with.
#[derive(Debug)]
pub struct Context {
    /// Registries and limits of the site.
    pub config: Config,
    /// `ENROOT_*`.
    settings: EnrootConf,
    /// The process's.
    pub environment: Environment,
    /// Who runs the command.
    identity: Identity,
}

impl Context {
    /// For a command that was just started, with the configuration at `path`.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let environment: Environment = std::env::vars_os().map(|(name, value)| settings::join(name, value)).collect();
        let (config, identity) = (Config::load(path)?, settings::identity()?);
        let settings = settings::load(&config, &environment, &identity)?;
        Ok(Self { config, settings, environment, identity })
    }

    /// How the registry of `reference` is reached.
    pub fn registries(&self, reference: &ImageReference) -> RegistryConfig {
        settings::registries(self.config.registries(), &self.settings, reference)
    }

    /// The user's home directory.
    pub fn home(&self) -> &Path {
        Path::new(self.environment.get_str("HOME").unwrap_or(&self.identity.home))
    }
}

/// Whether `word` is a command of enroot's.
pub fn is_command(word: &OsStr) -> bool {
    let word = word.to_str();
    Arguments::command().get_subcommands().any(|command| Some(command.get_name()) == word)
}

/// Prints help, or what is wrong with a command line and how it should be: to that, scripts expect exit code 1.
pub fn usage(error: &clap::Error) -> ExitCode {
    // Nobody is there to be told that nobody listens.
    let _ = error.print();
    if error.use_stderr() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// The executable, called as `enroot`.
pub fn main() -> ExitCode {
    match Arguments::try_parse() {
        Ok(arguments) => run(arguments.command, Path::new(config::DEFAULT_PATH), CalledAs::Enroot),
        Err(error) => usage(&error),
    }
}

/// Runs one command.
pub fn run(command: Command, config: &Path, called_as: CalledAs) -> ExitCode {
    say::follow_the_registry();
    dispatch(command, config, called_as).unwrap_or_else(|error| {
        say::error(error);
        ExitCode::FAILURE
    })
}

fn dispatch(command: Command, config: &Path, called_as: CalledAs) -> Result<ExitCode, Error> {
    let context = || Context::load(config);
    match command {
        Command::Import(args) => import::import(&args, &context()?),
        Command::Load(args) => import::load(&args, &context()?),
        Command::Create(args) => create::run(&args, &context()?),
        Command::Digest(args) => digest::run(&args, &context()?),
        Command::Start(args) => start::run(&args, &context()?),
        Command::Exec(args) => exec::run(&args, &context()?),
        Command::Export(args) => export::run(&args, &context()?),
        Command::List(args) => list::run(&args, &context()?),
        Command::Remove(args) => remove::run(&args, &context()?),
        Command::Info => info::run(&context()?),
        Command::Version => {
            match called_as {
                CalledAs::Pyxis => say::line(format_args!("pyxis {}", env!("CARGO_PKG_VERSION")))?,
                CalledAs::Enroot => say::line(ENROOT_VERSION)?,
            }
            Ok(ExitCode::SUCCESS)
        }
        Command::Bundle(args) => bundle::create(&args, &context()?),
        Command::Batch(args) => start::batch(&args, &context()?),
    }
}
