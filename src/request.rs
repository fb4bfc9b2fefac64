//! The request that leaves the plugin: everything a container start needs to know about the step, as plain data.
//!
//! Written by slurmstepd (root) and read by the broker. The job's environment travels beside it, as a block of its own
//! ([`Environment`]): it need not be UTF-8 and may be large.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::cdi::name::QualifiedName;
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::mounts::spec::MountSpec;

/// Raised when a plugin and an executable of different versions would misunderstand each other (package upgrades happen
/// under running steps).
pub const PROTOCOL_VERSION: u32 = 1;

/// One container start.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StepRequest {
    /// [`PROTOCOL_VERSION`] of the sender.
    pub protocol: u32,
    /// Whose container it is.
    pub user: User,
    /// Facts about the Slurm step; `None` under `pyxis run`.
    pub step: Option<StepFacts>,
    /// What to run in. `None` only with a name: that container has to exist.
    pub image: Option<ImageSource>,
    /// `--container-pull`; `None` leaves it to the configuration.
    #[serde(default)]
    pub pull: Option<PullPolicy>,
    /// What `srun` says about the image's tag, for all nodes of the step: a [`TagMeaning`] as text.
    #[serde(default)]
    pub meaning: Option<String>,
    /// `--container-name`.
    pub name: Option<ContainerName>,
    /// Whether named containers end with the job (`container_scope=job` in plugstack.conf).
    pub job_scope: bool,
    /// `--container-save`: absolute, or relative to the job's `PWD`.
    pub save: Option<String>,
    /// Whether the image's entrypoint is run: `--[no-]container-entrypoint`, else what plugstack.conf says.
    pub entrypoint: bool,
    /// `--container-entrypoint-log`: show what the entrypoint prints.
    pub entrypoint_log: bool,
    /// `--container-unshare`.
    pub unshare: Unshare,
    /// `--container-device`.
    pub devices: Vec<QualifiedName>,
    /// `importer=` in plugstack.conf.
    pub importer: Option<SiteImporter>,
    /// Working directory of the step on the host: what relative paths are relative to.
    pub cwd: PathBuf,
    /// `--container-mounts`, in order.
    pub mounts: Vec<MountSpec>,
    /// `--container-env`.
    pub container_env: Vec<ContainerEnv>,
    /// `--container-workdir`.
    pub workdir: Option<String>,
    /// `--[no-]container-mount-home`; `None` leaves it to the configuration.
    pub mount_home: Option<bool>,
    /// `--[no-]container-remap-root`; `None` leaves it to the configuration.
    pub remap_root: Option<bool>,
    /// `--container-writable` / `--container-readonly`; `None` leaves it to the configuration.
    pub writable: Option<bool>,
    /// The batch script in slurmd's spool directory, which has to be visible in the container under the same path.
    pub batch_script: Option<PathBuf>,
}

impl StepRequest {
    /// A container of `user`'s about which nothing is said, in `cwd`.
    pub fn bare(user: User, cwd: PathBuf) -> Self {
        Self {
            protocol: PROTOCOL_VERSION,
            user,
            step: None,
            image: None,
            pull: None,
            meaning: None,
            name: None,
            job_scope: false,
            save: None,
            entrypoint: false,
            entrypoint_log: false,
            unshare: Unshare::default(),
            devices: Vec::new(),
            importer: None,
            cwd,
            mounts: Vec::new(),
            container_env: Vec::new(),
            workdir: None,
            mount_home: None,
            remap_root: None,
            writable: None,
            batch_script: None,
        }
    }
}

/// The job's user. Groups come from Slurm, not from a look-up on the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary group ids.
    pub groups: Vec<u32>,
}

/// What the broker and the importer may need to know about the Slurm step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepFacts {
    /// Job id.
    pub job_id: u32,
    /// Step id; values from 0xfffffff0 are special steps (batch, extern, interactive).
    pub step_id: u32,
    /// Tasks of the step on this node.
    pub local_tasks: u32,
    /// Tasks of the whole step; 0 is what old batch steps report.
    pub total_tasks: u32,
}

