//! `pyxis run`: a container without Slurm, through the same code as a step.

use std::ffi::{CString, OsString};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;
use std::process::ExitCode;

use super::supervise::in_child;
use crate::options::Options;
use crate::options::table::OptionId;
use crate::request::{Environment, StepRequest, User};
use crate::sys::process::{become_user, exit_now};
use crate::task::{JoinOptions, LifePipe, Outcome, UserMessage, start_broker};

type Error = Box<dyn std::error::Error>;

/// Run a command in a container of an image, as a step of Slurm would.
#[derive(Debug, Clone, clap::Args)]
pub struct RunArgs {
    /// As whom: a user name or number
    #[arg(long, value_name = "USER", default_value = "0")]
    user: String,
    /// SRC:DST[:FLAGS][,SRC:DST...]
    #[arg(long, value_name = "MOUNTS")]
    container_mounts: Vec<String>,
    /// NAME[=VALUE][,NAME...]
    #[arg(long, value_name = "NAMES")]
    container_env: Vec<String>,
    /// Working directory inside the container
    #[arg(long, value_name = "PATH")]
    container_workdir: Option<String>,
    /// Let the command write to the root filesystem
    #[arg(long, conflicts_with = "container_readonly")]
    container_writable: bool,
    /// Do not
    #[arg(long)]
    container_readonly: bool,
    /// Be root inside
    #[arg(long, conflicts_with = "no_container_remap_root")]
    container_remap_root: bool,
    /// Do not
    #[arg(long)]
    no_container_remap_root: bool,
    /// Mount the home directory
    #[arg(long, conflicts_with = "no_container_mount_home")]
    container_mount_home: bool,
    /// Do not
    #[arg(long)]
    no_container_mount_home: bool,
    /// Run the image's entrypoint first
    #[arg(long)]
    container_entrypoint: bool,
    /// And show what it prints
    #[arg(long)]
    container_entrypoint_log: bool,
    /// Namespaces of its own: NS[,NS...] of net, ipc, uts
    #[arg(long, value_name = "NAMESPACES")]
    container_unshare: Vec<String>,
    /// Devices of the node by their CDI names: VENDOR/CLASS=NAME[,...]
    #[arg(long, value_name = "DEVICES")]
    container_device: Vec<String>,
    /// When to ask the registry: always, recent, missing, never
    #[arg(long, value_name = "WHEN")]
    container_pull: Option<String>,
    /// Show what a step would write to the node's log
    #[arg(long, short)]
    verbose: bool,
    /// [USER@][REGISTRY#]IMAGE[:TAG]
    image: String,
    /// What to run
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Runs the command; its exit code is ours.
pub fn run(args: &RunArgs, config: &Path) -> Result<ExitCode, Error> {
    if !rustix::process::geteuid().is_root() {
        return Err(
            "\"pyxis run\" mounts images from the store and needs root: sudo pyxis run --user \"$USER\" …".into()
        );
    }
    let user = look_up(&args.user)?;
    let request = request(args, user.clone())?;
    let environment: Environment = std::env::vars_os().map(|(name, value)| join(name, value)).collect();
    let life = LifePipe::create()?;

    // This process is what slurmstepd is for a step: it keeps the life pipe. The child is the task.
    let LifePipe { read, write } = life;
    let program = || {
        drop(write);
        Err(task(args, config, &request, &environment, &read))
    };
    Ok(ExitCode::from(in_child(program, |error: Error| eprintln!("pyxis: {error}"))?))
}

pub(super) fn join(mut name: OsString, value: OsString) -> Vec<u8> {
    name.push("=");
    name.push(value);
    name.into_vec()
}

/// The account with this name or number, with its groups.
pub(super) fn look_up(user: &str) -> Result<User, Error> {
    let found = match user.parse::<u32>() {
        Ok(uid) => nix::unistd::User::from_uid(uid.into())?,
        Err(_) => nix::unistd::User::from_name(user)?,
    };
    let entry = found.ok_or_else(|| format!("--user: no such user: {user}"))?;
    let name = CString::new(entry.name)?;
    let groups = nix::unistd::getgrouplist(&name, entry.gid)?;
    Ok(User {
        uid: entry.uid.as_raw(),
        gid: entry.gid.as_raw(),
        groups: groups.into_iter().map(nix::unistd::Gid::as_raw).collect(),
    })
}

fn request(args: &RunArgs, user: User) -> Result<StepRequest, Error> {
    let mut options = Options::default();
    options.set(OptionId::Image, args.image.as_bytes())?;
    for text in &args.container_mounts {
        options.set(OptionId::Mounts, text.as_bytes())?;
    }
    for text in &args.container_env {
        options.set(OptionId::Env, text.as_bytes())?;
    }
    for text in &args.container_unshare {
        options.set(OptionId::Unshare, text.as_bytes())?;
    }
    for text in &args.container_device {
        options.set(OptionId::Device, text.as_bytes())?;
    }
    if let Some(path) = &args.container_workdir {
        options.set(OptionId::Workdir, path.as_bytes())?;
    }
    if let Some(when) = &args.container_pull {
        options.set(OptionId::Pull, when.as_bytes())?;
    }
    let switches = [
        (args.container_writable, OptionId::Writable),
        (args.container_readonly, OptionId::Readonly),
        (args.container_remap_root, OptionId::RemapRoot),
        (args.no_container_remap_root, OptionId::NoRemapRoot),
        (args.container_mount_home, OptionId::MountHome),
        (args.no_container_mount_home, OptionId::NoMountHome),
        (args.container_entrypoint, OptionId::Entrypoint),
        (args.container_entrypoint_log, OptionId::EntrypointLog),
    ];
    for (_, id) in switches.into_iter().filter(|(given, _)| *given) {
        options.set(id, b"")?;
    }
    Ok(StepRequest {
        image: options.image,
        pull: options.pull,
        name: options.name,
        save: options.save,
        entrypoint: options.entrypoint.unwrap_or(false),
        entrypoint_log: options.entrypoint_log.unwrap_or(false),
        unshare: options.unshare,
        devices: options.devices,
        mounts: options.mounts,
        container_env: options.env,
        workdir: options.workdir,
        mount_home: options.mount_home,
        remap_root: options.remap_root,
        writable: options.writable,
        ..StepRequest::bare(user, std::env::current_dir()?)
    })
}

/// What a task of a step does, from `task_init_privileged` to execve. Returns only if it fails.
fn task(args: &RunArgs, config: &Path, request: &StepRequest, environment: &Environment, life: &impl AsFd) -> Error {
    let attempt = || -> Result<std::convert::Infallible, Error> {
        let executable = std::env::current_exe()?;
        let starting = start_broker(&executable, config, request, environment, life.as_fd())?;
        become_user(&request.user)?;
        let outcome = starting.finish(environment, &mut |message| match message {
            UserMessage::Notice(text) | UserMessage::Error(text) => eprintln!("{text}"),
            UserMessage::Log(text) if args.verbose => eprintln!("{text}"),
            UserMessage::Log(_) => {}
        });
        let Outcome::Ready(container) = outcome else { exit_now(1) };
        let options = JoinOptions {
            container_env: request.container_env.clone(),
            workdir: request.workdir.clone(),
            unshare: request.unshare,
        };
        let environment = container.task_environment(environment, &options);
        container.join(&options)?;
        Err(execute(&args.command, &environment)?)
    };
    match attempt() {
        Err(error) => error,
        Ok(never) => match never {},
    }
}

/// Becomes the command, looked for in the container's `PATH`.
fn execute(command: &[OsString], environment: &Environment) -> Result<Error, Error> {
    let arguments = command.iter().map(|word| CString::new(word.as_bytes())).collect::<Result<Vec<_>, _>>()?;
    let variables: Vec<CString> =
        environment.iter().map(|(name, value)| CString::new([name, b"=", value].concat())).collect::<Result<_, _>>()?;
    let name = arguments.first().ok_or("no command")?;
    let errno = crate::sys::exec::execute(name, &arguments, &variables, environment.get("PATH"));
    Ok(format!("{}: {}", name.to_string_lossy(), errno.desc()).into())
}
