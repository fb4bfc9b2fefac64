//! The configuration file, `/etc/pyxis/pyxis.toml`: one commented TOML file, every key of which has a default
//! (`packaging/pyxis.toml` shows them all).

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::broker::import::ImportSettings;
use crate::devices::settings::DeviceSettings;
use crate::importer::protocol::ImportLimits;
use crate::policy::Policy;
use crate::registry::config::NetworkConfig;
pub use crate::registry::config::{RegistryConfig, RegistryEntry};
use crate::registry::containers::Registries;
use crate::registry::names::ShortNames;
use crate::registry::proxy::ProxyConfig;
use crate::request::PullPolicy;
use crate::rootfs::kernel::Feature;
use crate::store::Watermarks;

/// Where the file is unless the plugin's `config=` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/pyxis/pyxis.toml";

/// The whole configuration.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// The layer store.
    pub store: StoreSettings,
    /// What an import may use.
    pub import: ImportConfig,
    /// What users are told while an image is imported.
    pub progress: ProgressSettings,
    /// What lives until the next boot.
    pub runtime: RuntimeSettings,
    /// Defaults of containers.
    pub container: ContainerSettings,
    /// Squashfs files as images.
    pub squashfs: SquashfsSettings,
    /// Where enroot's own files are.
    pub enroot: EnrootSettings,
    /// The site's and the users' hooks.
    pub hooks: HookSettings,
    /// What of the node's hardware appears in containers.
    pub devices: DeviceSettings,
    /// What is logged.
    pub log: LogSettings,
    /// Registries by how image names begin.
    pub registry: BTreeMap<String, RegistryEntry>,
    /// What image names without a registry mean.
    pub short_names: ShortNames,
    /// More about both, in podman's form.
    pub registries: RegistriesConf,
    /// Bounds on waiting for registries.
    pub network: NetworkConfig,
    /// Proxies on the way to registries.
    pub proxy: ProxyConfig,
    /// Which images may be used, and by whom.
    pub policy: Policy,
    /// For tests of Pyxis itself.
    pub debug: DebugSettings,
}

/// `[debug]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DebugSettings {
    /// `without`: what the kernel may have and is not used.
    pub without: Vec<Feature>,
}

/// `[registries]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RegistriesConf {
    /// `conf`: a file in podman's form, `/etc/containers/registries.conf`, to be read with the files of `CONF.d`. What is
    /// said here goes first.
    pub conf: Option<PathBuf>,
    /// `certs`: directories that have one for each registry, `HOST[:PORT]`, with certificates: `*.crt` of authorities, and
    /// `NAME.cert` with `NAME.key` to show who asks. For each registry the first that has one counts.
    pub certs: Vec<PathBuf>,
}

impl Default for RegistriesConf {
    fn default() -> Self {
        Self { conf: None, certs: ["/etc/containers/certs.d", "/etc/docker/certs.d"].map(PathBuf::from).to_vec() }
    }
}

/// `[store]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StoreSettings {
    /// `path`: the directory, root's, on a file system with O_TMPFILE and, for best results, direct I/O (ext4, xfs).
    pub path: PathBuf,
    /// `watermarks`: when `pyxis gc` and imports collect unused layers.
    pub watermarks: Watermarks,
    /// `confirmation_seconds`: how long a user may go on using an image before the registry is asked again.
    pub confirmation_seconds: u32,
    /// `pull`: as `--container-pull`.
    pub pull: PullPolicy,
}

impl Default for StoreSettings {
    fn default() -> Self {
        Self {
            path: "/var/lib/pyxis".into(),
            watermarks: Watermarks::default(),
            confirmation_seconds: 300,
            pull: PullPolicy::Recent,
        }
    }
}

/// `[import]`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ImportConfig {
    /// `user`: name or number of the unprivileged account that imports run under.
    pub user: String,
    /// `max_connections`: layers downloaded at the same time.
    pub max_connections: usize,
    /// `max_layer_bytes`: bound of one uncompressed layer.
    pub max_layer_bytes: u64,
    /// `max_layer_entries`: bound of the files, directories and links of one layer.
    pub max_layer_entries: u64,
    /// `space_factor`: free space an import needs, as a multiple of the compressed size.
    pub space_factor: f64,
    /// `environment`: the importer's variables: `https_proxy`, `no_proxy`, `SSL_CERT_FILE`.
    pub environment: BTreeMap<String, String>,
}

