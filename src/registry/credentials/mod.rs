//! Registry credentials: read as the job's user, used by the importer, never written anywhere.
//!
//! Tried in this order: the password in the reference (`USER:PASSWORD@`), enroot's `.credentials`, Docker's
//! `config.json`.

#![forbid(unsafe_code)]

mod docker;
mod netrc;

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};

use crate::image::reference::is_docker_hub;
use crate::request::Environment;

/// Most bytes of a credentials file.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// What the user's files offer for the registries at hand. Goes through a pipe as JSON.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CredentialSet {
    /// In the order of the files.
    pub entries: Vec<Credential>,
    /// Files that were looked for, for the error message when none fits.
    pub tried: Vec<String>,
    /// One line for each file or entry that could not be used.
    pub warnings: Vec<String>,
}

/// A user name and a secret for one host.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// Host with an optional port, as the file names it.
    pub host: String,
    /// User name.
    pub user: String,
    /// Password or token.
    pub secret: String,
    /// The file it is from.
    pub file: String,
}

/// Without the secret.
impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, user, secret: _, file } = self;
        write!(f, "Credential({user:?} at {host:?} from {file:?})")
    }
}

/// Reads the credentials files of the user whose `environment` and `home` these are. Never fails: what cannot be read is
/// a warning, to be shown if the registry wants credentials and none fits.
///
/// Must run as that user.
pub fn load(environment: &Environment, home: &Path) -> CredentialSet {
    let mut set = CredentialSet::default();
    let directory = |variable: &str| environment.get_str(variable).map(PathBuf::from);
    let enroot = directory("ENROOT_CONFIG_PATH")
        .unwrap_or_else(|| directory("XDG_CONFIG_HOME").unwrap_or_else(|| home.join(".config")).join("enroot"));
    set.add(&enroot.join(".credentials"), |file, text, set| {
        netrc::parse(text, file, |name| environment.get_str(name).map(str::to_owned), set);
    });
    let docker = directory("DOCKER_CONFIG").unwrap_or_else(|| home.join(".docker"));
    set.add(&docker.join("config.json"), docker::parse);
    set
}

impl CredentialSet {
    fn add(&mut self, path: &Path, parse: impl FnOnce(&str, &str, &mut Self)) {
        let file = path.display().to_string();
        self.tried.push(file.clone());
        match read(path) {
            Ok(Some(text)) => parse(&file, &text, self),
            Ok(None) => {}
            Err(error) => self.warnings.push(format!("{file}: {}", crate::sys::reason(error))),
        }
    }

    /// What to present for `registry`, whose challenge names the token server `realm` (its own host for Basic).
    ///
    /// An entry for the token server's host goes before one for the registry, as with enroot and curl. It is presented
    /// only if the two belong together: otherwise any registry could have a token for somebody else's made for itself.
    pub fn find(&self, registry: &str, realm: &str, user: Option<&str>) -> Option<Credential> {
        if let Some((user, secret)) = user.and_then(|user| user.split_once(':')) {
            let credential = Credential {
                host: registry.to_owned(),
                user: user.to_owned(),
                secret: secret.to_owned(),
                file: "the image reference".to_owned(),
            };
            return Some(credential);
        }
        let fits = |entry: &&Credential| user.is_none_or(|user| user == entry.user);
        let at = |host: &str| self.entries.iter().filter(fits).find(|entry| same_host(&entry.host, host));
        let of_registry = at(registry);
        let of_realm = at(realm).filter(|_| of_registry.is_some() || belong_together(registry, realm));
        of_realm.or(of_registry).cloned()
    }

    /// For the message when a registry wants credentials and [`find`](Self::find) has none: where they were looked for.
    pub fn tried(&self) -> String {
        let mut text = if self.tried.is_empty() { "no file".to_owned() } else { self.tried.join(" and ") };
        for warning in &self.warnings {
            text.push_str("; ");
            text.push_str(warning);
        }
        text
    }
}

/// Whether an entry for `entry` is meant for `host`: an entry without a port is for every port.
fn same_host(entry: &str, host: &str) -> bool {
    entry.eq_ignore_ascii_case(host)
        || entry.eq_ignore_ascii_case(without_port(host))
        || (is_docker_hub(entry) && is_docker_hub(host))
}

/// Whether a token server is its registry's own: the pairs that are known, or one host's name ends in the other's.
fn belong_together(registry: &str, realm: &str) -> bool {
    let (registry, realm) = (without_port(registry).to_ascii_lowercase(), without_port(realm).to_ascii_lowercase());
    let below = |child: &str, parent: &str| {
        parent.contains('.') && child.strip_suffix(parent).is_some_and(|rest| rest.ends_with('.'))
    };
    registry == realm
        || (is_docker_hub(&registry) && realm == "auth.docker.io")
        || (registry == "nvcr.io" && realm == "authn.nvidia.com")
        || below(&registry, &realm)
        || below(&realm, &registry)
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => name,
        _ => host,
    }
}

