//! In mount namespaces of threads: as root, who makes device nodes for them.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};

use rustix::mount::MountPropagationFlags;

use super::*;

const DIRECTORY: &str = "/usr/lib64";

struct Scene {
    directory: tempfile::TempDir,
    future: Future,
}

impl Scene {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name.trim_start_matches('/'))
    }

    /// In the root filesystem.
    fn inside(&self, name: &str) -> PathBuf {
        self.path("root").join(name.trim_start_matches('/'))
    }

    fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, content).unwrap();
        path
    }

    fn library(&self, version: &str, names: &[&str]) -> Library {
        let path = self.write(&format!("host/{version}/{}", names[0]), version);
        let names = names.iter().map(|&name| name.into()).collect();
        Library { origin: Origin::Host, path, is_32_bit: false, names }
    }

    fn node(&self, name: &str, minor: u32) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let device = rustix::fs::makedev(1, minor);
        rustix::fs::mknodat(rustix::fs::CWD, &path, FileType::CharacterDevice, 0o666.into(), device).unwrap();
        path
    }

    fn apply(&self, edits: &ContainerEdits) -> (Result<(), String>, Vec<String>) {
        let fd = File::open(self.path("root")).unwrap();
        let root = RootDir::new(fd.as_fd());
        let traits = RootTraits::of(root);
        let workshop = self.path("workshop");
        let place = Place { root, traits: &traits, future: self.future, cwd: Path::new("/"), workshop: &workshop };
        let mut said = Vec::new();
        let applied = apply(&place, edits, &mut |message| said.push(format!("{message:?}")));
        (applied.map_err(|error| error.to_string()), said)
    }

    fn done(&self, edits: &ContainerEdits) {
        let (applied, said) = self.apply(edits);
        assert_eq!((applied, said.len()), (Ok(()), 0), "{said:?}");
    }

    /// Ends the container: nothing is mounted any more.
    fn end(&self) {
        let mounts = fs::read_to_string("/proc/thread-self/mounts").unwrap();
        let below = self.path("root");
        for path in mounts.lines().filter_map(|line| line.split(' ').nth(1)).collect::<Vec<_>>().into_iter().rev() {
            if Path::new(path).starts_with(&below) {
                rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).unwrap();
            }
        }
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.inside(name)).unwrap()
    }

    fn names(&self, name: &str) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.inside(name)) else { return Vec::new() };
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

fn scene(future: Future, test: impl FnOnce(&Scene) + Send) {
    let in_namespace = || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
        rustix::mount::mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
        let scene = Scene { directory: tempfile::tempdir().unwrap(), future };
        for directory in ["root/etc", "workshop", "host"] {
            fs::create_dir_all(scene.path(directory)).unwrap();
        }
        test(&scene);
        scene.end();
    };
    std::thread::scope(|scope| scope.spawn(in_namespace).join().unwrap());
}

