//! The `pyxis` executable: the commands people type, and the internal roles that the plugin starts.

fn main() -> std::process::ExitCode {
    spank_pyxis::cli::main()
}
