//! Environ files: `/etc/environment` of images that enroot made, `environ.d/*.env` of the site and the user, and what
//! hooks append (behaviour reference, section 16.1).

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use super::substitute::{Variables, is_name, substitute};
use crate::request::Environment;
use crate::sys;

/// Most bytes of one file: more than a program's environment may have.
pub const MAX_FILE: u64 = 4 << 20;
/// Most files of one directory.
const MAX_FILES: usize = 1000;

/// A file or directory that cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {}: {}", .path.display(), sys::reason(.cause))]
pub struct EnvironError {
    path: PathBuf,
    cause: io::Error,
}

/// Reads lines and sets what they assign in `environment`: the last assignment counts. `variable` is what `${NAME}` stands
/// for, if that means anything.
pub fn assign(environment: &mut Environment, text: &[u8], variable: Option<Variables<'_>>) {
    let mut strings: Vec<Vec<u8>> = environment.iter().map(|(name, value)| [name, b"=", value].concat()).collect();
    for line in text.split(|&byte| byte == b'\n') {
        let line = match variable {
            Some(variable) => &substitute(line, variable),
            None => line,
        };
        strings.extend(clean(line).map(|(name, value)| [name, b"=", value].concat()));
    }
    *environment = strings.into_iter().collect();
}

/// Sets what the files of `environ.d` below `system`, then below `user`, assign. Gives what is to be logged.
pub fn assign_directories(
    environment: &mut Environment,
    system: &Path,
    user: &Path,
    variable: Variables<'_>,
) -> Result<Option<String>, EnvironError> {
    assign_directory(environment, &system.join("environ.d"), variable)?;
    match assign_directory(environment, &user.join("environ.d"), variable) {
        // A home directory that the user cannot enter is none for enroot.
        Err(error) if error.cause.kind() == io::ErrorKind::PermissionDenied => Ok(Some(error.to_string())),
        other => other.map(|()| None),
    }
}

fn assign_directory(
    environment: &mut Environment,
    directory: &Path,
    variable: Variables<'_>,
) -> Result<(), EnvironError> {
    for path in super::files_in(directory, "env", MAX_FILES).map_err(|(path, cause)| EnvironError { path, cause })? {
        match super::read_file(&path, MAX_FILE) {
            Ok(Some((text, _))) => assign(environment, &text, Some(variable)),
            Ok(None) => {}
            Err(cause) => return Err(EnvironError { path, cause }),
        }
    }
    Ok(())
}

/// Name and value of a line; `None` if it assigns nothing that an environment can hold.
fn clean(line: &[u8]) -> Option<(&[u8], &[u8])> {
    // A value's own blanks at its end are kept, unless it is quoted.
    let line = line.strip_suffix(b"\r").unwrap_or(line).trim_ascii_start();
    let split = line.iter().position(|&byte| byte == b'=')?;
    let (name, value) = (line.get(..split)?, line.get(split + 1..)?);
    if !is_name(name) || name.starts_with(b"ENROOT_") || value.contains(&0) {
        return None;
    }
    let is_quote = |byte: &u8| matches!(byte, b'"' | b'\'');
    let quoted = value.trim_ascii_end();
    let inside = match quoted {
        [first, inside @ .., last] if is_quote(first) && is_quote(last) => inside,
        _ => value,
    };
    Some((name, inside))
}

/// The container's environment as the file that hooks read and append to; values of several lines are not in it.
pub fn to_lines(environment: &Environment) -> Vec<u8> {
    let fits = |(_, value): &(&[u8], &[u8])| !value.contains(&b'\n');
    environment.iter().filter(fits).flat_map(|(name, value)| [name, b"=", value, b"\n"].concat()).collect()
}