/// The site's own program that turns references into squashfs files (behaviour reference, section 4).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SiteImporter {
    /// `importer=` in plugstack.conf.
    pub program: PathBuf,
    /// `runtime_path=`: below it every user has a directory, where the program may put its files.
    pub runtime: PathBuf,
}

/// `--container-image`, classified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageSource {
    /// An image in a registry.
    Registry {
        /// As the user typed it, for messages.
        typed: String,
        /// Parsed.
        reference: ImageReference,
    },
    /// A path that begins with `.` or `/`: a squashfs file, an OCI layout or an image archive of the user's. Which one is
    /// seen where it is opened.
    File(PathBuf),
    /// An image that the text itself says is on this machine: `oci:PATH`, `dockerd://NAME` and their like.
    Local {
        /// As the user typed it, for messages.
        typed: String,
        /// Parsed.
        image: LocalImage,
    },
}

/// An image that is on this machine already, and that only its user may open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalImage {
    /// A file or directory.
    Path {
        /// Relative to the working directory of the step.
        path: PathBuf,
        /// What it has to be; `None` if whatever it is will do.
        form: Option<LocalForm>,
        /// Which of its images: a tag, a name, or `@` and a number from 0.
        name: Option<String>,
    },
    /// An image in a container engine's own storage.
    Engine {
        /// Whose.
        engine: Engine,
        /// Its name there, with a tag or without.
        name: String,
    },
}

/// When the registry is asked about an image that the user has been given before.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PullPolicy {
    /// Each time.
    Always,
    /// Unless it has answered a short time ago.
    #[default]
    Recent,
    /// As long as the image is in the store: not what its tag means now, only whether the user may still have it, and that
    /// not more often than with `Recent`.
    Missing,
    /// Never.
    Never,
}

impl PullPolicy {
    /// What users call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Always => "always",
            Self::Recent => "recent",
            Self::Missing => "missing",
            Self::Never => "never",
        }
    }

    /// The policy that users call `name`.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "always" => Some(Self::Always),
            "recent" => Some(Self::Recent),
            "missing" => Some(Self::Missing),
            "never" => Some(Self::Never),
            _ => None,
        }
    }
}

/// Most bytes of a [`Meaning`] or [`Place`] as text.
pub const MAX_MEANING: usize = 4096;

/// What the tag of an image means: as text the time, the digest and the name, with blanks between them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Meaning {
    /// Seconds since 1970, before the registry was asked.
    pub asked_at: u64,
    /// Of the index, or of the manifest.
    pub digest: Digest,
    /// The image's name in full, with the tag.
    pub name: String,
}

impl fmt::Display for Meaning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {}", self.asked_at, self.digest, self.name)
    }
}

impl Meaning {
    /// Reads what [`fmt::Display`] writes.
    pub fn parse(text: &str) -> Option<Self> {
        let mut words = text.splitn(3, ' ');
        let (asked_at, digest) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        Some(Self { asked_at, digest, name: words.next()?.to_owned() })
    }
}

/// Where nodes are told what a tag means ([`crate::agreement`]): a port of `srun`'s machine, and the key for it. As text `at`,
/// the port and the key, with blanks between them.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// TCP port.
    pub port: u16,
    /// 32 hexadecimal digits, which only the step's nodes know.
    pub key: String,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Place").field("port", &self.port).finish_non_exhaustive()
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at {} {}", self.port, self.key)
    }
}

impl Place {
    fn parse(text: &str) -> Option<Self> {
        let (port, key) = text.strip_prefix("at ")?.split_once(' ')?;
        let is_key = key.len() == 32 && key.bytes().all(|byte| byte.is_ascii_hexdigit());
        let port = port.parse().ok().filter(|port| *port > 0 && is_key)?;
        Some(Self { port, key: key.to_owned() })
    }
}

/// What `srun` says about a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TagMeaning {
    /// What it means.
    Known(Meaning),
    /// Where nodes agree on it.
    Asked(Place),
}

