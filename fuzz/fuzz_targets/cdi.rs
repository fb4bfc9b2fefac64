//! Any text as a file of a CDI specification, JSON or YAML: refused with one line, or a document that names a kind. The parser of
//! plain YAML says what the general one says.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::devices::cdi::document::{Document, Format};

fuzz_target!(|data: &[u8]| {
    if let Some(document) = Document::from_plain_yaml(data) {
        assert_eq!(Document::from_any_yaml(data), Ok(document));
    }
    for format in [Format::Json, Format::Yaml] {
        match Document::parse(data, format) {
            Ok((kind, document)) => {
                assert!(kind.to_string().contains('/') && !document.devices.is_empty());
            }
            Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
        }
    }
});
