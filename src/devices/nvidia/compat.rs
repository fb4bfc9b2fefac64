//! CUDA forward compatibility (CUDA Compatibility guide): an image made for a newer CUDA than the node's driver has brings the
//! user-space part of a newer driver along. Where that is newer, programs in the container have to find it in place of the
//! node's: as `nvidia-container-cli` and the hook `enable-cuda-compat` of `nvidia-cdi-hook` have it.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};

use super::driver::is_version;
use crate::devices::edits::{Library, Origin};
use crate::mounts::rootdir::RootDir;

/// Where images have it.
pub const DIRECTORY: &str = "/usr/local/cuda/compat";
/// More files than any image has there.
const MAX_FILES: usize = 256;
/// GPUs that run no CUDA but that of their driver: product lines, as requirements call them.
const WITHOUT: [&str; 3] = ["geforce", "geforcertx", "titan"];

/// What an image has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compat {
    /// Version of the driver that it is a part of.
    pub version: String,
    libraries: Vec<Library>,
}

/// Whether it is of no use to GPUs of this product line: CUDA would refuse to start.
pub fn is_useless_for(brand: &str) -> bool {
    WITHOUT.contains(&brand)
}

impl Compat {
    /// That of `image`, if it is newer than `driver`: by the first number of its version, as of one release of CUDA the
    /// programs run with any driver of its branch.
    pub fn find(image: RootDir<'_>, driver: &str) -> Option<Self> {
        let directory = image.open(Path::new(DIRECTORY), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).ok()?;
        let entries = Dir::read_from(&directory).ok()?.take(MAX_FILES).flatten();
        let is_library = |name: &&str| name.starts_with("lib") && name.contains(".so.");
        let names: BTreeSet<String> =
            entries.filter_map(|entry| utf8(entry.file_name()).filter(is_library).map(str::to_owned)).collect();
        // By what names lead to.
        let mut found: BTreeMap<(u64, u64), (Option<String>, Vec<String>)> = BTreeMap::new();
        for name in names {
            let path = Path::new(DIRECTORY).join(&name);
            let target = image.open(&path, OFlags::PATH, Mode::empty()).and_then(rustix::fs::fstat);
            let Ok(status) = target.as_ref().map_err(|_| ()) else { continue };
            if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
                continue;
            }
            let own = rustix::fs::statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW);
            let is_file = own.is_ok_and(|own| FileType::from_raw_mode(own.st_mode) == FileType::RegularFile);
            let (file, names) = found.entry((status.st_dev, status.st_ino)).or_default();
            match is_file {
                true => *file = Some(name),
                false => names.push(name),
            }
        }
        let files = || found.values().filter_map(|(file, _)| file.as_deref());
        let mut versions = files().filter_map(|file| file.strip_prefix("libcuda.so.")).filter(|rest| is_version(rest));
        let version = versions.next().filter(|_| versions.next().is_none())?.to_owned();
        if major(&version)? <= major(driver)? {
            return None;
        }
        let library = |(file, mut names): (Option<String>, Vec<String>)| {
            let file = file?;
            let path = PathBuf::from(DIRECTORY).join(&file);
            if file.starts_with("libcuda.so.") {
                names.extend(["libcuda.so", "libcuda.so.1"].map(str::to_owned));
            }
            names.push(file.clone());
            names.sort_unstable();
            names.dedup();
            names.retain(|name| *name != file);
            names.insert(0, file);
            Some(Library { origin: Origin::Image, path, is_32_bit: false, names })
        };
        Some(Self { version, libraries: found.into_values().filter_map(library).collect() })
    }

    /// Puts it in place of the libraries of the same names among `libraries`.
    pub fn replace(self, libraries: &mut Vec<Library>) {
        let names: BTreeSet<&String> = self.libraries.iter().flat_map(|library| &library.names).collect();
        for library in libraries.iter_mut().filter(|library| !library.is_32_bit) {
            library.names.retain(|name| !names.contains(name));
        }
        libraries.retain(|library| !library.names.is_empty());
        libraries.extend(self.libraries);
    }

    /// For the node's log.
    pub fn describe(&self, driver: &str) -> String {
        format!(
            "NVIDIA: CUDA is the image's ({DIRECTORY}, driver {}), which is newer than the node's ({driver})",
            self.version
        )
    }
}

