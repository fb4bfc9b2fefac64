//! What the site has for a registry in files of its own: authorities to trust, a certificate to show, credentials, a helper.
//!
//! Root opens the files, because users must not read them, and reads none: the descriptors go to the importer. So the
//! site's credentials are used for everybody whom the site lets pull, and seen by nobody. A helper is run as the user, and
//! what it prints is his to see.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};
use serde::{Deserialize, Serialize};
use ureq::tls::{Certificate, ClientCert, PemItem, PrivateKey, parse_pem};
use zeroize::Zeroizing;

use super::config::RegistryConfig;
use super::credentials::{SiteHelpers, SiteKeys};
use crate::image::reference::{ImageReference, is_docker_hub, is_host};

/// Most bytes of a file.
const MAX_FILE: u64 = 1 << 20;
/// Most files of a directory of certificates.
const MAX_CERTIFICATES: usize = 50;

/// A file that is needed for a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteFile {
    /// `HOST[:PORT]`.
    pub host: String,
    /// What for.
    pub purpose: Purpose,
    /// The file.
    pub path: PathBuf,
}

/// What a file is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Certificates of authorities.
    Authorities,
    /// What shows who asks.
    Certificate,
    /// Its key.
    Key,
    /// Users and passwords.
    Credentials,
}

impl Purpose {
    fn is_secret(self) -> bool {
        matches!(self, Self::Key | Self::Credentials)
    }
}

/// How an endpoint is reached, besides its name. Not shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Access(Option<Arc<Parts>>);

#[derive(Default, Clone, PartialEq, Eq)]
struct Parts {
    authorities: Vec<u8>,
    certificate: Vec<u8>,
    key: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.is_some() { "Access" } else { "NoAccess" })
    }
}

impl Access {
    /// The authorities to trust besides the node's own; or what is wrong with the file.
    pub fn authorities(&self) -> Result<Vec<Certificate<'static>>, &'static str> {
        match &self.0 {
            Some(parts) if !parts.authorities.is_empty() => certificates(&parts.authorities),
            _ => Ok(Vec::new()),
        }
    }

