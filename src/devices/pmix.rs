//! PMIx, through which MPI programs start (<https://pmix.org>): its server is in slurmstepd, its client in the task, and both
//! share directories, which have to be in the container under their own names (behaviour reference, section 17,
//! `50-slurm-pmi`). The client also has to choose the modules that the server has: an image may bring another release.
//!
//! PMI-1 and PMI-2 need nothing: their socket is a descriptor of the task's (`PMI_FD`).

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use crate::devices::slurm_config;
use crate::mounts::entry::MountEntry;
use crate::request::Environment;

/// Namespace of a step's processes, as Slurm's plugin `mpi/pmix` makes it: this, job, `.`, step.
const NAMESPACE: &str = "slurm.pmix.";

/// Which modules the server has, and the parameter that makes the client take the same.
const MODULES: [(&str, &str); 3] =
    [("PMIX_PTL_MODULE", "PMIX_MCA_ptl"), ("PMIX_SECURITY_MODE", "PMIX_MCA_psec"), ("PMIX_GDS_MODULE", "PMIX_MCA_gds")];

/// Directories that the server's data are in; the server's own directory is their parent.
const DATA: [&str; 2] = ["PMIX_DSTORE_21_BASE_PATH", "PMIX_DSTORE_ESH_BASE_PATH"];

/// What a container needs for PMIx; nothing in most steps.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Pmix {
    /// The server's directory: without it programs do not find the server's data.
    pub server: Option<MountEntry>,
    /// Whether the server is that of this step, and not one that an outer step has left in the environment.
    pub own_server: bool,
    /// Where clients put their session's files, in the order in which Slurm's releases name it. One of them exists.
    pub client: Vec<MountEntry>,
    /// Variables for the container.
    pub environment: Vec<(&'static str, Vec<u8>)>,
}

impl Pmix {
    /// Plans for a task with the environment `task`, whose user is `uid`. `step` is the job's and the step's id,
    /// `read_config` gives the content of a file in the directory of slurm.conf.
    pub fn plan(
        task: &Environment,
        uid: u32,
        step: Option<(u32, u32)>,
        read_config: &dyn Fn(&Path) -> Option<String>,
    ) -> Self {
        let Some(namespace) = task.get_str("PMIX_NAMESPACE") else { return Self::default() };
        let environment = MODULES
            .into_iter()
            .filter(|(_, parameter)| task.get(parameter).is_none())
            .filter_map(|(module, parameter)| Some((parameter, task.get(module)?.to_vec())))
            .collect();
        let Some(id) = namespace.strip_prefix(NAMESPACE) else {
            return Self { server: server_directory(task).and_then(bind), environment, ..Self::default() };
        };
        let own_server = step.is_some_and(|(job, step)| id == format!("{job}.{step}"));
        let base = client_base(task, read_config);
        let names = [format!("spmix_appdir_{uid}_{id}"), format!("spmix_appdir_{id}")];
        Self {
            server: server_directory(task).and_then(bind),
            own_server,
            client: names.into_iter().filter_map(|name| bind(base.join(name))).collect(),
            environment,
        }
    }
}

/// Where the server keeps what it shares with its clients. Old releases do not say so in a variable of its own.
fn server_directory(task: &Environment) -> Option<PathBuf> {
    if let Some(directory) = task.get_str("PMIX_SERVER_TMPDIR") {
        return Some(directory.into());
    }
    DATA.iter().find_map(|name| Some(Path::new(task.get_str(name)?).parent()?.to_owned()))
}

/// The directory in which Slurm makes that of the clients.
fn client_base(task: &Environment, read_config: &dyn Fn(&Path) -> Option<String>) -> PathBuf {
    if let Some(directory) = task.get_str("SLURM_PMIX_TMPDIR") {
        return directory.into();
    }
    let config = slurm_config::path(task);
    let setting = |file: &Path, key| {
        let text = read_config(file)?;
        slurm_config::value(&text, key).filter(|value| value.starts_with('/')).map(str::to_owned)
    };
    let directory = setting(&config.with_file_name("mpi.conf"), "PMIxCliTmpDirBase")
        .or_else(|| setting(config, "TmpFS"))
        .unwrap_or_else(|| "/tmp".into());
    let node = task.get_str("SLURMD_NODENAME").unwrap_or_default();
    directory.replace("%n", node).into()
}

