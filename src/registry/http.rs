//! One HTTP exchange: agents, timeouts, trust, redirects, and what failures mean.
//!
//! `Authorization` goes to the origin (scheme, host, port) that a request was made for and to no other: registries
//! redirect blobs to object stores.

#![forbid(unsafe_code)]

use std::io;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ureq::http::header::{AUTHORIZATION, LOCATION, RETRY_AFTER};
use ureq::http::uri::{Authority, Scheme};
use ureq::http::{HeaderMap, HeaderValue, Method, Request, Response, Uri};
use ureq::tls::{Certificate, ClientCert, RootCerts, TlsConfig};
use ureq::{Agent, Body, Proxy};

use super::config::{Endpoint, NetworkConfig};
use super::error::{RegistryError, TransportError, TransportReason};
use super::proxy::{Proxies, Via};
use super::site::Access;

const MAX_REDIRECTS: usize = 5;
const USER_AGENT: &str = concat!("pyxis/", env!("CARGO_PKG_VERSION"));

/// Sends requests, over connections that it keeps.
#[derive(Debug)]
pub(super) struct Http {
    network: NetworkConfig,
    /// What the site has for `host`.
    access: Access,
    host: String,
    proxies: Proxies,
    plain: Ways,
    /// Made on first use: reading the system's certificates takes milliseconds.
    secure: OnceLock<Result<Secure, TransportReason>>,
}

#[derive(Debug)]
struct Secure {
    /// For the registry itself, to which the client's certificate is shown.
    own: Ways,
    others: Ways,
}

/// One agent for those who are reached directly, others for those behind a proxy.
#[derive(Debug)]
struct Ways {
    network: NetworkConfig,
    tls: TlsConfig,
    direct: Agent,
    proxied: OnceLock<Agent>,
}

impl Ways {
    fn new(network: NetworkConfig, tls: TlsConfig) -> Self {
        let direct = agent(&network, tls.clone(), None);
        Self { network, tls, direct, proxied: OnceLock::new() }
    }

    /// `via` is always the same for requests of the same scheme, if there is one.
    fn by(&self, via: Option<&Via>) -> Result<&Agent, TransportReason> {
        let Some(via) = via else { return Ok(&self.direct) };
        let proxy = via.proxy.as_ref().ok_or(TransportReason::NoProxy(via.place))?;
        Ok(self.proxied.get_or_init(|| agent(&self.network, self.tls.clone(), Some(proxy.clone()))))
    }
}

/// An answer.
#[derive(Debug)]
pub(super) struct Answer {
    pub response: Response<Body>,
    /// `HOST[:PORT]` that sent it.
    pub host: String,
    /// Whether it is from the origin that was asked, not from one that it redirected to.
    pub from_origin: bool,
}

/// Which redirects to follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Redirects {
    Follow,
    /// The redirect is the answer.
    Return,
}

/// The cryptography behind TLS. The only place that names it.
fn crypto_provider() -> rustls::crypto::CryptoProvider {
    rustls::crypto::ring::default_provider()
}

impl Http {
    /// For `endpoint` and the servers that it names.
    pub fn new(network: NetworkConfig, endpoint: &Endpoint) -> Self {
        let Endpoint { host, access, proxies, .. } = endpoint.clone();
        let plain = Ways::new(network, TlsConfig::builder().build());
        Self { network, access, host, proxies, plain, secure: OnceLock::new() }
    }

    /// The agent for a URL.
    fn agent(&self, url: &Uri) -> Result<&Agent, TransportReason> {
        let via = self.proxies.via(url);
        if url.scheme().ok_or(TransportReason::Url)? == &Scheme::HTTP {
            return self.plain.by(via);
        }
        let secure = self.secure.get_or_init(|| self.make_secure()).as_ref().map_err(TransportReason::clone)?;
        if host_of(url) == self.host { secure.own.by(via) } else { secure.others.by(via) }
    }