/// What the hooks have made of `environment`, from the file that [`to_lines`] wrote: they may set and remove.
pub fn after_hooks(environment: &Environment, before: &[u8], after: &[u8]) -> Environment {
    let (mut old, mut new) = (Environment::default(), Environment::default());
    assign(&mut old, before, None);
    assign(&mut new, after, None);
    let changes: HashMap<&[u8], Option<&[u8]>> = old.changes_to(&new).collect();
    // What was changed is set below.
    let kept = environment.iter().filter(|(name, _)| changes.get(name) != Some(&None));
    let set = changes.iter().filter_map(|(name, value)| Some((*name, (*value)?)));
    kept.chain(set).map(|(name, value)| [name, b"=", value].concat()).collect()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    fn variable(name: &str) -> Option<Vec<u8>> {
        (name == "HOME").then(|| b"/h".to_vec())
    }

    /// What one line sets.
    fn assigned(line: &str) -> Option<String> {
        let mut environment = Environment::default();
        assign(&mut environment, line.as_bytes(), Some(&variable));
        let set = environment.iter().next();
        set.map(|(name, value)| format!("{}={}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
    }

    #[test]
    fn reference_vectors() {
        for (line, expected) in [
            ("B=${HOME}/x", "B=/h/x"),
            ("C=$HOME/x", "C=$HOME/x"),
            ("D=${X:-y}", "D=${X:-y}"),
            ("E=${X}", "E="),
            ("F=\"quoted\"", "F=quoted"),
            ("F='q'", "F=q"),
            ("F=\"mixed'", "F=mixed"),
            ("G=\"only-left", "G=\"only-left"),
            ("  H=lead", "H=lead"),
            ("I=trail  ", "I=trail  "),
            ("J=\"q\"  ", "J=q"),
            ("K=a#b", "K=a#b"),
            ("L=\"\"", "L="),
            ("M=\"", "M=\""),
            ("N=a \"b\" c", "N=a \"b\" c"),
        ] {
            assert_eq!(assigned(line).as_deref(), Some(expected), "{line}");
        }
        for line in ["# c", "", "1A=x", "A-B=x", "NOEQ", "ENROOT_X=y", "=x", "A=\0", "export A=b"] {
            assert_eq!(assigned(line), None, "{line}");
        }
    }

    #[test]
    fn the_last_assignment_counts() {
        let mut environment = Environment::from_iter(["A=image", "B=image"]);
        assign(&mut environment, b"A=1\nC=\xff\nA=2\n", None);
        assert_eq!(environment.to_block(), b"A=2\0B=image\0C=\xff\0");
    }

    #[test]
    fn the_site_and_then_the_user() {
        let directory = tempfile::tempdir().unwrap();
        let (system, user) = (directory.path().join("etc"), directory.path().join("user"));
        let mut environment = Environment::from_iter(["A=image", "D=image"]);
        assert!(assign_directories(&mut environment, &system, &user, &variable).unwrap().is_none());
        for (place, name, text) in [
            (&system, "20.env", "A=20\nB=20\nC=20\n"),
            (&system, "10.env", "A=10\n"),
            (&system, "30.txt", "A=30\n"),
            (&user, "00.env", "C=${HOME}\n"),
        ] {
            fs::create_dir_all(place.join("environ.d")).unwrap();
            fs::write(place.join("environ.d").join(name), text).unwrap();
        }
        assert!(assign_directories(&mut environment, &system, &user, &variable).unwrap().is_none());
        assert_eq!(environment.to_block(), b"A=20\0D=image\0B=20\0C=/h\0");
        fs::create_dir(user.join("environ.d/50.env")).unwrap();
        let error = assign_directories(&mut environment, &system, &user, &variable).unwrap_err().to_string();
        assert!(error.ends_with("50.env: not a regular file"), "{error}");
    }

    #[test]
    fn hooks_append_change_and_remove() {
        let environment = Environment::from_block(b"A=1\0B=line\nbreak\0C=3\0Q=\"x\"\0");
        let before = to_lines(&environment);
        assert_eq!(before, b"A=1\nC=3\nQ=\"x\"\n");
        let same = after_hooks(&environment, &before, &before);
        assert_eq!(same, environment);
        let after = [b"A=2\n".as_slice(), b"Q=\"x\"\nNEW='y'\nENROOT_Z=1\nB=hook\n"].concat();
        let changed = after_hooks(&environment, &before, &after);
        assert_eq!(changed.changes_to(&Environment::from_block(b"A=2\0B=hook\0Q=\"x\"\0NEW=y\0")).count(), 0);
    }

    proptest! {
        #[test]
        fn any_bytes_are_judged(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let mut environment = Environment::default();
            assign(&mut environment, &text, Some(&variable));
            for (name, value) in environment.iter() {
                prop_assert!(is_name(name) && !value.contains(&0) && !value.contains(&b'\n'));
            }
        }
    }
}
