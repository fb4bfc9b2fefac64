//! What can go wrong between an image reference and its verified bytes. Every error is one line for the user: what
//! failed, why, and what to do.

#![forbid(unsafe_code)]

use std::time::Duration;

use ureq::http::StatusCode;

use crate::image::config::ConfigError;
use crate::image::digest::Digest;
use crate::image::manifest::ManifestError;
use crate::image::platform::Platform;
use crate::image::reference::{InvalidReference, is_docker_hub};

/// Where a password in a reference is said to be from.
pub(super) const IN_REFERENCE: &str = "the image reference";

/// Why an image could not be had.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The reference cannot name an image.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// No answer.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// The administrator says no.
    #[error("image {image} is not allowed here: the administrator has blocked {blocked}")]
    Blocked {
        /// The image.
        image: String,
        /// By which table of the configuration.
        blocked: String,
    },
    /// 404 for a manifest.
    #[error("image {image} not found: {host} has no such repository, tag or digest: check name and tag{hint}")]
    ImageNotFound {
        /// The image.
        image: String,
        /// Who was asked.
        host: String,
        /// Advice, after a semicolon; or nothing.
        hint: String,
    },
    /// 404 for a blob.
    #[error("{host} has the manifest of {repository} but not its blob {digest}: push the image again")]
    BlobNotFound {
        /// Who was asked.
        host: String,
        /// Repository there.
        repository: String,
        /// The blob.
        digest: Digest,
    },
    /// A layer that only whoever made it hands out.
    #[error(
        "{host} does not have the non-distributable layer {digest} of {repository}: push the image again with all its \
         layers (docker: allow-nondistributable-artifacts)"
    )]
    ForeignLayer {
        /// Who was asked.
        host: String,
        /// Repository there.
        repository: String,
        /// The layer's blob.
        digest: Digest,
    },
    /// 401 or 403, and nothing to present.
    #[error(
        "{host} requires credentials for {repository}, or has no such repository: no credentials found for it; check \
         the name, or run \"{}\"{hint}; tried {tried}",
        login(.host)
    )]
    CredentialsMissing {
        /// Who refused.
        host: String,
        /// Repository there.
        repository: String,
        /// Advice, after a semicolon; or nothing.
        hint: String,
        /// Where credentials were looked for.
        tried: String,
    },
    /// The named user's credentials are nowhere.
    #[error(
        "no password of user {user} for {host} found: run \"{} --username={user}\"; tried {tried}",
        login(.host)
    )]
    UserUnknown {
        /// The user in the reference.
        user: String,
        /// The registry.
        host: String,
        /// Where credentials were looked for.
        tried: String,
    },
    /// The token server or registry does not accept user name and password.
    #[error(
        "{server} refuses the password of user {user} (from {file}): {}{detail}",
        renew(.file, .registry)
    )]
    CredentialsRefused {
        /// Who refused: the registry, or its token server.
        server: String,
        /// The registry.
        registry: String,
        /// User name.
        user: String,
        /// Where the password is from.
        file: String,
        /// What the server says about it, in parentheses; or nothing.
        detail: String,
    },
    /// The user is known and may not.
    #[error(
        "{host} does not let user {user} (from {file}) pull {repository}, or has no such repository{detail}: check the \
         name, or ask its owner for access"
    )]
    Forbidden {
        /// Who refused.
        host: String,
        /// Repository there.
        repository: String,
        /// User name.
        user: String,
        /// Where the password is from.
        file: String,
        /// What the server says about it, in parentheses; or nothing.
        detail: String,
    },
    /// A challenge that we cannot meet.
    #[error("{host} asks for authentication in a way that is not supported ({reason})")]
    Challenge {
        /// The registry.
        host: String,
        /// What is wrong with the challenge.
        reason: String,
    },
    /// 429 to the last try, or with a wait that is too long.
    #[error("{host} allows no more requests for now: try again {when}, log in, or configure a mirror")]
    TooManyRequests {
        /// Who refused.
        host: String,
        /// `later` or `in N s`.
        when: String,
    },
    /// Any other unexpected status.
    #[error("{host} answers {status} to the request for {what}{detail}{}", later(.status))]
    Status {
        /// Who answered.
        host: String,
        /// The status.
        status: StatusCode,
        /// What was asked for.
        what: String,
        /// What the server says about it, in parentheses; or nothing.
        detail: String,
    },
    /// A redirect that we do not follow.
    #[error("{host} redirects the request for {what} {reason}")]
    Redirect {
        /// Who redirects.
        host: String,
        /// What was asked for.
        what: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The answer is longer than it may be.
    #[error("{what} from {host} is longer than {limit} bytes")]
    TooLong {
        /// Who answered.
        host: String,
        /// What was asked for.
        what: String,
        /// The most it may have.
        limit: u64,
    },
    /// The registry holds fewer bytes than the manifest says.
    #[error("{what} from {host} ends after {received} of {size} bytes: push the image again")]
    Truncated {
        /// Who answered.
        host: String,
        /// What was asked for.
        what: String,
        /// Bytes received.
        received: u64,
        /// Bytes expected.
        size: u64,
    },
    /// Other bytes than the ones asked for.
    #[error(
        "{what} from {host} has the digest {actual}: somebody changed it, or it was damaged on its way: push the image again"
    )]
    WrongDigest {
        /// Who answered.
        host: String,
        /// What was asked for, with its digest.
        what: String,
        /// Digest of what was received.
        actual: Digest,
    },
    /// The manifest is none, or not for us.
    #[error("image {image}: {source}")]
    Manifest {
        /// The image.
        image: String,
        /// What is wrong with it.
        source: ManifestError,
    },
    /// Indexes that contain indexes.
    #[error("image {0}: image indexes are nested too deeply")]
    Nesting(String),
    /// The config is malformed.
    #[error("image {image}: {source}")]
    Config {
        /// The image.
        image: String,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// Manifest and config contradict each other.
    #[error("image {image}: the manifest has {layers} layers and the config {diff_ids} diffIDs")]
    LayerCount {
        /// The image.
        image: String,
        /// Layers of the manifest.
        layers: usize,
        /// diffIDs of the config.
        diff_ids: usize,
    },
    /// An image for another operating system.
    #[error("image {image} is for {os}, not for {host}: no image of that system runs here")]
    OperatingSystem {
        /// The image.
        image: String,
        /// What it is for.
        os: String,
        /// This machine.
        host: Platform,
    },
    /// The mirrors failed, and then the registry.
    #[error("{}", mirrors_and_registry(.source, .mirrors))]
    Mirrors {
        /// The registry's failure.
        source: Box<RegistryError>,
        /// The mirrors' failures.
        mirrors: String,
    },
}

