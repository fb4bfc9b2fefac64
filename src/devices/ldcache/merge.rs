//! The cache of a container: its image's, and the libraries that have appeared in it.

use std::collections::HashSet;

use super::{Abi, Cache, Entry};

/// A library that has appeared.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addition {
    /// What programs ask for.
    pub name: String,
    /// Where it is in the container.
    pub path: String,
    /// Whether it is for 32-bit programs.
    pub is_32_bit: bool,
}

/// `image` with `additions`, which take the place of what has the same name: also of variants for particular processors,
/// which the linker would prefer.
pub fn merge<'a>(image: Cache<'a>, additions: &'a [Addition]) -> Cache<'a> {
    let abi = |addition: &Addition| if addition.is_32_bit { Abi::Bits32 } else { Abi::Native };
    let names: HashSet<(&[u8], Abi)> =
        additions.iter().map(|addition| (addition.name.as_bytes(), abi(addition))).collect();
    let mut entries: Vec<Entry<'a>> = additions
        .iter()
        .map(|addition| Entry {
            name: addition.name.as_bytes(),
            path: addition.path.as_bytes(),
            flags: abi(addition).flags(),
            os_version: 0,
            hwcap: 0,
        })
        .collect();
    entries.extend(image.entries.into_iter().filter(|entry| !names.contains(&(entry.name, entry.abi()))));
    Cache { entries, hwcaps: image.hwcaps, generator: None }
}
