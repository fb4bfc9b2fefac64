//! Reading the files, and evaluating them line by line.

#![forbid(unsafe_code)]

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::lines::{self, Line};
use super::shell::{self, Lookup, Value};
use super::{EnrootConf, EnrootConfError, Identity};
use crate::enroot::{HOST_PATH, files_in, os, read_file};
use crate::sys;
use crate::sys::command::{Stream, capture};

/// Most bytes of one configuration file.
const MAX_FILE: u64 = 1 << 20;
/// Most drop-ins.
const MAX_FILES: usize = 1000;
/// How long a shell may take for one value.
const SHELL_TIME: Duration = Duration::from_secs(5);
/// Most bytes a shell may make of a value.
const MAX_VALUE: usize = 64 << 10;

/// The words that mean no.
const NO: [&str; 11] = ["n", "no", "N", "No", "nO", "NO", "f", "F", "false", "False", "FALSE"];

/// The files below `sysconf`: path, text, and whether nobody but root and the user can have written it.
pub(super) fn read_all(sysconf: &Path, uid: u32) -> Result<Vec<(PathBuf, String, bool)>, EnrootConfError> {
    let mut paths = vec![sysconf.join("enroot.conf")];
    paths.extend(files_in(&sysconf.join("enroot.conf.d"), "conf", MAX_FILES).map_err(read_error)?);
    let mut files = Vec::new();
    for path in paths {
        let content = read_file(&path, MAX_FILE).map_err(|cause| read_error((path.clone(), cause)))?;
        if let Some((bytes, metadata)) = content {
            let trusted = [0, uid].contains(&metadata.uid()) && metadata.mode() & 0o022 == 0;
            files.push((path, String::from_utf8_lossy(&bytes).into_owned(), trusted));
        }
    }
    Ok(files)
}

fn read_error((path, cause): (PathBuf, io::Error)) -> EnrootConfError {
    EnrootConfError::Read { path, cause }
}

/// A configuration as it grows.
pub(super) struct Reader<'a> {
    conf: EnrootConf,
    identity: &'a Identity,
}

impl<'a> Reader<'a> {
    pub(super) fn new(conf: EnrootConf, identity: &'a Identity) -> Self {
        Self { conf, identity }
    }

    pub(super) fn read(mut self, files: &[(PathBuf, String, bool)]) -> Result<EnrootConf, EnrootConfError> {
        for (path, text, trusted) in files {
            self.file(path, text, *trusted)?;
        }
        Ok(self.finish())
    }

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
            .env("PATH", HOST_PATH)
            .envs(environment.map(|(name, value)| (os(name), os(value))))
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
