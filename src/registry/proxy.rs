//! Proxies (HTTP CONNECT): for which requests there is one, and whose settings count.
//!
//! An import asks, in this order: `[proxy]` of the configuration, the importer's own environment (`import.environment`), and
//! where neither names a proxy the job's `https_proxy`. The first that names one decides, its `no_proxy` included. What a job
//! says is about HTTPS only: there a proxy sees and changes nothing. Of a registry with plain HTTP it would see the site's
//! credentials, and could confirm in the registry's place that its user may have what others have stored.
//!
//! A command that a user types works with his own privileges: his variables come first. What root types for the node's store
//! (`pyxis pull`, `pyxis run`) is an import, to which the shell is what a job is to a step's, and may say more: of plain HTTP
//! too, and whatever `from_jobs` is.

#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use ureq::http::Uri;
use ureq::http::uri::Scheme;

use super::credentials::Secret;
use crate::request::Environment;

/// Longest value of a job's variable that is passed on.
const MAX_VARIABLE: usize = 8 << 10;

/// `[proxy]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProxyConfig {
    /// `https_proxy`: for HTTPS, `[http[s]://][USER:PASSWORD@]HOST[:PORT]`.
    pub https_proxy: Option<Secret>,
    /// `http_proxy`: for registries with plain HTTP.
    pub http_proxy: Option<Secret>,
    /// `no_proxy`: what is reached without, in the form of the variable.
    pub no_proxy: String,
    /// `from_jobs`: whether a job's variables count where nothing is said here.
    pub from_jobs: bool,
}

impl Default for ProxyConfig {
    fn default() -> Self {
        Self { https_proxy: None, http_proxy: None, no_proxy: String::new(), from_jobs: true }
    }
}

/// What one place says: the variables `https_proxy`, `http_proxy`, `no_proxy`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Variables {
    https_proxy: Option<Secret>,
    http_proxy: Option<Secret>,
    no_proxy: String,
}

impl ProxyConfig {
    /// Which key says what cannot be used.
    pub fn check(&self) -> Result<(), &'static str> {
        for (key, value) in [("https_proxy", &self.https_proxy), ("http_proxy", &self.http_proxy)] {
            if value.as_ref().is_some_and(|value| parse(value.reveal()).is_err()) {
                return Err(key);
            }
        }
        Ok(())
    }

    /// What the job's `environment` says, as far as it may.
    pub fn of_job(&self, environment: &Environment) -> Variables {
        match self.from_jobs {
            true => Variables { http_proxy: None, ..self.of_shell(environment) },
            false => Variables::default(),
        }
    }

    /// What the `environment` says in which root has typed a command, as far as it may.
    pub fn of_shell(&self, environment: &Environment) -> Variables {
        if self.https_proxy.is_some() || self.http_proxy.is_some() {
            return Variables::default();
        }
        let variable = |name: &str| environment.get_str(name).filter(|value| value.len() <= MAX_VARIABLE);
        Variables::find(|name| variable(name).map(str::to_owned))
    }
}

impl From<&ProxyConfig> for Variables {
    fn from(config: &ProxyConfig) -> Self {
        let ProxyConfig { https_proxy, http_proxy, no_proxy, .. } = config.clone();
        Self { https_proxy, http_proxy, no_proxy }
    }
}

impl Variables {
    /// The variables as `get` finds them. Names in lower case come first, as in curl.
    fn find(get: impl Fn(&str) -> Option<String>) -> Self {
        let one = |name: &str| {
            let upper = name.to_ascii_uppercase();
            [name, &upper].into_iter().find_map(|name| get(name).filter(|value| !value.trim().is_empty()))
        };
        let proxy = |name: &str| one(name).or_else(|| one("all_proxy")).map(Secret::from);
        let no_proxy = one("no_proxy").unwrap_or_default();
        Self { https_proxy: proxy("https_proxy"), http_proxy: proxy("http_proxy"), no_proxy }
    }

    /// Those of this process.
    pub fn own() -> Self {
        Self::find(|name| std::env::var(name).ok())
    }

    fn is_empty(&self) -> bool {
        self.https_proxy.is_none() && self.http_proxy.is_none()
    }
}

