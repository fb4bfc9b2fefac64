//! Package managers, as remapped root in a writable container: their packages bring users, owners and set-id bits, of
//! which a container with one mapped uid can have none.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use testbed::{images, process, rpm};

use crate::Case;
use crate::world::World;

pub const CASES: &[Case] =
    &[("apt", apt), ("apt_over_the_network", apt_over_the_network), ("dnf_and_rpm", dnf), ("read_only", read_only)];

const OPTIONS: [&str; 2] = ["--container-remap-root", "--container-writable"];

/// Directory of the repository in the container.
const REPOSITORY: &str = "/repository";

/// Builds a package in `repository`.
fn build(repository: &Path, name: &str, depends: &str, postinst: &str) -> Result<()> {
    let tree = repository.join("trees").join(name);
    fs::create_dir_all(tree.join("DEBIAN"))?;
    fs::create_dir_all(tree.join("usr/bin"))?;
    fs::create_dir_all(tree.join("etc"))?;
    let control = format!(
        "Package: {name}\nVersion: 1\nArchitecture: all\n{depends}Maintainer: Testbed <testbed@localhost>\n\
         Description: says {name}\n"
    );
    let command = format!("#!/bin/sh\necho {name} from a package\n");
    let etc = format!("etc/{name}.conf");
    for (file, text, mode) in [
        ("DEBIAN/control", control.as_str(), 0o644),
        ("DEBIAN/conffiles", &format!("/{etc}\n"), 0o644),
        ("DEBIAN/postinst", &format!("#!/bin/sh\nset -e\n{postinst}"), 0o755),
        (&format!("usr/bin/{name}"), &command, 0o755),
        (&etc, "configured\n", 0o640),
    ] {
        fs::write(tree.join(file), text)?;
        fs::set_permissions(tree.join(file), fs::Permissions::from_mode(mode))?;
    }
    let mut build = Command::new("dpkg-deb");
    build.args(["--root-owner-group", "--build"]).arg(&tree).arg(repository.join(format!("{name}_1_all.deb")));
    process::output_of(&mut build).map(drop)
}

/// A repository of two packages, of which one needs the other. Gives the option that mounts it.
fn repository(world: &World) -> Result<String> {
    let repository = world.bed.site.make_directory("state/repository")?;
    build(
        &repository,
        "hello",
        "Depends: greeting\n",
        "useradd --system --gid greeters --no-create-home greeter
         chown greeter:greeters /usr/bin/hello; chmod 4755 /usr/bin/hello
         install -d -o greeter -g greeters -m 2770 /var/lib/hello\n",
    )?;
    build(
        &repository,
        "greeting",
        "",
        "groupadd --system greeters\nchgrp greeters /usr/bin/greeting\nchmod 2755 /usr/bin/greeting
         chown -R games:mail /etc/greeting.conf\n",
    )?;
    let mut index = Command::new("dpkg-scanpackages");
    let index = process::output_of(index.arg(".").current_dir(&repository)).context("dpkg-dev")?;
    fs::write(repository.join("Packages"), index)?;
    Ok(format!("--container-mounts={}:{REPOSITORY}:ro,/bin/busybox", repository.display()))
}

/// Installs the packages from `source` and says what came of it.
fn install(world: &mut World, options: &[&str], before: &str, source: &str) -> Result<String> {
    world.have("debian", |_| images::debian())?;
    let mount = repository(world)?;
    let script = format!(
        "set -e; {before}
        rm -rf /etc/apt/sources.list.d; echo 'deb [trusted=yes] {source} ./' >/etc/apt/sources.list
        {{ apt-get -q update && apt-get -q install -y hello; }} >/tmp/log 2>&1 || {{ cat /tmp/log >&2; exit 1; }}
        grep -i 'sandbox\\|^[WE]:' /tmp/log || :
        hello; greeting; stat -c %a /usr/bin/hello /usr/bin/greeting /var/lib/hello /etc/hello.conf
        dpkg-query -W -f '${{db:Status-Status}}\\n' hello greeting
        grep -c '^greeter:' /etc/passwd; apt-get -qq remove -y hello >/dev/null && ! test -e /usr/bin/hello && echo removed"
    );
    world.sh(&[&["--container-image=debian", &mount], &OPTIONS[..], options].concat(), &script)
}

