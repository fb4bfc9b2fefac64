//! Whether a registry believes a user's password, for who wants to keep it: what `docker login` asks.

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

use super::client::Client;
use super::config::{Endpoint, RegistryConfig};
use super::credentials::no_keys;
use crate::image::reference::ImageReference;

/// What a registry says to a password.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Checked {
    /// It believes it.
    Accepted,
    /// It does not ask for any.
    NotAsked,
}

/// Presents `user` and `password` to the registry of `reference`.
pub fn check(
    registries: &RegistryConfig,
    reference: &ImageReference,
    user: &str,
    password: &str,
) -> Result<Checked, String> {
    // The registry as such: no repository of it.
    let endpoint = Endpoint { repository: String::new(), ..registries.upstream(reference) };
    let credential = Some(format!("{user}:{password}"));
    let client = Client::new(endpoint, registries.network, no_keys(), credential);
    client.authenticate().map_err(|error| match error {
        // The text of these is about files.
        error if error.is_denied() => {
            format!("{} does not accept user {user} with this password", reference.registry)
        }
        error => error.to_string(),
    })?;
    Ok(if client.is_authenticated() { Checked::Accepted } else { Checked::NotAsked })
}
