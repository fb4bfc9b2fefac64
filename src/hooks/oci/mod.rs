//! OCI hooks: directories of JSON files that say which program runs for which containers, as podman and CRI-O read them
//! (oci-hooks(5), schema 1.0.0). Only in the directories that the administrator names: those of the other engines may
//! hold hooks that want root.

#![forbid(unsafe_code)]

pub mod bundle;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use regex_lite::Regex;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::devices::edits::{Hook, HookStage};
use crate::enroot::{files_in, read_file};
use crate::sys;

/// Most bytes of one file.
const MAX_FILE: u64 = 1 << 20;
/// Most files of one directory.
const MAX_FILES: usize = 1000;

/// What conditions are about.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The image's labels: nothing else annotates our containers.
    pub annotations: &'a BTreeMap<String, String>,
    /// Whether the user has asked for mounts of the host's directories.
    pub has_bind_mounts: bool,
}

/// The hooks of a container, and what is to be logged about others.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// In order.
    pub hooks: Vec<Hook>,
    /// A line each.
    pub log: Vec<String>,
}

/// A file that cannot be used: the whole start fails, because what a site wants done must not be left out silently.
#[derive(Debug, thiserror::Error)]
#[error("OCI hook {}{problem}", .path.display())]
pub struct InvalidHook {
    path: PathBuf,
    /// Begins with a colon, and the place.
    problem: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Document {
    #[serde(rename = "version")]
    _version: IgnoredAny,
    hook: Program,
    when: When,
    stages: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Program {
    path: PathBuf,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    #[serde(default)]
    timeout: Option<u32>,
}

/// All that is there has to match.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct When {
    #[serde(default)]
    always: Option<bool>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    #[serde(default)]
    commands: Vec<String>,
    #[serde(default)]
    has_bind_mounts: Option<bool>,
}

/// Reads the files of `directories`, of which the last one counts most: its files replace those of the same name. Called as
/// the user.
pub fn find(directories: &[PathBuf], facts: Facts<'_>) -> Result<Found, InvalidHook> {
    let mut files: BTreeMap<OsString, PathBuf> = BTreeMap::new();
    for directory in directories {
        let found = files_in(directory, "json", MAX_FILES)
            .map_err(|(path, error)| InvalidHook { path, problem: format!(": {}", sys::reason(error)) })?;
        files.extend(found.into_iter().filter_map(|path| Some((path.file_name()?.to_owned(), path))));
    }
    let mut files: Vec<(OsString, PathBuf)> = files.into_iter().collect();
    files.sort_by_key(|(name, _)| name.to_string_lossy().to_lowercase());
    let mut all = Found::default();
    for (_, path) in files {
        let invalid = |problem| InvalidHook { path: path.clone(), problem };
        let content = read_file(&path, MAX_FILE).map_err(|error| invalid(format!(": {}", sys::reason(error))))?;
        let Some((content, _)) = content else { continue };
        let document = Document::parse(&content).map_err(invalid)?;
        document.select(&path, facts, &mut all).map_err(|problem| invalid(format!(": {problem}")))?;
    }
    Ok(all)
}

impl Document {
    fn parse(content: &[u8]) -> Result<Self, String> {
        let malformed = |error: serde_json::Error| {
            let text = error.to_string();
            let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem);
            format!(":{}:{}: {}", error.line(), error.column(), problem.replace(char::is_control, " "))
        };
        // The version decides how the rest reads.
        let version: serde_json::Value = serde_json::from_slice(content).map_err(malformed)?;
        match version.get("version").and_then(serde_json::Value::as_str) {
            Some("1.0.0") => serde_json::from_slice(content).map_err(malformed),
            Some(other) => Err(format!(": version {other:?}: only 1.0.0 is known")),
            None => Err(": it has no \"version\": the schema 0.1.0 is not supported; write it as 1.0.0".into()),
        }
    }

