//! A node of its own for each test: store, runtime directory, configuration, and an image of three layers in the store.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use spank_pyxis::image::digest::Digest;
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::importer::protocol::LayerDescriptor;
use spank_pyxis::policy::Evidence;
use spank_pyxis::store::{ManifestRecord, ReferenceRecord, Store, now};
use tempfile::TempDir;

/// An ordinary user that no other test needs.
const USER: (&str, u32, u32) = ("pyxis-seed", 4242, 4243);
pub const IMAGE: &str = "seed.test/image:1";
const CONFIG: &str = r#"{"architecture":"amd64","os":"linux","rootfs":{"type":"layers","diff_ids":[]},
    "config":{"Env":["PATH=/bin","FROM_IMAGE=image","BOTH=image"],"WorkingDir":"/work","Entrypoint":["busybox","env","FROM_ENTRYPOINT=yes"],"Volumes":{"/volume":{}}}}"#;

/// The variable that says what containers of all nodes have to do without ([`crate::fallbacks`]).
pub const WITHOUT: &str = "PYXIS_TEST_WITHOUT";

pub struct Node {
    directory: TempDir,
}

impl Node {
    /// A node whose store is on the file system of /var/tmp.
    pub fn new() -> Self {
        Self::with_store(|_| {})
    }

    /// A node whose store is on a tmpfs, which EROFS does not read from: layers need loop devices.
    pub fn with_store_on_tmpfs() -> Self {
        Self::with_store(|path| {
            fs::create_dir(path).unwrap();
            rustix::mount::mount("store", path, "tmpfs", rustix::mount::MountFlags::empty(), c"mode=700").unwrap();
        })
    }

    fn with_store(prepare: impl FnOnce(&Path)) -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests mount file systems: run them as root");
        require("mkfs.erofs", "erofs-utils");
        require_file("/bin/busybox", "busybox-static");
        make_user();
        // Not in /tmp: what is mounted there is hidden from nobody, but a store wants a real file system.
        let directory = tempfile::Builder::new().prefix("pyxis-container-").tempdir_in("/var/tmp").unwrap();
        fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let node = Self { directory };
        fs::create_dir(node.host_directory()).unwrap();
        fs::create_dir(node.path("run")).unwrap();
        let mut config = format!(
            "[network]\nconnect_timeout = 1\n[store]\npath = {:?}\n[runtime]\npath = {:?}\n[enroot]\nsysconf_path = {:?}\n",
            node.path("store"),
            node.path("run"),
            node.path("etc"),
        );
        if let Ok(feature) = std::env::var(WITHOUT) {
            config += &format!("[debug]\nwithout = [{feature:?}]\n");
        }
        node.write_config(&config);
        prepare(&node.path("store"));
        node.fill();
        node
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A directory that the user may read.
    pub fn host_directory(&self) -> PathBuf {
        self.path("host")
    }

    /// Adds a file, executable if its name ends in `.sh`, to the enroot configuration: `enroot.conf`, `mounts.d/x.fstab`.
    pub fn configure_enroot(&self, name: &str, text: &str) {
        write_file(&self.path("etc").join(name), text);
    }

    /// The same for the user's own, below his `ENROOT_CONFIG_PATH`, which is returned.
    pub fn configure_user(&self, name: &str, text: &str) -> PathBuf {
        let directory = self.path("user");
        write_file(&directory.join(name), text);
        directory
    }

    /// The path of a file of the enroot configuration.
    pub fn enroot_file(&self, name: &str) -> String {
        self.path("etc").join(name).to_str().unwrap().to_owned()
    }

    /// Takes the right to execute away.
    pub fn forbid_execution(&self, name: &str) {
        let path = self.path("etc").join(name);
        fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    }

    /// Where the layers' files are.
    pub fn layer_files(&self) -> PathBuf {
        self.path("store/layers/sha256")
    }

    /// A file below the runtime directory.
    pub fn runtime_file(&self, name: &str) -> PathBuf {
        self.path("run").join(name)
    }

    /// How many loop devices have files of this node's store.
    pub fn layers_on_loop_devices(&self) -> usize {
        let store = self.path("store");
        let devices = fs::read_dir("/sys/block").unwrap().flatten();
        let backing = devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
        // What was linked later has no name there, but a place.
        backing.filter(|file| Path::new(file.trim_end()).starts_with(&store)).count()
    }

    /// Gives every layer in the store a new file with the same content.
    pub fn replace_layers(&self) {
        for layer in fs::read_dir(self.path("store/layers/sha256")).unwrap().flatten() {
            let content = fs::read(layer.path()).unwrap();
            let new = self.path("new-layer");
            fs::write(&new, content).unwrap();
            fs::rename(new, layer.path()).unwrap();
        }
    }

