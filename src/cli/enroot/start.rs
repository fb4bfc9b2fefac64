//! `enroot start`: a command in a container, without privilege. This process becomes the command, once it has made
//! namespaces for itself and furnished the root filesystem, through the code that does it for steps.

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::process::Signal;

use super::exec::{apply, execute};
use super::known::Known;
use super::{Context, Error, say, settings};
use crate::cli::supervise::in_child;
use crate::enroot::script::Script;
use crate::init::Start;
use crate::init::alone::{Alone, Extras, Failure, ImageServer, Ready, Runtime};
use crate::mounts::fstab::Fstab;
use crate::request::{ContainerEnv, Environment, StepRequest, Unshare, User};
use crate::rootfs::overlay;
use crate::squashfs::reader::Image;
use crate::sys::mount::clone_tree;
use crate::sys::process::exit_now;
use crate::sys::{self, memfile};
use crate::task::fake_ownership;
use crate::unpacked::furnishing;

/// What runs scripts.
const SHELL: &str = "/bin/sh";

/// Start a container and run a command in it.
#[derive(Debug, clap::Args)]
pub struct StartArgs {
    #[command(flatten)]
    options: StartOptions,
    /// Name of a container, or squashfs file
    #[arg(value_name = "NAME|IMAGE")]
    target: OsString,
    /// What to run
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Start what a configuration script says (#ENROOT_ROOTFS NAME|IMAGE).
#[derive(Debug, clap::Args)]
pub struct BatchArgs {
    /// Configuration script, as for start --conf
    #[arg(value_name = "CONFIG")]
    conf: PathBuf,
    /// What to run
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// How a container is started.
#[derive(Debug, Default, clap::Args)]
pub struct StartOptions {
    /// Configuration script: bash, with functions rc, environ, mounts and hooks
    #[arg(short, long, value_name = "FILE")]
    conf: Option<PathBuf>,
    /// Set a variable, or pass it on
    #[arg(short, long, value_name = "KEY[=VAL]")]
    env: Vec<String>,
    /// Script to run in place of /etc/rc
    #[arg(long, value_name = "FILE")]
    rc: Option<PathBuf>,
    /// Be root inside
    #[arg(short, long)]
    root: bool,
    /// Let the command write to the root filesystem
    #[arg(short = 'w', long)]
    rw: bool,
    /// A mount as in fstab(5), with colons between the fields: SRC:DST:TYPE:OPTIONS
    #[arg(short, long, value_name = "FSTAB")]
    mount: Vec<String>,
    /// Have process ids of its own
    #[arg(long)]
    pid: bool,
    /// Have a network of its own
    #[arg(long)]
    net: bool,
    /// Have shared memory of its own
    #[arg(long)]
    ipc: bool,
    /// Have a host name of its own
    #[arg(long)]
    uts: bool,
}

/// What is started.
#[derive(Debug)]
pub enum Target {
    /// A root filesystem.
    Unpacked(PathBuf),
    /// A file, and where in it a squashfs image begins.
    Image(PathBuf, u64),
}

/// Runs `start`; the command's exit code is ours.
pub fn run(args: &StartArgs, context: &Context) -> Result<ExitCode, Error> {
    let target = find(&args.target, context)?;
    start(&args.options, &target, &args.command, context).map(ExitCode::from)
}

/// Runs `batch`, likewise.
pub fn batch(args: &BatchArgs, context: &Context) -> Result<ExitCode, Error> {
    let settings = Script::load(&args.conf)?.settings(&context.environment, &context.identity)?;
    let target = settings.iter().find(|(key, value)| key == "ENROOT_ROOTFS" && !value.is_empty());
    let (_, target) =
        target.ok_or_else(|| format!("{}: no line #ENROOT_ROOTFS says what to start", args.conf.display()))?;
    let options = StartOptions { conf: Some(args.conf.clone()), ..StartOptions::default() };
    start(&options, &find(target.as_ref(), context)?, &args.command, context).map(ExitCode::from)
}

/// Starts `command` in `target`. Returns if it runs in a child: with its exit code.
pub fn start(args: &StartOptions, target: &Target, command: &[OsString], context: &Context) -> Result<u8, Error> {
    let script = args.conf.as_deref().map(Script::load).transpose()?;
    let mut environment = context.environment.clone();
    if let Some(script) = &script {
        for (key, value) in script.settings(&context.environment, &context.identity)? {
            environment.set(key, value);
        }
    }
    // What it says of a root filesystem is for "batch" only.
    environment.remove("ENROOT_ROOTFS");
    let settings = settings::load(&context.config, &environment, &context.identity)?;
    let runtime = Runtime::make(&settings.runtime_path(), &settings.temp_path()).map_err(|error| {
        format!("cannot make a runtime directory: {} (ENROOT_RUNTIME_PATH)", crate::sys::reason(error))
    })?;
    // What the script's functions and the lines of mounts see.
    let mut seen = settings.environment().clone();
    seen.set("ENROOT_ROOTFS", overlay::attach_point(runtime.path()).as_os_str().as_bytes());
    let mut extras = Extras::default();
    let mut variables = Vec::new();
    let mut rc = None;
    if let Some(script) = &script {
        variables.extend(lines_of(&script.output("environ", &seen)?));
        let lines = script.output("mounts", &seen)?;
        extras.fstab.extend(Fstab::parse(&lines, "mounts()", Some(&variable(&seen)))?);
        extras.hooks = script.hooks(&seen)?;
        rc = script.rc(&seen)?;
    }
    for line in &args.mount {
        if line.contains([' ', '\t', '\n']) {
            return Err(format!("Invalid argument: {line}").into());
        }
        let line = line.replace(':', " ");
        extras.fstab.extend(Fstab::parse(&line, "--mount", Some(&variable(&seen)))?);
    }
    if let Some(path) = &args.rc {
        let missing = |error: io::Error| format!("{}: {}", crate::sys::reason(error), path.display());
        rc = Some(std::fs::read_to_string(path).map_err(missing)?);
    }
    let mut named = Environment::default();
    apply(&mut named, &variables, &Environment::default());
    apply(&mut named, &args.env, &environment);
    let request = request(args, context, &named);
    let sysconf = settings.sysconf_path().to_owned();
    let start = Start {
        request: &request,
        environment: &environment,
        image_config: &[],
        image_digest: None,
        settings: &context.config.container,
        sysconf: &sysconf,
        hooks: &context.config.hooks,
        devices: &context.config.devices,
        // Nobody keeps account of who runs in a directory of the user's.
        root_is_shared: true,
        runtime: runtime.path(),
        broker: rustix::process::getpid(),
        leader: rustix::process::getpid().as_raw_nonzero().get(),
    };
    let process_namespace = args.pid || settings.unshare("pid");
    let begin = || -> Result<u8, Failure> {
        let prepared = Prepared::new(target)?;
        let alone = Alone::enter(&start, process_namespace)?;
        let go_on = || -> Result<Infallible, Failure> {
            alone.make_runtime()?;
            let root = prepared.root(&alone)?;
            let ready = alone.furnish(root, extras, process_namespace)?;
            if environment.get("ENROOT_DEBUG").is_some() {
                ready.log.iter().for_each(say::warn);
            }
            runtime.remove();
            drop(prepared);
            Err(become_command(command, &ready, rc.as_deref()))
        };
        if !process_namespace {
            match go_on()? {}
        }
        // The first process of the namespace looks after what others leave; the command is its child.
        let first = || -> Result<Infallible, Failure> {
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL)).map_err(Failure::line)?;
            exit_now(in_child(go_on, report).map_err(Failure::line)?.into())
        };
        in_child(first, report).map_err(Failure::line)
    };
    begin().or_else(|failure| {
        report(failure);
        Ok(1)
    })
}

/// What `typed` means: a squashfs file, or else the name of a container.
fn find(typed: &OsStr, context: &Context) -> Result<Target, Error> {
    let path = Path::new(typed);
    if path.is_file() {
        let open = || -> Result<PathBuf, Error> {
            Image::open(std::fs::File::open(path).map_err(sys::reason)?)?;
            Ok(path.canonicalize()?)
        };
        match open() {
            Ok(path) => return Ok(Target::Image(path, 0)),
            // A container's name has no slash.
            Err(error) if typed.as_bytes().contains(&b'/') => {
                return Err(format!("Invalid image format: {} ({error})", path.display()).into());
            }
            Err(_) => {}
        }
    }
    Ok(Target::Unpacked(Known::new(context).find_unpacked(typed, "")?))
}

fn request(args: &StartOptions, context: &Context, named: &Environment) -> StepRequest {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let groups = nix::unistd::getgroups().unwrap_or_default();
    let user = User {
        uid: context.identity.uid,
        gid: context.identity.gid,
        groups: groups.into_iter().map(nix::unistd::Gid::as_raw).collect(),
    };
    StepRequest {
        // The image's /etc/rc decides what to start.
        entrypoint: true,
        unshare: Unshare { net: args.net, ipc: args.ipc, uts: args.uts },
        container_env: named.iter().map(|(name, value)| ContainerEnv::Set(text(name), text(value))).collect(),
        remap_root: args.root.then_some(true),
        writable: args.rw.then_some(true),
        ..StepRequest::bare(user, context.identity.cwd.clone())
    }
}

/// What `${NAME}` stands for in fstab lines.
fn variable(environment: &Environment) -> impl Fn(&str) -> Option<Vec<u8>> + '_ {
    |name| environment.get(name).map(<[u8]>::to_owned)
}

