//! What MPI programs share with the PMIx server of their step (`devices::pmix`), done.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

use super::Start;
use crate::devices::pmix::Pmix;
use crate::devices::slurm_config;
use crate::mounts::apply::apply;
use crate::mounts::rootdir::RootDir;
use crate::request::Environment;
use crate::task::UserMessage;

/// Mounts what PMIx clients need, and gives the variables for them. Not every task of a step that could use MPI does:
/// what is missing is said, and no reason to fail.
pub fn share(
    start: &Start<'_>,
    root: RootDir<'_>,
    task: &Environment,
    say: &mut dyn FnMut(UserMessage),
) -> Vec<(&'static str, Vec<u8>)> {
    let step = start.request.step.as_ref().map(|facts| (facts.job_id, facts.step_id));
    let pmix = Pmix::plan(task, start.request.user.uid, step, &read_config);
    let cwd = &start.request.cwd;
    if let Some(entry) = &pmix.server
        && let Err(error) = apply(root, cwd, entry)
    {
        let text = format!("pyxis: MPI programs may not start in this container: PMIx: {error}");
        // Of a server that is another step's, the user knows nothing.
        say(if pmix.own_server { UserMessage::Notice(text) } else { UserMessage::Log(text) });
    }
    for entry in pmix.client.iter().filter(|entry| Path::new(&entry.source).is_dir()) {
        if let Err(error) = apply(root, cwd, entry) {
            say(UserMessage::Log(format!("pyxis: PMIx: {error}")));
        }
    }
    pmix.environment
}

/// A configuration file, read as the user; `None` if there is none.
fn read_config(path: &Path) -> Option<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty()).ok()?);
    let mut text = String::new();
    file.take(slurm_config::MAX_FILE).read_to_string(&mut text).ok()?;
    Some(text)
}
