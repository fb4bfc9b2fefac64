use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

struct Etc(tempfile::TempDir);

impl Etc {
    fn new(files: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("enroot.conf.d")).unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o644)).unwrap();
        }
        Self(directory)
    }

    fn load(&self, environment: &[&str]) -> Result<EnrootConf, String> {
        let identity = Identity {
            uid: rustix::process::geteuid().as_raw(),
            gid: 1001,
            name: "ada".into(),
            group: "users".into(),
            home: "/home/ada".into(),
            cwd: self.0.path().to_owned(),
        };
        EnrootConf::load(self.0.path(), &environment.iter().collect(), &identity).map_err(|error| error.to_string())
    }
}

/// `KEY VALUE` lines for one key, and the value it gets.
fn value(text: &str) -> Option<String> {
    let conf = Etc::new(&[("enroot.conf", &format!("ENROOT_A {text}\n"))]).load(&["HOME=/h"]).unwrap();
    conf.get("ENROOT_A").map(str::to_owned)
}

#[test]
fn reference_vectors() {
    let uid = rustix::process::geteuid().as_raw();
    for (text, expected) in [
        ("/a/$(id -u)", format!("/a/{uid}")),
        ("${HOME}/x", "/h/x".into()),
        ("\"a  b\"", "a  b".into()),
        ("-comp lzo   -noD", "-comp lzo -noD".into()),
        ("x # note", "x".into()),
        ("abc=", "abc".into()),
        ("a==", "a==".into()),
        ("a=b=c", "a=b=c".into()),
        ("= r s", "r s".into()),
        ("*", "enroot.conf enroot.conf.d".into()),
        ("0", "0".into()),
        ("off", "off".into()),
        ("fALSE", "fALSE".into()),
        ("$(echo one; echo two)", "one two".into()),
        ("$(id -un)-$(whoami)-$(id -gn)-${USER}", "ada-ada-users-ada".into()),
        ("~/x", "/h/x".into()),
    ] {
        assert_eq!(value(text), Some(expected), "{text}");
    }
    for text in ["no", "N", "false", "False", "F", "\"\"", ""] {
        assert_eq!(value(text), None, "{text}");
    }
    assert_eq!(Etc::new(&[("enroot.conf", "ENROOT_X2 y")]).load(&[]).unwrap().get("ENROOT_X2"), None);
}

#[test]
fn the_first_definition_wins_and_the_process_before_it() {
    let etc = Etc::new(&[
        ("enroot.conf", "ENROOT_A main\nENROOT_A again\nENROOT_B main\nENROOT_D main\n"),
        ("enroot.conf.d/10.conf", "ENROOT_A ten\nENROOT_C ten\n"),
        ("enroot.conf.d/20.conf", "ENROOT_C twenty\nENROOT_E ${ENROOT_C}/x\n"),
        ("enroot.conf.d/README", "ENROOT_F x\n"),
    ]);
    let conf = etc.load(&["ENROOT_B=process", "ENROOT_D="]).unwrap();
    let all = ["A", "B", "C", "D", "E", "F"].map(|key| conf.get(&format!("ENROOT_{key}")).unwrap_or("-"));
    assert_eq!(all, ["main", "process", "ten", "main", "ten/x", "-"]);
    assert_eq!(conf.warnings.len(), 3, "{:?}", conf.warnings);
}

#[test]
fn switches() {
    let etc = Etc::new(&[(
        "enroot.conf",
        "ENROOT_REMAP_ROOT yes\nENROOT_MOUNT_HOME no\nENROOT_LOGIN_SHELL n\nENROOT_RESTRICT_DEV 0\n",
    )]);
    let conf = etc.load(&["ENROOT_UNSHARE_NET=FALSE", "ENROOT_UNSHARE_IPC=FALSE ", "NVIDIA_X=no"]).unwrap();
    assert_eq!((conf.remap_root(), conf.mount_home(), conf.rootfs_writable()), (Some(true), Some(false), None));
    assert!(!conf.login_shell() && conf.restrict_dev() && !conf.unshare("net") && conf.unshare("ipc"));
    assert_eq!(conf.environment().get("ENROOT_MOUNT_HOME"), None);
    assert_eq!(conf.get("NVIDIA_X"), Some("no"));
    assert!(conf.warnings[0].contains("enroot.conf:4: ENROOT_RESTRICT_DEV: \"0\" means yes"), "{:?}", conf.warnings);
    assert!(Etc::new(&[]).load(&[]).unwrap().login_shell());
}

#[test]
fn paths_and_their_defaults() {
    let conf = Etc::new(&[("enroot.conf", "ENROOT_DATA_PATH /tmp/data-${UID}")]).load(&["XDG_CACHE_HOME=/c"]).unwrap();
    let uid = rustix::process::geteuid().as_raw();
    assert_eq!(conf.data_path(), Path::new(&format!("/tmp/data-{uid}")));
    assert_eq!(conf.cache_path(), Path::new("/c/enroot"));
    assert_eq!(conf.config_path(), Path::new("/home/ada/.config/enroot"));
    assert_eq!(conf.runtime_path(), Path::new("/run/enroot"));
    assert_eq!(conf.temp_path(), Path::new("/tmp"));
    assert_eq!(conf.squash_options(), None);
    assert_eq!(Etc::new(&[]).load(&["HOME=/x"]).unwrap().data_path(), Path::new("/x/.local/share/enroot"));
}

#[test]
fn a_job_cannot_change_what_is_the_administrators() {
    let job: Environment =
        ["PATH=/x", "ENROOT_DATA_PATH=/x", "ENROOT_ALLOW_HTTP=y", "ENROOT_CONFIG_PATH=/mine", "A=b", "PMI_RANK=0"]
            .iter()
            .collect();
    let allowed: Vec<_> = of_job(&job).iter().map(|(name, _)| String::from_utf8_lossy(name).into_owned()).collect();
    assert_eq!(allowed, ["ENROOT_CONFIG_PATH", "A", "PMI_RANK"]);
}

#[test]
fn mistakes_name_their_line() {
    let etc = Etc::new(&[("enroot.conf", "# first\nENROOT_A 'open\n")]);
    let error = etc.load(&[]).unwrap_err();
    assert!(
        error.starts_with("Invalid configuration file: ") && error.ends_with("enroot.conf (line 2: missing ')"),
        "{error}"
    );
    assert!(Etc::new(&[("enroot.conf", "ENROOT_A $(false)x;false")]).load(&[]).unwrap_err().contains("failed"));
    let unknown = Etc::new(&[("enroot.conf", "export ENROOT_A=b\nENROOT_A2 x")]).load(&[]).unwrap();
    assert_eq!(unknown.warnings.len(), 2);
}

#[test]
fn a_shell_runs_only_what_nobody_else_can_write() {
    let etc = Etc::new(&[("enroot.conf", "ENROOT_A $(echo x)\n")]);
    assert_eq!(etc.load(&[]).unwrap().get("ENROOT_A"), Some("x"));
    fs::set_permissions(etc.0.path().join("enroot.conf"), fs::Permissions::from_mode(0o666)).unwrap();
    assert!(etc.load(&[]).unwrap_err().contains("needs a shell"));
}
