//! Any text as `enroot.conf`, without a shell: refused with one line that names the place, or evaluated.
#![no_main]

use std::path::PathBuf;

use libfuzzer_sys::fuzz_target;
use spank_pyxis::enroot::conf::{EnrootConf, Identity};
use spank_pyxis::request::Environment;

fuzz_target!(|text: String| {
    let identity = Identity {
        uid: 1000,
        gid: 1000,
        name: "ada".into(),
        group: "users".into(),
        home: "/home/ada".into(),
        cwd: "/".into(),
    };
    let environment = Environment::from_block(b"HOME=/h\0ENROOT_DATA_PATH=/data\0");
    let files = [(PathBuf::from("/etc/enroot/enroot.conf"), text, false)];
    match EnrootConf::evaluate(&files, &environment, &identity) {
        Ok(conf) => {
            assert_eq!(conf.get("ENROOT_DATA_PATH"), Some("/data"));
            for (name, value) in conf.environment().iter() {
                assert!(!name.is_empty() && !value.contains(&0), "{:?}", String::from_utf8_lossy(name));
            }
        }
        Err(error) => assert!(!error.to_string().contains('\n'), "{error}"),
    }
});
