//! Docker's `config.json`: passwords in `auths`, as `docker login` writes them where no credential store is used.

use std::collections::BTreeMap;

use base64::Engine;
use base64::engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig};
use serde::Deserialize;

use super::{Credential, CredentialSet};

const BASE64: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

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
}

/// Adds the entries of `text`.
pub(super) fn parse(file: &str, text: &str, set: &mut CredentialSet) {
    let config: Config = match serde_json::from_str(text) {
        Ok(config) => config,
        Err(error) => {
            // The reason may quote a secret: only the place is told.
            let (line, column) = (error.line(), error.column());
            set.warnings.push(format!("{file}: not a Docker configuration (line {line}, column {column})"));
            return;
        }
    };
    for (key, auth) in config.auths {
        let host = host_of(&key);
        if auth.identitytoken.as_deref().is_some_and(|token| !token.is_empty()) {
            set.warnings.push(format!("{file}: {host} has an identity token, which is not supported yet"));
            continue;
        }
        match auth.pair() {
            Some((user, secret)) => {
                set.entries.push(Credential { host: host.to_owned(), user, secret, file: file.to_owned() });
            }
            None if auth.auth.as_deref().is_some_and(|auth| !auth.is_empty()) => {
                set.warnings.push(format!("{file}: the \"auth\" of {host} is not USER:PASSWORD in base64"));
            }
            // Docker leaves an empty entry where the secret is in a store.
            None => {}
        }
    }
    if let Some(store) = config.creds_store.filter(|store| !store.is_empty()) {
        set.warnings.push(format!("{file}: the credential store \"{}\" is not supported yet", store.escape_debug()));
    }
    for (host, helper) in config.cred_helpers {
        let (host, helper) = (host.escape_debug(), helper.escape_debug());
        set.warnings.push(format!("{file}: the credential helper \"{helper}\" for {host} is not supported yet"));
    }
}

impl Auth {
    fn pair(&self) -> Option<(String, String)> {
        if let (Some(user), Some(password)) = (&self.username, &self.password) {
            return Some((user.clone(), password.clone()));
        }
        let decoded = BASE64.decode(self.auth.as_deref()?.trim()).ok()?;
        let (user, secret) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        // Docker's own client drops these, which some tools append.
        Some((user.to_owned(), secret.trim_end_matches('\0').to_owned()))
    }
}

/// The host of a key, which may be a URL: `https://index.docker.io/v1/`.
fn host_of(key: &str) -> &str {
    let rest = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    rest.split('/').next().unwrap_or(rest)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parsed(text: &str) -> CredentialSet {
        let mut set = CredentialSet::default();
        parse("F", text, &mut set);
        set
    }

    #[test]
    fn reads_auths() {
        let set = parsed(
            r#"{"auths": {
                "https://index.docker.io/v1/": {"auth": "bWU6czpl"},
                "a.io:5000": {"username": "u", "password": "p"},
                "b.io": {"auth": "dTpw"},
                "http://c.io/v2/": {"auth": "dTpwYXNz", "email": "x"},
                "empty.io": {}
            }, "HttpHeaders": {"User-Agent": "x"}, "currentContext": "y"}"#,
        );
        let entries: Vec<_> = set.entries.iter().map(|e| (&*e.host, &*e.user, &*e.secret)).collect();
        assert_eq!(
            entries,
            [("a.io:5000", "u", "p"), ("b.io", "u", "p"), ("c.io", "u", "pass"), ("index.docker.io", "me", "s:e")]
        );
        assert!(set.warnings.is_empty());
    }

    #[test]
    fn says_what_it_cannot_use() {
        for (text, warning) in [
            ("{", "F: not a Docker configuration (line 1, column 1)"),
            (r#"{"auths": {"a": {"auth": "!"}}}"#, r#"the "auth" of a is not"#),
            (r#"{"auths": {"a": {"auth": "dXA="}}}"#, r#"the "auth" of a is not"#),
            (r#"{"auths": {"a": {"identitytoken": "t"}}}"#, "a has an identity token"),
            (r#"{"credsStore": "desktop"}"#, r#"the credential store "desktop" is not supported yet"#),
            (r#"{"credHelpers": {"e.io": "ecr-login"}}"#, r#"the credential helper "ecr-login" for e.io"#),
        ] {
            let set = parsed(text);
            assert!(set.entries.is_empty());
            assert!(set.warnings.len() == 1 && set.warnings[0].contains(warning), "{text}: {:?}", set.warnings);
        }
        assert!(!parsed(r#"{"auths": {"a": {"auth": 12345}}}"#).warnings[0].contains("12345"));
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>(), auth in any::<String>()) {
            parsed(&text);
            parsed(&serde_json::json!({"auths": {text: {"auth": auth}}}).to_string());
        }
    }
}
