//! Site hooks: `hooks.d/*.sh` of the administrator and of the user, which enroot runs before a container has its root
//! (behaviour reference, section 17). They go on working: same order, same environment, same files to append to, same
//! helpers ([`mount`] is their `enroot-mount`, `common.sh` their library).
//!
//! What enroot's own hooks do is built in; files of their names are left alone.

mod hostlist;
pub mod mount;
pub mod oci;
pub mod pytorch;
mod runner;
pub mod workspace;

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::Access;

pub use runner::{Call, HookError, run};

use crate::sys;

/// The hooks that enroot ships, with its extras: what they do is done by container init itself.
const BUILT_IN: [&str; 12] = [
    "10-aptfix.sh",
    "10-cgroups.sh",
    "10-devices.sh",
    "10-home.sh",
    "10-localtime.sh",
    "10-shadow.sh",
    "50-mig-config.sh",
    "50-sharp.sh",
    "50-slurm-pmi.sh",
    "50-slurm-pytorch.sh",
    "98-nvidia.sh",
    "99-mellanox.sh",
];
/// Most files of one directory.
const MAX_FILES: usize = 1000;

/// The hooks to run, in order, and what is to be logged about others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Programs.
    pub programs: Vec<PathBuf>,
    /// One line for each file that is not run.
    pub skipped: Vec<String>,
    /// Names of the built-in ones that would be run: enroot's extras do nothing unless an administrator puts them there.
    pub built_in: Vec<&'static str>,
}

/// Finds the hooks below `system`, then those below `user`. Called as the user.
pub fn find(system: &Path, user: &Path) -> io::Result<Hooks> {
    let mut hooks = Hooks::default();
    for directory in [system, user].map(|directory| directory.join("hooks.d")) {
        let files = match crate::enroot::files_in(&directory, "sh", MAX_FILES) {
            // A home directory that the user cannot enter is none for enroot.
            Err((path, error)) if error.kind() == io::ErrorKind::PermissionDenied => {
                hooks.skipped.push(format!("cannot read {}: {}", path.display(), sys::reason(error)));
                continue;
            }
            Err((path, error)) => {
                let text = format!("cannot read {}: {}", path.display(), sys::reason(error));
                return Err(io::Error::other(text));
            }
            Ok(files) => files,
        };
        for path in files {
            let built_in = BUILT_IN.into_iter().find(|own| path.file_name().is_some_and(|name| name == *own));
            if !path.is_file() || rustix::fs::access(&path, Access::EXEC_OK).is_err() {
                hooks.skipped.push(format!("{}: not executable: not run", path.display()));
            } else if let Some(name) = built_in {
                hooks.skipped.push(format!("{}: built in: not run", path.display()));
                hooks.built_in.push(name);
            } else {
                hooks.programs.push(path);
            }
        }
    }
    Ok(hooks)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn system_hooks_then_the_users_if_executable_and_not_built_in() {
        let directory = tempfile::tempdir().unwrap();
        let (system, user) = (directory.path().join("etc"), directory.path().join("user"));
        assert_eq!(find(&system, &user).unwrap(), Hooks::default());
        for (place, name, mode) in [
            (&system, "20-b.sh", 0o755),
            (&system, "05-a.sh", 0o755),
            (&system, "30-off.sh", 0o644),
            (&system, "98-nvidia.sh", 0o755),
            (&system, "50-slurm-pytorch.sh", 0o644),
            (&system, "README", 0o755),
            (&user, "01-mine.sh", 0o700),
        ] {
            fs::create_dir_all(place.join("hooks.d")).unwrap();
            fs::write(place.join("hooks.d").join(name), "").unwrap();
            fs::set_permissions(place.join("hooks.d").join(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(user.join("hooks.d/50-dir.sh")).unwrap();
        let hooks = find(&system, &user).unwrap();
        let names: Vec<_> = hooks.programs.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
        assert_eq!(names, ["05-a.sh", "20-b.sh", "01-mine.sh"]);
        assert_eq!(hooks.skipped.len(), 4, "{:?}", hooks.skipped);
        assert_eq!(hooks.built_in, ["98-nvidia.sh"]);
    }
}
