//! Docker's `config.json` and podman's `auth.json` (containers-auth.json(5)): secrets in `auths`, as `docker login` writes
//! them where no store is used, and the programs `docker-credential-NAME` that `credHelpers` and `credsStore` name.
//!
//! For a registry its helper comes first, then the entry in `auths`, then the store.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::{Answer, Credential, Kind, Query, helper, hosts};
use crate::image::reference::is_docker_hub;
use crate::request::Environment;

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// What Docker calls Docker Hub.
const HUB: &str = "https://index.docker.io/v1/";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Auth>,
    creds_store: Option<String>,
    #[serde(default)]
    cred_helpers: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct Auth {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

/// Looks for `query` in `text`, the content of `file`. Without an environment no helper is run.
pub(super) fn find(file: &str, text: &str, query: &Query, environment: Option<&Environment>, answer: &mut Answer) {
    let config: Config = match serde_json::from_str(text) {
        Ok(config) => config,
        Err(error) => {
            // The reason may quote a secret: only the place is told.
            let (line, column) = (error.line(), error.column());
            answer.warnings.push(format!("{file}: not a Docker configuration (line {line}, column {column})"));
            return;
        }
    };
    let server = if is_docker_hub(&query.registry) { HUB } else { &query.registry };
    let ask = |name: &str, server: &str| {
        let found = helper_says(file, name, server, environment)?;
        Ok(found.filter(|credential| credential.is_of(query.user.as_deref())))
    };
    let mut bad = Vec::new();
    let mut usable = |found: Result<Option<Credential>, String>| {
        found.unwrap_or_else(|reason| {
            bad.push(format!("{file}: {reason}"));
            None
        })
    };
    let own_helper = best(config.cred_helpers.iter(), query).next();
    let mut credential =
        own_helper.and_then(|(key, name)| usable(ask(name, if key.contains("://") { key } else { server })));
    if credential.is_none() {
        credential = best(config.auths.iter(), query).find_map(|(key, auth)| {
            let found = usable(auth.credential(key, file));
            found.filter(|credential| credential.is_of(query.user.as_deref()))
        });
    }
    if credential.is_none()
        && let Some(store) = config.creds_store.filter(|store| !store.is_empty())
    {
        credential = usable(ask(&store, server));
    }
    answer.credential = credential;
    answer.warnings.append(&mut bad);
}

fn helper_says(
    file: &str,
    name: &str,
    server: &str,
    environment: Option<&Environment>,
) -> Result<Option<Credential>, String> {
    let shown = || name.escape_debug().take(100).collect::<String>();
    let environment = environment.ok_or_else(|| format!("the helper \"{}\" is not used here", shown()))?;
    let program = helper::program(name).ok_or_else(|| format!("the helper \"{}\" cannot exist", shown()))?;
    helper::ask(&program, server, environment, &format!("{program} of {file}"))
}

/// The entries that are meant for `query`, those for a narrower part of the registry first.
fn best<'c, T: 'c>(
    entries: impl Iterator<Item = (&'c String, &'c T)>,
    query: &Query,
) -> impl Iterator<Item = (&'c str, &'c T)> {
    let mut fitting: Vec<_> = entries
        .filter_map(|(key, entry)| {
            let (host, path) = split(key);
            let below = query.repository.strip_prefix(path)?;
            let fits = path.is_empty() || below.is_empty() || below.starts_with('/');
            fits.then_some(((path.len(), hosts::fit(host, &query.registry)?), (key.as_str(), entry)))
        })
        .collect();
    fitting.sort_by_key(|(rank, _)| Reverse(*rank));
    fitting.into_iter().map(|(_, entry)| entry)
}

/// Host and path of a key: `https://index.docker.io/v1/`, `quay.io`, `quay.io/team`.
fn split(key: &str) -> (&str, &str) {
    let url = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://"));
    let (host, path) = url.unwrap_or(key).split_once('/').unwrap_or((url.unwrap_or(key), ""));
    match path.trim_end_matches('/') {
        // Of a URL only the host counts, and of old keys: they name the API's version.
        _ if url.is_some() => (host, ""),
        "v1" | "v2" => (host, ""),
        path => (host, path),
    }
}

impl Auth {
    /// What is in the entry. Docker leaves an empty one where the secret is in a store.
    fn credential(&self, key: &str, file: &str) -> Result<Option<Credential>, String> {
        let text = |field: &Option<String>| field.clone().filter(|text| !text.is_empty());
        let decoded = match text(&self.auth).map(|auth| BASE64.decode(auth.trim())) {
            None => None,
            Some(decoded) => {
                let pair = decoded.ok().and_then(|decoded| String::from_utf8(decoded).ok());
                let pair = pair.as_deref().and_then(|pair| pair.split_once(':'));
                pair.map(|(user, secret)| (user.to_owned(), secret.to_owned()))
            }
        };
        let user = text(&self.username).or_else(|| decoded.as_ref().map(|(user, _)| user.clone()));
        for (token, kind) in [(&self.identitytoken, Kind::IdentityToken), (&self.registrytoken, Kind::RegistryToken)] {
            if let Some(token) = text(token) {
                // The name is a placeholder: registries that give identity tokens know whose they are.
                let (user, source) = (user.unwrap_or_default(), file.to_owned());
                return Ok(Some(Credential { user, secret: token.into(), kind, source }));
            }
        }
        if let (Some(user), Some(password)) = (text(&self.username), text(&self.password)) {
            return Ok(Some(Credential::password(&user, password, file)));
        }
        match decoded {
            // Docker's own client drops these, which some tools append.
            Some((user, secret)) => Ok(Some(Credential::password(&user, secret.trim_end_matches('\0'), file))),
            None if text(&self.auth).is_some() => {
                let key: String = key.escape_debug().take(100).collect();
                Err(format!("the \"auth\" of {key} is not USER:PASSWORD in base64"))
            }
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use proptest::prelude::*;

    use super::*;

    fn find_in(text: &str, registry: &str, repository: &str, environment: Option<&Environment>) -> Answer {
        let owned = str::to_owned;
        let query =
            Query { registry: owned(registry), repository: owned(repository), realm: owned("x.io"), user: None };
        let mut answer = Answer::default();
        find("F", text, &query, environment, &mut answer);
        answer
    }

    fn flat(answer: &Answer) -> Option<(&str, &str, Kind)> {
        answer.credential.as_ref().map(|found| (&*found.user, found.secret.reveal(), found.kind))
    }

    #[test]
    fn reads_auths() {
        let text = r#"{"auths": {
            "https://index.docker.io/v1/": {"auth": "bWU6czpl"},
            "a.io:5000": {"username": "u", "password": "p"},
            "b.io": {"auth": "dTpw"},
            "b.io/team": {"auth": "dTpwYXNz"},
            "http://c.io/v2/": {"auth": "dTpwYXNz", "email": "x"},
            "id.azurecr.io": {"auth": "MDAwMDAwMDAtMDAwMC0wMDAwLTAwMDAtMDAwMDAwMDAwMDAwOg==", "identitytoken": "refresh"},
            "r.io": {"registrytoken": "jwt"},
            "empty.io": {}
        }, "HttpHeaders": {"User-Agent": "x"}, "currentContext": "y"}"#;
        use Kind::{IdentityToken, Password, RegistryToken};
        for (registry, repository, found) in [
            ("registry-1.docker.io", "library/alpine", Some(("me", "s:e", Password))),
            ("a.io:5000", "x", Some(("u", "p", Password))),
            ("a.io", "x", None),
            ("b.io:443", "x", Some(("u", "p", Password))),
            ("b.io", "team/x", Some(("u", "pass", Password))),
            ("b.io", "team", Some(("u", "pass", Password))),
            ("b.io", "teams/x", Some(("u", "p", Password))),
            ("c.io", "x", Some(("u", "pass", Password))),
            ("id.azurecr.io", "x", Some(("00000000-0000-0000-0000-000000000000", "refresh", IdentityToken))),
            ("r.io", "x", Some(("", "jwt", RegistryToken))),
            ("empty.io", "x", None),
        ] {
            let answer = find_in(text, registry, repository, None);
            assert_eq!(flat(&answer), found, "{registry}/{repository}");
            assert!(answer.warnings.is_empty(), "{:?}", answer.warnings);
        }
    }

    #[test]
    fn says_what_it_cannot_use() {
        let nothing = Environment::from_block(b"PATH=/nonexistent\0");
        for (text, warning) in [
            ("{", "F: not a Docker configuration (line 1, column 1)"),
            (r#"{"auths": {"a": {"auth": "!"}}}"#, r#"the "auth" of a is not"#),
            (r#"{"auths": {"a": {"auth": "dXA="}}}"#, r#"the "auth" of a is not"#),
            (r#"{"credsStore": "desktop"}"#, "F: docker-credential-desktop is not on this node"),
            (r#"{"credHelpers": {"a": "ecr-login"}}"#, "F: docker-credential-ecr-login is not on this node"),
            (r#"{"credsStore": "../sh"}"#, r#"the helper "../sh" cannot exist"#),
        ] {
            let answer = find_in(text, "a", "x", Some(&nothing));
            assert!(answer.credential.is_none());
            assert!(
                answer.warnings.len() == 1 && answer.warnings[0].contains(warning),
                "{text}: {:?}",
                answer.warnings
            );
        }
        assert!(!find_in(r#"{"auths": {"a": {"auth": 12345}}}"#, "a", "x", None).warnings[0].contains("12345"));
    }

    #[test]
    fn helpers_are_asked_for_what_they_know() {
        let directory = tempfile::tempdir().unwrap();
        let script = "#!/bin/sh\n[ \"$1\" = get ] || exit 9\nread server\ncase $server in\n\
            https://index.docker.io/v1/) echo '{\"ServerURL\":\"x\",\"Username\":\"hub\",\"Secret\":\"h\"}';;\n\
            a.io:5000) echo '{\"Username\":\"<token>\",\"Secret\":\"id\"}';;\n\
            bad.io) echo secret; exit 3;;\n\
            odd.io) echo secret;;\n\
            *) echo 'credentials not found in native keychain'; exit 1;;\nesac\n";
        for name in ["docker-credential-one", "docker-credential-store"] {
            let path = directory.path().join(name);
            std::fs::write(&path, script).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        let path = format!("PATH={}:/usr/bin:/bin", directory.path().display());
        let environment: Environment = [path].iter().collect();
        let text = r#"{"credHelpers": {"a.io:5000": "one", "c.io": "one", "bad.io": "one", "odd.io": "one"},
            "auths": {"c.io": {"auth": "dTpw"}, "docker.io": {}}, "credsStore": "store"}"#;
        let found = |registry| find_in(text, registry, "x", Some(&environment));
        assert_eq!(flat(&found("registry-1.docker.io")), Some(("hub", "h", Kind::Password)));
        assert_eq!(found("registry-1.docker.io").credential.unwrap().source, "docker-credential-store of F");
        assert_eq!(flat(&found("a.io:5000")), Some(("<token>", "id", Kind::IdentityToken)));
        assert_eq!(flat(&found("c.io")), Some(("u", "p", Kind::Password)));
        assert_eq!(found("nobody.io"), Answer::default());
        for (registry, warning) in [
            ("bad.io", "docker-credential-one fails (exit status 3): run it by hand"),
            ("odd.io", "docker-credential-one prints no credentials in Docker's form"),
        ] {
            let answer = found(registry);
            assert!(answer.warnings[0].contains(warning), "{answer:?}");
            assert!(!format!("{answer:?}").contains("secret"), "{answer:?}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), auth in any::<String>()) {
            find_in(&text, "a", "x", None);
            find_in(&serde_json::json!({"auths": {text: {"auth": auth}}}).to_string(), "a", "x", None);
        }
    }
}
