//! What the plugin remembers between hooks, within one process.
//!
//! Slurm's processes share nothing of it: `srun`, `slurmd` and each step manager are different programs, and a task, being
//! a fork of its step manager, starts from a copy.

use std::sync::{Mutex, PoisonError, TryLockError};

use super::remote::Step;
use super::{Failed, log};
use crate::options::arguments::{ArgumentError, Arguments};
use crate::options::table::OptionId;
use crate::options::{OptionError, Options};
use crate::task::UserMessage;

/// A hook that must do its work once in a process, although Slurm calls it for each time the plugin is listed.
#[derive(Debug, Clone, Copy)]
pub enum Phase {
    /// `slurm_spank_init`.
    Init,
    /// `slurm_spank_init_post_opt` in a step manager.
    InitPostOpt,
    /// `slurm_spank_user_init`.
    UserInit,
    /// `slurm_spank_task_init_privileged`.
    TaskInitPrivileged,
    /// `slurm_spank_task_init`.
    TaskInit,
}

/// The state of one process.
#[derive(Debug)]
pub struct State {
    entered: u8,
    options: Options,
    options_judged: bool,
    /// What plugstack.conf says.
    pub arguments: Result<Arguments, ArgumentError>,
    failure: Option<String>,
    /// The container of this step, in a step manager and its tasks.
    pub step: Option<Step>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            entered: 0,
            options: Options::default(),
            options_judged: false,
            arguments: Ok(Arguments::default()),
            failure: None,
            step: None,
        }
    }
}

impl State {
    /// Runs `f` on this process's state. Slurm calls one hook at a time; should it ever call one within another, that one
    /// fails instead of waiting for ever.
    pub fn with(f: impl FnOnce(&mut Self) -> Result<(), Failed>) -> Result<(), Failed> {
        static STATE: Mutex<Option<State>> = Mutex::new(None);
        let mut state = match STATE.try_lock() {
            Ok(state) => state,
            // A panic in an earlier hook: what it left is still the best there is.
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
            Err(TryLockError::WouldBlock) => {
                log::say(UserMessage::error("internal error: a hook was called within a hook; please report it"));
                return Err(Failed);
            }
        };
        f(state.get_or_insert_default())
    }

    /// Whether `phase` begins now; `false` if it did before.
    pub fn enter(&mut self, phase: Phase) -> bool {
        let bit = 1 << phase as u8;
        let first = self.entered & bit == 0;
        self.entered |= bit;
        first
    }

    /// See [`Options::note_command_line`].
    pub fn note_command_line<'a>(&mut self, words: impl IntoIterator<Item = &'a [u8]>) {
        self.options.note_command_line(words);
    }

    /// An option arrived.
    pub fn set_option(&mut self, id: OptionId, argument: &[u8]) -> Result<(), OptionError> {
        self.options_judged = false;
        self.options.set(id, argument)
    }

    /// The options so far.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The options, if they have changed since this was asked before.
    pub fn options_to_judge(&mut self) -> Option<Options> {
        (!std::mem::replace(&mut self.options_judged, true)).then(|| self.options.clone())
    }

    /// Makes the tasks of the step fail with this line. The first one counts.
    pub fn fail_later(&mut self, reason: String) {
        self.failure.get_or_insert(reason);
    }

    /// What the tasks have to fail with.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// The process is done with SPANK.
    pub fn end(&mut self) {
        self.step = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_begins_once() {
        let mut state = State::default();
        assert!(state.enter(Phase::Init));
        assert!(!state.enter(Phase::Init));
        assert!(state.enter(Phase::TaskInit));
    }

    #[test]
    fn options_are_judged_again_when_they_change() {
        let mut state = State::default();
        assert!(state.options_to_judge().is_some());
        assert!(state.options_to_judge().is_none());
        state.set_option(OptionId::Image, b"alpine").unwrap();
        assert!(state.options_to_judge().is_some_and(|options| options.enabled()));
        assert!(state.options_to_judge().is_none());
    }

    #[test]
    fn the_first_failure_counts() {
        let mut state = State::default();
        state.fail_later("one".into());
        state.fail_later("two".into());
        assert_eq!(state.failure(), Some("one"));
    }

    #[test]
    fn a_hook_within_a_hook_fails_and_a_panic_is_no_end() {
        assert_eq!(State::with(|_| State::with(|_| Ok(()))), Err(Failed));
        let _ = std::panic::catch_unwind(|| State::with(|_| panic!("boom")));
        assert_eq!(State::with(|_| Ok(())), Ok(()));
    }
}
