//! Requests to one endpoint: authenticated, retried, bounded.

#![forbid(unsafe_code)]

use std::io::{self, Read};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use serde::Deserialize;
use ureq::Body;
use ureq::http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE};
use ureq::http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Uri};

use super::auth::{Authenticator, MAX_TOKEN_BYTES, TokenRequest};
use super::blob::BlobReader;
use super::config::{Endpoint, NetworkConfig};
use super::credentials::SharedKeyring;
use super::error::{RegistryError, TransportError};
use super::http::{self, Answer, Http, Redirects};
use super::retry::Backoff;
use super::sha256;
use super::stream::BlobStream;
use super::team::Extra;
use crate::image::digest::Digest;
use crate::image::manifest::{self, Descriptor, MAX_MANIFEST_BYTES};

/// Most bytes of an error's body that are looked at.
const MAX_ERROR_BYTES: u64 = 64 * 1024;
/// How often to ask for what arrives damaged.
const DAMAGED_ATTEMPTS: u32 = 3;
/// The header with a manifest's digest (distribution specification, "Pulling manifests").
const DOCKER_CONTENT_DIGEST: &str = "docker-content-digest";
/// How long a body that is no blob may take.
const BODY_TIMEOUT: Duration = Duration::from_secs(120);

/// A client of one repository at one endpoint. Threads share it.
#[derive(Debug)]
pub struct Client {
    http: Http,
    endpoint: Endpoint,
    auth: Authenticator,
    network: NetworkConfig,
    extra: Extra,
}

/// What to ask for.
#[derive(Debug, Clone)]
pub(super) struct Ask {
    method: Method,
    url: Uri,
    pub headers: HeaderMap,
    redirects: Redirects,
    /// For messages.
    pub what: String,
}

/// A manifest as it came.
#[derive(Debug)]
pub struct ManifestBytes {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// The `Content-Type` header.
    pub content_type: Option<String>,
    /// Digest of the bytes.
    pub digest: Digest,
}

impl Client {
    /// A client that presents to `endpoint` what `keyring` has for it, of `user` if one is named.
    pub fn new(endpoint: Endpoint, network: NetworkConfig, keyring: SharedKeyring, user: Option<String>) -> Self {
        let auth = Authenticator::new(endpoint.clone(), keyring, user);
        let http = Http::new(network, &endpoint);
        Self { http, endpoint, auth, network, extra: Extra::default() }
    }

    /// Where this client asks.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whether the registry has asked who we are, and believed it.
    pub fn is_authenticated(&self) -> bool {
        self.auth.was_asked()
    }

    pub(super) fn network(&self) -> &NetworkConfig {
        &self.network
    }

