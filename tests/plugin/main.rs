//! `spank_pyxis.so` as Slurm meets it: what it exports and drags in, how it behaves in a stand-in for Slurm's processes
//! (`host.c`), and what the real `srun` and `sbatch` make of it. No daemon is needed.

mod commands;
mod host;
mod library;

use std::path::PathBuf;
use std::process::{Command, Output};

/// The plugin that cargo has built along with these tests.
fn plugin() -> PathBuf {
    let path = testbed::install::Build::of(env!("CARGO_BIN_EXE_pyxis")).plugin;
    assert!(path.exists(), "{} is missing: cargo test --test plugin", path.display());
    path
}

/// Standard output and error of a program, which must be there.
fn run(command: &mut Command, package: &str) -> (Output, String) {
    let output = command.output().unwrap_or_else(|error| {
        panic!("{}: {error}: apt-get install {package}", command.get_program().to_string_lossy())
    });
    let text = [&output.stdout[..], &output.stderr[..]].concat();
    (output, String::from_utf8(text).expect("UTF-8"))
}
