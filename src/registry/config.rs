//! Registries as the configuration file describes them, and the endpoints that follow for an image.
//!
//! ```toml
//! [registry."docker.io"]
//! mirrors = [{ location = "mirror.example:5000", insecure = true }]
//!
//! [registry."example.com/team"]
//! location = "internal.example/team"
//!
//! [registry."localhost:5000"]
//! insecure = true
//!
//! [network]
//! connect_timeout = 10
//! ```
//!
//! In the spirit of `containers-registries.conf`(5): a table is about all images whose names begin with its own, and of
//! several the longest counts. Mirrors are tried in order, then the registry itself.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::names::ShortNames;
use super::proxy::{Proxies, ProxyConfig};
use super::site::Access;
use crate::image::reference::{ImageReference, is_docker_hub, is_host};

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Registries by how image references begin: `docker.io`, `HOST[:PORT][/PATH]` or `*.DOMAIN`.
    pub registry: BTreeMap<String, RegistryEntry>,
    /// Bounds on waiting.
    pub network: NetworkConfig,
    /// Proxies of the site's.
    pub proxy: ProxyConfig,
    /// The proxies that count: chosen by whoever is going to use them.
    #[serde(skip)]
    pub proxies: Proxies,
    /// What names without a registry mean. Not for the importer, which is told the whole name.
    #[serde(skip)]
    pub short_names: ShortNames,
    /// Directories like `/etc/containers/certs.d`. Not for the importer, which gets the files.
    #[serde(skip)]
    pub certs: Vec<PathBuf>,
    /// What the site's files say, by `HOST[:PORT]`: read by whoever is going to use it.
    #[serde(skip)]
    pub access: BTreeMap<String, Access>,
}

/// One registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryEntry {
    /// Plain HTTP instead of HTTPS: whoever is on the way can read and change what is sent, passwords included.
    pub insecure: bool,
    /// Where its images are instead: `HOST[:PORT][/PATH]`, in place of the table's name.
    pub location: Option<String>,
    /// Its images are refused.
    pub blocked: bool,
    /// Where its images are looked for first, in this order.
    pub mirrors: Vec<Mirror>,
    /// Certificates (PEM) of authorities to trust besides the node's own.
    pub ca: Option<PathBuf>,
    /// A certificate (PEM) to show who asks, and its key.
    pub client_certificate: Option<PathBuf>,
    /// The key (PEM), readable by root alone.
    pub client_key: Option<PathBuf>,
    /// A file like Docker's `config.json` or enroot's `.credentials`, readable by root alone, for users who have no
    /// credentials of their own.
    pub credentials: Option<PathBuf>,
    /// A program like Docker's credential helpers, run as the user.
    pub credential_helper: Option<PathBuf>,
}

/// A place that holds a registry's images.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// `HOST[:PORT][/PATH]`: the image's repository is appended to PATH.
    pub location: String,
    /// Plain HTTP instead of HTTPS.
    #[serde(default)]
    pub insecure: bool,
    /// Which images it is asked for.
    #[serde(default)]
    pub pull_from_mirror: PullFromMirror,
}

/// Which images a mirror is asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PullFromMirror {
    /// All.
    #[default]
    All,
    /// Those that are named by digest, which the mirror cannot change.
    DigestOnly,
    /// Those that are named by tag.
    TagOnly,
}

/// Bounds on waiting for a registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NetworkConfig {
    /// Seconds to connect, TLS included.
    pub connect_timeout: u32,
    /// Seconds without an answer, or with fewer than `min_rate` bytes a second, after which a connection counts as
    /// stalled and the request is tried again.
    pub stall_timeout: u32,
    /// Bytes a second.
    pub min_rate: u32,
    /// Tries of a request before the import fails; for a blob, tries in a row that bring nothing.
    pub attempts: u32,
    /// Most connections for one blob, where the registry is slower on each than this machine; 1 is one.
    pub blob_connections: u32,
    /// Seconds that `srun` may wait to learn what a tag means, for all nodes of a step; 0: it does not ask.
    pub submit_timeout: u32,
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self {
            connect_timeout: 10,
            stall_timeout: 30,
            min_rate: 1024,
            attempts: 5,
            blob_connections: 4,
            submit_timeout: 2,
        }
    }
}

