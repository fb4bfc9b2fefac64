//! `pyxis login` and `logout`, as an ordinary user types them.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;

use serde_json::{Value, json};
use testbed::registry::{Account, RegistryOptions};

use crate::world::World;

fn account() -> Account {
    Account { user: "somebody".into(), password: "open:sesame $1".into() }
}

fn world(name: &str, tokens: bool) -> World {
    World::with_registry(name, RegistryOptions { accounts: vec![account()], tokens, ..RegistryOptions::default() })
}

/// Exit code, standard output, standard error of `pyxis ARGUMENTS` with `input`.
fn typed(world: &World, arguments: &[&str], input: &str) -> (i32, String, String) {
    let mut command = world.pyxis(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let path = format!("{}:/usr/bin:/bin", world.home.join("bin").display());
    let mut child = command.env("PATH", path).spawn().unwrap();
    // A command that does not want it has closed its end.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().unwrap(), text(output.stdout), text(output.stderr))
}

fn config(world: &World) -> Value {
    serde_json::from_slice(&fs::read(world.home.join(".docker/config.json")).unwrap()).unwrap()
}

#[test]
fn a_password_is_kept_that_the_registry_believes() {
    for (name, tokens) in [("login-basic", false), ("login-tokens", true)] {
        let world = world(name, tokens);
        let host = world.registry.host();
        let login = ["login", "--username", "somebody", "--password-stdin", &host];
        let (code, _, error) = typed(&world, &login, "wrong");
        assert_eq!(code, 1, "{error}");
        assert!(error.contains(&host) && error.lines().count() == 1 && !error.contains("wrong"), "{error}");
        assert!(!world.home.join(".docker").exists());
        let (code, said, error) = typed(&world, &login, "open:sesame $1\n");
        assert_eq!((code, &*error), (0, ""));
        assert!(said.starts_with("Login Succeeded: user somebody at localhost:"), "{said}");
        let file = world.home.join(".docker/config.json");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(config(&world), json!({"auths": {&host: {"auth": "c29tZWJvZHk6b3BlbjpzZXNhbWUgJDE="}}}));
        // What is kept is what an import finds.
        world.push_busybox();
        let image = format!("{host}/busybox");
        let inspect = typed(&world, &["inspect", "--json", &image], "");
        assert_eq!(inspect.0, 0, "{}", inspect.2);
        let (code, said, _) = typed(&world, &["logout", "--json", &host], "");
        assert_eq!(code, 0);
        let report: Value = serde_json::from_str(&said).unwrap();
        assert_eq!((&report["registry"], &report["removed"]), (&json!(host), &json!(true)));
        assert_eq!(config(&world), json!({"auths": {}}));
        let (code, _, error) = typed(&world, &["inspect", &image], "");
        assert!(code == 1 && error.lines().count() == 1, "{error}");
        let (_, said, _) = typed(&world, &["logout", &host], "");
        assert_eq!(said, format!("Not logged in to {host}\n"));
    }
}

#[test]
fn a_helper_keeps_it_where_the_configuration_says_so() {
    let world = world("login-helper", false);
    let host = world.registry.host();
    let bin = world.home.join("bin");
    fs::create_dir(&bin).unwrap();
    let script = "#!/bin/sh\nread -r line; echo \"$1 $line\" >>$HOME/helper.log\n[ \"$1\" = store ] || echo nothing\n";
    fs::write(bin.join("docker-credential-box"), script).unwrap();
    fs::set_permissions(bin.join("docker-credential-box"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::create_dir(world.home.join(".docker")).unwrap();
    fs::write(world.home.join(".docker/config.json"), r#"{"credsStore": "box", "psFormat": "x"}"#).unwrap();
    for path in [".docker", ".docker/config.json"] {
        world.user.own(&world.home.join(path)).unwrap();
    }
    let login = ["login", "--json", "-u", "somebody", "--password-stdin", &host];
    let (code, said, error) = typed(&world, &login, "open:sesame $1");
    assert_eq!((code, &*error), (0, ""));
    let report: Value = serde_json::from_str(&said).unwrap();
    let expected = json!({"registry": host, "user": "somebody", "checked": true, "kept_in": "docker-credential-box"});
    assert_eq!(report, expected);
    assert_eq!(config(&world), json!({"credsStore": "box", "psFormat": "x", "auths": {&host: {}}}));
    assert_eq!(typed(&world, &["logout", &host], "").0, 0);
    let log = fs::read_to_string(world.home.join("helper.log")).unwrap();
    let (stored, erased) = log.split_once('\n').unwrap();
    let stored: Value = serde_json::from_str(stored.strip_prefix("store ").unwrap()).unwrap();
    assert_eq!(stored, json!({"ServerURL": host, "Username": "somebody", "Secret": "open:sesame $1"}));
    assert_eq!(erased.trim(), format!("erase {host}"));
}

#[test]
fn what_cannot_be_is_one_line() {
    let world = world("login-mistakes", false);
    let host = world.registry.host();
    for (arguments, input, reason) in [
        (&["login", "-u", "x", &host][..], "", "--password-stdin"),
        (&["login", "--password-stdin", &host], "x", "--username"),
        (&["login", "-u", "x", "--password-stdin", &host], "", "empty"),
        (&["login", "-u", "a:b", "--password-stdin", &host], "x", "colon"),
        (&["login", "-u", "x", "--password-stdin", "not a host"], "x", "not the name of a registry"),
        (&["logout", "a/b"], "", "not the name of a registry"),
    ] {
        let (code, said, error) = typed(&world, arguments, input);
        assert!(code == 1 && said.is_empty() && error.lines().count() == 1 && error.contains(reason), "{error}");
    }
    assert!(!world.home.join(".docker").exists());
}

/// Reads what a terminal shows until `text`.
fn shown_until(terminal: &mut impl Read, text: &str) -> String {
    let mut shown = Vec::new();
    while !String::from_utf8_lossy(&shown).contains(text) {
        let mut byte = [0];
        assert_eq!(terminal.read(&mut byte).unwrap(), 1, "{}", String::from_utf8_lossy(&shown));
        shown.push(byte[0]);
    }
    String::from_utf8(shown).unwrap()
}

/// On a terminal one is asked, sees one's name, and does not see one's password.
#[test]
fn a_password_does_not_show_on_a_terminal() {
    let world = world("login-terminal", false);
    let host = world.registry.host();
    let login = world.pyxis(&["login", &host]);
    let line: Vec<_> =
        std::iter::once(login.get_program()).chain(login.get_args()).map(|word| word.to_str().unwrap()).collect();
    let mut script = std::process::Command::new("script");
    script.args(["-qec", &line.join(" "), "/dev/null"]).env_clear();
    script.envs(login.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir(&world.home);
    let mut child = script.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (mut keyboard, mut screen) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    shown_until(&mut screen, "Username: ");
    keyboard.write_all(b"somebody\n").unwrap();
    let name = shown_until(&mut screen, "Password: ");
    assert!(name.contains("somebody"), "{name}");
    keyboard.write_all(b"open:sesame $1\n").unwrap();
    let mut rest = String::new();
    screen.read_to_string(&mut rest).unwrap();
    assert!(child.wait().unwrap().success(), "{rest}");
    assert!(rest.contains("Login Succeeded: user somebody at localhost:") && !rest.contains("sesame"), "{rest}");
    assert_eq!(config(&world), json!({"auths": {&host: {"auth": "c29tZWJvZHk6b3BlbjpzZXNhbWUgJDE="}}}));
}
