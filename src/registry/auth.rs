//! Authentication to one registry (distribution-spec, and Docker's token specification, "distribution/token"): nothing
//! is presented until the registry challenges; then a token from the token server that it names, or Basic.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::header::WWW_AUTHENTICATE;
use ureq::http::uri::Scheme;
use ureq::http::{HeaderMap, HeaderValue, Uri};

use super::challenge::{self, Challenge};
use super::config::Endpoint;
use super::credentials::{Credential, CredentialSet};
use super::error::RegistryError;
use super::http::{host_of, parse_url};
use super::{AUTHENTICATED, PROGRESS};

/// Most bytes of a token server's answer.
pub(super) const MAX_TOKEN_BYTES: u64 = 1024 * 1024;
/// What a token lives if the server does not say (Docker's token specification).
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);

/// What is presented to one registry, for all threads.
#[derive(Debug)]
pub(super) struct Authenticator {
    endpoint: Endpoint,
    credentials: CredentialSet,
    user: Option<String>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Raised with every new header.
    generation: u64,
    header: Option<HeaderValue>,
    /// The registry's challenge, and when to answer it again unasked.
    renewal: Option<(Challenge, Instant)>,
    /// Whose credentials are behind the header.
    identity: Option<Credential>,
}

/// Without the header.
impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("generation", &self.generation).field("identity", &self.identity).finish()
    }
}

/// A token server's request: what to GET, with which credentials.
#[derive(Debug)]
pub(super) struct TokenRequest {
    pub url: Uri,
    pub credential: Option<Credential>,
}

impl TokenRequest {
    pub fn authorization(&self) -> Result<Option<HeaderValue>, RegistryError> {
        self.credential.as_ref().map(basic).transpose()
    }
}

