//! `pyxis pull`: images into the node's store, by the same code as for a step, so that steps find them there.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::ExitCode;

use rustix::event::{PollFd, PollFlags};
use rustix::process::{Pid, WaitOptions};
use serde::{Deserialize, Serialize};

use super::run::{join, look_up};
use crate::broker;
use crate::broker::import::{AcquireRequest, ImportEvent, acquire};
use crate::config::Config;
use crate::container::InUse;
use crate::image::digest::Digest;
use crate::image::reference::ImageReference;
use crate::metrics::{Meter, Metrics};
use crate::options::Options;
use crate::options::table::OptionId;
use crate::progress::{Progress, Screen, Update};
use crate::request::{Environment, ImageSource, PullPolicy, User};
use crate::rootfs::layers::LayerMounts;
use crate::store::{Store, count, size};
use crate::sys;
use crate::sys::process::{Forked, die_with_parent, exit_now, fork, set_capabilities};

type Error = Box<dyn std::error::Error>;

/// Bring images into this node's store.
///
/// Steps that use them later need no download; whether a user may have an image is asked of its registry all the same. The
/// store is root's, so this is for root. Other users need not do anything: a step imports what is missing. For a file of
/// one's own there is "pyxis import".
#[derive(Debug, Clone, clap::Args)]
pub struct PullArgs {
    /// With whose credentials, and for whom: a user name or number
    #[arg(long, value_name = "USER", default_value = "0")]
    user: String,
    /// Images at the same time
    #[arg(long, value_name = "NUMBER", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=32))]
    parallel: u8,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// [USER@][REGISTRY#]IMAGE[:TAG]
    #[arg(required = true, value_name = "IMAGE")]
    images: Vec<String>,
}

/// For the man page.
pub const JSON: &str = "\
A list with one object for each image, in the order of the arguments:
  image       as it was typed
  digest      of the platform's manifest; null if it could not be had
  layers      how many layers it has
  downloaded  how many of them were downloaded
  bytes       bytes that were to be downloaded
  error       one line: why the image could not be had; null if it could";

/// What became of one image.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Outcome {
    image: String,
    digest: Option<Digest>,
    layers: usize,
    downloaded: usize,
    bytes: u64,
    error: Option<String>,
}

/// From the process that imports an image, one line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// For people.
    Say(String),
    /// How far it is.
    Progress(String, bool),
    /// The last one.
    Done(Outcome),
}

/// An import that is under way.
struct Pull {
    index: usize,
    process: Pid,
    messages: BufReader<File>,
}

/// Runs the command.
pub fn run(args: &PullArgs, config: &Path) -> Result<ExitCode, Error> {
    if !rustix::process::geteuid().is_root() {
        return Err("\"pyxis pull\" fills the store of this node, which is root's: sudo pyxis pull --user \"$USER\" …; \
                    without root, steps import what is missing by themselves, and \"pyxis import docker://IMAGE\" makes \
                    a squashfs file"
            .into());
    }
    let config = Config::load(config)?;
    let user = look_up(&args.user)?;
    let references = args.images.iter().map(|typed| reference(typed)).collect::<Result<Vec<_>, _>>()?;
    let environment = environment(&user)?;
    // Every import finds it there.
    Store::open(&config.store.path)?;

    let mut screen = Screen::stderr();
    let mut waiting: VecDeque<usize> = (0..references.len()).collect();
    let mut running: Vec<Pull> = Vec::new();
    let mut outcomes: Vec<Outcome> =
        args.images.iter().map(|image| Outcome { image: image.clone(), ..Outcome::default() }).collect();
    while !(waiting.is_empty() && running.is_empty()) {
        while running.len() < usize::from(args.parallel)
            && let Some(index) = waiting.pop_front()
        {
            let (typed, reference) = (&args.images[index], &references[index]);
            running.push(start(index, typed, reference, &user, &environment, &config)?);
        }
        let mut ready: Vec<PollFd<'_>> =
            running.iter().map(|pull| PollFd::new(pull.messages.get_ref(), PollFlags::IN)).collect();
        rustix::io::retry_on_intr(|| rustix::event::poll(&mut ready, None))?;
        let ready: Vec<bool> = ready.iter().map(|descriptor| !descriptor.revents().is_empty()).collect();
        for (at, _) in ready.iter().enumerate().rev().filter(|(_, ready)| **ready) {
            if let Some(outcome) = listen(&mut running[at], &mut screen) {
                let pull = running.swap_remove(at);
                let _ =
                    rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(pull.process), WaitOptions::empty()));
                if let Some(error) = &outcome.error {
                    screen.clear();
                    eprintln!("pyxis: failed to import docker image: {}: {error}", outcome.image);
                }
                outcomes[pull.index] = outcome;
            }
        }
    }
    screen.clear();
    if args.json {
        println!("{}", serde_json::to_string(&outcomes)?);
    } else {
        for outcome in &outcomes {
            if let Some(digest) = outcome.digest {
                println!("{} {digest}", outcome.image);
            }
        }
    }
    let failed = outcomes.iter().any(|outcome| outcome.error.is_some());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn reference(typed: &str) -> Result<ImageReference, Error> {
    let mut options = Options::default();
    options.set(OptionId::Image, typed.as_bytes())?;
    match options.image {
        Some(ImageSource::Registry { reference, .. }) => {
            reference.check()?;
            Ok(reference)
        }
        _ => {
            Err(format!("{} is no image of a registry: only those are kept in the store", typed.escape_debug()).into())
        }
    }
}