fn listed(scene: &Scene) -> String {
    let file = scene.inside("etc/ld.so.cache");
    let output = std::process::Command::new("/sbin/ldconfig").args(["-p", "-C"]).arg(file).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn libraries_appear_under_their_names_and_change_nothing() {
    scene(Future::Gone, |scene| {
        scene.write("root/usr/lib64/libcuda.so.1.old", "the image's");
        symlink("libcuda.so.1.old", scene.inside("usr/lib64/libcuda.so.1")).unwrap();
        fs::copy(ldcache::PATH, scene.inside("etc/ld.so.cache")).unwrap();
        let libraries = vec![scene.library("550", &["libcuda.so.550", "libcuda.so.1", "libcuda.so"])];
        scene.done(&ContainerEdits { libraries, ..ContainerEdits::default() });
        for name in ["libcuda.so.550", "libcuda.so.1", "libcuda.so"] {
            assert_eq!(scene.read(&format!("{DIRECTORY}/{name}")), "550", "{name}");
            assert_eq!(
                fs::write(scene.inside(DIRECTORY).join(name), "x").unwrap_err().raw_os_error(),
                Some(libc::EROFS),
                "{name}"
            );
        }
        assert_eq!(scene.read("usr/lib64/libcuda.so.1.old"), "the image's");
        let listed = listed(scene);
        assert!(listed.contains("libcuda.so.1 (libc6,x86-64) => /usr/lib64/libcuda.so.1\n"), "{listed}");
        assert!(listed.contains("libc.so.6"), "{listed}");
        scene.end();
        assert_eq!(fs::read_link(scene.inside("usr/lib64/libcuda.so.1")).unwrap(), Path::new("libcuda.so.1.old"));
        let stub = fs::metadata(scene.inside("usr/lib64/libcuda.so")).unwrap();
        assert_eq!((stub.mode() & 0o7777, stub.len()), (0, 0));
    });
}

#[test]
fn made_files_and_links_appear() {
    scene(Future::Gone, |scene| {
        scene.write("root/etc/there", "the image's");
        let file = |path: &str, mode| edits::File { path: path.into(), mode, content: path.into() };
        let link = |path: &str| Link { path: path.into(), target: "there".into() };
        scene.done(&ContainerEdits {
            files: vec![file("/etc/there", 0o444), file("/opt/made", 0o755)],
            links: vec![link("/etc/link"), link("/etc/there")],
            ..ContainerEdits::default()
        });
        assert_eq!(scene.read("etc/there"), "/etc/there");
        assert_eq!(scene.read("opt/made"), "/opt/made");
        assert_eq!(fs::metadata(scene.inside("opt/made")).unwrap().mode() & 0o7777, 0o755);
        assert_eq!(scene.read("etc/link"), "/etc/there");
        assert_eq!(scene.names("../workshop"), [""; 0]);
        scene.end();
        assert_eq!(scene.read("etc/there"), "the image's");
        assert_eq!(fs::symlink_metadata(scene.inside("etc/link")).unwrap().len(), 0);
    });
}

#[test]
fn device_nodes_appear_or_cannot_be_opened() {
    scene(Future::Gone, |scene| {
        let (full, zero) = (scene.node("host/full", 7), scene.node("host/zero", 5));
        scene.node("root/dev/gpu0", 5);
        scene.node("root/dev/gpu1", 7);
        let node =
            |host: &Path, path: &str, optional| DeviceNode { host_path: host.into(), path: path.into(), optional };
        scene.done(&ContainerEdits {
            hidden: vec!["/dev/gpu0".into(), "/dev/none".into()],
            device_nodes: vec![
                node(&full, "/dev/sub/full", false),
                node(&zero, "/dev/zero", false),
                node(&full, "/dev/gpu1", false),
                node(Path::new("/none"), "/dev/none", true),
            ],
            ..ContainerEdits::default()
        });
        let open = |name: &str| File::open(scene.inside(name)).map(drop).map_err(|error| error.raw_os_error().unwrap());
        assert_eq!(open("dev/gpu0"), Err(libc::EACCES));
        assert_eq!((open("dev/gpu1"), open("dev/sub/full"), open("dev/zero")), (Ok(()), Ok(()), Ok(())));
        assert_eq!(open("dev/none"), Err(libc::ENOENT));
        let failure = |host: &Path| {
            let device_nodes = vec![node(host, "/dev/x", false)];
            scene.apply(&ContainerEdits { device_nodes, ..ContainerEdits::default() }).0.unwrap_err()
        };
        let missing = "cannot show the device node /none in the container: No such file or directory";
        assert_eq!(failure(Path::new("/none")), missing);
        assert_eq!(failure(Path::new("/etc/passwd")), "/etc/passwd is no device node");
        // Where the host's own directory is shown, nothing is made in it.
        let dev = clone_tree(rustix::fs::CWD, Path::new("/dev"), true).unwrap();
        attach_at(dev.as_fd(), &scene.inside("dev")).unwrap();
        assert!(failure(&full).contains("ENROOT_RESTRICT_DEV=y"), "{}", failure(&full));
        assert!(!Path::new("/dev/x").exists());
    });
}

#[test]
fn a_library_that_vanishes_is_said() {
    scene(Future::Gone, |scene| {
        let libraries = vec![scene.library("1", &["liba.so.1"]), scene.library("1", &["libb.so.1.2", "libb.so.1"])];
        fs::remove_file(&libraries[1].path).unwrap();
        let (applied, said) = scene.apply(&ContainerEdits { libraries, ..ContainerEdits::default() });
        assert_eq!((applied, said.len()), (Ok(()), 1));
        assert!(said[0].contains("has gone: programs in the container will not find libb.so.1"), "{said:?}");
        assert_eq!(scene.names("usr/lib64"), ["liba.so.1"]);
        assert!(!listed(scene).contains("libb"));
    });
}

#[test]
fn musl_is_told_in_its_own_way() {
    scene(Future::Kept { shared: false }, |scene| {
        scene.write(&format!("root/{}", musl_path_file().0), "");
        let edits = ContainerEdits { libraries: vec![scene.library("1", &["liba.so.1"])], ..ContainerEdits::default() };
        scene.done(&edits);
        assert_eq!(scene.read("usr/lib/liba.so.1"), "1");
        assert_eq!(scene.names("etc"), [""; 0]);
        scene.end();
        let path = musl_path_file().1;
        scene.write(&format!("root/{path}"), "/lib\n");
        scene.done(&edits);
        assert_eq!(scene.read(&path), "/usr/lib\n/lib\n");
        scene.end();
        assert_eq!(scene.read(&path), "/lib\n");
    });
}

#[test]
fn nothing_stays_in_a_kept_root() {
    scene(Future::Kept { shared: false }, |scene| {
        fs::copy(ldcache::PATH, scene.inside("etc/ld.so.cache")).unwrap();
        let before = fs::read(ldcache::PATH).unwrap();
        let edits = |version: &str| ContainerEdits {
            libraries: vec![scene.library(version, &[&format!("libcuda.so.{version}"), "libcuda.so.1"])],
            files: vec![edits::File { path: "/opt/x/params".into(), mode: 0o444, content: Vec::new() }],
            ..ContainerEdits::default()
        };
        scene.done(&edits("550"));
        scene.end();
        assert_eq!(scene.names("usr/lib64"), ["libcuda.so.1", "libcuda.so.550"]);
        // Another driver.
        scene.done(&edits("560"));
        assert_eq!(scene.names("usr/lib64"), ["libcuda.so.1", "libcuda.so.560"]);
        assert!(!listed(scene).contains("libcuda.so.550") && listed(scene).contains("libcuda.so.560"));
        scene.end();
        // Somebody else uses it too.
        let shared = Scene { directory: tempfile::tempdir().unwrap(), future: Future::Kept { shared: true } };
        for name in ["root", "workshop"] {
            symlink(scene.path(name), shared.path(name)).unwrap();
        }
        shared.done(&ContainerEdits::default());
        assert_eq!(scene.names("usr/lib64"), ["libcuda.so.1", "libcuda.so.560"]);
        // No devices.
        scene.done(&ContainerEdits::default());
        assert_eq!(
            (scene.names(""), scene.names("etc")),
            (vec![".pyxis".into(), "etc".into()], vec!["ld.so.cache".into()])
        );
        assert_eq!(fs::read(scene.inside("etc/ld.so.cache")).unwrap(), before);
    });
}
