//! Devices appear in a container: planned and done by `devices`, for a container of a step's.

#![forbid(unsafe_code)]

use rustix::fs::Access;

use super::{InitError, Start};
use crate::devices::apply::{Future, Place, apply};
use crate::devices::plan::{Inputs, plan};
use crate::devices::root::RootTraits;
use crate::hooks::workspace::Workspace;
use crate::mounts::rootdir::RootDir;
use crate::request::Environment;
use crate::task::UserMessage;

/// What is left to do when the mounts are done.
#[derive(Debug, Default)]
pub struct Appeared {
    /// For the container's environment.
    pub variables: Vec<(String, String)>,
    /// For the node's log.
    pub log: Vec<String>,
}

/// Plans the devices of the container below `root`, and lets them appear. `host` is the environment of what runs on the host
/// for the container, `container` the container's own.
pub fn appear(
    start: &Start<'_>,
    root: RootDir<'_>,
    private_dev: bool,
    (host, container): (&Environment, &Environment),
    say: &mut dyn FnMut(UserMessage),
) -> Result<Appeared, InitError> {
    let traits = RootTraits::of(root);
    let inputs = Inputs {
        request: start.request,
        host,
        container,
        may_use: &|path| rustix::fs::access(path, Access::READ_OK | Access::WRITE_OK).is_ok(),
        private_dev,
        settings: start.devices,
        root: &traits,
    };
    let edits = plan(&inputs).map_err(|error| InitError::Other(error.to_string()))?;
    for notice in edits.notices.iter().cloned().chain(missing_groups(start, &edits.additional_gids)) {
        say(UserMessage::Notice(format!("pyxis: {notice}")));
    }
    let request = start.request;
    let place = Place {
        root,
        traits: &traits,
        future: match (&request.name, &request.save) {
            (None, None) if !start.image_config.is_empty() => Future::Gone,
            (None, Some(_)) => Future::Saved,
            _ => Future::Kept { shared: start.root_is_shared },
        },
        cwd: &request.cwd,
        workshop: &Workspace::mount_point(start.runtime),
    };
    apply(&place, &edits, say).map_err(|error| InitError::Other(error.to_string()))?;
    Ok(Appeared { variables: edits.env, log: edits.log })
}

/// In a user namespace of his own nobody gets groups that he has not.
fn missing_groups(start: &Start<'_>, wanted: &[u32]) -> Option<String> {
    let user = &start.request.user;
    let missing = wanted.iter().filter(|&&gid| gid != user.gid && !user.groups.contains(&gid) && user.uid != 0);
    let mut missing: Vec<String> = missing.map(u32::to_string).collect();
    missing.dedup();
    (!missing.is_empty())
        .then(|| format!("devices of this container are for members of the groups {} only", missing.join(", ")))
}