/// A value of the configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRegistry {
    /// A table's name.
    #[error(
        "registry.\"{0}\": expected HOST[:PORT][/PATH] as it stands in image names, such as \"docker.io\", or *.DOMAIN"
    )]
    Name(String),
    /// A mirror's location.
    #[error("registry.\"{registry}\": mirror location \"{location}\": expected HOST[:PORT][/PATH] without https://")]
    Location {
        /// The registry.
        registry: String,
        /// The mirror's location.
        location: String,
    },
    /// The location of a registry.
    #[error("registry.\"{registry}\": location \"{location}\": expected HOST[:PORT][/PATH] without https://")]
    Elsewhere {
        /// The registry.
        registry: String,
        /// Its location.
        location: String,
    },
    /// A path.
    #[error("registry.\"{registry}\": {key}: must be an absolute path: {}", .path.display())]
    Path {
        /// The registry.
        registry: String,
        /// Which key.
        key: &'static str,
        /// What it says.
        path: PathBuf,
    },
    /// Half of what proves who asks.
    #[error("registry.\"{0}\": client_certificate and client_key go together")]
    Half(String),
    /// A short name.
    #[error("short_names: {0}")]
    ShortName(String),
    /// A proxy.
    #[error("proxy.{0}: expected [http[s]://][USER:PASSWORD@]HOST[:PORT]")]
    Proxy(&'static str),
    /// A number that is 0.
    #[error("network.{0}: must be at least 1")]
    Zero(&'static str),
}

/// One place to ask for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    /// `HOST[:PORT]`.
    pub host: String,
    /// Repository there.
    pub repository: String,
    /// Plain HTTP.
    pub insecure: bool,
    /// Not the registry that the user named: `USER@` does not concern it.
    pub mirror: bool,
    /// What the site has for it.
    pub access: Access,
    /// The proxies on the way.
    pub proxies: Proxies,
}

impl Endpoint {
    /// `HOST[:PORT]/REPOSITORY`.
    pub fn origin(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }
}

impl RegistryConfig {
    /// Whether every name, location and number can be used.
    pub fn check(&self) -> Result<(), InvalidRegistry> {
        for (name, entry) in &self.registry {
            entry.check(name)?;
        }
        self.short_names.check().map_err(InvalidRegistry::ShortName)?;
        self.proxy.check().map_err(InvalidRegistry::Proxy)?;
        let network = &self.network;
        for (name, value) in [
            ("connect_timeout", network.connect_timeout),
            ("stall_timeout", network.stall_timeout),
            ("attempts", network.attempts),
            ("blob_connections", network.blob_connections),
        ] {
            if value == 0 {
                return Err(InvalidRegistry::Zero(name));
            }
        }
        Ok(())
    }

    /// Plain HTTP for the registry that `reference` names.
    pub fn allow_http(&mut self, reference: &ImageReference) {
        let own =
            self.registry.iter_mut().filter(|(name, _)| is_registry(split(name).0, &reference.registry).is_some());
        let mut known = false;
        for (name, entry) in own {
            entry.insecure = true;
            known |= !name.contains('/');
        }
        if !known {
            let entry = RegistryEntry { insecure: true, ..RegistryEntry::default() };
            self.registry.insert(reference.registry.clone(), entry);
        }
    }

