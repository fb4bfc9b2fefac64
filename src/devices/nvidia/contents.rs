//! What the parts of the driver consist of in user space, and where a host has it (behaviour reference, section 18.3).

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::wish::Capabilities;
use crate::devices::edits::{Library, Origin};
use crate::devices::host::Host;
use crate::devices::ldcache::{self, Abi, Cache};
use crate::mounts::entry::MountEntry;

/// Libraries of `utility`, without `.so`.
const UTILITY: [&str; 3] = ["libnvidia-ml", "libnvidia-cfg", "libnvidia-nscq"];
/// Of `compute`.
const COMPUTE: [&str; 12] = [
    "libcuda",
    "libcudadebugger",
    "libnvidia-opencl",
    "libnvidia-gpucomp",
    "libnvidia-ptxjitcompiler",
    "libnvidia-fatbinaryloader",
    "libnvidia-allocator",
    "libnvidia-compiler",
    "libnvidia-pkcs11",
    "libnvidia-pkcs11-openssl3",
    "libnvidia-nvvm",
    "libnvidia-tileiras",
];
/// Of `video`, which needs those of `compute`, too.
const VIDEO: [&str; 4] = ["libvdpau_nvidia", "libnvidia-encode", "libnvidia-opticalflow", "libnvcuvid"];
/// Of `graphics` and `display`. The compiler for shaders is one of `compute`, too.
const GRAPHICS: [&str; 15] = [
    "libnvidia-eglcore",
    "libnvidia-glcore",
    "libnvidia-tls",
    "libnvidia-glsi",
    "libnvidia-fbc",
    "libnvidia-ifr",
    "libnvidia-rtcore",
    "libnvidia-glvkspirv",
    "libnvidia-cbl",
    "libnvidia-gpucomp",
    "libnvoptix",
    "libGLX_nvidia",
    "libEGL_nvidia",
    "libGLESv2_nvidia",
    "libGLESv1_CM_nvidia",
];
/// Names that programs look for and that no SONAME is: library, name.
const MORE_NAMES: [(&str, &str); 3] = [
    ("libcuda", "libcuda.so"),
    ("libGLX_nvidia", "libGLX_indirect.so.0"),
    ("libnvidia-opticalflow", "libnvidia-opticalflow.so"),
];
/// Programs of `utility`.
const UTILITY_PROGRAMS: [&str; 4] = ["nvidia-smi", "nvidia-debugdump", "nvidia-persistenced", "nv-fabricmanager"];
/// Of `compute`.
const COMPUTE_PROGRAMS: [&str; 2] = ["nvidia-cuda-mps-control", "nvidia-cuda-mps-server"];
/// Where programs are. That of the driver's own directory, beside its libraries, comes first.
const PROGRAMS: [&str; 6] = ["/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin", "/bin", "/sbin"];
/// Where the kernel looks for firmware; a parameter says where else.
const FIRMWARE: &str = "/lib/firmware";
const FIRMWARE_PARAMETER: &str = "/sys/module/firmware_class/parameters/path";

/// The files of a driver.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Contents {
    /// Libraries.
    pub libraries: Vec<Library>,
    /// Binds of programs.
    pub programs: Vec<MountEntry>,
    /// Binds of firmware.
    pub firmware: Vec<MountEntry>,
    /// Libraries that the linker's cache has, and that are nowhere any more.
    pub vanished: BTreeMap<&'static str, PathBuf>,
    /// Versions of the driver whose libraries are there though another driver is loaded.
    pub other_versions: Vec<String>,
}