/// What says more comes first: behind mirrors the registry itself is often not reachable at all, and is not meant to be.
fn mirrors_and_registry(registry: &RegistryError, mirrors: &str) -> String {
    match registry {
        RegistryError::Transport(_) => format!("{mirrors}; and {registry}"),
        _ => format!("{registry}; before that, {mirrors}"),
    }
}

/// The command that keeps a password for `registry`.
fn login(registry: &str) -> String {
    if is_docker_hub(registry) { "pyxis login".to_owned() } else { format!("pyxis login {registry}") }
}

/// What to do about a password that is refused.
fn renew(file: &str, registry: &str) -> String {
    if file == IN_REFERENCE {
        "correct it".to_owned()
    } else if file.ends_with("/config.json") || file.starts_with("docker-credential-") {
        format!("renew it with \"{}\"", login(registry))
    } else {
        // What is found there comes before what is kept elsewhere.
        "renew it there".to_owned()
    }
}

/// What helps against failures of the server's own.
fn later(status: &StatusCode) -> &'static str {
    if status.is_server_error() { ": try again later, or configure a mirror" } else { "" }
}

/// Why no answer came.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{host}: {reason}")]
pub struct TransportError {
    /// Who was asked, `HOST[:PORT]`.
    pub host: String,
    /// What went wrong.
    pub reason: TransportReason,
}