/// What a token server answers.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl Authenticator {
    pub fn new(endpoint: Endpoint, credentials: CredentialSet, user: Option<String>) -> Self {
        // `USER@` is about the registry that was named, not about its mirrors.
        let user = user.filter(|_| !endpoint.mirror);
        Self { endpoint, credentials, user, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A state is replaced as a whole: it is consistent whatever happened to its last user.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The header to send, and its generation. Asks for a new token by `get_token` if the present one is about to
    /// expire; if that fails, the registry will challenge.
    pub fn header(
        &self,
        get_token: impl Fn(&TokenRequest) -> Result<Vec<u8>, RegistryError>,
    ) -> (u64, Option<HeaderValue>) {
        let mut state = self.state();
        if let Some((challenge, _)) = state.renewal.take_if(|(_, when)| Instant::now() >= *when)
            && let Ok(next) = self.bearer(&state, &challenge, get_token)
        {
            *state = next;
        }
        (state.generation, state.header.clone())
    }

    /// Answers a 401 to a request that was sent with the header of `generation`, so that the request may be sent again.
    pub fn renew(
        &self,
        generation: u64,
        headers: &HeaderMap,
        get_token: impl Fn(&TokenRequest) -> Result<Vec<u8>, RegistryError>,
    ) -> Result<(), RegistryError> {
        let mut state = self.state();
        if state.generation != generation {
            // Another thread was faster.
            return Ok(());
        }
        let challenges: Vec<Challenge> = headers
            .get_all(WWW_AUTHENTICATE)
            .iter()
            .flat_map(|value| challenge::parse(&String::from_utf8_lossy(value.as_bytes())))
            .collect();
        let with = |scheme| challenges.iter().find(|challenge| challenge.scheme == scheme);
        *state = if let Some(challenge) = with("bearer") {
            self.bearer(&state, challenge, get_token)?
        } else if with("basic").is_some() {
            if state.header.is_some() {
                return Err(self.refused(&state, String::new()));
            }
            let credential = self.find(&self.endpoint.host)?.ok_or_else(|| self.missing())?;
            announce(Some(&credential));
            State {
                generation: generation + 1,
                header: Some(basic(&credential)?),
                renewal: None,
                identity: Some(credential),
            }
        } else {
            let schemes: Vec<_> = challenges.iter().map(|challenge| challenge.scheme.as_str()).collect();
            let reason = if schemes.is_empty() { "401 without a challenge".to_owned() } else { schemes.join(", ") };
            return Err(self.unsupported(&reason));
        };
        tracing::info!(target: PROGRESS, "{AUTHENTICATED}");
        Ok(())
    }

    /// Whether the registry has asked who we are.
    pub fn was_asked(&self) -> bool {
        self.state().header.is_some()
    }

    /// The error for a request that the registry refuses for good, with 401 or 403.
    pub fn denied(&self, detail: String) -> RegistryError {
        self.refused(&self.state(), detail)
    }

    fn refused(&self, state: &State, detail: String) -> RegistryError {
        match &state.identity {
            None => self.missing(),
            Some(identity) => RegistryError::Forbidden {
                host: self.endpoint.host.clone(),
                repository: self.endpoint.repository.clone(),
                user: identity.user.clone(),
                file: identity.file.clone(),
                detail,
            },
        }
    }

    /// The error for a token server's refusal.
    pub fn token_refused(&self, request: &TokenRequest, detail: String) -> RegistryError {
        match &request.credential {
            None => self.missing(),
            Some(credential) => RegistryError::CredentialsRefused {
                server: host_of(&request.url),
                user: credential.user.clone(),
                file: credential.file.clone(),
                detail,
            },
        }
    }

    fn missing(&self) -> RegistryError {
        RegistryError::CredentialsMissing {
            host: self.endpoint.host.clone(),
            repository: self.endpoint.repository.clone(),
            tried: self.credentials.tried(),
        }
    }

    fn unsupported(&self, reason: &str) -> RegistryError {
        RegistryError::Challenge {
            host: self.endpoint.host.clone(),
            reason: reason.chars().take(200).flat_map(char::escape_debug).collect(),
        }
    }

    /// What to present to `realm`; an error if the reference names a user whom no file knows.
    fn find(&self, realm: &str) -> Result<Option<Credential>, RegistryError> {
        let credential = self.credentials.find(&self.endpoint.host, realm, self.user.as_deref());
        match (credential, &self.user) {
            (None, Some(user)) => Err(RegistryError::UserUnknown {
                user: user.clone(),
                host: self.endpoint.host.clone(),
                tried: self.credentials.tried(),
            }),
            (credential, _) => Ok(credential),
        }
    }

    /// The state after a Bearer challenge: a new token.
    fn bearer(
        &self,
        state: &State,
        challenge: &Challenge,
        get_token: impl Fn(&TokenRequest) -> Result<Vec<u8>, RegistryError>,
    ) -> Result<State, RegistryError> {
        let request = self.token_request(challenge)?;
        announce(request.credential.as_ref());
        let asked = Instant::now();
        let answer: TokenAnswer = serde_json::from_slice(&get_token(&request)?)
            .map_err(|_| self.unsupported("the answer of its token server is malformed"))?;
        let token = [answer.token, answer.access_token].into_iter().flatten().find(|token| !token.is_empty());
        let token = token.ok_or_else(|| self.unsupported("its token server gives no token"))?;
        let header = sensitive(&format!("Bearer {token}"))
            .ok_or_else(|| self.unsupported("its token server gives a malformed token"))?;
        let lifetime = answer.expires_in.filter(|&seconds| seconds > 0).map_or(DEFAULT_LIFETIME, Duration::from_secs);
        // A token that lasts for years needs no renewal; an addition that overflows means the same.
        let renewal = asked.checked_add(lifetime.mul_f32(0.9)).map(|when| (challenge.clone(), when));
        Ok(State { generation: state.generation + 1, header: Some(header), renewal, identity: request.credential })
    }

    fn token_request(&self, challenge: &Challenge) -> Result<TokenRequest, RegistryError> {
        let realm = challenge.parameter("realm").unwrap_or_default();
        let url = parse_url(realm).ok_or_else(|| self.unsupported("the realm of its challenge is no URL"))?;
        if url.scheme() == Some(&Scheme::HTTP) && !self.endpoint.insecure {
            return Err(self.unsupported("its token server uses plain HTTP"));
        }
        let credential = self.find(&host_of(&url))?;
        let own_scope = format!("repository:{}:pull", self.endpoint.repository);
        let scope = challenge.parameter("scope").filter(|scope| !scope.is_empty()).unwrap_or(&own_scope);
        let mut text = realm.split('#').next().unwrap_or_default().to_owned();
        let service = challenge.parameter("service").map(|service| ("service", service));
        let account = credential.as_ref().map(|credential| ("account", credential.user.as_str()));
        for (name, value) in service.into_iter().chain([("scope", scope)]).chain(account) {
            text.push(if text.contains('?') { '&' } else { '?' });
            text.push_str(name);
            text.push('=');
            percent_encode(value, &mut text);
        }
        let url = parse_url(&text).ok_or_else(|| self.unsupported("the realm of its challenge is no URL"))?;
        Ok(TokenRequest { url, credential })
    }
}

/// `Basic` (RFC 7617).
fn basic(credential: &Credential) -> Result<HeaderValue, RegistryError> {
    let pair = STANDARD.encode(format!("{}:{}", credential.user, credential.secret));
    sensitive(&format!("Basic {pair}")).ok_or_else(|| RegistryError::CredentialsRefused {
        server: credential.host.clone(),
        user: credential.user.clone(),
        file: credential.file.clone(),
        detail: String::new(),
    })
}

/// A header value that does not show in debug output.
fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn percent_encode(text: &str, url: &mut String) {
    for &byte in text.as_bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~:/,".contains(&byte) {
            url.push(char::from(byte));
        } else {
            url.push_str(&format!("%{byte:02X}"));
        }
    }
}