    fn select(self, path: &Path, facts: Facts<'_>, all: &mut Found) -> Result<(), String> {
        let Program { path: program, args, env, timeout } = &self.hook;
        if !program.is_absolute() {
            return Err(format!("hook.path {program:?}: must be an absolute path"));
        }
        if *timeout == Some(0) {
            return Err("hook.timeout: must be at least 1".into());
        }
        if let Some(entry) = env.iter().find(|entry| entry.find('=').is_none_or(|at| at == 0)) {
            return Err(format!("hook.env: {entry:?} is no NAME=VALUE"));
        }
        if args.iter().chain(env).any(|text| text.contains('\0')) {
            return Err("hook: an argument with a NUL byte".into());
        }
        let mut stages = Vec::new();
        for name in &self.stages {
            match (HookStage::of(name), name.as_str()) {
                (Some(stage), _) if !stages.contains(&stage) => stages.push(stage),
                (Some(_), _) => {}
                (None, "poststart" | "poststop") => {
                    all.log.push(format!("{}: stage {name}: containers here have none", path.display()));
                }
                (None, _) => return Err(format!("stages: unknown stage {name:?}")),
            }
        }
        if !self.when.matches(path, facts, &mut all.log)? {
            return Ok(());
        }
        all.hooks.extend(stages.into_iter().map(|stage| Hook {
            stage,
            path: program.clone(),
            args: args.clone(),
            env: env.clone(),
            timeout_seconds: *timeout,
            origin: path.display().to_string(),
        }));
        Ok(())
    }
}

impl When {
    fn matches(&self, path: &Path, facts: Facts<'_>, log: &mut Vec<String>) -> Result<bool, String> {
        let Self { always, annotations, commands, has_bind_mounts } = self;
        if always.is_none() && annotations.is_empty() && commands.is_empty() && has_bind_mounts.is_none() {
            return Err("when: it has no condition".into());
        }
        let expression = |text: &String| Regex::new(text).map_err(|error| format!("when: {text:?}: {error}"));
        let mut matching =
            always.unwrap_or(true) && has_bind_mounts.is_none_or(|wanted| wanted && facts.has_bind_mounts);
        for (key, value) in annotations {
            let (key, value) = (expression(key)?, expression(value)?);
            matching &= facts.annotations.iter().any(|(name, text)| key.is_match(name) && value.is_match(text));
        }
        for command in commands {
            expression(command)?;
        }
        if matching && !commands.is_empty() {
            // One container serves all tasks of a step, and steps that join it later.
            log.push(format!("{}: not run: containers here have no command of their own", path.display()));
        }
        Ok(matching && commands.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hook(when: &str, stages: &str) -> String {
        format!(
            r#"{{"version": "1.0.0", "hook": {{"path": "/bin/h", "args": ["h", "x"], "env": ["A=1"], "timeout": 5}},
                "when": {when}, "stages": {stages}}}"#
        )
    }

    const ALWAYS: &str = r#"{"always": true}"#;

    fn find_in(files: &[(&str, String)], facts: Facts<'_>) -> Result<Found, String> {
        let directory = tempfile::tempdir().unwrap();
        let directories = ["usr", "etc", "missing"].map(|name| directory.path().join(name));
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let root = format!("{}/", directory.path().display());
        find(&directories, facts).map_err(|error| error.to_string().replace(&root, ""))
    }

    fn one(text: String, facts: Facts<'_>) -> Result<usize, String> {
        find_in(&[("etc/a.json", text)], facts).map(|found| found.hooks.len())
    }

