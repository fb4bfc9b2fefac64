//! Slurm's own configuration files, as far as containers depend on them (slurm.conf(5)). Read as the user.

#![forbid(unsafe_code)]

use std::path::Path;

use crate::request::Environment;

/// Most bytes of a file.
pub const MAX_FILE: u64 = 4 << 20;

/// The path of slurm.conf for a task with the environment `task`.
pub fn path(task: &Environment) -> &Path {
    Path::new(task.get_str("SLURM_CONF").unwrap_or("/etc/slurm/slurm.conf"))
}

/// The value of `key` in the text of a configuration file: the last one counts.
pub fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let assignments = text.lines().filter_map(|line| line.split('#').next()?.split_once('='));
    let mut values = assignments.filter(|(name, _)| name.trim().eq_ignore_ascii_case(key));
    values.next_back().map(|(_, value)| value.trim())
}
