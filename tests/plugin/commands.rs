//! In Debian's `srun`, `sbatch` and `salloc`, which judge options before they look for a controller.

use std::path::PathBuf;
use std::process::Command;

use super::{plugin, run};

const OPTIONS: [&str; 18] = [
    "--container-image=[USER@][REGISTRY#]IMAGE[:TAG]|PATH",
    "--container-mounts=SRC:DST[:FLAGS][,SRC:DST...]",
    "--container-workdir=PATH",
    "--container-name=NAME",
    "--container-save=PATH",
    "--container-mount-home",
    "--no-container-mount-home",
    "--container-remap-root",
    "--no-container-remap-root",
    "--container-entrypoint",
    "--no-container-entrypoint",
    "--container-entrypoint-log",
    "--container-writable",
    "--container-readonly",
    "--container-env=NAME[,NAME...]",
    "--container-unshare=NS[,NS...]",
    "--container-device=VENDOR/CLASS=NAME[,...]",
    "--container-pull=WHEN",
];

/// A configuration without a cluster.
struct Slurm {
    directory: tempfile::TempDir,
}

impl Slurm {
    /// `lines` follow the plugin's path in plugstack.conf, one line each.
    fn new(lines: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let plugstack = directory.path().join("plugstack.conf");
        let text: String = lines.iter().map(|line| format!("required {} {line}\n", plugin().display())).collect();
        std::fs::write(&plugstack, text).unwrap();
        let conf = format!(
            "ClusterName=none\nSlurmctldHost=localhost\nSlurmctldPort=1\nAuthType=auth/none\nCredType=cred/none\n\
             MessageTimeout=2\nPlugStackConfig={}\nNodeName=localhost\nPartitionName=none Nodes=localhost Default=YES\n",
            plugstack.display()
        );
        std::fs::write(directory.path().join("slurm.conf"), conf).unwrap();
        Self { directory }
    }

    /// What `program ARGUMENTS` says, and whether it went well.
    fn run(&self, program: &str, arguments: &[&str], variables: &[(&str, &str)]) -> (bool, String) {
        let conf: PathBuf = self.directory.path().join("slurm.conf");
        let mut command = Command::new(program);
        command.args(arguments).env_clear().env("PATH", "/usr/local/bin:/usr/bin:/bin").env("SLURM_CONF", conf);
        command.envs(variables.iter().copied());
        let (output, text) = run(&mut command, "slurm-client");
        (output.status.success(), text)
    }

    /// `srun OPTIONS true`, which cannot succeed here.
    fn srun(&self, options: &[&str]) -> String {
        let (success, text) = self.run("srun", &[options, &["true"]].concat(), &[]);
        assert!(!success, "{text}");
        text
    }
}

/// How srun ends when nothing is wrong with the options.
const REACHED_SLURM: &str = "Unable to contact slurm controller";

#[test]
fn every_command_offers_every_option() {
    let slurm = Slurm::new(&[""]);
    for program in ["srun", "sbatch", "salloc"] {
        let (success, text) = slurm.run(program, &["--help"], &[]);
        assert!(success, "{text}");
        for option in OPTIONS {
            let line = text.lines().position(|line| line.split_whitespace().next() == Some(option));
            let line = line.unwrap_or_else(|| panic!("{program} lacks {option}:\n{text}"));
            // A long name stands on a line of its own.
            let help = text.lines().skip(line).take(2).collect::<String>();
            assert!(help.contains("[pyxis] "), "{program} {option}: {help}");
        }
    }
}

/// Slurm's own plugins tell the release where the number of its interface means nothing: commands go on working.
#[test]
fn a_release_that_is_unknown_is_served() {
    let slurm = Slurm::new(&[""]);
    let library = slurm.directory.path().join("future.so");
    let source = library.with_extension("c");
    std::fs::write(&source, "long slurm_api_version(void) { return 99L << 16; }\n").unwrap();
    let (output, text) = run(Command::new("cc").args(["-shared", "-o"]).arg(&library).arg(&source), "gcc");
    assert!(output.status.success(), "{text}");
    for program in ["srun", "sbatch", "salloc"] {
        let (success, text) = slurm.run(program, &["--help"], &[("LD_PRELOAD", &library.display().to_string())]);
        assert!(success && text.contains("--container-image") && !text.contains("ncompatible"), "{program}: {text}");
    }
}

#[test]
fn sbatch_support_concerns_all_but_srun() {
    let slurm = Slurm::new(&["sbatch_support=0"]);
    for (program, offered) in [("srun", true), ("sbatch", false), ("salloc", false)] {
        let (success, text) = slurm.run(program, &["--help"], &[]);
        assert!(success && text.contains("--container-image") == offered, "{program}: {text}");
    }
}

#[test]
fn listed_twice_it_is_there_once() {
    let slurm = Slurm::new(&["", ""]);
    let (success, text) = slurm.run("srun", &["--help"], &[]);
    assert!(success && !text.contains("provided by both"), "{text}");
    assert_eq!(text.matches("[pyxis] ").count(), OPTIONS.len(), "{text}");
    let text = slurm.srun(&["--container-workdir=/"]);
    assert_eq!(text.matches("pyxis: ignoring --container-workdir because").count(), 1, "{text}");
}

