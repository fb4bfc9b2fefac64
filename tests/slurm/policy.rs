//! The administrator's rules about images: by name, digest, user and group, and by who has signed them. Keys and signatures
//! are OpenSSL's, images with signatures are pushed by skopeo.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::json;
use testbed::{image, images, process, wait};

use crate::world::{IMAGE, World};
use crate::{Case, images as image_cases};

pub const CASES: &[Case] = &[
    ("rules_by_name_and_digest", by_name),
    ("rules_by_user_and_group", by_user),
    ("rules_for_files_and_engines", by_source),
    ("kept_containers_obey_new_rules", kept),
    ("signatures_are_demanded", signatures),
];

/// Has `rules` in force while `work` is done.
fn with_rules(world: &mut World, rules: &str, work: impl FnOnce(&mut World) -> Result<()>) -> Result<()> {
    let usual = world.configuration();
    world.bed.pyxis.configure(&format!("{usual}{rules}"))?;
    let result = work(world);
    world.bed.pyxis.configure(&usual)?;
    result
}

/// The reason in the two lines that a refused image has.
fn denied(world: &World, image: &str, reason: &str) -> Result<()> {
    let error = world.refused(
        &[&format!("--container-image={image}")],
        &format!("pyxis: failed to import docker image: {image}\n"),
    )?;
    ensure!(error.contains(&format!("pyxis:     [ERROR] {reason}\n")), "{reason}\n{error}");
    Ok(())
}

fn by_name(world: &mut World) -> Result<()> {
    // In the store of each node, and confirmed lately.
    world.srun(&["-N2", IMAGE, "true"])?.success()?;
    let rules = "[[policy]]\nname = \"no hub\"\naction = \"deny\"\nregistry = [\"docker.io\"]\nmessage = \"ask us\"\n";
    with_rules(world, rules, |world| {
        let why =
            "image docker.io/library/alpine:latest is denied by rule 1 (\"no hub\") of this site's policy: ask us";
        denied(world, "alpine:latest", why)?;
        let direct = format!("--container-image={}/library/alpine", world.bed.hub.host());
        world.srun(&[&direct, "true"])?.success().map(drop)
    })?;
    let rules = "[[policy]]\naction = \"allow\"\nrepository = [\"library/alpine\"]\n[[policy]]\naction = \"deny\"\n";
    with_rules(world, rules, |world| {
        world.srun(&[IMAGE, "true"])?.success()?;
        denied(
            world,
            "no-such-image",
            "image docker.io/library/no-such-image:latest is denied by rule 2 of this site's policy",
        )
    })?;
    let digest = world.bed.hub.digest("library/alpine")?;
    let rules = format!("[[policy]]\naction = \"deny\"\ndigest = [\"{digest}\"]\n");
    with_rules(world, &rules, |world| {
        denied(world, "alpine", "image docker.io/library/alpine:latest is denied by rule 1 of this site's policy")?;
        let exact = format!("alpine@{digest}");
        denied(world, &exact, &format!("image docker.io/library/{exact} is denied by rule 1 of this site's policy"))
    })?;
    // The digest that people know is the index's.
    image_cases::have_index(world)?;
    let digest = world.bed.hub.digest("library/index")?;
    let rules = format!("[[policy]]\naction = \"deny\"\ndigest = [\"{digest}\"]\n");
    with_rules(world, &rules, |world| {
        denied(world, "index", "image docker.io/library/index:latest is denied by rule 1 of this site's policy")
    })?;
    world.srun(&[IMAGE, "true"])?.success().map(drop)
}

fn by_user(world: &mut World) -> Result<()> {
    let (first, second) = (world.user(0).name.clone(), world.user(1).name.clone());
    for condition in [
        format!("user = [\"{second}\"]"),
        format!("group = [\"{second}\"]"),
        format!("group = [{}]", world.user(1).gid),
    ] {
        with_rules(world, &format!("[[policy]]\naction = \"deny\"\n{condition}\n"), |world| {
            assert_eq!(world.sh_as(0, &[IMAGE], "id -un")?, first);
            let mut other = world.bed.cluster.command(1, "srun", [IMAGE, "echo", "got in"]);
            let output = process::run(&mut other, wait::DEADLINE)?;
            ensure!(
                !output.status.success() && output.stderr.contains("is denied by rule 1 of"),
                "{condition}: {output}"
            );
            Ok(())
        })?;
    }
    with_rules(world, "[[policy]]\naction = \"allow\"\ngroup = [\"no-such-group\"]\n", |world| {
        denied(
            world,
            "alpine",
            "image docker.io/library/alpine:latest is denied because rule 1 of this site's policy cannot be applied: \
             this node knows no group no-such-group",
        )
    })
}