    fn make_secure(&self) -> Result<Secure, TransportReason> {
        let site = |reason: &'static str| TransportReason::Site(reason);
        let roots = rustls_native_certs::load_native_certs().certs;
        let mut roots: Vec<_> = roots.iter().map(|root| Certificate::from_der(root).to_owned()).collect();
        roots.extend(self.access.authorities().map_err(site)?);
        if roots.is_empty() {
            return Err(TransportReason::NoRoots);
        }
        let roots = RootCerts::Specific(Arc::new(roots));
        let provider = Arc::new(crypto_provider());
        let with = |client: Option<ClientCert>| {
            let tls = TlsConfig::builder().unversioned_rustls_crypto_provider(Arc::clone(&provider));
            Ways::new(self.network, tls.root_certs(roots.clone()).client_cert(client).build())
        };
        Ok(Secure { own: with(self.access.client().map_err(site)?), others: with(None) })
    }

    /// What a failed exchange with `url` means. Behind a proxy that alone is looked up and connected to.
    fn failure(&self, url: &Uri, cause: ureq::Error) -> TransportReason {
        use TransportReason as Reason;
        let Some(via) = self.proxies.via(url) else { return transport_reason(cause) };
        let reason = match cause {
            ureq::Error::ConnectProxyFailed(text) => proxy_reason(&text),
            cause => match transport_reason(cause) {
                reason @ (Reason::NoSuchHost | Reason::Lookup(_) | Reason::Refused | Reason::Unreachable(_)) => {
                    reason.to_string().split(':').next().unwrap_or_default().to_owned()
                }
                reason => return reason,
            },
        };
        Reason::Proxy { address: via.address(), reason, place: via.place }
    }

    /// Sends a request, and on to where it is redirected. Any status is an answer.
    pub fn send(
        &self,
        method: &Method,
        url: &Uri,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
        redirects: Redirects,
        what: &str,
    ) -> Result<Answer, RegistryError> {
        let mut target = url.clone();
        for _ in 0..=MAX_REDIRECTS {
            let from_origin = same_origin(url, &target);
            let response = self.send_once(method, &target, headers, authorization.filter(|_| from_origin))?;
            let host = host_of(&target);
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) || redirects == Redirects::Return {
                return Ok(Answer { response, host, from_origin });
            }
            let refuse = |reason| RegistryError::Redirect { host: host.clone(), what: what.to_owned(), reason };
            let location = response.headers().get(LOCATION).ok_or_else(|| refuse("without saying where to"))?;
            let next = resolve_location(&target, location.as_bytes()).ok_or_else(|| refuse("to a malformed URL"))?;
            if url.scheme() == Some(&Scheme::HTTPS) && next.scheme() != Some(&Scheme::HTTPS) {
                return Err(refuse("from HTTPS to plain HTTP"));
            }
            target = next;
        }
        Err(RegistryError::Redirect { host: host_of(url), what: what.to_owned(), reason: "too often" })
    }

    /// Posts a form, for which there are no redirects: it has a secret in it.
    pub fn post(&self, url: &Uri, form: &[u8]) -> Result<Answer, RegistryError> {
        let error = |reason| TransportError { host: host_of(url), reason };
        let agent = self.agent(url).map_err(error)?;
        let request = agent.post(url).content_type("application/x-www-form-urlencoded");
        let response = request.send(form).map_err(|cause| error(self.failure(url, cause)))?;
        Ok(Answer { response, host: host_of(url), from_origin: true })
    }

    fn send_once(
        &self,
        method: &Method,
        url: &Uri,
        headers: &HeaderMap,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response<Body>, TransportError> {
        let error = |reason| TransportError { host: host_of(url), reason };
        let agent = self.agent(url).map_err(error)?;
        let mut request = Request::new(());
        *request.method_mut() = method.clone();
        *request.uri_mut() = url.clone();
        *request.headers_mut() = headers.clone();
        if let Some(value) = authorization {
            request.headers_mut().insert(AUTHORIZATION, value.clone());
        }
        agent.run(request).map_err(|cause| error(self.failure(url, cause)))
    }
}

