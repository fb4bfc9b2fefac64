//! Registries: credentials, trouble on the way, trouble at the other end.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use testbed::proxy::Behaviour;
use testbed::registry::Account;
use testbed::{process, wait};

use crate::Case;
use crate::world::{IMAGE, World};

pub const CASES: &[Case] = &[
    ("private_image_wants_credentials", private_image),
    ("credentials_are_each_users_own", users_differ),
    ("wrong_password", wrong_password),
    ("commands_in_credentials_run_as_the_user", commands),
    ("credentials_of_the_site", site_credentials),
    ("a_helper_of_the_site", site_helper),
    ("bearer_tokens", bearer_tokens),
    ("interrupted_downloads_resume", interrupted),
    ("mirror_down_is_one_line", mirror_down),
    ("missing_images_fail_once", missing),
    ("certificate_nobody_knows", certificate),
    ("certificates_as_docker_has_them", certificates),
    ("credential_helpers_run_as_the_user", helpers),
    ("secrets_do_not_show_while_they_are_used", hidden),
    ("revoked_credentials_end_the_use_of_stored_layers", revoked),
    ("a_repository_for_others", for_others),
];

/// One of the names of the private image. What a user was given he may use for some minutes without being asked again,
/// so tests that are about being asked take names of their own.
fn private(world: &World, tag: &str) -> String {
    format!("--container-image={}/team/private:{tag}", world.private.host())
}

/// Puts a file of credentials where user `index` keeps them, readable by him alone.
fn credentials(world: &World, index: usize, file: &str, text: &str) -> Result<()> {
    let directory = Path::new(file).parent().and_then(Path::to_str).unwrap_or_default();
    world.make_directory(index, directory)?;
    let path = world.user(index).home.join(file);
    fs::write(&path, text)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    world.user(index).own(&path)
}

fn netrc(world: &World, index: usize, password: &str) -> Result<()> {
    let account = &world.private.accounts()[0];
    let line = format!("machine {} login {} password {password}\n", world.private.host(), account.user);
    credentials(world, index, ".config/enroot/.credentials", &line)
}

fn no_credentials(world: &World) {
    for index in 0..2 {
        for directory in [".config/enroot", ".docker"] {
            // Often there is none.
            let _ = fs::remove_dir_all(world.user(index).home.join(directory));
        }
    }
}

fn private_image(world: &mut World) -> Result<()> {
    no_credentials(world);
    let image = private(world, "netrc");
    let error = world.refused(&[&image], "pyxis: failed to import docker image: ")?;
    ensure!(error.contains("team/private"), "{error}");
    let password = world.private.accounts()[0].password.clone();
    netrc(world, 0, &password)?;
    assert_eq!(world.sh(&[&image], "id -un")?, "pyxis-test-1");
    no_credentials(world);
    let account = &world.private.accounts()[0];
    let basic = process::output_of(
        std::process::Command::new("sh")
            .args(["-c", "printf %s \"$0\" | base64 -w0"])
            .arg(format!("{}:{}", account.user, account.password)),
    )?;
    let config = format!("{{\"auths\":{{\"{}\":{{\"auth\":\"{basic}\"}}}}}}", world.private.host());
    credentials(world, 0, ".docker/config.json", &config)?;
    let image = private(world, "docker");
    assert_eq!(world.sh(&[&image], "id -un")?, "pyxis-test-1");
    no_credentials(world);
    Ok(())
}

/// That one user's import put the layers into the store lets nobody else have them.
fn users_differ(world: &mut World) -> Result<()> {
    no_credentials(world);
    let image = private(world, "users");
    let password = world.private.accounts()[0].password.clone();
    netrc(world, 0, &password)?;
    assert_eq!(world.sh_as(0, &["-N2", &image], "id -un")?, "pyxis-test-1\npyxis-test-1");
    let mut other = world.bed.cluster.command(1, "srun", ["-N2", &image, "echo", "got in"]);
    let output = process::run(&mut other, wait::DEADLINE)?;
    ensure!(!output.status.success() && !output.stdout.contains("got in"), "{output}");
    netrc(world, 1, &password)?;
    assert_eq!(world.sh_as(1, &[&image], "id -un")?, "pyxis-test-2");
    no_credentials(world);
    Ok(())
}

