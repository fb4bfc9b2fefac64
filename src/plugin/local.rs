//! Local context: `srun`.

use super::state::State;
use super::{Failed, Spank, submit};

/// `slurm_spank_init`.
pub fn init(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    submit::parse_arguments(state, spank, arguments)?;
    submit::note_sources(state, spank);
    submit::register(spank)
}

/// `slurm_spank_local_user_init`, once for each component of a heterogeneous step. Never fails: each node can ask as well.
pub fn user_init(state: &mut State, spank: &mut dyn Spank) {
    let inherited = spank.variable(submit::MEANING).is_some();
    let meaning = match state.meaning() {
        Some(known) => known.to_owned(),
        None if submit::has_several_nodes(state, spank) => {
            let meaning = submit::meaning_of_tag(state, spank).unwrap_or_default();
            state.set_meaning(meaning.clone());
            meaning
        }
        None => String::new(),
    };
    // What another step's srun has left is not about this one.
    if inherited || !meaning.is_empty() {
        // Each node asks if this does not work.
        let _ = spank.set_variable(submit::MEANING.as_bytes(), meaning.as_bytes());
    }
}

/// `slurm_spank_init_post_opt`.
pub fn init_post_opt(state: &mut State, spank: &mut dyn Spank) -> Result<(), Failed> {
    submit::judge_options(state, spank, Some("SLURM_CONTAINER"))
}
