//! A registry, an ordinary user, and the executable where he can reach it.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use testbed::process::{self, Output};
use testbed::registry::{Registry, RegistryOptions};
use testbed::{Site, TestUser, wait};

/// One test's own.
pub struct World {
    pub registry: Registry,
    pub user: TestUser,
    /// The user's home directory, empty.
    pub home: PathBuf,
    bin: PathBuf,
    pub site: Site,
}

impl World {
    pub fn new(name: &str) -> Self {
        Self::with_registry(name, RegistryOptions::default())
    }

    pub fn with_registry(name: &str, options: RegistryOptions) -> Self {
        static USERS: Mutex<()> = Mutex::new(());
        testbed::prerequisites::check().unwrap();
        let site = Site::create(&format!("commands-{name}")).unwrap();
        let registry = Registry::start(&site, "registry", options).unwrap();
        let user = {
            let _one_at_a_time = USERS.lock().unwrap_or_else(PoisonError::into_inner);
            TestUser::get(1).unwrap()
        };
        let home = site.make_directory("home").unwrap();
        user.own(&home).unwrap();
        user.own(&site.make_directory("tmp").unwrap()).unwrap();
        let bin = site.make_directory("bin").unwrap();
        std::fs::copy(env!("CARGO_BIN_EXE_pyxis"), bin.join("pyxis")).unwrap();
        symlink("pyxis", bin.join("enroot")).unwrap();
        Self { registry, user, home, bin, site }
    }

    /// `enroot ARGUMENTS`, to be run in the home directory.
    pub fn command(&self, arguments: &[&str]) -> Command {
        self.called("enroot", arguments)
    }

    /// `pyxis ARGUMENTS`, likewise.
    pub fn pyxis(&self, arguments: &[&str]) -> Command {
        self.called("pyxis", arguments)
    }

    /// `enroot ARGUMENTS` where the user may open `/dev/fuse`, as most hosts have it.
    pub fn with_fuse(&self, arguments: &[&str]) -> Command {
        self.with_device("0666", &self.command(arguments))
    }

    /// `enroot ARGUMENTS` where he may not.
    pub fn without_fuse(&self, arguments: &[&str]) -> Command {
        self.with_device("0600", &self.command(arguments))
    }

    /// `command` where `/dev/fuse` has this mode.
    pub fn with_device(&self, mode: &str, inner: &Command) -> Command {
        let node = self.site.path(&format!("fuse-{mode}"));
        if !node.exists() {
            let mut mknod = Command::new("mknod");
            process::output_of(mknod.arg(format!("--mode={mode}")).arg(&node).args(["c", "10", "229"])).unwrap();
        }
        let mut command = Command::new("unshare");
        command.args(["--mount", "--", "sh", "-c", "mount --bind \"$0\" /dev/fuse && exec \"$@\""]).arg(node);
        command.arg(inner.get_program()).args(inner.get_args());
        command.env_clear().envs(inner.get_envs().filter_map(|(name, value)| Some((name, value?))));
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").current_dir(&self.home);
        command
    }

    /// The executable under that name.
    pub fn enroot(&self) -> PathBuf {
        self.bin.join("enroot")
    }

    fn called(&self, name: &str, arguments: &[&str]) -> Command {
        self.program(&self.bin.join(name), arguments)
    }

    /// Any program, to be run likewise.
    pub fn program(&self, path: &Path, arguments: &[&str]) -> Command {
        let mut command = self.user.command(path);
        command.args(arguments).env("HOME", &self.home).current_dir(&self.home);
        // No /etc/enroot of the machine, no proxies, and a registry without TLS.
        command.env("ENROOT_SYSCONF_PATH", "/nonexistent").env("ENROOT_ALLOW_HTTP", "y");
        command.env("TMPDIR", self.site.path("tmp"));
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        process::run(&mut self.command(arguments), wait::DEADLINE).unwrap()
    }

    /// What `enroot ARGUMENTS` prints, which succeeds.
    #[track_caller]
    pub fn ok(&self, arguments: &[&str]) -> String {
        self.run(arguments).success().unwrap().stdout
    }

    /// The one line that `enroot ARGUMENTS` fails with, without `[ERROR] `.
    #[track_caller]
    pub fn error(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert_eq!(output.code(), 1, "{output}");
        let errors: Vec<&str> = output.stderr.lines().filter_map(|line| line.strip_prefix("[ERROR] ")).collect();
        let last = output.stderr.lines().last().unwrap_or_default();
        assert!(errors.len() == 1 && last.starts_with("[ERROR] "), "{output}");
        errors[0].to_owned()
    }

    /// `docker://` and the registry's name of `image`.
    pub fn uri(&self, image: &str) -> String {
        format!("docker://{}#{image}", self.registry.host())
    }

    /// The small image, as `busybox:latest`.
    pub fn push_busybox(&self) {
        let layout = self.site.path("busybox");
        self.registry.push(&testbed::images::busybox(&layout).unwrap(), "busybox:latest").unwrap();
    }

    /// Names in a directory of the user's, hidden ones too; none if there is no such directory.
    pub fn names(&self, directory: &str) -> Vec<String> {
        names(&self.home.join(directory))
    }
}

pub fn names(directory: &Path) -> Vec<String> {
    let entries = directory.read_dir().into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}
