//! The places where credentials are, for who is the user, and the site's.

use std::collections::BTreeMap;
use std::io::{Error, ErrorKind, Read};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags};
use zeroize::Zeroizing;

use super::{Answer, Keyring, Query, docker, helper, hosts, netrc};
use crate::request::Environment;

/// Most bytes of a credentials file.
pub const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// Programs of the site's that are asked for credentials, by the registry's `HOST[:PORT]`.
pub type SiteHelpers = BTreeMap<String, String>;

/// What the files and helpers of a user offer. Must be used as that user.
#[derive(Debug, Clone)]
pub struct UserKeys {
    environment: Environment,
    home: PathBuf,
    helpers: SiteHelpers,
}

/// How a file is read.
#[derive(Debug, Clone, Copy)]
enum Form {
    Docker,
    Netrc,
}

impl UserKeys {
    /// The keys of the user whose `environment` and `home` these are, and what the site's `helpers` have for him.
    pub fn new(environment: Environment, home: impl Into<PathBuf>, helpers: SiteHelpers) -> Self {
        Self { environment, home: home.into(), helpers }
    }

    /// The files in the order in which they are looked at.
    fn places(&self) -> Vec<(PathBuf, Form)> {
        let directory = |variable: &str| self.environment.get_str(variable).map(PathBuf::from);
        let config = directory("XDG_CONFIG_HOME").unwrap_or_else(|| self.home.join(".config"));
        let enroot = directory("ENROOT_CONFIG_PATH").unwrap_or_else(|| config.join("enroot"));
        let docker = directory("DOCKER_CONFIG").unwrap_or_else(|| self.home.join(".docker"));
        let chosen = directory("REGISTRY_AUTH_FILE").map(|file| (file, Form::Docker));
        let runtime = directory("XDG_RUNTIME_DIR").map(|path| (path.join("containers/auth.json"), Form::Docker));
        let places = [(enroot.join(".credentials"), Form::Netrc), (docker.join("config.json"), Form::Docker)];
        let podman = (config.join("containers/auth.json"), Form::Docker);
        chosen.into_iter().chain(places).chain(runtime).chain([podman]).collect()
    }
}

impl Keyring for UserKeys {
    /// Never fails: what cannot be read is a warning, to be shown if nothing fits.
    fn find(&self, query: &Query) -> Answer {
        let mut answer = Answer::default();
        for (path, form) in self.places() {
            let file = path.display().to_string();
            answer.tried.push(file.clone());
            match read(&path) {
                Ok(Some(text)) => find_in(form, &file, &text, query, Some(&self.environment), &mut answer),
                Ok(None) => {}
                Err(error) => answer.warnings.push(format!("{file}: {}", crate::sys::reason(error))),
            }
            if answer.credential.is_some() {
                return answer;
            }
        }
        if let Some(program) = self.helpers.get(&query.registry) {
            let source = format!("{program}, the site's");
            match helper::ask(program, &query.registry, &self.environment, &source) {
                Ok(found) => answer.credential = found.filter(|found| found.is_of(query.user.as_deref())),
                Err(reason) => answer.warnings.push(reason),
            }
            answer.tried.push(source);
        }
        answer
    }
}

fn find_in(form: Form, file: &str, text: &str, query: &Query, environment: Option<&Environment>, answer: &mut Answer) {
    match form {
        Form::Docker => docker::find(file, text, query, environment, answer),
        Form::Netrc => netrc::find(file, text, query, environment, answer),
    }
}

/// Files of the site's, each for some registries. Nothing in them is run.
#[derive(Default)]
pub struct SiteKeys(Vec<SiteFile>);

struct SiteFile {
    registries: Vec<String>,
    name: String,
    text: Zeroizing<String>,
}

impl SiteKeys {
    /// Adds the file called `name` with this content, for these registries.
    pub fn add(&mut self, registries: Vec<String>, name: String, text: String) {
        self.0.push(SiteFile { registries, name, text: Zeroizing::new(text) });
    }
}

/// Without the content.
impl std::fmt::Debug for SiteKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(|file| &file.name)).finish()
    }
}

impl Keyring for SiteKeys {
    fn find(&self, query: &Query) -> Answer {
        let mut answer = Answer::default();
        for file in &self.0 {
            if file.registries.iter().any(|registry| hosts::fit(registry, &query.registry) == Some(2)) {
                let form = if file.text.trim_start().starts_with('{') { Form::Docker } else { Form::Netrc };
                answer.tried.push(file.name.clone());
                find_in(form, &file.name, &file.text, query, None, &mut answer);
            }
            if answer.credential.is_some() {
                break;
            }
        }
        answer
    }
}

