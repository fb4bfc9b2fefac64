//! Which of the host's devices a process may open. The device cgroup of a job is seen this way by access(2), in both versions
//! of cgroups, without waking a device; by a process that is in it, which container init is not.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::Path;

use rustix::fs::Access;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

/// Where Slurm's generic resources have their nodes: directory, what must be in it for a closer look, what their names begin
/// with.
const PLACES: [(&str, &str, &str); 4] = [
    ("", "nvidiactl", "nvidia"),
    ("nvidia-caps", "", "nvidia-cap"),
    ("dri", "", "renderD"),
    ("infiniband", "", "uverbs"),
];
/// More device nodes than any machine has.
const MAX_NODES: usize = 4096;

/// The device nodes that a device cgroup refuses.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceAccess {
    /// Their paths below `/dev`.
    refused: BTreeSet<String>,
}

impl DeviceAccess {
    /// Asks for the calling process. On a machine without such devices this is a few system calls.
    pub fn of_this_process() -> Self {
        Self::below(Path::new("/dev"), &|node| {
            // EACCES is what the permissions of the node say, to everybody. They come first, and nobody may write to nodes
            // of parts of GPUs: to ask for more than reading would hide what the cgroup says.
            rustix::fs::access(node, Access::READ_OK) == Err(Errno::PERM)
        })
    }

    fn below(dev: &Path, is_refused: &dyn Fn(&Path) -> bool) -> Self {
        let mut refused = BTreeSet::new();
        for (directory, sign, prefix) in PLACES {
            let place = dev.join(directory);
            if rustix::fs::access(place.join(sign), Access::EXISTS).is_err() {
                continue;
            }
            let Ok(entries) = std::fs::read_dir(&place) else { continue };
            for entry in entries.take(MAX_NODES).flatten() {
                let Ok(name) = entry.file_name().into_string() else { continue };
                let is_number = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
                if name.strip_prefix(prefix).is_some_and(is_number) && is_refused(&place.join(&name)) {
                    refused.insert(Path::new(directory).join(name).to_string_lossy().into_owned());
                }
            }
        }
        Self { refused }
    }

    /// Whether the cgroup lets the job open `node`, a path below `/dev`.
    pub fn allows(&self, node: impl AsRef<Path>) -> bool {
        let path = node.as_ref().strip_prefix("/dev").ok().and_then(Path::to_str);
        path.is_none_or(|path| !self.refused.contains(path))
    }

    /// Whether it refuses anything whose path below `/dev` begins with `prefix`.
    pub fn refuses_any(&self, prefix: &str) -> bool {
        self.refused.iter().any(|path| path.starts_with(prefix))
    }
}

/// Of paths below `/dev`.
impl<S: Into<String>> FromIterator<S> for DeviceAccess {
    fn from_iter<I: IntoIterator<Item = S>>(refused: I) -> Self {
        Self { refused: refused.into_iter().map(Into::into).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_of_generic_resources_are_asked_for() {
        let directory = tempfile::tempdir().unwrap();
        let dev = directory.path();
        for name in
            ["nvidia0", "nvidia10", "nvidia-uvm", "null", "nvidia-caps/nvidia-cap7", "dri/card0", "dri/renderD128"]
        {
            std::fs::create_dir_all(dev.join(name).parent().unwrap()).unwrap();
            std::fs::write(dev.join(name), "").unwrap();
        }
        let all = |_: &Path| true;
        let without_driver: DeviceAccess = ["nvidia-caps/nvidia-cap7", "dri/renderD128"].into_iter().collect();
        assert_eq!(DeviceAccess::below(dev, &all), without_driver);
        std::fs::write(dev.join("nvidiactl"), "").unwrap();
        let access = DeviceAccess::below(dev, &all);
        let refused = ["/dev/nvidia0", "/dev/nvidia10", "/dev/nvidia-caps/nvidia-cap7", "/dev/dri/renderD128"];
        assert!(refused.iter().all(|node| !access.allows(node)));
        assert!(
            ["/dev/nvidia1", "/dev/nvidia-uvm", "/dev/null", "/dev/dri/card0"].iter().all(|node| access.allows(node))
        );
        assert!(access.refuses_any("nvidia-caps/") && !access.refuses_any("infiniband/"));
        assert_eq!(DeviceAccess::below(dev, &|_| false), DeviceAccess::default());
    }
}
