//! The data symbols Slurm reads when it loads a plugin, and how one file satisfies every release.
//!
//! Slurm compares `plugin_version` with its own release (major and minor) after dlopen(3), that is, after the library's
//! constructors have run. So a constructor fills the number in, from the running process: `slurm_api_version()` is
//! visible in all of them. It returns the number of the programming interface (36 for 20.11, 38 for 22.05), hence the
//! table. Where a release is not in it, its own plugins tell, in the process or beside its library.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

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

/// The highest API number whose release is known, that of 26.11, and not reckoned.
const NEWEST_KNOWN: u32 = 46;

/// Where the version comes from, if the release is not in the table; read by [`warning`].
static GUESS: AtomicU8 = AtomicU8::new(KNOWN);
const KNOWN: u8 = 0;
const BY_OTHER_PLUGINS: u8 = 1;
const BY_COUNTING: u8 = 2;
const BY_NOTHING: u8 = 3;

/// Runs in every process that maps the library, perhaps twice (Slurm loads a plugin given by a relative path to look at
/// it first): no allocation of ours, nothing to undo.
extern "C" fn fill_in_version() {
    let api = symbols::api_version().and_then(|version| u32::try_from(version).ok()).map(|version| version >> 16);
    let (version, guess) = match api {
        Some(api @ ..=NEWEST_KNOWN) if let Some(version) = release_of_api(api) => (Some(version), KNOWN),
        // Not in Slurm.
        None if !symbols::are_there() => return,
        _ => match (symbols::version_of_other_plugins(is_release), api.and_then(release_of_api)) {
            (Some(version), _) => (Some(version), BY_OTHER_PLUGINS),
            (None, Some(version)) => (Some(version), BY_COUNTING),
            (None, None) => (None, BY_NOTHING),
        },
    };
    GUESS.store(guess, Ordering::Relaxed);
    if let Some(version) = version {
        plugin_version.store(version, Ordering::Relaxed);
    }
}

/// A line for the log of a node whose Slurm is of a release that is not in the table.
pub fn warning() -> Option<String> {
    let guess = GUESS.load(Ordering::Relaxed);
    let reason = match guess {
        KNOWN => return None,
        BY_OTHER_PLUGINS => "which its other plugins say",
        BY_COUNTING => "reckoned from two releases a year",
        _ => "for want of anything better",
    };
    let version = plugin_version.load(Ordering::Relaxed);
    Some(format!(
        "pyxis: this Slurm is of a release that v{} does not know; it is taken for {}.{:02}, {reason}: if steps with \
         containers fail, look for a newer pyxis",
        env!("CARGO_PKG_VERSION"),
        version >> 16,
        version >> 8 & 0xff,
    ))
}

/// Whether a number looks like `SLURM_VERSION_NUM(major, minor, micro)`.
fn is_release(version: u32) -> bool {
    (20..=99).contains(&(version >> 16)) && (1..=12).contains(&(version >> 8 & 0xff))
}

/// Slurm's `SLURM_VERSION_NUM(major, minor, 0)` for the release with this API number.
///
/// From 24.05 (API 41) on there are two releases a year, in May and November, and each has the next API number.
fn release_of_api(api: u32) -> Option<u32> {
    let (major, minor) = match api {
        36 => (20, 11),
        37 => (21, 8),
        38 => (22, 5),
        39 => (23, 2),
        40 => (23, 11),
        41..=190 => (24 + (api - 41) / 2, if (api - 41).is_multiple_of(2) { 5 } else { 11 }),
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
            assert_eq!(release_of_api(api), Some(major << 16 | minor << 8), "{api}");
            assert!(is_release(major << 16 | minor << 8));
        }
        for unknown in [0, 35, 191, u32::MAX] {
            assert_eq!(release_of_api(unknown), None);
        }
        for other in [0, 1, 0x130b00, 0x1a0000, 0x1a0d00, u32::MAX] {
            assert!(!is_release(other), "{other:x}");
        }
    }

    #[test]
    fn without_slurm_the_build_version_stays() {
        assert_eq!(plugin_version.load(Ordering::Relaxed), spank_sys::SLURM_VERSION_NUMBER);
        assert_eq!(warning(), None);
    }
}
