//! Allocator context: `sbatch`, `salloc`, `scrontab`, `scrun`.

use super::state::State;
use super::{Failed, Spank, submit};
use crate::task::UserMessage;

/// `slurm_spank_init`.
pub fn init(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    submit::parse_arguments(state, spank, arguments)?;
    if state.arguments.as_ref().is_ok_and(|arguments| arguments.sbatch_support) {
        submit::note_sources(state, spank);
        submit::register(spank)?;
    }
    Ok(())
}

/// `slurm_spank_init_post_opt`.
pub fn init_post_opt(state: &mut State, spank: &mut dyn Spank) -> Result<(), Failed> {
    // No variable tells about Slurm's own --container: each of these commands has another one.
    submit::judge_options(state, spank, None)?;
    // Also where there is none, if this is the batch script of a job that had one.
    let image = match state.options().image_text() {
        Some(image) => image.to_owned(),
        None if spank.variable(submit::REQUESTED).is_some() => String::new(),
        None => return Ok(()),
    };
    spank.set_variable(submit::REQUESTED.as_bytes(), image.as_bytes()).map_err(|error| {
        spank.say(UserMessage::error(format!("couldn't set environment variable {}: {error}", submit::REQUESTED)));
        Failed
    })
}