/// What a proxy's refusal of a CONNECT means, of which we are told `proxy server responded 403/403`.
fn proxy_reason(text: &str) -> String {
    match text.rsplit('/').next().and_then(|code| code.parse::<u16>().ok()) {
        Some(407) => "it wants a user name and a password, or others: http://USER:PASSWORD@HOST:PORT".to_owned(),
        Some(403) => "it answers 403: it does not let this node connect there".to_owned(),
        Some(code) => format!("it answers {code}"),
        None => "it does not answer as a proxy does".to_owned(),
    }
}

fn agent(network: &NetworkConfig, tls: TlsConfig, proxy: Option<Proxy>) -> Agent {
    let seconds = |value: u32| Some(Duration::from_secs(value.into()));
    Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .user_agent(USER_AGENT)
        .tls_config(tls)
        // Or it would look into this process's environment, and not as others do.
        .proxy(proxy)
        .timeout_resolve(seconds(network.connect_timeout.saturating_mul(2)))
        .timeout_connect(seconds(network.connect_timeout))
        .timeout_recv_response(seconds(network.stall_timeout))
        .timeout_per_read(seconds(network.stall_timeout))
        .timeout_per_write(seconds(network.stall_timeout))
        .build()
        .new_agent()
}

/// The URL of `path` at `host`.
pub(super) fn url(host: &str, insecure: bool, path: &str) -> Result<Uri, TransportError> {
    let scheme = if insecure { "http" } else { "https" };
    let parsed = format!("{scheme}://{host}{path}").parse();
    parsed.map_err(|_| TransportError { host: host.to_owned(), reason: TransportReason::Url })
}

/// `HOST[:PORT]` of a URL.
pub(super) fn host_of(url: &Uri) -> String {
    url.authority().map(Authority::to_string).unwrap_or_default()
}

fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |url: &Uri| url.port_u16().or((url.scheme() == Some(&Scheme::HTTP)).then_some(80)).unwrap_or(443);
    let host = |url: &Uri| url.host().map(str::to_ascii_lowercase);
    a.scheme() == b.scheme() && host(a) == host(b) && port(a) == port(b)
}

/// Where a `Location` header leads (RFC 3986, section 5.2, for the forms that servers use). None for other schemes and
/// for URLs with a user name.
fn resolve_location(base: &Uri, location: &[u8]) -> Option<Uri> {
    let mut text = String::new();
    for &byte in location {
        // Signed URLs come with characters that a URL must not have.
        if byte.is_ascii_graphic() && !b"\"<>\\^`{|}".contains(&byte) {
            text.push(char::from(byte));
        } else {
            text.push_str(&format!("%{byte:02X}"));
        }
    }
    let text = text.split('#').next().unwrap_or_default();
    let (scheme, authority) = (base.scheme_str()?, base.authority()?);
    let is_scheme = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric());
    let url = if text.split_once("://").is_some_and(|(scheme, _)| is_scheme(scheme)) {
        text.to_owned()
    } else if text.starts_with("//") {
        format!("{scheme}:{text}")
    } else if text.starts_with('/') {
        format!("{scheme}://{authority}{text}")
    } else {
        let directory = base.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{scheme}://{authority}{directory}/{text}")
    };
    parse_url(&url)
}

/// An absolute URL for HTTP or HTTPS, without a user name (which would become an `Authorization` header).
pub(super) fn parse_url(text: &str) -> Option<Uri> {
    let url: Uri = text.parse().ok()?;
    let is_http = url.scheme() == Some(&Scheme::HTTP) || url.scheme() == Some(&Scheme::HTTPS);
    let authority = url.authority()?;
    (is_http && !authority.as_str().contains('@') && !authority.host().is_empty()).then_some(url)
}

