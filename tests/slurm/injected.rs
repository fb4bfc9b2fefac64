//! What devices bring into a root filesystem: libraries are found by the dynamic linker, and nothing of them stays in
//! containers that are kept or saved.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::{images, process};

use crate::Case;
use crate::cdi::with_files;
use crate::named::{new_name, option, sh};
use crate::world::World;

pub const CASES: &[Case] = &[
    ("libraries_are_found_without_ldconfig", found),
    ("nothing_stays_in_a_named_container", named),
    ("nothing_stays_in_a_saved_container", saved),
    ("an_administrator_can_see_it_beforehand", shown),
];

const DEBIAN: &str = "--container-image=debian";
const DIRECTORY: &str = "/usr/lib/x86_64-linux-gnu";
const SONAME: &str = "libpyxistest.so.1";
const LIST: &str = "ls /usr/lib/x86_64-linux-gnu | grep pyxistest | tr '\\n' ' '; ldconfig -p | grep pyxistest | wc -l";

fn device(version: u32) -> String {
    format!("--container-device=pyxis.test/driver=v{version}")
}

/// Runs `test` with a driver of two versions, a library each.
fn with_drivers(world: &mut World, test: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    world.have("debian", |_| images::debian())?;
    let base = world.bed.site.path("etc/drivers");
    fs::create_dir_all(&base)?;
    let source = base.join("driver.c");
    let devices: Vec<_> = (1..=2)
        .map(|version| {
            let file = base.join(format!("libpyxistest.so.1.{version}"));
            fs::write(&source, format!("int pyxis_test_version(void) {{ return {version}; }}\n"))?;
            let mut compiler = Command::new("cc");
            compiler.args(["-shared", "-fPIC", "-nostdlib", &format!("-Wl,-soname,{SONAME}"), "-o"]);
            process::output_of(compiler.arg(&file).arg(&source))?;
            let target = format!("{DIRECTORY}/libpyxistest.so.1.{version}");
            let hook = |args: &[&str]| json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": args});
            let link = format!("libpyxistest.so.1.{version}::{DIRECTORY}/{SONAME}");
            Ok(json!({"name": format!("v{version}"), "containerEdits": {
                "mounts": [{"hostPath": file, "containerPath": target, "options": ["ro", "nosuid", "nodev", "bind"]}],
                "hooks": [hook(&["nvidia-cdi-hook", "create-symlinks", "--link", &link]),
                          hook(&["nvidia-cdi-hook", "update-ldcache", "--folder", DIRECTORY])]
            }}))
        })
        .collect::<Result<_>>()?;
    let file = json!({"cdiVersion": "0.6.0", "kind": "pyxis.test/driver", "devices": devices}).to_string();
    with_files(world, &[("etc/driver.json", file)], "", |world, _| test(world))
}

fn found(world: &mut World) -> Result<()> {
    with_drivers(world, |world| {
        let linker =
            format!("LD_PRELOAD={SONAME} cat /proc/self/maps | grep -o '{DIRECTORY}/libpyxistest.*' | sort -u");
        for options in [&["--container-readonly"][..], &["--container-writable"], &["--container-remap-root"]] {
            let device = device(1);
            let options = [&[DEBIAN, device.as_str()], options].concat();
            assert_eq!(world.sh(&options, LIST)?, "libpyxistest.so.1 libpyxistest.so.1.1 2", "{options:?}");
            let seen = world.sh(&options, &linker)?;
            ensure!(seen.contains("libpyxistest"), "{options:?}: {seen}");
        }
        // Package managers run ldconfig, which replaces the cache by renaming.
        let options = [DEBIAN, &device(1), "--container-writable", "--container-remap-root"];
        let seen = world.sh(&options, &format!("ldconfig 2>/dev/null && {LIST}"))?;
        ensure!(seen.starts_with("libpyxistest.so.1 libpyxistest.so.1.1 ") && !seen.ends_with(" 0"), "{seen}");
        assert_eq!(world.sh(&[DEBIAN], LIST)?, "0");
        Ok(())
    })
}

