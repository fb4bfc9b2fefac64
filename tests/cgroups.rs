//! Slurm with cgroups: `proctrack/cgroup`, `task/cgroup`, `ConstrainRAMSpace`, `ConstrainDevices`, an extern step in each job,
//! and `job_container/tmpfs`. One node, because cgroups are the machine's.
//!
//! With the controllers of cgroup v1, where this machine has them; a machine has those of v1 or those of v2.

use std::path::Path;
use std::process::Stdio;
use std::sync::{Mutex, MutexGuard, PoisonError};

use testbed::install::Build;
use testbed::{ClusterOptions, Output, Running, Testbed, images, process, wait};

const IMAGE: &str = "--container-image=alpine:latest";

const CGROUP_CONF: &str = "\
CgroupAutomount=no
CgroupMountpoint=/sys/fs/cgroup
CgroupPlugin=cgroup/v1
ConstrainRAMSpace=yes
AllowedRAMSpace=100
MinRAMSpace=1
ConstrainDevices=yes
";

struct World {
    bed: Testbed,
    _one_at_a_time: MutexGuard<'static, ()>,
}

impl World {
    fn start(name: &str, extra: &str, more: Option<(&'static str, String)>) -> Self {
        static CGROUPS: Mutex<()> = Mutex::new(());
        let guard = CGROUPS.lock().unwrap_or_else(PoisonError::into_inner);
        for controller in ["freezer", "memory", "devices", "cpuset"] {
            let path = Path::new("/sys/fs/cgroup").join(controller).join("tasks");
            assert!(path.exists(), "{} is missing: mount the {controller} controller of cgroup v1", path.display());
        }
        remove_leftovers();
        let mut files = vec![("cgroup.conf", CGROUP_CONF.to_owned())];
        files.extend(more);
        let options = ClusterOptions {
            nodes: 1,
            gpus: if name == "devices" { 3 } else { 0 },
            extra: format!(
                "ProctrackType=proctrack/cgroup\nTaskPlugin=task/cgroup\nSelectTypeParameters=CR_CPU_Memory\n\
                 DefMemPerNode=500\n{extra}"
            ),
            files,
            ..ClusterOptions::default()
        };
        let name = format!("cgroups-{name}-{}", std::process::id());
        let bed = Testbed::start(&name, &Build::of(env!("CARGO_BIN_EXE_pyxis")), &options).unwrap();
        let image = images::busybox(&bed.site.make_directory("state/alpine").unwrap()).unwrap();
        bed.hub.push(&image, "library/alpine:latest").unwrap();
        bed.pyxis.configure(&testbed::install::hub_mirror(&bed.hub.host())).unwrap();
        Self { bed, _one_at_a_time: guard }
    }

    fn srun(&self, arguments: &[&str]) -> Output {
        self.bed.cluster.srun(arguments).unwrap()
    }

    #[track_caller]
    fn sh(&self, options: &[&str], script: &str) -> String {
        let output = self.srun(&[options, &["sh", "-c", script]].concat());
        output.success().unwrap().stdout.trim_end().to_owned()
    }

    /// All nodes are idle, and the machine has no cgroup of a job any more.
    fn is_clean(&mut self) {
        self.bed.cluster.wait_until_idle().unwrap();
        let left = wait::until("the jobs' cgroups to go", wait::DEADLINE, || jobs().is_empty().then_some(()));
        assert!(left.is_ok(), "{:?}", jobs());
        let processes = self.bed.cluster.nodes()[0].processes();
        assert!(processes.iter().all(|process| !format!("{process:?}").contains("pyxis-init")), "{processes:?}");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A cluster that is killed leaves its cgroups.
        self.bed.cluster.nodes_mut().iter_mut().for_each(testbed::node::Node::stop_slurmd);
        remove_leftovers();
    }
}

/// Removes cgroups of nodes that were killed: those without processes.
fn remove_leftovers() {
    for controller in std::fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        let mut directories = vec![controller.path().join("slurm_node1")];
        let mut next = 0;
        while let Some(directory) = directories.get(next).cloned() {
            next += 1;
            let inside = std::fs::read_dir(directory).into_iter().flatten().flatten();
            directories.extend(inside.map(|entry| entry.path()).filter(|path| path.is_dir()));
        }
        directories.iter().rev().for_each(|directory| drop(std::fs::remove_dir(directory)));
    }
}

/// Cgroups of jobs.
fn jobs() -> Vec<String> {
    let list = |path: &Path| -> Vec<std::path::PathBuf> {
        std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
    };
    let top = list(Path::new("/sys/fs/cgroup/freezer"))
        .into_iter()
        .filter(|path| path.display().to_string().contains("slurm"));
    let users = top.flat_map(|path| list(&path)).filter(|path| path.display().to_string().contains("/uid_"));
    let jobs = users.flat_map(|path| list(&path)).filter(|path| path.display().to_string().contains("/job_"));
    jobs.map(|path| path.display().to_string()).collect()
}