/// The assignments that a script prints.
fn lines_of(text: &str) -> impl Iterator<Item = String> + '_ {
    text.lines().map(str::trim_start).filter(|line| line.contains('=') && !line.starts_with('#')).map(str::to_owned)
}

/// What has to be done before this process is in its namespaces.
enum Prepared {
    Unpacked { path: PathBuf, _lock: Option<OwnedFd> },
    Image(ImageServer),
}

impl Prepared {
    fn new(target: &Target) -> Result<Self, Failure> {
        match target {
            Target::Unpacked(path) => {
                Ok(Self::Unpacked { path: path.clone(), _lock: furnishing::lock(path).map_err(Failure::line)? })
            }
            Target::Image(path, start) => ImageServer::start(path, *start).map(Self::Image),
        }
    }

    /// The root filesystem as a detached mount.
    fn root(&self, alone: &Alone<'_>) -> Result<OwnedFd, Failure> {
        match self {
            Self::Image(server) => {
                let root = server.mount(alone)?;
                // By which "list" knows that this is a container.
                let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let _ = rustix::fs::openat(&root, furnishing::LOCK, flags, Mode::RUSR | Mode::WUSR);
                Ok(root)
            }
            Self::Unpacked { path, .. } => clone_tree(CWD.as_fd(), path, false)
                .map_err(|errno| Failure::line(format!("Failed to mount: {}: {}", path.display(), sys::reason(errno)))),
        }
    }
}

