//! The data symbols Slurm reads when it loads a plugin, and how one file satisfies every release.
//!
//! Slurm compares `plugin_version` with its own release (major and minor) after dlopen(3), that is, after the library's
//! constructors have run. So a constructor fills the number in, from the running process: `slurm_api_version()` is
//! visible in all of them. It returns the number of the programming interface (36 for 20.11, 38 for 22.05), hence the
//! table.

use std::ffi::c_long;
use std::sync::atomic::{AtomicU32, Ordering};

use super::symbols;

/// Name of the plugin: part of the names of the environment variables through which Slurm relays options, which sites
/// set themselves.
#[allow(non_upper_case_globals)]
#[unsafe(no_mangle)]
pub static plugin_name: [u8; 6] = *b"pyxis\0";

/// Kind of the plugin.
#[allow(non_upper_case_globals)]
#[unsafe(no_mangle)]
pub static plugin_type: [u8; 6] = *b"spank\0";

/// The running Slurm's release. Before the constructor has run, and where it finds nothing, the release of the headers
/// the plugin was built with: Slurm then refuses it with a clear message, unless they happen to agree.
///
/// An atomic, because a plain `static` would lie in read-only memory.
#[allow(non_upper_case_globals)]
#[unsafe(no_mangle)]
pub static plugin_version: AtomicU32 = AtomicU32::new(spank_sys::SLURM_VERSION_NUMBER);

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = fill_in_version;

/// Runs in every process that maps the library, perhaps twice (Slurm loads a plugin given by a relative path to look at
/// it first): no allocation, nothing to undo.
extern "C" fn fill_in_version() {
    if let Some(version) = symbols::api_version().and_then(release_of_api) {
        plugin_version.store(version, Ordering::Relaxed);
    }
}

/// Slurm's `SLURM_VERSION_NUM(major, minor, 0)` for the release with this `slurm_api_version()`.
///
/// From 24.05 (API 41) on there are two releases a year, in May and November, and each has the next API number.
fn release_of_api(version: c_long) -> Option<u32> {
    let api = u32::try_from(version).ok()? >> 16;
    let (major, minor) = match api {
        36 => (20, 11),
        37 => (21, 8),
        38 => (22, 5),
        39 => (23, 2),
        40 => (23, 11),
        41..=255 => (24 + (api - 41) / 2, if (api - 41) % 2 == 0 { 5 } else { 11 }),
        _ => return None,
    };
    Some(major << 16 | minor << 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_by_their_api_number() {
        for (api, major, minor) in [
            (36, 20, 11),
            (37, 21, 8),
            (38, 22, 5),
            (39, 23, 2),
            (40, 23, 11),
            (41, 24, 5),
            (42, 24, 11),
            (43, 25, 5),
            (44, 25, 11),
            (45, 26, 5),
            (46, 26, 11),
        ] {
            assert_eq!(release_of_api(api << 16), Some(major << 16 | minor << 8), "{api}");
        }
        assert_eq!(release_of_api(0x260001), Some(0x160500), "AGE and REVISION do not count");
        for unknown in [0, 35 << 16, 256 << 16, -1, c_long::MAX] {
            assert_eq!(release_of_api(unknown), None);
        }
    }

    #[test]
    fn without_slurm_the_build_version_stays() {
        assert_eq!(plugin_version.load(Ordering::Relaxed), spank_sys::SLURM_VERSION_NUMBER);
    }
}