/// The bind of `directory` on itself.
fn bind(directory: PathBuf) -> Option<MountEntry> {
    let path = directory.to_str().filter(|path| path.starts_with('/'))?;
    let options = ["x-create=dir", "bind", "rw", "nosuid", "noexec", "nodev", "private"];
    MountEntry::new(path, path, options.into_iter()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TASK: [&str; 5] = [
        "PMIX_NAMESPACE=slurm.pmix.7.2",
        "PMIX_SERVER_TMPDIR=/spool/pmix.7.2/",
        "PMIX_GDS_MODULE=ds21,hash",
        "PMIX_SECURITY_MODE=native",
        "SLURMD_NODENAME=n1",
    ];

    fn plan(extra: &[&str], config: &[(&str, &str)]) -> Pmix {
        let task = TASK.iter().chain(extra).collect();
        let read = |path: &Path| {
            let file = config.iter().find(|(name, _)| Path::new(name) == path)?;
            Some(file.1.to_owned())
        };
        Pmix::plan(&task, 1000, Some((7, 2)), &read)
    }

    fn clients(plan: &Pmix) -> Vec<&str> {
        plan.client.iter().map(|entry| entry.source.as_str()).collect()
    }

    #[test]
    fn a_step_without_pmix_needs_nothing() {
        let task = ["PMI_FD=5", "PMI_RANK=1", "PMIX_SERVER_TMPDIR=/x"].iter().collect();
        assert_eq!(Pmix::plan(&task, 1000, Some((7, 2)), &|_| None), Pmix::default());
    }

    #[test]
    fn directories_keep_their_names() {
        let plan = plan(&[], &[]);
        let server = plan.server.as_ref().unwrap();
        assert_eq!((server.source.as_str(), server.target.as_str()), ("/spool/pmix.7.2/", "/spool/pmix.7.2/"));
        assert_eq!(server.set, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC | libc::MOUNT_ATTR_NODEV);
        assert!(plan.own_server);
        assert_eq!(clients(&plan), ["/tmp/spmix_appdir_1000_7.2", "/tmp/spmix_appdir_7.2"]);
    }

    #[test]
    fn clients_are_where_slurm_is_told_to_put_them() {
        let files = [("/s/slurm.conf", "# TmpFS=/no\ntmpfs = /scratch/%n # here\nTmpFSx=/y\n")];
        let config = "SLURM_CONF=/s/slurm.conf";
        assert_eq!(clients(&plan(&[config], &files))[0], "/scratch/n1/spmix_appdir_1000_7.2");
        let files = [files[0], ("/s/mpi.conf", "PMIxCliTmpDirBase=/pmix\n")];
        assert_eq!(clients(&plan(&[config], &files))[0], "/pmix/spmix_appdir_1000_7.2");
        assert_eq!(
            clients(&plan(&[config, "SLURM_PMIX_TMPDIR=/dev/shm"], &files))[0],
            "/dev/shm/spmix_appdir_1000_7.2"
        );
    }

    #[test]
    fn old_servers_are_found_by_their_data() {
        let task = ["PMIX_NAMESPACE=slurm.pmix.7.2", "PMIX_DSTORE_ESH_BASE_PATH=/spool/pmix.7.2/pmix_dstor_72"];
        let plan = Pmix::plan(&task.iter().collect(), 1000, Some((7, 3)), &|_| None);
        assert_eq!(plan.server.unwrap().source, "/spool/pmix.7.2");
        assert!(!plan.own_server);
    }

    #[test]
    fn modules_are_the_servers_unless_somebody_chose() {
        let plan = plan(&["PMIX_MCA_psec=none"], &[]);
        assert_eq!(plan.environment, [("PMIX_MCA_gds", b"ds21,hash".to_vec())]);
    }

    #[test]
    fn what_is_no_absolute_path_is_left_alone() {
        assert_eq!(plan(&["PMIX_SERVER_TMPDIR=relative"], &[]).server, None);
        assert_eq!(clients(&plan(&["SLURM_PMIX_TMPDIR=relative"], &[])), [""; 0]);
    }
}