#[test]
fn steps_are_tracked_and_bounded() {
    let mut world = World::start("plain", "PrologFlags=Contain\n", None);

    // In the job's cgroups, which are the container's own.
    let cgroups = world.sh(&[IMAGE], "cat /proc/self/cgroup; grep ' /sys/fs/cgroup/memory ' /proc/self/mountinfo");
    assert!(cgroups.lines().any(|line| line.ends_with(":memory:/")), "{cgroups}");
    let memory = world.sh(&[IMAGE, "--mem=100"], "cat /sys/fs/cgroup/memory/memory.limit_in_bytes");
    let memory: u64 = memory.parse().unwrap();
    assert!(memory <= 100 << 20, "{memory}: the step's limit is where programs look for it");
    assert_eq!(world.sh(&[IMAGE], "find /sys/fs/cgroup/freezer -name '*uid_*' | wc -l"), "0", "nobody else's cgroups");
    world.is_clean();

    // Several tasks, a container that is joined, a cancelled one.
    assert_eq!(world.sh(&[IMAGE, "--ntasks=4"], "echo task").lines().count(), 4);
    world.is_clean();
    let mut step = running(&world, &[IMAGE, "sh", "-c", "echo up; sleep 1000 & wait"]);
    step.wait_for_text("up", wait::DEADLINE).unwrap();
    world.bed.cluster.admin("scancel", ["--user", &world.bed.cluster.user(0).name]).unwrap();
    assert!(!step.wait(wait::DEADLINE).unwrap().status.success());
    world.is_clean();

    // An orphan, which proctrack/cgroup finds.
    assert_eq!(world.sh(&[IMAGE], "(sleep 1000 >/dev/null 2>&1 &); echo done"), "done");
    world.is_clean();

    // A job that takes more memory than it has.
    let greedy = world.srun(&[IMAGE, "--mem=50", "sh", "-c", "head -c 200m /dev/zero | tail -c 200m | wc -c"]);
    assert!(!greedy.status.success() && !greedy.stdout.contains("209715200"), "{greedy}");
    world.is_clean();
}

/// What it imports counts for the job: a job with too little memory for that fails, with a line that says so, and the node
/// goes on.
#[test]
fn an_import_beyond_the_jobs_memory_fails_cleanly() {
    let mut world = World::start("memory", "PrologFlags=Contain\n", None);
    let output = world.srun(&[IMAGE, "--mem=6", "echo", "started"]);
    assert!(!output.status.success() && !output.stdout.contains("started"), "{output}");
    for line in ["failed to import docker image: alpine:latest", "the importer was killed (signal 9): out of memory?"] {
        assert!(output.stderr.contains(line), "{output}");
    }
    world.is_clean();
    // It was the memory.
    assert_eq!(world.sh(&[IMAGE, "--mem=300"], "echo started"), "started");
    world.is_clean();
}

#[test]
fn devices_are_those_of_the_job() {
    let mut world = World::start("devices", "", None);
    // GPU 0 is /dev/zero, by another name.
    let script = "head -c 1 /dev/zero >/dev/null && echo can || echo cannot";
    assert_eq!(world.sh(&[IMAGE, "--gres=gpu:1"], script), "can");
    assert_eq!(world.sh(&[IMAGE], script), "cannot");
    world.is_clean();
}

#[test]
fn a_job_has_a_tmp_of_its_own() {
    // Slurm binds mount namespaces, which Linux 6.18 refuses at random unless all are made on one CPU.
    let mut one = rustix::thread::CpuSet::new();
    let allowed = rustix::thread::sched_getaffinity(None).unwrap();
    let first = (0..rustix::thread::CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap();
    one.set(first);
    rustix::thread::sched_setaffinity(None, &one).unwrap();
    let base = Path::new("/var/tmp").join(format!("pyxis-job-container-{}", std::process::id()));
    let conf = format!("AutoBasePath=true\nBasePath={}\n", base.display());
    let extra = "PrologFlags=Contain\nJobContainerType=job_container/tmpfs\n";
    let mut world = World::start("tmpfs", extra, Some(("job_container.conf", conf)));
    let marker = format!("marker-{}", std::process::id());
    let script = format!(
        "srun touch /tmp/{marker}; srun {IMAGE} --container-mounts=/tmp:/job sh -c 'ls /job; touch /job/{marker}-2'; \
         srun ls /tmp"
    );
    let output =
        process::run(&mut world.bed.cluster.command(0, "salloc", ["sh", "-c", &script]), wait::DEADLINE * 2).unwrap();
    let log = std::fs::read_to_string(world.bed.site.path("log/node1-slurmd.log")).unwrap_or_default();
    let output = output.success().unwrap_or_else(|error| panic!("{error}\n{log}"));
    assert!(output.stdout.matches(&marker).count() >= 3, "{output}");
    assert!(!Path::new("/tmp").join(&marker).exists(), "it is the job's");
    world.is_clean();
    let _ = std::fs::remove_dir_all(base);
}

fn running(world: &World, arguments: &[&str]) -> Running {
    Running::start(world.bed.cluster.command(0, "srun", arguments).stdin(Stdio::null())).unwrap()
}
