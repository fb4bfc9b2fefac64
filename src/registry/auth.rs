//! Authentication to one registry (distribution-spec, and Docker's token specification, "distribution/token"): nothing
//! is presented until the registry challenges; then a token from the token server that it names, or Basic.
//!
//! A password buys tokens by GET, and an identity token by POST (Docker's "OAuth2 token authentication"), as Docker's own
//! client does it. Credentials are looked for when the registry asks, and again when they are refused: passwords of ECR and
//! Google's registries expire, and whoever gave one may have another by then.

#![forbid(unsafe_code)]

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use ureq::http::header::WWW_AUTHENTICATE;
use ureq::http::uri::Scheme;
use ureq::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use zeroize::Zeroizing;

use super::challenge::{self, Challenge};
use super::config::Endpoint;
use super::credentials::{Answer, Credential, Kind, Query, SharedKeyring};
use super::error::{IN_REFERENCE, RegistryError};
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
    keyring: SharedKeyring,
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
    /// Where they were looked for.
    tried: String,
}

/// Without the header.
impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("generation", &self.generation).field("identity", &self.identity).finish()
    }
}

/// A token server's request: what to GET or POST, with which credentials.
#[derive(Debug)]
pub(super) struct TokenRequest {
    pub url: Uri,
    /// For an identity token: what to POST.
    pub form: Option<Form>,
    credential: Option<Credential>,
    tried: String,
}

/// `application/x-www-form-urlencoded`, with a secret in it.
pub(super) struct Form(Zeroizing<String>);

impl Form {
    pub fn bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// Without the content.
impl std::fmt::Debug for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Form")
    }
}

impl TokenRequest {
    pub fn authorization(&self) -> Result<Option<HeaderValue>, RegistryError> {
        match &self.credential {
            Some(credential) if self.form.is_none() => basic(&host_of(&self.url), credential).map(Some),
            _ => Ok(None),
        }
    }
}

/// What a token server answers.
#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
    /// The identity token to use from now on.
    refresh_token: Option<String>,
}

