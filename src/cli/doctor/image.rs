//! `pyxis doctor IMAGE`: the way to an image, step by step, until the one that fails.

use std::net::ToSocketAddrs;

use serde::{Deserialize, Serialize};

use super::{Check, Status};
use crate::cli::enroot::{Asking, Context, is_a_no};
use crate::image::platform::Platform;
use crate::image::reference::ImageReference;
use crate::options::Options;
use crate::options::table::OptionId;
use crate::policy::{Accounts, Subject, Verdict};
use crate::registry::client::Client;
use crate::registry::config::Endpoint;
use crate::registry::credentials::no_keys;
use crate::registry::error::{RegistryError, TransportReason};
use crate::request::{ImageSource, User};
use crate::store::{Store, size};

/// What the part without privileges has found.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Way {
    checks: Vec<Check>,
    /// Bytes of the image's layers, if it was found.
    bytes: Option<u64>,
    /// The registry has answered that it has no such image, or none for us.
    is_a_no: bool,
}

/// Walks the way to `typed`, for whoever typed it.
pub fn checks(typed: &str, context: &Context) -> Vec<Check> {
    let (reference, named) = name(typed);
    let mut checks = vec![named];
    let Some(reference) = reference else { return checks };
    let candidates = context.config.short_names.candidates(&reference);
    if candidates != [reference] {
        let meant: Vec<String> = candidates.iter().map(ToString::to_string).collect();
        checks.push(Check::ok("short name", format!("means {} here", meant.join(", else "))));
    }
    for (at, candidate) in candidates.iter().enumerate() {
        let permitted = policy(candidate, context);
        let denied = permitted.status == Status::Failed;
        checks.push(permitted);
        if denied {
            break;
        }
        let way = context.unprivileged(candidate, |asking| walk(asking, candidate, context));
        let mut way = way.unwrap_or_else(|error| {
            let failed = Check::bad("registry", Status::Failed, error.to_string(), "");
            Way { checks: vec![failed], ..Way::default() }
        });
        // Only an answer sends on to the next one.
        let next = way.is_a_no && at + 1 < candidates.len();
        if next {
            way.checks.iter_mut().filter(|check| check.status == Status::Failed).for_each(|check| {
                check.status = Status::Warning;
            });
        }
        checks.extend(way.checks);
        checks.extend(way.bytes.map(|bytes| space(bytes, context)));
        if !next {
            break;
        }
    }
    checks
}

fn name(typed: &str) -> (Option<ImageReference>, Check) {
    let failed = |detail: String, remedy: &str| (None, Check::bad("name", Status::Failed, detail, remedy));
    let mut options = Options::default();
    let grammar = "an image is [REGISTRY/]NAME[:TAG], a file begins with . or /";
    match options.set(OptionId::Image, typed.as_bytes()).map(|_| options.image) {
        Ok(Some(ImageSource::Registry { reference, .. })) => match reference.check() {
            Ok(()) => {
                let named = Check::ok("name", reference.to_string());
                (Some(reference), named)
            }
            Err(error) => failed(error.to_string(), grammar),
        },
        Ok(_) => failed(format!("{} is on this machine", typed.escape_debug()), "\"pyxis inspect\" reads it"),
        Err(error) => failed(error.to_string(), grammar),
    }
}

/// The users and groups as this process, which is no broker, finds them.
struct Directory;

impl Accounts for Directory {
    fn uid(&self, name: &str) -> Result<u32, String> {
        let found = nix::unistd::User::from_name(name).ok().flatten();
        found.map(|user| user.uid.as_raw()).ok_or_else(|| format!("this node knows no user {name}"))
    }

    fn gid(&self, name: &str) -> Result<u32, String> {
        let found = nix::unistd::Group::from_name(name).ok().flatten();
        found.map(|group| group.gid.as_raw()).ok_or_else(|| format!("this node knows no group {name}"))
    }
}

fn policy(reference: &ImageReference, context: &Context) -> Check {
    let groups = nix::unistd::getgroups().unwrap_or_default().into_iter().map(nix::unistd::Gid::as_raw).collect();
    let (uid, gid) = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
    let subject = Subject::registry(&User { uid, gid, groups }, reference);
    match context.config.policy.judge(&subject, None, &Directory) {
        Verdict::Allowed => Check::ok("policy", "allowed"),
        Verdict::Undecided => Check::ok("policy", "depends on the image's digest"),
        Verdict::IfSigned(_) => Check::ok("policy", "allowed if it is signed with one of the site's keys"),
        Verdict::Denied(message) => {
            Check::bad("policy", Status::Failed, message, "choose another image, or ask the administrators")
        }
    }
}

