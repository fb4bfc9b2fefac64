//! An enroot configuration of the site's and of the user's own.

use crate::seed::Node;
use crate::{stdout, text};

#[test]
fn settings_come_from_option_environment_enroot_conf_and_our_own_in_this_order() {
    let node = Node::new();
    let whoami = "id -u; touch /x 2>/dev/null && echo writable || echo readonly";
    assert_eq!(stdout(node.run(&[], whoami)), "4242\nreadonly");
    node.configure_enroot("enroot.conf", "ENROOT_REMAP_ROOT yes\nENROOT_ROOTFS_WRITABLE $(echo yes)\n");
    assert_eq!(stdout(node.run(&[], whoami)), "0\nwritable");
    let off = [("ENROOT_REMAP_ROOT", "no"), ("ENROOT_ROOTFS_WRITABLE", "false")];
    assert_eq!(stdout(node.run_with(&off, &[], whoami)), "4242\nreadonly");
    assert_eq!(stdout(node.run_with(&off, &["--container-remap-root"], whoami)), "0\nreadonly");
    assert_eq!(stdout(node.run(&["--container-readonly"], whoami)), "0\nreadonly");
    node.configure_enroot("enroot.conf", "# broken\nENROOT_REMAP_ROOT 'yes\n");
    let refused = node.run(&[], "true");
    assert!(!refused.status.success());
    let error = text(&refused.stderr);
    assert!(error.contains("[ERROR] Invalid configuration file: ") && error.contains("line 2"), "{error}");
}

#[test]
fn mounts_of_the_site_and_of_the_user() {
    let node = Node::new();
    let host = node.host_directory();
    std::fs::write(host.join("file"), "from the host\n").unwrap();
    std::fs::create_dir(host.join("dir")).unwrap();
    let fstab = format!("{0} /site none x-create=dir,bind,ro\n${{SOURCE}}/file /named\n", host.display());
    node.configure_enroot("mounts.d/30-site.fstab", &fstab);
    let user = node.configure_user(
        "mounts.d/10.fstab",
        "tmpfs /mine tmpfs x-create=dir,size=64k\nnone /mine/proc proc x-create=dir,nofail,silent\n\
         /nowhere /x none bind,nofail\n/site/file /never none bind 0 3\n",
    );
    let variables = [("SOURCE", host.to_str().unwrap()), ("ENROOT_CONFIG_PATH", user.to_str().unwrap())];
    let script = "cat /site/file /named; touch /site/x 2>&1; ls -d /mine; grep -c ' /never ' /proc/self/mounts";
    let output = node.run_with(&variables, &["--verbose"], script);
    let expected = "from the host\nfrom the host\ntouch: /site/x: Read-only file system\n/mine\n0";
    assert_eq!(text(&output.stdout), expected, "{}", text(&output.stderr));
    let log = text(&output.stderr);
    for part in
        ["10.fstab:4: never mounted", "enroot-mount: failed to mount: /nowhere at /x: No such file or directory"]
    {
        assert!(log.contains(part), "{log}");
    }

    // The default mounts are the administrator's to change.
    assert_eq!(stdout(node.run_with(&variables, &[], "grep -c ' /var/lock ' /proc/mounts")), "1");
    node.configure_enroot("mounts.d/10-system.fstab", "/proc /proc rbind,x-create=dir 0 -1\n");
    assert_eq!(
        stdout(node.run_with(&variables, &[], "grep -c ' /var/lock ' /proc/mounts || cat /named")),
        "0\nfrom the host"
    );

    node.configure_enroot("mounts.d/90-bad.fstab", "/nowhere /x none bind\n");
    let refused = node.run_with(&variables, &[], "true");
    assert!(!refused.status.success());
    assert_eq!(
        text(&refused.stderr),
        "pyxis: container start failed with error code: 1\npyxis: printing enroot log file:\n\
         pyxis:     enroot-mount: failed to mount: /nowhere at /x: No such file or directory"
    );
}

#[test]
fn what_is_mounted_on_the_root_is_the_root() {
    let node = Node::new();
    let host = node.host_directory();
    std::fs::create_dir_all(host.join("bin")).unwrap();
    std::fs::copy("/bin/busybox", host.join("bin/sh")).unwrap();
    std::fs::write(host.join("here"), "").unwrap();
    node.configure_enroot("mounts.d/10.fstab", &format!("{} / none rbind\n", host.display()));
    assert_eq!(stdout(node.run(&["--container-workdir", "/"], "echo *")), "bin here");
}
