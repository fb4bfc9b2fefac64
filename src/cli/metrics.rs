//! `pyxis metrics`: the node's counters for Prometheus, for its node exporter's textfile collector.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::config::Config;
use crate::metrics::{Gauge, render};
use crate::store::Store;

/// Print what happened since the node was booted, in Prometheus' text format
///
/// Starts of containers and how long they took, imports, bytes, layers that the store had or not, failures by kind; for
/// root also what is in the store.
#[derive(Debug, Clone, clap::Args)]
pub struct MetricsArgs {
    /// Write to this file, which is replaced as a whole: NAME.prom in the directory of node_exporter's textfile collector
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// Runs the command.
pub fn run(args: &MetricsArgs, config: &Path) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let config = Config::load(config)?;
    let runtime = &config.runtime.path;
    let text = render(runtime, &of_store(&config))
        .map_err(|error| format!("cannot read {}/metrics: {}", runtime.display(), crate::sys::reason(error)))?;
    match &args.output {
        None => print!("{text}"),
        Some(path) => replace(path, &text)
            .map_err(|error| format!("cannot write {}: {}", path.display(), crate::sys::reason(error)))?,
    }
    Ok(ExitCode::SUCCESS)
}

/// What is in the store, as far as this user may see it.
fn of_store(config: &Config) -> Vec<Gauge> {
    let Ok(Some(store)) = Store::examine(&config.store.path) else { return Vec::new() };
    let mut gauges = Vec::new();
    let mut add = |name, help, value| gauges.push(Gauge { name, help, value });
    if let Ok((layers, bytes)) = store.usage() {
        add("pyxis_store_layers", "Layers in the store.", layers);
        add("pyxis_store_bytes", "Bytes that they take.", bytes);
    }
    if let Ok(available) = store.available() {
        add("pyxis_store_available_bytes", "Bytes available on the store's file system.", available);
    }
    gauges
}

/// Whoever reads `path` meanwhile sees the old content or the new one.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let mut name = path.file_name().ok_or_else(|| std::io::Error::other("not the name of a file"))?.to_owned();
    name.push(format!(".{}", std::process::id()));
    let new = path.with_file_name(name);
    let written = fs::write(&new, text)
        .and_then(|()| fs::set_permissions(&new, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&new, path));
    if written.is_err() {
        let _ = fs::remove_file(&new);
    }
    written
}
