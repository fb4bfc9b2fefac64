//! The settings `ENROOT_*` (behaviour reference, section 10.2), as the commands use them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::Error;
use super::import::CONNECTIONS;
use crate::config::{Config, RegistryConfig};
use crate::enroot::conf::{EnrootConf, Identity};
use crate::image::reference::ImageReference;
use crate::registry::proxy::Proxies;
use crate::request::Environment;
use crate::squashfs::writer::DEFAULT_OPTIONS;

/// `NAME=VALUE`.
pub fn join(mut name: OsString, value: OsString) -> Vec<u8> {
    name.push("=");
    name.push(value);
    name.into_vec()
}

/// Who runs the command.
pub fn identity() -> Result<Identity, Error> {
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let user = nix::unistd::User::from_uid(uid).ok().flatten();
    let group = nix::unistd::Group::from_gid(gid).ok().flatten();
    let home = user.as_ref().map_or_else(|| "/".into(), |user| user.dir.to_string_lossy().into_owned());
    Ok(Identity {
        uid: uid.as_raw(),
        gid: gid.as_raw(),
        name: user.map_or_else(|| uid.to_string(), |user| user.name),
        group: group.map_or_else(|| gid.to_string(), |group| group.name),
        home,
        cwd: std::env::current_dir()?,
    })
}

/// The settings in force for a process with this environment.
pub fn load(config: &Config, environment: &Environment, identity: &Identity) -> Result<EnrootConf, Error> {
    let chosen = environment.get_str("ENROOT_SYSCONF_PATH").map(Path::new);
    let sysconf = chosen.unwrap_or(&config.enroot.sysconf_path);
    Ok(EnrootConf::load(sysconf, environment, identity)?)
}

/// How the registry of `reference` is reached: as the site says, and as the settings do.
pub fn registries(site: RegistryConfig, settings: &EnrootConf, reference: &ImageReference) -> RegistryConfig {
    let mut registries = site;
    registries.proxies = Proxies::of_command(&registries.proxy);
    if settings.allow_http() {
        registries.allow_http(reference);
    }
    let number = |key| settings.number(key).and_then(|number| u32::try_from(number).ok()).filter(|&number| number > 0);
    if let Some(seconds) = number("ENROOT_CONNECT_TIMEOUT") {
        registries.network.connect_timeout = seconds;
    }
    if let Some(retries) = number("ENROOT_TRANSFER_RETRIES") {
        registries.network.attempts = registries.network.attempts.max(retries.saturating_add(1));
    }
    registries
}

/// Every setting by name.
pub fn all(settings: &EnrootConf) -> BTreeMap<String, String> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let paths: [(&str, PathBuf); 6] = [
        ("ENROOT_CACHE_PATH", settings.cache_path()),
        ("ENROOT_CONFIG_PATH", settings.config_path()),
        ("ENROOT_DATA_PATH", settings.data_path()),
        ("ENROOT_RUNTIME_PATH", settings.runtime_path()),
        ("ENROOT_SYSCONF_PATH", settings.sysconf_path().to_owned()),
        ("ENROOT_TEMP_PATH", settings.temp_path()),
    ];
    let mut all: BTreeMap<String, String> =
        paths.into_iter().map(|(name, path)| (name.to_owned(), path.display().to_string())).collect();
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    for (name, value) in [
        ("ENROOT_MAX_CONNECTIONS", CONNECTIONS.to_string()),
        ("ENROOT_MAX_PROCESSORS", processors.to_string()),
        ("ENROOT_SQUASH_OPTIONS", DEFAULT_OPTIONS.to_owned()),
    ] {
        all.insert(name.to_owned(), value);
    }
    let given = settings.environment().iter().map(|(name, value)| (text(name), text(value)));
    all.extend(given.filter(|(name, value)| name.starts_with("ENROOT_") && !value.is_empty()));
    all
}
