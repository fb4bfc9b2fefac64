//! Any text as an image reference: refused with one short line, or read, and then safe in a URL if it passes the check.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::image::reference::ImageReference;

fuzz_target!(|text: &str| {
    let reference = match ImageReference::parse(text) {
        Ok(reference) => reference,
        Err(error) => return assert_line(&error.to_string()),
    };
    if let Err(error) = reference.check() {
        return assert_line(&error.to_string());
    }
    let path = format!("{}/manifests/{}", reference.repository_path(), reference.tag_or_digest);
    assert!(path.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-:/".contains(&byte)), "{path}");
    assert!(!path.contains("..") || !path.contains("/.."), "{path}");
    let again = ImageReference::parse(&reference.to_string()).unwrap();
    assert_eq!(again.registry, reference.registry);
    assert_eq!(again.repository_path(), reference.repository_path());
    assert_eq!(again.tag_or_digest, reference.tag_or_digest);
});

fn assert_line(line: &str) {
    assert!(line.len() < 3000 && !line.contains(['\n', '\r', '\x1b']), "{line:?}");
}
