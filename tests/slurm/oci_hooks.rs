//! OCI hooks of the administrator's directories (oci-hooks(5)).

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::json;
use testbed::images;

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("they_get_state_and_bundle_as_the_user", state),
    ("conditions_and_stages", conditions),
    ("one_that_fails", failing),
    ("one_that_hangs", hanging),
    ("malformed_ones", malformed),
];

/// Runs `test` with two directories of hooks, of which the second one counts more.
fn with_directories(world: &mut World, test: impl FnOnce(&mut World, [PathBuf; 2]) -> Result<()>) -> Result<()> {
    let base = world.bed.site.path("etc/oci");
    let _ = fs::remove_dir_all(&base);
    let directories = ["usr", "etc"].map(|name| base.join(name));
    for directory in &directories {
        fs::create_dir_all(directory)?;
    }
    let hooks = format!("[hooks]\ntimeout_seconds = 3\noci_directories = {directories:?}\n");
    world.bed.pyxis.configure(&(world.configuration() + &hooks))?;
    let result = test(world, directories);
    world.bed.pyxis.configure(&world.configuration())?;
    let _ = fs::remove_dir_all(&base);
    result
}

/// A program beside the directories.
fn program(world: &World, name: &str, text: &str) -> Result<PathBuf> {
    let path = world.bed.site.path("etc/oci").join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    Ok(path)
}

/// Finds the root filesystem as hooks do: by the state's bundle.
const ROOT: &str = r#"state=$(cat)
bundle=$(echo "$state" | sed 's/.*"bundle":"\([^"]*\)".*/\1/')
root=$(sed 's/.*"root":{"path":"\([^"]*\)".*/\1/' "$bundle/config.json")
"#;

fn hook(path: &std::path::Path, when: serde_json::Value, stages: &[&str]) -> serde_json::Value {
    json!({"version": "1.0.0", "hook": {"path": path, "args": ["called", "one"], "env": ["ADDED=yes"]},
           "when": when, "stages": stages})
}

fn state(world: &mut World) -> Result<()> {
    with_directories(world, |world, [_, etc]| {
        let text = format!(
            "{ROOT}echo \"$state\" >$root/state; echo \"$1 $ADDED $(id -u)\" >$root/called\n\
             cp $bundle/config.json $root/config.json\n"
        );
        let create = program(world, "create.sh", &text)?;
        fs::write(
            etc.join("10-create.json"),
            hook(&create, json!({"always": true}), &["createContainer"]).to_string(),
        )?;
        // Inside, with the image's own shell, which reads the state.
        let mut inside = hook("/bin/sh".as_ref(), json!({"always": true}), &["startContainer"]);
        inside["hook"]["args"] = json!(["sh", "-c", "cat >/inside; echo $ADDED $IMAGE_ONLY >>/inside"]);
        fs::write(etc.join("20-start.json"), inside.to_string())?;
        let options = ["--container-writable", "--container-env=IMAGE_ONLY=container"];
        let seen =
            world.sh(&options, "cat /state /called /inside; echo; cat /config.json; echo; echo $SLURM_JOB_ID")?;
        let mut lines = seen.lines();
        let mut line = || lines.next().unwrap_or_default();
        let (creating, called, created) = (line(), line(), line());
        let created = created.strip_suffix("yes container").unwrap_or(created);
        let creating: serde_json::Value = serde_json::from_str(creating)?;
        let created: serde_json::Value = serde_json::from_str(created)?;
        let blank = line();
        ensure!(blank.is_empty(), "{seen}");
        let config: serde_json::Value = serde_json::from_str(line())?;
        let job = line();
        assert_eq!(called, format!("one yes {}", world.user(0).uid));
        assert_eq!((&creating["status"], &created["status"]), (&json!("creating"), &json!("created")));
        assert_eq!(creating["id"], json!(format!("{job}.0")));
        assert_eq!((&creating["pid"], &creating["bundle"]), (&created["pid"], &created["bundle"]));
        assert_eq!(config["root"]["readonly"], json!(false));
        assert_eq!(config["process"]["user"]["uid"], json!(world.user(0).uid));
        Ok(())
    })
}

