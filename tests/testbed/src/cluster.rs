//! Slurm: a private `munged`, a controller and its nodes.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use nix::sys::stat::{Mode, SFlag, makedev};

use crate::node::{Node, Pod};
use crate::process::{self, Daemon, Output, Running};
use crate::site::Site;
use crate::users::TestUser;
use crate::wait;

/// What kind of cluster.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Number of nodes, called `node1`, `node2`, ….
    pub nodes: usize,
    /// CPUs that each node claims to have.
    pub cpus: usize,
    /// GPUs that each node claims to have: the numbers at the ends of its device files, which are others in fact.
    pub gpus: usize,
    /// The first nodes are pods of these kinds.
    pub pods: Vec<Pod>,
    /// Lines at the end of `slurm.conf`.
    pub extra: String,
    /// Files beside it: their names and contents.
    pub files: Vec<(&'static str, String)>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        Self { nodes: 2, cpus: 16, gpus: 0, pods: Vec::new(), extra: String::new(), files: Vec::new() }
    }
}

/// A running Slurm. Ended when dropped.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    users: Vec<TestUser>,
    config: PathBuf,
    /// `slurm.conf` as the cluster was started with.
    base_config: String,
    plugstack: PathBuf,
    controller: Daemon,
    munged: Daemon,
}

impl Cluster {
    /// Starts a cluster in `site`, with an empty plugin stack, and waits until its nodes are idle.
    pub fn start(site: &Site, options: &ClusterOptions) -> Result<Self> {
        let users = vec![TestUser::get(1)?, TestUser::get(2)?];
        let munged = start_munge(site)?;
        let plugstack = site.write("etc/plugstack.conf", "")?;
        let ports = free_ports(options.nodes + 1)?;
        let base_config = slurm_conf(site, options, &ports)?;
        if options.gpus > 0 {
            site.write("etc/gres.conf", gres_conf(site, options.gpus)?)?;
        }
        for (name, text) in &options.files {
            site.write(&format!("etc/{name}"), text)?;
        }
        let config = site.write("etc/slurm.conf", &base_config)?;
        let controller = site.daemon(
            "slurmctld",
            Command::new("slurmctld").args(["-D", "-c"]).env("SLURM_CONF", &config).env_remove("SLURM_JOB_ID"),
        )?;
        let mut cluster = Self { nodes: Vec::new(), users, config, base_config, plugstack, controller, munged };
        for number in 1..=options.nodes {
            let pod = options.pods.get(number - 1).copied();
            cluster.nodes.push(Node::start(site, &format!("node{number}"), &cluster.config, pod)?);
        }
        cluster.wait_until_idle()?;
        Ok(cluster)
    }

    /// The nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The nodes, to stop and start their daemons.
    pub fn nodes_mut(&mut self) -> &mut [Node] {
        &mut self.nodes
    }

    /// An ordinary user; there are two, 0 and 1.
    pub fn user(&self, index: usize) -> &TestUser {
        &self.users[index]
    }

    /// `SLURM_CONF`.
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Replaces the plugin stack. Commands and steps read it anew each time.
    pub fn set_plugstack(&self, lines: &str) -> Result<()> {
        let new = self.plugstack.with_extension("new");
        fs::write(&new, lines)?;
        fs::rename(&new, &self.plugstack).with_context(|| self.plugstack.display().to_string())
    }

    /// Adds `extra` lines to the `slurm.conf` that the cluster was started with, in place of those added before, and has
    /// all daemons read it.
    pub fn reconfigure(&self, extra: &str) -> Result<()> {
        fs::write(&self.config, format!("{}{extra}", self.base_config))?;
        self.admin("scontrol", ["reconfigure"]).map(drop)
    }

    /// A Slurm command that runs as user `index`, with nothing on its standard input.
    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, index: usize, program: &str, arguments: I) -> Command {
        let mut command = self.user(index).command(program);
        command.args(arguments).env("SLURM_CONF", &self.config).stdin(Stdio::null());
        command
    }

    /// Runs `srun ARGUMENTS` as user 0.
    pub fn srun<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Result<Output> {
        process::run(&mut self.command(0, "srun", arguments), wait::DEADLINE * 2)
    }

    /// Starts `srun ARGUMENTS` as user 0.
    pub fn start_srun<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Result<Running> {
        Running::start(&mut self.command(0, "srun", arguments))
    }

    /// Runs an administrator's command (`scontrol`, `sinfo`, `squeue`, …) and gives its output.
    pub fn admin<I: IntoIterator<Item: AsRef<OsStr>>>(&self, program: &str, arguments: I) -> Result<String> {
        process::output_of(Command::new(program).args(arguments).env("SLURM_CONF", &self.config))
    }

    /// State of each node as `sinfo` prints it in long form; a reason to worry ends in `*` or names `drain`.
    pub fn node_states(&self) -> Result<Vec<String>> {
        let text = self.admin("sinfo", ["--noheader", "--Node", "--format=%N %T"])?;
        Ok(text.lines().filter_map(|line| line.split_once(' ').map(|(_, state)| state.trim().to_owned())).collect())
    }

    /// Waits until no job is left and every node is idle. A node that is drained or down is an error at once.
    pub fn wait_until_idle(&mut self) -> Result<()> {
        let mut last = BTreeSet::new();
        let idle = wait::until("all nodes to be idle", wait::DEADLINE * 2, || {
            if let Err(error) = self.check() {
                return Some(Err(error));
            }
            let states: BTreeSet<_> = self.node_states().ok()?.into_iter().collect();
            last.clone_from(&states);
            if let Some(state) = states.iter().find(|state| state.contains("drain") || state.contains("fail")) {
                let reasons = self.admin("sinfo", ["--list-reasons"]).unwrap_or_default();
                return Some(Err(anyhow::anyhow!("a node is {state}:\n{reasons}")));
            }
            (states.len() == 1 && states.contains("idle")).then_some(Ok(()))
        });
        idle.with_context(|| format!("node states: {last:?}"))?
    }

    /// Fails if a daemon has ended.
    fn check(&mut self) -> Result<()> {
        self.munged.check()?;
        self.controller.check()?;
        self.nodes.iter_mut().try_for_each(Node::check)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        self.nodes.clear();
        self.controller.stop(Signal::SIGKILL);
        self.munged.stop(Signal::SIGKILL);
    }
}

