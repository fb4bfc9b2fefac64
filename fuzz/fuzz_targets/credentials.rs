//! Any text as a file of credentials, in Docker's form or in netrc's: read without failing, and without running anything.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::registry::credentials::{Keyring, Query, SiteKeys};

fuzz_target!(|text: &str| {
    let registry = "quay.io:443".to_owned();
    let mut keys = SiteKeys::default();
    keys.add(vec![registry.clone()], "F".into(), text.to_owned());
    for (repository, realm, user) in [("a/b", "auth.quay.io", None), ("x", "quay.io", Some("u".to_owned()))] {
        let query = Query { registry: registry.clone(), repository: repository.into(), realm: realm.into(), user };
        let answer = keys.find(&query);
        if let Some(found) = &answer.credential {
            assert!(query.user.is_none() || query.user.as_ref() == Some(&found.user) || found.user.is_empty());
        }
        assert!(answer.tried().lines().count() <= 1);
    }
});