#[test]
fn bad_options_end_the_command() {
    let slurm = Slurm::new(&[""]);
    for (options, expected) in [
        (&["--container-image="][..], "--container-image: argument required"),
        (&["--container-image=a", "--container-image=b"], "--container-image specified multiple times"),
        (&["--container-image=Foo/Bar"], "--container-image: Invalid image reference: docker://Foo/Bar"),
        (&["--container-mounts=/tmp:"], "--container-mounts: invalid format: /tmp:"),
        (&["--container-mounts=devpts:/x"], "mount source must be a relative path, an absolute path, \"tmpfs\" or"),
        (&["--container-mounts=/a:b"], "mount target must be a relative path or an absolute path"),
        (&["--container-env=A,"], "--container-env: invalid format: A,"),
        (&["--container-unshare=foo"], "--container-unshare: unknown namespace 'foo'"),
        (&["--container-pull=often"], "--container-pull: must be \"always\", \"recent\", \"missing\" or \"never\""),
        (&["--container-device=gpu"], "--container-device: \"gpu\" is no device name: it must be VENDOR/CLASS=NAME"),
        (&["--container-device=a.com/gpu=0,"], "--container-device: \"\" is no device name"),
        (&["--container-name=:x"], "--container-name: empty name"),
        (&["--container-save=x/"], "--container-save: target is a directory"),
        (
            &["--container-writable", "--container-readonly"],
            "both --container-writable and --container-readonly were specified",
        ),
        (&["--container-name=:a"], "--container-name: empty name"),
    ] {
        let text = slurm.srun(options);
        assert!(text.contains(&format!("error: pyxis: {expected}")), "{options:?}: {text}");
        assert!(!text.contains(REACHED_SLURM), "{options:?}: {text}");
        let (success, text) = slurm.run("sbatch", &[options, &["--wrap=true"]].concat(), &[]);
        assert!(!success && text.contains(&format!("error: pyxis: {expected}")), "{options:?}: {text}");
    }
}

#[test]
fn good_options_pass() {
    let slurm = Slurm::new(&[""]);
    let text = slurm.srun(&[
        "--container-image=nvcr.io#nvidia/pytorch:24.01-py3",
        "--container-mounts=/a,/b:/c:ro,tmpfs:/d",
        "--container-env=A,B=1",
        "--container-workdir=/w",
        "--container-writable",
        "--no-container-mount-home",
        "--container-remap-root",
    ]);
    assert!(text.contains(REACHED_SLURM) && !text.contains("pyxis"), "{text}");
}

#[test]
fn variables_count_as_options() {
    let slurm = Slurm::new(&[""]);
    for (variable, value, expected) in [
        ("PYXIS_CONTAINER_NAME", ":a", "--container-name: empty name"),
        ("PYXIS_CONTAINER_IMAGE", "Foo/Bar", "--container-image: Invalid image reference: docker://Foo/Bar"),
        // What sites set as a default image.
        (
            "SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_container_image",
            "Foo/Bar",
            "--container-image: Invalid image reference: docker://Foo/Bar",
        ),
    ] {
        let (success, text) = slurm.run("srun", &["true"], &[(variable, value)]);
        assert!(!success && text.contains(&format!("error: pyxis: {expected}")), "{variable}: {text}");
        assert!(!text.contains(REACHED_SLURM), "{variable}: {text}");
    }
    let variables = [("PYXIS_CONTAINER_IMAGE", "alpine"), ("SLURM_CONTAINER", "/bundle")];
    let (success, text) = slurm.run("srun", &["true"], &variables);
    assert!(!success && text.contains("exclude each other"), "{text}");
}

#[test]
fn a_bad_plugstack_line_is_named() {
    for program in ["srun", "sbatch"] {
        for (line, expected) in [
            ("bogus=1", "unknown configuration option: bogus=1"),
            ("container_scope=node", "container_scope: invalid value: node"),
            ("executable=pyxis", "executable: not an absolute path: pyxis"),
        ] {
            let (success, text) = Slurm::new(&[line]).run(program, &["--help"], &[]);
            assert!(!success && text.contains(&format!("pyxis: {expected}")), "{program} {line}: {text}");
        }
    }
}

/// The file that is installed, apart from the path in it.
#[test]
fn the_shipped_plugstack_line_loads() {
    let shipped = include_str!("../../plugstack.conf.d/pyxis.conf");
    let slurm = Slurm::new(&[]);
    let path = plugin().display().to_string();
    let text = shipped.replace("/usr/lib/spank-pyxis/spank_pyxis.so", &path);
    assert!(text.contains(&path) && text.lines().filter(|line| !line.starts_with('#')).count() == 1, "{shipped}");
    std::fs::write(slurm.directory.path().join("plugstack.conf"), text).unwrap();
    let (success, text) = slurm.run("srun", &["--help"], &[]);
    assert!(success && text.matches("[pyxis] ").count() == OPTIONS.len() && !text.contains("error:"), "{text}");
}