fn utf8(name: &CStr) -> Option<&str> {
    name.to_str().ok()
}

fn major(version: &str) -> Option<u32> {
    version.split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    use super::*;

    fn with_image(files: &[&str], links: &[(&str, &str)], test: impl FnOnce(RootDir<'_>)) {
        let directory = tempfile::tempdir().unwrap();
        let compat = directory.path().join("usr/local/cuda-13.1/compat");
        fs::create_dir_all(&compat).unwrap();
        symlink("/usr/local/cuda-13.1", directory.path().join("usr/local/cuda")).unwrap();
        for file in files {
            fs::write(compat.join(file), "").unwrap();
        }
        for (name, target) in links {
            symlink(target, compat.join(name)).unwrap();
        }
        let root = fs::File::open(directory.path()).unwrap();
        test(RootDir::new(root.as_fd()));
    }

    const FILES: [&str; 2] = ["libcuda.so.590.44.01", "libnvidia-nvvm.so.590.44.01"];
    const LINKS: [(&str, &str); 3] = [
        ("libcuda.so.1", "libcuda.so.590.44.01"),
        ("libnvidia-nvvm.so.4", "libnvidia-nvvm.so.590.44.01"),
        ("libcuda.so", "libcuda.so.1"),
    ];

    #[test]
    fn what_is_newer_takes_the_names() {
        with_image(&FILES, &LINKS, |image| {
            let compat = Compat::find(image, "580.159.04").unwrap();
            assert_eq!(compat.version, "590.44.01");
            let host = |names: &[&str]| Library {
                origin: Origin::Host,
                path: "/usr/lib/x".into(),
                is_32_bit: false,
                names: names.iter().map(|&name| name.to_owned()).collect(),
            };
            let mut libraries = vec![
                host(&["libcuda.so.580.159.04", "libcuda.so", "libcuda.so.1"]),
                host(&["libnvidia-ml.so.580.159.04", "libnvidia-ml.so.1"]),
            ];
            compat.replace(&mut libraries);
            let shown: Vec<(Origin, String)> =
                libraries.iter().map(|library| (library.origin, library.names.join(" "))).collect();
            let mut expected = [
                (Origin::Host, "libcuda.so.580.159.04"),
                (Origin::Host, "libnvidia-ml.so.580.159.04 libnvidia-ml.so.1"),
                (Origin::Image, "libcuda.so.590.44.01 libcuda.so libcuda.so.1"),
                (Origin::Image, "libnvidia-nvvm.so.590.44.01 libnvidia-nvvm.so.4"),
            ]
            .map(|(origin, names)| (origin, names.to_owned()));
            expected[2..].sort();
            let mut shown = shown;
            shown[2..].sort();
            assert_eq!(shown, expected);
            assert_eq!(libraries[2].path.parent(), Some(Path::new(DIRECTORY)));
        });
    }

    #[test]
    fn what_is_not_newer_or_not_clear_is_left_alone() {
        with_image(&FILES, &LINKS, |image| {
            for driver in ["590.1", "590.159.04", "600.1", "1000.1", ""] {
                assert_eq!(Compat::find(image, driver), None, "{driver}");
            }
        });
        with_image(&[FILES[0], "libcuda.so.595.1"], &LINKS, |image| assert_eq!(Compat::find(image, "580.1"), None));
        with_image(&["libcuda.so.x"], &[], |image| assert_eq!(Compat::find(image, "580.1"), None));
        with_image(&[], &[("libcuda.so.590.1", "/nowhere")], |image| assert_eq!(Compat::find(image, "580.1"), None));
        let empty = tempfile::tempdir().unwrap();
        let root = fs::File::open(empty.path()).unwrap();
        assert_eq!(Compat::find(RootDir::new(root.as_fd()), "580.1"), None);
    }

    #[test]
    fn consumers_gpus_have_no_use_for_it() {
        assert!(is_useless_for("geforcertx") && !is_useless_for("tesla") && !is_useless_for("nvidia"));
    }
}
