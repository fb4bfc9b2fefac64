//! A client of the OCI distribution protocol (distribution-spec 1.1): references to endpoints, authentication, manifests
//! and blobs, with retries and resume.

#![forbid(unsafe_code)]

mod auth;
pub mod blob;
pub mod challenge;
pub mod client;
pub mod config;
pub mod containers;
pub mod credentials;
pub mod error;
mod http;
pub mod login;
pub mod names;
pub mod places;
pub mod proxy;
mod referrers;
pub mod resolve;
mod retry;
pub mod site;
pub mod stream;
mod team;

use sha2::{Digest as _, Sha256};

use crate::image::digest::Digest;

/// The target of the events that tell how far an image is, in the words of enroot: for whoever shows them to a user.
pub const PROGRESS: &str = "spank_pyxis::registry::progress";
/// The last word of an authentication, as an event of [`PROGRESS`].
pub const AUTHENTICATED: &str = "Authentication succeeded";

/// The target of the events that tell what went wrong and is tried again.
pub const TROUBLE: &str = "spank_pyxis::registry::trouble";

/// The digest of `bytes`.
pub fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_bytes(Sha256::digest(bytes).into())
}
