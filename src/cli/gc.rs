//! `pyxis gc`: makes room in the layer store.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use crate::container::collect::Collected;
use crate::store::{CollectReport, Goal, PinnedMounts, Store, Watermarks, count, size};

/// Remove layers that no job uses from the store.
///
/// Without --all, layers go only if the store is beyond its high watermark, the longest unused first, until it is down
/// to the low one. Leftovers of killed imports and of containers that are not whole always go.
#[derive(Debug, Clone, clap::Args)]
pub struct GcArgs {
    /// Remove every layer that no job uses
    #[arg(long)]
    pub all: bool,
    /// Only say what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
}

/// For the man page.
pub const JSON: &str = "\
One object:
  removed          digests of the layers removed, the longest unused first
  freed_bytes      bytes that they took
  kept_layers      layers that stay, with those in use
  kept_bytes       bytes that they take
  in_use_layers    layers that should go, and are in use
  removed_records  leftovers and forgotten records removed
  problems         list of lines: what could not be removed";

/// Runs the command. Prints the report; the error is one line for the caller to print.
pub fn run(
    args: &GcArgs,
    store: &Store,
    watermarks: Watermarks,
    pinned: &dyn PinnedMounts,
    containers: Collected,
) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let goal = if args.all { Goal::Everything } else { Goal::Watermarks(watermarks) };
    let mut report = store.collect(goal, pinned, args.dry_run)?;
    report.removed_records += containers.leftovers;
    report.problems.extend(containers.problems);
    if args.json {
        println!("{}", serde_json::to_string(&report)?);
    } else {
        print!("{}", describe(&report, args.dry_run));
    }
    Ok(if report.problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn describe(report: &CollectReport, dry_run: bool) -> String {
    let CollectReport { removed, freed_bytes, kept_layers, kept_bytes, in_use_layers, removed_records, problems } =
        report;
    let (verb, freed) = if dry_run { ("would remove", "free") } else { ("removed", "freed") };
    let mut text = format!("{verb} {}, {freed} {}", count(removed.len(), "layer"), size(*freed_bytes));
    if *removed_records > 0 {
        text += &format!(", and {}", count(*removed_records, "leftover"));
    }
    text += &format!("\nkept {} with {}", count(*kept_layers, "layer"), size(*kept_bytes));
    if *in_use_layers > 0 {
        text += &format!("; in use: {in_use_layers} that should go");
    }
    text.push('\n');
    for problem in problems {
        text += &format!("{problem}\n");
    }
    text
}
