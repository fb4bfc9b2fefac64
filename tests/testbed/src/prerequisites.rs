//! What has to be installed, and the command that installs it.

use std::path::Path;

use anyhow::{Result, bail};

use crate::install;

/// `package program-or-file [build]` lines; `packaging/` and the Makefile install from the same list.
const PACKAGES: &str = include_str!("../packages");

/// The executable `name` in `PATH` or where Debian keeps administrators' programs.
pub fn find_program(name: &str) -> Option<std::path::PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(Into::into))
        .map(|directory| directory.join(name))
        .find(|candidate| candidate.is_file())
}

/// Fails, with the command that helps, unless everything on the list is there and this is root.
pub fn check() -> Result<()> {
    let nothing_is_built = install::is_package();
    let missing: Vec<_> = entries()
        .filter(|entry| !(entry.builds && nothing_is_built))
        .filter(|entry| match entry.needed.starts_with('/') {
            true => !Path::new(entry.needed).exists(),
            false => find_program(entry.needed).is_none(),
        })
        .map(|entry| entry.package)
        .collect();
    if !missing.is_empty() {
        bail!("the testbed needs more packages: apt-get install -y --no-install-recommends {}", missing.join(" "));
    }
    if !nix::unistd::geteuid().is_root() {
        bail!("the testbed starts daemons and makes mounts: run it as root");
    }
    Ok(())
}

struct Entry {
    package: &'static str,
    /// A program's name or a file's path.
    needed: &'static str,
    /// For building only.
    builds: bool,
}

fn entries() -> impl Iterator<Item = Entry> {
    PACKAGES.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let mut fields = line.split_whitespace();
        Some(Entry { package: fields.next()?, needed: fields.next()?, builds: fields.next() == Some("build") })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_complete_on_this_machine() {
        assert!(entries().count() > 10);
        check().unwrap();
    }

    #[test]
    fn finds_programs() {
        assert!(find_program("sh").is_some());
        assert!(find_program("no-such-program").is_none());
    }
}