impl Authenticator {
    pub fn new(endpoint: Endpoint, keyring: SharedKeyring, user: Option<String>) -> Self {
        // `USER@` is about the registry that was named, not about its mirrors.
        let user = user.filter(|_| !endpoint.mirror);
        Self { endpoint, keyring, user, state: Mutex::default() }
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
            self.password(&state)?
        } else {
            let schemes: Vec<_> = challenges.iter().map(|challenge| challenge.scheme.as_str()).collect();
            let reason = if schemes.is_empty() { "401 without a challenge".to_owned() } else { schemes.join(", ") };
            return Err(self.unsupported(&reason));
        };
        tracing::info!(target: PROGRESS, "{AUTHENTICATED}");
        Ok(())
    }

    /// Looks for another password after a 403 to a request with the header of `generation`: that is how ECR says that one
    /// has expired. Says whether the request may be sent again.
    pub fn look_again(&self, generation: u64) -> bool {
        let mut state = self.state();
        if state.generation != generation {
            return true;
        }
        if state.identity.is_none() || state.renewal.is_some() {
            return false;
        }
        match self.password(&state) {
            Ok(next) => {
                *state = next;
                true
            }
            Err(_) => false,
        }
    }

    /// Whether the registry has asked who we are.
    pub fn was_asked(&self) -> bool {
        self.state().header.is_some()
    }

    /// The error for a request that the registry refuses for good, with 401 or 403.
    pub fn denied(&self, status: StatusCode, detail: String) -> RegistryError {
        self.refused(&self.state(), status, detail)
    }

    fn refused(&self, state: &State, status: StatusCode, detail: String) -> RegistryError {
        match &state.identity {
            None => self.missing(&state.tried),
            // Behind a token the password was believed.
            Some(identity) if status == StatusCode::UNAUTHORIZED && state.renewal.is_none() => {
                RegistryError::CredentialsRefused {
                    server: self.endpoint.host.clone(),
                    registry: self.endpoint.host.clone(),
                    user: identity.user.clone(),
                    file: identity.source.clone(),
                    detail,
                }
            }
            Some(identity) => RegistryError::Forbidden {
                host: self.endpoint.host.clone(),
                repository: self.endpoint.repository.clone(),
                user: identity.user.clone(),
                file: identity.source.clone(),
                detail,
            },
        }
    }

    /// The error for a token server's refusal.
    pub fn token_refused(&self, request: &TokenRequest, detail: String) -> RegistryError {
        match &request.credential {
            None => self.missing(&request.tried),
            Some(credential) => RegistryError::CredentialsRefused {
                server: host_of(&request.url),
                registry: self.endpoint.host.clone(),
                user: credential.user.clone(),
                file: credential.source.clone(),
                detail,
            },
        }
    }

    /// `tried` is empty if nothing was: the registry refuses without having asked.
    fn missing(&self, tried: &str) -> RegistryError {
        let looked;
        let tried = if tried.is_empty() {
            looked = self.look(&self.endpoint.host).tried();
            &looked
        } else {
            tried
        };
        RegistryError::CredentialsMissing {
            host: self.endpoint.host.clone(),
            repository: self.endpoint.repository.clone(),
            hint: String::new(),
            tried: tried.to_owned(),
        }
    }

    fn unsupported(&self, reason: &str) -> RegistryError {
        RegistryError::Challenge {
            host: self.endpoint.host.clone(),
            reason: reason.chars().take(200).flat_map(char::escape_debug).collect(),
        }
    }

    fn look(&self, realm: &str) -> Answer {
        self.keyring.find(&Query {
            registry: self.endpoint.host.clone(),
            repository: self.endpoint.repository.clone(),
            realm: realm.to_owned(),
            user: self.user.clone(),
        })
    }

    /// What to present to `realm`, and where it was looked for; an error if the reference names a user whom no file
    /// knows.
    fn find(&self, realm: &str) -> Result<(Option<Credential>, String), RegistryError> {
        if let Some((user, secret)) = self.user.as_deref().and_then(|user| user.split_once(':')) {
            let source = IN_REFERENCE.to_owned();
            let credential = Credential { user: user.to_owned(), secret: secret.into(), kind: Kind::Password, source };
            return Ok((Some(credential), String::new()));
        }
        let answer = self.look(realm);
        let tried = answer.tried();
        match (answer.credential, &self.user) {
            (None, Some(user)) => {
                Err(RegistryError::UserUnknown { user: user.clone(), host: self.endpoint.host.clone(), tried })
            }
            (credential, _) => Ok((credential, tried)),
        }
    }

    /// The state after a Basic challenge: a password, and another one than that which is refused.
    fn password(&self, state: &State) -> Result<State, RegistryError> {
        let (credential, tried) = self.find(&self.endpoint.host)?;
        let credential = credential.ok_or_else(|| self.missing(&tried))?;
        if state.identity.as_ref() == Some(&credential) {
            return Err(self.refused(state, StatusCode::UNAUTHORIZED, String::new()));
        }
        if credential.kind != Kind::Password {
            return Err(self.unsupported("it wants a password, and there is a token"));
        }
        announce(Some(&credential));
        Ok(State {
            generation: state.generation + 1,
            header: Some(basic(&self.endpoint.host, &credential)?),
            renewal: None,
            identity: Some(credential),
            tried,
        })
    }

    /// The state after a Bearer challenge: a new token, for the credentials that were good before or for those that are
    /// found now.
    fn bearer(
        &self,
        state: &State,
        challenge: &Challenge,
        get_token: impl Fn(&TokenRequest) -> Result<Vec<u8>, RegistryError>,
    ) -> Result<State, RegistryError> {
        let realm = self.realm(challenge)?;
        let known = state.identity.clone().filter(|known| known.kind != Kind::RegistryToken);
        let refusal = match known.clone() {
            None => None,
            Some(known) => match self.token(state, challenge, &realm, (Some(known), state.tried.clone()), &get_token) {
                Err(error) if error.is_denied() => Some(error),
                outcome => return outcome,
            },
        };
        let found = self.find(&host_of(&realm))?;
        match refusal {
            Some(refusal) if found.0 == known => Err(refusal),
            _ => self.token(state, challenge, &realm, found, &get_token),
        }
    }

    fn token(
        &self,
        state: &State,
        challenge: &Challenge,
        realm: &Uri,
        (credential, tried): (Option<Credential>, String),
        get_token: &impl Fn(&TokenRequest) -> Result<Vec<u8>, RegistryError>,
    ) -> Result<State, RegistryError> {
        if state.identity.as_ref() != credential.as_ref() {
            announce(credential.as_ref());
        }
        let generation = state.generation + 1;
        let bearer = |token: &str| sensitive(&format!("Bearer {token}"));
        if let Some(token) = credential.as_ref().filter(|credential| credential.kind == Kind::RegistryToken) {
            if state.identity == credential {
                return Err(self.refused(state, StatusCode::UNAUTHORIZED, String::new()));
            }
            let header = bearer(token.secret.reveal());
            let header = header.ok_or_else(|| self.unsupported("the registry token of the user is malformed"))?;
            return Ok(State { generation, header: Some(header), renewal: None, identity: credential, tried });
        }
        let request = self.token_request(challenge, realm, credential, tried)?;
        let asked = Instant::now();
        let answer: TokenAnswer = serde_json::from_slice(&get_token(&request)?)
            .map_err(|_| self.unsupported("the answer of its token server is malformed"))?;
        let token = [answer.token, answer.access_token].into_iter().flatten().find(|token| !token.is_empty());
        let token = token.ok_or_else(|| self.unsupported("its token server gives no token"))?;
        let header = bearer(&token).ok_or_else(|| self.unsupported("its token server gives a malformed token"))?;
        let lifetime = answer.expires_in.filter(|&seconds| seconds > 0).map_or(DEFAULT_LIFETIME, Duration::from_secs);
        // A token that lasts for years needs no renewal; an addition that overflows means the same.
        let renewal = asked.checked_add(lifetime.mul_f32(0.9)).map(|when| (challenge.clone(), when));
        let TokenRequest { mut credential, tried, .. } = request;
        if let (Some(identity), Some(next)) = (&mut credential, answer.refresh_token.filter(|next| !next.is_empty()))
            && identity.kind == Kind::IdentityToken
        {
            identity.secret = next.into();
        }
        Ok(State { generation, header: Some(header), renewal, identity: credential, tried })
    }

    /// The token server that a challenge names.
    fn realm(&self, challenge: &Challenge) -> Result<Uri, RegistryError> {
        let realm = challenge.parameter("realm").unwrap_or_default();
        let url = parse_url(realm).ok_or_else(|| self.unsupported("the realm of its challenge is no URL"))?;
        if url.scheme() == Some(&Scheme::HTTP) && !self.endpoint.insecure {
            return Err(self.unsupported("its token server uses plain HTTP"));
        }
        Ok(url)
    }

    fn token_request(
        &self,
        challenge: &Challenge,
        realm: &Uri,
        credential: Option<Credential>,
        tried: String,
    ) -> Result<TokenRequest, RegistryError> {
        let own_scope = format!("repository:{}:pull", self.endpoint.repository);
        let scope = challenge.parameter("scope").filter(|scope| !scope.is_empty()).unwrap_or(&own_scope);
        let service = challenge.parameter("service").map(|service| ("service", service));
        // To log in, no access to anything is asked for.
        let scope = Some(("scope", scope)).filter(|_| !self.endpoint.repository.is_empty());
        let parameters = service.into_iter().chain(scope);
        if let Some(identity) = credential.as_ref().filter(|credential| credential.kind == Kind::IdentityToken) {
            let mut form = Zeroizing::new(String::from("grant_type=refresh_token"));
            let own = [("client_id", "pyxis"), ("refresh_token", identity.secret.reveal())];
            for (name, value) in parameters.chain(own) {
                push_parameter(name, value, '&', &mut form);
            }
            return Ok(TokenRequest { url: realm.clone(), form: Some(Form(form)), credential, tried });
        }
        let mut text = realm.to_string();
        let account = credential.as_ref().map(|credential| ("account", credential.user.as_str()));
        for (name, value) in parameters.chain(account) {
            let separator = if text.contains('?') { '&' } else { '?' };
            push_parameter(name, value, separator, &mut text);
        }
        let url = parse_url(&text).ok_or_else(|| self.unsupported("the realm of its challenge is no URL"))?;
        Ok(TokenRequest { url, form: None, credential, tried })
    }
}

