//! What the specification demands of a file beyond its form: names, paths, and no feature that the named version lacks.

#![forbid(unsafe_code)]

use super::super::name::{self, Kind};
use super::super::pattern::Pattern;
use super::{CgroupRule, Device, Document, Edits, Hook, IntelRdt, InvalidDocument, Mount, NetDevice, Node};

/// Versions that are understood, in order.
const VERSIONS: [&str; 9] = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "1.2.0"];
/// Most devices of one file.
const MAX_DEVICES: usize = 20_000;

impl Document {
    /// Judges it all. Gives the kind of its devices.
    pub(super) fn check(&self) -> Result<Kind, InvalidDocument> {
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
