//! Root filesystems that enroot made: `/etc/rc` says how a container starts (behaviour reference, sections 13.2 and 16.2).

use crate::seed::Node;
use crate::{stdout, text};

/// What enroot writes, with an entrypoint.
const RC: &str = "cd /var || exit 1\nFROM_RC=rc; export FROM_RC\n\
                  if [ -s /etc/rc.local ]; then . /etc/rc.local; fi\n\
                  if [ $# -gt 0 ]; then exec busybox env FROM_ENTRYPOINT=yes \"$@\"; else exec busybox sh; fi\n";
const RC_LOCAL: &str = "FROM_RC_LOCAL=local; export FROM_RC_LOCAL\n";
const SHOW: &str = "echo \"$FROM_RC|$FROM_RC_LOCAL|$FROM_ENTRYPOINT|$FROM_PROFILE|$PWD\"";
const ASKED: &str = "--container-entrypoint";

fn node(files: &[(&str, &str)]) -> Node {
    let node = Node::new();
    node.describe_by_files(&[&[("etc/profile", "FROM_PROFILE=profile; export FROM_PROFILE\n")], files].concat());
    node
}

#[test]
fn it_runs_and_the_entrypoint_if_it_is_asked_for() {
    let node = node(&[("etc/rc", RC), ("etc/rc.local", RC_LOCAL)]);
    assert_eq!(stdout(node.run(&[], SHOW)), "rc||||/var");
    assert_eq!(stdout(node.run(&[ASKED], SHOW)), "rc|local|yes||/var");
    assert_eq!(stdout(node.run(&["--container-workdir=/bin"], SHOW)), "rc||||/bin");
    assert_eq!(text(&node.run(&[], "exit 7").stderr), "");
    assert_eq!(node.run(&[], "exit 7").status.code(), Some(7));
}

#[test]
fn nothing_is_left_in_the_way_of_the_next_entrypoint() {
    let node = node(&[("etc/rc", RC)]);
    // Also where the file is missing: its place is made.
    let hidden = stdout(node.run(&["--container-writable"], "cat /etc/rc.local"));
    assert!(hidden.ends_with("exec \"$@\""), "{hidden}");
    assert_eq!(stdout(node.run(&[ASKED], SHOW)), "rc||yes||/var");
}

#[test]
fn the_users_own_rc_local_counts() {
    let node = node(&[("etc/rc", RC), ("etc/rc.local", "exit 9\n")]);
    let own = node.host_directory().join("rc.local");
    std::fs::write(&own, "FROM_RC_LOCAL=own; export FROM_RC_LOCAL\n").unwrap();
    let mount = format!("--container-mounts={}:/etc/rc.local", own.display());
    assert_eq!(stdout(node.run(&[&mount], SHOW)), "rc|own|yes||/var");
}

#[test]
fn profiles_are_read_only_if_somebody_asks_for_a_login() {
    let node = node(&[("etc/rc", RC)]);
    assert_eq!(stdout(node.run_with(&[("ENROOT_LOGIN_SHELL", "no")], &[], SHOW)), "rc||||/var");
    assert_eq!(stdout(node.run_with(&[("ENROOT_LOGIN_SHELL", "yes")], &[], SHOW)), "rc|||profile|/var");
}

#[test]
fn without_it_the_command_runs_at_once() {
    let node = node(&[]);
    assert_eq!(stdout(node.run(&[ASKED], SHOW)), "||||/");
}

#[test]
fn one_that_fails_is_told_with_what_it_said() {
    let node = node(&[("etc/rc", "echo no directory >&2; exit 1\n")]);
    let said = text(&node.run(&[], "echo it ran").stderr);
    assert_eq!(
        said,
        "pyxis: container start failed with error code: 1\npyxis: printing enroot log file:\npyxis:     no directory"
    );
    let said = text(&node.run(&[ASKED], "echo it ran").stderr);
    assert!(
        said.ends_with("pyxis: if the image has an unusual entrypoint, try using --no-container-entrypoint"),
        "{said}"
    );
}
