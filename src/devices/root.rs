//! What of a root filesystem decides where things of the host's go in it.

#![forbid(unsafe_code)]

use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::ldcache::musl_path_file;
use crate::mounts::rootdir::RootDir;

/// Directory of libraries where Debian's policy holds.
const MULTIARCH: &str = match () {
    () if cfg!(target_arch = "x86_64") => "/usr/lib/x86_64-linux-gnu",
    () if cfg!(target_arch = "aarch64") => "/usr/lib/aarch64-linux-gnu",
    () if cfg!(target_arch = "powerpc64") => "/usr/lib/powerpc64le-linux-gnu",
    () if cfg!(target_arch = "riscv64") => "/usr/lib/riscv64-linux-gnu",
    () => "/usr/lib",
};
/// The same of 32-bit libraries.
const MULTIARCH_32: &str =
    if cfg!(target_arch = "aarch64") { "/usr/lib/arm-linux-gnueabihf" } else { "/usr/lib/i386-linux-gnu" };

/// The traits of one root filesystem.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootTraits {
    /// Whether its dynamic linker is musl's, and not glibc's.
    pub is_musl: bool,
    /// Where libraries go (behaviour reference, section 18.3).
    pub library_directory: String,
    /// Where 32-bit libraries go.
    pub library_directory_32: String,
}

impl RootTraits {
    /// Looks at the root filesystem `root`.
    pub fn of(root: RootDir<'_>) -> Self {
        let is_there = |path: &str| root.open(Path::new(path), OFlags::PATH, Mode::empty()).is_ok();
        let is_debian = is_there("/etc/debian_version");
        let is_musl = is_there(&musl_path_file().0);
        let (native, bits_32) = match is_debian {
            true => (MULTIARCH, MULTIARCH_32),
            false if is_there("/usr/lib32") => ("/usr/lib64", "/usr/lib32"),
            false => ("/usr/lib64", "/usr/lib"),
        };
        // musl looks in /usr/lib by itself, and its images have no other.
        let native = if is_musl && !is_there(native) { "/usr/lib" } else { native };
        Self { is_musl, library_directory: native.into(), library_directory_32: bits_32.into() }
    }

    /// Where a library goes.
    pub fn directory(&self, is_32_bit: bool) -> &str {
        if is_32_bit { &self.library_directory_32 } else { &self.library_directory }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    fn traits(files: &[&str]) -> RootTraits {
        let directory = tempfile::tempdir().unwrap();
        for file in files {
            let path = directory.path().join(file.trim_start_matches('/'));
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        let fd = std::fs::File::open(directory.path()).unwrap();
        RootTraits::of(RootDir::new(fd.as_fd()))
    }

    #[test]
    fn distributions_have_their_directories() {
        let directories = |files: &[&str]| {
            let traits = traits(files);
            (traits.is_musl, traits.library_directory, traits.library_directory_32)
        };
        assert_eq!(directories(&["/etc/debian_version"]), (false, MULTIARCH.into(), MULTIARCH_32.into()));
        assert_eq!(directories(&["/usr/lib64/x"]), (false, "/usr/lib64".into(), "/usr/lib".into()));
        assert_eq!(directories(&["/usr/lib32/x"]), (false, "/usr/lib64".into(), "/usr/lib32".into()));
        let musl = musl_path_file().0;
        assert_eq!(directories(&[&musl]), (true, "/usr/lib".into(), "/usr/lib".into()));
        assert_eq!(directories(&[&musl, "/usr/lib64/x"]), (true, "/usr/lib64".into(), "/usr/lib".into()));
    }
}
