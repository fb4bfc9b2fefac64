//! One file of a CDI specification, as its vendor writes it: JSON or YAML, versions 0.3.0 to 1.2.0
//! (<https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>). Read strictly, as the specification has
//! it: fields that nobody knows, and features that the named version does not have, make the file invalid.

#![forbid(unsafe_code)]

mod check;
mod yaml;

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer};

use super::name::Kind;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Document {
    cdi_version: String,
    kind: String,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
    /// What can be asked for.
    #[serde(default, deserialize_with = "or_default")]
    pub devices: Vec<Device>,
    /// For whoever gets one of the devices.
    #[serde(default, deserialize_with = "or_default")]
    pub container_edits: Edits,
}

/// One device.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Device {
    /// Behind the `=`.
    pub name: String,
    #[serde(default, deserialize_with = "or_default")]
    annotations: BTreeMap<String, String>,
    /// For whoever gets it.
    #[serde(default, deserialize_with = "or_default")]
    pub container_edits: Edits,
}

/// `containerEdits`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Edits {
    /// `NAME=VALUE`.
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Device nodes.
    #[serde(default, deserialize_with = "or_default")]
    pub device_nodes: Vec<Node>,
    /// Mounts.
    #[serde(default, deserialize_with = "or_default")]
    pub mounts: Vec<Mount>,
    /// Hooks.
    #[serde(default, deserialize_with = "or_default")]
    pub hooks: Vec<Hook>,
    /// Group ids; both spellings are in the specification.
    #[serde(default, deserialize_with = "or_default", alias = "additionalGIDs")]
    pub additional_gids: Vec<u32>,
    /// Cache and memory bandwidth.
    #[serde(default)]
    pub intel_rdt: Option<IntelRdt>,
    /// Interfaces to be moved into the container.
    #[serde(default, deserialize_with = "or_default")]
    pub net_devices: Vec<NetDevice>,
    /// Device cgroup rules without nodes.
    #[serde(default, deserialize_with = "or_default")]
    pub device_cgroup_rules: Vec<CgroupRule>,
}

/// A device node.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Node {
    /// In the container, and on the host unless `host_path` is there.
    pub path: String,
    /// On the host.
    #[serde(default, deserialize_with = "or_default")]
    pub host_path: String,
    /// `c`, `u`, `b`, `p`, or nothing.
    #[serde(default, rename = "type", deserialize_with = "or_default")]
    pub kind: String,
    /// Major number; 0 says nothing.
    #[serde(default, deserialize_with = "or_default")]
    pub major: i64,
    /// Minor number, if there is a major one.
    #[serde(default, deserialize_with = "or_default")]
    pub minor: i64,
    #[serde(default)]
    file_mode: Option<u32>,
    #[serde(default, deserialize_with = "or_default")]
    permissions: String,
    #[serde(default)]
    uid: Option<u32>,
    #[serde(default)]
    gid: Option<u32>,
}

/// A mount.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mount {
    /// Its source.
    pub host_path: String,
    /// Its target.
    pub container_path: String,
    /// Its file system; nothing for a bind.
    #[serde(default, rename = "type", deserialize_with = "or_default")]
    pub kind: String,
    /// As the runtime specification has them.
    #[serde(default, deserialize_with = "or_default")]
    pub options: Vec<String>,
}

/// A hook.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Hook {
    /// Its stage.
    pub hook_name: String,
    /// The program.
    pub path: String,
    /// With `argv[0]`.
    #[serde(default, deserialize_with = "or_default")]
    pub args: Vec<String>,
    /// `NAME=VALUE`.
    #[serde(default, deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// Seconds.
    #[serde(default)]
    pub timeout: Option<u32>,
}