/// The text of a regular file; none if there is no such file. Anything else (a fifo, say) is an error, at once.
fn read(path: &Path) -> std::io::Result<Option<Zeroizing<String>>> {
    let file = match rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => std::fs::File::from(file),
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(Error::new(ErrorKind::InvalidInput, "not a regular file"));
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_FILE_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(Error::new(ErrorKind::FileTooLarge, "larger than 1 MiB"));
    }
    Ok(Some(text))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(registry: &str) -> Query {
        Query { registry: registry.into(), repository: "x".into(), realm: registry.into(), user: None }
    }

    #[test]
    fn the_files_of_a_user_are_read_in_order() {
        let home = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = home.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        let found = |variables: &[String]| {
            let keys = UserKeys::new(variables.iter().collect(), home.path(), SiteHelpers::new());
            let answer = keys.find(&query("r.io"));
            let secret = answer.credential.as_ref().map(|found| found.secret.reveal().to_owned());
            (secret.unwrap_or_default(), answer)
        };
        let variable = |name: &str, path: &str| format!("{name}={}/{path}", home.path().display());

        let (_, nothing) = found(&[]);
        assert_eq!((nothing.warnings.len(), nothing.tried.len()), (0, 3));
        assert!(nothing.tried().ends_with("/.config/containers/auth.json"), "{}", nothing.tried());

        let docker = |secret: &str| format!(r#"{{"auths": {{"r.io": {{"username": "u", "password": "{secret}"}}}}}}"#);
        let podman = variable("XDG_RUNTIME_DIR", "run");
        for (path, text, variables, expected) in [
            (".config/containers/auth.json", docker("podman"), vec![], "podman"),
            ("run/containers/auth.json", docker("session"), vec![podman.clone()], "session"),
            (".docker/config.json", docker("docker"), vec![podman.clone()], "docker"),
            (
                ".config/enroot/.credentials",
                "machine r.io login u password $S".into(),
                vec!["S=enroot".into()],
                "enroot",
            ),
            ("mine.json", docker("mine"), vec![variable("REGISTRY_AUTH_FILE", "mine.json")], "mine"),
            (
                "xdg/enroot/.credentials",
                "machine r.io login u password xdg".into(),
                vec![variable("XDG_CONFIG_HOME", "xdg")],
                "xdg",
            ),
            (
                "own/.credentials",
                "machine r.io login u password own".into(),
                vec![variable("ENROOT_CONFIG_PATH", "own")],
                "own",
            ),
        ] {
            write(path, &text);
            assert_eq!(found(&variables).0, expected);
        }
        // What cannot be used does not hide what comes after it.
        std::fs::remove_file(home.path().join(".config/enroot/.credentials")).unwrap();
        write("own/config.json", "no json");
        let (secret, answer) = found(&[variable("DOCKER_CONFIG", "own"), podman]);
        assert_eq!((&*secret, answer.warnings.len()), ("session", 1));
        assert!(!format!("{answer:?}").contains("session\""));
    }

    #[test]
    fn what_is_no_file_does_not_block() {
        let home = tempfile::tempdir().unwrap();
        let directory = home.path().join(".docker");
        std::fs::create_dir(&directory).unwrap();
        let file = directory.join("config.json");
        let warning = || {
            let keys = UserKeys::new(Environment::default(), home.path(), SiteHelpers::new());
            keys.find(&query("r.io")).warnings.pop().unwrap()
        };
        rustix::fs::mkfifoat(rustix::fs::CWD, &file, Mode::from(0o600)).unwrap();
        assert!(warning().ends_with("not a regular file"));
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, vec![b' '; MAX_FILE_BYTES as usize + 1]).unwrap();
        assert!(warning().ends_with("larger than 1 MiB"));
    }

    #[test]
    fn the_sites_files_are_for_their_registries() {
        let mut keys = SiteKeys::default();
        let netrc = "machine r.io login site password $(not run)\nmachine other.io login site password x\n";
        keys.add(vec!["r.io".into()], "/etc/n".into(), netrc.into());
        keys.add(vec!["d.io".into()], "/etc/d".into(), r#"{"auths": {"d.io": {"auth": "dTpw"}}}"#.into());
        let secret = |registry| keys.find(&query(registry)).credential.map(|found| found.secret.reveal().to_owned());
        assert_eq!(secret("r.io").as_deref(), Some("$(not"));
        assert_eq!(secret("d.io").as_deref(), Some("p"));
        assert_eq!(secret("other.io"), None);
        assert!(!format!("{keys:?}").contains("not run"));
    }
}