/// Where settings are from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Source {
    /// `[proxy]`.
    Configuration,
    /// `import.environment`.
    Importer,
    /// The job whose image it is.
    Job,
    /// Whoever typed the command.
    Command,
}

impl Source {
    /// For messages: where to look.
    fn place(self) -> &'static str {
        match self {
            Self::Configuration => "[proxy] of pyxis.toml",
            Self::Importer => "import.environment of pyxis.toml",
            Self::Job => "the job's environment",
            Self::Command => "your environment",
        }
    }
}

/// The proxies that count.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Proxies(Option<Arc<Chosen>>);

#[derive(Debug, PartialEq, Eq)]
struct Chosen {
    https: Option<Via>,
    http: Option<Via>,
    exceptions: Vec<Exception>,
}

/// A proxy, and who wants it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Via {
    /// None: what is said is none.
    pub proxy: Option<ureq::Proxy>,
    /// For messages: where to look.
    pub place: &'static str,
}

impl Via {
    /// `HOST:PORT`, without the user's name and password.
    pub fn address(&self) -> String {
        self.proxy.as_ref().map(|proxy| format!("{}:{}", proxy.host(), proxy.port())).unwrap_or_default()
    }
}

impl Proxies {
    /// Of the first that names a proxy.
    pub fn choose<'v>(places: impl IntoIterator<Item = (Source, &'v Variables)>) -> Self {
        let found = places.into_iter().find(|(_, variables)| !variables.is_empty());
        let chosen = found.map(|(source, variables)| {
            let via = |value: &Option<Secret>| {
                let proxy = parse(value.as_ref()?.reveal()).ok();
                Some(Via { proxy, place: source.place() })
            };
            Arc::new(Chosen {
                https: via(&variables.https_proxy),
                http: via(&variables.http_proxy),
                exceptions: variables.no_proxy.split([',', ' ']).filter_map(Exception::parse).collect(),
            })
        });
        Self(chosen)
    }

    /// The proxies of an import, by a process of the node's, for somebody who says the last.
    pub fn of_import(config: &ProxyConfig, (source, said): (Source, &Variables)) -> Self {
        let (site, own) = (Variables::from(config), Variables::own());
        Self::choose([(Source::Configuration, &site), (Source::Importer, &own), (source, said)])
    }

    /// The proxies of a command that a user types.
    pub fn of_command(config: &ProxyConfig) -> Self {
        let (site, own) = (Variables::from(config), Variables::own());
        Self::choose([(Source::Command, &own), (Source::Configuration, &site)])
    }

    /// The proxy for requests to `url`.
    pub(super) fn via(&self, url: &Uri) -> Option<&Via> {
        let chosen = self.0.as_ref()?;
        let is_plain = url.scheme() == Some(&Scheme::HTTP);
        let port = url.port_u16().unwrap_or(if is_plain { 80 } else { 443 });
        let via = if is_plain { &chosen.http } else { &chosen.https };
        let host = url.host().unwrap_or_default();
        via.as_ref().filter(|_| !chosen.exceptions.iter().any(|exception| exception.is_about(host, port)))
    }

    /// The address, and where it is named, of the proxy for `HOST[:PORT]`.
    pub fn address(&self, host: &str, insecure: bool) -> Option<(String, &'static str)> {
        let url = super::http::url(host, insecure, "/").ok()?;
        self.via(&url).map(|via| (via.address(), via.place))
    }
}

/// A proxy that can be used: SOCKS and others cannot.
fn parse(text: &str) -> Result<ureq::Proxy, ()> {
    let proxy = ureq::Proxy::new(text.trim()).map_err(drop)?;
    let usable = matches!(proxy.protocol(), ureq::ProxyProtocol::Http | ureq::ProxyProtocol::Https);
    if usable && !proxy.host().is_empty() { Ok(proxy) } else { Err(()) }
}

/// An entry of `no_proxy`: `*`; `example.com` and what is below it; `.example.com` or `*.example.com`, what is below it;
/// addresses and networks. A port after any of them but a network makes it about that port.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    All,
    Domain { name: String, itself: bool, port: Option<u16> },
    Network { address: IpAddr, prefix: u32, port: Option<u16> },
}

