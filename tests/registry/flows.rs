//! The ways in which the registries that people use ask who one is, each against a server that does as they do: the form
//! of the challenge, where tokens come from, what anonymous users get, and what expires.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use spank_pyxis::importer::protocol::FailureKind;
use spank_pyxis::registry::credentials::{SiteHelpers, UserKeys};
use spank_pyxis::request::Environment;
use tempfile::TempDir;

use crate::broker::Import;
use crate::content::{Compression, Content, tar};
use crate::server::{Reply, Request, Server};

/// A user's home directory, with programs of his.
struct Home(TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, path: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn enroot(self, text: &str) -> Self {
        self.write(".config/enroot/.credentials", text);
        self
    }

    fn docker(self, text: &str) -> Self {
        self.write(".docker/config.json", text);
        self
    }

    fn program(self, name: &str, script: &str) -> Self {
        let path = self.write(&format!("bin/{name}"), &format!("#!/bin/sh\n{script}\n"));
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    /// An import of `image` from `registry` with these credentials.
    fn import(&self, image: &str, registry: &Server) -> Import {
        let path = format!("PATH={}/bin:/usr/bin:/bin", self.0.path().display());
        let environment: Environment = [path].iter().collect();
        let keys = UserKeys::new(environment, self.0.path(), SiteHelpers::new());
        Import { keyring: Arc::new(keys), ..Import::new(image, &[&registry.host()]) }
    }
}

fn basic(user: &str, password: &str) -> String {
    format!("Basic {}", STANDARD.encode(format!("{user}:{password}")))
}

fn authorization(request: &Request) -> &str {
    request.header("authorization").unwrap_or_default()
}

fn error(status: u16, code: &str, message: &str) -> Reply {
    Reply::status(status).body(format!(r#"{{"errors": [{{"code": "{code}", "message": "{message}"}}]}}"#))
}

fn challenge(challenge: impl Into<String>) -> Reply {
    error(401, "UNAUTHORIZED", "authentication required").header("WWW-Authenticate", challenge)
}

/// A registry whose token server is part of it, at `path`. `tokens` answers there; the token `good` opens the rest.
fn self_issuing(
    path: &'static str,
    service: &'static str,
    tokens: impl Fn(&Request) -> Reply + Send + Sync + 'static,
) -> Server {
    let content = Content::simple(1000);
    Server::start(move |request| {
        let host = request.header("host").unwrap().to_owned();
        match (request.path == path, authorization(request)) {
            (true, _) => tokens(request),
            (false, "Bearer good") => content.answer(request),
            (false, _) => challenge(format!(
                r#"Bearer realm="http://{host}{path}",service="{service}",scope="repository:team/image:pull""#
            )),
        }
    })
}

fn denied(import: &Import, expected: &str) {
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Denied, "{message}");
    assert!(message.contains(expected), "\"{expected}\" in \"{message}\"");
}

/// Amazon ECR: Basic with a password of some hours from a helper, 403 when it has expired, blobs in S3.
#[test]
fn ecr() {
    let layers: Vec<_> = (0..4).map(|number| (tar(50_000 + number), Compression::Gzip)).collect();
    let content = Content::image(&layers);
    let store = {
        let content = content.clone();
        Server::start(move |request| match authorization(request) {
            "" => content.answer(request),
            // S3 takes one way of authentication only.
            _ => error(400, "InvalidArgument", "Only one auth mechanism allowed"),
        })
    };
    let (bucket, served) = (store.host(), AtomicUsize::new(0));
    let registry = Server::start(move |request| {
        // The first password is good for the manifest, the config and one layer.
        let current = if served.load(Ordering::SeqCst) < 3 { "one" } else { "two" };
        if authorization(request).is_empty() {
            let host = request.header("host").unwrap();
            return Reply::status(401)
                .header("WWW-Authenticate", format!(r#"Basic realm="https://{host}/",service="ecr.amazonaws.com""#));
        }
        if authorization(request) != basic("AWS", current) {
            return error(403, "DENIED", "Your authorization token has expired. Reauthenticate and try again.");
        }
        served.fetch_add(1, Ordering::SeqCst);
        match request.path.contains("/blobs/") {
            true => Reply::status(307).header("Location", format!("http://{bucket}{}?X-Amz-Signature=x", request.path)),
            false => content.answer(request),
        }
    });
    let home = Home::new();
    let count = home.0.path().join("count");
    let helper = format!(
        "echo >> {count}; [ $(wc -l < {count}) = 1 ] && p=one || p=two\n\
         echo \"{{\\\"Username\\\": \\\"AWS\\\", \\\"Secret\\\": \\\"$p\\\"}}\"",
        count = count.display()
    );
    let home = home
        .docker(&format!(r#"{{"credHelpers": {{"{}": "ecr-login"}}}}"#, registry.host()))
        .program("docker-credential-ecr-login", &helper);
    let mut import = home.import("team/image", &registry);
    import.limits.max_connections = 1;
    import.run().unwrap();
    assert!(store.requests().iter().all(|request| request.header("authorization").is_none()));
    assert_eq!(fs::read_to_string(&count).unwrap().len(), 2, "asked once at the beginning and once more");

    // A password that stays expired.
    let stale = Home::new().enroot(&format!("machine {} login AWS password one\n", registry.host()));
    denied(&stale.import("team/image", &registry), "Your authorization token has expired");
    denied(&Home::new().import("team/image", &registry), "no credentials found");
}

/// Google Artifact Registry: everybody gets a token, and what it opens is seen later.
#[test]
fn google() {
    let content = Content::simple(1000);
    let registry = Server::start(move |request| {
        let host = request.header("host").unwrap().to_owned();
        let json_key = basic("_json_key", "{\"type\": \"service_account\"}");
        match (request.path.as_str(), authorization(request)) {
            ("/v2/token", "") => Reply::ok(r#"{"token": "anonymous", "expires_in": 3600}"#),
            ("/v2/token", header) if header == basic("oauth2accesstoken", "ya29.x") || header == json_key => {
                assert_eq!(request.query["service"], host);
                Reply::ok(r#"{"token": "good", "expires_in": 43199, "issued_at": "2026-01-01T00:00:00Z"}"#)
            }
            ("/v2/token", _) => error(401, "UNAUTHORIZED", "authentication failed"),
            (_, "Bearer good") => content.answer(request),
            (_, "Bearer anonymous") => error(403, "DENIED", "Unauthenticated request"),
            _ => challenge(format!(
                r#"Bearer realm="http://{host}/v2/token",service="{host}",scope="repository:project/repo/image:pull""#
            )),
        }
    });
    let line =
        format!("machine {} login oauth2accesstoken password $(gcloud auth print-access-token)\n", registry.host());
    let gcloud = Home::new().enroot(&line).program("gcloud", "[ \"$*\" = 'auth print-access-token' ] && echo ya29.x");
    gcloud.import("project/repo/image", &registry).run().unwrap();
    let key = STANDARD.encode("_json_key:{\"type\": \"service_account\"}");
    let key = Home::new().docker(&format!(r#"{{"auths": {{"http://{}": {{"auth": "{key}"}}}}}}"#, registry.host()));
    key.import("project/repo/image", &registry).run().unwrap();
    denied(&Home::new().import("project/repo/image", &registry), "requires credentials for project/repo/image");
    let expired = Home::new().enroot(&line).program("gcloud", "echo ya29.old");
    denied(&expired.import("project/repo/image", &registry), "refuses the password of user oauth2accesstoken");
}

/// Azure: an identity token buys tokens by POST and may be replaced while that lasts; nobody gets one for nothing.
#[test]
fn azure() {
    let current = Arc::new(Mutex::new("refresh-1".to_owned()));
    let identity = Arc::clone(&current);
    let issued = Arc::new(AtomicUsize::new(0));
    let (count, uses) = (Arc::clone(&issued), AtomicUsize::new(0));
    let layers: Vec<_> = (0..4).map(|number| (tar(10_000 + number), Compression::Gzip)).collect();
    let content = Content::image(&layers);
    let registry = Server::start(move |request| {
        let host = request.header("host").unwrap().to_owned();
        if request.path == "/oauth2/token" {
            if request.method == "GET" {
                let admin = authorization(request) == basic("admin", "pass");
                return if admin { Reply::ok(r#"{"access_token": "0"}"#) } else { challenge("Bearer") };
            }
            assert!(authorization(request).is_empty());
            let mut identity = identity.lock().unwrap();
            if request.form["grant_type"] != "refresh_token" || request.form["refresh_token"] != *identity {
                return error(400, "UNAUTHORIZED", "invalid refresh token");
            }
            assert_eq!((&*request.form["service"], &*request.form["scope"]), (&*host, "repository:team/image:pull"));
            let number = count.fetch_add(1, Ordering::SeqCst) + 1;
            *identity = format!("refresh-{}", number + 1);
            return Reply::ok(format!(r#"{{"access_token": "{number}", "refresh_token": "{identity}"}}"#));
        }
        // The newest token only, and for a few requests.
        let good = authorization(request) == format!("Bearer {}", count.load(Ordering::SeqCst));
        if good && uses.fetch_add(1, Ordering::SeqCst) % 3 != 2 {
            return content.answer(request);
        }
        challenge(format!(
            r#"Bearer realm="http://{host}/oauth2/token",service="{host}",scope="repository:team/image:pull""#
        ))
    });
    let az = |token: &str| {
        let placeholder = STANDARD.encode("00000000-0000-0000-0000-000000000000:");
        let entry = format!(r#"{{"auth": "{placeholder}", "identitytoken": "{token}"}}"#);
        Home::new().docker(&format!(r#"{{"auths": {{"{}": {entry}}}}}"#, registry.host()))
    };
    let admin = Home::new().enroot(&format!("machine {} login admin password pass\n", registry.host()));
    admin.import("team/image", &registry).resolve().unwrap();
    denied(&Home::new().import("team/image", &registry), "no credentials found");
    let mut import = az("refresh-1").import("team/image", &registry);
    // Of one user, as the file has nobody's name.
    import.image = format!("someone@{}", import.image);
    denied(&import, "no password of user someone");

    let home = az("refresh-1");
    let mut import = home.import("team/image", &registry);
    import.limits.max_connections = 1;
    import.run().unwrap();
    assert!(issued.load(Ordering::SeqCst) >= 2, "renewed with what came with the first token");
    denied(&home.import("team/image", &registry), "invalid refresh token");

    // From `docker-credential-acr-env` and its like.
    let token = current.lock().unwrap().clone();
    let helper = format!(r#"echo '{{"Username": "<token>", "Secret": "{token}"}}'"#);
    let home = Home::new().docker(r#"{"credsStore": "acr"}"#).program("docker-credential-acr", &helper);
    home.import("team/image", &registry).resolve().unwrap();
}

/// GitHub: nobody else gets a token for a private image.
#[test]
fn github() {
    let registry = self_issuing("/token", "ghcr.io", |request| match authorization(request) {
        header if header == basic("octocat", "ghp_x") => Reply::ok(r#"{"token": "good"}"#),
        "" => error(401, "UNAUTHORIZED", "authentication required"),
        _ => error(403, "DENIED", "denied"),
    });
    let auth = STANDARD.encode("octocat:ghp_x");
    let podman = Home::new();
    let file = format!(r#"{{"auths": {{"{}/team": {{"auth": "{auth}"}}}}}}"#, registry.host());
    podman.write(".config/containers/auth.json", &file);
    podman.import("team/image", &registry).run().unwrap();
    denied(&podman.import("other/image", &registry), "no credentials found");
    denied(&Home::new().import("team/image", &registry), "no credentials found");
    let wrong = Home::new().enroot(&format!("machine {} login octocat password ghp_old\n", registry.host()));
    denied(&wrong.import("team/image", &registry), "renew it there (DENIED: denied)");
}

/// GitLab: tokens are from another host, which enroot's users know by an entry of its own.
#[test]
fn gitlab() {
    let gitlab = Server::start(|request| {
        assert_eq!(request.path, "/jwt/auth");
        assert_eq!(request.query["service"], "container_registry");
        match authorization(request) {
            header if header == basic("deploy", "gldt-x") => {
                assert_eq!(request.query["account"], "deploy");
                Reply::ok(r#"{"token": "good"}"#)
            }
            _ => Reply::status(403).body(r#"{"errors": [{"code": "DENIED", "message": "access forbidden"}]}"#),
        }
    });
    // Another host than the registry's, 127.0.0.1.
    let realm = gitlab.host().replace("127.0.0.1", "localhost");
    let content = Content::simple(1000);
    let registry = Server::start(move |request| match authorization(request) {
        "Bearer good" => content.answer(request),
        _ => challenge(format!(
            r#"Bearer realm="http://{realm}/jwt/auth",service="container_registry",scope="repository:team/image:pull""#
        )),
    });
    let own = Home::new().enroot(&format!("machine {} login deploy password gldt-x\n", registry.host()));
    own.import("team/image", &registry).run().unwrap();
    // That of a host which has nothing to do with the registry is not given to it.
    let foreign = Home::new().enroot("machine localhost login deploy password gldt-x\n");
    let asked = gitlab.requests().len();
    denied(&foreign.import("team/image", &registry), "no credentials found");
    assert!(gitlab.requests()[asked..].iter().all(|request| request.header("authorization").is_none()));
}

/// Harbor: everybody gets a token, and the registry asks again if it opens nothing. Robots have a `$` in their names.
#[test]
fn harbor() {
    let registry = self_issuing("/service/token", "harbor-registry", |request| match authorization(request) {
        "" => Reply::ok(r#"{"token": "opens nothing", "access_token": "", "expires_in": 1800}"#),
        header if header == basic("robot$team+ci", "secret") => {
            Reply::ok(r#"{"token": "good", "access_token": "", "expires_in": 1800}"#)
        }
        _ => error(401, "UNAUTHORIZED", "unauthorized"),
    });
    let line = |user: &str, secret: &str| format!("machine {} login {user} password {secret}\n", registry.host());
    let home = Home::new().enroot(&(line("me", "mine") + &line("robot$team+ci", "secret")));
    let import = home.import("team/image", &registry);
    let named = Import { image: format!("robot$team+ci@{}", import.image), ..import.clone() };
    named.run().unwrap();
    denied(&import, "refuses the password of user me");
    denied(&Home::new().import("team/image", &registry), "no credentials found");
}

/// NGC: `$oauthtoken` with a key that is often in a variable.
#[test]
fn ngc() {
    let registry = self_issuing("/proxy_auth", "ngc", |request| match authorization(request) {
        header if header == basic("$oauthtoken", "nvapi-x") => Reply::ok(r#"{"token": "good", "expires_in": 600}"#),
        "" => Reply::ok(r#"{"token": "public", "expires_in": 600}"#),
        _ => error(401, "UNAUTHORIZED", "Authentication required"),
    });
    let home =
        Home::new().enroot(&format!("machine {} login $oauthtoken password ${{NGC_KEY:-nvapi-x}}\n", registry.host()));
    home.import("team/image", &registry).run().unwrap();
    denied(&Home::new().import("team/image", &registry), "no credentials found");
}

/// Quay: everybody gets a token; a robot's name has a `+`.
#[test]
fn quay() {
    let registry = self_issuing("/v2/auth", "quay.io", |request| match authorization(request) {
        "" => Reply::ok(r#"{"token": "opens nothing"}"#),
        header if header == basic("org+robot", "key") => {
            assert_eq!(request.query["account"], "org+robot");
            Reply::ok(r#"{"token": "good"}"#)
        }
        _ => error(401, "UNAUTHORIZED", "Could not find robot with specified username"),
    });
    let auth = STANDARD.encode("org+robot:key");
    let home = Home::new().docker(&format!(r#"{{"auths": {{"{}": {{"auth": "{auth}"}}}}}}"#, registry.host()));
    home.import("team/image", &registry).run().unwrap();
    denied(&Home::new().import("team/image", &registry), "no credentials found");
}

/// What everybody may have costs no helper, and no secret leaves.
#[test]
fn anonymous_first() {
    let content = Content::simple(1000);
    let registry = Server::start(move |request| content.answer(request));
    let home = Home::new();
    let marker = home.0.path().join("asked");
    let home = home
        .enroot(&format!("machine {} login u password $(touch {})\n", registry.host(), marker.display()))
        .docker(r#"{"credsStore": "never"}"#)
        .program("docker-credential-never", &format!("touch {}", marker.display()));
    home.import("team/image", &registry).run().unwrap();
    assert!(!marker.exists());
    assert!(registry.requests().iter().all(|request| request.header("authorization").is_none()));
}
