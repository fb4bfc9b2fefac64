//! Single files, and the rules of the specification for them.

use super::*;

const ENV: &str = r#"{"env": ["A=1"]}"#;

fn judge(text: &str) -> Result<(), String> {
    let json = Document::parse(text.as_bytes(), Format::Json).map(|_| ()).map_err(|error| error.to_string());
    // JSON is YAML, and both judge alike.
    let yaml = Document::parse(text.as_bytes(), Format::Yaml).map(|_| ()).map_err(|error| error.to_string());
    assert_eq!(json.is_ok(), yaml.is_ok(), "{text}: {json:?} {yaml:?}");
    json
}

#[test]
fn edits_that_are_valid() {
    for edits in [
        ENV,
        r#"{"deviceNodes": [{"path": "/dev/null"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/null", "type": "c"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/null", "type": "b", "permissions": "rwm"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/null", "permissions": "none"}]}"#,
        r#"{"deviceNodes": [{"path": "/dev/x", "type": "u", "major": 1, "minor": 3, "fileMode": 438, "uid": 0, "gid": 0}]}"#,
        r#"{"mounts": [{"hostPath": "/dev/ctl", "containerPath": "/dev/ctl"}]}"#,
        r#"{"mounts": [{"hostPath": "/dev/ctl", "containerPath": "/dev/ctl", "options": ["ro", "rbind"]}]}"#,
        r#"{"hooks": [{"hookName": "prestart", "path": "/bin/h", "args": ["-v"], "env": ["V=1"]}]}"#,
        r#"{"hooks": [{"hookName": "createRuntime", "path": "/bin/h"}, {"hookName": "createContainer", "path": "/h"}]}"#,
        r#"{"hooks": [{"hookName": "startContainer", "path": "/bin/h", "timeout": 5}]}"#,
        r#"{"hooks": [{"hookName": "poststart", "path": "/bin/h"}, {"hookName": "poststop", "path": "/bin/h"}]}"#,
        r#"{"env": ["EMPTY="], "mounts": null}"#,
    ] {
        assert_eq!(judge(&document("0.3.0", edits, "{}")), Ok(()), "{edits}");
        assert_eq!(judge(&document("1.1.0", ENV, edits)), Ok(()), "{edits}");
    }
}

