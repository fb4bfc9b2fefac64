//! Registries as the configuration file describes them, and the endpoints that follow for an image.
//!
//! ```toml
//! [registry."docker.io"]
//! mirrors = [{ location = "mirror.example:5000", insecure = true }]
//!
//! [registry."localhost:5000"]
//! insecure = true
//!
//! [network]
//! connect_timeout = 10
//! ```
//!
//! In the spirit of `containers-registries.conf`(5): mirrors are tried in order, then the registry itself.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::image::reference::{ImageReference, is_docker_hub, is_host};

/// How registries are reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryConfig {
    /// Registries by the name that stands in image references, `docker.io` or `HOST[:PORT]`.
    pub registry: BTreeMap<String, RegistryEntry>,
    /// Bounds on waiting.
    pub network: NetworkConfig,
}

/// One registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistryEntry {
    /// Plain HTTP instead of HTTPS: whoever is on the way can read and change what is sent, passwords included.
    pub insecure: bool,
    /// Where its images are looked for first, in this order.
    pub mirrors: Vec<Mirror>,
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
}

impl Default for NetworkConfig {
    fn default() -> Self {
        Self { connect_timeout: 10, stall_timeout: 30, min_rate: 1024, attempts: 5, blob_connections: 4 }
    }
}

/// A value of the configuration that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidRegistry {
    /// A table's name.
    #[error("registry.\"{0}\": expected HOST or HOST:PORT as it stands in image names, such as \"docker.io\"")]
    Name(String),
    /// A mirror's location.
    #[error("registry.\"{registry}\": mirror location \"{location}\": expected HOST[:PORT][/PATH] without https://")]
    Location {
        /// The registry.
        registry: String,
        /// The mirror's location.
        location: String,
    },
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
            if !is_host(name) {
                return Err(InvalidRegistry::Name(name.clone()));
            }
            if let Some(mirror) = entry.mirrors.iter().find(|mirror| mirror.split().is_none()) {
                return Err(InvalidRegistry::Location { registry: name.clone(), location: mirror.location.clone() });
            }
        }
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
        match self.registry.iter_mut().find(|(name, _)| is_registry_of(name, reference)) {
            Some((_, entry)) => entry.insecure = true,
            None => {
                let entry = RegistryEntry { insecure: true, ..RegistryEntry::default() };
                self.registry.insert(reference.registry.clone(), entry);
            }
        }
    }

    fn entry(&self, reference: &ImageReference) -> Option<&RegistryEntry> {
        self.registry.iter().find(|(name, _)| is_registry_of(name, reference)).map(|(_, entry)| entry)
    }

    /// The mirrors to ask for `reference`, in order, before the registry itself.
    pub fn mirrors(&self, reference: &ImageReference) -> Vec<Endpoint> {
        let repository = reference.repository_path();
        let endpoint = |mirror: &Mirror| {
            let (host, path) = mirror.split()?;
            let repository = if path.is_empty() { repository.to_owned() } else { format!("{path}/{repository}") };
            Some(Endpoint { host: host.to_owned(), repository, insecure: mirror.insecure, mirror: true })
        };
        self.entry(reference).into_iter().flat_map(|entry| &entry.mirrors).filter_map(endpoint).collect()
    }

    /// The registry that `reference` names.
    pub fn upstream(&self, reference: &ImageReference) -> Endpoint {
        Endpoint {
            host: reference.registry.clone(),
            repository: reference.repository_path().to_owned(),
            insecure: self.entry(reference).is_some_and(|entry| entry.insecure),
            mirror: false,
        }
    }
}

/// Whether a table called `name` is about the registry of `reference`: Docker Hub has several names.
fn is_registry_of(name: &str, reference: &ImageReference) -> bool {
    name == reference.registry || (is_docker_hub(name) && is_docker_hub(&reference.registry))
}

impl Mirror {
    /// Host and path of the location, if it is well-formed.
    fn split(&self) -> Option<(&str, &str)> {
        let (host, path) = self.location.split_once('/').unwrap_or((&self.location, ""));
        let path = path.strip_suffix('/').unwrap_or(path);
        let is_path = path.is_empty()
            || path.split('/').all(|part| {
                part.bytes().any(|byte| byte.is_ascii_alphanumeric())
                    && part.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
            });
        (is_host(host) && is_path).then_some((host, path))
    }
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
    fn nonsense_is_named() {
        for (text, message) in [
            ("[registry.\"https://x\"]", "registry.\"https://x\""),
            ("[registry.x]\nmirrors = [{location = \"https://y\"}]", "mirror location \"https://y\""),
            ("[registry.x]\nmirrors = [{location = \"y/../z\"}]", "mirror location \"y/../z\""),
            ("[network]\nattempts = 0", "network.attempts"),
        ] {
            let error = parse(text).check().unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        assert!(toml::from_str::<RegistryConfig>("[registry.x]\ninsecur = true").is_err());
    }
}
