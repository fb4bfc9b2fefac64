//! `enroot.conf` and `enroot.conf.d/*.conf`: the administrator's settings, evaluated as the user (behaviour reference,
//! sections 7.1 and 10).
//!
//! The rules are enroot's: a variable of the process beats the files, and of the files the *first* definition wins. A
//! value goes through the shell's expansions. The common ones are done here; a value that takes more is given to a real
//! shell, which runs as the user, for a few seconds at most, and only if nobody but root and the user can have written
//! the file. Unlike enroot this says, in [`EnrootConf::warnings`], what it ignored and what looks like a mistake.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::lines::{self, Line};
use super::shell::{self, Lookup, Value};
use crate::request::Environment;
use crate::sys;
use crate::sys::command::{Stream, capture};

/// Where the administrator's files are unless the configuration says otherwise.
pub const DEFAULT_SYSCONF_PATH: &str = "/etc/enroot";
/// Most bytes of one configuration file.
const MAX_FILE: u64 = 1 << 20;
/// Most drop-ins.
const MAX_FILES: usize = 1000;
/// How long a shell may take for one value.
const SHELL_TIME: Duration = Duration::from_secs(5);
/// Most bytes a shell may make of a value.
const MAX_VALUE: usize = 64 << 10;

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

/// The words that mean no.
const NO: [&str; 11] = ["n", "no", "N", "No", "nO", "NO", "f", "F", "false", "False", "FALSE"];

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
        let mut paths = vec![sysconf.join("enroot.conf")];
        paths.extend(super::files_in(&sysconf.join("enroot.conf.d"), "conf", MAX_FILES).map_err(read_error)?);
        let mut files = Vec::new();
        for path in paths {
            if let Some((text, trusted)) = read(&path, identity.uid)? {
                files.push((path, text, trusted));
            }
        }
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
        let mut reader = Reader { conf: Self::default(), identity };
        reader.conf.environment = environment.clone();
        reader.conf.home = environment.get_str("HOME").unwrap_or(&identity.home).to_owned();
        for (path, text, trusted) in files {
            reader.file(path, text, *trusted)?;
        }
        Ok(reader.finish())
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

fn read_error((path, cause): (PathBuf, io::Error)) -> EnrootConfError {
    EnrootConfError::Read { path, cause }
}

/// The text of a file, and whether nobody but root and the user can have written it. `None` if it does not exist.
fn read(path: &Path, uid: u32) -> Result<Option<(String, bool)>, EnrootConfError> {
    let content = super::read_file(path, MAX_FILE).map_err(|cause| read_error((path.to_owned(), cause)))?;
    Ok(content.map(|(bytes, metadata)| {
        let trusted = [0, uid].contains(&metadata.uid()) && metadata.mode() & 0o022 == 0;
        (String::from_utf8_lossy(&bytes).into_owned(), trusted)
    }))
}

struct Reader<'a> {
    conf: EnrootConf,
    identity: &'a Identity,
}

