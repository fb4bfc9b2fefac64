//! From a vendor's edits to ours: what is bound from the host is looked at there, and hooks whose work can be said as data
//! are said as data.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File as HostFile;
use std::io::{self, Read};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::Access;

use super::document::{self, Edits, Mount, Node};
use super::known::{self, Known};
use super::name::QualifiedName;
use super::pattern::Pattern;
use crate::devices::edits::{ContainerEdits, DeviceNode, File, Hook, HookStage, Library, Link, Origin};
use crate::devices::elf::Elf;
use crate::devices::nvidia::compat::Compat;
use crate::mounts::entry::MountEntry;
use crate::mounts::rootdir::RootDir;
use crate::request::User;
use crate::sys;

/// Settings of NVIDIA's driver, and the one that lets its tools make device nodes.
const NVIDIA_PARAMETERS: &str = "/proc/driver/nvidia/params";
const MODIFY: &str = "ModifyDeviceFiles: 1";
/// Most bytes of these settings.
const MAX_PARAMETERS: u64 = 64 << 10;
/// Most device nodes that one pattern stands for.
const MAX_MATCHES: usize = 1024;

/// The edits of all devices of one container, while they are collected.
#[derive(Debug, Default)]
pub(super) struct Planner {
    edits: ContainerEdits,
    binds: Vec<Bind>,
    /// What each holds, and where it is.
    links: Vec<(String, String)>,
    library_directories: BTreeSet<String>,
    groups: BTreeSet<u32>,
    /// Version of NVIDIA's driver, of which the image may have a newer part.
    driver: Option<String>,
    /// Device nodes that the user may not open.
    closed: BTreeSet<PathBuf>,
}

/// A mount, with the host's path of one that may be a library.
#[derive(Debug)]
struct Bind {
    entry: MountEntry,
    file: Option<PathBuf>,
}

impl Planner {
    /// Adds the edits of the device `name`, or what the file `origin` says for all of its devices. With `patterns` paths of
    /// device nodes may be such.
    pub fn add(&mut self, edits: &Edits, patterns: bool, name: &QualifiedName, origin: &Path) -> Result<(), String> {
        for node in &edits.device_nodes {
            match Pattern::new(node.source()).filter(|_| patterns && Pattern::is_pattern(&node.path)) {
                Some(pattern) => self.add_matching(pattern, node)?,
                None => self.add_node(node, origin)?,
            }
        }
        for mount in &edits.mounts {
            self.add_mount(mount, origin)?;
        }
        let entries = edits.env.iter().filter_map(|entry| entry.split_once('='));
        self.edits.env.extend(entries.map(|(name, value)| (name.to_owned(), value.to_owned())));
        for hook in &edits.hooks {
            self.add_hook(hook, name, origin)?;
        }
        self.groups.extend(edits.additional_gids.iter().filter(|&&group| group != 0));
        if edits.intel_rdt.is_some() {
            self.log(origin, "intelRdt: left to Slurm's plugins");
        }
        if !edits.device_cgroup_rules.is_empty() {
            self.log(origin, "deviceCgroupRules: left to Slurm (ConstrainDevices)");
        }
        for device in &edits.net_devices {
            let text = format!(
                "{name}: the network interface {:?} is not moved into the container, which has the host's network",
                device.host_interface_name
            );
            self.edits.notices.push(text);
        }
        Ok(())
    }

    fn log(&mut self, origin: &Path, what: impl std::fmt::Display) {
        let line = format!("{}: {what}", origin.display());
        if !self.edits.log.contains(&line) {
            self.edits.log.push(line);
        }
    }