/// Which libraries a container gets.
fn libraries(capabilities: Capabilities) -> Vec<&'static str> {
    let Capabilities { compute, compat32: _, display, graphics, utility, video } = capabilities;
    let groups: [(bool, &[&str]); 4] =
        [(utility, &UTILITY), (compute || video, &COMPUTE), (video, &VIDEO), (graphics || display, &GRAPHICS)];
    let mut names: Vec<&str> =
        groups.into_iter().filter(|(wanted, _)| *wanted).flat_map(|(_, names)| names.iter().copied()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

impl Contents {
    /// Finds the files of the driver `version` on `host`.
    pub fn find(host: &Host, version: &str, capabilities: Capabilities) -> Self {
        let mut contents = Self::default();
        contents.find_libraries(host, version, capabilities);
        contents.find_programs(host, capabilities);
        contents.find_firmware(host, version);
        contents
    }

    fn find_libraries(&mut self, host: &Host, version: &str, capabilities: Capabilities) {
        let Ok(file) = host.read(ldcache::PATH, ldcache::MAX_FILE) else { return };
        let Ok(cache) = Cache::parse(&file) else { return };
        let wanted = libraries(capabilities);
        let mut found: BTreeMap<(&str, bool), (PathBuf, Vec<String>)> = BTreeMap::new();
        for entry in &cache.entries {
            let is_32_bit = match entry.abi() {
                Abi::Native => false,
                Abi::Bits32 if capabilities.compat32 => true,
                _ => continue,
            };
            let Some((library, name)) = std::str::from_utf8(entry.name).ok().and_then(split) else { continue };
            let Some(&library) = wanted.iter().find(|wanted| **wanted == library) else { continue };
            let Some(path) = host.resolve(entry.path()) else {
                if name.contains(".so.") {
                    self.vanished.entry(library).or_insert_with(|| entry.path().to_owned());
                }
                continue;
            };
            let Some(suffix) = path.file_name().and_then(|file| version_of(file.to_str()?, library)) else { continue };
            if suffix != version {
                if super::driver::is_version(suffix) && !self.other_versions.iter().any(|other| other == suffix) {
                    self.other_versions.push(suffix.to_owned());
                }
                continue;
            }
            let (first, names) = found.entry((library, is_32_bit)).or_insert_with(|| (path.clone(), Vec::new()));
            // A name without a number is for linking programs.
            if *first == path && name.contains(".so.") {
                names.push(name.to_owned());
            }
        }
        for ((library, is_32_bit), (path, mut names)) in found {
            let file = format!("{library}.so.{version}");
            names.extend(MORE_NAMES.iter().filter(|(of, _)| *of == library).map(|(_, name)| (*name).to_owned()));
            names.retain(|name| *name != file);
            names.sort_unstable();
            names.dedup();
            names.insert(0, file);
            self.vanished.remove(library);
            self.libraries.push(Library { origin: Origin::Host, path, is_32_bit, names });
        }
    }

    fn find_programs(&mut self, host: &Host, capabilities: Capabilities) {
        let beside = self.libraries.iter().filter(|library| !library.is_32_bit);
        let mut directories: Vec<PathBuf> = beside
            .filter_map(|library| Some(library.path.parent()?.parent()?.join("bin")))
            .chain(PROGRAMS.map(PathBuf::from))
            .collect();
        directories.dedup();
        let groups: [(bool, &[&str]); 2] =
            [(capabilities.utility, &UTILITY_PROGRAMS), (capabilities.compute, &COMPUTE_PROGRAMS)];
        for name in groups.into_iter().filter(|(wanted, _)| *wanted).flat_map(|(_, names)| names) {
            let program = directories.iter().find_map(|directory| host.resolve(directory.join(name)));
            let target = format!("/usr/bin/{name}");
            self.programs.extend(program.and_then(|program| bind(&program, Path::new(&target), "file")));
        }
    }

    fn find_firmware(&mut self, host: &Host, version: &str) {
        let parameter = host.read_text(FIRMWARE_PARAMETER, 4096).unwrap_or_default();
        let directories = [parameter.trim(), FIRMWARE].into_iter().filter(|directory| directory.starts_with('/'));
        for directory in directories {
            let own = Path::new("nvidia").join(version);
            let names = host.names(Path::new(directory).join(&own));
            let is_gsp = |name: &String| name.starts_with("gsp") && name.ends_with(".bin");
            self.firmware.extend(names.iter().filter(|name| is_gsp(name)).filter_map(|name| {
                let source = host.resolve(Path::new(directory).join(&own).join(name))?;
                bind(&source, &Path::new(FIRMWARE).join(&own).join(name), "file")
            }));
            if !self.firmware.is_empty() {
                return;
            }
        }
    }
}

/// The read-only bind of a file or directory of the driver's.
pub fn bind(source: &Path, target: &Path, create: &str) -> Option<MountEntry> {
    let create = format!("x-create={create}");
    let options = [create.as_str(), "bind", "ro", "nosuid", "nodev", "private"];
    MountEntry::new(source.to_str()?, target.to_str()?, options.into_iter()).ok()
}

/// A library's name without `.so`, and the whole.
fn split(name: &str) -> Option<(&str, &str)> {
    let end = name.find(".so").filter(|end| matches!(name.as_bytes().get(end + 3), None | Some(b'.')))?;
    Some((name.get(..end)?, name))
}

/// What comes after `.so.` in the name of a file of `library`'s.
fn version_of<'a>(file: &'a str, library: &str) -> Option<&'a str> {
    file.strip_prefix(library)?.strip_prefix(".so.")
}