fn report(failure: Failure) {
    for line in failure.0 {
        match line.strip_prefix("[ERROR] ") {
            Some(text) => say::error(text),
            None => say::plain(line),
        }
    }
}

/// Becomes the command. Returns why not.
fn become_command(command: &[OsString], ready: &Ready, rc: Option<&str>) -> Failure {
    let attempt = || -> Result<Infallible, Error> {
        let script;
        let (program, mut words): (OsString, Vec<OsString>) = match (rc, &ready.entrypoint, command.first()) {
            (Some(text), ..) => {
                script = memfile::sealed("rc", text.as_bytes())?;
                rustix::io::fcntl_setfd(&script, rustix::io::FdFlags::empty())?;
                (SHELL.into(), vec![SHELL.into(), format!("/proc/self/fd/{}", script.as_raw_fd()).into()])
            }
            (None, Some(words), _) if ready.has_shell => (SHELL.into(), words.iter().map(OsString::from).collect()),
            (None, _, Some(word)) if word.as_bytes().contains(&b' ') => (SHELL.into(), vec![SHELL.into(), "-c".into()]),
            (None, _, Some(word)) => (word.clone(), Vec::new()),
            (None, _, None) if ready.has_shell => {
                let shell = ready.environment.get_str("SHELL").unwrap_or(SHELL);
                (shell.into(), vec![shell.into()])
            }
            (None, _, None) => return Err("the image has no shell: say what to run".into()),
        };
        words.extend(command.iter().cloned());
        if ready.is_confined {
            rustix::thread::set_no_new_privs(true)?;
            fake_ownership().load()?;
        }
        Err(execute(Some(&program), &words, &ready.environment))
    };
    match attempt() {
        Ok(never) => match never {},
        Err(error) => Failure::line(error),
    }
}