const INSTALLED: &str =
    "hello from a package\ngreeting from a package\n4755\n2755\n2770\n640\ninstalled\ninstalled\n1\nremoved";

fn apt(world: &mut World) -> Result<()> {
    assert_eq!(install(world, &[], ":", &format!("file:{REPOSITORY}"))?, INSTALLED);
    Ok(())
}

/// apt's http method drops its privileges before it connects, to `_apt` where there is such a user.
fn apt_over_the_network(world: &mut World) -> Result<()> {
    let serve = format!(
        "/bin/busybox httpd -f -p 127.0.0.1:8080 -h {REPOSITORY} & trap \"kill $!\" EXIT; echo '_apt:x:100:65534::/nonexistent:/bin/false' >>/etc/passwd"
    );
    let options = ["--container-unshare=net"];
    assert_eq!(install(world, &options, &serve, "http://127.0.0.1:8080")?, INSTALLED);
    Ok(())
}

/// Builds two packages with rpmbuild and installs them with dnf; the same again with rpm alone.
fn dnf(world: &mut World) -> Result<()> {
    world.have("rpm", |_| rpm::image())?;
    let options = [&["--container-image=rpm"], &OPTIONS[..]].concat();
    let script = format!("set -e\nmkdir /tmp/rpm; cd /tmp/rpm; cat >hello.spec <<'END'\n{SPEC}END\n{INSTALL_RPM}");
    let seen = world.sh(&options, &script)?;
    assert_eq!(seen, "hello from an rpm\n4755\n2770\ntestbed-hello-1-1.noarch\nremoved\nhello from an rpm");
    Ok(())
}

const SPEC: &str = r"Name: testbed-hello
Version: 1
Release: 1
Summary: says hello
License: none
BuildArch: noarch
Requires: testbed-base
%description
%package -n testbed-base
Summary: what the image has already
Provides: /bin/sh
%description -n testbed-base
%install
mkdir -p %{buildroot}/usr/bin %{buildroot}/var/lib/hello
printf '#!/bin/sh\necho hello from an rpm\n' >%{buildroot}/usr/bin/hello
%pre
groupadd --system greeters
useradd --system --gid greeters --no-create-home greeter
%post
chown greeter:greeters /var/lib/hello
%files -n testbed-base
%files
%attr(4755, greeter, greeters) /usr/bin/hello
%dir %attr(2770, root, greeters) /var/lib/hello
";

const INSTALL_RPM: &str = r"
{
    rpmbuild -bb --define '_topdir /tmp/rpm' hello.spec && createrepo_c RPMS
    printf '%s\n' '[main]' gpgcheck=0 reposdir=/none '[local]' name=local baseurl=file:///tmp/rpm/RPMS >dnf.conf
    dnf --config dnf.conf --releasever=1 -y install testbed-hello
} >log 2>&1 || { cat log >&2; exit 1; }
hello; stat -c %a /usr/bin/hello /var/lib/hello; rpm -q testbed-hello
dnf --config dnf.conf --releasever=1 -y remove testbed-hello >log 2>&1 || { cat log >&2; exit 1; }
test -e /usr/bin/hello || echo removed
userdel greeter; rpm -i RPMS/noarch/testbed-*.rpm; hello
";

/// Without `--container-writable` it fails as everywhere.
fn read_only(world: &mut World) -> Result<()> {
    world.have("debian", |_| images::debian())?;
    let arguments = ["--container-image=debian", "--container-remap-root", "--container-readonly", "apt-get", "update"];
    let output = world.srun(&arguments)?;
    ensure!(!output.status.success() && output.stderr.contains("Read-only file system"), "{output}");
    Ok(())
}
