//! What an administrator allows and denies: the rules of `[[policy]]` in `pyxis.toml`, for the broker, which asks before it
//! lets anything of an image be used.
//!
//! The rules are asked in order and the first that fits decides; where none fits, the image is allowed. A rule fits if all
//! its conditions do, and a condition if one of its values does. What a condition is about and an image does not have (the
//! registry of a file, the digest of a squashfs file) does not fit. A rule with `signed_by` fits like any other and then
//! allows only what is signed with one of the keys.
//!
//! * [`pattern`]: names of registries and repositories;
//! * [`key`], [`cosign`], [`bundle`]: signatures; for the importer, which alone reads what comes from a registry.

#![forbid(unsafe_code)]

pub mod bundle;
pub mod cosign;
pub mod key;
pub mod pattern;

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize, de};

use crate::image::digest::Digest;
use crate::image::reference::{ImageReference, is_docker_hub};
use crate::request::{ImageSource, LocalImage, User};
use pattern::Pattern;

/// Most bytes of a key's file.
const MAX_KEY_BYTES: u64 = 4096;
/// Most keys of a rule: all of them fit into a message to the importer.
const MAX_KEYS: usize = 16;

/// The rules, in order.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Policy {
    rules: Vec<Rule>,
}

/// `[[policy]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// `name`: what the rule is called in messages; its number if it has none.
    pub name: Option<String>,
    /// `action`.
    pub action: Action,
    /// `message`: what a denied user should know.
    pub message: Option<String>,
    /// `source`: where images come from.
    #[serde(default)]
    pub source: Vec<Source>,
    /// `registry`: patterns of `HOST[:PORT]`; Docker Hub is `docker.io`.
    #[serde(default)]
    pub registry: Vec<Pattern>,
    /// `repository`: patterns, such as `library/*`.
    #[serde(default)]
    pub repository: Vec<Pattern>,
    /// `digest`: of a manifest, or of an index that it was found by.
    #[serde(default)]
    pub digest: Vec<Digest>,
    /// `user`: names or numbers.
    #[serde(default)]
    pub user: Vec<Account>,
    /// `group`: names or numbers of groups that the user has in the job.
    #[serde(default)]
    pub group: Vec<Account>,
    /// `signed_by`: files with public keys.
    #[serde(default)]
    pub signed_by: Vec<PathBuf>,
}

/// What a rule does with images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// They may be used.
    Allow,
    /// They may not.
    Deny,
}

/// Where an image comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// A registry, or what the store has from one.
    Registry,
    /// A squashfs file, an archive or an OCI layout of the user's.
    File,
    /// A container engine on the node.
    Engine,
}

/// A user or a group in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Account {
    /// By number.
    Id(u32),
    /// By name.
    Name(String),
}

