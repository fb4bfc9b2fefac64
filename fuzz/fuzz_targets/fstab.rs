//! Any text as an fstab file: refused with one short line, or understood.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::mounts::fstab::{Fstab, Pass};

fuzz_target!(|text: &str| {
    let variable = |name: &str| (name == "HOME").then(|| b"/h o\nme".to_vec());
    for variables in [None, Some(&variable as &dyn Fn(&str) -> Option<Vec<u8>>)] {
        match Fstab::parse(text, "/f", variables) {
            Ok(fstab) => {
                assert!(fstab.entries.len() <= text.lines().count());
                for entry in fstab.of(Pass::BeforeHooks).chain(fstab.of(Pass::AfterHooks)) {
                    assert!(!entry.source.is_empty() && !entry.target.is_empty(), "{entry:?}");
                }
                assert!(fstab.warnings.iter().all(|line| !line.contains('\n')));
            }
            Err(error) => assert!(error.to_string().len() < 1200 && !error.to_string().contains('\n'), "{error}"),
        }
    }
});