/// What a failed exchange means.
pub(super) fn transport_reason(error: ureq::Error) -> TransportReason {
    use TransportReason as Reason;
    match error {
        ureq::Error::Io(error) => io_reason(error),
        ureq::Error::HostNotFound => Reason::NoSuchHost,
        ureq::Error::Timeout(ureq::Timeout::Resolve) => Reason::Lookup("no answer".to_owned()),
        ureq::Error::Timeout(ureq::Timeout::Connect) => Reason::Unreachable("no answer".to_owned()),
        ureq::Error::Timeout(_) => Reason::Stalled("no data for too long".to_owned()),
        ureq::Error::Rustls(error) => tls_reason(&error),
        ureq::Error::BadUri(_) => Reason::Url,
        ureq::Error::Tls(text) => Reason::Tls(text.to_owned()),
        other => Reason::Broken(other.to_string()),
    }
}

/// What a failed read or connection attempt means.
pub(super) fn io_reason(error: io::Error) -> TransportReason {
    use TransportReason as Reason;
    let inner = error.get_ref();
    if let Some(error) = inner.and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        return tls_reason(error);
    }
    if let Some(ureq::Error::Timeout(_)) = inner.and_then(|inner| inner.downcast_ref::<ureq::Error>()) {
        return Reason::Stalled("no data for too long".to_owned());
    }
    let kind = error.kind();
    let text = crate::sys::reason(error);
    // std has no error kind for getaddrinfo(3).
    if let Some(reason) = text.strip_prefix("failed to lookup address information: ") {
        // EAI_NONAME and EAI_NODATA, in glibc's words.
        let missing = ["Name or service not known", "No address associated with hostname"];
        return if missing.contains(&reason) { Reason::NoSuchHost } else { Reason::Lookup(reason.to_owned()) };
    }
    match kind {
        io::ErrorKind::ConnectionRefused => Reason::Refused,
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable | io::ErrorKind::NetworkDown => {
            Reason::Unreachable(text)
        }
        io::ErrorKind::TimedOut | io::ErrorKind::WouldBlock => Reason::Stalled("no data for too long".to_owned()),
        _ => Reason::Broken(text),
    }
}

fn tls_reason(error: &rustls::Error) -> TransportReason {
    use TransportReason as Reason;
    use rustls::CertificateError as Certificate;
    match error {
        rustls::Error::InvalidCertificate(Certificate::UnknownIssuer) => Reason::UnknownAuthority,
        rustls::Error::InvalidCertificate(Certificate::Expired | Certificate::ExpiredContext { .. }) => {
            Reason::Certificate("it has expired, or the clock of this node is wrong".to_owned())
        }
        rustls::Error::InvalidCertificate(
            Certificate::NotValidForName | Certificate::NotValidForNameContext { .. },
        ) => Reason::Certificate("it is for another host name".to_owned()),
        rustls::Error::InvalidCertificate(other) => Reason::Certificate(format!("{other:?}")),
        rustls::Error::InvalidMessage(_) => Reason::NotTls,
        other => Reason::Tls(other.to_string()),
    }
}

/// `Retry-After` (RFC 9110, section 10.2.3): seconds or a date.
pub(super) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = UNIX_EPOCH + Duration::from_secs(parse_date(text)?);
    Some(date.duration_since(now).unwrap_or_default())
}

