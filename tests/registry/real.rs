//! Debian's registry, images from independent tools, and their verdict.

use std::process::Command;
use std::sync::Arc;

use spank_pyxis::importer::protocol::FailureKind;
use spank_pyxis::registry::credentials::{SiteHelpers, UserKeys};
use spank_pyxis::request::Environment;
use testbed::image::Compression;
use testbed::process::output_of;
use testbed::registry::{Account, Registry, RegistryOptions};
use testbed::{Site, images};

use crate::broker::{Import, Imported};

/// Every layer image, judged by `fsck.erofs`.
fn check(imported: &Imported) {
    for file in &imported.files {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        std::io::copy(&mut { file }.try_clone().map(rewound).unwrap(), &mut image).unwrap();
        output_of(Command::new("fsck.erofs").arg(image.path())).unwrap();
    }
}

fn rewound(mut file: std::fs::File) -> std::fs::File {
    use std::io::Seek;
    file.rewind().unwrap();
    file
}

#[test]
fn images_of_independent_tools() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-images").unwrap();
    let registry = Registry::start(&site, "open", RegistryOptions::default()).unwrap();
    let trees = images::feature_trees(&site.path("trees"), 500).unwrap();
    let layout = site.path("layout");
    let image = images::features(&layout, &trees, [Compression::Gzip, Compression::Zstd, Compression::None]).unwrap();
    registry.push(&image, "features:latest").unwrap();
    // The same as Docker's schema 2, and compressed again by skopeo.
    let copy = |arguments: &[&str], image: &str, name: &str| {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--dest-tls-verify=false"]).args(arguments);
        output_of(command.arg(image).arg(registry.transport(name))).unwrap();
    };
    copy(&["--dest-compress-format", "zstd", "--dest-compress"], &image, "features:zstd");
    let gzipped = [Compression::Gzip, Compression::Gzip, Compression::None];
    let image = images::features(&site.path("layout-gzip"), &trees, gzipped).unwrap();
    copy(&["--format", "v2s2"], &image, "features:docker");
    for tag in ["latest", "docker", "zstd"] {
        let imported = Import::new(&format!("features:{tag}"), &[&registry.host()]).run().unwrap();
        assert_eq!(imported.manifest.to_string(), registry.digest(&format!("features:{tag}")).unwrap(), "{tag}");
        assert_eq!(imported.layers.len(), 3);
        check(&imported);
    }
    let digest = registry.digest("features:latest").unwrap();
    let pinned = Import::new(&format!("features@{digest}"), &[&registry.host()]).run().unwrap();
    assert_eq!(pinned.manifest.to_string(), digest);
}

#[test]
fn an_image_of_umoci() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-umoci").unwrap();
    let registry = Registry::start(&site, "open", RegistryOptions::default()).unwrap();
    let (layout, tree) = (site.path("layout"), site.path("tree"));
    images::busybox_tree(&tree).unwrap();
    let umoci = |arguments: &[&str]| output_of(Command::new("umoci").args(arguments)).unwrap();
    let (layout, tree) = (layout.to_str().unwrap(), tree.to_str().unwrap());
    let name = format!("{layout}:latest");
    umoci(&["init", "--layout", layout]);
    umoci(&["new", "--image", &name]);
    umoci(&["insert", "--image", &name, tree, "/"]);
    umoci(&["insert", "--image", &name, "/etc/passwd", "/etc/passwd"]);
    umoci(&["config", "--image", &name, "--config.env", "A=b", "--config.workingdir", "/work"]);
    registry.push(&format!("oci:{name}"), "umoci:latest").unwrap();
    let imported = Import::new("umoci", &[&registry.host()]).run().unwrap();
    assert_eq!(imported.manifest.to_string(), registry.digest("umoci:latest").unwrap());
    let config = spank_pyxis::image::config::ImageConfig::parse(&imported.config).unwrap();
    assert_eq!((config.env, config.working_dir), (vec!["A=b".to_owned()], "/work".to_owned()));
    check(&imported);
}

#[test]
fn passwords_from_the_users_files() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-passwords").unwrap();
    let account = Account { user: "reader".into(), password: "pass word".into() };
    let options = RegistryOptions { accounts: vec![account], ..RegistryOptions::default() };
    let registry = Registry::start(&site, "closed", options).unwrap();
    let image = images::distroless(&site.path("layout")).unwrap();
    registry.push(&image, "private:latest").unwrap();
    let home = site.make_directory("home").unwrap();
    let load = || Arc::new(UserKeys::new(Environment::default(), &home, SiteHelpers::new()));

    let import = |keys: Arc<UserKeys>| Import { keyring: keys, ..Import::new("private", &[&registry.host()]) };
    let (kind, message) = import(load()).fail();
    assert_eq!(kind, FailureKind::Denied);
    let tried = format!(
        "tried {home}/.config/enroot/.credentials, {home}/.docker/config.json and {home}/.config/containers/auth.json",
        home = home.display()
    );
    assert!(message.contains("no credentials found") && message.ends_with(&tried), "{message}");

    site.make_directory("home/.docker").unwrap();
    // reader:pass word
    let config = format!(r#"{{"auths": {{"{}": {{"auth": "cmVhZGVyOnBhc3Mgd29yZA=="}}}}}}"#, registry.host());
    site.write("home/.docker/config.json", config).unwrap();
    import(load()).run().unwrap();

    // enroot's file goes first, and its password is wrong.
    site.make_directory("home/.config/enroot").unwrap();
    site.write("home/.config/enroot/.credentials", "machine localhost login reader password wrong\n").unwrap();
    let (kind, message) = import(load()).fail();
    assert_eq!(kind, FailureKind::Denied);
    assert!(message.contains(".config/enroot/.credentials"), "{message}");
}

#[test]
fn an_unknown_authority() {
    testbed::prerequisites::check().unwrap();
    let site = Site::create("registry-tls").unwrap();
    let registry = Registry::start(&site, "tls", RegistryOptions { tls: true, ..RegistryOptions::default() }).unwrap();
    let mut import = Import::new("some/image", &[&registry.host()]);
    import.registries.registry.clear();
    let (kind, message) = import.fail();
    assert_eq!(kind, FailureKind::Unavailable);
    assert_eq!(
        message,
        format!(
            "{}: certificate of an unknown authority: add the site's CA certificate to the trust store of this node \
             (update-ca-certificates, update-ca-trust), or name it by ca in pyxis.toml",
            registry.host()
        )
    );
}
