//! What the tag of an image means, for all nodes of a step: asked once by `srun`, as the user, before the step is launched.
//!
//! `srun` waits for it, so it takes no more than a moment: what was learned, or could not be learned, a short time ago is in
//! `~/.cache/pyxis/tags`, one file for an image. Where that is not known soon, it says where the nodes agree on it instead
//! ([`rendezvous`](super::rendezvous)).

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirBuilder};
use std::io::{self, Read, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};

use super::enroot::{Context, is_a_no};
use super::rendezvous;
use crate::broker::import::{is_fresh, without_password};
use crate::image::reference::ImageReference;
use crate::options::Options;
use crate::options::table::OptionId;
use crate::registry::{resolve, sha256};
use crate::request::{ImageSource, Meaning, PullPolicy};
use crate::store::now;
use crate::sys::process::exit_now;

/// Longest image name that is read.
const MAX_NAME: u64 = 16 << 10;
/// How often another process is looked at that asks already.
const PAUSE: Duration = Duration::from_millis(20);
/// Most time that is spent, whatever is configured: the plugin gives up soon afterwards.
const MOST_TIME: Duration = Duration::from_secs(8);

/// Whether the answer has been given, or is given by another thread.
static ANSWERED: AtomicBool = AtomicBool::new(false);

type Error = Box<dyn std::error::Error>;

/// A file of the cache.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    /// Seconds since 1970, before the registry was asked.
    asked_at: u64,
    /// `None` before it has answered.
    meaning: Option<Meaning>,
}

/// What was found out.
enum Found {
    Known(Meaning),
    /// It is not asked for.
    NotAsked,
    /// It is, but not answered.
    Unknown,
}

/// The role: the configuration's path, the number of the step's nodes (0: that is not known, and when it starts neither) and,
/// if the user has said so, when to ask are its arguments, the image's name is its input, a [`Meaning`] or the place where
/// nodes agree on it its output.
pub fn main(mut arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let config = arguments.next().map(PathBuf::from).unwrap_or_default();
    let nodes = arguments.next().unwrap_or_default();
    let policy = arguments.next().and_then(|name| PullPolicy::of(name.to_str()?));
    // What fails here may work on the nodes.
    let found = find(&config, &nodes, policy).unwrap_or(Found::Unknown);
    if ANSWERED.swap(true, Ordering::SeqCst) {
        loop {
            std::thread::park();
        }
    }
    match found {
        Found::Known(meaning) => {
            // Nobody is there to be told that nobody listens.
            let _ = writeln!(io::stdout(), "{meaning}");
            ExitCode::SUCCESS
        }
        Found::NotAsked => ExitCode::FAILURE,
        Found::Unknown => rendezvous::become_one(&nodes),
    }
}

fn find(config: &Path, nodes: &OsStr, policy: Option<PullPolicy>) -> Result<Found, Error> {
    let mut typed = String::new();
    io::stdin().take(MAX_NAME).read_to_string(&mut typed)?;
    let mut options = Options::default();
    let image = options.set(OptionId::Image, typed.as_bytes()).ok().and(options.image);
    let reference = match image {
        Some(ImageSource::Registry { reference, .. }) if reference.digest().is_none() => reference,
        _ => return Ok(Found::NotAsked),
    };
    let mut context = Context::load(config)?;
    let (network, store) = (&mut context.config.network, &context.config.store);
    let policy = policy.unwrap_or(store.pull);
    let asks = matches!(policy, PullPolicy::Always | PullPolicy::Recent);
    if !asks {
        return Ok(Found::NotAsked);
    }
    if network.submit_timeout == 0 || nodes == "0" {
        return Ok(Found::Unknown);
    }
    let time = Duration::from_secs(network.submit_timeout.into()).min(MOST_TIME);
    network.attempts = 1;
    let confirmation = Duration::from_secs(store.confirmation_seconds.into());
    // Without a place to remember that a registry cannot be reached, every step would wait for it.
    let cache = Cache::open(&context, &reference)?;
    let deadline = SystemTime::now() + time;
    // Whatever hangs: a registry, a helper, a file system.
    let nodes = nodes.to_owned();
    std::thread::Builder::new().name("deadline".into()).spawn(move || {
        std::thread::sleep(time);
        if !ANSWERED.swap(true, Ordering::SeqCst) {
            rendezvous::become_one(&nodes);
            exit_now(1);
        }
    })?;
    while let Some(Entry { asked_at, meaning }) = cache.read().filter(|entry| is_fresh(entry.asked_at, confirmation)) {
        match meaning {
            Some(_) if policy == PullPolicy::Always => break,
            Some(meaning) => return Ok(Found::Known(meaning)),
            // Another step's srun asks now, or has not got an answer in time.
            None if is_fresh(asked_at, time) && SystemTime::now() < deadline => std::thread::sleep(PAUSE),
            None => return Ok(Found::Unknown),
        }
    }
    let asked_at = now();
    cache.write(&Entry { asked_at, meaning: None })?;
    let asking = context.asking(&reference)?;
    match context.ask(&asking, &reference, resolve::digest) {
        Ok((found, digest)) => {
            let meaning = Meaning { asked_at, digest, name: found.to_string() };
            cache.write(&Entry { asked_at, meaning: Some(meaning.clone()) })?;
            Ok(Found::Known(meaning))
        }
        Err(error) => {
            // It answers at once: there is no harm in asking again.
            if is_a_no(&error) {
                cache.forget();
            }
            Err(error)
        }
    }
}

/// What is known of one image.
struct Cache {
    directory: PathBuf,
    file: PathBuf,
}

impl Cache {
    fn open(context: &Context, reference: &ImageReference) -> io::Result<Self> {
        let home = context.environment.get_str("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute());
        let directory = home.unwrap_or_else(|| context.home().join(".cache")).join("pyxis/tags");
        DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
        // Another user's credentials may find another image, another configuration as well.
        let reference = without_password(reference);
        let name =
            format!("{} {reference} {:?}", reference.user.as_deref().unwrap_or_default(), context.config.registry);
        let file = directory.join(sha256(name.as_bytes()).hex());
        Ok(Self { directory, file })
    }

    fn read(&self) -> Option<Entry> {
        serde_json::from_slice(&fs::read(&self.file).ok()?).ok()
    }

    fn write(&self, entry: &Entry) -> io::Result<()> {
        let new = self.directory.join(format!(".{}", std::process::id()));
        fs::write(&new, serde_json::to_vec(entry)?)?;
        fs::rename(new, &self.file)?;
        self.prune(entry);
        Ok(())
    }

    fn forget(&self) {
        let _ = fs::remove_file(&self.file);
    }

    /// Removes what nobody has asked for since yesterday.
    fn prune(&self, entry: &Entry) {
        if entry.meaning.is_none() {
            return;
        }
        let yesterday = SystemTime::now() - Duration::from_secs(24 * 60 * 60);
        for file in fs::read_dir(&self.directory).into_iter().flatten().flatten() {
            if file.metadata().and_then(|metadata| metadata.modified()).is_ok_and(|modified| modified < yesterday) {
                let _ = fs::remove_file(file.path());
            }
        }
    }
}
