//! Which GPUs a job has: what its device cgroup lets it open and, where there is none, what Slurm says.
//!
//! Slurm names GPUs by the numbers of their device nodes (gres.conf(5), `File=`): `SLURM_STEP_GPUS` in a step, `SLURM_JOB_GPUS`
//! in a batch script and an interactive step. Both are those of the whole step in the environment that the step begins with; what a task's binding makes of
//! them comes later.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use super::driver::{Driver, Gpu, Instance};
use crate::devices::access::DeviceAccess;
use crate::devices::host::Host;
use crate::devices::slurm_config;
use crate::request::{Environment, StepFacts};

/// `SLURM_BATCH_SCRIPT` and `SLURM_INTERACTIVE_STEP`.
const STEPS_WITH_ALL_OF_THE_JOB: std::ops::RangeInclusive<u32> = 0xffff_fffa..=0xffff_fffb;

/// The GPUs of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allocation {
    /// Device nodes that the job's cgroup refuses.
    refused: DeviceAccess,
    /// Whether there is such a cgroup.
    is_constrained: bool,
    /// Numbers of device nodes that are for other users.
    forbidden: BTreeSet<u32>,
    /// Numbers that Slurm has given; `None` if it does not manage this node's GPUs, or does not say.
    given: Option<BTreeSet<u32>>,
}

impl Allocation {
    /// The GPUs of the step `step`, whose environment was `job` at first, one of whose tasks may not open `refused`.
    pub fn of(
        host: &Host,
        driver: &Driver,
        step: Option<&StepFacts>,
        job: &Environment,
        refused: &DeviceAccess,
    ) -> Self {
        let forbidden = driver.gpus.iter().filter(|gpu| host.forbids(gpu.node())).map(|gpu| gpu.minor).collect();
        let is_constrained = refused.refuses_any("nvidia");
        let own = Self { refused: refused.clone(), is_constrained, forbidden, given: None };
        // Tasks can have cgroups of their own (`--gpus-per-task`), and share the container.
        let of_one_task = is_constrained && step.is_some_and(|step| step.local_tasks > 1);
        // Slurm's numbers of parts of GPUs are not those of device nodes.
        if driver.gpus.iter().any(Gpu::is_divided) {
            return if of_one_task { Self { refused: DeviceAccess::default(), ..own } } else { own };
        }
        let given = step.and_then(|step| given(host, step.step_id, job));
        match given {
            Some(given) if of_one_task && !given.is_empty() => {
                Self { refused: DeviceAccess::default(), given: Some(given), ..own }
            }
            // With a device cgroup there is nothing more to know.
            given => Self { given: given.filter(|_| !is_constrained), ..own },
        }
    }

    /// Whether the job has this GPU, or parts of it.
    pub fn has(&self, gpu: &Gpu) -> bool {
        self.may_open(gpu) && self.given.as_ref().is_none_or(|given| given.contains(&gpu.minor))
    }

    /// Whether nothing but good manners would keep the job from opening this GPU.
    pub fn may_open(&self, gpu: &Gpu) -> bool {
        self.refused.allows(gpu.node()) && !self.forbidden.contains(&gpu.minor)
    }

    /// Whether Slurm has given the job some of the node's GPUs.
    pub fn is_slurms(&self) -> bool {
        self.given.is_some() || self.is_constrained
    }

    /// Why it has what it has: for people.
    pub fn reason(&self) -> String {
        match (&self.given, self.is_constrained) {
            (Some(given), _) if given.is_empty() => {
                "the job has no GPU: Slurm manages them, and has given it none".into()
            }
            (Some(given), _) => {
                let list = given.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
                format!("the job has the GPUs that Slurm has given it: /dev/nvidiaN with N {list}")
            }
            (None, true) => "the job has the GPUs that its device cgroup lets it open".into(),
            (None, false) => "the job has all GPUs: neither Slurm nor a device cgroup says otherwise".into(),
        }
    }

    /// Whether the job has this part of a GPU that it has.
    pub fn has_instance(&self, instance: &Instance) -> bool {
        instance.nodes().iter().all(|node| self.refused.allows(node))
    }

    /// What Slurm calls the GPUs of `driver` in `CUDA_VISIBLE_DEVICES`: those that the job can open are counted from 0
    /// where a device cgroup is at work, else the numbers are those of the device nodes.
    pub fn slurms_number(&self, driver: &Driver, wanted: &Gpu) -> Option<u32> {
        if !self.is_constrained {
            return Some(wanted.minor);
        }
        let mut own = driver.gpus.iter().filter(|gpu| self.has(gpu));
        own.position(|gpu| gpu.minor == wanted.minor).and_then(|position| u32::try_from(position).ok())
    }
}

