//! Configuration scripts of `enroot start --conf` (behaviour reference, sections 10.1 and 14): bash, with functions for
//! what a container is to have, and settings in comments.
//!
//! ```text
//! #ENROOT_ROOTFS_WRITABLE y
//! environ() { echo "NAME=VALUE"; }
//! mounts()  { echo "/scratch /scratch"; }
//! hooks()   { … }
//! rc()      { exec "$@"; }
//! ```
//!
//! The script is the user's own, and bash runs it as him.

#![forbid(unsafe_code)]

use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::conf::{EnrootConf, EnrootConfError, Identity};
use super::{HOST_PATH, os};
use crate::request::Environment;
use crate::sys;
use crate::sys::command::{Stream, capture};

/// How long a function may take that only prints.
const TIME: Duration = Duration::from_secs(60);
/// Most bytes that it may print.
const MAX_OUTPUT: usize = 1 << 20;
/// Most bytes of a script.
const MAX_SCRIPT: u64 = 1 << 20;

/// A script that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ScriptError {
    /// It cannot be read.
    #[error("{}: {}", sys::reason(.1), .0.display())]
    Read(PathBuf, #[source] io::Error),
    /// There is no bash.
    #[error("Command not found: bash (which --conf needs)")]
    NoBash,
    /// bash does not understand it: enroot's words.
    #[error("Invalid configuration file: {}", .0.display())]
    Invalid(PathBuf),
    /// A function failed.
    #[error("{}: {function}() failed{reason}", .path.display())]
    Function {
        /// The script.
        path: PathBuf,
        /// Which one.
        function: &'static str,
        /// After a colon; or nothing.
        reason: String,
    },
}

/// A script that bash understands.
#[derive(Debug, Clone)]
pub struct Script {
    path: PathBuf,
    text: String,
}

