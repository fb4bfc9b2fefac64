//! A compute node: a `slurmd` in namespaces and with disks of its own.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag};
use nix::unistd::Pid;

use crate::process::{self, Daemon};
use crate::site::Site;
use crate::wait;

/// Directories of the machine that every node has a copy of its own of.
const PRIVATE_DIRECTORIES: [&str; 2] = ["/var/lib/pyxis", "/run/pyxis"];

/// A device that is for all users on a node, as distributions have it, though it need not be on the machine: it is bound
/// over the machine's own.
const SHARED_DEVICE: (&str, u64) = ("/dev/fuse", nix::sys::stat::makedev(10, 229));

/// First process of a node (its arguments: pairs of a directory and where it goes, then a file to create): mounts the
/// node's directories and then does what an init does, reap orphans.
const INIT: &str = r#"
    while [ $# -gt 1 ]; do mount --bind "$1" "$2" || exit 1; shift 2; done
    : >"$1"
    sleep infinity &
    while :; do wait; done"#;

/// The same for a node that is a pod; its first arguments: an empty directory, the testbed's, and `masked` or nothing. The
/// root file system is an overlay; `/proc` is new, with or without what engines hide of it; `/dev/shm` is as small as theirs;
/// the homes, the testbed and the pairs of directories are volumes, and `/etc/slurm` one that is read-only.
const POD_INIT: &str = r#"
    set -e
    pod=$1 site=$2 masked=$3; shift 3
    mount -t tmpfs -o mode=0755 pod "$pod"
    mkdir "$pod/upper" "$pod/work" "$pod/root"
    mount -t overlay -o "lowerdir=/,upperdir=$pod/upper,workdir=$pod/work" overlay "$pod/root"
    root=$pod/root
    mount -t proc proc "$root/proc"
    find "$root/run" -mindepth 1 -delete
    mount --rbind /sys "$root/sys"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o size=64m,mode=1777 shm "$root/dev/shm"
    if [ -n "$masked" ]; then
        for file in kcore keys timer_list; do
            [ ! -e "$root/proc/$file" ] || mount --bind /dev/null "$root/proc/$file"
        done
        for directory in acpi scsi; do
            [ ! -d "$root/proc/$directory" ] || mount -t tmpfs -o ro none "$root/proc/$directory"
        done
        for path in bus fs irq sys sysrq-trigger; do
            [ -e "$root/proc/$path" ] || continue
            mount --bind "$root/proc/$path" "$root/proc/$path"
            mount -o remount,bind,ro "$root/proc/$path"
        done
    fi
    # The overlay shows nothing of what is mounted on the machine's own root file system.
    for directory in /home "$site"; do
        mkdir -p "$root$directory"
        mount --bind "$directory" "$root$directory"
    done
    mkdir -p "$root/etc/slurm"
    mount --bind "$site/etc" "$root/etc/slurm"
    mount -o remount,bind,ro "$root/etc/slurm"
    while [ $# -gt 1 ]; do
        [ -e "$root$2" ] || mkdir -p "$root$2"
        mount --bind "$1" "$root$2"
        shift 2
    done
    cd "$root"
    pivot_root . mnt
    cd /
    umount -l /mnt
    set +e
    : >"$1"
    sleep infinity &
    while :; do wait; done"#;

/// The capabilities that a container of Kubernetes has unless it is told otherwise: CRI-O's and containerd's defaults.
const POD_CAPABILITIES: &str = "-all,+chown,+dac_override,+fowner,+fsetid,+kill,+setgid,+setuid,+setpcap,\
                                +net_bind_service,+net_raw,+sys_chroot,+mknod,+audit_write,+setfcap";

/// A node that is a pod of Kubernetes, as far as that matters to steps.
#[derive(Debug, Clone, Copy)]
pub struct Pod {
    /// Whether slurmd has all capabilities.
    pub privileged: bool,
    /// Whether parts of `/proc` are hidden or read-only.
    pub masked: bool,
    /// Whether the store is on a volume; else it is on the pod's own root file system.
    pub volume: bool,
}

/// A process of a node, seen from the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeProcess {
    /// The pid in the machine's own namespace.
    pub pid: i32,
    /// Effective user.
    pub uid: u32,
    /// `/proc/pid/comm`.
    pub name: String,
    /// The command line, blanks between the arguments.
    pub command: String,
}

/// A compute node.
#[derive(Debug)]
pub struct Node {
    name: String,
    directory: PathBuf,
    config: PathBuf,
    pod: Option<Pod>,
    /// `unshare`, whose end is the end of the whole PID namespace.
    machine: Daemon,
    /// The first process in the namespaces.
    init: i32,
    slurmd: Option<Daemon>,
}

impl Node {
    /// Starts node `name`, whose Slurm configuration is `config`.
    pub fn start(site: &Site, name: &str, config: &Path, pod: Option<Pod>) -> Result<Self> {
        let directory = site.make_directory(name)?;
        let up = directory.join("up");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "slave", "--"])
            .args(["sh", "-c", if pod.is_some() { POD_INIT } else { INIT }, name]);
        if let Some(pod) = pod {
            command.arg(site.make_directory(&format!("{name}/pod"))?).arg(site.path(""));
            command.arg(if pod.masked { "masked" } else { "" });
        }
        site.make_directory(&format!("{name}/spool"))?;
        let scratch = site.make_directory(&format!("{name}/tmp"))?;
        fs::set_permissions(scratch, fs::Permissions::from_mode(0o1777))?;
        // A pod's runtime directory is on its own root file system.
        let volumes = pod.map_or(PRIVATE_DIRECTORIES.len(), |pod| usize::from(pod.volume));
        let private = &PRIVATE_DIRECTORIES[..volumes];
        for target in private {
            fs::create_dir_all(target).with_context(|| target.to_owned())?;
            command.arg(site.make_directory(&format!("{name}/{}", file_name(target)))?).arg(target);
        }
        let (device, number) = SHARED_DEVICE;
        let own_device = directory.join(file_name(device));
        nix::sys::stat::mknod(&own_device, SFlag::S_IFCHR, Mode::empty(), number).context("mknod")?;
        fs::set_permissions(&own_device, PermissionsExt::from_mode(0o666))?;
        command.arg(own_device).arg(device);
        let machine = site.daemon(name, command.arg(&up))?;
        let mut node =
            Self { name: name.into(), directory, config: config.into(), pod, machine, init: 0, slurmd: None };
        node.init = wait::until(&format!("the namespaces of {name}"), wait::DEADLINE, || {
            if let Err(error) = node.machine.check() {
                return Some(Err(error));
            }
            let child = || process::pids().into_iter().find(|&pid| process::parent(pid) == Some(node.machine_pid()));
            up.exists().then(child).flatten().map(Ok)
        })??;
        node.start_slurmd(site)?;
        Ok(node)
    }

    fn machine_pid(&self) -> i32 {
        self.machine.pid().as_raw()
    }

    /// Node name in Slurm.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Starts `slurmd`, at first or again.
    pub fn start_slurmd(&mut self, site: &Site) -> Result<()> {
        let mut command = match self.pod {
            Some(Pod { privileged: false, .. }) => {
                let mut command = self.command("setpriv");
                command.args(["--bounding-set", POD_CAPABILITIES, "--", "slurmd"]);
                command
            }
            _ => self.command("slurmd"),
        };
        command.args(["-D", "-N", &self.name]);
        self.slurmd = Some(site.daemon(&format!("{}-slurmd", self.name), &mut command)?);
        Ok(())
    }

    /// Ends `slurmd` as an administrator would; steps go on.
    pub fn stop_slurmd(&mut self) {
        // `nsenter` waits for the program it started and does not pass signals on.
        for pid in self.slurmd_pids() {
            let _ = nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        if let Some(mut daemon) = self.slurmd.take() {
            daemon.stop(Signal::SIGCONT);
        }
    }

    /// Fails if one of the node's daemons has ended.
    pub fn check(&mut self) -> Result<()> {
        self.machine.check()?;
        self.slurmd.as_mut().map_or(Ok(()), Daemon::check)
    }

    fn slurmd_pids(&self) -> Vec<i32> {
        let Some(slurmd) = &self.slurmd else { return Vec::new() };
        process::pids().into_iter().filter(|&pid| process::parent(pid) == Some(slurmd.pid().as_raw())).collect()
    }

    /// A command that runs as root on the node.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .args(["--target", &self.init.to_string(), "--mount", "--pid", "--"])
            .arg(program)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
            .env("HOME", "/root")
            .env("SLURM_CONF", &self.config);
        command
    }

    /// The node's own copy of a private directory, seen from the machine: `/var/lib/pyxis` or `/run/pyxis`.
    pub fn private(&self, directory: &str) -> PathBuf {
        self.directory.join(file_name(directory))
    }

    /// The node's spool directory.
    pub fn spool(&self) -> PathBuf {
        self.directory.join("spool")
    }

    /// Processes in the node's PID namespace that are not part of the node itself.
    pub fn processes(&self) -> Vec<NodeProcess> {
        let namespace = |pid: i32| fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let Some(own) = namespace(self.init) else { return Vec::new() };
        let daemons = self.slurmd_pids();
        process::pids()
            .into_iter()
            .filter(|&pid| pid != self.init && !daemons.contains(&pid) && namespace(pid).as_ref() == Some(&own))
            .filter_map(NodeProcess::read)
            .filter(|process| process.command != "sleep infinity")
            .collect()
    }

    /// Mount points of the node that a machine without containers would not have: what differs from the machine's own
    /// table and is not one of the private directories.
    pub fn extra_mounts(&self) -> Vec<String> {
        let points = |pid: &str| -> BTreeSet<String> {
            let table = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
            table.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned)).collect()
        };
        let machine = points("self");
        points(&self.init.to_string())
            .into_iter()
            .filter(|point| !machine.contains(point) && !PRIVATE_DIRECTORIES.contains(&point.as_str()))
            .filter(|point| point != SHARED_DEVICE.0)
            .collect()
    }
}

/// `/var/lib/pyxis` becomes `var-lib-pyxis`.
fn file_name(directory: &str) -> String {
    directory.trim_start_matches('/').replace('/', "-")
}

impl NodeProcess {
    fn read(pid: i32) -> Option<Self> {
        use std::os::unix::fs::MetadataExt;
        let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).replace('\0', " ").trim_end().to_owned();
        let status = text(read("status")?);
        // A zombie has been reaped by nobody yet; its parent, the node's init, will.
        if status.lines().any(|line| line.starts_with("State:\tZ")) {
            return None;
        }
        let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
        Some(Self { pid, uid, name: text(read("comm")?), command: text(read("cmdline")?) })
    }
}

impl Drop for Node {
    /// Pulls the plug: with its first process every process of the node dies.
    fn drop(&mut self) {
        self.machine.stop(Signal::SIGKILL);
        if let Some(mut slurmd) = self.slurmd.take() {
            slurmd.stop(Signal::SIGKILL);
        }
    }
}