fn start_munge(site: &Site) -> Result<Daemon> {
    let key = site.path("etc/munge.key");
    let mut random = [0; 128];
    std::io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut random)?;
    fs::write(&key, random)?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o400))?;
    let directory = site.make_directory("munge")?;
    let socket = directory.join("socket");
    let option = |name: &str, path: &Path| format!("--{name}={}", path.display());
    let mut munged = site.daemon(
        "munged",
        Command::new("munged").args(["--foreground", "--force"]).args([
            option("key-file", &key),
            option("socket", &socket),
            option("pid-file", &directory.join("pid")),
            option("seed-file", &directory.join("seed")),
            option("log-file", &site.path("log/munged.log")),
        ]),
    )?;
    wait::until("munged", wait::DEADLINE, || match munged.check() {
        Err(error) => Some(Err(error)),
        Ok(()) => socket.exists().then_some(Ok(())),
    })??;
    Ok(munged)
}

fn slurm_conf(site: &Site, options: &ClusterOptions, ports: &[u16]) -> Result<String> {
    let host = nix::unistd::gethostname()?.into_string().ok().context("the host name is not UTF-8")?;
    let [controller_port, node_ports @ ..] = ports else { bail!("no ports") };
    let path = |relative: &str| site.path(relative).display().to_string();
    let state = site.make_directory("state/slurmctld")?;
    // A requeued job waits until the credential of its first run has expired: 120 s unless told otherwise.
    let mut conf = format!(
        "ClusterName=testbed
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={munge},cred_expire=30
StateSaveLocation={state}
SlurmdSpoolDir={directory}/%n/spool
TmpFS={directory}/%n/tmp
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/%n/slurmd.pid
SlurmctldLogFile={log}/slurmctld.log
SlurmdLogFile={log}/%n-slurmd.log
SlurmctldDebug=info
SlurmdDebug=verbose
PlugStackConfig={plugstack}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_min_interval=0,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MessageTimeout=30
UnkillableStepTimeout=60
InactiveLimit=0
",
        munge = path("munge/socket"),
        state = state.display(),
        directory = path("").trim_end_matches('/'),
        log = path("log"),
        plugstack = path("etc/plugstack.conf"),
    );
    let gres = match options.gpus {
        0 => String::new(),
        gpus => {
            conf += "GresTypes=gpu\n";
            format!("Gres=gpu:{gpus} ")
        }
    };
    for (index, port) in node_ports.iter().enumerate() {
        let (name, cpus) = (format!("node{}", index + 1), options.cpus);
        conf += &format!(
            "NodeName={name} NodeHostname={name} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 \
             SocketsPerBoard=1 CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=16000 {gres}State=UNKNOWN\n"
        );
    }
    conf += "PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO\n";
    conf += &options.extra;
    Ok(conf)
}

/// GPUs whose device files are those of `/dev/zero`, `/dev/full` and `/dev/random`, by turns: devices of different numbers that
/// nothing depends on.
fn gres_conf(site: &Site, gpus: usize) -> Result<String> {
    let directory = site.make_directory("gres")?;
    let mut conf = String::new();
    for (index, minor) in [5, 7, 8].into_iter().cycle().take(gpus).enumerate() {
        let path = directory.join(format!("nvidia{index}"));
        nix::sys::stat::mknod(&path, SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(1, minor))?;
        conf += &format!("Name=gpu File={}\n", path.display());
    }
    Ok(conf)
}

/// Ports on loopback that nobody listens on, outside the range from which the kernel takes those of outgoing
/// connections. None is given twice by one process.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    static NEXT: Mutex<Option<u16>> = Mutex::new(None);
    const PORTS: std::ops::Range<u16> = 10_000..32_000;
    let mut next = NEXT.lock().expect("no holder panics");
    // Testbeds that start at the same time should not begin to look at the same place.
    let mut port = next.unwrap_or(PORTS.start + (std::process::id() % 1000) as u16 * 20);
    let mut free = Vec::new();
    for _ in PORTS {
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            free.push(port);
        }
        port = if port + 1 < PORTS.end { port + 1 } else { PORTS.start };
        if free.len() == count {
            *next = Some(port);
            return Ok(free);
        }
    }
    bail!("no {count} free ports on loopback")
}
