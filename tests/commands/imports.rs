//! `enroot import`, `load` and `digest`.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use nix::sys::signal::Signal;
use testbed::image::Compression;
use testbed::process::{Running, output_of};
use testbed::proxy::{Behaviour, Proxy};
use testbed::registry::{Account, RegistryOptions};
use testbed::{images, wait};

use crate::images::{Tar, image};
use crate::tree;
use crate::world::World;

/// Unpacks a squashfs file as root, so that everything in it shows.
fn unsquashfs(file: &Path, to: &Path) -> tree::Tree {
    output_of(Command::new("unsquashfs").args(["-no-progress", "-dest"]).arg(to).arg(file)).unwrap();
    tree::read(to)
}

#[test]
fn what_is_imported_is_what_umoci_unpacks() {
    let world = World::new("umoci");
    let trees = images::feature_trees(&world.site.path("trees"), 300).unwrap();
    // This umoci does not know zstd.
    let gzip = images::features(&world.site.path("gzip"), &trees, [Compression::Gzip; 3]).unwrap();
    let expected = tree::umoci(&gzip, &world.site.path("bundle"));
    let compressions = [Compression::Gzip, Compression::Zstd, Compression::None];
    let image = images::features(&world.site.path("layout"), &trees, compressions).unwrap();
    world.registry.push(&image, "features:latest").unwrap();

    world.ok(&["import", "-o", "x.sqsh", &world.uri("features")]);
    let unpacked = unsquashfs(&world.home.join("x.sqsh"), &world.site.path("unsquashed"));
    tree::assert_same(&unpacked, &tree::as_imported(expected.clone(), true));
    let listing = output_of(Command::new("unsquashfs").args(["-lln"]).arg(world.home.join("x.sqsh"))).unwrap();
    assert!(
        listing.lines().filter(|line| line.contains("squashfs-root")).all(|line| line.contains(" 0/0 ")),
        "{listing}"
    );

    let expected = tree::as_imported(expected, false);
    world.ok(&["load", &world.uri("features")]);
    world.ok(&["create", "x.sqsh"]);
    for name in ["features", "x"] {
        let root = world.home.join(".local/share/enroot").join(name);
        tree::assert_same(&tree::read(&root), &expected);
        assert_eq!(root.metadata().unwrap().uid(), world.user.uid);
    }
}

#[test]
fn hard_links_to_hidden_files_are_kept() {
    let world = World::new("links");
    let lower = Tar::new().directory("a").file("a/file", "lower").link("a/link", "a/file").link("b", "a/link");
    let upper = Tar::new().directory("a").file("a/.wh.file", "").symlink("a/link", "elsewhere");
    let image = image(&world.site.path("layout"), &[lower.done(), upper.done()]);
    world.registry.push(&image, "links:latest").unwrap();
    world.ok(&["import", "-o", "x.sqsh", &world.uri("links")]);
    let unpacked = unsquashfs(&world.home.join("x.sqsh"), &world.site.path("unsquashed"));
    assert_eq!(unpacked["b"].kind, tree::Kind::File(b"lower".to_vec(), "b".into()));
    assert!(!unpacked.contains_key("a/file"));
    world.ok(&["load", &world.uri("links")]);
    assert_eq!(std::fs::read(world.home.join(".local/share/enroot/links/b")).unwrap(), b"lower");
}

