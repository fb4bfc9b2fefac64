//! `pyxis login` and `pyxis logout`: passwords where docker, and so pyxis, looks for them.
//!
//! A password is never an argument: other users see those. It is checked with the registry before it is kept, by the
//! helper that the configuration names, or else in the configuration itself.

use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use serde::Serialize;
use serde_json::json;

use super::docker_config::{DockerConfig, key_of};
use super::enroot::Context;
use super::prompt::ask;
use crate::image::reference::ImageReference;
use crate::registry::login::{Checked, check};

/// Longest password.
const MAX_PASSWORD: u64 = 64 << 10;

/// Keep a password for a registry, after checking it.
///
/// It is kept where docker keeps it: in ~/.docker/config.json ($DOCKER_CONFIG), or in the credential store that this file
/// names. Pyxis, docker and podman find it there.
#[derive(Debug, Clone, clap::Args)]
pub struct LoginArgs {
    /// User name; asked for if it is missing
    #[arg(short, long, value_name = "NAME")]
    username: Option<String>,
    /// Read the password from standard input; asked for otherwise
    #[arg(long)]
    password_stdin: bool,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// HOST[:PORT]
    #[arg(value_name = "REGISTRY", default_value = "docker.io")]
    registry: String,
}

/// Forget the password for a registry.
#[derive(Debug, Clone, clap::Args)]
pub struct LogoutArgs {
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// HOST[:PORT]
    #[arg(value_name = "REGISTRY", default_value = "docker.io")]
    registry: String,
}

/// For the man page.
pub const LOGIN_JSON: &str = "\
One object:
  registry  HOST[:PORT]
  user      whose password it is
  checked   whether the registry asked for the password; one that lets in everybody does not
  kept_in   the file or the helper that has it now";

/// For the man page.
pub const LOGOUT_JSON: &str = "\
One object:
  registry  HOST[:PORT]
  removed   whether there was a password
  kept_in   the file or the helper that had it";

type Error = Box<dyn std::error::Error>;

/// Runs `pyxis login`.
pub fn login(args: &LoginArgs, config: &Path) -> Result<ExitCode, Error> {
    let context = Context::load(config)?;
    let registry = registry(&args.registry)?;
    // What cannot be changed afterwards is no use.
    let mut file = DockerConfig::read(&path(&context))?;
    if !args.password_stdin && !std::io::stdin().is_terminal() {
        return Err("the password is asked for on a terminal: give it by --password-stdin".into());
    }
    let user = match &args.username {
        Some(user) => user.clone(),
        None if args.password_stdin => return Err("--password-stdin needs --username".into()),
        None => ask("Username: ", false).map_err(|error| format!("cannot ask for the user name: {error}"))?,
    };
    let password = match args.password_stdin {
        true => read_password()?,
        false => ask("Password: ", true).map_err(|error| format!("cannot ask for the password: {error}"))?,
    };
    if user.is_empty() || user.contains(':') || user.contains(char::is_control) {
        return Err("a user name is missing, or has a colon or control characters in it".into());
    }
    if password.is_empty() {
        return Err("the password is empty".into());
    }
    let checked = context.unprivileged(&registry, |asking| {
        let mut registries = context.registries(&registry);
        asking.complete(&mut registries, &registry).map_err(|error| error.to_string())?;
        check(&registries, &registry, &user, &password)
    })??;
    let kept_in = match file.helper(&registry.registry) {
        Some(helper) => {
            let message = json!({ "ServerURL": key_of(&registry.registry), "Username": user, "Secret": password });
            run_helper(&helper, "store", &message.to_string())?;
            file.add(&registry.registry, None);
            program(&helper)
        }
        None => {
            file.add(&registry.registry, Some((&user, &password)));
            file.path().display().to_string()
        }
    };
    file.write()?;
    let checked = checked == Checked::Accepted;
    let shown = name(&registry);
    if args.json {
        #[derive(Serialize)]
        struct Report<'a> {
            registry: &'a str,
            user: &'a str,
            checked: bool,
            kept_in: &'a str,
        }
        println!("{}", serde_json::to_string(&Report { registry: &shown, user: &user, checked, kept_in: &kept_in })?);
    } else {
        if !checked {
            eprintln!("pyxis: {shown} lets everybody in: the password was not checked");
        }
        println!("Login Succeeded: user {user} at {shown}, kept in {kept_in}");
    }
    Ok(ExitCode::SUCCESS)
}