fn conditions(world: &mut World) -> Result<()> {
    with_directories(world, |world, [usr, etc]| {
        let text = format!("{ROOT}echo $(basename $0) >>$root/log\n");
        for (directory, file, name, when, stages) in [
            (&usr, "10-a.json", "masked", json!({"always": true}), &["prestart"][..]),
            (&etc, "10-a.json", "first", json!({"always": true}), &["prestart", "poststop"]),
            (&usr, "20-b.json", "mounted", json!({"hasBindMounts": true}), &["createRuntime"]),
            (&etc, "30-c.json", "never", json!({"commands": ["sh$"]}), &["prestart"]),
            (&etc, "40-d.json", "labelled", json!({"annotations": {"^pyxis\\.test$": "^on$"}}), &["createContainer"]),
        ] {
            let path = program(world, name, &text)?;
            fs::write(directory.join(file), hook(&path, when, stages).to_string())?;
        }
        assert_eq!(world.sh(&[], "cat /log")?, "first");
        assert_eq!(world.sh(&["--container-mounts=/var:/host"], "cat /log")?, "first\nmounted");
        world.have("labelled", |directory| {
            let tree = directory.join("tree");
            images::busybox_tree(&tree)?;
            testbed::image::ImageBuilder::new(&directory)?
                .config("Labels", json!({"pyxis.test": "on"}))
                .layer_from_tree(&tree, testbed::image::Compression::Gzip)?
                .finish("latest")
        })?;
        assert_eq!(world.sh(&["--container-image=labelled"], "/bin/cat /log")?, "first\nlabelled");
        Ok(())
    })
}

fn failing(world: &mut World) -> Result<()> {
    with_directories(world, |world, [_, etc]| {
        let path = program(world, "bad.sh", "echo out; echo 'the reason' >&2; exit 3\n")?;
        let file = etc.join("bad.json");
        fs::write(&file, hook(&path, json!({"always": true}), &["createContainer"]).to_string())?;
        let reason =
            format!("pyxis:     [ERROR] OCI hook {} of {} exited with return code 3", path.display(), file.display());
        let error = world.refused(&[IMAGE], &reason)?;
        ensure!(error.contains("pyxis:     the reason") && !error.contains("out"), "{error}");
        // Of a stage that needs the container's root.
        let mut inside = hook("/bin/none".as_ref(), json!({"always": true}), &["startContainer"]);
        inside["hook"]["args"] = json!([]);
        fs::write(&file, inside.to_string())?;
        let reason = format!("[ERROR] OCI hook /bin/none of {} cannot be executed: No such file", file.display());
        world.refused(&[IMAGE], &reason).map(drop)
    })?;
    world.nodes_work()
}

fn hanging(world: &mut World) -> Result<()> {
    with_directories(world, |world, [_, etc]| {
        let path = program(world, "slow.sh", "sleep 1000 & echo waiting >&2; sleep 1000\n")?;
        let mut slow = hook(&path, json!({"always": true}), &["prestart"]);
        let file = etc.join("slow.json");
        fs::write(&file, slow.to_string())?;
        let error = world.refused(&[IMAGE], "did not end within 3 seconds ([hooks] timeout_seconds) and was killed")?;
        ensure!(error.contains("pyxis:     waiting"), "{error}");
        slow["hook"]["timeout"] = json!(1);
        fs::write(&file, slow.to_string())?;
        world.refused(&[IMAGE], "did not end within 1 seconds (its own timeout) and was killed").map(drop)
    })?;
    world.nodes_work()
}

fn malformed(world: &mut World) -> Result<()> {
    with_directories(world, |world, [usr, _]| {
        let file = usr.join("x.json");
        let good = hook("/bin/true".as_ref(), json!({"always": true}), &["prestart"]).to_string();
        for (text, expected) in [
            ("{\n\"version\": 1,,".to_owned(), ":2:14: "),
            (good.replace("prestart", "prestrat"), ": stages: unknown stage \"prestrat\""),
            (good.replace("1.0.0", "0.9"), ": version \"0.9\": only 1.0.0 is known"),
        ] {
            fs::write(&file, text)?;
            let expected = format!("[ERROR] OCI hook {}{expected}", file.display());
            world.refused(&[IMAGE], &expected)?;
        }
        Ok(())
    })?;
    world.nodes_work()
}
