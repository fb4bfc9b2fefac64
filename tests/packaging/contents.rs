//! What is in the packages.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, SystemTime};

use super::{NEW, PACKAGES, package, run};

/// Files that both packages have, but for manual pages and documents.
const FILES: [(&str, &str); 13] = [
    ("/etc/pyxis/pyxis.toml", "-rw-r--r--"),
    ("/usr/bin/enroot", "lrwxrwxrwx"),
    ("/usr/bin/enroot-mount", "lrwxrwxrwx"),
    ("/usr/bin/pyxis", "-rwxr-xr-x"),
    ("/usr/lib/spank-pyxis/spank_pyxis.so", "-rw-r--r--"),
    ("/usr/lib/sysusers.d/pyxis.conf", "-rw-r--r--"),
    ("/usr/lib/tmpfiles.d/pyxis.conf", "-rw-r--r--"),
    ("/usr/share/bash-completion/completions/pyxis", "-rw-r--r--"),
    ("/usr/share/fish/vendor_completions.d/pyxis.fish", "-rw-r--r--"),
    ("/usr/share/pyxis/pyxis.conf", "-rw-r--r--"),
    ("/usr/share/spank-pyxis/apparmor", "-rw-r--r--"),
    ("/usr/share/zsh/_pyxis", "-rw-r--r--"),
    ("/var/lib/pyxis", "drwx--x--x"),
];

/// Path and mode of what a listing like that of `ls -l` has, but for directories of the system's, man pages and documents.
fn listed(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    for line in text.lines() {
        let mode = line.split(' ').next().unwrap_or_default().to_owned();
        assert!(line.contains("root/root") || line.contains("root     root") || line.contains("root root"), "{line}");
        let path = line.split(" -> ").next().and_then(|line| line.rsplit(' ').next()).unwrap_or_default();
        let path = format!("/{}", path.trim_start_matches("./").trim_matches('/'));
        let of_zsh = path.replace("/site-functions/", "/").replace("/vendor-completions/", "/");
        let directory = mode.starts_with('d') && path != "/var/lib/pyxis";
        if !directory && !path.contains("/man/") && !path.contains("/doc/") && !path.contains("/lintian/") {
            found.insert(of_zsh, mode);
        }
    }
    found
}

fn expected() -> BTreeMap<String, String> {
    FILES.iter().map(|&(path, mode)| (path.to_owned(), mode.to_owned())).collect()
}

#[test]
fn both_have_the_same_files() {
    let deb = run(Command::new("dpkg-deb").arg("--contents").arg(PACKAGES.deb(NEW)));
    assert_eq!(listed(&deb), expected());
    let rpm = run(Command::new("rpm").args(["--query", "--list", "--verbose", "--package"]).arg(PACKAGES.rpm()));
    assert_eq!(listed(&rpm), expected());

    // Slurm reads every file in this directory; nothing else of it is touched.
    for listing in [&deb, &rpm] {
        let of_slurm = listing.lines().filter(|line| line.contains("slurm") || line.contains("/usr/share/pyxis/"));
        let names: BTreeSet<_> =
            of_slurm.filter_map(|line| line.rsplit('/').next()).filter(|name| !name.is_empty()).collect();
        assert_eq!(names, BTreeSet::from(["pyxis.conf"]), "{listing}");
        for document in ["README.md", "SELinux.md", "third-party.txt.gz", "man1/pyxis.1.gz", "man1/pyxis-import.1.gz"] {
            assert!(listing.contains(document), "{document}: {listing}");
        }
        for command in ["enroot", "enroot-mount"] {
            assert!(listing.contains(&format!("man1/{command}.1.gz")), "{command}: {listing}");
        }
    }
}

