//! One file of a CDI specification, as its vendor writes it: JSON or YAML, versions 0.3.0 to 1.2.0
//! (<https://github.com/cncf-tags/container-device-interface/blob/main/SPEC.md>). Read strictly, as the specification has
//! it: fields that nobody knows, and features that the named version does not have, make the file invalid.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer};

use super::name::{self, Kind};
use super::pattern::Pattern;

/// Versions that are understood, in order.
const VERSIONS: [&str; 9] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "1.2.0"];
/// Most devices of one file.
const MAX_DEVICES: usize = 20_000;

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
            Format::Yaml => {
                let options = serde_saphyr::options! { with_snippet: false };
                serde_saphyr::from_slice_with_options(bytes, options).map_err(|error| {
                    let text = error.to_string();
                    let place = error.location().map(|place| (place.line(), place.column()));
                    let problem = match place {
                        Some(_) => text.rsplit_once(" at line ").map_or(text.as_str(), |(problem, _)| problem),
                        None => &text,
                    };
                    InvalidDocument { place, problem: one_line(problem) }
                })?
            }
        };
        let kind = document.check()?;
        Ok((kind, document))
    }

    fn check(&self) -> Result<Kind, InvalidDocument> {
        let named = self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version);
        let Some(version) = VERSIONS.iter().position(|known| *known == named) else {
            let text =
                format!("cdiVersion {:?}: known are 0.3.0 to {}", self.cdi_version, VERSIONS[VERSIONS.len() - 1]);
            return Err(text.into());
        };
        let kind: Kind = self.kind.parse().map_err(|error: name::InvalidName| error.to_string())?;
        if self.devices.is_empty() {
            return Err("devices: it has none".to_owned().into());
        }
        if self.devices.len() > MAX_DEVICES {
            return Err(format!("devices: more than {MAX_DEVICES}").into());
        }
        let mut names = std::collections::BTreeSet::new();
        for device in &self.devices {
            let name = &device.name;
            if let Some(problem) = name::problem_of_device(name) {
                return Err(format!("the device name {name:?} {problem}").into());
            }
            if !names.insert(name) {
                return Err(format!("the device {name:?} is there twice").into());
            }
            if device.container_edits == Edits::default() {
                return Err(format!("the device {name:?} has no containerEdits").into());
            }
            device.container_edits.check().map_err(|problem| format!("the device {name:?}: {problem}"))?;
        }
        self.container_edits.check().map_err(|problem| format!("containerEdits: {problem}"))?;
        self.check_version(version, &kind)?;
        Ok(kind)
    }

    /// The features of later versions.
    fn check_version(&self, version: usize, kind: &Kind) -> Result<(), InvalidDocument> {
        let annotated =
            !self.annotations.is_empty() || self.devices.iter().any(|device| !device.annotations.is_empty());
        let digit = |device: &Device| device.name.starts_with(|first: char| first.is_ascii_digit());
        let any = |feature: fn(&Edits) -> bool| {
            feature(&self.container_edits) || self.devices.iter().any(|device| feature(&device.container_edits))
        };
        let rdt = |feature: fn(&IntelRdt) -> bool| {
            let has = |edits: &Edits| edits.intel_rdt.as_ref().is_some_and(feature);
            has(&self.container_edits) || self.devices.iter().any(|device| has(&device.container_edits))
        };
        let wildcard = |node: &Node| Pattern::is_pattern(&node.path) || Pattern::is_pattern(&node.host_path);
        let features = [
            ("0.4.0", "a mount's type", any(|edits| edits.mounts.iter().any(|mount| !mount.kind.is_empty()))),
            ("0.5.0", "a device name that begins with a digit", self.devices.iter().any(digit)),
            ("0.5.0", "hostPath", any(|edits| edits.device_nodes.iter().any(|node| !node.host_path.is_empty()))),
            ("0.6.0", "annotations", annotated),
            ("0.6.0", "a dot in the class", kind.class().contains('.')),
            ("0.7.0", "intelRdt", any(|edits| edits.intel_rdt.is_some())),
            ("0.7.0", "additionalGids", any(|edits| !edits.additional_gids.is_empty())),
            ("1.1.0", "netDevices", any(|edits| !edits.net_devices.is_empty())),
            ("1.1.0", "intelRdt.schemata", rdt(|rdt| rdt.schemata.is_some())),
            ("1.1.0", "intelRdt.enableMonitoring", rdt(|rdt| rdt.enable_monitoring.is_some())),
            ("1.2.0", "deviceCgroupRules", any(|edits| !edits.device_cgroup_rules.is_empty())),
        ];
        let at_least =
            |first: &str| VERSIONS.iter().position(|known| *known == first).is_some_and(|first| version >= first);
        // What needs the latest version counts.
        for (first, what, used) in features.into_iter().rev() {
            if used && !at_least(first) {
                return Err(format!("{what} needs cdiVersion {first}, and it says {}", self.cdi_version).into());
            }
        }
        if at_least("1.1.0") && rdt(|rdt| rdt.enable_cmt.is_some() || rdt.enable_mbm.is_some()) {
            return Err("intelRdt.enableCMT and enableMBM are gone since cdiVersion 1.1.0".to_owned().into());
        }
        // Before 1.2.0 a path with these characters is an odd path, and nothing else.
        if at_least("1.2.0") {
            let all = self.devices.iter().map(|device| &device.container_edits).chain([&self.container_edits]);
            for node in all.flat_map(|edits| &edits.device_nodes).filter(|node| wildcard(node)) {
                node.check_pattern()?;
            }
        }
        Ok(())
    }

    /// Whether paths of device nodes are patterns.
    pub fn has_patterns(&self) -> bool {
        self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version) == "1.2.0"
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        check_env("env", &self.env)?;
        for node in &self.device_nodes {
            node.check()?;
        }
        for mount in &self.mounts {
            let Mount { host_path, container_path, .. } = mount;
            // A new file system's source is a name.
            let is_path = host_path.starts_with('/') || (!host_path.is_empty() && !mount.is_bind());
            if !is_path || !container_path.starts_with('/') || [host_path, container_path].iter().any(|path| nul(path))
            {
                return Err(format!("mount of {host_path:?} at {container_path:?}: must be absolute paths"));
            }
        }
        for hook in &self.hooks {
            hook.check()?;
        }
        for (index, device) in self.net_devices.iter().enumerate() {
            let NetDevice { host_interface_name: host, name } = device;
            if host.is_empty() || name.is_empty() {
                return Err("netDevices: an empty name".to_owned());
            }
            let before = &self.net_devices[..index];
            if before.iter().any(|other| other.host_interface_name == *host || other.name == *name) {
                return Err(format!("netDevices: {host:?} or {name:?} is there twice"));
            }
        }
        if let Some(IntelRdt { clos_id, .. }) = &self.intel_rdt {
            let is_name = !matches!(clos_id.as_str(), "." | "..") && !clos_id.contains(['/', '\n']);
            if clos_id.len() >= 4096 || !(is_name || clos_id == "/") {
                return Err(format!("intelRdt: closID {clos_id:?} is no file name"));
            }
        }
        for CgroupRule { kind, major, minor, permissions } in &self.device_cgroup_rules {
            let known = matches!(kind.as_str(), "b" | "c") && *major > 0 && *minor >= -1;
            if !known || !permissions.chars().all(|letter| "rwm".contains(letter)) {
                return Err(format!("deviceCgroupRules: {kind} {major}:{minor} {permissions:?}"));
            }
        }
        Ok(())
    }
}