/// From the registry's name to the manifest.
fn walk(asking: &Asking, reference: &ImageReference, context: &Context) -> Way {
    let mut registries = context.registries(reference);
    let mut way = Way::default();
    if let Err(error) = asking.complete(&mut registries, reference) {
        way.checks.push(Check::bad("certificates", Status::Failed, error.to_string(), ""));
        return way;
    }
    let mut endpoints = registries.mirrors(reference);
    endpoints.push(registries.upstream(reference));
    let last = endpoints.len() - 1;
    let mut answers = false;
    for (at, endpoint) in endpoints.into_iter().enumerate() {
        // One that answers is enough.
        let status = if at == last && !answers { Status::Failed } else { Status::Warning };
        let (checks, reached) = reach(endpoint, status, &registries);
        way.checks.extend(checks);
        answers |= reached;
    }
    if !answers {
        return way;
    }
    let platform = Platform::host();
    match context.resolve_by(asking, reference, &platform) {
        Ok((_, found)) => {
            let asked = match found.client.is_authenticated() {
                true => "the registry accepts what it was given",
                false => "none are needed",
            };
            way.checks.push(Check::ok("credentials", asked));
            way.checks.push(Check::ok(
                "manifest",
                format!("{} from {}", found.manifest_digest, found.client.endpoint().origin()),
            ));
            way.checks.push(match found.warnings.first() {
                None => Check::ok("platform", platform.to_string()),
                Some(warning) => {
                    Check::bad("platform", Status::Warning, warning.clone(), "use an image for this machine")
                }
            });
            way.bytes = Some(found.manifest.layers.iter().fold(0, |sum, layer| layer.size.saturating_add(sum)));
        }
        Err(error) => {
            way.is_a_no = is_a_no(&error);
            let (name, remedy) = error.downcast_ref().map_or(("manifest", ""), failed_at);
            way.checks.push(Check::bad(name, Status::Failed, error.to_string(), remedy));
        }
    }
    way
}

/// Whether one endpoint can be reached, step by step.
fn reach(
    endpoint: Endpoint,
    status: Status,
    registries: &crate::registry::config::RegistryConfig,
) -> (Vec<Check>, bool) {
    let title = if endpoint.mirror { "mirror" } else { "registry" };
    let host = endpoint.host.clone();
    let mut checks = vec![Check::ok(title, endpoint.origin())];
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.bytes().all(|byte| byte.is_ascii_digit()));
    let port = if endpoint.insecure { 80 } else { 443 };
    let address = if has_port { host.clone() } else { format!("{host}:{port}") };
    let proxy = endpoint.proxies.address(&host, endpoint.insecure);
    if let Some((address, place)) = &proxy {
        checks.push(Check::ok("proxy", format!("{address}, by {place}")));
    }
    match address.to_socket_addrs().map(|mut addresses| addresses.next()) {
        Ok(Some(address)) => checks.push(Check::ok("DNS", format!("{host} is {}", address.ip()))),
        // The proxy looks it up.
        _ if proxy.is_some() => {}
        Ok(None) => checks.push(Check::bad("DNS", status, format!("{host} has no address"), "")),
        Err(error) => {
            let remedy = "check the image name, and the DNS settings of this node (/etc/resolv.conf)";
            let reason = crate::sys::reason(error);
            checks.push(Check::bad("DNS", status, format!("{host}: {reason}"), remedy));
            return (checks, false);
        }
    }
    let secure = if endpoint.insecure { "plain HTTP, as pyxis.toml says" } else { "certificate trusted" };
    match Client::new(endpoint, registries.network, no_keys(), None).ping() {
        Ok(()) => checks.push(Check::ok(if secure.starts_with('p') { "connection" } else { "TLS" }, secure)),
        Err(error) => {
            let name = match &error {
                RegistryError::Transport(error) => match error.reason {
                    TransportReason::UnknownAuthority
                    | TransportReason::Certificate(_)
                    | TransportReason::NotTls
                    | TransportReason::Tls(_)
                    | TransportReason::NoRoots
                    | TransportReason::Site(_) => "TLS",
                    TransportReason::Proxy { .. } | TransportReason::NoProxy(_) => "proxy",
                    _ => "connection",
                },
                _ => "connection",
            };
            checks.push(Check::bad(name, status, error.to_string(), ""));
            return (checks, false);
        }
    }
    (checks, true)
}

/// At which step an error ends the way, and what helps besides what the error says.
fn failed_at(error: &RegistryError) -> (&'static str, &'static str) {
    use crate::image::manifest::ManifestError;
    match error {
        RegistryError::Mirrors { source, .. } => failed_at(source),
        RegistryError::Manifest { source: ManifestError::NoPlatform { .. }, .. }
        | RegistryError::OperatingSystem { .. } => ("platform", "use an image that was built for this machine, too"),
        RegistryError::Challenge { .. } => ("credentials", ""),
        error if error.is_denied() => ("credentials", "\"pyxis login REGISTRY\" keeps a password"),
        _ => ("manifest", ""),
    }
}

fn space(bytes: u64, context: &Context) -> Check {
    if !rustix::process::geteuid().is_root() {
        let detail = format!("the image has {}, the store was not looked at", size(bytes));
        return Check::bad("space", Status::Warning, detail, "run \"pyxis doctor\" as root");
    }
    // Saturates at the bounds of u64.
    let needed = (bytes as f64 * context.config.import.space_factor) as u64;
    let path = context.config.store.path.display();
    match Store::open(&context.config.store.path).and_then(|store| store.available()) {
        Ok(available) if available >= needed => {
            Check::ok("space", format!("{} available in {path}, about {} needed", size(available), size(needed)))
        }
        Ok(available) => Check::bad(
            "space",
            Status::Failed,
            format!("{} available in {path}, and about {} needed", size(available), size(needed)),
            "\"pyxis gc --all\" removes what no job uses; store.path can be on a larger file system",
        ),
        Err(error) => Check::bad("space", Status::Failed, error.to_string(), ""),
    }
}