    /// What shows who asks.
    pub fn client(&self) -> Result<Option<ClientCert>, &'static str> {
        let Some(parts) = self.0.as_ref().filter(|parts| !parts.certificate.is_empty()) else { return Ok(None) };
        let key = PrivateKey::from_pem(&parts.key).map_err(|_| "there is no private key in client_key")?;
        Ok(Some(ClientCert::new_with_certs(&certificates(&parts.certificate)?, key)))
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<Certificate<'static>>, &'static str> {
    let items: Result<Vec<PemItem<'static>>, _> = parse_pem(pem).collect();
    let items = items.map_err(|_| "its file is not in PEM")?;
    let found: Vec<_> = items
        .into_iter()
        .filter_map(|item| match item {
            PemItem::Certificate(certificate) => Some(certificate),
            _ => None,
        })
        .collect();
    if found.is_empty() { Err("there is no certificate in its file") } else { Ok(found) }
}

impl RegistryConfig {
    /// The files for the endpoints of `reference`: those that the host's table names, and those in directories of
    /// certificates.
    pub fn site_files(&self, reference: &ImageReference) -> Vec<SiteFile> {
        let mut files: Vec<SiteFile> = Vec::new();
        for endpoint in self.endpoints(reference) {
            let entry = self.of_host(&endpoint.host).map(|(_, entry)| entry);
            let named = entry.into_iter().flat_map(|entry| {
                [
                    (Purpose::Authorities, &entry.ca),
                    (Purpose::Certificate, &entry.client_certificate),
                    (Purpose::Key, &entry.client_key),
                    (Purpose::Credentials, &entry.credentials),
                ]
            });
            let named = named.filter_map(|(purpose, path)| Some((purpose, path.clone()?)));
            let shows_one = entry.is_some_and(|entry| entry.client_certificate.is_some());
            let found = if endpoint.insecure { Vec::new() } else { self.certificates_for(&endpoint.host) };
            let found = found.into_iter().filter(|(purpose, _)| !shows_one || *purpose == Purpose::Authorities);
            for (purpose, path) in named.chain(found) {
                let file = SiteFile { host: endpoint.host.clone(), purpose, path };
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        files
    }

    /// What is in the first directory `CERTS/HOST[:PORT]` there is (containers-certs.d(5)): `*.crt` are authorities,
    /// `NAME.cert` and `NAME.key` show who asks.
    fn certificates_for(&self, host: &str) -> Vec<(Purpose, PathBuf)> {
        // It came from an image's name: a single component of a path, and not `..`.
        if !is_host(host) {
            return Vec::new();
        }
        let names = if is_docker_hub(host) { vec!["docker.io", host] } else { vec![host] };
        let mut directories = self.certs.iter().flat_map(|certs| names.iter().map(move |name| certs.join(name)));
        let Some(entries) = directories.find_map(|directory| std::fs::read_dir(directory).ok()) else {
            return Vec::new();
        };
        let mut paths: Vec<PathBuf> = entries.flatten().take(MAX_CERTIFICATES).map(|entry| entry.path()).collect();
        paths.sort();
        let has_ending = |path: &&PathBuf, ending: &str| path.extension().is_some_and(|extension| extension == ending);
        let authorities = paths.iter().filter(|path| has_ending(path, "crt"));
        let shown = paths.iter().filter(|path| has_ending(path, "cert")).find_map(|certificate| {
            let key = certificate.with_extension("key");
            paths.contains(&key).then(|| [(Purpose::Certificate, certificate.clone()), (Purpose::Key, key)])
        });
        authorities.map(|path| (Purpose::Authorities, path.clone())).chain(shown.into_iter().flatten()).collect()
    }

    /// The helpers for them.
    pub fn site_helpers(&self, reference: &ImageReference) -> SiteHelpers {
        let endpoints = self.endpoints(reference).into_iter();
        let helper = |host: String| {
            let program = self.of_host(&host)?.1.credential_helper.as_ref()?.to_str()?.to_owned();
            Some((host, program))
        };
        endpoints.filter_map(|endpoint| helper(endpoint.host)).collect()
    }

    /// Takes in what the files say, and gives what is credentials.
    pub fn read_site_files(
        &mut self,
        files: impl IntoIterator<Item = (SiteFile, File)>,
    ) -> Result<SiteKeys, (PathBuf, io::Error)> {
        let mut keys = SiteKeys::default();
        for (SiteFile { host, purpose, path }, file) in files {
            let content = Zeroizing::new(read(file).map_err(|error| (path.clone(), error))?);
            if purpose == Purpose::Credentials {
                keys.add(vec![host], path.display().to_string(), String::from_utf8_lossy(&content).into_owned());
                continue;
            }
            let parts = Arc::make_mut(self.access.entry(host).or_default().0.get_or_insert_default());
            match purpose {
                Purpose::Authorities => {
                    parts.authorities.extend_from_slice(&content);
                    parts.authorities.push(b'\n');
                }
                Purpose::Certificate => parts.certificate = content.to_vec(),
                Purpose::Key | Purpose::Credentials => parts.key = content,
            }
        }
        Ok(keys)
    }
}

/// Opens a file for the importer, as root. One with a secret has to be root's, and readable by nobody else.
pub fn open(file: &SiteFile) -> io::Result<File> {
    let opened = open_any(&file.path)?;
    let metadata = rustix::fs::fstat(&opened)?;
    if file.purpose.is_secret() && (metadata.st_uid != 0 || metadata.st_mode & 0o077 != 0) {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            "it has to be root's and readable by nobody else: chown root, chmod 600",
        ));
    }
    Ok(opened)
}

/// Opens a file for who typed a command, root or not.
pub fn open_for_command(file: &SiteFile) -> io::Result<Option<File>> {
    if rustix::process::geteuid().is_root() { open(file).map(Some) } else { open_own(file) }
}

/// Opens a file for who runs a command. Of one with a secret there is none if it is not for him.
fn open_own(file: &SiteFile) -> io::Result<Option<File>> {
    match open_any(&file.path) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied && file.purpose.is_secret() => Ok(None),
        opened => opened.map(Some),
    }
}

fn open_any(path: &Path) -> io::Result<File> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    if FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) != FileType::RegularFile {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    Ok(file.into())
}

fn read(mut file: File) -> io::Result<Vec<u8>> {
    // It may have been read before, through another descriptor.
    file.rewind()?;
    let mut content = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_FILE {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "larger than 1 MiB"));
    }
    Ok(content)
}
