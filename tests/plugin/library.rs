//! The file itself.

use std::collections::BTreeSet;
use std::process::Command;

use super::{plugin, run};

fn nm(arguments: &[&str]) -> Vec<String> {
    let (output, text) = run(Command::new("nm").args(arguments).arg(plugin()), "binutils");
    assert!(output.status.success(), "{text}");
    text.lines().filter_map(|line| line.split_whitespace().next_back()).map(str::to_owned).collect()
}

#[test]
fn it_exports_the_hooks_and_nothing_else() {
    let exported: BTreeSet<String> = nm(&["--dynamic", "--defined-only"]).into_iter().collect();
    let expected = [
        "plugin_name",
        "plugin_type",
        "plugin_version",
        "slurm_spank_exit",
        "slurm_spank_init",
        "slurm_spank_init_post_opt",
        "slurm_spank_job_epilog",
        "slurm_spank_local_user_init",
        "slurm_spank_task_exit",
        "slurm_spank_task_init",
        "slurm_spank_task_init_privileged",
        "slurm_spank_user_init",
    ];
    assert_eq!(exported, expected.into_iter().map(str::to_owned).collect());
}

/// Rust links with `-z now`: one function that a release lacks, and the whole library would not load.
#[test]
fn it_needs_no_symbol_of_slurm() {
    let needed = nm(&["--dynamic", "--undefined-only"]);
    let slurm: Vec<_> = needed.iter().filter(|name| name.contains("slurm") || name.contains("spank")).collect();
    assert!(!needed.is_empty() && slurm.is_empty(), "{slurm:?}");

    let (_, text) = run(Command::new("readelf").arg("--dynamic").arg(plugin()), "binutils");
    let libraries: BTreeSet<_> = text
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| line.split_once('[').and_then(|(_, rest)| rest.split_once(']')))
        .map(|(name, _)| name)
        .collect();
    let expected = ["libc.so.6", "libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libdl.so.2"];
    assert!(libraries.iter().all(|name| expected.contains(name)), "{libraries:?}");
}

/// What the packages say they need (`packaging/deb/control`): Debian 12, Ubuntu 22.04, RHEL 9 have it.
#[test]
fn they_load_with_a_c_library_of_2_34() {
    let control = include_str!("../../packaging/deb/control");
    assert!(control.contains("libc6 (>= 2.34)"), "{control}");
    for file in [plugin(), env!("CARGO_BIN_EXE_pyxis").into()] {
        let (output, text) = run(Command::new("objdump").arg("--dynamic-syms").arg(&file), "binutils");
        assert!(output.status.success(), "{text}");
        let versions = text.split("GLIBC_2.").skip(1).map(|rest| {
            let minor = rest.split(|byte: char| !byte.is_ascii_digit()).next().unwrap_or_default();
            minor.parse::<u32>().unwrap()
        });
        let highest = versions.max().unwrap();
        assert!(highest <= 34, "{} needs glibc 2.{highest}", file.display());
    }
}

/// It is mapped into every `srun` and `slurmd`, as root in some: the code that talks to networks and reads images
/// belongs to the executable.
#[test]
fn it_holds_no_network_archive_or_crypto_code() {
    // Symbols, which a release build has not.
    let symbols = nm(&["--defined-only"]);
    for part in [
        "6rustls",
        "ring_core",
        "4ring",
        "4ureq",
        "6flate2",
        "7zlib_rs",
        "ZSTD_",
        "4zstd",
        "4sha2",
        "4clap",
        "4toml",
        "8landlock",
        "12serde_saphyr",
        "13granit_parser",
        "12nvml_wrapper",
        "10libloading",
        "spank_pyxis8registry",
        "spank_pyxis8importer",
        "spank_pyxis5store",
        "spank_pyxis5erofs",
        "spank_pyxis6import",
        "spank_pyxis6broker",
        "spank_pyxis3cli",
    ] {
        let found: Vec<_> = symbols.iter().filter(|symbol| symbol.contains(part)).take(3).collect();
        assert!(found.is_empty(), "{part}: {found:?}");
    }
    // Source paths in the messages of panics, which every build has.
    let text = String::from_utf8_lossy(&stripped()).into_owned();
    assert!(text.contains("/serde_json-"), "not even the paths that should be there");
    for part in [
        "rustls",
        "ring",
        "ureq",
        "flate2",
        "zlib-rs",
        "zstd",
        "zstd-safe",
        "sha2",
        "clap_builder",
        "toml",
        "nvml-wrapper",
    ] {
        assert!(!text.contains(&format!("/{part}-")), "{part}");
    }
}

#[test]
fn it_is_small() {
    // Not optimised: what is installed is smaller. With debug information the compiler leaves in a little more code.
    let size = stripped().len();
    assert!(size < 3 << 20, "{size} bytes");
}

/// `pyxis` holds the same hooks, being made of the same library. They are not for others to find, and it runs where
/// there is no Slurm.
#[test]
fn the_executable_neither_offers_nor_needs_them() {
    for which in ["--defined-only", "--undefined-only"] {
        let (output, text) =
            run(Command::new("nm").args(["--dynamic", which]).arg(env!("CARGO_BIN_EXE_pyxis")), "binutils");
        assert!(output.status.success() && !text.contains("slurm") && !text.contains("spank"), "{text}");
    }
}

fn stripped() -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().unwrap();
    let (output, text) = run(Command::new("strip").arg("-o").arg(file.path()).arg(plugin()), "binutils");
    assert!(output.status.success(), "{text}");
    std::fs::read(file.path()).unwrap()
}
