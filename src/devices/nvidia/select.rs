//! Which of a job's GPUs, and which parts of divided ones, `NVIDIA_VISIBLE_DEVICES` means: numbers are those of NVML in the
//! job, which counts what the job can open, in the order of the bus.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use super::NvidiaError;
use super::allocation::Allocation;
use super::driver::{BusId, Driver, Gpu, Instance};
use super::inventory::Inventory;
use super::wish::shown;

/// Where to get the inventory, if it is needed after all.
pub type TakeInventory<'a> = dyn FnMut() -> Result<Inventory, String> + 'a;

/// What a job has, in NVML's order.
#[derive(Debug)]
pub struct Candidates<'a> {
    gpus: Vec<Candidate<'a>>,
    inventory: Option<Result<Inventory, String>>,
}

#[derive(Debug)]
struct Candidate<'a> {
    gpu: &'a Gpu,
    instances: Vec<&'a Instance>,
}

/// A GPU that was chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chosen<'a> {
    /// The GPU.
    pub gpu: &'a Gpu,
    /// Parts of it; all the job has if it was chosen as a whole.
    pub instances: Vec<&'a Instance>,
}

impl<'a> Candidates<'a> {
    /// The GPUs of `driver` that `allocation` has.
    pub fn new(driver: &'a Driver, allocation: &Allocation) -> Self {
        let gpus = driver.gpus.iter().filter(|gpu| allocation.has(gpu));
        let instances =
            |gpu: &'a Gpu| gpu.instances.iter().filter(|instance| allocation.has_instance(instance)).collect();
        Self { gpus: gpus.map(|gpu| Candidate { gpu, instances: instances(gpu) }).collect(), inventory: None }
    }

    /// The inventory, taken at most once.
    pub fn inventory(&mut self, take: &mut TakeInventory<'_>) -> Result<&Inventory, &str> {
        self.inventory.get_or_insert_with(take).as_ref().map_err(String::as_str)
    }

