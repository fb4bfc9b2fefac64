//! What the user asked: the option table, the pure parsers behind it, the environment variables that stand in for
//! options, and the administrator's arguments in plugstack.conf (behaviour reference, sections 3 and 4).
//!
//! [`Options`] is filled by Slurm's option callbacks, on the submit side and again on each node, in an order that Slurm
//! chooses: inherited from the job's environment, `#SBATCH` lines, command line. Of single values the last one counts, so
//! that a script's may be overridden, unless the command line itself has two ([`Options::note_command_line`]).

#![forbid(unsafe_code)]

pub mod arguments;
mod container_env;
mod environment;
pub mod table;

use std::path::PathBuf;

use crate::container::name::{FullName, InvalidName};
use crate::devices::cdi::name::{InvalidName as InvalidDevice, QualifiedName};
use crate::image::local;
use crate::image::reference::{ImageReference, InvalidReference};
use crate::mounts::entry::{InvalidEntry, MountEntry};
use crate::mounts::spec::{InvalidMounts, MountSpec};
use crate::request::{ContainerEnv, ContainerName, ImageSource, NameMode, PullPolicy, Unshare};

pub use environment::FromEnvironmentError;
use table::{OptionId, TABLE};

/// The options of a step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Options {
    /// `--container-image`.
    pub image: Option<ImageSource>,
    /// `--container-mounts`, in order.
    pub mounts: Vec<MountSpec>,
    /// `--container-workdir`.
    pub workdir: Option<String>,
    /// `--container-env`.
    pub env: Vec<ContainerEnv>,
    /// `--[no-]container-mount-home`.
    pub mount_home: Option<bool>,
    /// `--[no-]container-remap-root`.
    pub remap_root: Option<bool>,
    /// `--container-writable` / `--container-readonly`.
    pub writable: Option<bool>,
    /// `--container-name`.
    pub name: Option<ContainerName>,
    /// `--container-save`.
    pub save: Option<String>,
    /// `--[no-]container-entrypoint`.
    pub entrypoint: Option<bool>,
    /// `--container-entrypoint-log`.
    pub entrypoint_log: Option<bool>,
    /// `--container-unshare`.
    pub unshare: Unshare,
    /// `--container-device`, in order, each once.
    pub devices: Vec<QualifiedName>,
    /// `--container-pull`.
    pub pull: Option<PullPolicy>,
    image_text: Option<String>,
    /// The texts of list options, in order, each once: Slurm relays only the last one of each to the nodes.
    lists: Vec<(OptionId, String)>,
    /// How often each option stands on the command line, by its number.
    typed: [u8; TABLE.len()],
}