fn wrong_password(world: &mut World) -> Result<()> {
    no_credentials(world);
    netrc(world, 0, "wrong-secret")?;
    let error = world.refused(&[&private(world, "wrong")], "pyxis: failed to import docker image: ")?;
    ensure!(!error.contains("wrong-secret"), "the secret is in the message: {error}");
    ensure!(error.contains(".credentials"), "does not name the file that was tried: {error}");
    no_credentials(world);
    Ok(())
}

/// The command runs as the user, and what it prints stays where it is needed.
fn commands(world: &mut World) -> Result<()> {
    no_credentials(world);
    let Account { user, password } = world.private.accounts()[0].clone();
    let home = world.make_directory(0, "work")?;
    let (secret, witness) = (home.join("secret"), home.join("witness"));
    fs::write(&secret, &password)?;
    world.user(0).own(&secret)?;
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600))?;
    let (host, secret, shown) = (world.private.host(), secret.display(), witness.display());
    let line = format!("machine {host} login {user} password $(cat {secret}; id -un >{shown})\n");
    credentials(world, 0, ".config/enroot/.credentials", &line)?;
    assert_eq!(world.sh(&[&private(world, "command")], "id -un")?, "pyxis-test-1");
    assert_eq!(fs::read_to_string(&witness)?, "pyxis-test-1\n");
    no_credentials(world);
    nowhere(world, &password)
}

/// Fails if `secret` is in a log, or in what is left of an import.
fn nowhere(world: &World, secret: &str) -> Result<()> {
    let mut grep = std::process::Command::new("grep");
    grep.args(["-rlF", "-e", secret]).arg(world.bed.site.path("log")).arg(world.bed.site.path("state"));
    let found = process::run(&mut grep, wait::DEADLINE)?.stdout;
    ensure!(found.is_empty(), "the secret is in {found}");
    Ok(())
}

/// In the middle of an import: no process has them for others to see, and none leaves them in a core file.
fn hidden(world: &mut World) -> Result<()> {
    no_credentials(world);
    let Account { user, password } = world.private.accounts()[0].clone();
    let proxy = testbed::proxy::Proxy::start(world.private.port())?;
    let host = proxy.host();
    let line = format!("machine {host} login {user} password {password}\n");
    credentials(world, 0, ".config/enroot/.credentials", &line)?;
    let insecure = format!("[registry.\"{host}\"]\ninsecure = true\n");
    world.bed.pyxis.configure(&(world.configuration() + &insecure))?;
    // Another host than the one from which the store has the layer.
    proxy.set(Behaviour::StallAfter(20_000));
    let image = format!("--container-image={host}/team/private:netrc");
    let running = world.start(&["-w", "node1", &image, "id", "-un"])?;
    let seen = proxy.wait_until_held(wait::DEADLINE).and_then(|()| look_for(world, &password));
    proxy.set(Behaviour::Pass);
    let output = running.wait(wait::DEADLINE);
    world.bed.pyxis.configure(&world.configuration())?;
    no_credentials(world);
    seen?;
    assert_eq!(output?.success()?.stdout, "pyxis-test-1\n");
    nowhere(world, &password)
}

/// Fails if a process of node1 shows `secret`, or one that knows it may dump core.
fn look_for(world: &World, secret: &str) -> Result<()> {
    let mut known = Vec::new();
    for process in world.bed.cluster.nodes()[0].processes() {
        let read = |file: &str| fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
        for file in ["cmdline", "environ"] {
            ensure!(!String::from_utf8_lossy(&read(file)).contains(secret), "{file} of {process:?}");
        }
        let role = ["pyxis-importer", "pyxis-credentials"].into_iter().find(|role| process.command.starts_with(role));
        if let Some(role) = role {
            let limits = String::from_utf8_lossy(&read("limits")).into_owned();
            let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap_or_default();
            ensure!(core.split_whitespace().skip(4).take(2).all(|limit| limit == "0"), "{process:?}: {core}");
            known.push(role);
        }
    }
    known.sort_unstable();
    ensure!(known == ["pyxis-credentials", "pyxis-importer"], "{known:?}");
    Ok(())
}