#[test]
fn edits_that_are_not() {
    for (edits, problem) in [
        (r#"{"env": [""]}"#, "env: \"\" is no NAME=VALUE"),
        (r#"{"env": ["=foo"]}"#, "env: \"=foo\" is no NAME=VALUE"),
        (r#"{"env": ["FOOBAR"]}"#, "env: \"FOOBAR\" is no NAME=VALUE"),
        (r#"{"deviceNodes": [{"path": ""}]}"#, "device node \"\": must be an absolute path"),
        (r#"{"deviceNodes": [{"path": "dev/null"}]}"#, "device node \"dev/null\": must be an absolute path"),
        (r#"{"deviceNodes": [{"path": "/dev/x", "type": "f"}]}"#, "device node /dev/x: unknown type \"f\""),
        (
            r#"{"deviceNodes": [{"path": "/dev/x", "permissions": "to land"}]}"#,
            "device node /dev/x: unknown permissions \"to land\"",
        ),
        (r#"{"deviceNodes": [{"path": "/dev/x", "major": -1}]}"#, "device node /dev/x: negative number -1:0"),
        (
            r#"{"mounts": [{"hostPath": "", "containerPath": "/dev/ctl"}]}"#,
            "mount of \"\" at \"/dev/ctl\": must be absolute paths",
        ),
        (
            r#"{"mounts": [{"hostPath": "/dev/ctl", "containerPath": ""}]}"#,
            "mount of \"/dev/ctl\" at \"\": must be absolute paths",
        ),
        (r#"{"hooks": [{"hookName": "prestart", "path": ""}]}"#, "hook prestart: \"\" must be an absolute path"),
        (r#"{"hooks": [{"hookName": "misCreate", "path": "/h"}]}"#, "unknown hook \"misCreate\""),
        (r#"{"hooks": [{"hookName": "poststart", "path": "/h", "env": ["=v"]}]}"#, "hook: \"=v\" is no NAME=VALUE"),
        (
            r#"{"hooks": [{"hookName": "poststop", "path": "/h", "timeout": 0}]}"#,
            "hook poststop: timeout must be at least 1",
        ),
    ] {
        assert_eq!(judge(&document("0.6.0", edits, "{}")), Err(format!(": the device \"dev\": {problem}")), "{edits}");
        assert_eq!(judge(&document("0.6.0", ENV, edits)), Err(format!(": containerEdits: {problem}")), "{edits}");
    }
}

#[test]
fn features_and_the_versions_that_have_them() {
    let node = r#"{"deviceNodes": [{"path": "/dev/x", "hostPath": "/dev/y"}]}"#;
    let typed = r#"{"mounts": [{"hostPath": "tmpfs", "containerPath": "/t", "type": "tmpfs"}]}"#;
    let wildcard = r#"{"deviceNodes": [{"path": "/dev/dri/card*"}]}"#;
    for (first, edits) in [
        ("0.4.0", typed),
        ("0.5.0", node),
        ("0.7.0", r#"{"intelRdt": {"closID": "c"}}"#),
        ("0.7.0", r#"{"additionalGids": [44]}"#),
        ("0.7.0", r#"{"additionalGIDs": [44]}"#),
        ("1.1.0", r#"{"netDevices": [{"hostInterfaceName": "eth1", "name": "eth0"}]}"#),
        ("1.1.0", r#"{"intelRdt": {"schemata": ["L3:0=f"]}}"#),
        ("1.1.0", r#"{"intelRdt": {"enableMonitoring": true}}"#),
        ("1.2.0", r#"{"deviceCgroupRules": [{"type": "c", "major": 226, "minor": -1, "permissions": "rw"}]}"#),
    ] {
        let versions = ["0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0", "1.2.0"];
        for version in versions {
            for text in [document(version, edits, "{}"), document(version, ENV, edits)] {
                let judged = judge(&text);
                assert_eq!(judged.is_ok(), version >= first, "{version}: {edits}: {judged:?}");
                assert!(judged.err().is_none_or(|error| error.contains(&format!("needs cdiVersion {first}"))));
            }
        }
    }
    let changed = |from: &str, to: &str| judge(&document("0.5.0", ENV, "{}").replace(from, to));
    assert_eq!(changed("dev\"", "0\""), Ok(()));
    assert!(changed("\"0.5.0\"", "\"0.4.0\"").is_ok());
    let digit = document("0.4.0", ENV, "{}").replace("\"dev\"", "\"0\"");
    assert_eq!(
        judge(&digit).unwrap_err(),
        ": a device name that begins with a digit needs cdiVersion 0.5.0, and it says 0.4.0"
    );
    assert!(changed("com/device", "com/device.sub").unwrap_err().contains("a dot in the class needs cdiVersion 0.6.0"));
    assert!(
        changed("\"devices\"", "\"annotations\": {\"a\": \"b\"}, \"devices\"").unwrap_err().contains("annotations")
    );
    assert!(changed("\"name\"", "\"annotations\": {\"a\": \"b\"}, \"name\"").unwrap_err().contains("annotations"));
    let old = r#"{"intelRdt": {"enableCMT": true}}"#;
    assert_eq!(judge(&document("1.0.0", old, "{}")), Ok(()));
    assert!(judge(&document("1.1.0", old, "{}")).unwrap_err().contains("gone since cdiVersion 1.1.0"));
    // Before, the characters have no meaning.
    assert_eq!(judge(&document("1.1.0", wildcard, "{}")), Ok(()));
    for (path, problem) in [
        (r#""path": "/dev/*/card""#, "only the last element of a path may be a pattern"),
        (r#""path": "/dev/card*", "hostPath": "/x/render*""#, "path and hostPath must end with the same pattern"),
        (r#""path": "/dev/card*", "type": "c""#, "a pattern goes without type, major and minor"),
    ] {
        let text = document("1.2.0", &format!(r#"{{"deviceNodes": [{{{path}}}]}}"#), "{}");
        assert!(judge(&text).unwrap_err().ends_with(problem), "{path}");
    }
}

#[test]
fn device_cgroup_rules() {
    let rules = |list: &str| format!(r#"{{"deviceCgroupRules": [{list}]}}"#);
    let good = rules(
        r#"{"type": "c", "major": 226, "minor": -1, "permissions": "rw"}, {"type": "b", "major": 8, "minor": 0}"#,
    );
    assert_eq!(judge(&document("1.2.0", &good, &good)), Ok(()));
    for (rule, problem) in [
        (r#"{"type": "c", "major": 226, "minor": -2}"#, "deviceCgroupRules: c 226:-2 \"\""),
        (r#"{"type": "c", "major": 0, "minor": 1}"#, "deviceCgroupRules: c 0:1 \"\""),
        (r#"{"type": "c", "major": 226}"#, "missing field `minor`"),
        (r#"{"type": "c", "minor": 1}"#, "missing field `major`"),
        (r#"{"type": "c", "major": 226, "minor": "*"}"#, "invalid type: string \"*\""),
        (r#"{"type": "u", "major": 226, "minor": 1}"#, "deviceCgroupRules: u 226:1 \"\""),
    ] {
        let error = judge(&document("1.2.0", &rules(rule), "{}")).unwrap_err();
        assert!(error.contains(problem), "{rule}: {error}");
    }
}

#[test]
fn documents_that_are_none() {
    let change = |from: &str, to: &str| judge(&document("0.6.0", ENV, "{}").replace(from, to)).unwrap_err();
    for version in ["", "0.1.0", "0.2.0", "0.6.1", "2.0.0", "latest"] {
        assert!(change("\"0.6.0\"", &format!("{version:?}")).contains("known are 0.3.0 to 1.2.0"), "{version}");
    }
    assert!(change("vendor.com/device", "vendor.com").contains("is no kind of devices"));
    assert!(change("vendor.com/device", "vendor.com/d/e").contains("the class \"d/e\""));
    assert!(change("\"dev\"", "\"-dev\"").contains("must begin with a letter or digit"));
    assert!(change(ENV, "{}").ends_with("the device \"dev\" has no containerEdits"));
    let twice = document("0.6.0", ENV, "{}")
        .replace("\"devices\": [", "\"devices\": [{\"name\": \"dev\", \"containerEdits\": {\"env\": [\"A=1\"]}}, ");
    assert!(judge(&twice).unwrap_err().ends_with("the device \"dev\" is there twice"));
    let none = r#"{"cdiVersion": "0.6.0", "kind": "v.com/d", "devices": []}"#;
    assert_eq!(judge(none).unwrap_err(), ": devices: it has none");
    assert!(change("\"kind\"", "\"kined\"").contains("unknown field `kined`"));
    assert!(change("containerEdits\": {}", "containerEdits\": 7").starts_with(":2:"));
}

#[test]
fn malformed_files_are_named_with_the_place() {
    let place = |text: &str, format| Document::parse(text.as_bytes(), format).unwrap_err().to_string();
    assert_eq!(place("{\n  \"kind\": 7}", Format::Json), ":2:11: invalid type: integer `7`, expected a string");
    let yaml = "cdiVersion: 0.6.0\nkind: v.com/d\ndevices:\n  - name: [a\n";
    let error = place(yaml, Format::Yaml);
    assert!(error.starts_with(":4:") || error.starts_with(":5:"), "{error}");
    let unknown = "cdiVersion: 0.6.0\nkind: v.com/d\nnodes: 1\n";
    let error = place(unknown, Format::Yaml);
    assert!(error.starts_with(":3:1: ") && error.contains("nodes") && !error.contains('\n'), "{error}");
    let deep = "[".repeat(100_000);
    for format in [Format::Json, Format::Yaml] {
        assert!(!place(&deep, format).contains('\n'));
        assert!(!place("", format).is_empty());
    }
}

proptest! {
    #[test]
    fn nothing_panics_and_every_error_is_one_line(text in "(cdiVersion|kind|devices|name|env|: |- |\\[|\\]|\\{|\\}|\"|,|0\\.5\\.0|v/c|A=1|\n|  ){0,40}") {
        for format in [Format::Json, Format::Yaml] {
            if let Err(error) = Document::parse(text.as_bytes(), format) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }
    }
}