/// Says as whom we ask.
fn announce(credential: Option<&Credential>) {
    let user = credential.map_or("<anonymous>", |credential| &credential.user);
    tracing::info!(target: PROGRESS, "Authenticating with user: {user}");
    if let Some(credential) = credential {
        tracing::info!(target: PROGRESS, "Using credentials from file: {}", credential.file);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn authenticator(insecure: bool) -> Authenticator {
        let endpoint = Endpoint { host: "reg.io".into(), repository: "a/b".into(), insecure, mirror: false };
        Authenticator::new(endpoint, CredentialSet::default(), None)
    }

    fn challenge(text: &str) -> Challenge {
        challenge::parse(text).remove(0)
    }

    #[test]
    fn the_token_request_forwards_service_and_scope() {
        for (text, url) in [
            (
                r#"Bearer realm="https://auth.io/t",service="a b&c",scope="repository:a/b:pull,push",error="x""#,
                "https://auth.io/t?service=a%20b%26c&scope=repository:a/b:pull,push",
            ),
            (r#"Bearer realm="https://auth.io/t?x=y#z""#, "https://auth.io/t?x=y&scope=repository:a/b:pull"),
        ] {
            let request = authenticator(false).token_request(&challenge(text)).unwrap();
            assert_eq!(request.url.to_string(), url);
            assert!(request.credential.is_none());
        }
    }

    #[test]
    fn strange_realms_are_refused() {
        for realm in ["", "/token", "ftp://x/", "http://auth.io/", "https://user:pass@auth.io/", "https://a b/"] {
            let challenge = challenge(&format!("Bearer realm=\"{realm}\",service=x"));
            let error = authenticator(false).token_request(&challenge).unwrap_err().to_string();
            assert!(error.starts_with("reg.io asks for authentication in a way that is not supported"), "{error}");
        }
        assert!(authenticator(true).token_request(&challenge("Bearer realm=\"http://auth.io/\"")).is_ok());
    }

    #[test]
    fn tokens_are_checked_and_renewed() {
        let authenticator = authenticator(false);
        let mut headers = HeaderMap::new();
        headers.append(WWW_AUTHENTICATE, "Negotiate".parse().unwrap());
        headers.append(WWW_AUTHENTICATE, "Bearer realm=\"https://auth.io/\"".parse().unwrap());
        for answer in ["", "[]", "{}", r#"{"token": ""}"#, r#"{"token": "a\nb"}"#] {
            assert!(authenticator.renew(0, &headers, |_| Ok(answer.into())).is_err(), "{answer}");
        }
        authenticator.renew(0, &headers, |_| Ok(r#"{"access_token": "t1", "expires_in": 3600}"#.into())).unwrap();
        let never = |_: &TokenRequest| -> Result<Vec<u8>, RegistryError> { panic!("not asked") };
        let (generation, header) = authenticator.header(never);
        assert_eq!((generation, header.unwrap().to_str().unwrap()), (1, "Bearer t1"));
        // A thread that still used the header before it does not ask again.
        authenticator.renew(0, &headers, never).unwrap();
        let short = |_: &TokenRequest| Ok(r#"{"token": "t2", "expires_in": 0}"#.into());
        authenticator.renew(1, &headers, short).unwrap();
        assert!(!format!("{authenticator:?}").contains("t2"));
        let huge = format!(r#"{{"token": "t3", "expires_in": {}}}"#, u64::MAX);
        authenticator.renew(2, &headers, |_| Ok(huge.clone().into())).unwrap();
    }
}
