//! What a hook learns about the container: the state on its standard input (runtime specification, "State"), and the
//! bundle that the state names, a directory with a `config.json` that says where the root filesystem is.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::Serialize;

use crate::devices::edits::HookStage;

/// The release of the runtime specification whose words these are.
const OCI_VERSION: &str = "1.2.0";

/// One container, for its hooks.
#[derive(Debug, Clone)]
pub struct Description<'a> {
    /// A name: no other container of the node has it.
    pub id: String,
    /// Container init.
    pub pid: i32,
    /// The bundle.
    pub bundle: &'a Path,
    /// Where the root filesystem can be reached before it is the root.
    pub root: &'a str,
    /// Whether it will be read-only.
    pub is_readonly: bool,
    /// Who runs in it, by the ids inside.
    pub user: (u32, u32),
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// What the image would start.
    pub args: Vec<String>,
    /// Its working directory.
    pub cwd: String,
    /// The image's labels.
    pub annotations: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'a str,
    id: &'a str,
    status: &'a str,
    pid: i32,
    bundle: &'a Path,
    annotations: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Config<'a> {
    oci_version: &'a str,
    root: Root<'a>,
    process: Process<'a>,
    annotations: &'a BTreeMap<String, String>,
}

#[derive(Serialize)]
struct Root<'a> {
    path: &'a str,
    readonly: bool,
}

#[derive(Serialize)]
struct Process<'a> {
    user: User,
    args: &'a [String],
    env: &'a [String],
    cwd: &'a str,
}

#[derive(Serialize)]
struct User {
    uid: u32,
    gid: u32,
}

impl Description<'_> {
    /// The state at `stage`.
    pub fn state(&self, stage: HookStage) -> Vec<u8> {
        let status = if stage == HookStage::StartContainer { "created" } else { "creating" };
        let Self { id, pid, bundle, annotations, .. } = self;
        let state = State { oci_version: OCI_VERSION, id, status, pid: *pid, bundle, annotations };
        // Text and numbers always are JSON.
        serde_json::to_vec(&state).unwrap_or_default()
    }

    /// Writes the bundle's `config.json`.
    pub fn write(&self) -> io::Result<()> {
        let config = Config {
            oci_version: OCI_VERSION,
            root: Root { path: self.root, readonly: self.is_readonly },
            process: Process {
                user: User { uid: self.user.0, gid: self.user.1 },
                args: &self.args,
                env: &self.env,
                cwd: &self.cwd,
            },
            annotations: self.annotations,
        };
        fs::write(self.bundle.join("config.json"), serde_json::to_vec(&config)?)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_hooks_read() {
        let directory = tempfile::tempdir().unwrap();
        let annotations = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let description = Description {
            id: "7.0".into(),
            pid: 42,
            bundle: directory.path(),
            root: "/run/pyxis/root",
            is_readonly: true,
            user: (1000, 100),
            env: vec!["A=1".into()],
            args: vec!["sh".into()],
            cwd: "/".into(),
            annotations: &annotations,
        };
        let state: serde_json::Value = serde_json::from_slice(&description.state(HookStage::CreateContainer)).unwrap();
        let bundle = directory.path();
        assert_eq!(
            state,
            json!({"ociVersion": "1.2.0", "id": "7.0", "status": "creating", "pid": 42, "bundle": bundle,
                   "annotations": {"a": "b"}})
        );
        description.write().unwrap();
        let config: serde_json::Value = serde_json::from_slice(&fs::read(bundle.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["root"], json!({"path": "/run/pyxis/root", "readonly": true}));
        assert_eq!(config["process"]["user"], json!({"uid": 1000, "gid": 100}));
    }
}