/// Users without credentials of their own pull with those of the site, and do not get to see them.
fn site_credentials(world: &mut World) -> Result<()> {
    no_credentials(world);
    let Account { user, password } = world.private.accounts()[0].clone();
    let host = world.private.host();
    let file =
        world.bed.site.write("etc/site.credentials", format!("machine {host} login {user} password {password}\n"))?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
    let table = format!("[registry.\"{host}\"]\n");
    let credentials = format!("{table}credentials = \"{}\"\n", file.display());
    let before = world.configuration();
    world.bed.pyxis.configure(&before.replace(&table, &credentials))?;
    let result = world.sh_as(1, &[&private(world, "site")], "id -un");
    let read = process::run(world.as_user(1, "cat").arg(&file), wait::DEADLINE)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o644))?;
    let error = world.refused(&[&private(world, "site")], "chmod 600");
    world.bed.pyxis.configure(&before)?;
    fs::remove_file(&file)?;
    assert_eq!(result?, "pyxis-test-2");
    ensure!(!read.status.success(), "{read}");
    error?;
    nowhere(world, &password)
}

/// A program of the site's for who has no credentials of his own: run as he is.
fn site_helper(world: &mut World) -> Result<()> {
    no_credentials(world);
    let Account { user, password } = world.private.accounts()[0].clone();
    let host = world.private.host();
    let witness = world.make_directory(1, "work")?.join("site-helper");
    let answer = serde_json::json!({"ServerURL": host, "Username": user, "Secret": password}).to_string();
    let answer = world.bed.site.write("etc/site-answer.json", answer)?;
    fs::set_permissions(&answer, fs::Permissions::from_mode(0o644))?;
    let script = format!(
        "#!/bin/sh\nread -r server; echo \"$(id -un) $1 $server\" >>{}\ncat {}\n",
        witness.display(),
        answer.display()
    );
    let program = world.bed.site.write("etc/site-helper", script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let table = format!("[registry.\"{host}\"]\n");
    let helper = format!("{table}credential_helper = \"{}\"\n", program.display());
    world.bed.pyxis.configure(&world.configuration().replace(&table, &helper))?;
    let result = world.sh_as(1, &["-w", "node1", &private(world, "helper")], "id -un");
    world.bed.pyxis.configure(&world.configuration())?;
    fs::remove_file(&answer)?;
    assert_eq!(result?, "pyxis-test-2");
    let asked = fs::read_to_string(&witness)?;
    ensure!(asked.lines().all(|line| line == format!("pyxis-test-2 get {host}")) && !asked.is_empty(), "{asked}");
    fs::remove_file(&witness)?;
    let log = process::run(
        std::process::Command::new("grep").args(["-rlF", "-e", &password]).arg(world.bed.site.path("log")),
        wait::DEADLINE,
    )?;
    ensure!(log.stdout.is_empty(), "{log}");
    Ok(())
}

/// Tokens for nobody in particular, and for somebody with a password.
fn bearer_tokens(world: &mut World) -> Result<()> {
    no_credentials(world);
    let image = |repository: &str| format!("--container-image={}/{repository}", world.tokens.host());
    assert_eq!(world.sh(&[&image("public/image")], "id -un")?, "pyxis-test-1");
    world.refused(&[&image("team/private")], "pyxis: failed to import docker image: ")?;
    let Account { user, password } = &world.private.accounts()[0];
    let line = format!("machine {} login {user} password {password}\n", world.tokens.host());
    credentials(world, 0, ".config/enroot/.credentials", &line)?;
    assert_eq!(world.sh(&[&image("team/private")], "id -un")?, "pyxis-test-1");
    no_credentials(world);
    Ok(())
}

fn interrupted(world: &mut World) -> Result<()> {
    let name = world.new_image(3 << 20)?;
    let image = format!("--container-image={}/library/{name}", world.proxy.host());
    let before = world.proxy.connections();
    world.proxy.set(Behaviour::HangUpAfter(1 << 20));
    let result = world.sh(&[&image], "wc -c </payload");
    world.proxy.set(Behaviour::Pass);
    assert_eq!(result?, (3 << 20).to_string());
    ensure!(world.proxy.connections() > before + 3, "{} connections", world.proxy.connections() - before);
    Ok(())
}

fn mirror_down(world: &mut World) -> Result<()> {
    let port = testbed::cluster::free_ports(1)?[0];
    let nobody = format!("--container-image=localhost:{port}/library/alpine");
    let error = world.refused(&[&nobody], "pyxis: failed to import docker image: ")?;
    ensure!(error.contains(&format!("localhost:{port}")), "{error}");
    Ok(())
}

fn missing(world: &mut World) -> Result<()> {
    for image in ["no-such-image", "alpine:no-such-tag"] {
        let error = world.refused(&["-N1", "-n2", &format!("--container-image={image}")], "")?;
        let line = format!("pyxis: failed to import docker image: {image}");
        assert_eq!(error.matches(&line).count(), 1, "{error}");
        ensure!(error.contains("pyxis: container was not started successfully by another task"), "{error}");
    }
    let absent = format!("alpine@sha256:{}", "0".repeat(64));
    world.refused(
        &[&format!("--container-image={absent}")],
        &format!("pyxis: failed to import docker image: {absent}"),
    )?;
    // The next step is none the worse for it.
    world.srun(&[IMAGE, "true"])?.success()?;
    Ok(())
}

fn certificate(world: &mut World) -> Result<()> {
    use testbed::registry::{Registry, RegistryOptions};
    let options = RegistryOptions { tls: true, ..RegistryOptions::default() };
    let registry = Registry::start(&world.bed.site, "tls", options)?;
    let image = format!("--container-image={}/library/alpine", registry.host());
    let error = world.refused(&[&image], "pyxis: failed to import docker image: ")?;
    let line = format!(
        "{}: certificate of an unknown authority: add the site's CA certificate to the trust store of this node \
         (update-ca-certificates, update-ca-trust), or name it by ca in pyxis.toml",
        registry.host()
    );
    ensure!(error.contains(&line), "{error}");
    Ok(())
}

/// A directory like `/etc/docker/certs.d`, also for the administrator's commands.
fn certificates(world: &mut World) -> Result<()> {
    use testbed::registry::{Registry, RegistryOptions};
    let options = RegistryOptions { tls: true, client_certificates: true, ..RegistryOptions::default() };
    let registry = Registry::start(&world.bed.site, "certs", options)?;
    let host = registry.host();
    let directory = world.bed.site.make_directory(&format!("etc/certs.d/{host}"))?;
    let files = registry.client_certificate().zip(registry.authority());
    let ((certificate, key), authority) = files.context("no certificates")?;
    for (file, name) in [(authority, "ca.crt"), (certificate, "client.cert"), (key, "client.key")] {
        fs::copy(file, directory.join(name))?;
        fs::set_permissions(directory.join(name), fs::Permissions::from_mode(0o600))?;
    }
    let certs = directory.parent().map(|path| path.display().to_string()).unwrap_or_default();
    // A table, so that the doctor looks at it.
    let own = format!("[registries]\ncerts = [\"{certs}\"]\n[registry.\"{host}\"]\n");
    world.bed.pyxis.configure(&(world.configuration() + &own))?;
    let image = format!("{host}/some/image");
    let refused = world.refused(&[&format!("--container-image={image}")], "pyxis: failed to import docker image: ");
    let doctor = crate::pull::pyxis(world, &["doctor"]);
    let way = crate::pull::pyxis(world, &["doctor", &image]);
    world.bed.pyxis.configure(&world.configuration())?;
    // It is empty: that is what it says to those whom it lets speak.
    let refused = refused?;
    ensure!(refused.contains("has no such repository, tag or digest"), "{refused}");
    let (doctor, way) = (doctor?, way?);
    ensure!(doctor.stdout.contains(&format!("ok       registry {host}: answers\n")), "{doctor}");
    ensure!(way.stdout.contains("ok       TLS: certificate trusted\n"), "{way}");
    ensure!(way.stdout.contains("FAILED   manifest: ") && way.stdout.contains("has no such repository"), "{way}");
    Ok(())
}

/// Docker's `credHelpers` and `credsStore`: programs of the user's, found on his PATH.
fn helpers(world: &mut World) -> Result<()> {
    no_credentials(world);
    let Account { user, password } = world.private.accounts()[0].clone();
    let host = world.private.host();
    let bin = world.make_directory(0, "work/bin")?;
    let (program, witness) = (bin.join("docker-credential-box"), bin.join("witness"));
    // The password is where only the helper looks.
    let secret = bin.join("secret.json");
    fs::write(&secret, serde_json::json!({"ServerURL": host, "Username": user, "Secret": password}).to_string())?;
    let script = format!(
        "#!/bin/sh\nread -r server; echo \"$(id -un) $1 $server\" >>{}\ncat {}\n",
        witness.display(),
        secret.display()
    );
    fs::write(&program, script)?;
    for (path, mode) in [(&program, 0o755), (&secret, 0o600)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        world.user(0).own(path)?;
    }
    for (tag, config) in [
        ("helper", format!("{{\"credHelpers\": {{\"{host}\": \"box\"}}}}")),
        ("store", "{\"credsStore\": \"box\"}".to_owned()),
    ] {
        credentials(world, 0, ".docker/config.json", &config)?;
        let image = private(world, tag);
        // Where there is no such program, the message says so.
        let error = world.refused(&[&image], "pyxis: failed to import docker image: ")?;
        ensure!(error.contains("docker-credential-box is not on this node: install it"), "{error}");
        let mut step = world.bed.cluster.command(0, "srun", ["-w", "node1", &image, "id", "-un"]);
        step.env("PATH", format!("{}:/usr/bin:/bin", bin.display()));
        assert_eq!(process::run(&mut step, wait::DEADLINE)?.success()?.stdout, "pyxis-test-1\n");
        let asked = fs::read_to_string(&witness)?;
        ensure!(asked.lines().all(|line| line == format!("pyxis-test-1 get {host}")) && !asked.is_empty(), "{asked}");
        fs::remove_file(&witness)?;
    }
    no_credentials(world);
    nowhere(world, &password)
}

/// What a registry let a user have is his as long as it says so, though the store has it.
fn revoked(world: &mut World) -> Result<()> {
    use testbed::registry::{Registry, RegistryOptions};
    no_credentials(world);
    let account = |password: &str| vec![Account { user: "somebody".into(), password: password.into() }];
    for (name, tokens) in [("revoke-basic", false), ("revoke-token", true)] {
        let options = RegistryOptions { accounts: account("before"), tokens, ..RegistryOptions::default() };
        let mut registry = Registry::start(&world.bed.site, name, options)?;
        let host = registry.host();
        registry.push(&testbed::images::busybox(&world.directory(name)?)?, "team/private:latest")?;
        let asked_each_time = format!("[registry.\"{host}\"]\ninsecure = true\n[store]\nconfirmation_seconds = 0\n");
        world.bed.pyxis.configure(&(world.configuration() + &asked_each_time))?;
        let image = format!("--container-image={host}/team/private");
        let login = |world: &World, password: &str| {
            let line = format!("machine {host} login somebody password {password}\n");
            credentials(world, 0, ".config/enroot/.credentials", &line)
        };
        login(world, "before")?;
        let first = world.sh(&["-w", "node1", &image], "id -un");
        registry.set_accounts(&world.bed.site, account("after"))?;
        let refused = world.refused(&["-w", "node1", &image], "pyxis: failed to import docker image: ");
        let never = world.refused(&["-w", "node1", &image, "--container-pull=never"], "container-pull=never");
        let downloads = |registry: &Registry| {
            registry.log(&world.bed.site).lines().filter(|line| line.contains("GET /v2/team/private/blobs/")).count()
        };
        let before = downloads(&registry);
        login(world, "after")?;
        let again = world.sh(&["-w", "node1", &image], "id -un");
        let after = downloads(&registry);
        world.bed.pyxis.configure(&world.configuration())?;
        no_credentials(world);
        assert_eq!((first?.as_str(), again?.as_str()), ("pyxis-test-1", "pyxis-test-1"), "{name}");
        let refused = refused?;
        ensure!(refused.contains("refuses the password of user somebody"), "{refused}");
        never?;
        // Of what the store has kept only the config was downloaded again.
        ensure!(after - before <= 1, "{} downloads", after - before);
    }
    Ok(())
}

/// Who is known, and may not.
fn for_others(world: &mut World) -> Result<()> {
    no_credentials(world);
    let Account { user, password } = world.private.accounts()[0].clone();
    let host = world.tokens.host();
    let line = format!("machine {host} login {user} password {password}\n");
    credentials(world, 0, ".config/enroot/.credentials", &line)?;
    let image = format!("--container-image={host}/denied/image");
    let error = world.refused(&[&image], "pyxis: failed to import docker image: ")?;
    no_credentials(world);
    let file = world.user(0).home.join(".config/enroot/.credentials");
    let expected = format!(
        "{host} does not let user {user} (from {}) pull denied/image, or has no such repository",
        file.display()
    );
    ensure!(error.contains(&expected) && error.contains(": check the name, or ask its owner for access\n"), "{error}");
    Ok(())
}
