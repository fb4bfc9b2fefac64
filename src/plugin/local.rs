//! Local context: `srun`.

use super::state::State;
use super::{Failed, Spank, submit};

/// `slurm_spank_init`.
pub fn init(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    submit::parse_arguments(state, spank, arguments)?;
    submit::note_sources(state, spank);
    submit::register(spank)
}

/// `slurm_spank_init_post_opt`, once for each component of a heterogeneous step.
pub fn init_post_opt(state: &mut State, spank: &mut dyn Spank) -> Result<(), Failed> {
    submit::judge_options(state, spank, Some("SLURM_CONTAINER"))?;
    // What is set later only one of the components gets.
    if submit::has_components(state, spank) {
        tell_nodes(state, spank);
    }
    Ok(())
}

/// `slurm_spank_local_user_init`, when the step's nodes are known.
pub fn user_init(state: &mut State, spank: &mut dyn Spank) {
    if !submit::has_components(state, spank) {
        tell_nodes(state, spank);
    }
}

/// Tells the nodes what the image's tag means, or where to agree on it. Never fails: each of them can ask as well.
fn tell_nodes(state: &mut State, spank: &mut dyn Spank) {
    let inherited = spank.variable(submit::MEANING).is_some();
    let meaning = match state.meaning() {
        Some(known) => known.to_owned(),
        None if submit::has_several_nodes(state, spank) => submit::meaning_of_tag(state, spank)
            .inspect(|meaning| state.set_meaning(meaning.clone()))
            .unwrap_or_default(),
        None => String::new(),
    };
    // What another step's srun has left is not about this one.
    if inherited || !meaning.is_empty() {
        // Each node asks if this does not work.
        let _ = spank.set_variable(submit::MEANING.as_bytes(), meaning.as_bytes());
    }
}
