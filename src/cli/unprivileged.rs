//! What is done without root's privileges although root typed the command: talking to registries, and reading images.
//!
//! It is done in a process of its own, under the account for imports if we are root, else as who we are.

use std::io::{self, Read, Write};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::request::User;
use crate::sys::process::{Forked, become_user, exit_now, fork};

/// Most bytes of a result.
const MAX_RESULT: u64 = 64 << 20;

/// The account for imports, if there is one of that name or number.
pub fn account(name: &str) -> Option<User> {
    let found = match name.parse::<u32>() {
        Ok(uid) => nix::unistd::User::from_uid(uid.into()),
        Err(_) => nix::unistd::User::from_name(name),
    };
    let account = found.ok().flatten()?;
    Some(User { uid: account.uid.as_raw(), gid: account.gid.as_raw(), groups: vec![] })
}

/// What `work` returns. As `nobody` instead of root if there is no `account`.
pub fn run<T: Serialize + DeserializeOwned>(account: Option<&User>, work: impl FnOnce() -> T) -> io::Result<T> {
    run_beside(account, work, || ())
}

/// The same, while this process does `beside`, which has to end when that process does.
pub fn run_beside<T: Serialize + DeserializeOwned>(
    account: Option<&User>,
    work: impl FnOnce() -> T,
    beside: impl FnOnce(),
) -> io::Result<T> {
    let nobody = User { uid: 65534, gid: 65534, groups: vec![] };
    let (result, mut report) = io::pipe()?;
    // SAFETY: this program has one thread: what starts some does so in children like this one.
    match unsafe { fork(0) }? {
        Forked::Child => {
            drop(result);
            let identity = match rustix::process::geteuid().is_root() {
                true => become_user(account.unwrap_or(&nobody)),
                false => Ok(()),
            };
            let told = identity.and_then(|()| report.write_all(&serde_json::to_vec(&work())?));
            exit_now(i32::from(told.is_err()))
        }
        Forked::Parent(child) => {
            drop(report);
            beside();
            let mut bytes = Vec::new();
            result.take(MAX_RESULT).read_to_end(&mut bytes)?;
            let _ = rustix::io::retry_on_intr(|| {
                rustix::process::waitpid(Some(child), rustix::process::WaitOptions::empty())
            });
            match bytes.is_empty() {
                true => Err(io::Error::other("the process that was to do it ended unexpectedly")),
                false => Ok(serde_json::from_slice(&bytes)?),
            }
        }
    }
}