    /// What the words of a list mean, in NVML's order.
    pub fn choose(&mut self, words: &[String], take: &mut TakeInventory<'_>) -> Result<Vec<Chosen<'a>>, NvidiaError> {
        if words.iter().any(|word| pair(word).is_some()) {
            self.order_as_nvml(take);
        }
        let mut chosen = vec![None::<BTreeSet<usize>>; self.gpus.len()];
        for word in words {
            if word == "all" {
                for (candidate, chosen) in self.gpus.iter().zip(&mut chosen) {
                    *chosen = Some((0..candidate.instances.len()).collect());
                }
                continue;
            }
            let (gpu, part) = match self.find(word, take) {
                Ok(Some(found)) => found,
                Ok(None) => return Err(self.unknown(word)),
                Err(reason) => return Err(NvidiaError::Nvml(format!("{}: {reason}", shown(word)))),
            };
            let (Some(candidate), Some(chosen)) = (self.gpus.get(gpu), chosen.get_mut(gpu)) else {
                return Err(self.unknown(word));
            };
            let chosen = chosen.get_or_insert_default();
            match part {
                Some(part) => chosen.extend([part]),
                None => chosen.extend(0..candidate.instances.len()),
            }
        }
        let pairs = self.gpus.iter().zip(chosen).filter_map(|(candidate, chosen)| Some((candidate, chosen?)));
        Ok(pairs
            .map(|(candidate, chosen)| Chosen {
                gpu: candidate.gpu,
                instances: chosen.into_iter().filter_map(|part| candidate.instances.get(part).copied()).collect(),
            })
            .collect())
    }

    /// Positions of a GPU and maybe of one of its instances.
    fn find(&mut self, word: &str, take: &mut TakeInventory<'_>) -> Result<Option<(usize, Option<usize>)>, String> {
        let lower = word.to_ascii_lowercase();
        if let Some(index) = number(word) {
            return Ok((index < self.gpus.len()).then_some((index, None)));
        }
        if let Some((gpu, part)) = pair(word) {
            let is_there = self.gpus.get(gpu).is_some_and(|candidate| part < candidate.instances.len());
            return Ok(is_there.then_some((gpu, Some(part))));
        }
        if let Some(bus) = BusId::parse(word) {
            return Ok(self.gpus.iter().position(|candidate| candidate.gpu.bus == bus).map(|gpu| (gpu, None)));
        }
        // What drivers before 470 called them.
        if let Some((gpu, [gpu_instance, compute_instance])) = old_name(&lower) {
            let Some(gpu) = self.by_uuid(gpu, take)? else { return Ok(None) };
            let is_it = |instance: &&&Instance| {
                [instance.gpu_instance, instance.compute_instance] == [gpu_instance, compute_instance]
            };
            let instances = self.gpus.get(gpu).map(|candidate| candidate.instances.iter()).unwrap_or_default();
            let part = instances.enumerate().find(|(_, instance)| is_it(instance)).map(|(part, _)| part);
            return Ok(part.map(|part| (gpu, Some(part))));
        }
        if lower.starts_with("mig-") {
            return self.by_instance_uuid(&lower, take);
        }
        match lower.starts_with("gpu-") {
            true => Ok(self.by_uuid(&lower, take)?.map(|gpu| (gpu, None))),
            false => Ok(None),
        }
    }

    /// Whatever NVML says: if it says nothing, their order is that of their numbers.
    fn order_as_nvml(&mut self, take: &mut TakeInventory<'_>) {
        let is_divided = |candidate: &Candidate<'_>| candidate.instances.len() > 1;
        if !self.gpus.iter().any(is_divided) {
            return;
        }
        let Ok(inventory) = self.inventory(take).cloned() else { return };
        for candidate in &mut self.gpus {
            let Some(known) = inventory.gpu(candidate.gpu.minor) else { continue };
            candidate.instances.sort_by_key(|instance| {
                let key = (instance.gpu_instance, instance.compute_instance);
                known.instances.iter().position(|known| (known.gpu_instance, known.compute_instance) == key)
            });
        }
    }

    /// The only GPU whose identifier, in lower case, begins so.
    fn by_uuid(&mut self, prefix: &str, take: &mut TakeInventory<'_>) -> Result<Option<usize>, String> {
        if self.gpus.iter().any(|candidate| candidate.gpu.uuid.is_none()) {
            self.inventory(take).map_err(str::to_owned)?;
        }
        let begins = |candidate: &Candidate<'_>| {
            self.uuid(candidate.gpu).is_some_and(|uuid| uuid.to_ascii_lowercase().starts_with(prefix))
        };
        Ok(only(self.gpus.iter().enumerate().filter(|(_, candidate)| begins(candidate)).map(|(index, _)| index)))
    }

    fn uuid<'b>(&'b self, gpu: &'b Gpu) -> Option<&'b str> {
        let known = || Some(self.inventory.as_ref()?.as_ref().ok()?.gpu(gpu.minor)?.uuid.as_str());
        gpu.uuid.as_deref().or_else(known)
    }

    fn by_instance_uuid(
        &mut self,
        prefix: &str,
        take: &mut TakeInventory<'_>,
    ) -> Result<Option<(usize, Option<usize>)>, String> {
        if self.gpus.iter().all(|candidate| candidate.instances.is_empty()) {
            return Ok(None);
        }
        let inventory = self.inventory(take).map_err(str::to_owned)?.clone();
        let mut found = Vec::new();
        for (index, candidate) in self.gpus.iter().enumerate() {
            let known = inventory.gpu(candidate.gpu.minor).map(|gpu| gpu.instances.as_slice()).unwrap_or_default();
            for known in known.iter().filter(|known| known.uuid.to_ascii_lowercase().starts_with(prefix)) {
                let key = (known.gpu_instance, known.compute_instance);
                let is_it = |instance: &&Instance| (instance.gpu_instance, instance.compute_instance) == key;
                found.extend(candidate.instances.iter().position(is_it).map(|part| (index, Some(part))));
            }
        }
        Ok(only(found.into_iter()))
    }

