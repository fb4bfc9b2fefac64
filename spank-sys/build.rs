//! Runs bindgen over `include/wrapper.h`.

use std::panic;
use std::path::{Path, PathBuf};
use std::process::exit;

const HEADER: &str = "../include/wrapper.h";

fn main() {
    println!("cargo::rerun-if-changed={HEADER}");
    let root = PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let out = PathBuf::from(std::env::var_os("OUT_DIR").unwrap_or_default());
    let header = root.join(HEADER);

    // bindgen panics, rather than returning an error, where libclang itself is missing.
    let generated = panic::catch_unwind(|| bindings(&header));
    let bindings = match generated {
        Ok(Ok(bindings)) => bindings,
        Ok(Err(error)) => fail(
            &format!("cannot read <slurm/spank.h>: {}", error.to_string().trim_end()),
            "install Slurm's headers (Debian: apt-get install libslurm-dev; RPM: slurm-devel), or name their folder in \
             BINDGEN_EXTRA_CLANG_ARGS=-I/path/to/include",
        ),
        Err(_) => fail("libclang is missing", "install it (Debian: apt-get install libclang-dev; RPM: clang-devel)"),
    };
    if let Err(error) = bindings.write_to_file(out.join("bindings.rs")) {
        fail(&format!("cannot write the bindings: {error}"), "check the disk space of the target directory");
    }
}

fn bindings(header: &Path) -> Result<bindgen::Bindings, bindgen::BindgenError> {
    bindgen::Builder::default()
        .header(header.to_string_lossy())
        .allowlist_function("spank_.*|slurm_(error|info|verbose|debug|spank_log)")
        .allowlist_type("spank_.*")
        .allowlist_var("SLURM_VERSION_NUMBER|SPANK_OPTION_MAXLEN")
        .prepend_enum_name(false)
        .generate_comments(false)
        .layout_tests(false)
        .formatter(bindgen::Formatter::None)
        .parse_callbacks(Box::new(bindgen::CargoCallbacks::new()))
        .generate()
}

fn fail(problem: &str, remedy: &str) -> ! {
    eprintln!("spank-sys: {problem}");
    eprintln!("spank-sys: {remedy}");
    exit(1);
}
