//! `mounts.d/*.fstab`: what the administrator and the user mount in every container (behaviour reference, sections 10.3
//! and 14.1).

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};

use super::substitute::Variables;
use crate::mounts::defaults::default_mounts;
use crate::mounts::fstab::{self, Fstab, FstabError, Pass};
use crate::sys;

/// The files by which enroot's package brings the default mounts: an administrator who has one of them, changed or
/// empty, decides which mounts are default.
const DEFAULT_FILES: [&str; 2] = ["10-system.fstab", "20-config.fstab"];
/// Most files of one directory.
const MAX_FILES: usize = 1000;

/// Mounts that cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum MountsError {
    /// A file or directory.
    #[error("cannot read {}: {}", .path.display(), sys::reason(.cause))]
    Read {
        /// Which.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A line.
    #[error(transparent)]
    Fstab(#[from] FstabError),
}

/// The mounts of the directories `system` and `user`, in order; the built-in ones come first unless `system` has files
/// of its own in their place. `variable` is what `${NAME}` stands for.
pub fn read(system: &Path, user: &Path, variable: Variables<'_>) -> Result<Fstab, MountsError> {
    let mut fstab = Fstab::default();
    let system = system.join("mounts.d");
    if !DEFAULT_FILES.iter().any(|name| system.join(name).exists()) {
        fstab.entries.extend(default_mounts().map(|entry| (Pass::BeforeHooks, entry)));
    }
    add_directory(&mut fstab, &system, variable)?;
    match add_directory(&mut fstab, &user.join("mounts.d"), variable) {
        // A home directory that the user cannot enter is none for enroot.
        Err(MountsError::Read { path, cause }) if cause.kind() == io::ErrorKind::PermissionDenied => {
            fstab.warnings.push(format!("cannot read {}: {}", path.display(), sys::reason(cause)));
            Ok(fstab)
        }
        other => other.map(|()| fstab),
    }
}

fn add_directory(fstab: &mut Fstab, directory: &Path, variable: Variables<'_>) -> Result<(), MountsError> {
    let failed = |(path, cause)| MountsError::Read { path, cause };
    for path in super::files_in(directory, "fstab", MAX_FILES).map_err(failed)? {
        let content = super::read_file(&path, fstab::MAX_FILE).map_err(|cause| failed((path.clone(), cause)))?;
        if let Some((text, _)) = content {
            fstab.extend(Fstab::parse(&String::from_utf8_lossy(&text), &path.to_string_lossy(), Some(variable))?);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn targets(fstab: &Fstab) -> Vec<(Pass, &str)> {
        fstab.entries.iter().map(|(pass, entry)| (*pass, entry.target.as_str())).collect()
    }

    #[test]
    fn system_then_user_and_the_defaults_unless_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let (system, user) = (directory.path().join("etc"), directory.path().join("user"));
        let none = |_: &str| None;
        let builtin = default_mounts().count();
        assert_eq!(read(&system, &user, &none).unwrap().entries.len(), builtin);

        for (place, name, text) in [
            (&system, "30-site.fstab", "/b\n/early /early none bind 0 -1"),
            (&system, "20-first.fstab", "/a"),
            (&system, "40-no.txt", "/never"),
            (&user, "10-mine.fstab", "/mine"),
        ] {
            fs::create_dir_all(place.join("mounts.d")).unwrap();
            fs::write(place.join("mounts.d").join(name), text).unwrap();
        }
        use Pass::{AfterHooks, BeforeHooks};
        let expected = [(AfterHooks, "/a"), (AfterHooks, "/b"), (BeforeHooks, "/early"), (AfterHooks, "/mine")];
        assert_eq!(targets(&read(&system, &user, &none).unwrap())[builtin..], expected);

        fs::write(system.join("mounts.d/10-system.fstab"), "").unwrap();
        assert_eq!(targets(&read(&system, &user, &none).unwrap()), expected);

        fs::write(user.join("mounts.d/20-bad.fstab"), "tmpfs\n").unwrap();
        let error = read(&system, &user, &none).unwrap_err().to_string();
        assert!(error.contains("invalid fstab entry: \"tmpfs\" at ") && error.ends_with("20-bad.fstab"), "{error}");
    }
}