impl<'de> Deserialize<'de> for Account {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl de::Visitor<'_> for Visitor {
            type Value = Account;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a name or a number")
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Account, E> {
                u32::try_from(number).map(Account::Id).map_err(|_| E::custom("not the number of a user or group"))
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Account, E> {
                let is_name =
                    !name.is_empty() && name.len() <= 256 && !name.contains(|c: char| c.is_control() || c == ':');
                match name.parse() {
                    Ok(number) => Ok(Account::Id(number)),
                    Err(_) if is_name => Ok(Account::Name(name.to_owned())),
                    Err(_) => Err(E::custom("not the name of a user or group")),
                }
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Finds the numbers of users and groups, or says why not.
pub trait Accounts {
    /// Of a user.
    fn uid(&self, name: &str) -> Result<u32, String>;
    /// Of a group.
    fn gid(&self, name: &str) -> Result<u32, String>;
}

/// Who wants to use which image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    user: User,
    source: Source,
    /// Registry and repository.
    name: Option<(String, String)>,
    /// For messages.
    shown: String,
}

impl Subject {
    /// An image in a registry.
    pub fn registry(user: &User, reference: &ImageReference) -> Self {
        let name = (registry_name(&reference.registry), reference.repository_path().to_owned());
        let shown = reference.to_string();
        Self { user: user.clone(), source: Source::Registry, name: Some(name), shown }
    }

    /// What a step asks for.
    pub fn of(user: &User, image: &ImageSource) -> Self {
        match image {
            ImageSource::Registry { reference, .. } => Self::registry(user, reference),
            ImageSource::File(path) => Self::kept(user, None, Source::File, &path.display().to_string()),
            ImageSource::Local { typed, image } => Self::local(user, image, typed),
        }
    }

    /// What a container was made from that is kept: an image that was called `shown`.
    pub fn kept(user: &User, reference: Option<&ImageReference>, source: Source, shown: &str) -> Self {
        match reference {
            Some(reference) => Self::registry(user, reference),
            None => Self { user: user.clone(), source, name: None, shown: one_line(shown) },
        }
    }

    /// An image on this machine, called `shown`.
    pub fn local(user: &User, image: &LocalImage, shown: &str) -> Self {
        let source = match image {
            LocalImage::Path { .. } => Source::File,
            LocalImage::Engine { .. } => Source::Engine,
        };
        Self { user: user.clone(), source, name: None, shown: one_line(shown) }
    }

    /// Where it comes from.
    pub fn source(&self) -> Source {
        self.source
    }

    /// Whose it is.
    pub fn user(&self) -> &User {
        &self.user
    }
}

/// A registry as rules name it: there is one name for what is one registry.
fn registry_name(host: &str) -> String {
    let host = host.to_ascii_lowercase();
    let host = host.strip_suffix(":443").unwrap_or(&host);
    if is_docker_hub(host) { "docker.io".to_owned() } else { host.to_owned() }
}

/// What is known about an image besides its name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Evidence {
    /// Digests of the manifest and of the indexes that it was found by.
    pub digests: Vec<Digest>,
    /// Digests of the files of the keys that one of these documents was found to be signed with.
    pub keys: Vec<Digest>,
}

/// What the rules say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The image may be used.
    Allowed,
    /// Nobody can say before the image's digests are known.
    Undecided,
    /// It may be used if it is signed with one of these keys.
    IfSigned(Keys),
    /// It may not: one line that says why.
    Denied(String),
}

/// The keys of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// The files' contents: public keys in PEM. What the importer is told.
    pub texts: Vec<String>,
    /// Their digests.
    pub digests: Vec<Digest>,
    /// For a message about what is not signed.
    refusal: String,
}

impl Keys {
    /// Why an image may not be used that none of the keys has signed, `problem` being what was seen.
    pub fn refusal(&self, problem: &str) -> String {
        format!("{} ({problem})", self.refusal)
    }
}

impl Policy {
    /// Whether every rule means something.
    pub fn check(&self) -> Result<(), String> {
        for (index, rule) in self.rules.iter().enumerate() {
            let wrong = |what: &str| Err(format!("policy: {}: {what}", rule.title(index)));
            if rule.action == Action::Deny && !rule.signed_by.is_empty() {
                return wrong("signed_by says what is allowed: action has to be \"allow\"");
            }
            if rule.signed_by.len() > MAX_KEYS {
                return wrong(&format!("signed_by: more than {MAX_KEYS} keys"));
            }
            if let Some(path) = rule.signed_by.iter().find(|path| !path.is_absolute()) {
                return wrong(&format!("signed_by: must be absolute paths: {}", path.display()));
            }
            let elsewhere = !rule.source.is_empty() && !rule.source.contains(&Source::Registry);
            if elsewhere && !(rule.registry.is_empty() && rule.repository.is_empty()) {
                return wrong("only images of registries have a registry and a repository");
            }
        }
        Ok(())
    }

    /// What the rules say about `subject`, of which `evidence` is known: nothing before the image was looked for.
    pub fn judge(&self, subject: &Subject, evidence: Option<&Evidence>, accounts: &dyn Accounts) -> Verdict {
        for (index, rule) in self.rules.iter().enumerate() {
            let fits = match rule.fits(subject, accounts) {
                Ok(fits) => fits,
                // Whoever the rule is about: it may be this user.
                Err(reason) => return Verdict::Denied(format!("{}: {reason}", rule.inapplicable(index, subject))),
            };
            if !fits {
                continue;
            }
            if !rule.digest.is_empty() {
                let Some(evidence) = evidence else { return Verdict::Undecided };
                if !rule.digest.iter().any(|digest| evidence.digests.contains(digest)) {
                    continue;
                }
            }
            return match rule.action {
                Action::Deny => Verdict::Denied(rule.denial(index, subject)),
                Action::Allow if rule.signed_by.is_empty() => Verdict::Allowed,
                Action::Allow => rule.signed(index, subject, evidence),
            };
        }
        Verdict::Allowed
    }
}

