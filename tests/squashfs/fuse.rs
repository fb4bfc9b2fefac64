//! The FUSE server, between the kernel and an image.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::mount::MountAttrFlags;
use spank_pyxis::squashfs::reader::Image;
use spank_pyxis::squashfuse::server::Server;
use spank_pyxis::sys::mount::FsContext;

use crate::support::{Source, noise, open, text};
use crate::tree::{self, Kind, Tree};

/// Mounts `image` by FUSE with a few threads that serve it while `test` looks.
fn served(image: &Image, test: impl FnOnce(&Path)) {
    let device = rustix::fs::open("/dev/fuse", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap();
    let context = FsContext::open("fuse").unwrap();
    for (key, value) in
        [("fd", &*device.as_raw_fd().to_string()), ("rootmode", "40000"), ("user_id", "0"), ("group_id", "0")]
    {
        context.set(key, value).unwrap();
    }
    context.flag("default_permissions").unwrap();
    let server = Server::new(image, (17, 18));
    // Unmounted when it is dropped, also by a test that fails: then the threads end.
    let mount = Mounted(context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY).unwrap());
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| server.serve(device.as_fd()).unwrap());
        }
        let mount = mount;
        test(&mount.path());
    });
}

struct Mounted(OwnedFd);

impl Mounted {
    fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.0.as_raw_fd()).into()
    }
}

/// What the server shows of a tree: everything belongs to one, who may read it; no attributes.
fn as_served(mut tree: Tree) -> Tree {
    for node in tree.values_mut() {
        node.owner = (17, 18);
        node.xattrs.clear();
        node.mode |= match node.kind {
            Kind::Directory => 0o700,
            Kind::Symlink(_) => 0o777,
            _ if node.mode & 0o111 != 0 => 0o500,
            _ => 0o400,
        };
    }
    tree
}

#[test]
fn the_kernel_sees_what_is_in_the_image() {
    let source = Source::new();
    for size in [0, 1, 4096, 131_072, 131_073, 700_000, 5 << 20] {
        source.file(&format!("text-{size}"), text(size));
        source.file(&format!("noise-{size}"), noise(size));
    }
    source.directory("d");
    for number in 0..5000 {
        source.file(&format!("d/a file called {number}"), number.to_string());
    }
    std::fs::hard_link(source.path("text-1"), source.path("d/link")).unwrap();
    std::os::unix::fs::symlink("../".repeat(1300), source.path("link")).unwrap();
    std::fs::set_permissions(source.path("text-1"), PermissionsExt::from_mode(0o000)).unwrap();
    File::create(source.path("hole")).unwrap().set_len(3 << 20).unwrap();
    for kind in [rustix::fs::FileType::Fifo, rustix::fs::FileType::Socket] {
        rustix::fs::mknodat(rustix::fs::CWD, source.path(&format!("{kind:?}")), kind, Mode::RUSR, 0).unwrap();
    }
    for options in [&["-comp", "zstd", "-Xcompression-level", "1"][..], &["-comp", "lz4", "-b", "1048576"]] {
        let image = open(&source.pack(options));
        served(&image, |root| {
            // The second time out of the caches.
            for _ in 0..2 {
                tree::assert_same(&tree::read(root).unwrap(), &as_served(source.tree()));
            }
            assert_eq!(std::fs::metadata(root.join("none")).unwrap_err().kind(), std::io::ErrorKind::NotFound);
            assert_eq!(std::fs::metadata(root.join("text-1/x")).unwrap_err().kind(), std::io::ErrorKind::NotADirectory);
            let status = rustix::fs::statvfs(root).unwrap();
            assert_eq!((status.f_namemax, status.f_ffree, status.f_bfree), (255, 0, 0));
        });
    }
}

#[test]
fn a_directory_of_30_000_entries() {
    let source = Source::new();
    source.directory("many");
    for number in 0..30_000 {
        File::create(source.path(&format!("many/{number}"))).unwrap();
    }
    let image = open(&source.pack(&["-comp", "lz4"]));
    served(&image, |root| {
        let names = || {
            let names = std::fs::read_dir(root.join("many")).unwrap().map(|entry| entry.unwrap().file_name());
            names.collect::<std::collections::HashSet<_>>()
        };
        // Several at once: each has a place of its own in the listing.
        std::thread::scope(|scope| {
            let lists: Vec<_> = (0..3).map(|_| scope.spawn(names)).collect();
            for list in lists {
                assert_eq!(list.join().unwrap().len(), 30_000);
            }
        });
        for number in (0..30_000).step_by(9973) {
            assert!(root.join(format!("many/{number}")).exists());
        }
    });
}

#[test]
fn many_read_at_once() {
    let source = Source::new();
    let content = [text(9 << 20), noise(2 << 20)].concat();
    source.file("file", &content);
    let image = open(&source.pack(&["-comp", "lz4", "-b", "1048576"]));
    served(&image, |root| {
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let content = &content;
                scope.spawn(move || {
                    let file = File::open(root.join("file")).unwrap();
                    for step in 0..200 {
                        let at = (thread * 7919 + step * 104_729) % content.len();
                        let mut bytes = vec![0; 30_000];
                        let read = file.read_at(&mut bytes, at as u64).unwrap();
                        assert!(bytes[..read] == content[at..at + read]);
                    }
                });
            }
        });
    });
}

#[test]
fn damage_is_an_error_where_it_is() {
    let source = Source::new();
    source.file("a", noise(300_000));
    source.file("b", "small");
    let path = source.pack(&["-b", "4096", "-no-fragments", "-noI"]);
    let mut bytes = std::fs::read(&path).unwrap();
    // A size in the list of blocks of `a`, which begins behind the fields of its inode.
    let inodes = u64::from_le_bytes(bytes[64..72].try_into().unwrap()) as usize + 2;
    bytes[inodes + 32..inodes + 36].copy_from_slice(&[0xff, 0xff, 0xff, 0x01]);
    std::fs::write(&path, bytes).unwrap();
    let image = open(&path);
    served(&image, |root| {
        let error = std::fs::read(root.join("a")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc_eio()));
        assert_eq!(std::fs::read(root.join("b")).unwrap(), b"small");
    });
}

fn libc_eio() -> i32 {
    rustix::io::Errno::IO.raw_os_error()
}
