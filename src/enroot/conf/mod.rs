//! `enroot.conf` and `enroot.conf.d/*.conf`: the administrator's settings, evaluated as the user (behaviour reference,
//! sections 7.1 and 10).
//!
//! The rules are enroot's: a variable of the process beats the files, and of the files the *first* definition wins. A
//! value goes through the shell's expansions. The common ones are done here; a value that takes more is given to a real
//! shell, which runs as the user, for a few seconds at most, and only if nobody but root and the user can have written
//! the file. Unlike enroot this says, in [`EnrootConf::warnings`], what it ignored and what looks like a mistake.

#![forbid(unsafe_code)]

mod lines;
mod reader;
mod shell;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};

use crate::request::Environment;
use crate::sys;
use reader::Reader;

/// Where the administrator's files are unless the configuration says otherwise.
pub const DEFAULT_SYSCONF_PATH: &str = "/etc/enroot";
/// What a job's environment must not change: paths that the administrator has chosen, the limits of downloads, and what
/// belongs to one task only (behaviour reference, section 7.1).
const DENIED: [&str; 19] = [
    "PATH",
    "LD_LIBRARY_PATH",
    "LD_PRELOAD",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_TASK_PID",
    "PMIX_RANK",
    "PMI_FD",
    "ENROOT_LIBRARY_PATH",
    "ENROOT_SYSCONF_PATH",
    "ENROOT_RUNTIME_PATH",
    "ENROOT_CACHE_PATH",
    "ENROOT_DATA_PATH",
    "ENROOT_TEMP_PATH",
    "ENROOT_ZSTD_OPTIONS",
    "ENROOT_TRANSFER_RETRIES",
    "ENROOT_CONNECT_TIMEOUT",
    "ENROOT_MAX_CONNECTIONS",
    "ENROOT_ALLOW_HTTP",
];

/// What of a job's environment the settings, the hooks and the importer of a step may see.
pub fn of_job(environment: &Environment) -> Environment {
    let mut allowed = environment.clone();
    for name in DENIED {
        allowed.remove(name);
    }
    allowed
}

/// For whom a configuration is evaluated: the process has these ids already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Login name.
    pub name: String,
    /// Name of the group.
    pub group: String,
    /// Home directory, where the environment has no `HOME`.
    pub home: String,
    /// Working directory: of the step, or of the command.
    pub cwd: PathBuf,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum EnrootConfError {
    /// A file or directory cannot be read.
    #[error("cannot read {}: {}", .path.display(), sys::reason(.cause))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: io::Error,
    },
    /// A line that no shell would take: enroot's words, and where.
    #[error("Invalid configuration file: {} (line {line}: {reason})", .path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
}

/// The settings in force.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EnrootConf {
    /// The process's environment and, over it, what the files set. Names that say no are not in it.
    environment: Environment,
    /// What the files set.
    defined: BTreeMap<String, String>,
    /// Switches that were set to a word for no.
    off: BTreeSet<String>,
    home: String,
    sysconf: PathBuf,
    /// What is odd about the files, one line each, for the node's log or for `--verbose`.
    pub warnings: Vec<String>,
}

impl EnrootConf {
    /// Reads the files below `sysconf` for a process with `environment` (of a step: what [`of_job`] leaves of the job's).
    /// Files that do not exist set nothing.
    pub fn load(sysconf: &Path, environment: &Environment, identity: &Identity) -> Result<Self, EnrootConfError> {
        let files = reader::read_all(sysconf, identity.uid)?;
        let mut conf = Self::evaluate(&files, environment, identity)?;
        conf.sysconf = sysconf.to_owned();
        Ok(conf)
    }

    /// Evaluates files: path, text, and whether a shell may evaluate what takes one.
    pub fn evaluate(
        files: &[(PathBuf, String, bool)],
        environment: &Environment,
        identity: &Identity,
    ) -> Result<Self, EnrootConfError> {
        let conf = Self {
            environment: environment.clone(),
            home: environment.get_str("HOME").unwrap_or(&identity.home).to_owned(),
            ..Self::default()
        };
        Reader::new(conf, identity).read(files)
    }

