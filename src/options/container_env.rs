//! `--container-env`: `NAME[=VALUE][,…]`.
//!
//! `NAME` is pyxis's: the host's value wins over the image's. `NAME=VALUE` sets the variable in the container. There is
//! no escaping, so a value cannot hold a comma; export the variable and name it instead.

use super::OptionError;
use super::table::OptionId;
use crate::request::ContainerEnv;

/// Adds the items of `text` to `list`. Of several items for one name the last counts.
pub(super) fn parse_into(list: &mut Vec<ContainerEnv>, text: &str) -> Result<(), OptionError> {
    for item in text.split(',') {
        let (name, value) = match item.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (item, None),
        };
        if name.is_empty() {
            return Err(OptionError::Format(OptionId::Env.name(), text.to_owned()));
        }
        let entry = match value {
            Some(value) => ContainerEnv::Set(name.to_owned(), value.to_owned()),
            None => ContainerEnv::FromHost(name.to_owned()),
        };
        match list.iter_mut().find(|other| name_of(other) == name) {
            Some(other) => *other = entry,
            None => list.push(entry),
        }
    }
    Ok(())
}

fn name_of(item: &ContainerEnv) -> &str {
    match item {
        ContainerEnv::FromHost(name) | ContainerEnv::Set(name, _) => name,
    }
}