#[test]
fn an_image_says_how_it_starts() {
    let world = World::new("generated");
    // The image's own files at these paths go, and links on the way are followed inside.
    let layer = Tar::new().symlink("etc", "/usr/etc").file("usr/etc/rc", "the image's").file("usr/etc/motd", "hello");
    let image = image(&world.site.path("layout"), &[layer.done()]);
    world.registry.push(&image, "some/thing:1.0").unwrap();
    let uri = world.uri("some/thing:1.0");
    let output = world.run(&["import", &uri]).success().unwrap();
    assert_eq!(output.stdout, "");
    let infos: Vec<&str> = output.stderr.lines().collect();
    assert_eq!(
        infos,
        [
            "[INFO] Querying registry for permission grant",
            "[INFO] Permission granted",
            "[INFO] Fetching image manifest list",
            "[INFO] Fetching image manifest",
            "[INFO] Downloading 1 missing layers...",
            "[INFO] Extracting image layers...",
            "[INFO] Converting whiteouts...",
            "[INFO] Creating squashfs filesystem...",
        ]
    );
    let unpacked = unsquashfs(&world.home.join("some+thing+1.0.sqsh"), &world.site.path("unsquashed"));
    let text = |path: &str| match &unpacked[path].kind {
        tree::Kind::File(content, _) => String::from_utf8(content.clone()).unwrap(),
        other => panic!("{path}: {other:?}"),
    };
    assert_eq!(text("usr/etc/environment"), "PATH=/bin\nCOLOUR=light blue\n");
    assert_eq!(text("usr/etc/fstab"), "${ENROOT_ROOTFS}/data /data none x-create=dir,bind,rw,nosuid,nodev\n");
    assert_eq!(text("usr/etc/motd"), "hello");
    let rc = text("usr/etc/rc");
    assert!(rc.contains(&format!("# enroot-provenance: {uri}\n# maintainer somebody\n")), "{rc}");
    assert!(unpacked.contains_key("usr/etc/rc.local") && unpacked["work/here"].kind == tree::Kind::Directory);
    assert_eq!(unpacked["usr/etc/rc"].mode, 0o755);

    // Once more: nothing is downloaded, and nothing is overwritten.
    let again = world.run(&["import", "-o", "again.sqsh", &uri]).success().unwrap();
    assert!(again.stderr.contains("[INFO] Found all layers in cache\n"), "{again}");
    let path = world.home.join("some+thing+1.0.sqsh").canonicalize().unwrap();
    assert_eq!(world.error(&["import", &uri]), format!("File already exists: {}", path.display()));
    assert_eq!(world.names(""), [".cache", "again.sqsh", "some+thing+1.0.sqsh"]);
    // Of the generated files the time is that of the import; else the two are one.
    let same = unsquashfs(&world.home.join("again.sqsh"), &world.site.path("again"));
    tree::assert_same(&same, &unpacked);
}

#[test]
fn digests_are_those_of_the_platform() {
    let world = World::new("digest");
    world.push_busybox();
    let digest = world.registry.digest("busybox:latest").unwrap();
    assert_eq!(world.ok(&["digest", &world.uri("busybox")]), format!("{digest}\n"));
    let other = if cfg!(target_arch = "aarch64") { "amd64" } else { "arm64" };
    let output = world.run(&["digest", "-a", other, &world.uri("busybox")]).success().unwrap();
    assert!(output.stderr.contains("[WARN] Image architecture doesn't match the requested one: "), "{output}");
    assert_eq!(output.stdout, format!("{digest}\n"));
    assert_eq!(world.error(&["digest", "-a", "vax", &world.uri("busybox")]), "Unsupported architecture: vax");
    assert_eq!(world.error(&["digest", "busybox"]), "Invalid argument: busybox");
    assert_eq!(world.error(&["digest", "docker://Foo/Bar"]), "Invalid image reference: docker://Foo/Bar");
    let missing = world.error(&["digest", &world.uri("missing")]);
    assert!(missing.contains("missing:latest not found"), "{missing}");
}

#[test]
fn the_users_credentials_are_used() {
    let account = Account { user: "alice".into(), password: "wonder land".into() };
    let options = RegistryOptions { accounts: vec![account], ..RegistryOptions::default() };
    let world = World::with_registry("credentials", options);
    world.push_busybox();
    let refused = world.error(&["digest", &world.uri("busybox")]);
    assert!(refused.contains("requires credentials"), "{refused}");
    let file = world.home.join(".config/enroot/.credentials");
    std::fs::create_dir_all(file.parent().unwrap()).unwrap();
    std::fs::write(&file, "machine localhost login alice password $SECRET\n").unwrap();
    for path in [".config", ".config/enroot", ".config/enroot/.credentials"] {
        world.user.own(&world.home.join(path)).unwrap();
    }
    let mut command = world.command(&["import", "-o", "x.sqsh", &world.uri("busybox")]);
    let output =
        testbed::process::run(command.env("SECRET", "wonder land"), wait::DEADLINE).unwrap().success().unwrap();
    let lines: Vec<&str> = output.stderr.lines().take(5).collect();
    assert_eq!(
        lines,
        [
            "[INFO] Querying registry for permission grant",
            "[INFO] Authenticating with user: alice",
            &format!("[INFO] Using credentials from file: {}", file.display()),
            "[INFO] Authentication succeeded",
            "[INFO] Fetching image manifest list",
        ]
    );
    assert!(!output.stderr.contains("wonder land"), "{output}");
}