impl Exception {
    fn parse(text: &str) -> Option<Self> {
        let text = text.trim().to_ascii_lowercase();
        if text == "*" {
            return Some(Self::All);
        }
        if let Some((address, prefix)) = text.split_once('/') {
            let (address, prefix) = (unbracketed(address).parse().ok()?, prefix.parse().ok()?);
            return (prefix <= bits(address)).then_some(Self::Network { address, prefix, port: None });
        }
        if let Ok(address) = unbracketed(&text).parse() {
            return Some(Self::Network { address, prefix: bits(address), port: None });
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (text.as_str(), None),
        };
        if let Ok(address) = unbracketed(host).parse() {
            return Some(Self::Network { address, prefix: bits(address), port });
        }
        let below = host.strip_prefix('*').unwrap_or(host).strip_prefix('.');
        let name = below.unwrap_or(host).trim_end_matches('.').to_owned();
        (!name.is_empty()).then_some(Self::Domain { name, itself: below.is_none(), port })
    }

    fn is_about(&self, host: &str, port: u16) -> bool {
        match self {
            Self::All => true,
            Self::Domain { name, itself, port: wanted } => {
                let host = host.trim_end_matches('.').to_ascii_lowercase();
                let fits = match host.strip_suffix(name) {
                    Some("") => *itself,
                    Some(rest) => rest.ends_with('.'),
                    None => false,
                };
                fits && wanted.is_none_or(|wanted| wanted == port)
            }
            Self::Network { address, prefix, port: wanted } => {
                let host: Option<IpAddr> = unbracketed(host).parse().ok();
                host.is_some_and(|host| is_in(host, *address, *prefix)) && wanted.is_none_or(|wanted| wanted == port)
            }
        }
    }
}

fn unbracketed(text: &str) -> &str {
    text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text)
}