    fn nothing(annotations: &BTreeMap<String, String>) -> Facts<'_> {
        Facts { annotations, has_bind_mounts: false }
    }

    #[test]
    fn later_directories_replace_and_names_order() {
        let none = BTreeMap::new();
        let named = |name: &str| hook(ALWAYS, r#"["createContainer"]"#).replace("/bin/h", &format!("/bin/{name}"));
        let files = [
            ("usr/02-b.json", named("usr-b")),
            ("usr/01-A.json", named("usr-a")),
            ("etc/02-b.json", named("etc-b")),
            ("etc/01-UPPER.json", named("etc-upper")),
            ("etc/01-my.json", named("etc-my")),
            ("etc/README", "no".into()),
        ];
        let found = find_in(&files, nothing(&none)).unwrap();
        let paths: Vec<_> = found.hooks.iter().map(|hook| hook.path.to_str().unwrap()).collect();
        assert_eq!(paths, ["/bin/usr-a", "/bin/etc-my", "/bin/etc-upper", "/bin/etc-b"]);
        let first = &found.hooks[0];
        assert_eq!(
            (first.args.join(" "), first.env.join(" "), first.timeout_seconds),
            ("h x".into(), "A=1".into(), Some(5))
        );
        assert!(first.origin.ends_with("usr/01-A.json"));
    }

    #[test]
    fn stages_and_what_has_no_counterpart() {
        let none = BTreeMap::new();
        let stages = r#"["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]"#;
        let found = find_in(&[("etc/a.json", hook(ALWAYS, stages))], nothing(&none)).unwrap();
        let stages: Vec<_> = found.hooks.iter().map(|hook| hook.stage).collect();
        assert_eq!(stages, [HookStage::CreateRuntime, HookStage::CreateContainer, HookStage::StartContainer]);
        assert_eq!(found.log.len(), 2);
    }

    #[test]
    fn every_condition_has_to_match() {
        let labels = BTreeMap::from([("com.example.hooks.x".to_owned(), "true".to_owned())]);
        let facts = |has_bind_mounts| Facts { annotations: &labels, has_bind_mounts };
        let mounts = r#"{"hasBindMounts": true}"#;
        let label = r#"{"annotations": {"^com\\.example\\..*x$": "^(true|1)$"}}"#;
        for (when, mounted, expected) in [
            (ALWAYS, false, 1),
            (r#"{"always": false}"#, false, 0),
            (mounts, false, 0),
            (mounts, true, 1),
            (r#"{"hasBindMounts": false}"#, true, 0),
            (label, false, 1),
            (r#"{"annotations": {"^com": "^false$"}}"#, false, 0),
            (r#"{"annotations": {"^com": "true", "^org": "."}}"#, false, 0),
            (r#"{"always": true, "hasBindMounts": true}"#, false, 0),
            (r#"{"always": true, "commands": ["sh$"]}"#, false, 0),
        ] {
            assert_eq!(one(hook(when, r#"["prestart"]"#), facts(mounted)), Ok(expected), "{when} {mounted}");
        }
    }

    #[test]
    fn malformed_files_are_named_with_the_place() {
        let none = BTreeMap::new();
        let good = hook(ALWAYS, r#"["prestart"]"#);
        for (text, expected) in [
            ("{".to_owned(), ":1:1: EOF while parsing an object"),
            (good.replace("1.0.0", "2.0.0"), ": version \"2.0.0\": only 1.0.0 is known"),
            (
                r#"{"hook": "/bin/h", "stages": []}"#.to_owned(),
                ": it has no \"version\": the schema 0.1.0 is not supported; write it as 1.0.0",
            ),
            (good.replace("prestart", "prestrat"), ": stages: unknown stage \"prestrat\""),
            (good.replace("/bin/h", "bin/h"), ": hook.path \"bin/h\": must be an absolute path"),
            (good.replace("A=1", "A"), ": hook.env: \"A\" is no NAME=VALUE"),
            (good.replace(": 5", ": 0"), ": hook.timeout: must be at least 1"),
            (good.replace(ALWAYS, "{}"), ": when: it has no condition"),
        ] {
            assert_eq!(one(text.clone(), nothing(&none)), Err(format!("OCI hook etc/a.json{expected}")), "{text}");
        }
        let error = one(good.replace(ALWAYS, r#"{"commands": ["("]}"#), nothing(&none)).unwrap_err();
        assert!(error.starts_with("OCI hook etc/a.json: when: \"(\": ") && !error.contains('\n'), "{error}");
        let error = one(good.replace("\"when\"", "\"wehn\""), nothing(&none)).unwrap_err();
        assert!(error.contains(".json:2:") && error.contains("unknown field `wehn`"), "{error}");
    }
}