#[test]
fn two_at_once_do_not_disturb_each_other() {
    let world = World::new("concurrent");
    let trees = images::feature_trees(&world.site.path("trees"), 200).unwrap();
    let image = images::features(&world.site.path("layout"), &trees, [Compression::Gzip; 3]).unwrap();
    world.registry.push(&image, "features:latest").unwrap();
    let uri = world.uri("features");
    let start = |file: &str| Running::start(&mut world.command(&["import", "-o", file, &uri])).unwrap();
    let running = ["a.sqsh", "b.sqsh", "same.sqsh", "same.sqsh"].map(start);
    let outputs = running.map(|running| running.wait(wait::DEADLINE * 2).unwrap());
    assert!(outputs[..2].iter().all(|output| output.status.success()), "{outputs:?}");
    let winners = outputs[2..].iter().filter(|output| output.status.success()).count();
    let told = outputs[2..].iter().filter(|output| output.stderr.contains("[ERROR] File already exists: ")).count();
    assert_eq!((winners, told), (1, 1), "{outputs:?}");
    assert_eq!(world.names(""), [".cache", "a.sqsh", "b.sqsh", "same.sqsh"]);
    assert_eq!(world.names(".cache/enroot/blobs/sha256").len(), 3);
}

#[test]
fn a_killed_import_leaves_nothing() {
    let world = World::new("killed");
    world.push_busybox();
    for command in [&["import", "-o", "x.sqsh"][..], &["load", "-n", "x"]] {
        let proxy = Proxy::start(world.registry.port()).unwrap();
        proxy.set(Behaviour::StallAfter(20_000));
        let uri = format!("docker://{}#busybox", proxy.host());
        let running = Running::start(&mut world.command(&[command, &[&uri]].concat())).unwrap();
        proxy.wait_until_held(wait::DEADLINE).unwrap();
        running.signal(Signal::SIGKILL).unwrap();
        assert_eq!(running.wait(wait::DEADLINE).unwrap().code(), 137);
    }
    assert_eq!(world.names(""), [".cache", ".local"]);
    assert_eq!(world.ok(&["list"]), "");
    assert_eq!(world.names(".cache/enroot/blobs/sha256"), [] as [&str; 0]);
    world.ok(&["load", "-n", "x", &world.uri("busybox")]);
    assert_eq!(world.names(".local/share/enroot"), ["x"]);
}

#[test]
fn hostile_layers_are_refused() {
    let world = World::new("hostile");
    let outside = world.home.join("outside");
    for (name, tar, message) in [
        ("up", Tar::new().file("../../../outside", "x"), "its path contains \"..\""),
        ("link-out", Tar::new().link("a", "../../outside"), "hard link to \"../../outside\""),
        ("link-absolute", Tar::new().link("a", "/etc/passwd"), "hard link to \"etc/passwd\""),
    ] {
        let image = image(&world.site.path(name), &[tar.done()]);
        world.registry.push(&image, &format!("{name}:latest")).unwrap();
        let error = world.error(&["load", "-n", "x", &world.uri(name)]);
        assert!(error.contains(message), "{name}: {error}");
        let error = world.error(&["import", "-o", "x.sqsh", &world.uri(name)]);
        assert!(error.contains(message), "{name}: {error}");
        assert!(!outside.exists() && !world.home.join("x.sqsh").exists());
        assert_eq!(world.names(".local/share/enroot"), [] as [&str; 0], "{name}");
    }
    // Links may lead anywhere: they are links inside.
    let tar = Tar::new().symlink("out", "/home").symlink("up", "../../..").file("file", "x");
    world.registry.push(&image(&world.site.path("links"), &[tar.done()]), "links:latest").unwrap();
    world.ok(&["load", &world.uri("links")]);
    // Also on the way to other entries.
    let tar = Tar::new().symlink("a", "../..").file("a/outside", "x");
    world.registry.push(&image(&world.site.path("through"), &[tar.done()]), "through:latest").unwrap();
    world.ok(&["load", &world.uri("through")]);
    assert!(!outside.exists() && world.home.join(".local/share/enroot/through/outside").exists());
}