    /// A setting, if it is not empty.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.environment.get_str(key)
    }

    /// A switch: `None` if nothing was said. Every word but a few for no means yes, `0` too.
    pub fn switch(&self, key: &str) -> Option<bool> {
        if self.get(key).is_some() { Some(true) } else { self.off.contains(key).then_some(false) }
    }

    /// `ENROOT_ROOTFS_WRITABLE`.
    pub fn rootfs_writable(&self) -> Option<bool> {
        self.switch("ENROOT_ROOTFS_WRITABLE")
    }

    /// `ENROOT_REMAP_ROOT`.
    pub fn remap_root(&self) -> Option<bool> {
        self.switch("ENROOT_REMAP_ROOT")
    }

    /// `ENROOT_MOUNT_HOME`.
    pub fn mount_home(&self) -> Option<bool> {
        self.switch("ENROOT_MOUNT_HOME")
    }

    /// `ENROOT_RESTRICT_DEV`.
    pub fn restrict_dev(&self) -> bool {
        self.switch("ENROOT_RESTRICT_DEV").unwrap_or(false)
    }

    /// `ENROOT_UNSHARE_NET`, `_IPC`, `_UTS`, `_PID`, named in lower case.
    pub fn unshare(&self, namespace: &str) -> bool {
        self.switch(&format!("ENROOT_UNSHARE_{}", namespace.to_ascii_uppercase())).unwrap_or(false)
    }

    /// `ENROOT_LOGIN_SHELL`, on by default.
    pub fn login_shell(&self) -> bool {
        self.switch("ENROOT_LOGIN_SHELL").unwrap_or(true)
    }

    /// `ENROOT_ALLOW_SUPERUSER`.
    pub fn allow_superuser(&self) -> bool {
        self.switch("ENROOT_ALLOW_SUPERUSER").unwrap_or(false)
    }

    /// `ENROOT_ALLOW_HTTP`.
    pub fn allow_http(&self) -> bool {
        self.switch("ENROOT_ALLOW_HTTP").unwrap_or(false)
    }

    /// `ENROOT_FORCE_OVERRIDE`.
    pub fn force_override(&self) -> bool {
        self.switch("ENROOT_FORCE_OVERRIDE").unwrap_or(false)
    }

    /// `ENROOT_SYSCONF_PATH`, where the files were.
    pub fn sysconf_path(&self) -> &Path {
        &self.sysconf
    }

    /// `ENROOT_CONFIG_PATH`: the user's credentials, hooks, mounts and variables.
    pub fn config_path(&self) -> PathBuf {
        self.path("ENROOT_CONFIG_PATH", "XDG_CONFIG_HOME", ".config")
    }

    /// `ENROOT_CACHE_PATH`.
    pub fn cache_path(&self) -> PathBuf {
        self.path("ENROOT_CACHE_PATH", "XDG_CACHE_HOME", ".cache")
    }

    /// `ENROOT_DATA_PATH`: root filesystems by name.
    pub fn data_path(&self) -> PathBuf {
        self.path("ENROOT_DATA_PATH", "XDG_DATA_HOME", ".local/share")
    }

    /// `ENROOT_RUNTIME_PATH`.
    pub fn runtime_path(&self) -> PathBuf {
        self.get("ENROOT_RUNTIME_PATH")
            .map_or_else(|| Path::new(self.get("XDG_RUNTIME_DIR").unwrap_or("/run")).join("enroot"), PathBuf::from)
    }

    /// `ENROOT_TEMP_PATH`.
    pub fn temp_path(&self) -> PathBuf {
        self.get("ENROOT_TEMP_PATH").or_else(|| self.get("TMPDIR")).unwrap_or("/tmp").into()
    }

    /// `ENROOT_SQUASH_OPTIONS`, word by word; `None` if nobody set them.
    pub fn squash_options(&self) -> Option<Vec<&str>> {
        self.get("ENROOT_SQUASH_OPTIONS").map(|text| text.split_ascii_whitespace().collect())
    }

    /// A number: `ENROOT_MAX_PROCESSORS`, `ENROOT_MAX_CONNECTIONS`, `ENROOT_CONNECT_TIMEOUT` (seconds),
    /// `ENROOT_TRANSFER_TIMEOUT` (seconds), `ENROOT_TRANSFER_RETRIES`.
    pub fn number(&self, key: &str) -> Option<u64> {
        self.get(key).and_then(|text| text.trim().parse().ok())
    }

    fn path(&self, key: &str, base: &str, below_home: &str) -> PathBuf {
        let base = || match self.get(base) {
            Some(base) => PathBuf::from(base),
            None => Path::new(&self.home).join(below_home),
        };
        self.get(key).map_or_else(|| base().join("enroot"), PathBuf::from)
    }

    /// What the files set.
    pub fn defined(&self) -> impl Iterator<Item = (&str, &str)> {
        self.defined.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The process's environment, with the settings of the files in it and without switches that are off.
    pub fn environment(&self) -> &Environment {
        &self.environment
    }

    /// A later environment of the same process, with the same settings: what hooks and substitutions see.
    pub fn environment_over(&self, mut environment: Environment) -> Environment {
        for (key, value) in &self.defined {
            if environment.get(key).is_none_or(<[u8]>::is_empty) {
                environment.set(key.as_str(), value.as_str());
            }
        }
        for key in &self.off {
            environment.remove(key);
        }
        environment
    }
}

#[cfg(test)]
mod tests;