/// As a login of the user's would have it, as far as it matters to his credentials.
fn environment(user: &User) -> Result<Environment, Error> {
    if user.uid == rustix::process::geteuid().as_raw() {
        return Ok(own_environment());
    }
    let account = nix::unistd::User::from_uid(user.uid.into())?.ok_or("--user: no such user")?;
    let mut environment = Environment::default();
    environment.set("HOME", account.dir.to_string_lossy().as_ref());
    environment.set("USER", account.name.as_str());
    environment.set("PATH", crate::enroot::HOST_PATH);
    Ok(environment)
}

fn own_environment() -> Environment {
    std::env::vars_os().map(|(name, value)| join(name, value)).collect()
}

fn start(
    index: usize,
    typed: &str,
    reference: &ImageReference,
    user: &User,
    environment: &Environment,
    config: &Config,
) -> io::Result<Pull> {
    let (messages, write) = io::pipe()?;
    let parent = rustix::process::getpid();
    // SAFETY: this program has one thread.
    match unsafe { fork(0) }? {
        Forked::Child => {
            drop(messages);
            let mut output = File::from(OwnedFd::from(write));
            let mut send = |message: &Message| {
                if let Ok(mut line) = serde_json::to_vec(message) {
                    line.push(b'\n');
                    // Who does not listen any more has ended, and this process ends with him.
                    let _ = output.write_all(&line);
                }
            };
            let mut outcome = Outcome { image: typed.to_owned(), ..Outcome::default() };
            let prepared = die_with_parent(parent).and_then(|()| set_capabilities(broker::CAPABILITIES));
            let imported = match prepared {
                Ok(()) => import(reference, user, environment, config, &mut outcome, &mut send),
                Err(error) => Err(sys::reason(error)),
            };
            outcome.error = imported.err();
            send(&Message::Done(outcome));
            exit_now(0)
        }
        Forked::Parent(process) => {
            drop(write);
            Ok(Pull { index, process, messages: BufReader::new(File::from(OwnedFd::from(messages))) })
        }
    }
}

/// What a broker does for a step, in a process like one.
fn import(
    reference: &ImageReference,
    user: &User,
    environment: &Environment,
    config: &Config,
    outcome: &mut Outcome,
    send: &mut dyn FnMut(&Message),
) -> Result<(), String> {
    let store = Store::open(&config.store.path).map_err(|error| error.to_string())?;
    let mounts = LayerMounts::open(&config.runtime.path).map_err(|error| error.to_string())?;
    let in_use = InUse::new(&mounts, &config.container.path);
    let mut settings = config.import_settings();
    // Whoever pulls wants what is there now.
    settings.pull = PullPolicy::Always;
    settings.shell = Some(config.proxy.of_shell(&own_environment()));
    let wanted = AcquireRequest { user, reference, environment };
    let image = outcome.image.clone();
    let mut progress = Progress::new(&image, &config.progress);
    let (metrics, mut meter) = (Metrics::open(&config.runtime.path), Meter::default());
    let acquired = acquire(&store, &settings, wanted, &in_use, &[], &mut |event| {
        meter.note(&event);
        if let Some(Update { line, due }) = progress.note(&event) {
            send(&Message::Progress(line, due));
        }
        match event {
            ImportEvent::NetworkStart => send(&Message::Say(format!("importing docker image: {image}"))),
            ImportEvent::Resolved { layers, missing, bytes } => {
                (outcome.layers, outcome.downloaded, outcome.bytes) = (layers, missing, bytes);
                let layers = count(layers, "layer");
                send(&Message::Say(format!("{image}: {layers}, {missing} to download with {}", size(bytes))));
            }
            ImportEvent::Warning(text) | ImportEvent::Crowded(text) => send(&Message::Say(text)),
            _ => {}
        }
    });
    match &acquired {
        Ok(image) => metrics.acquired(image, &meter),
        Err(error) => metrics.not_acquired(error, &meter),
    }
    let acquired = acquired.map_err(|error| error.to_string())?;
    outcome.digest = Some(acquired.manifest);
    send(&Message::Say(format!("imported docker image: {image}")));
    Ok(())
}

/// Hears what there is to hear; the outcome if that is all.
fn listen(pull: &mut Pull, screen: &mut Screen<io::Stderr>) -> Option<Outcome> {
    loop {
        let mut line = String::new();
        let message = match pull.messages.read_line(&mut line) {
            Ok(0) | Err(_) => Message::Done(Outcome {
                error: Some("the process that imports it ended unexpectedly".into()),
                ..Outcome::default()
            }),
            Ok(_) => serde_json::from_str(&line).ok()?,
        };
        match message {
            Message::Say(text) => {
                screen.clear();
                eprintln!("pyxis: {text}");
            }
            Message::Progress(line, due) => screen.show(&Update { line, due }),
            Message::Done(outcome) => return Some(outcome),
        }
        if pull.messages.buffer().is_empty() {
            return None;
        }
    }
}