#[test]
fn damaged_blobs_are_found_out() {
    let world = World::new("damaged");
    world.push_busybox();
    let uri = world.uri("busybox");
    world.ok(&["import", "-o", "good.sqsh", &uri]);
    let blobs = world.home.join(".cache/enroot/blobs/sha256");
    let blob = blobs.join(&world.names(".cache/enroot/blobs/sha256")[0]);
    // In the cache: it is downloaded again.
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[1000] ^= 1;
    std::fs::write(&blob, &bytes).unwrap();
    world.ok(&["import", "-o", "again.sqsh", &uri]);
    // In the registry as well.
    std::fs::write(&blob, &bytes).unwrap();
    let hex = blob.file_name().unwrap().to_str().unwrap().to_owned();
    let stored = world.registry.storage().join(format!("docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]));
    std::fs::write(stored, &bytes).unwrap();
    let error = world.error(&["import", "-o", "bad.sqsh", &uri]);
    assert!(error.contains("its blob has the digest"), "{error}");
    let host = world.registry.host();
    let again = format!("; downloaded 3 times from {host}, {host}, {host}: push the image again");
    assert!(error.ends_with(&again), "{error}");
    assert_eq!(world.names(".cache/enroot/blobs/sha256"), [] as [&str; 0]);
    assert!(!world.home.join("bad.sqsh").exists());
}

/// What a mirror damages, the registry has; and what is damaged once on its way is asked for once more.
#[test]
fn blobs_that_arrive_damaged_are_fetched_again() {
    let world = World::new("damaged-on-its-way");
    world.push_busybox();
    let proxy = Proxy::start(world.registry.port()).unwrap();
    let (registry, mirror) = (world.registry.host(), proxy.host());
    let config = world.site.path("pyxis.toml");
    let insecure = |host: &str| format!("[registry.\"{host}\"]\ninsecure = true\n");
    let mirrors = format!("mirrors = [{{ location = \"{mirror}\", insecure = true }}]\n");
    std::fs::write(&config, insecure(&mirror) + &insecure(&registry) + &mirrors).unwrap();
    // In the layer: the manifest and the config are shorter.
    proxy.set(Behaviour::Corrupt(20_000));
    for (number, (image, from)) in
        [(world.uri("busybox"), &registry), (format!("docker://{mirror}#busybox"), &mirror)].into_iter().enumerate()
    {
        let connections = proxy.connections();
        let file = format!("{number}.sqsh");
        let arguments = ["--config", config.to_str().unwrap(), "import", "-o", &file, &image];
        let output = testbed::process::run(&mut world.pyxis(&arguments), wait::DEADLINE).unwrap().success().unwrap();
        let told = format!(" arrived damaged: downloading it from {from}\n");
        assert!(output.stderr.contains(&told), "{output}");
        assert!(proxy.connections() > connections);
        std::fs::remove_dir_all(world.home.join(".cache")).unwrap();
    }
    let good = unsquashfs(&world.home.join("0.sqsh"), &world.site.path("0"));
    assert!(good.contains_key("bin/busybox"));
    let again = unsquashfs(&world.home.join("1.sqsh"), &world.site.path("1"));
    assert_eq!(good["bin/busybox"].kind, again["bin/busybox"].kind);
}

/// With a docker that knows one image, once it has pulled it.
#[test]
fn images_of_an_engine_are_imported() {
    let world = World::new("import-engine");
    let layout = images::busybox(&world.site.path("busybox")).unwrap();
    let archive = world.site.path("archive");
    let to = format!("docker-archive:{}:box:1", archive.display());
    output_of(Command::new("skopeo").args(["copy", "--quiet"]).args([layout, to])).unwrap();
    let bin = world.site.make_directory("engine").unwrap();
    world.user.own(&bin).unwrap();
    let script = format!(
        "#!/bin/sh\ncd {} || exit\ncase \"$1 $2 $3\" in\n'image inspect box:1') test -e pulled;;\n\
         'pull box:1 ') touch pulled; echo pulling;;\n'save box:1 ') exec cat {};;\n*) echo \"no $*\" >&2; exit 7;;\nesac\n",
        bin.display(),
        archive.display()
    );
    std::fs::write(bin.join("docker"), script).unwrap();
    std::fs::set_permissions(bin.join("docker"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let import = |arguments: &[&str]| {
        let mut command = world.command(&[&["import"], arguments].concat());
        command.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
        testbed::process::run(&mut command, wait::DEADLINE).unwrap()
    };
    let output = import(&["dockerd://box:1"]).success().unwrap();
    assert!(output.stdout.is_empty() && output.stderr.contains("pulling\n"), "{output}");
    assert!(!import(&["-o", "again.sqsh", "dockerd://box:1"]).success().unwrap().stderr.contains("pulling"));
    world.ok(&["create", "box+1.sqsh"]);
    let root = world.home.join(".local/share/enroot/box+1");
    assert!(std::fs::read_to_string(root.join("etc/rc")).unwrap().contains("dockerd://box:1"));
    assert!(root.join("bin/busybox").exists());
    let output = import(&["dockerd://other"]);
    let expected = "no pull other\n[ERROR] docker pull other failed\n";
    assert!(output.code() == 1 && output.stderr.ends_with(expected), "{output}");
    assert_eq!(world.error(&["load", "dockerd://box:1"]), "Invalid argument: dockerd://box:1");
}
