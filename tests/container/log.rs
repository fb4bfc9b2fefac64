//! Where a container's start is logged: JSON lines, and a journald of the test's own.

use std::os::unix::net::UnixDatagram;
use std::time::Duration;

use serde_json::Value;

use crate::seed::{IMAGE, Node};
use crate::text;

#[test]
fn json_lines_say_whose_container_it_is() {
    let node = Node::new();
    node.append_config("[log]\nformat = \"json\"\n");
    let log = text(&node.run(&["--verbose"], "true").stderr);
    let entries: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let last = entries.last().unwrap();
    assert!(last["message"].as_str().unwrap().starts_with("completed container setup in "), "{log}");
    assert_eq!(
        (&last["uid"], &last["level"], &last["image"]),
        (&"4242".into(), &"info".into(), &IMAGE.into()),
        "{log}"
    );
    // Nor is a failure only for people.
    let log = text(&node.run(&["--verbose", "--container-mounts=/nonexistent:/x"], "true").stderr);
    let errors = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let errors: Vec<Value> = errors.filter(|entry| entry["level"] == "error").collect();
    assert!(errors.iter().any(|entry| entry["message"].to_string().contains("/nonexistent")), "{log}");
}

#[test]
fn the_journal_gets_fields() {
    let node = Node::new();
    node.append_config("[log]\ndestination = \"journald\"\n");
    let socket = node.host_directory().join("socket");
    let journald = UnixDatagram::bind(&socket).unwrap();
    journald.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    // The journal of a node that has one, for this container only.
    let before = format!(
        "export HOME={0}/closed && mkdir --mode 700 $HOME && mount -t tmpfs run /run && mkdir -p /run/systemd/journal && mount --bind {0} /run/systemd/journal",
        node.host_directory().display()
    );
    // With it something from container init.
    let output = node.run_after(&before, &["--verbose"], "true");
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert_eq!(text(&output.stderr), "", "it is said in one place");
    let mut entries = Vec::new();
    let mut buffer = [0; 1 << 16];
    while !entries.iter().any(|entry: &String| entry.contains("MESSAGE=completed container setup in ")) {
        let length = journald.recv(&mut buffer).unwrap();
        entries.push(String::from_utf8_lossy(&buffer[..length]).into_owned());
    }
    assert!(entries.iter().all(|entry| entry.contains("\nPRIORITY=")), "{entries:?}");
    assert!(
        entries.iter().any(|entry| entry.contains("MESSAGE=cannot read ") && entry.contains("/closed/.config/enroot/")),
        "{entries:?}"
    );
    for entry in entries {
        let image = format!("PYXIS_IMAGE={IMAGE}");
        for field in ["SYSLOG_IDENTIFIER=pyxis", "PYXIS_UID=4242", &image] {
            assert!(entry.lines().any(|line| line == field), "{entry}");
        }
    }
}