impl Reader<'_> {
    fn file(&mut self, path: &Path, text: &str, trusted: bool) -> Result<(), EnrootConfError> {
        for (index, line) in text.lines().enumerate() {
            let place = || format!("{}:{}", path.display(), index + 1);
            let (key, value) = match lines::parse(line) {
                Line::Nothing => continue,
                Line::Unknown(key) => {
                    self.conf.warnings.push(format!("{}: {key}: not a setting: ignored", place()));
                    continue;
                }
                Line::Setting(key, value) => (key, value),
            };
            // Evaluated also if it does not count: a mistake is one wherever it is.
            let invalid = |reason| EnrootConfError::Line { path: path.to_owned(), line: index + 1, reason };
            let value = self.evaluate(value, trusted).map_err(invalid)?;
            if value.is_empty() || self.conf.environment.get(key).is_some_and(|given| !given.is_empty()) {
                if self.conf.defined.contains_key(key) {
                    self.conf.warnings.push(format!("{}: {key} is set already: the first definition counts", place()));
                }
                continue;
            }
            if is_switch(key) && ["0", "off", "Off", "OFF", "disabled"].contains(&value.as_str()) {
                self.conf.warnings.push(format!("{}: {key}: \"{value}\" means yes: for no write \"no\"", place()));
            }
            self.conf.environment.set(key, value.as_str());
            self.conf.defined.insert(key.to_owned(), value);
        }
        Ok(())
    }

    fn evaluate(&self, text: &str, trusted: bool) -> Result<String, String> {
        let variable = |name: &str| self.variable(name);
        let command = |words: &[&str]| self.command(words);
        let value = match shell::evaluate(text, &Lookup { variable: &variable, command: &command }) {
            Err(error) => return Err(error.to_string()),
            Ok(Value::Text(value)) => value,
            Ok(Value::NeedsShell) if !trusted => {
                return Err("needs a shell, which is only for files that nobody else can write to".to_owned());
            }
            Ok(Value::NeedsShell) => self.ask_shell(text)?,
        };
        if value.contains('\0') {
            return Err("NUL byte".to_owned());
        }
        Ok(value)
    }

    fn variable(&self, name: &str) -> Option<String> {
        let given = || {
            let value = self.conf.environment.get(name)?;
            Some(String::from_utf8_lossy(value).into_owned())
        };
        match name {
            "UID" | "EUID" => Some(self.identity.uid.to_string()),
            "PWD" => Some(self.identity.cwd.to_string_lossy().into_owned()),
            "HOME" => Some(self.conf.home.clone()),
            "USER" | "LOGNAME" => given().or_else(|| Some(self.identity.name.clone())),
            "HOSTNAME" => given().or_else(|| Some(host_name())),
            // Of the shell's own making.
            "GROUPS" | "RANDOM" | "SECONDS" | "PPID" | "IFS" | "HOSTTYPE" | "MACHTYPE" | "OSTYPE" => None,
            _ => given(),
        }
    }

    fn command(&self, words: &[&str]) -> Option<String> {
        Some(match words {
            ["id", "-u"] | ["id", "--user"] => self.identity.uid.to_string(),
            ["id", "-g"] | ["id", "--group"] => self.identity.gid.to_string(),
            ["id", "-un"] | ["id", "-nu"] | ["id", "-u", "-n"] | ["whoami"] | ["logname"] => self.identity.name.clone(),
            ["id", "-gn"] | ["id", "-ng"] | ["id", "-g", "-n"] => self.identity.group.clone(),
            ["nproc"] => std::thread::available_parallelism().map_or(1, usize::from).to_string(),
            ["hostname"] | ["uname", "-n"] => host_name(),
            ["hostname", "-s"] => host_name().split('.').next().unwrap_or_default().to_owned(),
            ["uname", "-m"] | ["arch"] => std::env::consts::ARCH.to_owned(),
            _ => return None,
        })
    }

    fn ask_shell(&self, text: &str) -> Result<String, String> {
        let shell = ["/bin/bash", "/bin/sh"].into_iter().find(|shell| Path::new(shell).exists()).ok_or("no shell")?;
        let environment = self.conf.environment.iter().filter(|(name, _)| *name != b"BASH_ENV" && *name != b"ENV");
        let mut command = Command::new(shell);
        command
            .args(["-c", "eval \"set -- $1\" && printf %s \"$*\"", "enroot.conf", text])
            .env_clear()
            .env("PATH", super::HOST_PATH)
            .envs(environment.map(|(name, value)| (super::os(name), super::os(value))))
            .env("HOME", &self.conf.home)
            .current_dir(if self.identity.cwd.is_dir() { &self.identity.cwd } else { Path::new("/") });
        match capture(&mut command, Stream::Output, MAX_VALUE, SHELL_TIME) {
            Err(error) => Err(format!("{shell}: {}", sys::reason(error))),
            Ok(captured) => match captured.status {
                None => Err(format!("its evaluation took more than {} s", SHELL_TIME.as_secs())),
                Some(status) if !status.success() => Err(format!("its evaluation failed: {status}")),
                Some(_) => {
                    let text = String::from_utf8_lossy(&captured.text);
                    Ok(text.trim_end_matches('\n').to_owned())
                }
            },
        }
    }

    fn finish(mut self) -> EnrootConf {
        let says_no = |(name, value): (&[u8], &[u8])| {
            let name = std::str::from_utf8(name).ok()?;
            let no = NO.iter().any(|word| word.as_bytes() == value);
            (name.starts_with("ENROOT_") && no).then(|| name.to_owned())
        };
        self.conf.off = self.conf.environment.iter().filter_map(says_no).collect();
        for name in &self.conf.off {
            self.conf.environment.remove(name);
        }
        self.conf
    }
}

