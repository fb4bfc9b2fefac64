//! What devices need in a container, as plain data: the container edits of the CDI specification, and what goes beyond it
//! for devices that we find ourselves. Planned by `devices`, applied by container init.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use crate::mounts::entry::MountEntry;

/// The edits of one container, in the order in which they are applied: what is hidden, device nodes, mounts, libraries,
/// files, links.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ContainerEdits {
    /// Device nodes of the host that the container must not see, because the job has others: absolute paths.
    pub hidden: Vec<PathBuf>,
    /// Device nodes.
    pub device_nodes: Vec<DeviceNode>,
    /// Mounts, files and directories.
    pub mounts: Vec<MountEntry>,
    /// Libraries, which the container's dynamic linker has to find.
    pub libraries: Vec<Library>,
    /// Files and directories whose content we make.
    pub files: Vec<File>,
    /// Symbolic links.
    pub links: Vec<Link>,
    /// Variables; a later one of the same name wins.
    pub env: Vec<(String, String)>,
    /// Hooks, in order.
    pub hooks: Vec<Hook>,
    /// What Slurm calls each GPU that the container sees, in the task's `CUDA_VISIBLE_DEVICES`, and its number in the container.
    /// Empty if none differ.
    pub gpu_numbers: Vec<(u32, u32)>,
    /// For the user, a line each: what will not work, though the container starts.
    pub notices: Vec<String>,
    /// For the node's log.
    pub log: Vec<String>,
}

impl ContainerEdits {
    /// Adds the edits of another device, which are applied after these.
    pub fn extend(&mut self, other: Self) {
        self.hidden.extend(other.hidden);
        self.device_nodes.extend(other.device_nodes);
        self.mounts.extend(other.mounts);
        self.libraries.extend(other.libraries);
        self.files.extend(other.files);
        self.links.extend(other.links);
        self.env.extend(other.env);
        self.hooks.extend(other.hooks);
        self.gpu_numbers.extend(other.gpu_numbers);
        self.notices.extend(other.notices);
        self.log.extend(other.log);
    }
}

/// A device node that is bound from the host: the user namespace allows no other way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceNode {
    /// On the host.
    pub host_path: PathBuf,
    /// In the container: absolute.
    pub path: PathBuf,
    /// Whether the container starts without it.
    pub optional: bool,
}

/// Whose file it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The host's.
    Host,
    /// The image's own.
    Image,
}

/// A shared library, which appears in the container's library directory under all its names, and in its linker's cache.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Library {
    /// Where `path` is.
    pub origin: Origin,
    /// A regular file, or a link to one.
    pub path: PathBuf,
    /// Whether it belongs into the directory of 32-bit libraries.
    pub is_32_bit: bool,
    /// Its file name in the container, its SONAME and other names that programs look for; the first is the file's.
    pub names: Vec<String>,
}

/// A file or directory whose content we make: on a tmpfs, so that nothing of it stays in the root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    /// In the container: absolute.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    /// Its content.
    pub content: Vec<u8>,
}

/// A symbolic link, where the container has nothing of that name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    /// In the container: absolute.
    pub path: PathBuf,
    /// What it holds: relative to its directory, or absolute in the container.
    pub target: PathBuf,
}

/// A program that runs on the host for the container (runtime specification, POSIX-platform hooks).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hook {
    /// When.
    pub stage: HookStage,
    /// On the host (`CreateRuntime`, `CreateContainer`) or in the container (`StartContainer`): absolute.
    pub path: PathBuf,
    /// With `argv[0]`.
    pub args: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// Its own time limit in seconds.
    pub timeout_seconds: Option<u32>,
    /// Who asks for it, for messages: a CDI device, a file of hook JSON.
    pub origin: String,
}

/// The stages that a container without a runtime's `create` and `start` has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HookStage {
    /// `createRuntime`, and `prestart`, which it replaces: in the host's mount namespace.
    CreateRuntime,
    /// `createContainer`: in the container's mount namespace, before the root is switched.
    CreateContainer,
    /// `startContainer`: in the container, before its first program.
    StartContainer,
}

impl HookStage {
    /// By its name in the runtime specification; `None` for what comes after the start, and has no counterpart.
    pub fn of(name: &str) -> Option<Self> {
        match name {
            "prestart" | "createRuntime" => Some(Self::CreateRuntime),
            "createContainer" => Some(Self::CreateContainer),
            "startContainer" => Some(Self::StartContainer),
            _ => None,
        }
    }
}
