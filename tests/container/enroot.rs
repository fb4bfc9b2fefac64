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

#[test]
fn variables_of_the_site_and_of_the_user() {
    let node = Node::new();
    node.configure_enroot(
        "environ.d/10.env",
        "# x\nSITE=${FROM_HOST}/site\nBOTH='site'\nENROOT_X=no\nUNSET=${NOT_SET}\n",
    );
    let user = node.configure_user("environ.d/10.env", "MINE=\"a b\"\nBOTH=user\n");
    let variables = [("ENROOT_CONFIG_PATH", user.to_str().unwrap())];
    let script = "echo \"$SITE|$BOTH|$ENROOT_X|$MINE|${UNSET-unset}|$FROM_IMAGE\"";
    assert_eq!(stdout(node.run_with(&variables, &[], script)), "host/site|user||a b||image");
    assert_eq!(stdout(node.run_with(&variables, &["--container-env", "BOTH"], script)), "host/site|host||a b||image");
}

#[test]
fn hooks_run_in_order_with_enroots_environment() {
    let node = Node::new();
    let note = "#!/bin/bash\nset -eu\nnote() { printf '%s' \"$1,\" >> \"$HOST/order\"; }\n";
    node.configure_enroot("hooks.d/20-second.sh", &format!("{note}note second; echo discarded"));
    node.configure_enroot("hooks.d/10-first.sh", &format!("{note}note first"));
    node.configure_enroot("hooks.d/30-no-interpreter.sh", "printf 'script,' >> \"$HOST/order\"");
    node.configure_enroot("hooks.d/98-nvidia.sh", &format!("{note}note built-in; exit 1"));
    node.configure_enroot("hooks.d/40-off.txt", &format!("{note}note off; exit 1"));
    let user = node.configure_user(
        "hooks.d/00-mine.sh",
        &format!(
            "{note}note user\n\
             source \"$ENROOT_LIBRARY_PATH/common.sh\"\n\
             common::checkcmd enroot-mount cat\n\
             test \"$(common::getpwent | cut -d: -f1)\" = pyxis-seed\n\
             test -d \"$ENROOT_ROOTFS/opaque\" -a -d /proc/$ENROOT_PID -a \"$ENROOT_SYSCONF_PATH\" != \"\"\n\
             grep -q ^FROM_IMAGE=image \"$ENROOT_ENVIRON\"\n\
             test \"$PWD\" = \"$HOST\"\n\
             echo \"BY_HOOK='id $(id -u)'\" >> \"$ENROOT_ENVIRON\"\n\
             sed -i s/^BOTH=.*/BOTH=hook/ \"$ENROOT_ENVIRON\"\n\
             touch \"$ENROOT_ROOTFS/written\"; chown 5:5 \"$ENROOT_ROOTFS/written\"\n\
             printf '%s /by-line none x-create=dir,rbind,ro\\n' \"$HOST\" >> \"$ENROOT_MOUNTS\"\n\
             enroot-mount --root \"$ENROOT_ROOTFS\" - <<< \"tmpfs /by-hook tmpfs x-create=dir,mode=755\"\n\
             echo made > \"$ENROOT_ROOTFS/by-hook/file\"\n\
             common::log INFO \"all is well\"\n"
        ),
    );
    let host = node.host_directory();
    std::fs::set_permissions(&host, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let host = host.to_str().unwrap();
    let variables = [("ENROOT_CONFIG_PATH", user.to_str().unwrap()), ("HOST", host)];
    let script = "cat /by-hook/file /by-line/order; echo; echo $BY_HOOK $BOTH; ls /written; touch /by-line/x 2>&1; \
                  grep -c run/hooks /proc/self/mounts";
    for (options, id) in [(&["--verbose"][..], "4242"), (&["--verbose", "--container-remap-root"], "0")] {
        let _ = std::fs::remove_file(format!("{host}/order"));
        let output = node.run_in(host, &variables, options, script);
        let expected = format!(
            "made\nfirst,second,script,user,\nid {id} hook\n/written\ntouch: /by-line/x: Read-only file system\n0"
        );
        let log = text(&output.stderr);
        assert_eq!(text(&output.stdout), expected, "{log}");
        assert!(log.contains("00-mine.sh: [INFO] all is well"), "{log}");
        assert!(log.contains("98-nvidia.sh: built in: not run"), "{log}");
    }
}

#[test]
fn a_hook_that_is_not_executable_is_skipped() {
    let node = Node::new();
    node.configure_enroot("hooks.d/10.sh", "#!/bin/sh\nexit 1\n");
    node.forbid_execution("hooks.d/10.sh");
    let output = node.run(&["--verbose"], "echo ran");
    assert_eq!(text(&output.stdout), "ran");
    assert!(text(&output.stderr).contains("10.sh: not executable: not run"));
}

#[test]
fn a_hook_that_fails_is_told_with_what_it_said() {
    let node = Node::new();
    let host = node.host_directory();
    std::fs::set_permissions(&host, std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    let marker = host.join("marker");
    node.configure_enroot("hooks.d/10.sh", "#!/bin/sh\necho hidden; echo \"what went wrong\" >&2; exit 7\n");
    node.configure_enroot("hooks.d/20.sh", &format!("#!/bin/sh\ntouch {}\n", marker.display()));
    let output = node.run(&[], "true");
    assert!(!output.status.success());
    let path = node.enroot_file("hooks.d/10.sh");
    let expected = format!(
        "pyxis: container start failed with error code: 1\npyxis: printing enroot log file:\n\
         pyxis:     what went wrong\npyxis:     [ERROR] {path} exited with return code 7"
    );
    assert_eq!(text(&output.stderr), expected);
    assert!(!marker.exists(), "the next hook ran");
    node.forbid_execution("hooks.d/20.sh");

    for (script, reason) in [
        ("#!/bin/sh\nkill -KILL $$\n", "exited with return code 137"),
        ("#!/nowhere/sh\n", "cannot be executed: No such file or directory"),
        (
            "#!/bin/bash\nsource $ENROOT_LIBRARY_PATH/common.sh\ncommon::checkcmd no-such-command\n",
            "exited with return code 1",
        ),
        ("#!/bin/sh\necho tmpfs | enroot-mount --root $ENROOT_ROOTFS -\n", "exited with return code 1"),
        ("#!/bin/sh\necho tmpfs >>$ENROOT_MOUNTS\n", "enroot-mount: invalid fstab entry: \"tmpfs\" at ENROOT_MOUNTS"),
        ("#!/bin/sh\nrm $ENROOT_ENVIRON; mkfifo $ENROOT_ENVIRON\n", "the hooks' ENROOT_ENVIRON: not a regular file"),
    ] {
        node.configure_enroot("hooks.d/10.sh", script);
        let output = node.run(&[], "true");
        assert!(!output.status.success(), "{script}");
        assert!(text(&output.stderr).contains(reason), "{script}: {}", text(&output.stderr));
    }
}

#[test]
fn a_hook_that_hangs_is_killed_with_all_it_started() {
    let node = Node::new();
    node.append_config("[hooks]\ntimeout_seconds = 1\n");
    // Also what has left the hook's session and process group.
    let script = "#!/bin/bash\nsetsid sleep 4711 &\ndisown\necho started >&2\nsleep 4711\n";
    node.configure_enroot("hooks.d/10.sh", script);
    let output = node.run(&[], "true");
    let error = text(&output.stderr);
    assert!(error.contains("did not end within 1 seconds") && error.contains("    started"), "{error}");
    assert!(!crate::seed::runs("sleep\u{0}4711\u{0}"));

    let script = "#!/bin/bash\nsetsid sleep 4711 &\ndisown\n";
    node.configure_enroot("hooks.d/10.sh", script);
    assert_eq!(stdout(node.run(&[], "echo ran")), "ran");
    assert!(!crate::seed::runs("sleep\u{0}4711\u{0}"));
}

#[test]
fn every_kind_of_mount() {
    let node = Node::new();
    let host = node.host_directory();
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(host.join(name)).unwrap();
        std::fs::set_permissions(host.join(name), std::os::unix::fs::PermissionsExt::from_mode(0o777)).unwrap();
    }
    std::fs::write(host.join("lower/file"), "below\n").unwrap();
    let fstab = "tmpfs /tmpfs tmpfs x-create=dir,size=64k,mode=755,nodev
none /tmpfs tmpfs remount,size=128k,ro,noexec
devpts /pts devpts x-create=dir,newinstance,ptmxmode=0666,mode=620
none /mqueue mqueue x-create=dir,nosuid,noexec
overlay /overlay overlay x-create=dir,lowerdir=${HOST}/lower,upperdir=${HOST}/upper,workdir=${HOST}/work,userxattr
tmpfs /from tmpfs x-create=dir,size=32k
${ENROOT_ROOTFS}/from /to none x-create=dir,x-move
${HOST} /bound none x-create=dir,rbind
none /bound none remount,bind,ro,nosuid
none /bound none unbindable
tmpfs /gone tmpfs x-create=dir
gone /gone none x-detach
${HOST}/lower/file /file none bind,x-create=file,ro
/nowhere /silent none bind,nofail,silent
none /never proc x-create=dir,nofail
";
    node.configure_enroot("mounts.d/50.fstab", fstab);
    let variables = [("HOST", host.to_str().unwrap()), ("ENROOT_UNSHARE_IPC", "y")];
    let script = "cat /file /overlay/file; echo new > /overlay/new; cat /proc/self/mountinfo";
    let output = node.run_with(&variables, &["--verbose", "--container-writable"], script);
    let log = text(&output.stderr);
    let output = stdout(output);
    assert!(output.starts_with("below\nbelow\n"), "{output}\n{log}");
    assert_eq!(std::fs::read_to_string(host.join("upper/new")).unwrap(), "new\n");
    let line = |path: &str| {
        let lines: Vec<&str> = output.lines().filter(|line| line.split(' ').nth(4) == Some(path)).collect();
        assert_eq!(lines.len(), 1, "{path}: {output}\n{log}");
        lines[0].to_owned()
    };
    for (path, parts) in [
        ("/tmpfs", &[" ro,", "noexec", "nodev", "size=128k"][..]),
        ("/pts", &[" - devpts ", "ptmxmode=666"]),
        ("/mqueue", &[" - mqueue ", "nosuid,noexec"]),
        ("/overlay", &[" - overlay ", "userxattr"]),
        ("/to", &[" - tmpfs ", "size=32k"]),
        ("/bound", &[" ro,nosuid", " unbindable "]),
        ("/file", &[" ro,"]),
    ] {
        let line = line(path);
        assert!(parts.iter().all(|part| line.contains(part)), "{line}");
    }
    assert!(!output.contains(" /gone ") && !output.contains(" /from "), "{output}");
    assert!(log.contains("enroot-mount: failed to mount: none at /never: ") && !log.contains("/silent"), "{log}");
}
