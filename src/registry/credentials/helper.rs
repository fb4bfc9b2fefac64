//! Programs that know passwords: Docker's credential helpers (docker/docker-credential-helpers, "Development") and the
//! commands of enroot's `.credentials`. They run as whoever asks, with his environment, and not for long.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::process::{Command, ExitStatus};
use std::time::Duration;

use serde::Deserialize;
use zeroize::Zeroizing;

use super::Credential;
use crate::request::Environment;
use crate::sys::command;

/// How long a program may take: it may have to ask a server.
const TIME: Duration = Duration::from_secs(30);
/// Most bytes that it may print.
const MAX_OUTPUT: usize = 64 << 10;
/// Where programs are looked for if the environment does not say.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What helpers say, with exit status 1, if they have nothing.
const NOTHING: [&str; 2] = ["credentials not found in native keychain", "no credentials server URL"];

/// What a helper prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Output {
    #[serde(default)]
    username: String,
    #[serde(default)]
    secret: String,
}

/// The program of the helper called `name` in a configuration of Docker's; none if nothing can have that name.
pub(super) fn program(name: &str) -> Option<String> {
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
    is_name.then(|| format!("docker-credential-{name}"))
}

/// What the helper `program` has for `server`; `source` says in messages who wants it.
pub(super) fn ask(
    program: &str,
    server: &str,
    environment: &Environment,
    source: &str,
) -> Result<Option<Credential>, String> {
    let mut command = command_in(program, environment);
    command.arg("get");
    let (status, text) = run(&mut command, format!("{server}\n").as_bytes()).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => format!("{program} is not on this node: install it, or log in without it"),
        _ => format!("{program} cannot be run: {}", crate::sys::reason(error)),
    })?;
    let Some(status) = status else { return Err(format!("{program} takes more than {} s", TIME.as_secs())) };
    if !status.success() {
        let said = String::from_utf8_lossy(&text);
        if NOTHING.iter().any(|nothing| said.trim() == *nothing) {
            return Ok(None);
        }
        return Err(format!("{program} fails ({}): run it by hand to see why", ended(status)));
    }
    // The reason may quote a secret.
    let output: Output =
        serde_json::from_slice(&text).map_err(|_| format!("{program} prints no credentials in Docker's form"))?;
    let credential = Credential::password(&output.username, output.secret, source);
    Ok(Some(credential).filter(|credential| !credential.secret.reveal().is_empty()))
}

/// The words that a shell makes of `text`.
pub(super) fn shell(text: &str, environment: &Environment) -> Result<String, String> {
    let mut command = command_in("/bin/sh", environment);
    // No patterns: a token may contain `*`. On standard input, because arguments are for all to see.
    command.arg("-f");
    let script = Zeroizing::new(format!("{{ set -- {text}\nprintf %s \"$*\"; }} </dev/null\n"));
    let (status, output) =
        run(&mut command, script.as_bytes()).map_err(|error| format!("no shell: {}", crate::sys::reason(error)))?;
    match status {
        None => Err(format!("its command takes more than {} s", TIME.as_secs())),
        Some(status) if !status.success() => Err(format!("the shell refuses it ({})", ended(status))),
        Some(_) => match std::str::from_utf8(&output).map(str::trim) {
            Ok("") => Err("its command prints nothing: run it by hand to see why".to_owned()),
            Ok(secret) => Ok(secret.to_owned()),
            Err(_) => Err("its command prints something that is no text".to_owned()),
        },
    }
}

fn command_in(program: &str, environment: &Environment) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("PATH", PATH);
    command.envs(environment.iter().map(|(name, value)| (OsStr::from_bytes(name), OsStr::from_bytes(value))));
    command
}

fn run(command: &mut Command, input: &[u8]) -> io::Result<(Option<ExitStatus>, Zeroizing<Vec<u8>>)> {
    let captured = command::ask(command, input, MAX_OUTPUT, TIME)?;
    Ok((captured.status, Zeroizing::new(captured.text)))
}

fn ended(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "for no known reason".to_owned(),
    }
}
