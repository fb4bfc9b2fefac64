//! Any bytes as a manifest, an index and an image config: refused, or read within the bounds that the rest relies on.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::image::config::ImageConfig;
use spank_pyxis::image::manifest::{Document, MAX_LAYERS};
use spank_pyxis::image::platform::Platform;

fuzz_target!(|bytes: &[u8]| {
    match Document::parse(bytes, None) {
        Ok(Document::Manifest(manifest)) => assert!((1..=MAX_LAYERS).contains(&manifest.layers.len())),
        Ok(Document::Index(index)) => {
            let host = Platform { os: "linux".into(), architecture: "amd64".into(), variant: Some("v3".into()) };
            if let Err(error) = index.choose(&host) {
                assert!(!error.to_string().contains('\n'));
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
    match ImageConfig::parse(bytes) {
        Ok(config) => {
            assert!(config.diff_ids.len() <= MAX_LAYERS);
            assert!(config.env.iter().chain(&config.entrypoint).chain(&config.cmd).all(|text| !text.contains('\0')));
        }
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