impl Script {
    /// Reads and checks the script at `path`.
    pub fn load(path: &Path) -> Result<Self, ScriptError> {
        let failed = |error| ScriptError::Read(path.to_owned(), error);
        let path = path.canonicalize().map_err(failed)?;
        let (text, _) = super::read_file(&path, MAX_SCRIPT)
            .map_err(failed)?
            .ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        let script = Self { path, text: String::from_utf8_lossy(&text).into_owned() };
        let mut check = Command::new("bash");
        check.env_clear().env("PATH", HOST_PATH).arg("-n").arg(&script.path);
        match capture(&mut check, Stream::Error, MAX_OUTPUT, TIME) {
            Ok(captured) if captured.status.is_some_and(|status| status.success()) => Ok(script),
            Ok(_) => Err(ScriptError::Invalid(script.path)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(ScriptError::NoBash),
            Err(error) => Err(failed(error)),
        }
    }

    /// The settings in its comments, evaluated as those of `enroot.conf`: they go before `environment`.
    pub fn settings(
        &self,
        environment: &Environment,
        identity: &Identity,
    ) -> Result<Vec<(String, String)>, EnrootConfError> {
        let mut without = environment.clone();
        let lines = self.text.lines().map(|line| match directive(line) {
            Some((key, rest)) => {
                without.remove(key);
                rest
            }
            // So that mistakes are on the line that they are on.
            None => "",
        });
        let text = lines.collect::<Vec<_>>().join("\n");
        // bash will run what else there is in it.
        let conf = EnrootConf::evaluate(&[(self.path.clone(), text, true)], &without, identity)?;
        Ok(conf.defined().map(|(key, value)| (key.to_owned(), value.to_owned())).collect())
    }

    /// What the function prints; nothing if the script has none of that name.
    pub fn output(&self, function: &'static str, environment: &Environment) -> Result<String, ScriptError> {
        let call = "if declare -F \"$1\" > /dev/null; then \"$1\"; fi";
        self.bash(function, call, environment)
    }

    /// A script that runs the function `rc`, if there is one.
    pub fn rc(&self, environment: &Environment) -> Result<Option<String>, ScriptError> {
        let text = self.bash("rc", "declare -f \"$1\" || true", environment)?;
        Ok((!text.trim().is_empty()).then(|| format!("{text}\nrc \"$@\"\n")))
    }

    /// A program that runs the function `hooks`, as its text, if there is one.
    pub fn hooks(&self, environment: &Environment) -> Result<Option<String>, ScriptError> {
        let text = self.bash("hooks", "declare -F \"$1\" || true", environment)?;
        let quoted = self.path.to_string_lossy().replace('\'', r"'\''");
        Ok((!text.trim().is_empty()).then(|| format!("#!/usr/bin/env bash\nsource '{quoted}'\nhooks\n")))
    }

    /// Runs `commands` after the script, with the name of `function` as their argument.
    fn bash(&self, function: &'static str, commands: &str, environment: &Environment) -> Result<String, ScriptError> {
        let failed = |reason: String| ScriptError::Function { path: self.path.clone(), function, reason };
        let mut command = Command::new("bash");
        command.env_clear().envs(environment.iter().map(|(name, value)| (os(name), os(value)))).env("PATH", HOST_PATH);
        let script = format!("source \"$0\" > /dev/null || exit; {commands}");
        command.arg("-c").arg(script).arg(&self.path).arg(function);
        let captured = capture(&mut command, Stream::Output, MAX_OUTPUT, TIME)
            .map_err(|error| failed(format!(": {}", sys::reason(error))))?;
        match captured.status {
            None => Err(failed(format!(": it did not end within {} seconds", TIME.as_secs()))),
            Some(status) if !status.success() => Err(failed(String::new())),
            Some(_) if captured.text.len() >= MAX_OUTPUT => Err(failed(": it prints too much".to_owned())),
            Some(_) => Ok(String::from_utf8_lossy(&captured.text).into_owned()),
        }
    }
}

/// The key of a comment that is a setting, and all of it.
fn directive(line: &str) -> Option<(&str, &str)> {
    let rest = line.strip_prefix('#')?.trim_start();
    let key = rest.split([' ', '\t', '=']).next()?;
    let name = key.strip_prefix("ENROOT_")?;
    let valid = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    valid.then_some((key, rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> (tempfile::TempDir, Result<Script, ScriptError>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("it's a script");
        std::fs::write(&path, text).unwrap();
        let script = Script::load(&path);
        (directory, script)
    }

    #[test]
    fn functions_and_settings() {
        let text = "#ENROOT_REMAP_ROOT yes\n# \tENROOT_ROOTFS  ${HOME}/x y \n#ENROOT_RESTRICT_DEV=no\n#ENROOT_X2 z\n# comment\nvalue=7\necho noise\n\
                    environ() { echo \"A=$value $HOST\"; }\nmounts() { false; }\nrc() { exec \"$@\"; }\nhooks() { :; }\n";
        let (_directory, script) = script(text);
        let script = script.unwrap();
        let environment: Environment = ["HOST=h", "ENROOT_ROOTFS=other", "HOME=/h"].iter().collect();
        let identity =
            Identity { uid: 1, gid: 1, name: "ada".into(), group: "users".into(), home: "/h".into(), cwd: "/".into() };
        let settings = script.settings(&environment, &identity).unwrap();
        let expected = [("ENROOT_REMAP_ROOT", "yes"), ("ENROOT_ROOTFS", "/h/x y"), ("ENROOT_RESTRICT_DEV", "no")];
        let sorted: std::collections::BTreeMap<_, _> =
            expected.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        assert_eq!(settings, sorted.into_iter().collect::<Vec<_>>());
        assert_eq!(script.output("environ", &environment).unwrap(), "A=7 h\n");
        assert!(script.output("mounts", &environment).unwrap_err().to_string().ends_with("mounts() failed"));
        let rc = script.rc(&environment).unwrap().unwrap();
        let mut command = Command::new("bash");
        let output = command.args(["-c", &rc, "x", "echo", "run"]).output().unwrap();
        assert_eq!(output.stdout, b"run\n");
        assert!(script.hooks(&environment).unwrap().unwrap().contains("it'\\''s a script'\nhooks\n"));
    }

    #[test]
    fn what_is_not_there_is_nothing() {
        let (_directory, script) = script("x=1\n");
        let (script, environment) = (script.unwrap(), Environment::default());
        assert_eq!(script.output("mounts", &environment).unwrap(), "");
        assert_eq!((script.rc(&environment).unwrap(), script.hooks(&environment).unwrap()), (None, None));
    }

    #[test]
    fn bad_scripts_are_named() {
        let (directory, error) = script("if then\n");
        let path = directory.path().canonicalize().unwrap().join("it's a script");
        assert_eq!(error.unwrap_err().to_string(), format!("Invalid configuration file: {}", path.display()));
        let missing = Script::load(Path::new("/nonexistent/x")).unwrap_err().to_string();
        assert_eq!(missing, "No such file or directory: /nonexistent/x");
    }
}
