//! The submit side: what `srun`, `sbatch` and their like have in common. Everything that can be judged without the node
//! is judged here, so that a mistake costs the user milliseconds and one clear line.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use super::state::State;
use super::{Context, Failed, Item, Spank};
use crate::options::arguments::Arguments;
use crate::options::table::{OptionId, TABLE};
use crate::request::{ImageSource, MAX_MEANING, PullPolicy, TagMeaning};
use crate::sys::command::{Stream, capture_fed, filled_pipe};
use crate::task::UserMessage;

/// Slurm's containers are OCI bundles that a runtime starts instead of the command: there would be nothing to join.
pub(super) const TWO_CONTAINERS: &str =
    "--container-image and Slurm's own --container (SLURM_CONTAINER) exclude each other: give one of them";

/// Tells the batch step that it was asked to run in a container, and in which image: before 23.11 `sbatch --export=NONE`,
/// or a list of names, keeps from the node what stands for the options. Slurm always exports names that begin like this.
pub(super) const REQUESTED: &str = "SLURM_PYXIS_CONTAINER_IMAGE";

/// Options that may come as several arguments, and the variables that carry the whole list to the node, since Slurm
/// relays only the last argument.
pub(super) const MERGED_LISTS: [(OptionId, &str); 4] = [
    (OptionId::Mounts, "SLURM_PYXIS_CONTAINER_MOUNTS"),
    (OptionId::Env, "SLURM_PYXIS_CONTAINER_ENV"),
    (OptionId::Unshare, "SLURM_PYXIS_CONTAINER_UNSHARE"),
    (OptionId::Device, "SLURM_PYXIS_CONTAINER_DEVICE"),
];

/// Carries what the image's tag means, or where nodes agree on it, to the nodes.
pub(super) const MEANING: &str = "SLURM_PYXIS_CONTAINER_MEANING";

/// When asking what the tag means is given up, whatever hangs; the executable itself gives up before, as configured.
const MEANING_TIME: Duration = Duration::from_secs(10);

/// Reads the plugstack arguments.
pub(super) fn parse_arguments(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) -> Result<(), Failed> {
    state.arguments = Arguments::parse(arguments.iter().copied());
    let Err(error) = &state.arguments else { return Ok(()) };
    spank.say(UserMessage::error(error));
    spank.say(UserMessage::error("failed to parse configuration"));
    Err(Failed)
}

/// Remembers the command line and what the job that it runs in has left in the environment, which decide whether two
/// values of an option are a mistake.
pub(super) fn note_sources(state: &mut State, spank: &dyn Spank) {
    let line = std::fs::read("/proc/self/cmdline").unwrap_or_default();
    state.note_command_line(line.split(|&byte| byte == 0).skip(1));
    for option in &TABLE {
        let variable = format!("SLURM_SPANK__SLURM_SPANK_OPTION_pyxis_{}", option.name().replace('-', "_"));
        if let Some(value) = spank.variable(&variable) {
            state.note_inherited(option.id, value);
        }
    }
}

/// Registers all options.
pub(super) fn register(spank: &mut dyn Spank) -> Result<(), Failed> {
    for option in &TABLE {
        if let Err(error) = spank.register(option) {
            spank.say(UserMessage::error(format!("couldn't register option {}: {error}", option.name())));
            spank.say(UserMessage::error("failed to register arguments"));
            return Err(Failed);
        }
    }
    Ok(())
}

/// Whether the step is, or may be, of a heterogeneous job.
pub(super) fn has_components(state: &State, spank: &dyn Spank) -> bool {
    state.has_components() || spank.variable("SLURM_HET_SIZE").is_some()
}

/// Whether nodes could find different images behind a tag: a single one asks by itself.
pub(super) fn has_several_nodes(state: &State, spank: &dyn Spank) -> bool {
    has_components(state, spank) || spank.number(Item::Nodes).is_ok_and(|nodes| nodes > 1)
}

/// What the image's tag means, as the executable finds out with the user's credentials, if it is here and does so soon; else
/// where the nodes agree on it: at a process that the executable leaves beside `srun`.
pub(super) fn meaning_of_tag(state: &State, spank: &dyn Spank) -> Option<String> {
    let arguments = state.arguments.as_ref().ok().filter(|arguments| arguments.importer.is_none())?;
    let options = state.options().clone().with_environment(|name| spank.variable(name)).ok()?;
    let Some(ImageSource::Registry { typed, reference }) = &options.image else { return None };
    if reference.digest().is_some() || matches!(options.pull, Some(PullPolicy::Missing | PullPolicy::Never)) {
        return None;
    }
    let mut command = Command::new(&arguments.executable);
    // Components get their nodes later.
    let nodes = if has_components(state, spank) { 0 } else { spank.number(Item::Nodes).unwrap_or(0) };
    command.arg0(crate::cli::MEANING).arg(&arguments.config).arg(nodes.to_string());
    command.args(options.pull.map(PullPolicy::name));
    // Not an argument, because there may be a password in it.
    let input = filled_pipe(typed.as_bytes()).ok()?;
    let answer = capture_fed(&mut command, input.into(), Stream::Output, MAX_MEANING, MEANING_TIME).ok()?;
    let text = String::from_utf8(answer.text).ok()?;
    let line = text.trim_end();
    let good = answer.status?.success() && TagMeaning::parse(line).is_some() && !line.contains(char::is_control);
    good.then(|| line.to_owned())
}

/// Judges the options together with the environment. `slurm_container` is the variable that stands for Slurm's own
/// `--container` in this command, if there is one.
pub(super) fn judge_options(
    state: &mut State,
    spank: &mut dyn Spank,
    slurm_container: Option<&str>,
) -> Result<(), Failed> {
    let Some(options) = state.options_to_judge() else { return Ok(()) };
    if let Some(conflict) = state.conflict() {
        spank.say(UserMessage::error(conflict));
        return Err(Failed);
    }
    // What a step is given replaces what its job was given; what sbatch is given completes what the script says.
    let command_line_only = spank.context() == Context::Local;
    for (id, variable) in MERGED_LISTS {
        let merged = options.merged_list(id, command_line_only).unwrap_or_default();
        if merged.is_empty() && spank.variable(variable).is_none() {
            continue;
        }
        spank.set_variable(variable.as_bytes(), merged.as_bytes()).map_err(|error| {
            spank.say(UserMessage::error(format!("couldn't set environment variable {variable}: {error}")));
            Failed
        })?;
    }
    let options = options.with_environment(|name| spank.variable(name)).map_err(|error| {
        spank.say(UserMessage::error(error));
        Failed
    })?;
    for option in options.without_container() {
        spank.say(UserMessage::error(format!(
            "ignoring {option} because neither --container-image nor --container-name is set"
        )));
    }
    if !options.enabled() {
        return Ok(());
    }
    if slurm_container.and_then(|name| spank.variable(name)).is_some_and(|value| !value.is_empty()) {
        spank.say(UserMessage::error(TWO_CONTAINERS));
        return Err(Failed);
    }
    Ok(())
}