/// `intelRdt`.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct IntelRdt {
    #[serde(default, rename = "closID", deserialize_with = "or_default")]
    clos_id: String,
    #[serde(default, deserialize_with = "or_default")]
    l3_cache_schema: String,
    #[serde(default, deserialize_with = "or_default")]
    mem_bw_schema: String,
    #[serde(default)]
    schemata: Option<Vec<String>>,
    #[serde(default)]
    enable_monitoring: Option<bool>,
    #[serde(default, rename = "enableCMT")]
    enable_cmt: Option<bool>,
    #[serde(default, rename = "enableMBM")]
    enable_mbm: Option<bool>,
}

/// An item of `netDevices`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct NetDevice {
    /// On the host.
    pub host_interface_name: String,
    /// In the container.
    pub name: String,
}

/// An item of `deviceCgroupRules`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct CgroupRule {
    #[serde(rename = "type")]
    kind: String,
    major: i64,
    minor: i64,
    #[serde(default, deserialize_with = "or_default")]
    permissions: String,
}

/// How a file is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `*.json`
    Json,
    /// `*.yaml`
    Yaml,
}

/// Why a file cannot be used: where, if it cannot be parsed, and what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InvalidDocument {
    place: Option<(u64, u64)>,
    problem: String,
}

impl fmt::Display for InvalidDocument {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Behind the path, as compilers have it.
        match self.place {
            Some((line, column)) => write!(formatter, ":{line}:{column}: {}", self.problem),
            None => write!(formatter, ": {}", self.problem),
        }
    }
}

impl From<String> for InvalidDocument {
    fn from(problem: String) -> Self {
        Self { place: None, problem: one_line(&problem) }
    }
}

/// What Go's decoders have for `null`.
fn or_default<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// Without line breaks and what a terminal would act on, and not longer than a line should be.
fn one_line(text: &str) -> String {
    let plain = text.chars().map(|character| if character.is_control() { ' ' } else { character });
    plain.take(300).collect()
}

impl Document {
    /// Reads the content of a file and judges it.
    pub fn parse(bytes: &[u8], format: Format) -> Result<(Kind, Self), InvalidDocument> {
        let document: Self = match format {
            Format::Json => serde_json::from_slice(bytes).map_err(|error| {
                let text = error.to_string();
                let problem = text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem);
                InvalidDocument {
                    place: Some((error.line() as u64, error.column() as u64)),
                    problem: one_line(problem),
                }
            })?,
            Format::Yaml => match Self::from_plain_yaml(bytes) {
                Some(document) => document,
                None => Self::from_any_yaml(bytes)?,
            },
        };
        let kind = document.check()?;
        Ok((kind, document))
    }

    /// What a YAML file says that has no more of YAML than a program's output has: not judged yet.
    pub fn from_plain_yaml(bytes: &[u8]) -> Option<Self> {
        // What is wrong is said by the parser that knows where.
        serde_json::from_value(yaml::parse(bytes)?).ok()
    }

    /// What a YAML file says, whatever of YAML it has: not judged yet.
    pub fn from_any_yaml(bytes: &[u8]) -> Result<Self, InvalidDocument> {
        let options = serde_saphyr::options! { with_snippet: false };
        serde_saphyr::from_slice_with_options(bytes, options).map_err(|error| {
            let text = error.to_string();
            let place = error.location().map(|place| (place.line(), place.column()));
            let problem = match place {
                Some(_) => text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem),
                None => &text,
            };
            InvalidDocument { place, problem: one_line(problem) }
        })
    }

    /// Whether paths of device nodes are patterns.
    pub fn has_patterns(&self) -> bool {
        self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version) == "1.2.0"
    }
}

impl Node {
    /// On the host.
    pub fn source(&self) -> &str {
        if self.host_path.is_empty() { &self.path } else { &self.host_path }
    }

    /// Whether the device is meant to be written to.
    pub fn is_written(&self) -> bool {
        self.permissions.is_empty() || self.permissions.contains('w')
    }
}

impl Mount {
    /// Whether something of the host's is bound: the only thing that it can be if nothing is said.
    pub fn is_bind(&self) -> bool {
        matches!(self.kind.as_str(), "" | "none" | "bind")
            || self.options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"))
    }
}