fn by_source(world: &mut World) -> Result<()> {
    let directory = world.make_directory(0, "work/policy")?;
    let squashfs = directory.join("x.sqsh");
    let _ = fs::remove_file(&squashfs);
    let tree = world.directory("policy")?.join("tree");
    images::busybox_tree(&tree)?;
    process::output_of(Command::new("mksquashfs").arg(&tree).arg(&squashfs).args(["-quiet", "-no-progress"]))?;
    let layout = directory.join("layout");
    if !layout.exists() {
        let source = format!("docker://{}/library/alpine", world.bed.hub.host());
        let mut copy = Command::new("skopeo");
        copy.args(["--insecure-policy", "copy", "--src-tls-verify=false", &source]);
        process::output_of(copy.arg(format!("oci:{}:latest", layout.display())))?;
        process::output_of(Command::new("chmod").args(["-R", "a+rX"]).arg(&layout))?;
    }
    let image = |path: &Path| format!("--container-image={}", path.display());
    for path in [&squashfs, &layout] {
        world.srun(&[&image(path), "true"])?.success()?;
    }
    for rules in [
        "[[policy]]\naction = \"deny\"\nsource = [\"file\"]\n",
        "[[policy]]\naction = \"allow\"\nregistry = [\"**\"]\n[[policy]]\naction = \"deny\"\n",
    ] {
        with_rules(world, rules, |world| {
            for path in [&squashfs, &layout] {
                let error =
                    world.refused(&[&image(path)], "pyxis: failed to create container filesystem for image: ")?;
                let why = format!("[ERROR] image {} is denied by rule ", path.display());
                ensure!(error.contains(&why), "{error}");
            }
            world.srun(&[IMAGE, "true"])?.success().map(drop)
        })?;
    }
    // By the digest of what is inside.
    let digest = world.bed.hub.digest("library/alpine")?;
    with_rules(world, &format!("[[policy]]\naction = \"deny\"\ndigest = [\"{digest}\"]\n"), |world| {
        world.refused(&[&image(&layout)], "is denied by rule 1 of this site's policy")?;
        world.srun(&[&image(&squashfs), "true"])?.success().map(drop)
    })?;
    with_rules(world, "[[policy]]\naction = \"deny\"\nsource = [\"engine\"]\n", |world| {
        denied(world, "dockerd://alpine", "image dockerd://alpine is denied by rule 1 of this site's policy")
    })
}

fn kept(world: &mut World) -> Result<()> {
    let name = "--container-name=policy";
    world.srun(&["-N1", IMAGE, name, "true"])?.success()?;
    with_rules(world, "[[policy]]\naction = \"deny\"\nregistry = [\"docker.io\"]\n", |world| {
        let error = world.refused(
            &["-N1", name],
            "pyxis: error: the container pyxis_policy cannot be used any more: image docker.io/library/alpine:latest is \
             denied by rule 1 of this site's policy",
        );
        error.map(drop)
    })?;
    world.srun(&["-N1", name, "true"])?.success().map(drop)
}

/// A key pair `NAME.key`, `NAME.pub`.
fn key(directory: &Path, name: &str) -> Result<PathBuf> {
    let (private, public) = (directory.join(format!("{name}.key")), directory.join(format!("{name}.pub")));
    let mut generate = Command::new("openssl");
    generate.args(["genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out"]).arg(&private);
    process::output_of(&mut generate)?;
    process::output_of(
        Command::new("openssl").args(["pkey", "-pubout", "-in"]).arg(&private).arg("-out").arg(&public),
    )?;
    Ok(public)
}