impl Node {
    /// On the host.
    pub fn source(&self) -> &str {
        if self.host_path.is_empty() { &self.path } else { &self.host_path }
    }

    fn check(&self) -> Result<(), String> {
        let path = &self.path;
        if !path.starts_with('/') || !self.source().starts_with('/') || nul(path) || nul(&self.host_path) {
            return Err(format!("device node {path:?}: must be an absolute path"));
        }
        if !matches!(self.kind.as_str(), "" | "b" | "c" | "u" | "p") {
            return Err(format!("device node {path}: unknown type {:?}", self.kind));
        }
        if self.major < 0 || self.minor < 0 {
            return Err(format!("device node {path}: negative number {}:{}", self.major, self.minor));
        }
        let known =
            |permissions: &str| permissions == "none" || permissions.chars().all(|letter| "rwm".contains(letter));
        if !known(&self.permissions) {
            return Err(format!("device node {path}: unknown permissions {:?}", self.permissions));
        }
        Ok(())
    }

    /// Whether the device is meant to be written to.
    pub fn is_written(&self) -> bool {
        self.permissions.is_empty() || self.permissions.contains('w')
    }

    fn check_pattern(&self) -> Result<(), String> {
        let path = &self.path;
        let invalid = |problem: &str| Err(format!("device node {path:?}: {problem}"));
        let (Some(inside), Some(outside)) = (Pattern::new(path), Pattern::new(self.source())) else {
            return invalid("only the last element of a path may be a pattern");
        };
        if inside.pattern() != outside.pattern() {
            return invalid("path and hostPath must end with the same pattern");
        }
        if !self.kind.is_empty() || self.major != 0 || self.minor != 0 {
            return invalid("a pattern goes without type, major and minor");
        }
        Ok(())
    }
}

impl Mount {
    /// Whether something of the host's is bound: the only thing that it can be if nothing is said.
    pub fn is_bind(&self) -> bool {
        matches!(self.kind.as_str(), "" | "none" | "bind")
            || self.options.iter().any(|option| matches!(option.as_str(), "bind" | "rbind"))
    }
}

impl Hook {
    fn check(&self) -> Result<(), String> {
        let stages = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
        if !stages.contains(&self.hook_name.as_str()) {
            return Err(format!("unknown hook {:?}", self.hook_name));
        }
        if !self.path.starts_with('/') || nul(&self.path) || self.args.iter().any(|argument| nul(argument)) {
            return Err(format!("hook {}: {:?} must be an absolute path", self.hook_name, self.path));
        }
        if self.timeout == Some(0) {
            return Err(format!("hook {}: timeout must be at least 1", self.hook_name));
        }
        check_env("hook", &self.env)
    }
}

fn nul(text: &str) -> bool {
    text.contains('\0')
}

fn check_env(what: &str, env: &[String]) -> Result<(), String> {
    match env.iter().find(|entry| nul(entry) || entry.find('=').is_none_or(|at| at == 0)) {
        Some(entry) => Err(format!("{what}: {entry:?} is no NAME=VALUE")),
        None => Ok(()),
    }
}