/// Seconds since 1970 of an IMF-fixdate, `Sun, 06 Nov 1994 08:49:37 GMT`.
fn parse_date(text: &str) -> Option<u64> {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let words: Vec<&str> = text.split_ascii_whitespace().collect();
    let [_, day, month, year, time, "GMT"] = words[..] else { return None };
    let month = MONTHS.iter().position(|name| *name == month)? as u64 + 1;
    let (day, year): (u64, u64) = (day.parse().ok()?, year.parse().ok()?);
    let clock: Vec<u64> = time.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [hours, minutes, seconds] = clock[..] else { return None };
    if !(1970..=9999).contains(&year) || !(1..=31).contains(&day) || hours > 23 || minutes > 59 || seconds > 60 {
        return None;
    }
    // Days before the month, in a year that begins in March: leap days come last.
    let (shifted_year, shifted_month) = if month > 2 { (year, month - 3) } else { (year - 1, month + 9) };
    let leap_days = shifted_year / 4 - shifted_year / 100 + shifted_year / 400;
    let days = shifted_year * 365 + leap_days + (153 * shifted_month + 2) / 5 + day - 1;
    const DAYS_TO_1970: u64 = 719_468;
    Some(((days.checked_sub(DAYS_TO_1970)? * 24 + hours) * 60 + minutes) * 60 + seconds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_resolved() {
        let base: Uri = "https://reg.io:5000/v2/x/blobs/sha256:00".parse().unwrap();
        for (location, resolved) in [
            ("https://cdn.io/a?b=c%2F|d#e", Some("https://cdn.io/a?b=c%2F%7Cd")),
            ("//cdn.io/a", Some("https://cdn.io/a")),
            ("/v2/y", Some("https://reg.io:5000/v2/y")),
            ("z?q=http://x", Some("https://reg.io:5000/v2/x/blobs/z?q=http://x")),
            ("ftp://cdn.io/a", None),
            ("https://user:pass@cdn.io/a", None),
            ("https://", None),
            ("https:///a", None),
        ] {
            let url = resolve_location(&base, location.as_bytes()).map(|url| url.to_string());
            assert_eq!(url.as_deref(), resolved, "{location}");
        }
        assert!(resolve_location(&base, b"/\xff \n").is_some());
    }

    #[test]
    fn origins_are_scheme_host_and_port() {
        let same = |a: &str, b: &str| same_origin(&a.parse().unwrap(), &b.parse().unwrap());
        assert!(same("https://reg.io/a", "https://REG.io:443/b"));
        assert!(!same("https://reg.io/a", "https://reg.io:444/a"));
        assert!(!same("http://reg.io/a", "https://reg.io/a"));
        assert!(!same("http://reg.io/a", "http://cdn.reg.io/a"));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let wait = |text: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RETRY_AFTER, text.parse().unwrap());
            retry_after(&headers, UNIX_EPOCH + Duration::from_secs(784_111_770)).map(|wait| wait.as_secs())
        };
        assert_eq!(wait("17"), Some(17));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:37 GMT"), Some(7));
        assert_eq!(wait("Sun, 06 Nov 1994 08:49:00 GMT"), Some(0));
        assert_eq!(parse_date("Thu, 29 Feb 2024 00:00:00 GMT"), Some(1_709_164_800));
        assert_eq!(parse_date("Thu, 01 Jan 1970 00:00:00 GMT"), Some(0));
        for text in ["", "-1", "soon", "Sun, 06 Nov 1994 08:49 GMT", "Sun, 06 Nov 99999999999999999999 08:49:37 GMT"] {
            assert_eq!(wait(text), None, "{text}");
        }
    }

    #[test]
    fn failures_say_what_they_mean() {
        let lookup = |text: &str| io::Error::other(format!("failed to lookup address information: {text}"));
        assert_eq!(io_reason(lookup("Name or service not known")), TransportReason::NoSuchHost);
        assert!(matches!(io_reason(lookup("Temporary failure in name resolution")), TransportReason::Lookup(_)));
        let tls = |error: rustls::Error| io_reason(io::Error::new(io::ErrorKind::InvalidData, error));
        let issuer = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        assert_eq!(tls(issuer), TransportReason::UnknownAuthority);
        let message = rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType);
        assert_eq!(tls(message), TransportReason::NotTls);
        assert_eq!(io_reason(io::ErrorKind::ConnectionRefused.into()), TransportReason::Refused);
    }
}
