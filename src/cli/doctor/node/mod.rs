//! `pyxis doctor --node`: whether this node can run containers, for the programs that decide whether it gets jobs.
//!
//! Asks no registry and changes nothing. Each check has a process and a moment of its own: a file system that does not
//! answer costs its check, not the node checker.

mod host;
mod slurm;
mod store;

use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use serde::Serialize;

use super::{Check, Status};
use crate::cli::bounded;
use crate::config::Config;

/// How long a check may take.
const LIMIT: Duration = Duration::from_secs(2);

/// For the man page and the help.
pub const EXIT_CODES: &str = "\
Exit status of pyxis doctor --node:
  0  healthy: containers start, and nothing stands out
  3  degraded: containers start, some of them not, slower, or not for long
  4  unusable: no container starts
  1  the node could not be checked
  2  the command line is wrong";

/// What it all means for the node, worst last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
enum Health {
    Healthy,
    Degraded,
    Unusable,
}

impl Health {
    fn of(checks: &[Check]) -> Self {
        let health = |check: &Check| match check.status {
            Status::Ok | Status::Unknown => Self::Healthy,
            Status::Warning => Self::Degraded,
            Status::Failed => Self::Unusable,
        };
        checks.iter().map(health).max().unwrap_or(Self::Healthy)
    }

    fn code(self) -> u8 {
        match self {
            Self::Healthy => 0,
            Self::Degraded => 3,
            Self::Unusable => 4,
        }
    }

    fn word(self) -> &'static str {
        match self {
            Self::Healthy => "healthy",
            Self::Degraded => "degraded",
            Self::Unusable => "unusable",
        }
    }
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    health: Health,
    checks: &'a [Check],
}

/// Runs the checks and prints what they found.
pub fn run(json: bool, path: &Path) -> Result<ExitCode, Box<dyn std::error::Error>> {
    let checks = checks(path);
    let health = Health::of(&checks);
    if json {
        println!("{}", serde_json::to_string(&Report { health, checks: &checks })?);
    } else {
        checks.iter().for_each(|check| println!("{}", check.line()));
        println!("{}", health.word());
    }
    Ok(ExitCode::from(health.code()))
}

fn checks(path: &Path) -> Vec<Check> {
    let (check, answered) = bounded("configuration", || host::configuration(path));
    let valid = check.status == Status::Ok;
    let mut checks = vec![check];
    if !answered {
        return checks;
    }
    // It answered a moment ago. The other checks are about the defaults if it is wrong.
    let config = if valid { Config::load(path).unwrap_or_default() } else { Config::default() };
    let all: &[(&str, &dyn Fn() -> Check)] = &[
        ("import account", &|| host::account(&config)),
        ("store", &|| store::store(&config)),
        ("store locks", &|| store::locks(&config)),
        ("leftovers", &|| store::leftovers(&config)),
        ("runtime directory", &|| store::runtime(&config)),
        ("stale mounts", &|| store::stale_mounts(&config)),
        ("user namespaces", &host::user_namespaces),
        ("root filesystem", &|| store::root_filesystem(&config)),
        ("named containers", &|| store::named_containers(&config)),
        ("FUSE", &|| host::fuse(config.squashfs.mode, Path::new("/dev/fuse"))),
        ("certificates", &|| host::certificates(&config)),
        ("devices", &|| host::devices(&config)),
        ("plugin", &|| slurm::plugin(path)),
        ("Slurm", &slurm::release),
    ];
    checks.extend(all.iter().map(|(name, check)| bounded(name, check).0));
    checks
}

/// The check, and whether it is more than that there was no answer.
fn bounded(name: &str, check: impl FnOnce() -> Check) -> (Check, bool) {
    match bounded::run(LIMIT, check) {
        Ok(Some(check)) => (check, true),
        Ok(None) => {
            let detail = format!("no answer within {} s", LIMIT.as_secs());
            let remedy = "a file system that it needs may be dead: see the kernel's log";
            (Check::bad(name, Status::Failed, detail, remedy), false)
        }
        Err(error) => {
            (Check::bad(name, Status::Failed, format!("the check ended: {}", crate::sys::reason(error)), ""), false)
        }
    }
}

/// What only root can see.
fn not_looked_at(name: &str) -> Check {
    Check::bad(name, Status::Unknown, "not looked at", "run it as root")
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worst_check_decides() {
        let of = |statuses: &[Status]| {
            let checks: Vec<Check> = statuses.iter().map(|status| Check::bad("x", *status, "", "")).collect();
            Health::of(&checks).code()
        };
        use Status::{Failed, Ok, Unknown, Warning};
        assert_eq!([of(&[Ok, Unknown]), of(&[Ok, Warning, Ok]), of(&[Failed, Warning])], [0, 3, 4]);
        for code in ["  0  healthy", "  3  degraded", "  4  unusable"] {
            assert!(EXIT_CODES.contains(code));
        }
    }

    #[test]
    fn a_check_that_dies_or_hangs_is_one_that_failed() {
        let (check, answered) = bounded("x", || std::process::exit(0));
        assert_eq!((check.status, answered), (Status::Failed, false));
        assert_eq!(bounded("x", || Check::ok("x", "")).0.status, Status::Ok);
    }
}
