//! Image references as users type them: `[USER@][REGISTRY#]IMAGE[:TAG]` and Docker's `registry/image:tag`.
//!
//! The grammar is enroot's (behaviour reference, section 3.3), so that every reference that worked keeps its meaning. It
//! accepts names that no registry can hold (`Ubuntu`, `a b`); [`ImageReference::check`] says so before anything is asked
//! of the network.

#![forbid(unsafe_code)]

use std::fmt;
use std::hash::{Hash, Hasher};

use serde::{Deserialize, Serialize};

use crate::image::digest::{Digest, InvalidDigest};

/// The host behind `docker.io`.
pub const DOCKER_HUB: &str = "registry-1.docker.io";

/// Most bytes of a reference. The longest that registries accept (host 253, repository 255, tag 128, digest 71) fits.
const MAX_LENGTH: usize = 1024;

/// An image in a registry: where it is and which one it is. Two are equal if they name the same image, however short.
#[derive(Clone, Eq, Serialize, Deserialize)]
pub struct ImageReference {
    /// `USER@`: whose credentials to use; `USER:PASSWORD` also gives the password.
    pub user: Option<String>,
    /// Registry host with an optional port, `registry-1.docker.io` for Docker Hub.
    pub registry: String,
    /// Repository, `library/ubuntu`.
    pub repository: String,
    /// Tag (`latest` if none was given), or the text of a digest.
    pub tag_or_digest: String,
    /// No registry was named: Docker Hub is meant, unless the administrator's short names say otherwise.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_short: bool,
}

/// Why a text is no usable image reference. The text is shortened and its control characters are escaped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidReference {
    /// The grammar does not match.
    #[error("Invalid image reference: docker://{0}")]
    Syntax(String),
    /// More than [`MAX_LENGTH`] bytes.
    #[error("Invalid image reference: docker://{0} (longer than {MAX_LENGTH} bytes)")]
    TooLong(String),
    /// The scheme of a local container engine, with a name that no engine has.
    #[error("Invalid image reference: {0} (expected a name of letters, digits and / . _ : -)")]
    EngineName(String),
    /// The scheme of an image in a file, and no path.
    #[error("Invalid image reference: {0} (a path is missing)")]
    NoPath(String),
    /// The grammar matches, but no registry can have such an image.
    #[error("Invalid image reference: docker://{reference} ({reason})")]
    Impossible {
        /// The reference.
        reference: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A digest of the wrong form.
    #[error("Invalid image reference: docker://{reference} ({source})")]
    Digest {
        /// The reference.
        reference: String,
        /// What is wrong with it.
        source: InvalidDigest,
    },
}

impl ImageReference {
    /// Parses what follows `--container-image=`: with `docker://` or without it.
    ///
    /// Nothing is looked up, and a file path is not recognised as such: whoever calls knows that a text beginning with
    /// `.` or `/` is a path.
    pub fn parse(typed: &str) -> Result<Self, InvalidReference> {
        let text = typed.strip_prefix("docker://").unwrap_or(typed);
        if text.len() > MAX_LENGTH {
            return Err(InvalidReference::TooLong(printable(text)));
        }
        // The first match wins, and of several splits the one with the longest USER.
        for family in [Family::Docker, Family::Hub, Family::Enroot] {
            for suffix in [Suffix::TagAndDigest, Suffix::Digest, Suffix::Tag] {
                for (user, rest) in user_splits(text) {
                    if let Some((registry, image, tag)) = family.split(rest, suffix, user.is_some()) {
                        return Ok(Self::assemble(user, registry, image, tag));
                    }
                }
            }
        }
        Err(InvalidReference::Syntax(printable(text)))
    }

    fn assemble(user: Option<&str>, registry: Option<&str>, image: &str, tag: &str) -> Self {
        let is_short = registry.is_none();
        let registry = registry.unwrap_or(DOCKER_HUB);
        let hub = is_docker_hub(registry);
        // `docker.io#/ubuntu` names no namespace either.
        let official = Some(image.trim_start_matches('/')).filter(|name| hub && !name.contains('/'));
        Self {
            user: user.map(str::to_owned),
            registry: if hub { DOCKER_HUB } else { registry }.to_owned(),
            repository: official.map_or_else(|| image.to_owned(), |name| format!("library/{name}")),
            tag_or_digest: tag.to_owned(),
            is_short,
        }
    }

