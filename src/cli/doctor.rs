//! `pyxis doctor`: what works on this node, one line each, with the remedy for what does not.

mod image;
mod node;

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use super::enroot::Context;
use super::unprivileged;
use crate::broker::import::crowded;
use crate::config::Config;
use crate::container::kept::Containers;
use crate::image::reference::ImageReference;
use crate::registry::client::Client;
use crate::registry::config::RegistryConfig;
use crate::registry::credentials::no_keys;
use crate::registry::proxy::Proxies;
use crate::registry::site;
use crate::request::User;
use crate::rootfs::probe;
use crate::store::Store;

/// Check this node, or the way to an image.
///
/// Without IMAGE: kernel, store, accounts, registries. With one: its name, this site's policy, mirrors and registry (DNS,
/// connection, TLS), credentials, manifest, platform, space; the first that fails says what to do.
#[derive(Debug, Clone, clap::Args)]
#[command(after_long_help = node::EXIT_CODES)]
pub struct DoctorArgs {
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// Whether this node can run containers, for health checkers: quick, and asks no registry
    #[arg(long, conflicts_with = "image")]
    node: bool,
    /// [USER@][REGISTRY#]IMAGE[:TAG]
    #[arg(value_name = "IMAGE")]
    image: Option<String>,
}

/// For the man page.
pub const JSON: &str = "\
A list of objects, in the order in which things were looked at:
  name    what was looked at
  status  ok, warning (containers work, with less or slower), failed or unknown (cannot be seen by this user)
  detail  what was seen
  remedy  what to do; empty if there is nothing to do
With --node an object:
  health  healthy, degraded or unusable
  checks  that list";

/// One thing that was looked at.
#[derive(Debug, Serialize, Deserialize)]
struct Check {
    name: String,
    status: Status,
    detail: String,
    /// What to do about it; empty if nothing has to be done.
    remedy: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// Something is slower or missing, and containers work.
    Warning,
    Failed,
    /// It could not be looked at.
    Unknown,
}

impl Check {
    fn ok(name: &str, detail: impl Into<String>) -> Self {
        Self { name: name.into(), status: Status::Ok, detail: detail.into(), remedy: String::new() }
    }

    fn bad(name: &str, status: Status, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), status, detail: detail.into(), remedy: remedy.into() }
    }

    /// One line, whatever the parts contain.
    fn line(&self) -> String {
        let status = match self.status {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failed => "FAILED",
            Status::Unknown => "unknown",
        };
        let remedy = if self.remedy.is_empty() { String::new() } else { format!("; {}", self.remedy) };
        format!("{status:8} {}: {}{remedy}", self.name, self.detail).replace('\n', " ")
    }
}

/// Prints the checks; fails if one of them did.
pub fn run(args: &DoctorArgs, path: &Path) -> Result<ExitCode, Box<dyn std::error::Error>> {
    if args.node {
        return node::run(args.json, path);
    }
    if let Some(typed) = &args.image {
        return report(args, &image::checks(typed, &Context::load(path)?));
    }
    let mut checks = Vec::new();
    let config = match Config::load(path) {
        Ok(config) => {
            let detail = if path.exists() { "valid" } else { "not there: every setting has its default" };
            checks.push(Check::ok("configuration", format!("{} is {detail}", path.display())));
            config
        }
        Err(error) => {
            checks.push(Check::bad("configuration", Status::Failed, error.to_string(), "containers do not start"));
            Config::default()
        }
    };
    checks.extend([file_system("overlay"), file_system("erofs"), user_namespaces()]);
    if rustix::process::geteuid().is_root() {
        checks.push(store(&config));
        checks.push(root_filesystem(&config));
        checks.push(named_containers(&config));
    } else {
        checks.push(Check::bad("store", Status::Warning, "not looked at", "run \"pyxis doctor\" as root"));
    }
    let account = importer_account(&config);
    checks.push(account.1);
    checks.extend(registries(&config, account.0));

    report(args, &checks)
}

fn report(args: &DoctorArgs, checks: &[Check]) -> Result<ExitCode, Box<dyn std::error::Error>> {
    if args.json {
        println!("{}", serde_json::to_string(checks)?);
    } else {
        checks.iter().for_each(|check| println!("{}", check.line()));
    }
    let failed = checks.iter().any(|check| check.status == Status::Failed);
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn file_system(name: &str) -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    match known.lines().any(|line| line.split_whitespace().next_back() == Some(name)) {
        true => Check::ok(name, "the kernel has it"),
        false => Check::bad(name, Status::Warning, "not loaded", format!("modprobe {name}")),
    }
}

fn user_namespaces() -> Check {
    let name = "user namespaces";
    match fs::read_to_string("/proc/sys/user/max_user_namespaces").ok().and_then(|text| text.trim().parse::<u64>().ok())
    {
        Some(0) => Check::bad(
            name,
            Status::Failed,
            "none are allowed",
            "set the sysctl user.max_user_namespaces to 10000 or more",
        ),
        Some(most) => Check::ok(name, format!("up to {most}")),
        None => Check::bad(name, Status::Failed, "the kernel has none", "use a kernel with CONFIG_USER_NS"),
    }
}

