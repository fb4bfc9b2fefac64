//! Any text as a `registries.conf`: read or refused in one line, and what passes the check gives endpoints; and as a
//! `pyxis.toml`.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use spank_pyxis::config::Config;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::registry::config::RegistryConfig;
use spank_pyxis::registry::containers::Registries;

fuzz_target!(|text: &str| {
    let _ = Config::parse(text, Path::new("/etc/pyxis/pyxis.toml"));
    let mut found = Registries::default();
    if let Err(error) = found.add(text) {
        assert!(!error.contains('\n'), "{error}");
        return;
    }
    let config =
        RegistryConfig { registry: found.registry, short_names: found.short_names, ..RegistryConfig::default() };
    if config.check().is_err() {
        return;
    }
    for typed in ["fedora", "quay.io/a/b:1", "a.example.com/x/y/z"] {
        let Ok(reference) = ImageReference::parse(typed) else { continue };
        for candidate in config.short_names.candidates(&reference) {
            assert_eq!(config.only_for(&candidate).endpoints(&candidate), config.endpoints(&candidate));
            let _ = config.blocked(&candidate);
        }
    }
});
