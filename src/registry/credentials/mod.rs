//! Registry credentials: looked for as the job's user when a registry asks who he is, used by the importer, never written
//! anywhere.
//!
//! Nothing is read before a registry asks. Then these are tried, and the first that fits counts:
//!
//! 1. the password in the reference, `USER:PASSWORD@` (the caller's business);
//! 2. `$REGISTRY_AUTH_FILE`, in Docker's form;
//! 3. enroot's `.credentials` ([`netrc`]);
//! 4. Docker's `config.json` with its helpers and stores ([`docker`]);
//! 5. podman's `auth.json`, in `$XDG_RUNTIME_DIR/containers` and `~/.config/containers`;
//! 6. the site's helper for the registry, and the site's file ([`SiteKeys`]).
//!
//! * [`files`]: 2 to 6, for who is the user;
//! * [`remote`]: the same, asked by the importer through a channel;
//! * [`hosts`]: which entries are meant for which registry and token server;
//! * [`helper`]: programs that know passwords.

#![forbid(unsafe_code)]

mod docker;
mod files;
mod helper;
mod hosts;
mod netrc;
pub mod remote;

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use zeroize::Zeroize;

pub use files::{SiteHelpers, SiteKeys, UserKeys};

/// A password or token. Not shown, and overwritten when it is dropped.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// The secret.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl From<String> for Secret {
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for Secret {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// What a secret is, and so how it is presented.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kind {
    /// Goes with the user's name, as Basic.
    #[default]
    Password,
    /// Docker's `identitytoken`: the token server gives tokens for it (OAuth 2.0's refresh token).
    IdentityToken,
    /// Docker's `registrytoken`: goes to the registry as it is.
    RegistryToken,
}

/// Something to present.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// User name; may be empty with a token.
    pub user: String,
    /// Password or token.
    pub secret: Secret,
    /// Which of the two.
    pub kind: Kind,
    /// Where it is from, for messages.
    pub source: String,
}

impl Credential {
    /// A password, or what a helper calls one: with the name `<token>` it is an identity token.
    fn password(user: &str, secret: impl Into<Secret>, source: impl Into<String>) -> Self {
        let kind = if user == "<token>" { Kind::IdentityToken } else { Kind::Password };
        Self { user: user.to_owned(), secret: secret.into(), kind, source: source.into() }
    }

    /// Whether this is of `user`, if one is asked for. A token tells nothing about whose it is.
    fn is_of(&self, user: Option<&str>) -> bool {
        user.is_none_or(|user| user == self.user || (self.kind != Kind::Password && self.user.is_empty()))
    }
}

/// Who asks for credentials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// `HOST[:PORT]` of the registry.
    pub registry: String,
    /// Repository there.
    pub repository: String,
    /// `HOST[:PORT]` of the token server that the registry names; the registry itself if it wants a password.
    pub realm: String,
    /// The user that the reference names.
    pub user: Option<String>,
}

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// The first that fits.
    pub credential: Option<Credential>,
    /// What was looked at, for the message when none fits.
    pub tried: Vec<String>,
    /// One line for each file or entry that could not be used.
    pub warnings: Vec<String>,
}

impl Answer {
    /// Where credentials were looked for, and what was wrong there.
    pub fn tried(&self) -> String {
        let mut text = match self.tried.split_last() {
            None => "no file".to_owned(),
            Some((last, [])) => last.clone(),
            Some((last, others)) => format!("{} and {last}", others.join(", ")),
        };
        for warning in &self.warnings {
            text.push_str("; ");
            text.push_str(warning);
        }
        text
    }
}

/// Where credentials come from.
pub trait Keyring: fmt::Debug + Send + Sync {
    /// Looks for what to present. Asked again, it looks again: passwords expire.
    fn find(&self, query: &Query) -> Answer;
}

/// A keyring that threads share.
pub type SharedKeyring = Arc<dyn Keyring>;

/// Several keyrings, in order; none at all is the empty one.
#[derive(Debug, Default)]
pub struct Keyrings(pub Vec<SharedKeyring>);

impl Keyring for Keyrings {
    fn find(&self, query: &Query) -> Answer {
        let mut all = Answer::default();
        for keyring in &self.0 {
            let answer = keyring.find(query);
            all.tried.extend(answer.tried);
            all.warnings.extend(answer.warnings);
            if answer.credential.is_some() {
                all.credential = answer.credential;
                break;
            }
        }
        all
    }
}

/// Nobody's.
pub fn no_keys() -> SharedKeyring {
    Arc::new(Keyrings::default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_do_not_show() {
        let credential = Credential::password("me", "hunter2", "F");
        assert!(!format!("{credential:?}").contains("hunter2"));
        let text = serde_json::to_string(&credential).unwrap();
        assert_eq!(serde_json::from_str::<Credential>(&text).unwrap(), credential);
        assert_eq!(Credential::password("<token>", "x", "F").kind, Kind::IdentityToken);
    }

    #[test]
    fn what_was_tried_is_told() {
        let answer = |tried: &[&str], warnings: &[&str]| {
            let owned = |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect();
            Answer { credential: None, tried: owned(tried), warnings: owned(warnings) }.tried()
        };
        assert_eq!(answer(&[], &[]), "no file");
        assert_eq!(answer(&["a"], &["w"]), "a; w");
        assert_eq!(answer(&["a", "b", "c"], &["v", "w"]), "a, b and c; v; w");
    }
}