impl TagMeaning {
    /// Reads a line of either.
    pub fn parse(text: &str) -> Option<Self> {
        Meaning::parse(text).map(Self::Known).or_else(|| Place::parse(text).map(Self::Asked))
    }
}

/// The forms of images in files that have a name of their own (containers-transports(5)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LocalForm {
    /// `oci:`: a directory, as the image specification lays it out.
    Layout,
    /// `oci-archive:`: a tar archive of such a directory.
    OciArchive,
    /// `docker-archive:`: what `docker save` writes.
    DockerArchive,
}

/// A container engine, by its command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Engine {
    /// `docker`, which asks a daemon.
    Docker,
    /// `podman`, which reads the user's storage.
    Podman,
}

impl Engine {
    /// Its command.
    pub fn command(self) -> &'static str {
        match self {
            Self::Docker => "docker",
            Self::Podman => "podman",
        }
    }
}

/// `--container-name`: `NAME[:FLAG]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContainerName {
    /// As typed; not empty.
    pub name: String,
    /// What to do if such a container exists, or does not.
    pub mode: NameMode,
}

/// What `--container-name` asks for (behaviour reference, section 3.6).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NameMode {
    /// Join it if it runs, use it again if it exists, else create it.
    #[default]
    Auto,
    /// It must not exist.
    Create,
    /// It must be running.
    Exec,
    /// As `Auto`, but always in namespaces of its own.
    NoExec,
}

/// `--container-unshare`: the namespaces that are the container's own beyond user, mount and cgroup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unshare {
    /// Network: loopback only.
    pub net: bool,
    /// System V IPC and POSIX message queues.
    pub ipc: bool,
    /// Host name.
    pub uts: bool,
}

impl Unshare {
    /// Whether any namespace is asked for.
    pub fn any(self) -> bool {
        self.net || self.ipc || self.uts
    }
}

/// One item of `--container-env`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ContainerEnv {
    /// `NAME`: the host's value, if it has one, wins over the image's.
    FromHost(String),
    /// `NAME=VALUE`: this value, always.
    Set(String, String),
}

/// An environment, in the order of its entries. Names and values are bytes, as execve(2) has them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment(Vec<(Vec<u8>, Vec<u8>)>);

impl Environment {
    /// Reads a block of `NAME=VALUE` strings, each ended by a NUL, as in `/proc/PID/environ`. Strings without `=` are
    /// dropped; of a name that comes twice the last value counts.
    pub fn from_block(block: &[u8]) -> Self {
        block.split(|&byte| byte == 0).collect()
    }

    /// The block that [`Environment::from_block`] reads.
    pub fn to_block(&self) -> Vec<u8> {
        self.0.iter().flat_map(|(name, value)| [name, &b"="[..], value, &b"\0"[..]].concat()).collect()
    }

    /// The value of `name`.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.0.iter().find(|(key, _)| key == name.as_bytes()).map(|(_, value)| value.as_slice())
    }

    /// The value of `name`, if it is UTF-8 and not empty.
    pub fn get_str(&self, name: &str) -> Option<&str> {
        self.get(name).and_then(|value| std::str::from_utf8(value).ok()).filter(|value| !value.is_empty())
    }

    /// Sets `name`, in place if it exists.
    pub fn set(&mut self, name: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        let (name, value) = (name.into(), value.into());
        match self.0.iter_mut().find(|(key, _)| *key == name) {
            Some(entry) => entry.1 = value,
            None => self.0.push((name, value)),
        }
    }

    /// Sets `name` unless it exists.
    pub fn set_default(&mut self, name: &str, value: impl Into<Vec<u8>>) {
        if self.get(name).is_none() {
            self.0.push((name.into(), value.into()));
        }
    }

    /// Removes `name`.
    pub fn remove(&mut self, name: &str) {
        self.0.retain(|(key, _)| key != name.as_bytes());
    }

    /// What to do to `self` to make it `target`: a name with its new value, or with `None` to remove it.
    pub fn changes_to<'a>(&'a self, target: &'a Self) -> impl Iterator<Item = (&'a [u8], Option<&'a [u8]>)> {
        let before: HashMap<&[u8], &[u8]> = self.iter().collect();
        let after: HashSet<&[u8]> = target.iter().map(|(name, _)| name).collect();
        let removed = self.iter().map(|(name, _)| (name, None)).filter(move |(name, _)| !after.contains(name));
        let set = target.iter().filter(move |(name, value)| before.get(name) != Some(value));
        removed.chain(set.map(|(name, value)| (name, Some(value))))
    }

    /// Names and values in order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.0.iter().map(|(name, value)| (name.as_slice(), value.as_slice()))
    }
}

