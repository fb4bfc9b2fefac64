//! Slurmd context: the daemon itself, at its start. It keeps nothing: every step manager reads plugstack.conf anew.

use super::{Spank, version};
use crate::options::arguments::Arguments;
use crate::task::UserMessage;

/// `slurm_spank_init`. Never fails: slurmd would not start.
pub fn init(spank: &mut dyn Spank, arguments: &[&str]) {
    spank.say(UserMessage::Log(format!("pyxis: version v{}", env!("CARGO_PKG_VERSION"))));
    if let Some(warning) = version::warning() {
        spank.say(UserMessage::Log(warning));
    }
    match Arguments::parse(arguments.iter().copied()) {
        Ok(arguments) if arguments.without_effect.is_empty() => {}
        Ok(arguments) => spank.say(UserMessage::Log(format!(
            "pyxis: these arguments in plugstack.conf have no effect here: {}",
            arguments.without_effect.join(", ")
        ))),
        Err(error) => spank.say(UserMessage::error(format!(
            "{error}: correct plugstack.conf, until then every step that asks for a container fails"
        ))),
    }
}
