//! What a container sees of `/sys/fs/cgroup` (behaviour reference, section 17, `10-cgroups`): its step's own subtree,
//! read-only, where programs look for their limits.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::Pid;

use crate::sys::mount::{Attributes, attach, attach_changed, clone_tree, set_attributes};

const CGROUPS: &str = "/sys/fs/cgroup";

/// Where a hierarchy is mounted, and which directory of it to show there.
#[derive(Debug, PartialEq, Eq)]
struct View {
    mount_point: PathBuf,
    directory: PathBuf,
}

/// Shows the subtree of `task`, a process of the step, over each hierarchy. Runs in the container's namespaces, after
/// pivot_root. Hierarchies that are not there are left alone: not every host mounts all of them.
pub fn show_own_subtree(task: i32, inside_slurm_step: bool) {
    let Ok(membership) = std::fs::read_to_string(format!("/proc/{task}/cgroup")) else { return };
    let unified_only = is_unified(Path::new(CGROUPS));
    for view in views(&membership, inside_slurm_step, unified_only) {
        // A hierarchy that cannot be narrowed stays as the host shows it to every user.
        let _ = narrow(&view);
    }
    if !unified_only {
        let _ = make_read_only(Path::new(CGROUPS));
    }
}

/// Moves process `pid` to the cgroups of `task`. Takes some milliseconds: for an import, not for a start.
pub fn join(pid: u32, task: Pid) -> io::Result<()> {
    let membership = std::fs::read_to_string(format!("/proc/{}/cgroup", task.as_raw_nonzero()))?;
    let own = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let unified_only = is_unified(Path::new(CGROUPS));
    let current = views(&own, false, unified_only);
    for view in views(&membership, false, unified_only).iter().filter(|view| !current.contains(view)) {
        // Some hierarchies of version 1 are only named, or refuse what the others accept.
        if view.directory.is_dir() {
            std::fs::write(view.directory.join("cgroup.procs"), pid.to_string())?;
        }
    }
    Ok(())
}

fn narrow(view: &View) -> Result<(), Errno> {
    if view.directory.components().eq(view.mount_point.components()) {
        return make_read_only(&view.mount_point);
    }
    let tree = clone_tree(CWD.as_fd(), &view.directory, true)?;
    let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let target = rustix::fs::open(&view.mount_point, flags, Mode::empty())?;
    let tree = tree.as_fd();
    attach_changed(tree, || set_attributes(tree, &attributes), || attach(tree, target.as_fd()))
}

fn make_read_only(mount_point: &Path) -> Result<(), Errno> {
    let mount = rustix::fs::open(mount_point, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let attributes = Attributes { set: libc::MOUNT_ATTR_RDONLY, ..Attributes::default() };
    set_attributes(mount.as_fd(), &attributes)
}

fn is_unified(path: &Path) -> bool {
    rustix::fs::statfs(path).is_ok_and(|status| status.f_type == libc::CGROUP2_SUPER_MAGIC)
}

/// From the lines of `/proc/PID/cgroup` (cgroups(7)): `ID:CONTROLLERS:PATH`, no controllers for version 2.
fn views(membership: &str, inside_slurm_step: bool, unified_only: bool) -> Vec<View> {
    let base = Path::new(CGROUPS);
    membership
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, Path::new(fields.next()?));
            let mount_point = match controllers {
                "" if unified_only => base.to_owned(),
                "" => base.join("unified"),
                _ if unified_only => return None,
                named => base.join(named.strip_prefix("name=").unwrap_or(named)),
            };
            // The step rather than the task: the tasks of a step share the container.
            let path = if inside_slurm_step { path.parent().unwrap_or(path) } else { path };
            let directory = mount_point.join(path.strip_prefix("/").ok()?);
            (!path.components().any(|part| part == std::path::Component::ParentDir))
                .then_some(View { mount_point, directory })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(mount_point: &str, directory: &str) -> View {
        View { mount_point: mount_point.into(), directory: directory.into() }
    }

    #[test]
    fn version_1_and_2() {
        let v1 = "4:memory:/slurm/uid_1/job_2/step_0/task_0\n1:name=systemd:/\n0::/\n";
        assert_eq!(
            views(v1, true, false),
            [
                view("/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/slurm/uid_1/job_2/step_0"),
                view("/sys/fs/cgroup/systemd", "/sys/fs/cgroup/systemd/"),
                view("/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified/"),
            ]
        );
        let v2 = "0::/system.slice/slurmstepd.scope/job_2/step_0/user/task_0\n";
        assert_eq!(
            views(v2, true, true),
            [view("/sys/fs/cgroup", "/sys/fs/cgroup/system.slice/slurmstepd.scope/job_2/step_0/user")]
        );
        assert_eq!(views("0::/../x\nnonsense\n", false, true), []);
    }
}
