//! Local context: `srun`.

use super::state::State;
use super::{Failed, Spank, submit};

/// `slurm_spank_init`.
pub fn init(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    submit::parse_arguments(state, spank, arguments)?;
    submit::note_sources(state, spank);
    submit::register(spank)
}

/// `slurm_spank_init_post_opt`.
pub fn init_post_opt(state: &mut State, spank: &mut dyn Spank) -> Result<(), Failed> {
    submit::judge_options(state, spank, Some("SLURM_CONTAINER"))
}
