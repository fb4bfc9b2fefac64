//! Containers that enroot, or `pyxis create`, has made: unpacked trees in a directory of the user's (`ENROOT_DATA_PATH`).
//! One called `pyxis_NAME` is the container NAME, as it was for pyxis.
//!
//! Where that directory is depends on the user's environment, and what is in it is his: a process that has become the
//! user looks for it. Nothing but the path comes back, and only container init, as the user, opens it.

use std::ffi::OsStr;
use std::io;
use std::path::PathBuf;

use crate::config::Config;
use crate::container::FullName;
use crate::enroot::conf::{EnrootConf, Identity, of_job};
use crate::request::{Environment, StepRequest};
use crate::rootfs::identity::HostUser;
use crate::sys::channel;
use crate::sys::process::run_as;
use crate::unpacked::Containers;

/// The tree of the container `name`, if there is one. A configuration that cannot be read has none: container init says
/// what is wrong with it.
pub(super) fn find(
    config: &Config,
    request: &StepRequest,
    environment: &Environment,
    name: &FullName,
) -> io::Result<Option<PathBuf>> {
    let host = HostUser::look_up(&request.user, environment);
    let (ours, theirs) = channel::pair::<(), Option<PathBuf>>()?;
    let search = move || theirs.send(&look(config, request, environment, &host, name), &[]).is_ok();
    // SAFETY: the broker has one thread.
    unsafe { run_as(&request.user, search) }?;
    Ok(ours.receive()?.and_then(|(found, _)| found))
}

fn look(
    config: &Config,
    request: &StepRequest,
    environment: &Environment,
    host: &HostUser,
    name: &FullName,
) -> Option<PathBuf> {
    let identity = Identity {
        uid: request.user.uid,
        gid: request.user.gid,
        name: host.name.clone(),
        group: host.group.clone(),
        home: host.home.clone(),
        cwd: request.cwd.clone(),
    };
    let conf = EnrootConf::load(&config.enroot.sysconf_path, &of_job(environment), &identity).ok()?;
    Containers::new(conf.data_path()).find(OsStr::new(name.as_str())).ok().filter(|path| path.is_absolute())
}