/// `Basic` (RFC 7617).
fn basic(server: &str, credential: &Credential) -> Result<HeaderValue, RegistryError> {
    let pair = Zeroizing::new(format!("{}:{}", credential.user, credential.secret.reveal()));
    let value = Zeroizing::new(format!("Basic {}", STANDARD.encode(&*pair)));
    sensitive(&value).ok_or_else(|| RegistryError::CredentialsRefused {
        server: server.to_owned(),
        registry: server.to_owned(),
        user: credential.user.clone(),
        file: credential.source.clone(),
        detail: String::new(),
    })
}

/// A header value that does not show in debug output.
fn sensitive(text: &str) -> Option<HeaderValue> {
    let mut value = HeaderValue::from_str(text).ok()?;
    value.set_sensitive(true);
    Some(value)
}

fn push_parameter(name: &str, value: &str, separator: char, url: &mut String) {
    url.push(separator);
    url.push_str(name);
    url.push('=');
    for &byte in value.as_bytes() {
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
        tracing::info!(target: PROGRESS, "Using credentials from file: {}", credential.source);
    }
}

#[cfg(test)]
mod tests {
    use super::super::credentials::no_keys;
    use super::super::proxy::Proxies;
    use super::super::site::Access;
    use super::*;

    fn authenticator(insecure: bool) -> Authenticator {
        let endpoint = Endpoint {
            host: "reg.io".into(),
            repository: "a/b".into(),
            insecure,
            mirror: false,
            access: Access::default(),
            proxies: Proxies::default(),
        };
        Authenticator::new(endpoint, no_keys(), None)
    }

    fn request(authenticator: &Authenticator, challenge: &Challenge) -> Result<TokenRequest, RegistryError> {
        let realm = authenticator.realm(challenge)?;
        authenticator.token_request(challenge, &realm, None, String::new())
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
            let request = request(&authenticator(false), &challenge(text)).unwrap();
            assert_eq!(request.url.to_string(), url);
            assert!(request.credential.is_none());
        }
    }

    #[test]
    fn strange_realms_are_refused() {
        for realm in ["", "/token", "ftp://x/", "http://auth.io/", "https://user:pass@auth.io/", "https://a b/"] {
            let challenge = challenge(&format!("Bearer realm=\"{realm}\",service=x"));
            let error = request(&authenticator(false), &challenge).unwrap_err().to_string();
            assert!(error.starts_with("reg.io asks for authentication in a way that is not supported"), "{error}");
        }
        assert!(request(&authenticator(true), &challenge("Bearer realm=\"http://auth.io/\"")).is_ok());
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