/// Runs `pyxis logout`.
pub fn logout(args: &LogoutArgs, config: &Path) -> Result<ExitCode, Error> {
    let context = Context::load(config)?;
    let registry = registry(&args.registry)?;
    let mut file = DockerConfig::read(&path(&context))?;
    let mut removed = file.has(&registry.registry);
    let kept_in = match file.helper(&registry.registry) {
        Some(helper) => {
            // A helper that has nothing says so in words of its own.
            removed |= run_helper(&helper, "erase", key_of(&registry.registry)).is_ok();
            program(&helper)
        }
        None => file.path().display().to_string(),
    };
    if file.has(&registry.registry) {
        file.remove(&registry.registry);
        file.write()?;
    }
    let shown = name(&registry);
    if args.json {
        #[derive(Serialize)]
        struct Report<'a> {
            registry: &'a str,
            removed: bool,
            kept_in: &'a str,
        }
        println!("{}", serde_json::to_string(&Report { registry: &shown, removed, kept_in: &kept_in })?);
    } else if removed {
        println!("Removed the password for {shown} from {kept_in}");
    } else {
        println!("Not logged in to {shown}");
    }
    Ok(ExitCode::SUCCESS)
}

/// The file that docker uses.
fn path(context: &Context) -> PathBuf {
    match context.environment.get_str("DOCKER_CONFIG").filter(|directory| !directory.is_empty()) {
        Some(directory) => Path::new(directory).join("config.json"),
        None => context.home().join(".docker/config.json"),
    }
}

/// An image of the registry, to find its settings by.
fn registry(typed: &str) -> Result<ImageReference, Error> {
    let host = typed.strip_prefix("https://").unwrap_or(typed).trim_end_matches('/');
    let reference = ImageReference::parse(&format!("{host}#x")).ok().filter(|reference| reference.check().is_ok());
    Ok(reference.ok_or_else(|| format!("not the name of a registry, HOST[:PORT]: {}", typed.escape_debug()))?)
}

/// The registry as people call it.
fn name(reference: &ImageReference) -> String {
    if reference.registry == crate::image::reference::DOCKER_HUB {
        "docker.io".into()
    } else {
        reference.registry.clone()
    }
}

fn read_password() -> Result<String, Error> {
    let mut text = String::new();
    std::io::stdin().take(MAX_PASSWORD + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_PASSWORD {
        return Err("the password on standard input is longer than 64 KiB".into());
    }
    // As docker does.
    Ok(text.strip_suffix('\n').map(|line| line.strip_suffix('\r').unwrap_or(line)).unwrap_or(&text).to_owned())
}

fn program(helper: &str) -> String {
    format!("docker-credential-{helper}")
}

/// Has a helper do something (docker-credential-helpers' protocol).
fn run_helper(helper: &str, action: &str, input: &str) -> Result<(), String> {
    let program = program(helper);
    if helper.contains('/') {
        return Err(format!("{}: not the name of a credential helper", program.escape_debug()));
    }
    let failed = |error: std::io::Error| format!("cannot run {program}: {}", crate::sys::reason(error));
    let mut child = Command::new(&program)
        .arg(action)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(failed)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that does not read says why.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(failed)?;
    if output.status.success() {
        return Ok(());
    }
    let said: String = String::from_utf8_lossy(&output.stdout).chars().take(200).flat_map(char::escape_debug).collect();
    Err(format!("{program} {action} failed: {}", said.trim_end_matches("\\n")))
}