fn bits(address: IpAddr) -> u32 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn is_in(host: IpAddr, network: IpAddr, prefix: u32) -> bool {
    let differ = match (host, network) {
        (IpAddr::V4(a), IpAddr::V4(b)) => u128::from(a.to_bits() ^ b.to_bits()),
        (IpAddr::V6(a), IpAddr::V6(b)) => a.to_bits() ^ b.to_bits(),
        _ => return false,
    };
    // A prefix of no bits is everything; a shift by all of them would overflow.
    differ.checked_shr(bits(network).saturating_sub(prefix)).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        let get = |name: &str| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        Variables::find(get)
    }

    fn via(proxies: &Proxies, url: &str) -> Option<String> {
        proxies.via(&url.parse().unwrap()).map(Via::address)
    }

    #[test]
    fn exceptions_have_the_usual_forms() {
        for (entry, url, direct) in [
            ("*", "https://x.example/", true),
            ("example.com", "https://example.com/", true),
            ("example.com", "https://EXAMPLE.com:5000/", true),
            ("example.com", "https://a.b.example.com/", true),
            ("example.com", "https://notexample.com/", false),
            (".example.com", "https://example.com/", false),
            (".example.com", "https://a.example.com/", true),
            ("*.example.com", "https://a.example.com/", true),
            ("*.example.com", "https://example.com/", false),
            ("example.com:5000", "https://example.com:5000/", true),
            ("example.com:5000", "https://example.com/", false),
            ("example.com:443", "https://example.com/", true),
            ("10.0.0.1", "https://10.0.0.1:8443/", true),
            ("10.0.0.1", "https://10.0.0.2/", false),
            ("10.0.0.1:8443", "https://10.0.0.1:8443/", true),
            ("10.0.0.1:8443", "https://10.0.0.1/", false),
            ("10.0.0.0/8", "https://10.200.3.4/", true),
            ("10.0.0.0/8", "https://11.0.0.1/", false),
            ("0.0.0.0/0", "https://11.0.0.1/", true),
            ("0.0.0.0/0", "https://[fd00::1]/", false),
            ("10.0.0.0/8", "https://host-in-ten.example/", false),
            ("fd00::/8", "https://[fd12::1]:5000/", true),
            ("fd00::/8", "https://[fe12::1]:5000/", false),
            ("[fd12::1]:5000", "https://[fd12::1]:5000/", true),
            ("::1", "https://[::1]/", true),
            ("localhost, example.com", "https://example.com/", true),
            ("localhost example.com", "https://example.com/", true),
            ("", "https://example.com/", false),
            (".", "https://example.com/", false),
            ("10.0.0.0/99", "https://10.0.0.1/", false),
            ("example.com:x", "https://example.com/", false),
        ] {
            let some = variables(&[("https_proxy", "http://proxy:3128"), ("no_proxy", entry)]);
            let proxies = Proxies::choose([(Source::Command, &some)]);
            assert_eq!(via(&proxies, url).is_none(), direct, "{entry} {url}");
        }
    }

    #[test]
    fn lower_case_comes_first_and_each_scheme_has_its_own() {
        let proxies = |pairs: &[(&str, &str)]| Proxies::choose([(Source::Command, &variables(pairs))]);
        let both = proxies(&[("https_proxy", "a:1"), ("HTTPS_PROXY", "b:2"), ("HTTP_PROXY", "http://c:3")]);
        assert_eq!(via(&both, "https://x/").as_deref(), Some("a:1"));
        assert_eq!(via(&both, "http://x/").as_deref(), Some("c:3"));
        let all = proxies(&[("ALL_PROXY", "https://all:4"), ("https_proxy", " ")]);
        assert_eq!(via(&all, "https://x/").as_deref(), Some("all:4"));
        assert_eq!(via(&all, "http://x/").as_deref(), Some("all:4"));
        assert_eq!(via(&proxies(&[("NO_PROXY", "*")]), "https://x/"), None);
        for bad in ["socks5://a:1", "ftp://x", "http://", "a b"] {
            let chosen = proxies(&[("https_proxy", bad)]);
            assert!(chosen.via(&"https://x/".parse().unwrap()).unwrap().proxy.is_none(), "{bad}");
        }
    }

    #[test]
    fn jobs_count_for_https_where_the_site_says_nothing() {
        let job: Environment =
            ["HTTPS_PROXY=http://u:hunter2@job:1", "http_proxy=http://job:2", "no_proxy=here"].iter().collect();
        let nothing = ProxyConfig::default();
        let chosen = |config: &ProxyConfig| {
            Proxies::choose([(Source::Configuration, &Variables::from(config)), (Source::Job, &config.of_job(&job))])
        };
        assert_eq!(via(&chosen(&nothing), "https://x/").as_deref(), Some("job:1"));
        assert_eq!(via(&chosen(&nothing), "https://here/"), None);
        assert_eq!(via(&chosen(&nothing), "http://x/"), None, "of plain HTTP a user's proxy would be the registry");
        assert!(!format!("{:?} {:?}", nothing.of_job(&job), chosen(&nothing)).contains("hunter2"));
        let site = ProxyConfig { https_proxy: Some("http://site:3".into()), ..ProxyConfig::default() };
        assert_eq!(via(&chosen(&site), "https://here/").as_deref(), Some("site:3"));
        assert_eq!(site.of_job(&job), Variables::default());
        let without = ProxyConfig { from_jobs: false, ..ProxyConfig::default() };
        assert_eq!(via(&chosen(&without), "https://x/"), None);
        // What root types is the site's word.
        let typed = |config: &ProxyConfig| Proxies::choose([(Source::Command, &config.of_shell(&job))]);
        assert_eq!(via(&typed(&without), "https://x/").as_deref(), Some("job:1"));
        assert_eq!(via(&typed(&without), "http://x/").as_deref(), Some("job:2"));
        assert_eq!(via(&typed(&without), "https://here/"), None);
        assert_eq!(site.of_shell(&job), Variables::default());
        let bad = ProxyConfig { http_proxy: Some("socks5://x".into()), ..ProxyConfig::default() };
        assert_eq!((bad.check(), site.check()), (Err("http_proxy"), Ok(())));
    }

    proptest! {
        #[test]
        fn never_panics(proxy in any::<String>(), entry in "[0-9a-f.:/*\\[\\] ]{0,40}", host in "[a-z0-9.]{1,20}") {
            let some = Variables { https_proxy: Some(proxy.as_str().into()), http_proxy: None, no_proxy: entry };
            let _ = Proxies::choose([(Source::Job, &some)]).address(&host, false);
        }
    }
}
