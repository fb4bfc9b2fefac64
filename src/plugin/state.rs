//! What the plugin remembers between hooks, within one process.
//!
//! Slurm's processes share nothing of it: `srun`, `slurmd` and each step manager are different programs, and a task, being
//! a fork of its step manager, starts from a copy.

use std::collections::VecDeque;
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

/// Options that are good, but not together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// Slurm knows one set of a plugin's options, for all components of a heterogeneous job or step.
    #[error(
        "Slurm gives all components of a heterogeneous job the same container options, and these differ: \
         start each component by an srun of its own (--het-group)"
    )]
    Components,
    /// A job that is submitted from within a job: for Slurm the environment overrides the script.
    #[error(
        "--{0} specified multiple times: in the batch script and, inherited by the job that this command runs in, \
         in the environment; give it on the command line of sbatch"
    )]
    ScriptAndJob(&'static str),
}

/// The state of one process.
#[derive(Debug)]
pub struct State {
    entered: u8,
    options: Options,
    /// What was judged last, unless an option has come since.
    judged: bool,
    /// What the component before this one of a heterogeneous job asked for, if it asked for anything.
    earlier: Option<Options>,
    /// The command lines of the components that follow this one.
    following: VecDeque<Vec<Vec<u8>>>,
    /// What the environment of the command says to which option: the job's that it runs in.
    inherited: Vec<(OptionId, Vec<u8>)>,
    /// Why the options, each of them good, cannot be used together.
    conflict: Option<Conflict>,
    /// What plugstack.conf says.
    pub arguments: Result<Arguments, ArgumentError>,
    failure: Option<String>,
    /// What `srun` tells the nodes about the image's tag.
    meaning: Option<String>,
    /// How many components the step has, by the command line.
    components: usize,
    /// The container of this step, in a step manager and its tasks.
    pub step: Option<Step>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            entered: 0,
            options: Options::default(),
            judged: false,
            earlier: None,
            following: VecDeque::new(),
            inherited: Vec::new(),
            conflict: None,
            arguments: Ok(Arguments::default()),
            failure: None,
            meaning: None,
            components: 1,
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

    /// See [`Options::note_command_line`]. A colon alone separates the components of a heterogeneous job.
    pub fn note_command_line<'a>(&mut self, words: impl IntoIterator<Item = &'a [u8]>) {
        let words: Vec<_> = words.into_iter().map(<[u8]>::to_vec).collect();
        self.following = words.split(|word| word == b":").map(<[_]>::to_vec).collect();
        self.components = self.following.len();
        self.next_command_line();
    }

    fn next_command_line(&mut self) {
        let words = self.following.pop_front().unwrap_or_default();
        self.options.note_command_line(words.iter().map(Vec::as_slice));
    }

    /// An option arrived.
    pub fn set_option(&mut self, id: OptionId, argument: &[u8]) -> Result<(), OptionError> {
        // Commands go on after their options were judged for one reason: another component. Slurm keeps what it has seen.
        if std::mem::take(&mut self.judged) {
            self.earlier = Some(self.options.clone()).filter(Options::any);
            self.next_command_line();
        }
        let overrides_script = self.options.was_given_by_script(id)
            && self.inherited.iter().any(|(inherited, value)| *inherited == id && value == argument);
        let before = overrides_script.then(|| self.options.clone());
        self.options.set(id, argument)?;
        // Slurm may call again with what it has kept, so that at the end nothing is to be seen of it.
        let conflict = match (&self.earlier, before) {
            (Some(earlier), _) if !earlier.asks_the_same_as(&self.options) => Conflict::Components,
            (_, Some(before)) if !before.asks_the_same_as(&self.options) => Conflict::ScriptAndJob(id.name()),
            _ => return Ok(()),
        };
        self.conflict.get_or_insert(conflict);
        Ok(())
    }

    /// Takes note of what the environment says to an option.
    pub fn note_inherited(&mut self, id: OptionId, value: Vec<u8>) {
        self.inherited.push((id, value));
    }

    /// Whether the command line has several components, which start one after the other.
    pub fn has_components(&self) -> bool {
        self.components > 1
    }

    /// What the nodes are told about the image's tag.
    pub fn meaning(&self) -> Option<&str> {
        self.meaning.as_deref()
    }

    /// Takes note of it.
    pub fn set_meaning(&mut self, meaning: String) {
        self.meaning = Some(meaning);
    }

    /// Why the options cannot be used.
    pub fn conflict(&self) -> Option<&Conflict> {
        self.conflict.as_ref()
    }

    /// The options so far.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The options, if they have changed since this was asked before.
    pub fn options_to_judge(&mut self) -> Option<Options> {
        (!std::mem::replace(&mut self.judged, true)).then(|| self.options.clone())
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