/// What went wrong with a connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportReason {
    /// The name does not exist.
    #[error("there is no such host: check the image name, and the DNS settings of this node")]
    NoSuchHost,
    /// The name could not be looked up.
    #[error("the host name cannot be looked up ({0}): check the DNS settings of this node")]
    Lookup(String),
    /// Nothing listens there.
    #[error("connection refused: nothing listens there, or a firewall is in between: check host and port")]
    Refused,
    /// No route, or no answer to the attempt to connect.
    #[error("cannot be reached from this node ({0}): check its network, or configure a mirror")]
    Unreachable(String),
    /// A certificate that we do not trust.
    #[error(
        "certificate of an unknown authority: add the site's CA certificate to the trust store of this node \
         (update-ca-certificates, update-ca-trust), or name it by ca in pyxis.toml"
    )]
    UnknownAuthority,
    /// A certificate for another name, expired, …
    #[error("certificate not valid: {0}")]
    Certificate(String),
    /// No TLS there.
    #[error("does not speak TLS: if this registry uses plain HTTP, say insecure = true for it in pyxis.toml")]
    NotTls,
    /// Some other TLS failure.
    #[error("TLS failed: {0}")]
    Tls(String),
    /// This machine has no trust store.
    #[error("this node has no CA certificates: install ca-certificates")]
    NoRoots,
    /// The configuration's files about it.
    #[error("the certificates that pyxis.toml names for it cannot be used: {0}")]
    Site(&'static str),
    /// The proxy, not the registry.
    #[error("not reached through the proxy {address} ({reason}): check https_proxy and no_proxy in {place}")]
    Proxy {
        /// `HOST:PORT`.
        address: String,
        /// What is wrong with it.
        reason: String,
        /// Where it is named.
        place: &'static str,
    },
    /// Something is named that is no proxy.
    #[error("not reached: https_proxy or http_proxy in {0} is not of the form http://[USER:PASSWORD@]HOST[:PORT]")]
    NoProxy(&'static str),
    /// No answer in time, or too slow an answer.
    #[error("stalled: {0}: try again, or configure a mirror")]
    Stalled(String),
    /// The connection broke, or what came is not HTTP.
    #[error("the connection broke: {0}")]
    Broken(String),
    /// A URL that is none.
    #[error("malformed URL")]
    Url,
}

impl TransportReason {
    /// How often to try, when `most` is what is tried in general: waiting helps against some failures only.
    pub(super) fn attempts(&self, most: u32) -> u32 {
        match self {
            Self::NoSuchHost
            | Self::UnknownAuthority
            | Self::Certificate(_)
            | Self::NotTls
            | Self::NoRoots
            | Self::Site(_)
            | Self::NoProxy(_)
            | Self::Url => 1,
            Self::Refused | Self::Proxy { .. } => most.min(3),
            Self::Lookup(_) | Self::Unreachable(_) | Self::Tls(_) | Self::Stalled(_) | Self::Broken(_) => most,
        }
    }
}

impl RegistryError {
    /// There is no such thing.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Status { status: StatusCode::NOT_FOUND, .. })
    }

    /// This user may not have it.
    pub fn is_denied(&self) -> bool {
        matches!(
            self,
            Self::CredentialsMissing { .. }
                | Self::UserUnknown { .. }
                | Self::CredentialsRefused { .. }
                | Self::Forbidden { .. }
        )
    }

    /// The registry has no such image, or none for this user.
    pub fn is_a_no(&self) -> bool {
        match self {
            Self::ImageNotFound { .. } | Self::Blocked { .. } => true,
            Self::Mirrors { source, .. } => source.is_a_no(),
            other => other.is_denied(),
        }
    }

    /// 429.
    pub(super) fn too_many_requests(host: &str, retry_after: Option<Duration>) -> Self {
        let when = retry_after.map_or_else(|| "later".to_owned(), |wait| format!("in {} s", wait.as_secs().max(1)));
        Self::TooManyRequests { host: host.to_owned(), when }
    }
}