impl Default for ImportConfig {
    fn default() -> Self {
        let defaults = ImportSettings::default();
        Self {
            user: defaults.importer_user,
            max_connections: defaults.limits.max_connections,
            max_layer_bytes: defaults.limits.max_layer_bytes,
            max_layer_entries: defaults.limits.max_layer_entries,
            space_factor: defaults.space_factor,
            environment: BTreeMap::new(),
        }
    }
}

/// `[progress]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ProgressSettings {
    /// `after_seconds`: when the first line about an import appears in a job's output.
    pub after_seconds: u32,
    /// `interval_seconds`: how often another one does; 0: nothing is shown, on a terminal neither.
    pub interval_seconds: u32,
}

impl Default for ProgressSettings {
    fn default() -> Self {
        Self { after_seconds: 10, interval_seconds: 30 }
    }
}

/// `[runtime]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RuntimeSettings {
    /// `path`: a directory of root's on a local file system that is empty after a boot.
    pub path: PathBuf,
}

impl Default for RuntimeSettings {
    fn default() -> Self {
        Self { path: "/run/pyxis".into() }
    }
}

/// `[container]`: what holds where the user's options say nothing.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ContainerSettings {
    /// `path`: where named containers are kept: a directory of root's on a local file system that can hold overlayfs's
    /// upper layers (ext4, xfs).
    pub path: PathBuf,
    /// `writable`: as `--container-writable`.
    pub writable: bool,
    /// `remap_root`: as `--container-remap-root`.
    pub remap_root: bool,
    /// `mount_home`: as `--container-mount-home`.
    pub mount_home: bool,
    /// `restrict_dev`: containers have a `/dev` of their own, without the host's devices, whatever users say.
    pub restrict_dev: bool,
    /// `scratch_size`: limit of what a container may write to its root filesystem, as tmpfs takes it (`size=` of
    /// tmpfs(5): bytes with a suffix, or percent of the memory). Half of the memory if it is missing.
    pub scratch_size: Option<String>,
    /// `entrypoint_timeout_seconds`: how long an image's entrypoint may take to execute its arguments.
    pub entrypoint_timeout_seconds: u32,
}

impl Default for ContainerSettings {
    fn default() -> Self {
        Self {
            path: "/var/lib/pyxis/containers".into(),
            writable: false,
            remap_root: false,
            mount_home: false,
            restrict_dev: false,
            scratch_size: None,
            entrypoint_timeout_seconds: 300,
        }
    }
}

/// `[squashfs]`: how containers run from squashfs files, named by their path.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SquashfsSettings {
    /// `mode`.
    pub mode: SquashfsMode,
}

/// How containers run from squashfs files. Those that are kept or saved are always converted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SquashfsMode {
    /// By FUSE if the user may use it on this node, else converted.
    #[default]
    Auto,
    /// By a FUSE server that runs as the user.
    Fuse,
    /// By the kernel's squashfs, which then reads what users wrote.
    Kernel,
    /// As a layer of the store that is made of the file, once for each user.
    Convert,
}

/// `[enroot]`: the files of an enroot installation, which go on working.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EnrootSettings {
    /// `sysconf_path`: the directory of `enroot.conf`, `environ.d`, `mounts.d` and `hooks.d`.
    pub sysconf_path: PathBuf,
}

impl Default for EnrootSettings {
    fn default() -> Self {
        Self { sysconf_path: crate::enroot::conf::DEFAULT_SYSCONF_PATH.into() }
    }
}

/// `[hooks]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HookSettings {
    /// `timeout_seconds`: how long each hook may take.
    pub timeout_seconds: u32,
    /// `slurm_pytorch`: what enroot's extra hook `50-slurm-pytorch.sh` does, also where that file is not in `hooks.d`.
    pub slurm_pytorch: bool,
    /// `oci_directories`: directories of OCI hooks (oci-hooks(5)), of which the last one counts most.
    pub oci_directories: Vec<PathBuf>,
}

impl Default for HookSettings {
    fn default() -> Self {
        Self { timeout_seconds: 60, slurm_pytorch: false, oci_directories: Vec::new() }
    }
}

/// `[log]`: what a container start says in the node's log (slurmd's; `pyxis run --verbose` prints it).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LogSettings {
    /// `level`: `error`, `warn`, `info`, or `debug` with the times of a start's steps.
    pub level: LogLevel,
    /// `destination`: `slurmd` or `journald`.
    pub destination: LogDestination,
    /// `format`, of lines in slurmd's log: `text` or `json`.
    pub format: LogFormat,
}

/// Where it is said.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogDestination {
    /// In slurmd's log, by the leading task.
    #[default]
    Slurmd,
    /// In systemd's journal; where there is none, in slurmd's log.
    Journald,
}