/// The text of a regular file; none if there is no such file. Anything else (a fifo, say) is an error, at once.
fn read(path: &Path) -> std::io::Result<Option<String>> {
    use std::io::{Error, ErrorKind};
    let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => std::fs::File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = String::new();
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::new(ErrorKind::FileTooLarge, "larger than 1 MiB"));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(entries: &[(&str, &str)]) -> CredentialSet {
        let entry = |&(host, user): &(&str, &str)| Credential {
            host: host.into(),
            user: user.into(),
            secret: format!("secret of {user} at {host}"),
            file: "test".into(),
        };
        CredentialSet { entries: entries.iter().map(entry).collect(), ..CredentialSet::default() }
    }

    #[test]
    fn finds_the_entry_that_is_meant() {
        for (entries, registry, realm, user, found) in [
            (&[("reg.io", "a")][..], "reg.io", "reg.io", None, Some(("reg.io", "a"))),
            (&[("reg.io", "a")], "reg.io:5000", "reg.io:5000", None, Some(("reg.io", "a"))),
            (&[("reg.io:5001", "a")], "reg.io:5000", "reg.io:5000", None, None),
            (&[("reg.io", "a"), ("reg.io", "b")], "reg.io", "reg.io", Some("b"), Some(("reg.io", "b"))),
            (&[("reg.io", "a")], "reg.io", "reg.io", Some("b"), None),
            (&[("regxio", "a")], "reg.io", "reg.io", None, None),
            (&[("docker.io", "a")], "registry-1.docker.io", "auth.docker.io", None, Some(("docker.io", "a"))),
            (&[("index.docker.io", "a")], "registry-1.docker.io", "x", None, Some(("index.docker.io", "a"))),
            (&[("auth.docker.io", "a")], "registry-1.docker.io", "auth.docker.io", None, Some(("auth.docker.io", "a"))),
            (
                &[("nvcr.io", "a"), ("authn.nvidia.com", "b")],
                "nvcr.io",
                "authn.nvidia.com",
                None,
                Some(("authn.nvidia.com", "b")),
            ),
            (&[("gitlab.com", "a")], "registry.gitlab.com", "gitlab.com", None, Some(("gitlab.com", "a"))),
            // A registry without an entry cannot have a token of Docker Hub's made for itself.
            (&[("auth.docker.io", "a")], "evil.io", "auth.docker.io", None, None),
            (&[("com", "a")], "evil.com", "com", None, None),
            (&[("evil.io", "a")], "evil.io", "auth.other.io", None, Some(("evil.io", "a"))),
        ] {
            let credential = set(entries).find(registry, realm, user);
            let named = credential.as_ref().map(|entry| (&*entry.host, &*entry.user));
            assert_eq!(named, found, "{registry} {realm} {user:?}");
        }
        let inline = set(&[("reg.io", "a")]).find("reg.io", "reg.io", Some("me:se:cret")).unwrap();
        assert_eq!((&*inline.user, &*inline.secret), ("me", "se:cret"));
    }

    #[test]
    fn the_files_of_a_user_are_read() {
        let home = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = home.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let load = |variables: &[String]| load(&variables.iter().collect(), home.path());
        let hosts = |set: &CredentialSet| set.entries.iter().map(|entry| entry.host.clone()).collect::<Vec<_>>();

        let nothing = load(&[]);
        assert_eq!((hosts(&nothing), nothing.warnings.len()), (vec![], 0));
        assert!(nothing.tried().ends_with("/.docker/config.json"), "{}", nothing.tried());

        write(".config/enroot/.credentials", "machine enroot.io login u password $SECRET\n");
        write(".docker/config.json", r#"{"auths": {"docker.example": {"auth": "dTpw"}}}"#);
        let set = load(&["SECRET=s3".to_owned()]);
        assert_eq!(hosts(&set), ["enroot.io", "docker.example"]);
        assert_eq!(set.entries[0].secret, "s3");
        assert!(!format!("{set:?}").contains("s3"));

        write("xdg/enroot/.credentials", "machine xdg.io login u password p");
        write("own/.credentials", "machine own.io login u password p");
        write("own/config.json", "no json");
        let xdg = format!("XDG_CONFIG_HOME={}", home.path().join("xdg").display());
        assert_eq!(hosts(&load(std::slice::from_ref(&xdg)))[0], "xdg.io");
        let own = ["ENROOT_CONFIG_PATH", "DOCKER_CONFIG"].map(|name| format!("{name}={}/own", home.path().display()));
        let set = load(&[&own[..], &[xdg]].concat());
        assert_eq!(hosts(&set), ["own.io"]);
        assert_eq!(set.warnings.len(), 1);
    }

    #[test]
    fn what_is_no_file_does_not_block() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join(".docker");
        std::fs::create_dir(&directory).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, directory.join("config.json"), Mode::from(0o600)).unwrap();
        let set = load(&Environment::default(), home.path());
        assert!(set.warnings[0].ends_with("not a regular file"), "{set:?}");
        std::fs::remove_file(directory.join("config.json")).unwrap();
        std::fs::write(directory.join("config.json"), vec![b' '; MAX_FILE_BYTES as usize + 1]).unwrap();
        assert!(load(&Environment::default(), home.path()).warnings[0].ends_with("larger than 1 MiB"));
    }
}
