//! Any bytes as an image's `/etc/ld.so.cache`: refused, or written again with the same libraries, of which additions win.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::devices::ldcache::{Addition, Cache, merge};

fuzz_target!(|file: &[u8]| {
    let Ok(cache) = Cache::parse(file) else { return };
    let mut entries = cache.entries.clone();
    let written = cache.to_bytes();
    let mut again = Cache::parse(&written).expect("what is written can be read");
    assert!(again.is_ours());
    entries.sort();
    again.entries.sort();
    assert_eq!(entries, again.entries);

    let addition = |name: &str| Addition { name: name.into(), path: format!("/usr/lib64/{name}"), is_32_bit: false };
    let mut additions = vec![addition("libcuda.so.1")];
    additions.extend(cache.entries.first().and_then(|entry| std::str::from_utf8(entry.name).ok()).map(addition));
    let merged = merge(cache, &additions).to_bytes();
    let merged = Cache::parse(&merged).expect("what is merged can be read");
    for Addition { name, path, .. } in &additions {
        assert!(merged.entries.iter().any(|entry| entry.name == name.as_bytes() && entry.path == path.as_bytes()));
    }
});