    /// Mounts in the pinned namespace, without its root.
    pub fn pinned_layers(&self) -> usize {
        let namespace = self.path("run/mounts/layers");
        let count = std::thread::spawn(move || {
            let file = fs::File::open(namespace).unwrap();
            let proc = rustix::fs::open("/proc", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
            // A file system context of its own is what a thread needs to enter a mount namespace.
            // SAFETY: the thread shares nothing that depends on its directories, and ends.
            unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) }.unwrap();
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&file),
                Some(rustix::thread::LinkNameSpaceType::Mount),
            )
            .unwrap();
            let flags = rustix::fs::OFlags::RDONLY;
            let table = rustix::fs::openat(&proc, "thread-self/mountinfo", flags, rustix::fs::Mode::empty()).unwrap();
            let mut text = String::new();
            std::io::Read::read_to_string(&mut fs::File::from(table), &mut text).unwrap();
            text.lines().filter(|line| line.contains(" erofs ")).count()
        });
        count.join().unwrap()
    }

    /// Replaces the configuration.
    pub fn write_config(&self, text: &str) {
        fs::write(self.path("pyxis.toml"), text).unwrap();
    }

    /// Adds to the configuration.
    pub fn append_config(&self, text: &str) {
        let mut file = fs::OpenOptions::new().append(true).open(self.path("pyxis.toml")).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn fill(&self) {
        let store = Store::open(&self.path("store")).unwrap();
        let layers = [
            self.layer(&store, 1, |root| {
                for directory in ["bin", "etc", "etc/skel", "dir", "mnt", "opaque", "var"] {
                    fs::create_dir(root.join(directory)).unwrap();
                }
                fs::copy("/bin/busybox", root.join("bin/busybox")).unwrap();
                for applet in
                    "sh cat id pwd touch rm mv ls stat grep mount tr df tail awk wc chown test true".split(' ')
                {
                    symlink("busybox", root.join("bin").join(applet)).unwrap();
                }
                symlink("/target", root.join("link")).unwrap();
                symlink("/run", root.join("var/run")).unwrap();
                for (name, content) in [
                    ("etc/os-release", "NAME=seed\n"),
                    ("etc/skel/.profile", "skeleton\n"),
                    ("bin/only", ""),
                    ("dir/file", "lower\n"),
                    ("layered", "lower\n"),
                    ("gone", ""),
                    ("opaque/old", ""),
                ] {
                    fs::write(root.join(name), content).unwrap();
                }
            }),
            self.layer(&store, 2, |root| {
                fs::create_dir_all(root.join("opaque")).unwrap();
                fs::write(root.join("opaque/new"), "").unwrap();
                fs::write(root.join("layered"), "upper\n").unwrap();
                run_checked(Command::new("mknod").arg(root.join("gone")).args(["c", "0", "0"]));
                run_checked(
                    Command::new("setfattr").args(["-n", "trusted.overlay.opaque", "-v", "y"]).arg(root.join("opaque")),
                );
            }),
        ];
        // The first layer once more below: overlay takes no directory twice, so it has to be recognised.
        let order = [&layers[0], &layers[0], &layers[1]];
        let layers: Vec<LayerDescriptor> = order.into_iter().cloned().collect();
        let reference = ImageReference::parse(IMAGE).unwrap();
        let manifest = digest(9);
        let config = store.keep_config(CONFIG.as_bytes()).unwrap();
        let confirmed_at = now();
        let reference = ReferenceRecord { reference, manifest, evidence: Evidence::default(), confirmed_at };
        let manifest = ManifestRecord { origin: "seed.test/image".into(), config, layers, confirmed_at };
        for uid in [0, USER.1] {
            store.confirm(uid, &reference, &manifest).unwrap();
        }
    }

    /// Gives the image another layer with these files and takes its config away: as a root filesystem of enroot's is, which
    /// files describe.
    pub fn describe_by_files(&self, files: &[(&str, &str)]) {
        let store = Store::open(&self.path("store")).unwrap();
        let layer = self.layer(&store, 3, |root| {
            for (name, content) in files {
                write_file(&root.join(name), content);
            }
        });
        let base = LayerDescriptor { blob: digest(1), diff_id: digest(1), size: 0 };
        let reference = ImageReference::parse(IMAGE).unwrap();
        let (manifest, config, confirmed_at) = (digest(10), store.keep_config(&[]).unwrap(), now());
        let reference = ReferenceRecord { reference, manifest, evidence: Evidence::default(), confirmed_at };
        let manifest =
            ManifestRecord { origin: "seed.test/image".into(), config, layers: vec![base, layer], confirmed_at };
        store.confirm(USER.1, &reference, &manifest).unwrap();
    }

    fn layer(&self, store: &Store, number: u8, fill: impl FnOnce(&Path)) -> LayerDescriptor {
        let tree = self.path(&format!("tree-{number}"));
        fs::create_dir(&tree).unwrap();
        fill(&tree);
        let image = self.path(&format!("layer-{number}"));
        run_checked(Command::new("mkfs.erofs").args(["--quiet", "--all-root"]).arg(&image).arg(&tree));
        let layer = store.new_layer().unwrap();
        let mut file = fs::File::from(std::os::fd::AsFd::as_fd(&layer).try_clone_to_owned().unwrap());
        let content = fs::read(&image).unwrap();
        file.write_all(&content).unwrap();
        drop(file);
        let diff_id = digest(number);
        drop(layer.seal(&diff_id, content.len() as u64).unwrap().publish().unwrap());
        LayerDescriptor { blob: diff_id, diff_id, size: content.len() as u64 }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pyxis"));
        command.env_clear().env("FROM_HOST", "host").env("BOTH", "host").env("LANG", "de_DE");
        command.arg("--config").arg(self.path("pyxis.toml")).args(arguments);
        command
    }

    /// `pyxis` with these arguments.
    pub fn pyxis(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A shell script in a container, started with `variables` too.
    pub fn run_with(&self, variables: &[(&str, &str)], options: &[&str], script: &str) -> Output {
        let arguments = [&["run", "--user", USER.0], options, &[IMAGE, "sh", "-c", script]].concat();
        self.command(&arguments).envs(variables.iter().copied()).output().unwrap()
    }

    /// The same, from the host's directory `cwd`.
    pub fn run_in(&self, cwd: &str, variables: &[(&str, &str)], options: &[&str], script: &str) -> Output {
        let arguments = [&["run", "--user", USER.0], options, &[IMAGE, "sh", "-c", script]].concat();
        self.command(&arguments).envs(variables.iter().copied()).current_dir(cwd).output().unwrap()
    }

    /// The same, after a shell script of root's in a mount namespace that goes with the container.
    pub fn run_after(&self, before: &str, options: &[&str], script: &str) -> Output {
        let arguments = [&["run", "--user", USER.0], options, &[IMAGE, "sh", "-c", script]].concat();
        let mut command = Command::new("unshare");
        command.args(["--mount", "sh", "-c"]).arg(format!("{before} && exec \"$0\" \"$@\""));
        let inner = self.command(&arguments);
        command.arg(inner.get_program()).args(inner.get_args()).output().unwrap()
    }

    /// A shell script in a container.
    pub fn run(&self, options: &[&str], script: &str) -> Output {
        let arguments = [&["run", "--user", USER.0], options, &[IMAGE, "sh", "-c", script]].concat();
        self.pyxis(&arguments)
    }

    /// A container whose script begins with output and ends when the result is dropped.
    pub fn start(&self, script: &str) -> Running {
        let script = format!("echo started; {script}");
        let mut child = self
            .command(&["run", "--user", USER.0, IMAGE, "sh", "-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "started\n");
        Running(child)
    }

    /// Mount points of the host.
    pub fn mounts(&self) -> Vec<String> {
        let own = self.directory.path().to_str().unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = table.lines().filter_map(|line| line.split(' ').nth(4));
        points.filter(|point| point.starts_with(own)).map(str::to_owned).collect()
    }

    /// Process ids of container inits that hold layers of this node's store.
    pub fn inits(&self) -> Vec<u32> {
        let store = self.path("store");
        let processes = fs::read_dir("/proc").unwrap().flatten();
        processes
            .filter_map(|entry| {
                let pid = entry.file_name().to_str()?.parse().ok()?;
                let comm = fs::read_to_string(entry.path().join("comm")).ok()?;
                let descriptors = fs::read_dir(entry.path().join("fd")).ok()?.flatten();
                let holds = |link: PathBuf| link.starts_with(&store);
                (comm == "pyxis-init\n" && descriptors.filter_map(|fd| fs::read_link(fd.path()).ok()).any(holds))
                    .then_some(pid)
            })
            .collect()
    }

    /// Waits for `condition`.
    #[track_caller]
    pub fn wait_until(&self, what: &str, condition: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !condition() {
            assert!(Instant::now() < deadline, "still waiting until {what}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        for point in self.mounts().iter().rev() {
            let _ = rustix::mount::unmount(point.as_str(), rustix::mount::UnmountFlags::DETACH);
        }
    }
}

/// A running container; ends with the end of its standard input.
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

fn write_file(path: &Path, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    let mode = if path.extension().is_some_and(|extension| extension == "sh") { 0o755 } else { 0o644 };
    fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
}

/// Whether a process with this command line (`/proc/PID/cmdline`) runs.
pub fn runs(command: &str) -> bool {
    let processes = fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok()).any(|line| line == command.as_bytes())
}

fn digest(number: u8) -> Digest {
    Digest::from_bytes([number; 32])
}

fn require(command: &str, package: &str) {
    let found = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"].iter().any(|path| Path::new(path).join(command).exists());
    assert!(found, "{command} is missing: apt-get install {package}");
}

fn require_file(path: &str, package: &str) {
    assert!(Path::new(path).exists(), "{path} is missing: apt-get install {package}");
}

fn make_user() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        require("setfattr", "attr");
        if !fs::read_to_string("/etc/passwd").unwrap().contains("\npyxis-seed:") {
            run_checked(Command::new("groupadd").args(["-g", &USER.2.to_string(), USER.0]));
            run_checked(Command::new("useradd").args([
                "-u",
                &USER.1.to_string(),
                "-g",
                USER.0,
                "-s",
                "/bin/sh",
                USER.0,
            ]));
        }
    });
}

#[track_caller]
fn run_checked(command: &mut Command) {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