fn store(config: &Config) -> Check {
    let path = config.store.path.display();
    let high = config.store.watermarks.high;
    let opened = Store::open(&config.store.path)
        .and_then(|store| Ok((store.available()?, store.beyond(high)?, crowded(&store, high))));
    match opened {
        Ok((available, 0, _)) => Check::ok("store", format!("{path}, {} available", crate::store::size(available))),
        // What nothing uses may go yet.
        Ok((.., crowded)) => Check::bad("store", Status::Warning, crowded, ""),
        Err(error) => Check::bad("store", Status::Failed, error.to_string(), ""),
    }
}

fn root_filesystem(config: &Config) -> Check {
    let name = "root filesystem";
    match probe::container_root(&config.store.path, &config.runtime.path) {
        Ok(kernel) if kernel.idmapped_layers => Check::ok(name, "an image can be mounted, idmapped and overlaid"),
        Ok(_) => Check::bad(
            name,
            Status::Warning,
            "overlayfs takes no idmapped layers: each user has copies of the layers that he uses",
            "Linux 5.19 or newer needs none",
        ),
        Err(error) => Check::bad(name, Status::Failed, error, "containers do not start"),
    }
}

fn named_containers(config: &Config) -> Check {
    let (name, path) = ("named containers", &config.container.path);
    let tried = Containers::create(path).map_err(|error| error.to_string()).and_then(|_| probe::upper_layers(path));
    match tried {
        Ok(()) => Check::ok(name, format!("kept in {}", path.display())),
        Err(error) => Check::bad(
            name,
            Status::Warning,
            error,
            "steps with --container-name fail: set container.path to a directory on a local disk (ext4, xfs)",
        ),
    }
}

/// The account that imports run under, and what is to be said of it.
fn importer_account(config: &Config) -> (Option<User>, Check) {
    let name = "import account";
    let wanted = &config.import.user;
    match unprivileged::account(wanted) {
        Some(account) => (Some(account), Check::ok(name, wanted.as_str())),
        None => {
            let remedy = format!("imports run as nobody until: useradd --system --shell /usr/sbin/nologin {wanted}");
            (None, Check::bad(name, Status::Warning, format!("there is no user {wanted}"), remedy))
        }
    }
}

/// Takes in the site's files for `reference`.
fn complete(settings: &mut RegistryConfig, reference: &ImageReference) -> Result<(), String> {
    let mut files = Vec::new();
    let failed = |path: &Path, error| format!("{}: {}", path.display(), crate::sys::reason(error));
    for file in settings.site_files(reference) {
        let opened = site::open_for_command(&file).map_err(|error| failed(&file.path, error))?;
        files.extend(opened.map(|opened| (file, opened)));
    }
    settings.read_site_files(files).map(drop).map_err(|(path, error)| failed(&path, error))
}

/// Docker Hub, every registry that the configuration names, and their mirrors.
fn registries(config: &Config, account: Option<User>) -> Vec<Check> {
    let mut settings = config.registries();
    settings.proxies = Proxies::of_command(&settings.proxy);
    let mut names: Vec<&str> = config.registry.keys().map(String::as_str).collect();
    if !names.contains(&"docker.io") {
        names.push("docker.io");
    }
    let mut checks = Vec::new();
    for name in names {
        let Ok(reference) = ImageReference::parse(&format!("{name}#library/alpine")) else { continue };
        let mut settings = settings.clone();
        if let Err(problem) = complete(&mut settings, &reference) {
            checks.push(Check::bad(
                &format!("registry {name}"),
                Status::Failed,
                problem,
                "its images cannot be imported",
            ));
            continue;
        }
        let mirrors = settings.mirrors(&reference);
        let has_mirror = !mirrors.is_empty();
        for endpoint in mirrors.into_iter().chain([settings.upstream(&reference)]) {
            let title = match endpoint.mirror {
                true => format!("mirror {} of {name}", endpoint.host),
                false => format!("registry {name}"),
            };
            let client = Client::new(endpoint, settings.network, no_keys(), None);
            let answer = unprivileged::run(account.as_ref(), || client.ping().err().map(|error| error.to_string()));
            checks.push(match answer.unwrap_or_else(|error| Some(crate::sys::reason(error))) {
                None => Check::ok(&title, "answers"),
                // Behind a mirror the registry itself need not be reachable, and a site may use others only.
                Some(error) => {
                    let status = Status::Warning;
                    let remedy = if has_mirror { "its images come from where the others answer" } else { "" };
                    Check::bad(&title, status, error, remedy)
                }
            });
        }
    }
    checks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_check_is_one_line() {
        let check = Check::bad("store", Status::Failed, "two\nlines", "do this");
        assert_eq!(check.line(), "FAILED   store: two lines; do this");
        assert_eq!(Check::ok("store", "fine").line(), "ok       store: fine");
    }
}