    /// The table about `reference`, its name, and what of the repository is behind it.
    fn entry<'c>(&'c self, reference: &'c ImageReference) -> Option<(&'c str, &'c RegistryEntry, &'c str)> {
        let repository = reference.repository_path();
        let fitting = self.registry.iter().filter_map(|(name, entry)| {
            let (host, path) = split(name);
            let rest = below(repository, path)?;
            Some(((path.len(), is_registry(host, &reference.registry)?), (name.as_str(), entry, rest)))
        });
        fitting.max_by_key(|(rank, _)| *rank).map(|(_, entry)| entry)
    }

    /// The table whose name is `host`.
    pub(super) fn of_host(&self, host: &str) -> Option<(&str, &RegistryEntry)> {
        self.registry
            .iter()
            .find(|(name, _)| name.as_str() == host || (is_docker_hub(name) && is_docker_hub(host)))
            .map(|(name, entry)| (name.as_str(), entry))
    }

    /// The same without what is about other images.
    pub fn only_for(&self, reference: &ImageReference) -> Self {
        let own = self.entry(reference).map(|(name, entry, _)| (name.to_owned(), entry.clone()));
        let endpoints = self.endpoints(reference);
        let others = endpoints.iter().filter_map(|endpoint| self.of_host(&endpoint.host));
        let registry = others.map(|(name, entry)| (name.to_owned(), entry.clone())).chain(own).collect();
        Self { registry, network: self.network, proxy: self.proxy.clone(), ..Self::default() }
    }

    /// Which table says that `reference` is refused.
    pub fn blocked(&self, reference: &ImageReference) -> Option<String> {
        self.entry(reference).filter(|(_, entry, _)| entry.blocked).map(|(name, ..)| name.to_owned())
    }

    fn at(&self, location: &str, rest: &str, insecure: bool, mirror: bool) -> Option<Endpoint> {
        let (host, path) = location_parts(location)?;
        let repository = [path, rest].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("/");
        let access = self.access.get(host).cloned().unwrap_or_default();
        Some(Endpoint { host: host.to_owned(), repository, insecure, mirror, access, proxies: self.proxies.clone() })
    }

    /// The mirrors to ask for `reference`, in order, before the registry itself.
    pub fn mirrors(&self, reference: &ImageReference) -> Vec<Endpoint> {
        let Some((_, entry, rest)) = self.entry(reference) else { return Vec::new() };
        let has_digest = reference.digest().is_some();
        let asked = entry.mirrors.iter().filter(|mirror| match mirror.pull_from_mirror {
            PullFromMirror::All => true,
            PullFromMirror::DigestOnly => has_digest,
            PullFromMirror::TagOnly => !has_digest,
        });
        asked.filter_map(|mirror| self.at(&mirror.location, rest, mirror.insecure, true)).collect()
    }

    /// The registry that `reference` names, or what is in its place.
    pub fn upstream(&self, reference: &ImageReference) -> Endpoint {
        let entry = self.entry(reference);
        let insecure = entry.is_some_and(|(_, entry, _)| entry.insecure);
        let moved = entry.and_then(|(_, entry, rest)| self.at(entry.location.as_deref()?, rest, insecure, false));
        moved.unwrap_or_else(|| Endpoint {
            host: reference.registry.clone(),
            repository: reference.repository_path().to_owned(),
            insecure,
            mirror: false,
            access: self.access.get(&reference.registry).cloned().unwrap_or_default(),
            proxies: self.proxies.clone(),
        })
    }

    /// All of them.
    pub fn endpoints(&self, reference: &ImageReference) -> Vec<Endpoint> {
        let mut endpoints = self.mirrors(reference);
        endpoints.push(self.upstream(reference));
        endpoints
    }
}

impl RegistryEntry {
    fn check(&self, name: &str) -> Result<(), InvalidRegistry> {
        let (host, path) = split(name);
        let host = host.strip_prefix("*.").unwrap_or(host);
        if !is_host(host) || !is_path(path) || (name.starts_with("*.") && self.location.is_some()) {
            return Err(InvalidRegistry::Name(name.to_owned()));
        }
        if let Some(location) = self.location.as_ref().filter(|location| location_parts(location).is_none()) {
            let (registry, location) = (name.to_owned(), location.clone());
            return Err(InvalidRegistry::Elsewhere { registry, location });
        }
        if let Some(mirror) = self.mirrors.iter().find(|mirror| location_parts(&mirror.location).is_none()) {
            let (registry, location) = (name.to_owned(), mirror.location.clone());
            return Err(InvalidRegistry::Location { registry, location });
        }
        let paths = [
            ("ca", &self.ca),
            ("client_certificate", &self.client_certificate),
            ("client_key", &self.client_key),
            ("credentials", &self.credentials),
            ("credential_helper", &self.credential_helper),
        ];
        for (key, path) in paths {
            if let Some(path) = path.as_ref().filter(|path| !path.is_absolute()) {
                return Err(InvalidRegistry::Path { registry: name.to_owned(), key, path: path.clone() });
            }
        }
        if self.client_certificate.is_some() != self.client_key.is_some() {
            return Err(InvalidRegistry::Half(name.to_owned()));
        }
        Ok(())
    }
}

/// Host and path.
fn split(name: &str) -> (&str, &str) {
    let (host, path) = name.split_once('/').unwrap_or((name, ""));
    (host, path.strip_suffix('/').unwrap_or(path))
}

/// What of `repository` is behind `path`, if it is below it.
fn below<'r>(repository: &'r str, path: &str) -> Option<&'r str> {
    let rest = repository.strip_prefix(path)?;
    if path.is_empty() || rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
}

/// Whether a table about `host` is about `registry`: how well its name says so. Docker Hub has several names.
fn is_registry(host: &str, registry: &str) -> Option<usize> {
    if host == registry || (is_docker_hub(host) && is_docker_hub(registry)) {
        return Some(usize::MAX);
    }
    let domain = host.strip_prefix('*')?;
    registry.ends_with(domain).then_some(domain.len())
}

/// Host and path of a location, if it is well-formed.
fn location_parts(location: &str) -> Option<(&str, &str)> {
    let (host, path) = split(location);
    (is_host(host) && is_path(path)).then_some((host, path))
}