/// How it is said in slurmd's log.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// As lines for people.
    #[default]
    Text,
    /// As one JSON object a line.
    Json,
}

/// A level of [`LogSettings`].
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogLevel {
    /// What failed.
    Error,
    /// And what is not as it should be.
    Warn,
    /// And what was done.
    #[default]
    Info,
    /// And how long each step took.
    Debug,
}

impl From<LogLevel> for tracing::Level {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::ERROR,
            LogLevel::Warn => Self::WARN,
            LogLevel::Info => Self::INFO,
            LogLevel::Debug => Self::DEBUG,
        }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}: {}", .path.display(), crate::sys::reason(.source))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{}:{line}:{column}: {message}", .path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1.
        column: usize,
        /// What is wrong.
        message: String,
    },
    /// A value that has the right type and no meaning.
    #[error("{}: {message}", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
}

impl Config {
    /// Reads `path`; a file that does not exist leaves every default.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::parse(&text, path)?.with_registries_conf(),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(source) => Err(ConfigError::Read { path: path.to_owned(), source }),
        }
    }

    /// Parses `text`, the content of `path`.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let config: Self = toml::from_str(text).map_err(|error| {
            let before = &text[..error.span().map_or(0, |span| span.start.min(text.len()))];
            ConfigError::Invalid {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                column: before.chars().rev().take_while(|&character| character != '\n').count() + 1,
                message: error.message().replace('\n', " "),
            }
        })?;
        let invalid = |message| ConfigError::Value { path: path.to_owned(), message };
        config.registries().check().map_err(|error| invalid(error.to_string()))?;
        config.policy.check().map_err(invalid)?;
        let directories = [
            ("store.path", &config.store.path),
            ("runtime.path", &config.runtime.path),
            ("enroot.sysconf_path", &config.enroot.sysconf_path),
        ];
        let of_hooks = config.hooks.oci_directories.iter().map(|directory| ("hooks.oci_directories", directory));
        let of_cdi = config.devices.cdi_directories.iter().map(|directory| ("devices.cdi_directories", directory));
        for (name, directory) in directories.into_iter().chain(of_hooks).chain(of_cdi) {
            if !directory.is_absolute() {
                return Err(invalid(format!("{name}: must be an absolute path: {}", directory.display())));
            }
        }
        crate::devices::gres::check(&config.devices.gres).map_err(invalid)?;
        if config.container.entrypoint_timeout_seconds == 0 {
            return Err(invalid("container.entrypoint_timeout_seconds: must be at least 1".into()));
        }
        if config.import.max_connections == 0 {
            return Err(invalid("import.max_connections: must be at least 1".into()));
        }
        if !(config.import.space_factor >= 0.0 && config.import.space_factor.is_finite()) {
            return Err(invalid("import.space_factor: must be a number from 0".into()));
        }
        Ok(config)
    }

    /// The same with what the site's `registries.conf` says.
    fn with_registries_conf(mut self) -> Result<Self, ConfigError> {
        let Some(conf) = &self.registries.conf else { return Ok(self) };
        let mut found = Registries::default();
        for path in [conf.clone()].into_iter().chain(drop_ins(conf)) {
            let text =
                std::fs::read_to_string(&path).map_err(|source| ConfigError::Read { path: path.clone(), source })?;
            found.add(&text).map_err(|message| ConfigError::Value { path, message })?;
        }
        let path = conf.clone();
        for (name, entry) in found.registry {
            self.registry.entry(name).or_insert(entry);
        }
        if self.short_names.search.is_empty() {
            self.short_names.search = found.short_names.search;
        }
        for (name, target) in found.short_names.aliases {
            self.short_names.aliases.entry(name).or_insert(target);
        }
        let checked = self.registries().check();
        checked.map_err(|error| ConfigError::Value { path, message: error.to_string() }).map(|()| self)
    }

    /// How registries are reached.
    pub fn registries(&self) -> RegistryConfig {
        RegistryConfig {
            registry: self.registry.clone(),
            network: self.network,
            proxy: self.proxy.clone(),
            certs: self.registries.certs.clone(),
            short_names: self.short_names.clone(),
            ..RegistryConfig::default()
        }
    }

    /// What an import has to know.
    pub fn import_settings(&self) -> ImportSettings {
        let environment = self.import.environment.iter();
        ImportSettings {
            registries: self.registries(),
            limits: ImportLimits {
                max_layer_bytes: self.import.max_layer_bytes,
                max_layer_entries: self.import.max_layer_entries,
                max_connections: self.import.max_connections,
            },
            confirmation: Duration::from_secs(self.store.confirmation_seconds.into()),
            pull: self.store.pull,
            space_factor: self.import.space_factor,
            watermarks: self.store.watermarks,
            importer_user: self.import.user.clone(),
            importer_environment: environment.map(|(name, value)| (name.clone(), value.clone())).collect(),
            policy: self.policy.clone(),
            ..ImportSettings::default()
        }
    }
}

