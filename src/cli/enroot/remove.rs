//! `enroot remove`: deletes root filesystems, after asking.

use std::ffi::OsString;
use std::io::{self, BufRead, Write};
use std::process::ExitCode;

use super::known::Known;
use super::{Context, Error, say};

/// Delete container root filesystems.
#[derive(Debug, clap::Args)]
pub struct RemoveArgs {
    /// Do not ask
    #[arg(short, long)]
    force: bool,
    /// Names of containers
    #[arg(required = true, value_name = "NAME")]
    names: Vec<OsString>,
}

/// Runs the command. One that cannot be removed does not keep the others.
pub fn run(args: &RemoveArgs, context: &Context) -> Result<ExitCode, Error> {
    let known = Known::new(context);
    let force = args.force || context.settings.force_override();
    let mut code = ExitCode::SUCCESS;
    for name in &args.names {
        let outcome = known
            .find(name)
            .and_then(|path| if force || confirmed(&path.display().to_string()) { known.remove(name) } else { Ok(()) });
        if let Err(error) = outcome {
            say::error(error);
            code = ExitCode::FAILURE;
        }
    }
    Ok(code)
}

/// Asks; everything but a yes is a no.
fn confirmed(path: &str) -> bool {
    let mut stderr = io::stderr().lock();
    let asked = write!(stderr, "Do you really want to delete {path}? [y/N] ").and_then(|()| stderr.flush());
    let mut answer = String::new();
    let answered = asked.and_then(|()| io::stdin().lock().read_line(&mut answer));
    answered.is_ok() && matches!(answer.trim(), "y" | "Y" | "yes" | "Yes" | "YES")
}