fn is_path(path: &str) -> bool {
    path.is_empty()
        || path.split('/').all(|part| {
            part.bytes().any(|byte| byte.is_ascii_alphanumeric())
                && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> RegistryConfig {
        toml::from_str(text).unwrap()
    }

    fn endpoints(config: &RegistryConfig, typed: &str) -> Vec<(String, bool)> {
        let reference = ImageReference::parse(typed).unwrap();
        let endpoints = config.mirrors(&reference).into_iter().chain([config.upstream(&reference)]);
        endpoints.map(|endpoint| (endpoint.origin(), endpoint.insecure)).collect()
    }

    #[test]
    fn mirrors_come_first_and_hub_has_several_names() {
        let config = parse(
            r#"
            [registry."docker.io"]
            mirrors = [{ location = "localhost:5000", insecure = true }, { location = "harbor.example/hub/" }]
            [registry."localhost:5000"]
            insecure = true
            "#,
        );
        config.check().unwrap();
        for typed in ["alpine", "index.docker.io#library/alpine", "docker.io/alpine"] {
            assert_eq!(
                endpoints(&config, typed),
                [
                    ("localhost:5000/library/alpine".to_owned(), true),
                    ("harbor.example/hub/library/alpine".to_owned(), false),
                    ("registry-1.docker.io/library/alpine".to_owned(), false),
                ]
            );
        }
        assert_eq!(endpoints(&config, "localhost:5000/x"), [("localhost:5000/x".to_owned(), true)]);
        assert_eq!(endpoints(&config, "nvcr.io#/x"), [("nvcr.io/x".to_owned(), false)]);
        assert_eq!(config.network, NetworkConfig::default());
    }

    #[test]
    fn the_longest_name_counts_and_its_location_takes_its_place() {
        let config = parse(
            r#"
            [registry."example.com"]
            mirrors = [{ location = "all.example" }]
            [registry."example.com/team"]
            location = "internal.example/t"
            mirrors = [
                { location = "by-digest.example", pull_from_mirror = "digest-only" },
                { location = "by-tag.example/x", pull_from_mirror = "tag-only" },
            ]
            [registry."example.com/team/one"]
            location = "other.example/alone"
            [registry."*.corp.example"]
            insecure = true
            [registry."*.secret.corp.example"]
            blocked = true
            "#,
        );
        config.check().unwrap();
        let at = |typed: &str| endpoints(&config, typed).into_iter().map(|(at, _)| at).collect::<Vec<_>>();
        assert_eq!(at("example.com/x/y"), ["all.example/x/y", "example.com/x/y"]);
        assert_eq!(at("example.com/teams/y"), ["all.example/teams/y", "example.com/teams/y"]);
        assert_eq!(at("example.com/team/y"), ["by-tag.example/x/y", "internal.example/t/y"]);
        let digest = format!("example.com/team/y@sha256:{}", "0".repeat(64));
        assert_eq!(at(&digest), ["by-digest.example/y", "internal.example/t/y"]);
        assert_eq!(at("example.com/team/one"), ["other.example/alone"]);
        assert_eq!(endpoints(&config, "a.corp.example/x"), [("a.corp.example/x".to_owned(), true)]);
        let blocked = |typed: &str| config.blocked(&ImageReference::parse(typed).unwrap());
        assert_eq!(blocked("a.secret.corp.example/x").as_deref(), Some("*.secret.corp.example"));
        assert_eq!(blocked("a.corp.example/x"), None);
        // The importer is told what it needs.
        let reference = ImageReference::parse("example.com/team/y").unwrap();
        let own = config.only_for(&reference);
        assert_eq!(own.registry.keys().collect::<Vec<_>>(), ["example.com/team"]);
        assert_eq!(own.endpoints(&reference), config.endpoints(&reference));
    }

    #[test]
    fn nonsense_is_named() {
        for (text, message) in [
            ("[registry.\"https://x\"]", "registry.\"https://x\""),
            ("[registry.x]\nmirrors = [{location = \"https://y\"}]", "mirror location \"https://y\""),
            ("[registry.x]\nmirrors = [{location = \"y/../z\"}]", "mirror location \"y/../z\""),
            ("[network]\nattempts = 0", "network.attempts"),
            ("[registry.\"x/../y\"]", "registry.\"x/../y\""),
            ("[registry.\"*.x\"]\nlocation = \"y\"", "or *.DOMAIN"),
            ("[registry.x]\nlocation = \"https://y\"", "location \"https://y\""),
            ("[registry.x]\nca = \"ca.pem\"", "ca: must be an absolute path: ca.pem"),
            ("[registry.x]\nclient_key = \"/k\"", "go together"),
        ] {
            let error = parse(text).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert!(toml::from_str::<RegistryConfig>("[registry.x]\ninsecur = true").is_err());
    }
}