    /// The digest, if the reference names one. The grammar lets malformed ones through: they are the error.
    pub fn digest(&self) -> Option<Result<Digest, InvalidDigest>> {
        self.tag_or_digest.contains(':').then(|| self.tag_or_digest.parse())
    }

    /// The repository as it stands in the URLs of the distribution API: without a leading slash (`HOST#/x`).
    pub fn repository_path(&self) -> &str {
        self.repository.trim_start_matches('/')
    }

    /// Whether a registry could have this image at all: host, repository and tag as the distribution specification
    /// ("Pulling manifests") has them. What passes is safe to put into a URL.
    pub fn check(&self) -> Result<(), InvalidReference> {
        let impossible = |reason| Err(InvalidReference::Impossible { reference: self.name(), reason });
        if !is_host(&self.registry) {
            return impossible("the part before the first slash or # is no host name");
        }
        if self.repository_path().bytes().any(|byte| byte.is_ascii_uppercase()) {
            return impossible("repository names are lower case");
        }
        if self.repository_path().len() > 255 || !self.repository_path().split('/').all(is_path_component) {
            return impossible("not a repository name");
        }
        match self.digest() {
            // `ubuntu:a:b` is a tag to the grammar and to nobody else.
            Some(_) if !self.tag_or_digest.starts_with("sha256:") => impossible("not a tag"),
            Some(Err(source)) => Err(InvalidReference::Digest { reference: self.name(), source }),
            Some(Ok(_)) => Ok(()),
            None if is_tag(&self.tag_or_digest) => Ok(()),
            None => impossible("not a tag"),
        }
    }

    /// Advice for the user whose image was not found, if the name shows what went wrong.
    pub fn not_found_hint(&self) -> Option<String> {
        let name = self.repository.strip_prefix("library/")?;
        let is_file = [".sqsh", ".squashfs", ".sqfs"].iter().any(|ending| name.ends_with(ending));
        is_file.then(|| format!("for a squashfs file in the working directory write ./{name}"))
    }

    fn name(&self) -> String {
        printable(&self.to_string())
    }
}

/// As it would be typed, with the registry always there and without the user: `docker.io/library/ubuntu:24.04`,
/// `localhost#ubuntu:24.04`.
impl fmt::Display for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let registry = if self.registry == DOCKER_HUB { "docker.io" } else { &self.registry };
        let separator = if self.tag_or_digest.starts_with("sha256:") { '@' } else { ':' };
        let slash = if registry.contains(['.', ':']) { '/' } else { '#' };
        write!(f, "{registry}{slash}{}{separator}{}", self.repository_path(), self.tag_or_digest)
    }
}

impl ImageReference {
    fn parts(&self) -> (&Option<String>, &str, &str, &str) {
        (&self.user, &self.registry, &self.repository, &self.tag_or_digest)
    }
}

impl PartialEq for ImageReference {
    fn eq(&self, other: &Self) -> bool {
        self.parts() == other.parts()
    }
}

impl Hash for ImageReference {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.parts().hash(state);
    }
}

/// Without the password that a user may have put there.
impl fmt::Debug for ImageReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let user = self.user.as_deref().map(|user| user.split(':').next().unwrap_or_default());
        write!(f, "ImageReference({self}, user {user:?})")
    }
}

/// Whether `registry` is one of Docker Hub's names.
pub fn is_docker_hub(registry: &str) -> bool {
    matches!(registry, "docker.io" | "index.docker.io" | DOCKER_HUB)
}

/// How registry and image are told apart.
#[derive(Clone, Copy)]
enum Family {
    /// `FIRST/IMAGE`: FIRST is a registry if it contains `.` or `:`, else a namespace on Docker Hub.
    Docker,
    /// `NAME` on Docker Hub.
    Hub,
    /// `REGISTRY#IMAGE`.
    Enroot,
}

/// What follows the image.
#[derive(Clone, Copy)]
enum Suffix {
    /// `:TAG@DIGEST`, of which the digest counts.
    TagAndDigest,
    /// `@DIGEST`.
    Digest,
    /// `[:TAG]`.
    Tag,
}