/// From `NAME=VALUE` strings.
impl<S: AsRef<[u8]>> FromIterator<S> for Environment {
    fn from_iter<I: IntoIterator<Item = S>>(strings: I) -> Self {
        let mut entries: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
        let mut positions = HashMap::new();
        for string in strings {
            let string = string.as_ref();
            let Some(split) = string.iter().position(|&byte| byte == b'=').filter(|&at| at > 0) else { continue };
            let (name, value) = (string[..split].to_vec(), string[split + 1..].to_vec());
            match positions.get(&name) {
                Some(&at) => entries[at] = (name, value),
                None => {
                    positions.insert(name.clone(), entries.len());
                    entries.push((name, value));
                }
            }
        }
        Self(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_round_trips() {
        let environment = Environment::from_block(b"A=1\0B=two=2\0NOEQ\0=x\0C=line\nbreak\0A=3\0\xff=\xfe\0");
        assert_eq!(environment.get("A"), Some(&b"3"[..]));
        assert_eq!(environment.get("B"), Some(&b"two=2"[..]));
        assert_eq!(environment.get("C"), Some(&b"line\nbreak"[..]));
        assert_eq!(environment.to_block(), b"A=3\0B=two=2\0C=line\nbreak\0\xff=\xfe\0");
        assert_eq!(Environment::from_block(&environment.to_block()), environment);
    }

    #[test]
    fn a_meaning_is_a_line() {
        let digest = format!("sha256:{}", "a1".repeat(32)).parse().unwrap();
        let meaning = Meaning { asked_at: 7, digest, name: "docker.io/library/alpine:3".into() };
        let text = meaning.to_string();
        assert_eq!(text, format!("7 sha256:{} docker.io/library/alpine:3", "a1".repeat(32)));
        assert_eq!(Meaning::parse(&text), Some(meaning));
        for text in ["", "7", "7 sha256:00 x", "x sha256:00 y", &text[2..]] {
            assert_eq!(Meaning::parse(text), None, "{text}");
        }
        assert_eq!(TagMeaning::parse(&text), Meaning::parse(&text).map(TagMeaning::Known));
    }

    #[test]
    fn a_place_is_a_line() {
        let place = Place { port: 60001, key: "0f".repeat(16) };
        let text = place.to_string();
        assert_eq!(text, format!("at 60001 {}", "0f".repeat(16)));
        assert!(!format!("{place:?}").contains("0f0f"));
        assert_eq!(TagMeaning::parse(&text), Some(TagMeaning::Asked(place)));
        for text in ["at", "at 0 00", &text[..text.len() - 1], &text.replace("60001", "0"), &text.replace("0f", "0x")] {
            assert_eq!(TagMeaning::parse(text), None, "{text}");
        }
    }

    #[test]
    fn changes_lead_from_one_to_the_other() {
        let before = Environment::from_block(b"A=1\0B=2\0C=3\0");
        let after = Environment::from_block(b"C=3\0B=4\0D=\0");
        let changes: Vec<_> = before.changes_to(&after).collect();
        assert_eq!(changes, [(&b"A"[..], None), (b"B", Some(&b"4"[..])), (b"D", Some(b""))]);
        assert_eq!(before.changes_to(&before).count(), 0);
    }
}