fn named(world: &mut World) -> Result<()> {
    with_drivers(world, |world| {
        let container = option(&new_name(), "");
        let step = |options: &[&str], script: &str| {
            Ok::<_, anyhow::Error>(sh(world, &[&[container.as_str()], options].concat(), script)?.stdout)
        };
        let before = "sha256sum </etc/ld.so.cache";
        let untouched = step(&[DEBIAN, "--container-writable"], before)?;
        assert_eq!(step(&[&device(1)], LIST)?, "libpyxistest.so.1 libpyxistest.so.1.1 2\n");
        // The node has another driver now.
        assert_eq!(step(&[&device(2)], LIST)?, "libpyxistest.so.1 libpyxistest.so.1.2 2\n");
        ensure!(step(&[&device(2)], before)? != untouched, "the cache is the image's: this test shows nothing");
        assert_eq!(step(&[], LIST)?, "0\n");
        assert_eq!(step(&[], before)?, untouched);
        // With devices to the end.
        step(&[&device(1)], "true")?;
        let image = world.make_directory(0, "work")?.join("named.sqsh");
        let save = format!("--container-save={}", image.display());
        step(&[&device(1), &save], "true")?;
        is_clean(&image)
    })
}

fn saved(world: &mut World) -> Result<()> {
    with_drivers(world, |world| {
        let image = world.make_directory(0, "work")?.join("saved.sqsh");
        let save = format!("--container-save={}", image.display());
        let seen = world.sh(&[DEBIAN, &device(1), "--container-writable", &save], &format!("echo x >/mine; {LIST}"))?;
        assert_eq!(seen, "libpyxistest.so.1 libpyxistest.so.1.1 2");
        is_clean(&image)?;
        let image = format!("--container-image={}", image.display());
        assert_eq!(world.sh(&[&image], &format!("cat /mine; {LIST}"))?, "x\n0");
        assert_eq!(world.sh(&[&image, &device(2)], LIST)?, "libpyxistest.so.1 libpyxistest.so.1.2 2");
        Ok(())
    })
}

/// Nothing in the image reminds of the driver.
fn is_clean(image: &Path) -> Result<()> {
    let names = process::output_of(Command::new("unsquashfs").args(["-l", "-dest", ""]).arg(image))?;
    let remains: Vec<&str> =
        names.lines().filter(|name| name.contains("pyxistest") || name.starts_with("/.pyxis")).collect();
    ensure!(names.contains("/etc/ld.so.cache") && remains.is_empty(), "{remains:?}");
    let cache = Command::new("unsquashfs").arg("-cat").arg(image).arg("etc/ld.so.cache").output()?.stdout;
    ensure!(
        cache.starts_with(b"glibc-ld.so.cache") && !cache.windows(5).any(|part| part == b"pyxis"),
        "the cache is ours"
    );
    Ok(())
}

fn shown(world: &mut World) -> Result<()> {
    with_drivers(world, |world| {
        let pyxis = |arguments: &[&str]| -> Result<(bool, String)> {
            let mut command = world.bed.cluster.nodes()[0].command(&world.bed.pyxis.executable.display().to_string());
            let output =
                command.arg("--config").arg(&world.bed.pyxis.config).arg("devices").args(arguments).output()?;
            Ok((output.status.success(), String::from_utf8(output.stdout)?))
        };
        let (ok, text) = pyxis(&["--container-device", "pyxis.test/driver=v1"])?;
        ensure!(ok && text.contains("pyxis.test/driver=v2") && text.contains("library "), "{text}");
        let (ok, text) = pyxis(&["--json", "--env", "MELLANOX_VISIBLE_DEVICES=99"])?;
        let report: serde_json::Value = serde_json::from_str(&text)?;
        ensure!(!ok && report["container"]["error"].as_str().is_some_and(|text| text.contains("id: 99")), "{text}");
        assert_eq!(report["node"]["cdi_devices"].as_array().map(Vec::len), Some(2));
        // Without a wish, too, there is an answer.
        let (ok, text) = pyxis(&[])?;
        ensure!(ok && text.contains("ask for nothing here"), "{text}");
        Ok(())
    })
}