impl Family {
    /// Registry (none is Docker Hub), image, and tag or digest of `text`, if it has this form.
    fn split(self, text: &str, suffix: Suffix, has_user: bool) -> Option<(Option<&str>, &str, &str)> {
        match self {
            Family::Docker => {
                let (first, rest) = text.split_once('/')?;
                let (image, tag) = suffix.split(rest, is_image)?;
                if first.is_empty() || first.contains('#') {
                    None
                } else if first.contains(['.', ':']) {
                    Some((Some(first), image, tag))
                } else {
                    Some((None, &text[..first.len() + 1 + image.len()], tag))
                }
            }
            Family::Hub => {
                let (name, tag) = suffix.split(text, |name| !name.contains(['/', '@', '#']))?;
                // `ubuntu@sha512:…` is a digest that nobody can check, not the image `sha512` of the user `ubuntu`.
                (!(has_user && is_algorithm(name))).then_some((None, name, tag))
            }
            Family::Enroot => {
                let (registry, rest) = text.split_once('#')?;
                let (image, tag) = suffix.split(rest, is_image)?;
                (!registry.is_empty() && !registry.contains(['/', '@'])).then_some((Some(registry), image, tag))
            }
        }
    }
}

impl Suffix {
    /// Splits `text` into an image accepted by `is_name`, and its tag or digest.
    fn split(self, text: &str, is_name: impl Fn(&str) -> bool) -> Option<(&str, &str)> {
        let (named, digest) = match (self, text.split_once('@')) {
            (Suffix::Tag, None) => (text, None),
            (Suffix::TagAndDigest | Suffix::Digest, Some((named, digest))) if is_digest(digest) => {
                (named, Some(digest))
            }
            _ => return None,
        };
        let (name, tag) = match (self, named.split_once(':')) {
            (Suffix::Digest, Some(_)) | (Suffix::TagAndDigest, None) => return None,
            (_, Some((name, tag))) if is_tag_text(tag) => (name, tag),
            (_, Some(_)) => return None,
            (_, None) => (named, "latest"),
        };
        (!name.is_empty() && is_name(name)).then_some((name, digest.unwrap_or(tag)))
    }
}

/// The ways to cut `USER@` off, the longest USER first, the last without any.
fn user_splits(text: &str) -> impl Iterator<Item = (Option<&str>, &str)> {
    text.rmatch_indices('@')
        .map(|(at, _)| (Some(&text[..at]), &text[at + 1..]))
        .filter(|(user, _)| user.is_some_and(|user| !user.is_empty() && user.bytes().all(is_user_byte)))
        .chain(std::iter::once((None, text)))
}

fn is_user_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_.!~*'()%;:&=+$,-@<>?".contains(&byte)
}

fn is_image(image: &str) -> bool {
    image.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"/._-".contains(&byte))
}

fn is_tag_text(tag: &str) -> bool {
    !tag.is_empty() && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._:-".contains(&byte))
}

fn is_digest(digest: &str) -> bool {
    digest.strip_prefix("sha256:").is_some_and(|hex| !hex.is_empty() && hex.bytes().all(|b| b.is_ascii_alphanumeric()))
}

fn is_algorithm(name: &str) -> bool {
    name.strip_prefix("sha").is_some_and(|bits| !bits.is_empty() && bits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// `HOST`, `HOST:PORT` or `[IPV6]:PORT`.
pub(crate) fn is_host(text: &str) -> bool {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else { return false };
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            match port.strip_prefix(':') {
                Some(port) => ("v6", Some(port)),
                None if port.is_empty() => ("v6", None),
                None => return false,
            }
        }
        None => text.split_once(':').map_or((text, None), |(host, port)| (host, Some(port))),
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
    };
    host.len() <= 253
        && host.split('.').all(is_label)
        && port.is_none_or(|port| port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok())
}