    /// The manifest or index of a tag or digest; of a digest, checked.
    pub fn manifest(&self, tag_or_digest: &str) -> Result<ManifestBytes, RegistryError> {
        let what = format!("manifest {tag_or_digest}");
        let mut ask = self.ask(Method::GET, &format!("manifests/{tag_or_digest}"), what)?;
        ask.headers.insert(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        let mut backoff = self.backoff();
        let (bytes, headers, digest) = loop {
            let (bytes, headers) = self.whole(&ask, MAX_MANIFEST_BYTES, &mut backoff)?;
            let digest = sha256(&bytes);
            if !tag_or_digest.contains(':') || tag_or_digest == digest.to_string() {
                break (bytes, headers, digest);
            }
            self.damaged(&ask.what, digest, &mut backoff)?;
        };
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        Ok(ManifestBytes { bytes, content_type, digest })
    }

    /// The answer to `ask`, of at most `limit` bytes, and its headers.
    pub(super) fn whole(
        &self,
        ask: &Ask,
        limit: u64,
        backoff: &mut Backoff,
    ) -> Result<(Vec<u8>, HeaderMap), RegistryError> {
        loop {
            let answer = self.send(ask, backoff)?;
            let headers = answer.response.headers().clone();
            if let Some(bytes) = read_answer(answer, ask, limit, backoff)? {
                return Ok((bytes, headers));
            }
        }
    }

    /// What a tag means now. Only its digest is asked for, which registries do not count as a pull; it is the registry's word.
    pub fn digest_of(&self, tag: &str) -> Result<Digest, RegistryError> {
        let mut ask = self.ask(Method::HEAD, &format!("manifests/{tag}"), format!("manifest {tag}"))?;
        ask.headers.insert(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        let answer = self.send(&ask, &mut self.backoff())?;
        let named = answer.response.headers().get(DOCKER_CONTENT_DIGEST).and_then(|value| value.to_str().ok());
        match named.and_then(|text| text.parse().ok()) {
            Some(digest) => Ok(digest),
            None => self.manifest(tag).map(|manifest| manifest.digest),
        }
    }

    /// A blob of at most `limit` bytes, checked against its descriptor.
    pub fn small_blob(&self, descriptor: &Descriptor, limit: u64) -> Result<Vec<u8>, RegistryError> {
        let what = format!("blob {}", descriptor.digest);
        if descriptor.size > limit {
            return Err(RegistryError::TooLong { host: self.endpoint.host.clone(), what, limit });
        }
        let mut backoff = self.backoff();
        loop {
            let mut bytes = Vec::new();
            self.blob(descriptor).read_to_end(&mut bytes).map_err(|error| self.read_error(error))?;
            match sha256(&bytes) {
                digest if digest == descriptor.digest => return Ok(bytes),
                digest => self.damaged(&what, digest, &mut backoff)?,
            }
        }
    }

    /// Other bytes came than were asked for: waits before they are asked for again.
    fn damaged(&self, what: &str, actual: Digest, backoff: &mut Backoff) -> Result<(), RegistryError> {
        let host = &self.endpoint.host;
        if backoff.wait(DAMAGED_ATTEMPTS, None, || format!("{what} from {host} arrived damaged")) {
            return Ok(());
        }
        Err(RegistryError::WrongDigest { host: host.clone(), what: what.to_owned(), actual })
    }

    /// A reader of a blob's bytes: exactly as many as the descriptor says, not checked against its digest.
    pub fn blob(&self, descriptor: &Descriptor) -> BlobReader<&Self> {
        BlobReader::new(self, descriptor, 0..descriptor.size)
    }

    /// The same bytes, over several connections where that pays.
    pub fn blob_stream(self: Arc<Self>, descriptor: &Descriptor) -> BlobStream {
        BlobStream::new(self, descriptor)
    }

    /// What several connections for one blob have brought so far.
    pub(super) fn extra_connections(&self) -> &Extra {
        &self.extra
    }

    /// Whether the registry would let us have this blob.
    pub fn may_have(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let mut ask = self.blob_ask(Method::HEAD, digest)?;
        // A redirect to the bytes is a yes, and its signature may be good for GET only.
        ask.redirects = Redirects::Return;
        match self.send(&ask, &mut self.backoff()) {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() || error.is_denied() => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the registry answers at all, be it that it wants credentials. One try.
    pub fn ping(&self) -> Result<(), RegistryError> {
        let url = http::url(&self.endpoint.host, self.endpoint.insecure, "/v2/")?;
        self.http.send(&Method::GET, &url, &HeaderMap::new(), None, Redirects::Return, "the registry's base")?;
        Ok(())
    }

    /// Presents our credentials to the registry as such, if it wants some.
    pub(super) fn authenticate(&self) -> Result<(), RegistryError> {
        let url = http::url(&self.endpoint.host, self.endpoint.insecure, "/v2/")?;
        let what = "the registry's base".to_owned();
        let ask = Ask { method: Method::GET, url, headers: HeaderMap::new(), redirects: Redirects::Follow, what };
        self.send(&ask, &mut self.backoff()).map(drop)
    }

    /// The error behind a failed read of a [`BlobReader`].
    pub fn read_error(&self, error: io::Error) -> RegistryError {
        error.downcast().unwrap_or_else(|error| self.broken(error).into())
    }

    pub(super) fn broken(&self, error: io::Error) -> TransportError {
        TransportError { host: self.endpoint.host.clone(), reason: http::io_reason(error) }
    }

    pub(super) fn backoff(&self) -> Backoff {
        Backoff::new(self.network.attempts)
    }

    pub(super) fn blob_ask(&self, method: Method, digest: &Digest) -> Result<Ask, RegistryError> {
        let mut ask = self.ask(method, &format!("blobs/{digest}"), format!("blob {digest}"))?;
        // The digest is that of the bytes as they are stored.
        ask.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        Ok(ask)
    }

    pub(super) fn ask(&self, method: Method, path: &str, what: String) -> Result<Ask, RegistryError> {
        let path = format!("/v2/{}/{path}", self.endpoint.repository);
        let url = http::url(&self.endpoint.host, self.endpoint.insecure, &path)?;
        Ok(Ask { method, url, headers: HeaderMap::new(), redirects: Redirects::Follow, what })
    }

    /// Sends a request until it succeeds, or fails in a way that no further try changes. A status below 400 is success.
    pub(super) fn send(&self, ask: &Ask, backoff: &mut Backoff) -> Result<Answer, RegistryError> {
        let mut challenges = 0;
        loop {
            let (generation, header) = self.auth.header(|request| self.token(request));
            let answer = self.exchange(ask, header.as_ref(), backoff)?;
            match answer.response.status() {
                status if status.as_u16() < 400 => return Ok(answer),
                // Twice: the token may have expired, and the next one have too small a scope.
                StatusCode::UNAUTHORIZED if answer.from_origin && challenges < 2 => {
                    challenges += 1;
                    self.auth.renew(generation, answer.response.headers(), |request| self.token(request))?;
                }
                StatusCode::FORBIDDEN if answer.from_origin && challenges < 2 && self.auth.look_again(generation) => {
                    challenges += 1;
                }
                status @ (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) if answer.from_origin => {
                    return Err(self.auth.denied(status, detail(answer.response)));
                }
                _ => return Err(status_error(answer, ask)),
            }
        }
    }

    /// Sends a request until the answer is one that waiting does not change.
    fn exchange(
        &self,
        ask: &Ask,
        authorization: Option<&HeaderValue>,
        backoff: &mut Backoff,
    ) -> Result<Answer, RegistryError> {
        retried(backoff, &ask.what, || {
            self.http.send(&ask.method, &ask.url, &ask.headers, authorization, ask.redirects, &ask.what)
        })
    }

    /// Asks a token server.
    fn token(&self, request: &TokenRequest) -> Result<Vec<u8>, RegistryError> {
        let ask = Ask {
            method: Method::GET,
            url: request.url.clone(),
            headers: HeaderMap::new(),
            redirects: Redirects::Follow,
            what: "a token".to_owned(),
        };
        let authorization = request.authorization()?;
        let mut backoff = self.backoff();
        loop {
            let answer = match &request.form {
                None => self.exchange(&ask, authorization.as_ref(), &mut backoff)?,
                Some(form) => retried(&mut backoff, &ask.what, || self.http.post(&ask.url, form.bytes()))?,
            };
            match answer.response.status() {
                // OAuth 2.0 has 400 for a refresh token that is none any more (RFC 6749, section 5.2).
                StatusCode::BAD_REQUEST if request.form.is_some() => {
                    return Err(self.auth.token_refused(request, detail(answer.response)));
                }
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                    return Err(self.auth.token_refused(request, detail(answer.response)));
                }
                status if status.as_u16() >= 400 => return Err(status_error(answer, &ask)),
                // Secrets are not sent on to where somebody points.
                status if status.as_u16() >= 300 && request.form.is_some() => return Err(status_error(answer, &ask)),
                _ => {}
            }
            if let Some(bytes) = read_answer(answer, &ask, MAX_TOKEN_BYTES, &mut backoff)? {
                return Ok(bytes);
            }
        }
    }
}

/// Sends until the answer is one that waiting does not change.
fn retried(
    backoff: &mut Backoff,
    what: &str,
    send: impl Fn() -> Result<Answer, RegistryError>,
) -> Result<Answer, RegistryError> {
    loop {
        match send() {
            Ok(answer) => {
                let wish = http::retry_after(answer.response.headers(), SystemTime::now());
                let may_pass = match answer.response.status().as_u16() {
                    408 | 429 | 500 | 502 | 503 | 504 => true,
                    // An object store refuses a signed URL that has expired: the registry gives a new one.
                    401 | 403 => !answer.from_origin,
                    _ => false,
                };
                let status = answer.response.status();
                let trouble = || format!("{} answers {status} to the request for {what}", answer.host);
                if !(may_pass && backoff.wait(u32::MAX, wish, trouble)) {
                    return Ok(answer);
                }
            }
            Err(RegistryError::Transport(error))
                if backoff.wait(error.reason.attempts(u32::MAX), None, || error.to_string()) => {}
            Err(error) => return Err(error),
        }
    }
}

/// The whole body, of at most `limit` bytes; none if it broke off and may be asked for again.
fn read_answer(answer: Answer, ask: &Ask, limit: u64, backoff: &mut Backoff) -> Result<Option<Vec<u8>>, RegistryError> {
    match read_body(answer.response.into_body(), limit) {
        Ok(bytes) if bytes.len() as u64 > limit => {
            Err(RegistryError::TooLong { host: answer.host, what: ask.what.clone(), limit })
        }
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) => {
            let error = TransportError { host: answer.host, reason: http::io_reason(error) };
            if backoff.wait(error.reason.attempts(u32::MAX), None, || error.to_string()) {
                Ok(None)
            } else {
                Err(error.into())
            }
        }
    }
}

/// The beginning of a body, up to one byte more than `limit`. Not for longer than [`BODY_TIMEOUT`], however steadily it
/// drips.
fn read_body(body: Body, limit: u64) -> io::Result<Vec<u8>> {
    let began = Instant::now();
    let mut bytes = Vec::new();
    let mut reader = body.into_reader().take(limit + 1);
    let mut buffer = [0; 16 << 10];
    loop {
        match reader.read(&mut buffer)? {
            0 => return Ok(bytes),
            count => bytes.extend_from_slice(&buffer[..count]),
        }
        if began.elapsed() > BODY_TIMEOUT {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
}

fn status_error(answer: Answer, ask: &Ask) -> RegistryError {
    let status = answer.response.status();
    if status == StatusCode::TOO_MANY_REQUESTS {
        let wish = http::retry_after(answer.response.headers(), SystemTime::now());
        return RegistryError::too_many_requests(&answer.host, wish);
    }
    RegistryError::Status { host: answer.host, status, what: ask.what.clone(), detail: detail(answer.response) }
}

/// What the body of an error says (distribution-spec, "Error Codes"), as ` (CODE: message)`; or nothing.
fn detail(response: Response<Body>) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<Error>,
    }
    #[derive(Deserialize)]
    struct Error {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: Option<String>,
    }
    let body = read_body(response.into_body(), MAX_ERROR_BYTES).unwrap_or_default();
    let errors = serde_json::from_slice::<Errors>(&body).ok();
    let Some(error) = errors.and_then(|errors| errors.errors.into_iter().next()) else { return String::new() };
    let text = match error.message.filter(|message| !message.is_empty()) {
        Some(message) if error.code.is_empty() => message,
        Some(message) => format!("{}: {message}", error.code),
        None => error.code,
    };
    let text: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.is_empty() { text } else { format!(" ({text})") }
}
