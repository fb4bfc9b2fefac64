//! In a stand-in for Slurm's processes, `host.c`.

use std::path::Path;
use std::process::Command;
use std::sync::OnceLock;

use super::{plugin, run};

/// `S_CTX_*`.
const LOCAL: &str = "1";
const REMOTE: &str = "2";
const ALLOCATOR: &str = "3";
const SLURMD: &str = "4";

/// The commands of a step manager of job 7, step 0, with two tasks; this user's, so that a task can be joined.
const STEP: [&str; 6] = ["item:0=0", "item:1=0", "item:2=7", "item:3=0", "item:6=2", "item:7=2"];

/// Has the host load the plugin and run commands; `load` among them loads it again. Gives the host's lines.
fn host(context: &str, api_version: u32, commands: &[&str]) -> Vec<String> {
    let load = format!("load:{}", plugin().display());
    let commands = commands.iter().map(|command| if *command == "load" { load.as_str() } else { command });
    host_commands(context, api_version, &[load.as_str()].into_iter().chain(commands).collect::<Vec<_>>())
}

/// Runs the host and gives its lines.
fn host_commands(context: &str, api_version: u32, commands: &[&str]) -> Vec<String> {
    static HOST: OnceLock<tempfile::TempPath> = OnceLock::new();
    let program = HOST.get_or_init(|| {
        let program = tempfile::NamedTempFile::new().unwrap().into_temp_path();
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plugin/host.c");
        let (output, text) = run(
            Command::new("cc").args(["-g", "-rdynamic", "-o"]).arg(&program).args([source, "-ldl"]),
            "gcc libc6-dev libslurm-dev",
        );
        assert!(output.status.success(), "{text}");
        program
    });
    let (output, text) =
        run(Command::new(program).arg(context).args(commands).env("API_VERSION", api_version.to_string()), "gcc");
    assert!(output.status.success(), "{text}");
    text.lines().map(str::to_owned).collect()
}

fn step(commands: &[&str]) -> Vec<String> {
    host(REMOTE, 38, &[&STEP, commands].concat())
}

#[test]
fn one_file_has_the_version_of_every_release() {
    for (api, version) in [(36, "140b00"), (38, "160500"), (42, "180b00"), (45, "1a0500"), (46, "1a0b00")] {
        assert_eq!(host(LOCAL, api, &["version"]), [format!("pyxis spank {version}")]);
    }
}

/// It is taken for what Slurm's own plugins in the process say, or for what comes next in the row of releases; slurmd's log
/// has a line about it.
#[test]
fn an_unknown_release_is_guessed() {
    let directory = tempfile::tempdir().unwrap();
    let neighbour = |name: &str, kind: &str, version: &str| {
        let library = directory.path().join(name);
        let source = library.with_extension("c");
        let text = format!("const char plugin_type[] = \"{kind}\";\nconst unsigned plugin_version = {version};\n");
        std::fs::write(&source, text).unwrap();
        let (output, text) = run(Command::new("cc").args(["-shared", "-o"]).arg(&library).arg(&source), "gcc");
        assert!(output.status.success(), "{text}");
        library
    };
    let auth = neighbour("auth_future.so", "auth/future", "0x1b0601");
    let spank = neighbour("other.so", "spank", "0x210600");
    let says = |api: u32, libraries: &[&Path]| {
        let loads: Vec<String> = libraries.iter().map(|library| format!("other:{}", library.display())).collect();
        let load = format!("load:{}", plugin().display());
        let mut commands: Vec<&str> = loads.iter().map(String::as_str).collect();
        commands.extend([load.as_str(), "version", "init"]);
        host_commands(SLURMD, api, &commands)
    };
    for (api, libraries, version, release) in [
        (47, &[&*spank][..], "1b0500", "27.05, reckoned from two releases a year"),
        (47, &[&*spank, &*auth], "1b0601", "27.06, which its other plugins say"),
        (7, &[&*auth], "1b0601", "27.06, which its other plugins say"),
        (7, &[], "160500", "22.05, for want of anything better"),
    ] {
        let lines = says(api, libraries);
        if api != 7 || !libraries.is_empty() {
            assert_eq!(lines[0], format!("pyxis spank {version}"), "{lines:?}");
            assert!(
                lines.iter().any(|line| line.starts_with("info pyxis: this Slurm") && line.contains(release)),
                "{lines:?}"
            );
        } else {
            // The headers' own.
            assert!(lines.iter().any(|line| line.contains("for want of anything better")), "{lines:?}");
        }
        assert_eq!(lines.last().map(String::as_str), Some("init 0"), "{lines:?}");
    }
    // What is in the table needs neither.
    let lines = says(45, &[&auth]);
    assert!(lines[0] == "pyxis spank 1a0500" && !lines.iter().any(|line| line.contains("this Slurm")), "{lines:?}");
}

#[test]
fn a_program_without_slurm_can_load_it() {
    let (output, text) = run(
        Command::new("perl")
            .arg("-e")
            .arg("require DynaLoader; DynaLoader::dl_load_file($ARGV[0]) or die")
            .arg(plugin()),
        "perl-base",
    );
    assert!(output.status.success(), "{text}");
}

#[test]
fn listed_twice_it_does_everything_once() {
    let lines = step(&[
        "load",
        "init",
        "init",
        "option:container-image=Not/Good",
        "init_post_opt",
        "init_post_opt",
        "user_init",
        "user_init",
        "task:0",
        "exit",
        "exit",
    ]);
    let expected = [
        "init 0",
        "init 0",
        "container-image 0",
        "init_post_opt 0",
        "init_post_opt 0",
        "user_init 0",
        "user_init 0",
        "task_init_privileged 0",
        "error pyxis: --container-image: Invalid image reference: docker://Not/Good",
        "task_init -1",
        "task_exit 0",
        "exit 0",
        "exit 0",
    ];
    assert_eq!(lines, expected);
    let lines = host(SLURMD, 38, &["init:importer=/x", "init:importer=/x"]);
    assert_eq!(lines.iter().filter(|line| line.starts_with("info pyxis: version")).count(), 1, "{lines:?}");
}