/// The files of `CONF.d`, in order.
fn drop_ins(conf: &Path) -> Vec<PathBuf> {
    let mut directory = conf.as_os_str().to_owned();
    directory.push(".d");
    // Most sites have none.
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "conf"));
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::parse(text, Path::new("/etc/x.toml")).map_err(|error| error.to_string())
    }

    #[test]
    fn errors_name_the_line() {
        let error = |text| parse(text).unwrap_err();
        let relative = error("[hooks]\noci_directories = [\"x\"]\n");
        assert_eq!(relative, "/etc/x.toml: hooks.oci_directories: must be an absolute path: x");
        let unknown = error("[container]\nwriteable = true\n");
        assert!(unknown.starts_with("/etc/x.toml:2:1: unknown field `writeable`"), "{unknown}");
        let wrong = error("[container]\nwritable = 1\n");
        assert!(wrong.starts_with("/etc/x.toml:2:12: invalid type"), "{wrong}");
        assert!(error("[container\n").starts_with("/etc/x.toml:1:"));
        assert!(!error("a = '''\nx").contains('\n'));
        assert_eq!(error("[store]\npath = \"x\"\n"), "/etc/x.toml: store.path: must be an absolute path: x");
        assert!(error("[import]\nmax_connections = 0\n").contains("max_connections"));
        assert!(
            error("[devices.gres]\ngpu = \"x\"\n").starts_with("/etc/x.toml: devices.gres.gpu: \"x\" is no device")
        );
    }

    #[test]
    fn a_registries_conf_is_read_where_the_site_says_so() {
        let directory = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, text).unwrap();
            path
        };
        let table = |name: &str, more: &str| format!("[[registry]]\nprefix = \"{name}\"\n{more}\n");
        let conf = write("r.conf", &(table("a.io", "blocked = true") + &table("b.io", "blocked = true")));
        write("r.conf.d/01.conf", "unqualified-search-registries = [\"quay.io\"]\n[aliases]\nx = \"y.io/x\"\n");
        write("r.conf.d/02.conf", &table("b.io", "insecure = true"));
        write("r.conf.d/README", "no TOML");
        let text = format!("[registries]\nconf = \"{}\"\n[registry.\"a.io\"]\ninsecure = true\n", conf.display());
        let own = write("pyxis.toml", &text);
        let registries = Config::load(&own).unwrap().registries();
        assert!(!registries.registry["a.io"].blocked && !registries.registry["b.io"].blocked);
        assert_eq!(registries.short_names.search, ["quay.io"]);
        assert_eq!(registries.short_names.aliases["x"], "y.io/x");
        write("r.conf.d/03.conf", "x");
        let error = Config::load(&own).unwrap_err().to_string();
        assert!(error.contains("r.conf.d/03.conf: line 1: "), "{error}");
    }

    #[test]
    fn the_shipped_file_is_valid_and_states_the_defaults() {
        let text = include_str!("../packaging/pyxis.toml");
        assert_eq!(parse(text).unwrap(), Config::default());
        // Every commented key is one that exists.
        let enabled: String = text
            .lines()
            .map(|line| match line.strip_prefix('#') {
                Some(key) if key.contains(" = ") && !key.starts_with(' ') || key.starts_with('[') => key,
                _ => line,
            })
            .fold(String::new(), |all, line| all + line + "\n");
        let enabled = parse(&enabled).unwrap();
        assert_eq!(enabled.store, StoreSettings::default());
        assert_eq!(enabled.network, NetworkConfig::default());
        assert_eq!(enabled.enroot, EnrootSettings::default());
        assert_eq!(enabled.hooks, HookSettings::default());
        assert!(enabled.devices.gres.contains_key("gpu"));
        let devices = DeviceSettings { gres: BTreeMap::new(), ..enabled.devices };
        assert_eq!(devices, DeviceSettings::default());
        assert_eq!(enabled.progress, ProgressSettings::default());
        assert!(enabled.registry.contains_key("docker.io"));
        assert_eq!(enabled.short_names.search, ["docker.io"]);
    }
}
