//! Any text as a `WWW-Authenticate` header: read without failing, and without inventing anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::registry::challenge;

fuzz_target!(|header: &str| {
    for challenge in challenge::parse(header) {
        assert!(header.to_ascii_lowercase().contains(&challenge.scheme));
        for name in ["realm", "service", "scope"] {
            assert!(challenge.parameter(name).is_none_or(|value| value.len() <= header.len()));
        }
    }
});