/// What `cosign sign --key NAME.key` writes for `repository`, whose image is `digest`: the claim is about `claimed`, and is
/// changed by `tamper` after it was signed.
fn sign(world: &World, key: &Path, repository: &str, [digest, claimed]: [&str; 2], tamper: bool) -> Result<()> {
    let name = repository.replace('/', "-");
    let directory = world.directory(&format!("signature-{name}"))?;
    let mut payload = json!({
        "critical": {
            "identity": { "docker-reference": format!("reg.example/{repository}") },
            "image": { "docker-manifest-digest": claimed },
            "type": "cosign container image signature",
        },
        "optional": null,
    });
    let message = directory.join("payload");
    fs::write(&message, payload.to_string())?;
    let signature = directory.join("signature");
    let mut openssl = Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-sign"]).arg(key.with_extension("key")).arg("-out").arg(&signature).arg(&message);
    process::output_of(&mut openssl)?;
    if tamper {
        payload["optional"] = json!({ "approved": true });
    }
    let layout = directory.join("layout");
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let blob = |media_type: &str, bytes: Vec<u8>| -> Result<serde_json::Value> {
        let digest = image::digest(&bytes);
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), &bytes)?;
        Ok(json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() }))
    };
    let mut layer = blob("application/vnd.dev.cosign.simplesigning.v1+json", payload.to_string().into_bytes())?;
    layer["annotations"] = json!({ "dev.cosignproject.cosign/signature": STANDARD.encode(fs::read(signature)?) });
    let config = json!({ "architecture": "", "os": "", "rootfs": { "type": "layers", "diff_ids": [layer["digest"]] } });
    let config = blob("application/vnd.oci.image.config.v1+json", config.to_string().into_bytes())?;
    let media_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": [layer] });
    let mut top = blob(media_type, manifest.to_string().into_bytes())?;
    top["annotations"] = json!({ "org.opencontainers.image.ref.name": "signature" });
    fs::write(layout.join("index.json"), json!({ "schemaVersion": 2, "manifests": [top] }).to_string())?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
    let tag = format!("{repository}:{}.sig", digest.replace(':', "-"));
    world.bed.hub.push(&format!("oci:{}:signature", layout.display()), &tag)
}

/// What `cosign sign --key NAME.key` of version 3 writes, in a registry that has no list of referrers.
fn attach(world: &World, key: &Path, repository: &str, digest: &str) -> Result<()> {
    let directory = world.directory(&format!("bundle-{}", repository.replace('/', "-")))?;
    let statement = json!({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{ "digest": { "sha256": digest.trim_start_matches("sha256:") } }],
        "predicateType": "https://sigstore.dev/cosign/sign/v1",
        "predicate": {},
    })
    .to_string();
    let (kind, message) = ("application/vnd.in-toto+json", directory.join("message"));
    fs::write(&message, format!("DSSEv1 {} {kind} {} {statement}", kind.len(), statement.len()))?;
    let signature = directory.join("signature");
    let mut openssl = Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-sign"]).arg(key.with_extension("key")).arg("-out").arg(&signature).arg(&message);
    process::output_of(&mut openssl)?;
    let bundle_type = "application/vnd.dev.sigstore.bundle.v0.3+json";
    let bundle = json!({
        "mediaType": bundle_type,
        "verificationMaterial": { "publicKey": { "hint": "unknown" } },
        "dsseEnvelope": {
            "payload": STANDARD.encode(&statement),
            "payloadType": kind,
            "signatures": [{ "sig": STANDARD.encode(fs::read(signature)?) }],
        },
    });
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let (blob, empty) = (bundle.to_string(), "{}".to_owned());
    let descriptor = |kind: &str, bytes: &str| json!({ "mediaType": kind, "digest": image::digest(bytes.as_bytes()), "size": bytes.len() });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": manifest_type, "artifactType": bundle_type,
        "config": descriptor("application/vnd.oci.empty.v1+json", &empty), "layers": [descriptor(bundle_type, &blob)],
        "subject": { "mediaType": manifest_type, "digest": digest, "size": 1 },
    })
    .to_string();
    let mut referrer = descriptor(manifest_type, &manifest);
    referrer["artifactType"] = json!(bundle_type);
    let index_type = "application/vnd.oci.image.index.v1+json";
    let index = json!({ "schemaVersion": 2, "mediaType": index_type, "manifests": [referrer] }).to_string();
    // No tool of Debian's writes artifacts: the requests of the distribution specification, "Pushing".
    let base = format!("http://{}/v2/{repository}", world.bed.hub.host());
    let curl = |arguments: &[&str], body: &str| -> Result<String> {
        let file = directory.join("body");
        fs::write(&file, body)?;
        let mut curl = Command::new("curl");
        curl.args(["--silent", "--show-error", "--fail", "--data-binary"]).arg(format!("@{}", file.display()));
        process::output_of(curl.args(arguments))
    };
    for bytes in [&blob, &empty] {
        let upload = curl(&["--request", "POST", "--dump-header", "-", &format!("{base}/blobs/uploads/")], "")?;
        let location = upload.lines().find_map(|line| line.strip_prefix("Location: ")).unwrap_or_default().trim();
        let place = format!("{location}&digest={}", image::digest(bytes.as_bytes()));
        curl(&["--request", "PUT", "--header", "Content-Type: application/octet-stream", &place], bytes)?;
    }
    let put = |name: &str, kind: &str, bytes: &str| {
        let header = format!("Content-Type: {kind}");
        curl(&["--request", "PUT", "--header", &header, &format!("{base}/manifests/{name}")], bytes)
    };
    put(&image::digest(manifest.as_bytes()), manifest_type, &manifest)?;
    put(&digest.replace(':', "-"), index_type, &index).map(drop)
}