#[test]
fn commands_refuse_and_steps_remember() {
    for context in [LOCAL, ALLOCATOR] {
        assert_eq!(
            host(context, 38, &["init", "option:container-save=x/", "option:container-remap-root", "init_post_opt"]),
            [
                "init 0",
                "error pyxis: --container-save: target is a directory",
                "container-save -1",
                "container-remap-root 0",
                "error pyxis: ignoring --[no-]container-remap-root because neither --container-image nor \
                 --container-name is set",
                "init_post_opt 0",
            ]
        );
        assert_eq!(
            host(context, 38, &["init:bogus"]),
            [
                "error pyxis: unknown configuration option: bogus",
                "error pyxis: failed to parse configuration",
                "init -1"
            ]
        );
    }
    assert_eq!(
        step(&["init:bogus", "set:PYXIS_CONTAINER_IMAGE=alpine", "init_post_opt", "user_init", "task:0", "task:1"]),
        [
            "init 0",
            "init_post_opt 0",
            "user_init 0",
            "task_init_privileged 0",
            "error pyxis: unknown configuration option: bogus (in plugstack.conf of this node)",
            "task_init -1",
            "task_exit 0",
            "task_init_privileged 0",
            "error pyxis: container was not started successfully by another task",
            "task_init -1",
            "task_exit 0",
        ]
    );
}

#[test]
fn a_step_without_container_is_left_as_it_is() {
    let lines = step(&["set:A=1", "init", "init_post_opt", "user_init", "task:0", "exit"]);
    let expected = [
        "init 0",
        "init_post_opt 0",
        "user_init 0",
        "task_init_privileged 0",
        "task_init 0",
        "A=1",
        "task_exit 0",
        "exit 0",
    ];
    assert_eq!(lines, expected);
}

/// pyxis reads variables into a buffer of 4096 bytes and ignores longer ones.
#[test]
fn long_variables_count() {
    let long = format!("set:PYXIS_CONTAINER_MOUNTS={}:", "/a,".repeat(2000));
    let lines = step(&[&long, "init", "init_post_opt", "user_init", "task:0"]);
    assert!(lines[4].starts_with("error pyxis: --container-mounts: invalid format: /a,/a,"), "{lines:?}");
}

/// A broker that says something and gives up.
fn broker(directory: &Path, script: &str) -> String {
    use std::os::unix::fs::PermissionsExt;
    let path = directory.join("broker");
    std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
    format!("init:executable={}", path.display())
}

#[test]
fn what_the_broker_says_reaches_the_user_and_its_failure_every_task() {
    let directory = tempfile::tempdir().unwrap();
    let init = broker(
        directory.path(),
        r#"printf '{"Say":{"Notice":"pyxis: importing docker image: alpine"}}' >&3
           printf '{"Say":{"Log":"for the log"}}' >&3
           printf '{"Say":{"Error":"pyxis: failed to import docker image: alpine"}}' >&3
           printf '"Failed"' >&3"#,
    );
    let lines = step(&[&init, "option:container-image=alpine", "init_post_opt", "user_init", "task:1", "task:0"]);
    assert_eq!(
        lines[4..],
        [
            "task_init_privileged 0",
            "user pyxis: importing docker image: alpine",
            "info for the log",
            "error pyxis: failed to import docker image: alpine",
            "task_init -1",
            "task_exit 0",
            "task_init_privileged 0",
            "error pyxis: container was not started successfully by another task",
            "task_init -1",
            "task_exit 0",
        ]
    );
}

#[test]
fn the_broker_gets_the_request_and_a_clean_environment() {
    let directory = tempfile::tempdir().unwrap();
    let seen = directory.path().join("seen");
    let init = broker(directory.path(), &format!("cat <&5 >{0}; env >>{0}", seen.display()));
    let lines = step(&[
        "item:3=4294967291",
        "set:LD_PRELOAD=/evil.so",
        &init,
        "option:container-image=docker://nvcr.io#a/b:1",
        "option:container-mounts=/a:/b:ro",
        "option:container-env=X=1",
        "init_post_opt",
        "user_init",
        "task:0",
    ]);
    assert!(lines.contains(&"error pyxis: container start was interrupted".to_owned()), "{lines:?}");
    let seen = std::fs::read_to_string(seen).unwrap();
    for part in [
        r#""uid":0,"gid":0,"groups":[4711,4712]"#,
        r#""job_id":7,"step_id":4294967291,"local_tasks":2,"total_tasks":2"#,
        r#""typed":"docker://nvcr.io#a/b:1""#,
        r#""source":"/a","target":"/b""#,
        r#"{"Set":["X","1"]}"#,
        r#""batch_script":"/spool/slurm_script""#,
    ] {
        assert!(seen.contains(part), "{part} in {seen}");
    }
    assert!(!seen.contains("evil") && !seen.contains("API_VERSION"), "{seen}");
}

#[test]
fn a_missing_executable_is_named() {
    let lines = step(&[
        "init:executable=/nonexistent/pyxis",
        "option:container-image=alpine",
        "init_post_opt",
        "user_init",
        "task:0",
    ]);
    let said = lines.iter().find(|line| line.starts_with("error ")).unwrap();
    assert!(said.contains("/nonexistent/pyxis") && said.contains("No such file or directory"), "{said}");
    assert!(lines.contains(&"task_init -1".to_owned()));
}