/// What Slurm has given; `None` if it manages no GPUs, or says nothing.
fn given(host: &Host, step: u32, job: &Environment) -> Option<BTreeSet<u32>> {
    // A step in a batch script finds the job's variable, too, which may be another node's.
    let name = if STEPS_WITH_ALL_OF_THE_JOB.contains(&step) { "SLURM_JOB_GPUS" } else { "SLURM_STEP_GPUS" };
    match job.get_str(name) {
        // "NoDevFiles" is what old releases say when there are none.
        Some(list) => Some(list.split(',').filter_map(|number| number.trim().parse().ok()).collect()),
        // Given by number, without device files.
        None if job.get_str("SLURM_GPUS_ON_NODE").is_some_and(|count| count != "0") => None,
        None => {
            let text = host.read_text(slurm_config::path(job), slurm_config::MAX_FILE).ok()?;
            let types = slurm_config::value(&text, "GresTypes")?;
            types.split(',').any(|kind| kind.trim().eq_ignore_ascii_case("gpu")).then(BTreeSet::new)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::driver::BusId;
    use super::*;

    fn gpu(minor: u32) -> Gpu {
        let directory = format!("0000:{:02x}:00.0", 0x10 * (minor + 1));
        let bus = BusId::parse(&directory).unwrap();
        Gpu { bus, directory, uuid: None, minor, instances: vec![] }
    }

    fn allocation(step: Option<u32>, job: &[&str], conf: Option<&str>, refused: &[u32]) -> (Allocation, Vec<u32>) {
        allocation_of_tasks(1, step, job, conf, refused)
    }

    fn allocation_of_tasks(
        local_tasks: u32,
        step: Option<u32>,
        job: &[&str],
        conf: Option<&str>,
        refused: &[u32],
    ) -> (Allocation, Vec<u32>) {
        let directory = tempfile::tempdir().unwrap();
        if let Some(conf) = conf {
            std::fs::write(directory.path().join("slurm.conf"), conf).unwrap();
        }
        let job = job.iter().chain(&["SLURM_CONF=/slurm.conf"]).collect();
        let driver = Driver { version: String::new(), gpus: (0..4).map(gpu).collect() };
        let refused = refused.iter().map(|minor| format!("nvidia{minor}")).collect();
        let step = step.map(|step_id| StepFacts { job_id: 1, step_id, local_tasks, total_tasks: local_tasks });
        let allocation = Allocation::of(&Host::at(directory.path()), &driver, step.as_ref(), &job, &refused);
        let has = driver.gpus.iter().filter(|gpu| allocation.has(gpu)).map(|gpu| gpu.minor).collect();
        (allocation, has)
    }

    const ALL: [u32; 4] = [0, 1, 2, 3];
    const MANAGED: Option<&str> = Some("GresTypes=mps, gpu # both\n");

    #[test]
    fn a_device_cgroup_says_it_all() {
        let (allocation, has) = allocation(Some(0), &["SLURM_STEP_GPUS=0,1"], MANAGED, &[0, 2]);
        assert_eq!(has, [1, 3]);
        let driver = Driver { version: String::new(), gpus: (0..4).map(gpu).collect() };
        let numbers = driver.gpus.iter().map(|gpu| allocation.slurms_number(&driver, gpu));
        assert_eq!(numbers.collect::<Vec<_>>(), [None, Some(0), None, Some(1)]);
    }

    #[test]
    fn without_one_slurm_is_believed() {
        let gpus = ["SLURM_STEP_GPUS=1,3", "SLURM_JOB_GPUS=0"];
        let (step, has) = allocation(Some(3), &gpus, None, &[]);
        assert_eq!(has, [1, 3]);
        assert_eq!(step.slurms_number(&Driver::default(), &gpu(3)), Some(3));
        for batch in [0xffff_fffa, 0xffff_fffb] {
            assert_eq!(allocation(Some(batch), &gpus, None, &[]).1, [0]);
        }
        assert_eq!(allocation(Some(0), &["SLURM_STEP_GPUS=NoDevFiles"], None, &[]).1, [0; 0]);
    }

    #[test]
    fn a_job_without_gpus_has_none_if_slurm_manages_them() {
        assert_eq!(allocation(Some(0), &["SLURM_JOB_GPUS=0"], MANAGED, &[]).1, [0; 0]);
        assert_eq!(allocation(Some(0), &["SLURM_GPUS_ON_NODE=2"], MANAGED, &[]).1, ALL);
        assert_eq!(allocation(Some(0), &[], Some("GresTypes=nic\n"), &[]).1, ALL);
        assert_eq!(allocation(Some(0), &[], None, &[]).1, ALL);
        assert_eq!(allocation(None, &["SLURM_STEP_GPUS=0"], MANAGED, &[]).1, ALL);
    }

    #[test]
    fn tasks_with_a_gpu_each_share_a_container() {
        let (allocation, has) = allocation_of_tasks(2, Some(0), &["SLURM_STEP_GPUS=1,3"], MANAGED, &[0, 2, 3]);
        assert_eq!(has, [1, 3]);
        // Slurm counts anew for each task, and so does the container.
        let driver = Driver { version: String::new(), gpus: (0..4).map(gpu).collect() };
        assert_eq!(allocation.slurms_number(&driver, &gpu(3)), Some(1));
        assert_eq!(allocation_of_tasks(2, Some(0), &[], MANAGED, &[0, 2, 3]).1, [1]);
    }
}