fn signatures(world: &mut World) -> Result<()> {
    let keys = world.directory("keys")?;
    let (ours, theirs) = (key(&keys, "ours")?, key(&keys, "theirs")?);
    let alpine = format!("docker://{}/library/alpine", world.bed.hub.host());
    image_cases::have_index(world)?;
    let copy = |source: &str, repository: &str| -> Result<String> {
        let mut skopeo = Command::new("skopeo");
        skopeo.args([
            "--insecure-policy",
            "copy",
            "--all",
            "--src-tls-verify=false",
            "--dest-tls-verify=false",
            source,
        ]);
        process::output_of(skopeo.arg(world.bed.hub.transport(repository)))?;
        world.bed.hub.digest(repository)
    };
    for repository in ["good", "bundle", "bundle-theirs", "unsigned", "theirs", "other", "tampered"] {
        copy(&alpine, &format!("signed/{repository}"))?;
    }
    let digest = world.bed.hub.digest("signed/good")?;
    let index = copy(&alpine.replace("alpine", "index"), "signed/index")?;
    sign(world, &ours, "signed/good", [&digest, &digest], false)?;
    sign(world, &ours, "signed/index", [&index, &index], false)?;
    attach(world, &ours, "signed/bundle", &digest)?;
    attach(world, &theirs, "signed/bundle-theirs", &digest)?;
    sign(world, &theirs, "signed/theirs", [&digest, &digest], false)?;
    sign(world, &ours, "signed/other", [&digest, &index], false)?;
    sign(world, &ours, "signed/tampered", [&digest, &digest], true)?;
    // Without the rule all of them may be used, and are in the store afterwards.
    let image = |repository: &str| format!("signed/{repository}");
    for repository in ["good", "bundle", "bundle-theirs", "unsigned", "theirs", "other", "tampered", "index"] {
        world.srun(&[&format!("--container-image={}", image(repository)), "true"])?.success()?;
    }
    let rules = format!(
        "[[policy]]\naction = \"allow\"\nrepository = [\"signed/*\"]\nsigned_by = [\"{}\"]\n[[policy]]\naction = \"deny\"\n\
         source = [\"file\"]\n",
        ours.display()
    );
    with_rules(world, &rules, |world| {
        // The second time from the store.
        for repository in ["good", "bundle", "index", "good", "bundle", "index"] {
            world.srun(&[&format!("--container-image={}", image(repository)), "true"])?.success()?;
        }
        for (repository, problem) in [
            ("theirs", "it has signatures, but of other keys, or of something that was changed afterwards".to_owned()),
            (
                "bundle-theirs",
                "it has signatures, but of other keys, or of something that was changed afterwards".to_owned(),
            ),
            (
                "tampered",
                "it has signatures, but of other keys, or of something that was changed afterwards".to_owned(),
            ),
            ("other", format!("the signature is for another image, {index}")),
        ] {
            let why = format!(
                "image docker.io/signed/{repository}:latest is denied by rule 1 of this site's policy: it is not signed \
                 with a key of that rule ({problem})"
            );
            denied(world, &image(repository), &why)?;
        }
        let why = "its mirror has no signatures; registry-1.docker.io: ";
        world.refused(&["--container-image=signed/unsigned"], why)?;
        let direct = format!("{}/signed/unsigned", world.bed.hub.host());
        world.refused(&[&format!("--container-image={direct}")], "of that rule (it has no signatures)")?;
        world.srun(&[IMAGE, "true"])?.success().map(drop)
    })?;
    let rules = rules.replace("ours.pub", "missing.pub");
    with_rules(world, &rules, |world| {
        world.refused(&["--container-image=signed/good"], "missing.pub: No such file or directory").map(drop)
    })
}