/// One component of a repository name: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(component: &str) -> bool {
    let is_plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = component.as_bytes();
    bytes.first().copied().is_some_and(is_plain)
        && bytes.last().copied().is_some_and(is_plain)
        && component
            .split(|c: char| c.is_ascii() && is_plain(c as u8))
            .all(|run| matches!(run, "" | "." | "_" | "__") || run.bytes().all(|byte| byte == b'-'))
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
fn is_tag(tag: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    tag.len() <= 128
        && tag.bytes().next().is_some_and(is_word)
        && tag.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
}

/// `text` for a message of one line.
pub(super) fn printable(text: &str) -> String {
    let mut shown: String = text.chars().take(200).flat_map(char::escape_debug).collect();
    if text.chars().nth(200).is_some() {
        shown.push('…');
    }
    shown
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const R1: &str = DOCKER_HUB;

    /// The vectors that were run through enroot's own functions.
    #[test]
    fn means_what_it_meant_to_enroot() {
        for (typed, user, registry, repository, tag) in [
            ("ubuntu", "", R1, "library/ubuntu", "latest"),
            ("docker.io/ubuntu", "", R1, "library/ubuntu", "latest"),
            ("docker.io#/ubuntu", "", R1, "library/ubuntu", "latest"),
            ("docker.io#ubuntu", "", R1, "library/ubuntu", "latest"),
            ("index.docker.io#ubuntu", "", R1, "library/ubuntu", "latest"),
            ("docker.io/library/ubuntu:24.04", "", R1, "library/ubuntu", "24.04"),
            ("index.docker.io#foo/bar", "", R1, "foo/bar", "latest"),
            ("nvidia/cuda:12", "", R1, "nvidia/cuda", "12"),
            ("nvcr.io/nvidia/pytorch:24.01-py3", "", "nvcr.io", "nvidia/pytorch", "24.01-py3"),
            ("nvcr.io#nvidia/pytorch:24.01-py3", "", "nvcr.io", "nvidia/pytorch", "24.01-py3"),
            ("u@nvcr.io#a/b", "u", "nvcr.io", "a/b", "latest"),
            ("$oauthtoken@nvcr.io/nvidia/pytorch:1", "$oauthtoken", "nvcr.io", "nvidia/pytorch", "1"),
            ("localhost:5000/foo:bar", "", "localhost:5000", "foo", "bar"),
            ("localhost:5000#foo:bar", "", "localhost:5000", "foo", "bar"),
            ("localhost/foo", "", R1, "localhost/foo", "latest"),
            ("localhost#foo", "", "localhost", "foo", "latest"),
            ("ubuntu#foo", "", "ubuntu", "foo", "latest"),
            ("192.168.1.1:5000#/x:0.4", "", "192.168.1.1:5000", "/x", "0.4"),
            ("ubuntu@sha256:abcd", "", R1, "library/ubuntu", "sha256:abcd"),
            ("ubuntu:24.04@sha256:abcd", "", R1, "library/ubuntu", "sha256:abcd"),
            ("nvcr.io#nvidia/x:t@sha256:abcd", "", "nvcr.io", "nvidia/x", "sha256:abcd"),
            ("nvcr.io/nvidia/x:t@sha256:abcd", "", "nvcr.io", "nvidia/x", "sha256:abcd"),
            ("u@ubuntu:1", "u", R1, "library/ubuntu", "1"),
            ("u@foo/bar:1", "u", R1, "foo/bar", "1"),
            ("user@example.com@reg.io#a/b", "user@example.com", "reg.io", "a/b", "latest"),
            ("user@example.com@reg.io/a/b", "user@example.com", "reg.io", "a/b", "latest"),
            ("u@ubuntu@sha256:ab", "u", R1, "library/ubuntu", "sha256:ab"),
            ("user:pass@reg.io#x/y:1", "user:pass", "reg.io", "x/y", "1"),
            ("Ubuntu", "", R1, "library/Ubuntu", "latest"),
            ("ubuntu:a:b", "", R1, "library/ubuntu", "a:b"),
            ("a b", "", R1, "library/a b", "latest"),
            ("foo.sqsh", "", R1, "library/foo.sqsh", "latest"),
            ("docker://podman://ubuntu", "", "podman:", "/ubuntu", "latest"),
        ] {
            let prefixed = format!("docker://{}", typed.strip_prefix("docker://").unwrap_or(typed));
            for typed in [typed, &prefixed] {
                let parsed = ImageReference::parse(typed).unwrap_or_else(|error| panic!("{typed}: {error}"));
                assert_eq!(
                    (
                        parsed.user.as_deref().unwrap_or(""),
                        &*parsed.registry,
                        &*parsed.repository,
                        &*parsed.tag_or_digest
                    ),
                    (user, registry, repository, tag),
                    "{typed}"
                );
            }
        }
    }

    #[test]
    fn names_what_it_cannot_parse() {
        for typed in ["Foo/Bar", "ghcr.io/Org/img:1", "ubuntu:", "", "ubuntu@sha512:ab", "x/", "/x", "a/b@sha512:ab"] {
            let error = ImageReference::parse(typed).unwrap_err().to_string();
            assert_eq!(error, format!("Invalid image reference: docker://{typed}"));
            assert_eq!(ImageReference::parse(&format!("docker://{typed}")).unwrap_err().to_string(), error);
        }
        let garbage = ImageReference::parse(&"é".repeat(1024)).unwrap_err().to_string();
        assert!(garbage.chars().count() < 300, "{garbage}");
        assert!(!ImageReference::parse("x y\n#/z/@").unwrap_err().to_string().contains('\n'));
    }

    #[test]
    fn refuses_what_no_registry_can_have() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for typed in [
            "ubuntu",
            "localhost:5000/a/b.c_d__e-f--g:1.0_x",
            "[::1]:5000/a",
            "192.168.1.1:5000#/x:0.4",
            &format!("ubuntu:24.04@{digest}"),
        ] {
            ImageReference::parse(typed).unwrap().check().unwrap();
        }
        for (typed, reason) in [
            ("Ubuntu", "lower case"),
            ("a b", "repository"),
            ("ubuntu:a:b", "tag"),
            ("ubuntu:.x", "tag"),
            ("ubuntu@sha256:abcd", "64 lower-case"),
            ("podman://ubuntu", "host"),
            ("docker://podman://ubuntu", "host"),
            ("x:y:z/a", "host"),
            ("a?b.c/d", "host"),
            ("reg.io/a//b", "repository"),
            ("reg.io/../b", "repository"),
            ("reg.io/a..b", "repository"),
            ("reg.io/-a", "repository"),
            ("reg.io:99999/a", "host"),
            ("[::x]/a", "host"),
        ] {
            let error = ImageReference::parse(typed).and_then(|parsed| parsed.check()).unwrap_err().to_string();
            assert!(error.contains(reason), "{typed}: {error}");
        }
    }

    #[test]
    fn a_squashfs_name_gets_a_hint_and_a_password_is_not_shown() {
        let parsed = ImageReference::parse("foo.sqsh").unwrap();
        assert_eq!(parsed.not_found_hint().unwrap(), "for a squashfs file in the working directory write ./foo.sqsh");
        assert_eq!(ImageReference::parse("ubuntu").unwrap().not_found_hint(), None);
        let parsed = ImageReference::parse("me:hunter2@reg.io#x/y:1").unwrap();
        assert_eq!(format!("{parsed:?}"), "ImageReference(reg.io/x/y:1, user Some(\"me\"))");
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>()) {
            if let Ok(parsed) = ImageReference::parse(&text) {
                let _ = parsed.check();
            }
        }

        #[test]
        fn what_passes_the_check_is_safe_in_a_url(text in "[a-z]{0,3}[-a-zA-Z0-9@:/#._$ %?]{1,20}(:[a-z0-9.]{1,4})?") {
            if let Ok(parsed) = ImageReference::parse(&text)
                && parsed.check().is_ok()
            {
                let url = format!("{}/v2/{}/manifests/{}", parsed.registry, parsed.repository_path(), parsed.tag_or_digest);
                prop_assert!(url.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/[]".contains(&byte)), "{}", url);
                prop_assert!(!url.contains("/../") && !url.contains("//"));
                let again = ImageReference::parse(&parsed.to_string()).unwrap();
                prop_assert_eq!(again.repository_path(), parsed.repository_path());
                prop_assert_eq!(again.tag_or_digest, parsed.tag_or_digest);
            }
        }
    }
}