#[test]
fn they_say_what_they_replace_and_need() {
    let control = run(Command::new("dpkg-deb").arg("--field").arg(PACKAGES.deb(NEW)));
    let field = |name: &str| {
        let line = control.lines().find(|line| line.starts_with(&format!("{name}: ")));
        line.unwrap_or_else(|| panic!("no {name} in {control}")).split_once(": ").unwrap().1.to_owned()
    };
    for name in ["Conflicts", "Replaces", "Provides"] {
        for package in ["nvslurm-plugin-pyxis", "enroot"] {
            assert!(field(name).split(", ").any(|one| one == package), "{name}: {control}");
        }
    }
    assert_eq!(field("Depends"), "libc6 (>= 2.34), libgcc-s1 (>= 4.2), passwd");
    let conffiles = run(Command::new("dpkg-deb").arg("--info").arg(PACKAGES.deb(NEW)).arg("conffiles"));
    assert_eq!(conffiles, "/etc/pyxis/pyxis.toml\n");

    let query = |what: &str| run(Command::new("rpm").args(["--query", what, "--package"]).arg(PACKAGES.rpm()));
    let required = query("--requires");
    for line in required.lines() {
        let name = line.split(['(', ' ']).next().unwrap_or_default();
        let known = ["/bin/sh", "/usr/sbin/useradd", "config", "ld-linux-x86-64.so.2", "libc.so.6", "libgcc_s.so.1"];
        assert!(known.contains(&name) || ["rpmlib", "rtld", "util-linux"].contains(&name), "{required}");
        // What a distribution has to have, by the C library's own count.
        if let Some(version) = line.strip_prefix("libc.so.6(GLIBC_2.").and_then(|rest| rest.split([')', '.']).next()) {
            assert!(version.parse::<u32>().unwrap() <= 34, "{required}");
        }
    }
    assert!(required.contains("libc.so.6(GLIBC_2."), "{required}");
    assert!(query("--obsoletes").starts_with("nvslurm-plugin-pyxis"));
    assert!(query("--conflicts").lines().any(|name| name == "enroot"));
    assert!(query("--provides").contains("nvslurm-plugin-pyxis"));
    assert_eq!(query("--configfiles"), "/etc/pyxis/pyxis.toml\n");
    let scripts = query("--scripts");
    assert!(scripts.contains("useradd --system") && scripts.contains("umount"), "{scripts}");
}

#[test]
fn lintian_has_nothing_to_say() {
    let mut lintian = Command::new("lintian");
    lintian
        .args(["--allow-root", "--tag-display-limit", "0", "--fail-on", "error,warning,override"])
        .arg(PACKAGES.deb(NEW));
    let output = testbed::process::run(&mut lintian, super::LONG).unwrap();
    let said: Vec<_> = output.stdout.lines().filter(|line| line.starts_with("E:") || line.starts_with("W:")).collect();
    assert!(output.status.code() != Some(1) && said.is_empty(), "{output}");
}

#[test]
fn rpmlint_has_nothing_to_say() {
    let configuration = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging/rpm/rpmlint.toml");
    let text = run(Command::new("rpmlint").args(["--config", configuration]).arg(PACKAGES.rpm()));
    assert!(text.contains("1 packages and 0 specfiles checked; 0 errors, 0 warnings"), "{text}");
}

/// The same files, of another time, in another directory, for somebody with another umask and time zone.
#[test]
fn the_same_files_give_the_same_packages() {
    let directories = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    for (index, directory) in directories.iter().enumerate() {
        let input = directory.path().join(format!("input{index}"));
        fs::create_dir(&input).unwrap();
        let [plugin, executable] = ["plugin", "executable"].map(|name| {
            let file = input.join(name);
            // Not what has been built, which takes long to compress.
            fs::copy("/bin/true", &file).unwrap();
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000 * (1 + index as u64));
            File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
            file
        });
        let zone = [("TZ", ["UTC", "Asia/Tokyo"][index]), ("SOURCE_DATE_EPOCH", "1700000000")];
        package(&["deb", "rpm"], &plugin, &executable, &directory.path().join("output"), &zone);
    }
    let [first, second] = directories.each_ref().map(|directory| {
        let entries = fs::read_dir(directory.path().join("output")).unwrap();
        let read = |path: &Path| fs::read(path).unwrap();
        entries
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name(), read(&entry.path())))
            .collect::<BTreeMap<_, _>>()
    });
    assert_eq!(first.len(), 2);
    for (name, bytes) in &first {
        assert!(second.get(name) == Some(bytes), "{} differs", name.display());
    }
}

/// In a root directory with nothing in it but what scripts and `rpm` want.
#[test]
fn rpm_installs_and_erases_it() {
    let script = r#"
        set -e
        rpm --initdb
        # The database of a Debian knows none of the libraries.
        rpm --install --nodeps "$1"
        getent passwd pyxis
        test -d /run/pyxis
        pyxis --version
        rpm --verify --nodeps pyxis
        echo '# mine' >>/etc/pyxis/pyxis.toml
        mkdir -p /var/lib/pyxis/containers/1000
        rpm --upgrade --replacepkgs --nodeps "$1"
        tail -n 1 /etc/pyxis/pyxis.toml
        rpm --erase --nodeps pyxis
        test ! -e /usr/bin/pyxis -a ! -e /usr/share/pyxis
        cat /etc/pyxis/pyxis.toml.rpmsave | tail -n 1
        test -d /var/lib/pyxis/containers/1000
    "#;
    let output = super::lifecycle::enter("bookworm", &["bash", "-c", script, "rpm"], &[&PACKAGES.rpm()]);
    assert_eq!(output.matches("# mine").count(), 2, "{output}");
    assert!(output.contains(&format!("pyxis {NEW}")), "{output}");
}