/// Why an option cannot be used. The texts are pyxis's where it has one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OptionError {
    /// An empty argument.
    #[error("--{0}: argument required")]
    ArgumentRequired(&'static str),
    /// Two values for an option that has one.
    #[error("--{0} specified multiple times")]
    Repeated(&'static str),
    /// A switch and its opposite.
    #[error("both --{0} and --{1} were specified")]
    Conflict(&'static str, &'static str),
    /// An argument that is not text.
    #[error("--{0}: argument is not valid UTF-8")]
    Encoding(&'static str),
    /// An empty item of a list.
    #[error("--{0}: invalid format: {1}")]
    Format(&'static str, String),
    /// `--container-image` is neither a path nor a reference.
    #[error("--container-image: {0}")]
    Image(#[from] InvalidReference),
    /// `--container-mounts`.
    #[error(transparent)]
    Mounts(#[from] InvalidMounts),
    /// A flag in `--container-mounts` that means nothing.
    #[error("--container-mounts: {0}")]
    MountFlag(#[from] InvalidEntry),
    /// `--container-name=:flag`.
    #[error("--container-name: empty name")]
    EmptyName,
    /// `--container-name=name:` and an unknown word.
    #[error("--container-name: flag must be \"auto\", \"create\", \"exec\" or \"no_exec\"")]
    NameFlag,
    /// No container can have the name.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// `--container-save` names a directory.
    #[error("--container-save: target is a directory")]
    SaveTarget,
    /// `--container-pull` and another word.
    #[error("--container-pull: must be \"always\", \"recent\", \"missing\" or \"never\"")]
    Pull,
    /// An empty item of `--container-unshare`.
    #[error("--container-unshare: empty namespace argument")]
    EmptyNamespace,
    /// A namespace that cannot be asked for.
    #[error("--container-unshare: unknown namespace '{0}'")]
    UnknownNamespace(String),
    /// `--container-device`.
    #[error("--container-device: {0}")]
    Device(#[from] InvalidDevice),
}

impl Options {
    /// Takes over one option as typed. `argument` is ignored by an option without one.
    pub fn set(&mut self, id: OptionId, argument: &[u8]) -> Result<(), OptionError> {
        if id.spec().argument.is_none() {
            return self.switch(id);
        }
        let name = id.name();
        if argument.is_empty() {
            return Err(OptionError::ArgumentRequired(name));
        }
        let text = std::str::from_utf8(argument).map_err(|_| OptionError::Encoding(name))?;
        match id {
            OptionId::Image => self.set_image(text),
            OptionId::Mounts => {
                for mount in MountSpec::parse_list(text)? {
                    MountEntry::try_from(&mount)?;
                    if !self.mounts.contains(&mount) {
                        self.mounts.push(mount);
                    }
                }
                self.note_list(id, text);
                Ok(())
            }
            OptionId::Env => {
                container_env::parse_into(&mut self.env, text)?;
                self.note_list(id, text);
                Ok(())
            }
            OptionId::Workdir => self.single(id, |options| &mut options.workdir, text.to_owned()),
            OptionId::Name => {
                let parsed = parse_name(text)?;
                self.single(id, |options| &mut options.name, parsed)
            }
            OptionId::Pull => {
                let policy = PullPolicy::of(text).ok_or(OptionError::Pull)?;
                self.single(id, |options| &mut options.pull, policy)
            }
            OptionId::Save if text.ends_with('/') => Err(OptionError::SaveTarget),
            OptionId::Save => self.single(id, |options| &mut options.save, text.to_owned()),
            OptionId::Unshare => {
                let asked = parse_namespaces(text)?;
                let before = self.unshare;
                self.unshare = Unshare {
                    net: before.net || asked.net,
                    ipc: before.ipc || asked.ipc,
                    uts: before.uts || asked.uts,
                };
                self.note_list(id, text);
                Ok(())
            }
            OptionId::Device => {
                // The whole list is judged before any of it counts.
                let devices = text.split(',').map(str::parse).collect::<Result<Vec<QualifiedName>, _>>()?;
                for device in devices {
                    if !self.devices.contains(&device) {
                        self.devices.push(device);
                    }
                }
                self.note_list(id, text);
                Ok(())
            }
            // The rest has no argument.
            _ => Ok(()),
        }
    }

    /// Takes note of the command line that the options come from: two different values there are a mistake, while one
    /// there overrides what a script or the environment says. What was noted before is forgotten.
    pub fn note_command_line<'a>(&mut self, words: impl IntoIterator<Item = &'a [u8]>) {
        self.typed = Default::default();
        for word in words.into_iter().take_while(|word| *word != b"--") {
            let Some(long) = word.strip_prefix(b"--") else { continue };
            let name = long.split(|&byte| byte == b'=').next().unwrap_or_default();
            // getopt_long(3) takes every abbreviation that is not ambiguous.
            let exact = TABLE.iter().find(|spec| spec.name().as_bytes() == name);
            let mut abbreviated = TABLE.iter().filter(|spec| spec.name().as_bytes().starts_with(name));
            if let Some(spec) = exact.or_else(|| abbreviated.next().filter(|_| abbreviated.next().is_none())) {
                let count = &mut self.typed[spec.id as usize];
                *count = count.saturating_add(1);
            }
        }
    }

    fn typed(&self, id: OptionId) -> u8 {
        self.typed[id as usize]
    }

    fn single<T: PartialEq>(
        &mut self,
        id: OptionId,
        field: impl Fn(&mut Self) -> &mut Option<T>,
        value: T,
    ) -> Result<(), OptionError> {
        let typed = self.typed(id);
        let field = field(self);
        if typed > 1 && field.as_ref().is_some_and(|before| *before != value) {
            return Err(OptionError::Repeated(id.name()));
        }
        *field = Some(value);
        Ok(())
    }

    fn set_image(&mut self, text: &str) -> Result<(), OptionError> {
        let image = parse_image(text)?;
        self.single(OptionId::Image, |options| &mut options.image_text, text.to_owned())?;
        self.image = Some(image);
        Ok(())
    }

    fn switch(&mut self, id: OptionId) -> Result<(), OptionError> {
        use OptionId::{
            Entrypoint, EntrypointLog, MountHome, NoEntrypoint, NoMountHome, NoRemapRoot, Readonly, RemapRoot, Writable,
        };
        let (one, other) = opposites(id);
        if one != other && self.typed(one) > 0 && self.typed(other) > 0 {
            return Err(OptionError::Conflict(one.name(), other.name()));
        }
        match id {
            MountHome | NoMountHome => self.mount_home = Some(id == MountHome),
            RemapRoot | NoRemapRoot => self.remap_root = Some(id == RemapRoot),
            Writable | Readonly => self.writable = Some(id == Writable),
            Entrypoint | NoEntrypoint => self.entrypoint = Some(id == Entrypoint),
            EntrypointLog => self.entrypoint_log = Some(true),
            _ => {}
        }
        Ok(())
    }

    /// A list option came with this text.
    fn note_list(&mut self, id: OptionId, text: &str) {
        let entry = (id, text.to_owned());
        if !self.lists.contains(&entry) {
            self.lists.push(entry);
        }
    }

    /// `--container-image` as typed.
    pub fn image_text(&self) -> Option<&str> {
        self.image_text.as_deref()
    }

    /// Whether the single value or switch `id` has one that is not from the command line.
    pub fn was_given_by_script(&self, id: OptionId) -> bool {
        let (one, other) = opposites(id);
        self.typed(one) == 0
            && self.typed(other) == 0
            && self.is_given(id)
            && self.lists.iter().all(|(list, _)| *list != id)
    }

    /// Whether any option was given.
    pub fn any(&self) -> bool {
        !Self::default().asks_the_same_as(self)
    }

    /// Whether both ask for the same, however it was said.
    pub fn asks_the_same_as(&self, other: &Self) -> bool {
        let asked = |options: &Self| Self { lists: Vec::new(), typed: Default::default(), ..options.clone() };
        asked(self) == asked(other)
    }

    /// Whether the step is to run in a container.
    pub fn enabled(&self) -> bool {
        self.image.is_some() || self.name.is_some()
    }

    /// The options that were given although no container was asked for, as pyxis spells them.
    pub fn without_container(&self) -> Vec<&'static str> {
        if self.enabled() {
            return Vec::new();
        }
        let writable = if self.writable == Some(false) { "--container-readonly" } else { "--container-writable" };
        [
            (!self.mounts.is_empty(), "--container-mounts"),
            (self.workdir.is_some(), "--container-workdir"),
            (self.mount_home.is_some(), "--[no-]container-mount-home"),
            (self.remap_root.is_some(), "--[no-]container-remap-root"),
            (self.entrypoint.is_some(), "--[no-]container-entrypoint"),
            (self.entrypoint_log.is_some(), "--container-entrypoint-log"),
            (self.writable.is_some(), writable),
            (self.save.is_some(), "--container-save"),
            (!self.devices.is_empty(), "--container-device"),
            (self.pull.is_some(), "--container-pull"),
        ]
        .into_iter()
        .filter_map(|(given, name)| given.then_some(name))
        .collect()
    }

    /// The whole list of an option that came as several arguments: Slurm relays only the last of them. With
    /// `command_line_only` those that the command line has, if any, are the whole list.
    pub fn merged_list(&self, id: OptionId, command_line_only: bool) -> Option<String> {
        let texts: Vec<&str> = self.lists.iter().filter(|(other, _)| *other == id).map(|(_, text)| &**text).collect();
        let own = usize::from(self.typed(id));
        let skipped = if command_line_only && own > 0 { texts.len().saturating_sub(own) } else { 0 };
        let texts = texts.get(skipped..).unwrap_or_default();
        (texts.len() > 1).then(|| texts.join(","))
    }

    /// Takes `merged`, the whole list of which Slurm has relayed only the last argument. It counts only if it ends with
    /// that argument: else it is another command's.
    pub fn complete_list(&mut self, id: OptionId, merged: &[u8]) -> Result<(), OptionError> {
        let relayed = self.lists.iter().rfind(|(other, _)| *other == id).map(|(_, text)| text.as_bytes());
        if !relayed.is_some_and(|text| merged.ends_with(text)) {
            return Ok(());
        }
        match id {
            OptionId::Mounts => self.mounts.clear(),
            OptionId::Env => self.env.clear(),
            OptionId::Device => self.devices.clear(),
            _ => {}
        }
        self.set(id, merged)
    }
}

/// A switch and its opposite, in the order in which messages name them; an option that has none, twice.
fn opposites(id: OptionId) -> (OptionId, OptionId) {
    use OptionId::{Entrypoint, MountHome, NoEntrypoint, NoMountHome, NoRemapRoot, Readonly, RemapRoot, Writable};
    match id {
        MountHome | NoMountHome => (MountHome, NoMountHome),
        RemapRoot | NoRemapRoot => (RemapRoot, NoRemapRoot),
        Writable | Readonly => (Writable, Readonly),
        Entrypoint | NoEntrypoint => (Entrypoint, NoEntrypoint),
        _ => (id, id),
    }
}

/// Classifies what follows `--container-image=`.
pub fn parse_image(text: &str) -> Result<ImageSource, InvalidReference> {
    if text.starts_with(['.', '/']) {
        return Ok(ImageSource::File(PathBuf::from(text)));
    }
    let typed = text.to_owned();
    if let Some(image) = local::parse(text) {
        return Ok(ImageSource::Local { typed, image: image? });
    }
    let reference = ImageReference::parse(text)?;
    reference.check()?;
    Ok(ImageSource::Registry { typed, reference })
}

fn parse_name(text: &str) -> Result<ContainerName, OptionError> {
    let (name, flag) = text.split_once(':').unwrap_or((text, ""));
    if name.is_empty() {
        return Err(OptionError::EmptyName);
    }
    let mode = match flag {
        "" | "auto" => NameMode::Auto,
        "create" => NameMode::Create,
        "exec" => NameMode::Exec,
        "no_exec" => NameMode::NoExec,
        _ => return Err(OptionError::NameFlag),
    };
    // Of the job nothing is known yet: where containers end with their job, the node judges again.
    FullName::new(name, None)?;
    Ok(ContainerName { name: name.to_owned(), mode })
}

fn parse_namespaces(text: &str) -> Result<Unshare, OptionError> {
    let mut asked = Unshare::default();
    for namespace in text.split(',') {
        match namespace {
            "" => return Err(OptionError::EmptyNamespace),
            "net" => asked.net = true,
            "ipc" => asked.ipc = true,
            "uts" => asked.uts = true,
            other => return Err(OptionError::UnknownNamespace(other.to_owned())),
        }
    }
    Ok(asked)
}

#[cfg(test)]
mod tests;