    fn add_node(&mut self, node: &Node, origin: &Path) -> Result<(), String> {
        let path = node.source();
        let status = std::fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                format!("there is no device node {path}: a kernel module is not loaded, or the file is out of date")
            }
            _ => format!("cannot look at the device node {path}: {}", sys::reason(error)),
        })?;
        let (kind, what) = match status.file_type() {
            found if found.is_char_device() => ("c", "a character device"),
            found if found.is_block_device() => ("b", "a block device"),
            found if found.is_fifo() => ("p", "a FIFO"),
            _ => return Err(format!("{path} is no device node")),
        };
        let wanted = if node.kind == "u" { "c" } else { node.kind.as_str() };
        if !wanted.is_empty() && wanted != kind {
            return Err(format!("{path} is {what}, and the type there is {:?}", node.kind));
        }
        let (major, minor) = (rustix::fs::major(status.rdev()), rustix::fs::minor(status.rdev()));
        if kind != "p" && node.major != 0 && (i64::from(major), i64::from(minor)) != (node.major, node.minor) {
            let Node { major: there, minor: and, .. } = node;
            self.log(origin, format_args!("{path} is {major}:{minor}, not {there}:{and}: the file is out of date"));
        }
        let mut access = Access::READ_OK;
        access.set(Access::WRITE_OK, node.is_written());
        if rustix::fs::access(path, access).is_err() {
            self.closed.insert(path.into());
        }
        let device = DeviceNode { host_path: path.into(), path: node.path.clone().into(), optional: false };
        self.edits.device_nodes.retain(|other| other.path != device.path);
        self.edits.device_nodes.push(device);
        Ok(())
    }

    /// Whatever matches and is a device node; nothing is fine.
    fn add_matching(&mut self, pattern: Pattern<'_>, node: &Node) -> Result<(), String> {
        let Some(inside) = Pattern::new(&node.path) else { return Ok(()) };
        let entries = match std::fs::read_dir(pattern.directory()) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(format!("cannot read {}: {}", pattern.directory(), sys::reason(error))),
        };
        let is_node = |entry: &std::fs::DirEntry| {
            let found = entry.file_type();
            found.is_ok_and(|found| found.is_char_device() || found.is_block_device() || found.is_fifo())
        };
        let names = entries.flatten().filter(is_node).filter_map(|entry| entry.file_name().into_string().ok());
        let matching: BTreeSet<String> = names.filter(|name| pattern.matches(name)).take(MAX_MATCHES).collect();
        for name in matching {
            let (host_path, path) = (PathBuf::from(pattern.path_of(&name)), PathBuf::from(inside.path_of(&name)));
            self.edits.device_nodes.retain(|other| other.path != path);
            // It may be gone again.
            self.edits.device_nodes.push(DeviceNode { host_path, path, optional: true });
        }
        Ok(())
    }

    fn add_mount(&mut self, mount: &Mount, origin: &Path) -> Result<(), String> {
        let Mount { host_path, container_path, kind, options } = mount;
        let is_bind = mount.is_bind();
        let mut words: Vec<&str> = options.iter().map(String::as_str).collect();
        if is_bind && !words.iter().any(|word| matches!(*word, "bind" | "rbind")) {
            words.push("rbind");
        }
        words.push("x-create=auto");
        let kind = if is_bind { "none" } else { kind.as_str() };
        let (entry, unknown) = MountEntry::of_type(kind, host_path, container_path, words.into_iter());
        for option in unknown {
            self.log(origin, format_args!("mount at {container_path}: unknown option {option:?}: passed over"));
        }
        let mut file = None;
        if is_bind {
            let status = std::fs::metadata(host_path).map_err(|error| match error.kind() {
                io::ErrorKind::NotFound => format!("there is no {host_path} to mount: the file is out of date"),
                _ => format!("cannot mount {host_path}: {}", sys::reason(error)),
            })?;
            file = status.is_file().then(|| host_path.into());
        }
        self.binds.retain(|other| other.entry.target != entry.target);
        self.binds.push(Bind { entry, file });
        Ok(())
    }

    fn add_hook(&mut self, hook: &document::Hook, name: &QualifiedName, origin: &Path) -> Result<(), String> {
        match known::recognise(&hook.path, &hook.args).transpose()? {
            Some(Known::Links(links)) => self.links.extend(links),
            Some(Known::LibraryDirectories(directories)) => self.library_directories.extend(directories),
            Some(Known::NoNodeModification) => self.edits.files.extend(nvidia_parameters()),
            Some(Known::CudaCompat(driver)) => self.driver = Some(driver),
            Some(Known::Nothing) => {}
            None => {
                let Some(stage) = HookStage::of(&hook.hook_name) else {
                    self.log(origin, format_args!("hook {}: {}: not run", hook.hook_name, hook.path));
                    return Ok(());
                };
                self.edits.hooks.push(Hook {
                    stage,
                    path: hook.path.clone().into(),
                    args: hook.args.clone(),
                    env: hook.env.clone(),
                    timeout_seconds: hook.timeout,
                    origin: format!("{name} ({})", origin.display()),
                });
            }
        }
        Ok(())
    }

    /// The edits of a container of `user`, made from `image`, if its own CUDA may be used.
    pub fn finish(mut self, user: &User, image: Option<RootDir<'_>>) -> ContainerEdits {
        let mut libraries = self.take_libraries();
        let mut edits = self.edits;
        if let (Some(driver), Some(image)) = (self.driver, image)
            && let Some(compat) = Compat::find(image, &driver)
        {
            edits.log.push(compat.describe(&driver));
            compat.replace(&mut libraries);
        }
        edits.libraries = libraries;
        // What is mounted on comes before what is mounted there.
        self.binds.sort_by_key(|bind| Path::new(&bind.entry.target).components().count());
        edits.mounts = self.binds.into_iter().map(|bind| bind.entry).collect();
        edits.links =
            self.links.into_iter().map(|(target, path)| Link { path: path.into(), target: target.into() }).collect();
        // In a user namespace of his own nobody gets groups that he has not.
        let has = |group: u32| user.gid == group || user.groups.contains(&group);
        let foreign: Vec<String> =
            self.groups.into_iter().filter(|&group| !has(group)).map(|group| group.to_string()).collect();
        let foreign = foreign.join(", ");
        if let Some(text) = closed_nodes(&self.closed, &foreign) {
            edits.notices.push(text);
        } else if !foreign.is_empty() {
            edits.log.push(format!("CDI: additional groups that the user is not in: {foreign}"));
        }
        edits
    }

    /// The files that the dynamic linker has to find, with the names by which links call them.
    fn take_libraries(&mut self) -> Vec<Library> {
        let mut libraries = Vec::new();
        // Where each name is said to be.
        let mut names: BTreeMap<PathBuf, usize> = BTreeMap::new();
        let directories = &self.library_directories;
        let in_directory = |path: &Path| {
            let parent = path.parent().and_then(Path::to_str);
            parent.is_some_and(|parent| directories.iter().any(|directory| directory.trim_end_matches('/') == parent))
        };
        self.binds.retain(|bind| {
            let target = Path::new(&bind.entry.target);
            let name = target.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_library = name.starts_with("lib") && name.contains(".so") && in_directory(target);
            let Some(path) = bind.file.clone().filter(|_| is_library) else { return true };
            let elf = HostFile::open(&path).ok().and_then(|file| Elf::read(&file));
            names.insert(target.to_owned(), libraries.len());
            let mut library = Library { origin: Origin::Host, path, is_32_bit: false, names: vec![name.to_owned()] };
            if let Some(Elf { is_32_bit, soname }) = elf {
                library.is_32_bit = is_32_bit;
                // What ldconfig would make a link of.
                if let Some(soname) = soname.filter(|soname| soname != name) {
                    names.insert(target.with_file_name(&soname), libraries.len());
                    library.names.push(soname);
                }
            }
            libraries.push(library);
            false
        });
        // A link may lead to a link that comes later.
        loop {
            let before = self.links.len();
            self.links.retain(|(target, path)| {
                let path = Path::new(path);
                let leads_to = path.parent().unwrap_or(Path::new("/")).join(target);
                let (Some(&library), true) = (names.get(&leads_to), in_directory(path)) else { return true };
                let Some(name) = path.file_name().and_then(|name| name.to_str()) else { return true };
                let known: &mut Library = &mut libraries[library];
                if !known.names.iter().any(|other| other == name) {
                    known.names.push(name.to_owned());
                }
                names.insert(path.to_owned(), library);
                false
            });
            if self.links.len() == before {
                break;
            }
        }
        // A device's links are in every device's edits.
        let mut seen = BTreeSet::new();
        self.links.retain(|link| seen.insert(link.clone()));
        libraries
    }
}

fn nvidia_parameters() -> Option<File> {
    let mut text = String::new();
    HostFile::open(NVIDIA_PARAMETERS).ok()?.take(MAX_PARAMETERS).read_to_string(&mut text).ok()?;
    let content = text.replace(MODIFY, "ModifyDeviceFiles: 0").into_bytes();
    Some(File { path: NVIDIA_PARAMETERS.into(), mode: 0o444, content })
}

fn closed_nodes(closed: &BTreeSet<PathBuf>, groups: &str) -> Option<String> {
    let list: Vec<String> = closed.iter().map(|path| path.display().to_string()).collect();
    let members = if groups.is_empty() { String::new() } else { format!("; members of the groups {groups} may") };
    (!list.is_empty()).then(|| format!("you may not open {}, so that programs cannot use it{members}", list.join(", ")))
}