impl Rule {
    fn title(&self, index: usize) -> String {
        match &self.name {
            Some(name) => format!("rule {} (\"{}\")", index + 1, one_line(name)),
            None => format!("rule {}", index + 1),
        }
    }

    /// Whether every condition but the digest's fits. Those that cost nothing are looked at first.
    fn fits(&self, subject: &Subject, accounts: &dyn Accounts) -> Result<bool, String> {
        if !(self.source.is_empty() || self.source.contains(&subject.source)) {
            return Ok(false);
        }
        let named = |patterns: &[Pattern], part: fn(&(String, String)) -> &String| {
            patterns.is_empty()
                || subject.name.as_ref().is_some_and(|name| patterns.iter().any(|pattern| pattern.matches(part(name))))
        };
        if !named(&self.registry, |name| &name.0) || !named(&self.repository, |name| &name.1) {
            return Ok(false);
        }
        let User { uid, gid, groups } = &subject.user;
        Ok(is_one_of(&self.user, |id| id == *uid, |name| accounts.uid(name))?
            && is_one_of(&self.group, |id| id == *gid || groups.contains(&id), |name| accounts.gid(name))?)
    }

    fn signed(&self, index: usize, subject: &Subject, evidence: Option<&Evidence>) -> Verdict {
        if subject.source != Source::Registry {
            let reason = "it demands a signature, which only images of registries have";
            return Verdict::Denied(format!("{}: {reason}", self.denial(index, subject)));
        }
        let keys = match self.keys(index, subject) {
            Ok(keys) => keys,
            Err(reason) => return Verdict::Denied(format!("{}: {reason}", self.inapplicable(index, subject))),
        };
        let signed = |evidence: &Evidence| evidence.keys.iter().any(|key| keys.digests.contains(key));
        match evidence {
            Some(evidence) if signed(evidence) => Verdict::Allowed,
            _ => Verdict::IfSigned(keys),
        }
    }

    fn keys(&self, index: usize, subject: &Subject) -> Result<Keys, String> {
        let refusal = format!("{}: it is not signed with a key of that rule", self.denial(index, subject));
        let mut keys = Keys { texts: Vec::new(), digests: Vec::new(), refusal };
        for path in &self.signed_by {
            let text = read_key(path).map_err(|error| format!("{}: {}", path.display(), crate::sys::reason(error)))?;
            keys.digests.push(crate::registry::sha256(text.as_bytes()));
            keys.texts.push(text);
        }
        Ok(keys)
    }

    fn denial(&self, index: usize, subject: &Subject) -> String {
        let message = self.message.as_deref().map(|text| format!(": {}", one_line(text))).unwrap_or_default();
        format!("image {} is denied by {} of this site's policy{message}", subject.shown, self.title(index))
    }

    fn inapplicable(&self, index: usize, subject: &Subject) -> String {
        let title = self.title(index);
        format!("image {} is denied because {title} of this site's policy cannot be applied", subject.shown)
    }
}

/// Whether one of `accounts`, if there are any, is the one that `is_it` knows.
fn is_one_of(
    accounts: &[Account],
    is_it: impl Fn(u32) -> bool,
    look_up: impl Fn(&str) -> Result<u32, String>,
) -> Result<bool, String> {
    let mut numbers =
        accounts.iter().filter_map(|account| if let Account::Id(id) = account { Some(*id) } else { None });
    if accounts.is_empty() || numbers.any(&is_it) {
        return Ok(true);
    }
    for account in accounts {
        if let Account::Name(name) = account
            && is_it(look_up(name)?)
        {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The text of a key's file, which is the administrator's.
fn read_key(path: &Path) -> std::io::Result<String> {
    use std::io::Read;
    let mut text = String::new();
    std::fs::File::open(path)?.take(MAX_KEY_BYTES + 1).read_to_string(&mut text)?;
    match text.len() as u64 > MAX_KEY_BYTES {
        true => Err(std::io::ErrorKind::FileTooLarge.into()),
        false => Ok(text),
    }
}

fn one_line(text: &str) -> String {
    text.chars().take(300).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests;