    fn unknown(&self, word: &str) -> NvidiaError {
        let name = |(index, candidate): (usize, &Candidate<'_>)| match self.uuid(candidate.gpu) {
            Some(uuid) => format!("{index} ({uuid})"),
            None => index.to_string(),
        };
        let available: Vec<String> = self.gpus.iter().enumerate().map(name).collect();
        NvidiaError::UnknownDevice { device: shown(word), available: available.join(", ") }
    }
}

/// The one that there is.
fn only<T>(mut found: impl Iterator<Item = T>) -> Option<T> {
    let first = found.next()?;
    found.next().is_none().then_some(first)
}

/// `GPU:PART`.
fn pair(word: &str) -> Option<(usize, usize)> {
    let (gpu, part) = word.split_once(':')?;
    Some((number(gpu)?, number(part)?))
}

fn number(text: &str) -> Option<usize> {
    match text.len() <= 4 && text.bytes().all(|byte| byte.is_ascii_digit()) {
        true => text.parse().ok(),
        false => None,
    }
}

/// `mig-gpu-UUID/GPU-INSTANCE/COMPUTE-INSTANCE`.
fn old_name(lower: &str) -> Option<(&str, [u32; 2])> {
    let (gpu, instances) = lower.strip_prefix("mig-").filter(|rest| rest.starts_with("gpu-"))?.split_once('/')?;
    let (gpu_instance, compute_instance) = instances.split_once('/')?;
    Some((gpu, [gpu_instance.parse().ok()?, compute_instance.parse().ok()?]))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::inventory::{KnownGpu, KnownInstance};
    use super::*;
    use crate::devices::access::DeviceAccess;
    use crate::devices::host::Host;
    use crate::request::Environment;

    fn uuid(minor: u32) -> String {
        format!("GPU-{minor}e7c61bb-d2ff-8a03-fd3c-f43e660581e9")
    }

    /// Four GPUs, of which number 2 is divided in three; minors are not in the order of the bus.
    fn driver() -> Driver {
        let gpu = |(place, minor): (u32, u32)| {
            let directory = format!("0000:{place:02x}:00.0");
            let instance = |(gpu_instance, compute_instance, first)| Instance {
                gpu_instance,
                compute_instance,
                capabilities: [first, first + 1],
            };
            let instances: Vec<_> = match minor {
                2 => [(1, 0, 30), (7, 0, 70), (8, 0, 80)].map(instance).into(),
                _ => vec![],
            };
            let bus = BusId::parse(&directory).unwrap();
            Gpu { bus, directory, uuid: Some(uuid(minor)), minor, instances }
        };
        Driver { version: "580.1".into(), gpus: [(1, 0), (2, 1), (0x41, 3), (0xc1, 2)].map(gpu).into() }
    }

    fn inventory() -> Inventory {
        let instance = |(digit, gpu_instance)| KnownInstance {
            uuid: format!("MIG-{digit}f6b7b9a-5a77-5e6e-b3c8-a1ddf5d9b3ad"),
            gpu_instance,
            compute_instance: 0,
        };
        let instances = [('7', 7), ('8', 8), ('1', 1)].map(instance).into();
        let gpu = KnownGpu { minor: 2, uuid: uuid(2), instances, ..KnownGpu::default() };
        Inventory { gpus: vec![gpu], ..Inventory::default() }
    }

    /// Minors and the GPU instances of what is chosen.
    fn choose(list: &str, refused: &DeviceAccess) -> Result<Vec<(u32, Vec<u32>)>, String> {
        let driver = driver();
        let allocation = Allocation::of(&Host::at("/nonexistent"), &driver, None, &Environment::default(), refused);
        let words: Vec<String> = list.split(',').map(str::to_owned).collect();
        let chosen = Candidates::new(&driver, &allocation).choose(&words, &mut || Ok(inventory()));
        let flat = |one: Chosen<'_>| (one.gpu.minor, one.instances.iter().map(|part| part.gpu_instance).collect());
        chosen.map(|chosen| chosen.into_iter().map(flat).collect()).map_err(|error| error.to_string())
    }

    fn all(list: &str) -> Vec<(u32, Vec<u32>)> {
        choose(list, &DeviceAccess::default()).unwrap_or_else(|error| panic!("{list}: {error}"))
    }

    #[test]
    fn every_way_to_name_a_gpu() {
        let divided = (2, vec![1, 7, 8]);
        assert_eq!(all("all"), [(0, vec![]), (1, vec![]), (3, vec![]), divided.clone()]);
        assert_eq!(all("2"), [(3, vec![])]);
        assert_eq!(all("3"), std::slice::from_ref(&divided));
        assert_eq!(all("1,0"), [(0, vec![]), (1, vec![])]);
        for name in [uuid(3), uuid(3).to_lowercase(), uuid(3).to_uppercase(), "GPU-3".into(), "GPU-3e7c61".into()] {
            assert_eq!(all(&name), [(3, vec![])], "{name}");
        }
        for name in ["00000000:41:00.0", "0000:41:00.0", "41:00.0"] {
            assert_eq!(all(name), [(3, vec![])], "{name}");
        }
        assert_eq!(all("0,0,GPU-0"), [(0, vec![])]);
    }

    #[test]
    fn every_way_to_name_a_part() {
        // In NVML's order.
        assert_eq!(all("3:0"), [(2, vec![7])]);
        assert_eq!(all("3:2"), [(2, vec![1])]);
        assert_eq!(all("MIG-8f6b7b9a-5a77-5e6e-b3c8-a1ddf5d9b3ad"), [(2, vec![8])]);
        assert_eq!(all("mig-8F,MIG-1"), [(2, vec![1, 8])]);
        assert_eq!(all(&format!("MIG-{}/7/0", uuid(2))), [(2, vec![7])]);
        assert_eq!(all("3:0,3"), [(2, vec![7, 8, 1])]);
    }

    #[test]
    fn what_is_unknown_is_said_with_what_is_known() {
        for name in
            ["4", "0:0", "3:3", "GPU-4", "GPU-", "MIG-2", "MIG-GPU-2/2/0", "42:00.0", "ALL", "-1", "x y", "9999999"]
        {
            let error = choose(name, &DeviceAccess::default()).unwrap_err();
            let start = format!("nvidia-container-cli: device error: {name}: unknown device");
            assert!(error.starts_with(&start) && error.contains(&format!("0 ({})", uuid(0))), "{error}");
        }
    }

    #[test]
    fn numbers_count_what_the_job_has() {
        let refused = ["nvidia0", "nvidia3", "nvidia-caps/nvidia-cap70"].into_iter().collect();
        assert_eq!(choose("all", &refused).unwrap(), [(1, vec![]), (2, vec![1, 8])]);
        assert_eq!(choose("0", &refused).unwrap(), [(1, vec![])]);
        assert_eq!(choose("1:0", &refused).unwrap(), [(2, vec![8])]);
        assert!(choose("2", &refused).is_err());
        assert!(choose(&uuid(3), &refused).is_err());
        assert!(choose("MIG-7", &refused).is_err());
        let none = (0..4).map(|minor| format!("nvidia{minor}")).collect();
        assert_eq!(choose("all", &none).unwrap(), []);
    }

    proptest! {
        #[test]
        fn any_list_chooses_or_is_refused_in_one_line(list in "([0-9:.,/A-Za-z-]|GPU-|MIG-|all){0,30}|\\PC{0,20}") {
            match choose(&list, &DeviceAccess::default()) {
                Ok(chosen) => prop_assert!(chosen.len() <= 4),
                Err(error) => prop_assert!(!error.contains('\n')),
            }
        }
    }
}
