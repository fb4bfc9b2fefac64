//! Docker's `config.json`, changed as `docker login` and `docker logout` change it: everything else that is in it stays.

use std::fs;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::image::reference::is_docker_hub;

/// Most bytes of the file.
const MAX_BYTES: u64 = 1 << 20;
/// What Docker calls its own registry.
const HUB_KEY: &str = "https://index.docker.io/v1/";

/// A configuration, in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct DockerConfig {
    path: PathBuf,
    content: Map<String, Value>,
}

/// The name of `registry` in the file and for helpers.
pub fn key_of(registry: &str) -> &str {
    if is_docker_hub(registry) { HUB_KEY } else { registry }
}

impl DockerConfig {
    /// Reads the file at `path`; one that does not exist is empty.
    pub fn read(path: &Path) -> Result<Self, String> {
        let failed = |error: io::Error| format!("cannot read {}: {}", path.display(), crate::sys::reason(error));
        // What a link leads to is replaced, not the link.
        let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let mut text = String::new();
        match fs::OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&path) {
            Ok(file) if file.metadata().map_err(failed)?.is_file() => {
                file.take(MAX_BYTES + 1).read_to_string(&mut text).map_err(failed)?;
            }
            Ok(_) => return Err(format!("cannot read {}: not a file", path.display())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        if text.len() as u64 > MAX_BYTES {
            return Err(format!("cannot read {}: larger than 1 MiB", path.display()));
        }
        let malformed = |what: &str| Err(format!("{} {what}: correct it, or move it away", path.display()));
        // Not the reason: it may quote a secret.
        let content = match serde_json::from_str(if text.trim().is_empty() { "{}" } else { &text }) {
            Ok(Value::Object(content)) => content,
            Ok(_) => return malformed("is not a Docker configuration"),
            Err(error) => {
                return malformed(&format!(
                    "is not a Docker configuration (line {}, column {})",
                    error.line(),
                    error.column()
                ));
            }
        };
        if content.get("auths").is_some_and(|auths| !auths.is_object()) {
            return malformed("has \"auths\" that are no object");
        }
        Ok(Self { path, content })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The helper, `docker-credential-NAME`, that keeps the password for `registry`, if one does.
    pub fn helper(&self, registry: &str) -> Option<String> {
        let key = key_of(registry);
        let of_registry = self.content.get("credHelpers").and_then(|helpers| {
            let at = |name: &str| helpers.get(name).and_then(Value::as_str);
            at(registry).or_else(|| at(key))
        });
        let store = || self.content.get("credsStore").and_then(Value::as_str);
        of_registry.or_else(store).filter(|name| !name.is_empty()).map(str::to_owned)
    }

    /// Whether there is an entry for `registry`.
    pub fn has(&self, registry: &str) -> bool {
        self.content.get("auths").and_then(|auths| auths.get(key_of(registry))).is_some()
    }

    /// Puts an entry for `registry` there: with the password, or without it if a helper keeps it.
    pub fn add(&mut self, registry: &str, password: Option<(&str, &str)>) {
        let entry = match password {
            Some((user, password)) => json!({ "auth": STANDARD.encode(format!("{user}:{password}")) }),
            None => json!({}),
        };
        let auths = self.content.entry("auths").or_insert_with(|| json!({}));
        if let Some(auths) = auths.as_object_mut() {
            auths.insert(key_of(registry).to_owned(), entry);
        }
    }

    /// Takes the entry for `registry` away.
    pub fn remove(&mut self, registry: &str) {
        if let Some(auths) = self.content.get_mut("auths").and_then(Value::as_object_mut) {
            auths.remove(key_of(registry));
        }
    }

    /// Writes the file: readable by its owner alone, and complete at any moment.
    pub fn write(&self) -> Result<(), String> {
        let failed = |error: io::Error| format!("cannot write {}: {}", self.path.display(), crate::sys::reason(error));
        let directory = self.path.parent().unwrap_or(Path::new("/"));
        let mut builder = fs::DirBuilder::new();
        std::os::unix::fs::DirBuilderExt::mode(builder.recursive(true), 0o700);
        builder.create(directory).map_err(failed)?;
        let mut text = Vec::new();
        // As Docker writes it.
        let formatter = serde_json::ser::PrettyFormatter::with_indent(b"\t");
        let mut serializer = serde_json::Serializer::with_formatter(&mut text, formatter);
        self.content.serialize(&mut serializer).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        let temporary = directory.join(format!(".config.json.pyxis-{}", std::process::id()));
        let written = || -> io::Result<()> {
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
            // Whatever the umask is.
            file.set_permissions(fs::Permissions::from_mode(0o600))?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)
        };
        written().map_err(|error| {
            // It may not be there.
            let _ = fs::remove_file(&temporary);
            failed(error)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_the_entry_changes() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("new/.docker/config.json");
        let mut config = DockerConfig::read(&path).unwrap();
        config.add("reg.io:5000", Some(("me", "s:e\u{e9}")));
        config.write().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "{\n\t\"auths\": {\n\t\t\"reg.io:5000\": {\n\t\t\t\"auth\": \"bWU6czplw6k=\"\n\t\t}\n\t}\n}\n"
        );

        fs::write(&path, r#"{"HttpHeaders": {"X": "1"}, "auths": {"a.io": {"auth": "eA=="}}, "number": 1.50}"#)
            .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let mut config = DockerConfig::read(&path).unwrap();
        config.add("docker.io", None);
        assert!(config.has("registry-1.docker.io") && config.has("a.io") && !config.has("b.io"));
        config.remove("a.io");
        config.write().unwrap();
        let value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        assert_eq!(value, json!({"HttpHeaders": {"X": "1"}, "auths": {HUB_KEY: {}}, "number": 1.5}));
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn links_stay_links() {
        let directory = tempfile::tempdir().unwrap();
        let (link, target) = (directory.path().join("config.json"), directory.path().join("target"));
        fs::write(&target, "{}").unwrap();
        std::os::unix::fs::symlink("target", &link).unwrap();
        let mut config = DockerConfig::read(&link).unwrap();
        config.add("a.io", None);
        config.write().unwrap();
        assert!(link.is_symlink() && fs::read_to_string(target).unwrap().contains("a.io"));
    }

    #[test]
    fn helpers_are_named_for_a_registry_or_for_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let helper = |text: &str, registry: &str| {
            fs::write(&path, text).unwrap();
            DockerConfig::read(&path).unwrap().helper(registry)
        };
        let text =
            r#"{"credsStore": "pass", "credHelpers": {"a.io": "ecr-login", "https://index.docker.io/v1/": "x"}}"#;
        assert_eq!(helper(text, "a.io").as_deref(), Some("ecr-login"));
        assert_eq!(helper(text, "b.io").as_deref(), Some("pass"));
        assert_eq!(helper(text, "docker.io").as_deref(), Some("x"));
        assert_eq!(helper("{\"credsStore\": \"\"}", "a.io"), None);
    }

    #[test]
    fn what_is_no_configuration_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        for (text, reason) in [("{\"a\"", "line 1"), ("[]", "not a Docker"), ("{\"auths\": 7}", "no object")] {
            fs::write(&path, text).unwrap();
            let error = DockerConfig::read(&path).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
        assert!(DockerConfig::read(directory.path()).unwrap_err().ends_with("not a file"));
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in r#"(\{|\}|"auths"|"credHelpers"|"x"|:|,|7|null|\[|\]){0,12}"#) {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("config.json");
            fs::write(&path, &text).unwrap();
            if let Ok(mut config) = DockerConfig::read(&path) {
                let _ = config.helper("x");
                config.add("x", None);
                config.remove("x");
                prop_assert!(!config.has("x"));
            }
        }
    }
}
