//! Any bytes as what decides about images: a pattern and a name, the manifest of a signature image, a claim, a key, a list of
//! referrers, a bundle.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::image::digest::Digest;
use spank_pyxis::policy::{bundle, cosign};
use spank_pyxis::policy::key::PublicKey;
use spank_pyxis::policy::pattern::Pattern;

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    if let Some((pattern, name)) = text.split_once('\n')
        && let Ok(pattern) = Pattern::parse(pattern)
    {
        pattern.matches(name);
    }
    for signature in cosign::signatures(bytes).unwrap_or_default() {
        assert!(signature.payload.size <= cosign::MAX_PAYLOAD_BYTES);
    }
    // A digest is believed as it stands there, not made up.
    assert!(cosign::claimed(bytes).is_none_or(|digest| text.contains(&digest.hex())));
    let artifacts = bundle::artifacts(bytes).unwrap_or_default();
    assert!(artifacts.iter().all(|artifact| text.contains(&artifact.digest.hex())));
    assert!(bundle::blob(bytes).is_none_or(|blob| blob.size <= bundle::MAX_BUNDLE_BYTES));
    assert!(bundle::verify(bytes, &[], &Digest::from_bytes([1; 32])).is_err());
    if let Ok(key) = PublicKey::from_pem(&text) {
        assert!(!key.verifies(bytes, b"no signature"));
    }
});
