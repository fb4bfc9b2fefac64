//! Any bytes as an environ file, before and after hooks: whatever comes out can be a program's environment.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::enroot::environ::{after_hooks, assign, to_lines};
use spank_pyxis::request::Environment;

fuzz_target!(|text: &[u8]| {
    let variable = |name: &str| (name == "HOME").then(|| b"/h\xff \"".to_vec());
    let mut environment = Environment::from_block(b"A=1\0M=line\nbreak\0");
    assign(&mut environment, text, Some(&variable));
    for (name, value) in environment.iter() {
        assert!(!name.is_empty() && !name.contains(&b'=') && !value.contains(&0));
    }
    let before = to_lines(&environment);
    assert_eq!(after_hooks(&environment, &before, &before), environment);
    after_hooks(&environment, &before, text);
});