fn is_switch(key: &str) -> bool {
    [
        "ENROOT_LOGIN_SHELL",
        "ENROOT_ALLOW_SUPERUSER",
        "ENROOT_ALLOW_HTTP",
        "ENROOT_ROOTFS_WRITABLE",
        "ENROOT_REMAP_ROOT",
        "ENROOT_NATIVE_OVERLAYFS",
        "ENROOT_MOUNT_HOME",
        "ENROOT_RESTRICT_DEV",
        "ENROOT_FORCE_OVERRIDE",
        "ENROOT_UNSHARE_NET",
        "ENROOT_UNSHARE_PID",
        "ENROOT_UNSHARE_IPC",
        "ENROOT_UNSHARE_UTS",
    ]
    .contains(&key)
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    struct Etc(tempfile::TempDir);

    impl Etc {
        fn new(files: &[(&str, &str)]) -> Self {
            let directory = tempfile::tempdir().unwrap();
            fs::create_dir(directory.path().join("enroot.conf.d")).unwrap();
            for (name, text) in files {
                let path = directory.path().join(name);
                fs::write(&path, text).unwrap();
                fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
            }
            Self(directory)
        }

        fn load(&self, environment: &[&str]) -> Result<EnrootConf, String> {
            let identity = Identity {
                uid: rustix::process::geteuid().as_raw(),
                gid: 1001,
                name: "ada".into(),
                group: "users".into(),
                home: "/home/ada".into(),
                cwd: self.0.path().to_owned(),
            };
            EnrootConf::load(self.0.path(), &environment.iter().collect(), &identity).map_err(|error| error.to_string())
        }
    }

    /// `KEY VALUE` lines for one key, and the value it gets.
    fn value(text: &str) -> Option<String> {
        let conf = Etc::new(&[("enroot.conf", &format!("ENROOT_A {text}\n"))]).load(&["HOME=/h"]).unwrap();
        conf.get("ENROOT_A").map(str::to_owned)
    }

    #[test]
    fn reference_vectors() {
        let uid = rustix::process::geteuid().as_raw();
        for (text, expected) in [
            ("/a/$(id -u)", format!("/a/{uid}")),
            ("${HOME}/x", "/h/x".into()),
            ("\"a  b\"", "a  b".into()),
            ("-comp lzo   -noD", "-comp lzo -noD".into()),
            ("x # note", "x".into()),
            ("abc=", "abc".into()),
            ("a==", "a==".into()),
            ("a=b=c", "a=b=c".into()),
            ("= r s", "r s".into()),
            ("*", "enroot.conf enroot.conf.d".into()),
            ("0", "0".into()),
            ("off", "off".into()),
            ("fALSE", "fALSE".into()),
            ("$(echo one; echo two)", "one two".into()),
            ("$(id -un)-$(whoami)-$(id -gn)-${USER}", "ada-ada-users-ada".into()),
            ("~/x", "/h/x".into()),
        ] {
            assert_eq!(value(text), Some(expected), "{text}");
        }
        for text in ["no", "N", "false", "False", "F", "\"\"", ""] {
            assert_eq!(value(text), None, "{text}");
        }
        assert_eq!(Etc::new(&[("enroot.conf", "ENROOT_X2 y")]).load(&[]).unwrap().get("ENROOT_X2"), None);
    }

    #[test]
    fn the_first_definition_wins_and_the_process_before_it() {
        let etc = Etc::new(&[
            ("enroot.conf", "ENROOT_A main\nENROOT_A again\nENROOT_B main\nENROOT_D main\n"),
            ("enroot.conf.d/10.conf", "ENROOT_A ten\nENROOT_C ten\n"),
            ("enroot.conf.d/20.conf", "ENROOT_C twenty\nENROOT_E ${ENROOT_C}/x\n"),
            ("enroot.conf.d/README", "ENROOT_F x\n"),
        ]);
        let conf = etc.load(&["ENROOT_B=process", "ENROOT_D="]).unwrap();
        let all = ["A", "B", "C", "D", "E", "F"].map(|key| conf.get(&format!("ENROOT_{key}")).unwrap_or("-"));
        assert_eq!(all, ["main", "process", "ten", "main", "ten/x", "-"]);
        assert_eq!(conf.warnings.len(), 3, "{:?}", conf.warnings);
    }

    #[test]
    fn switches() {
        let etc = Etc::new(&[(
            "enroot.conf",
            "ENROOT_REMAP_ROOT yes\nENROOT_MOUNT_HOME no\nENROOT_LOGIN_SHELL n\nENROOT_RESTRICT_DEV 0\n",
        )]);
        let conf = etc.load(&["ENROOT_UNSHARE_NET=FALSE", "ENROOT_UNSHARE_IPC=FALSE ", "NVIDIA_X=no"]).unwrap();
        assert_eq!((conf.remap_root(), conf.mount_home(), conf.rootfs_writable()), (Some(true), Some(false), None));
        assert!(!conf.login_shell() && conf.restrict_dev() && !conf.unshare("net") && conf.unshare("ipc"));
        assert_eq!(conf.environment().get("ENROOT_MOUNT_HOME"), None);
        assert_eq!(conf.get("NVIDIA_X"), Some("no"));
        assert!(
            conf.warnings[0].contains("enroot.conf:4: ENROOT_RESTRICT_DEV: \"0\" means yes"),
            "{:?}",
            conf.warnings
        );
        assert!(Etc::new(&[]).load(&[]).unwrap().login_shell());
    }

    #[test]
    fn paths_and_their_defaults() {
        let conf =
            Etc::new(&[("enroot.conf", "ENROOT_DATA_PATH /tmp/data-${UID}")]).load(&["XDG_CACHE_HOME=/c"]).unwrap();
        let uid = rustix::process::geteuid().as_raw();
        assert_eq!(conf.data_path(), Path::new(&format!("/tmp/data-{uid}")));
        assert_eq!(conf.cache_path(), Path::new("/c/enroot"));
        assert_eq!(conf.config_path(), Path::new("/home/ada/.config/enroot"));
        assert_eq!(conf.runtime_path(), Path::new("/run/enroot"));
        assert_eq!(conf.temp_path(), Path::new("/tmp"));
        assert_eq!(conf.squash_options(), None);
        assert_eq!(Etc::new(&[]).load(&["HOME=/x"]).unwrap().data_path(), Path::new("/x/.local/share/enroot"));
    }

    #[test]
    fn a_job_cannot_change_what_is_the_administrators() {
        let job: Environment =
            ["PATH=/x", "ENROOT_DATA_PATH=/x", "ENROOT_ALLOW_HTTP=y", "ENROOT_CONFIG_PATH=/mine", "A=b", "PMI_RANK=0"]
                .iter()
                .collect();
        let allowed: Vec<_> = of_job(&job).iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
        assert_eq!(allowed, ["ENROOT_CONFIG_PATH", "A", "PMI_RANK"]);
    }

    #[test]
    fn mistakes_name_their_line() {
        let etc = Etc::new(&[("enroot.conf", "# first\nENROOT_A 'open\n")]);
        let error = etc.load(&[]).unwrap_err();
        assert!(
            error.starts_with("Invalid configuration file: ") && error.ends_with("enroot.conf (line 2: missing ')"),
            "{error}"
        );
        assert!(Etc::new(&[("enroot.conf", "ENROOT_A $(false)x;false")]).load(&[]).unwrap_err().contains("failed"));
        let unknown = Etc::new(&[("enroot.conf", "export ENROOT_A=b\nENROOT_A2 x")]).load(&[]).unwrap();
        assert_eq!(unknown.warnings.len(), 2);
    }

    #[test]
    fn a_shell_runs_only_what_nobody_else_can_write() {
        let etc = Etc::new(&[("enroot.conf", "ENROOT_A $(echo x)\n")]);
        assert_eq!(etc.load(&[]).unwrap().get("ENROOT_A"), Some("x"));
        fs::set_permissions(etc.0.path().join("enroot.conf"), fs::Permissions::from_mode(0o666)).unwrap();
        assert!(etc.load(&[]).unwrap_err().contains("needs a shell"));
    }
}
