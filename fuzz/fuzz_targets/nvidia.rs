//! Any text as what the NVIDIA driver shows in procfs, as a requirement of an image, and as a list of devices.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spank_pyxis::devices::nvidia::driver::{BusId, Gpu, is_version, parse_minor, parse_version};
use spank_pyxis::devices::nvidia::inventory::Inventory;
use spank_pyxis::devices::nvidia::require::{Facts, Requirement};
use spank_pyxis::devices::nvidia::wish::Wish;

fuzz_target!(|text: &str| {
    assert!(parse_version(text).is_none_or(|version| is_version(&version)));
    if let Some(gpu) = Gpu::parse(text, text.to_owned()) {
        assert!(gpu.uuid.is_none_or(|uuid| uuid.len() == 40));
        assert_eq!(BusId::parse(&gpu.bus.to_string()), Some(gpu.bus));
    }
    let _ = (parse_minor(text), Inventory::parse(text.as_bytes(), ""));
    if let Some(requirement) = Requirement::parse(text) {
        let facts = Facts { driver: Some("580.159.04"), cuda: Some("13.0"), brand: Some("nvidia"), arch: Some("9.0") };
        requirement.holds(&facts);
        assert!(requirement.holds(&Facts::default()));
    }
    for name in ["NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_REQUIRE_X", "NVIDIA_IMEX_CHANNELS"] {
        let job = [format!("{name}={text}")].iter().collect();
        if let Err(error) = Wish::read(&job, &job) {
            let error = error.to_string();
            assert!(!error.contains('\n') && error.len() < 8000, "{error}");
        }
    }
});
