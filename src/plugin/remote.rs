//! Remote context: `slurmstepd`, which manages one step on one node, and the tasks it forks.
//!
//! ```text
//! slurmstepd   init, options, init_post_opt   is a container asked for? then: shared state and life pipe
//!              user_init                      the request
//! task (root)  task_init_privileged           elect the leader; it starts the broker
//! task (user)  task_init                      the leader waits for the container, the others for the leader; join
//! slurmstepd   task_exit, exit                let the container go
//! ```
//!
//! Descriptors are made in `init_post_opt`: with `SlurmdParameters=contain_spank` the step manager runs `user_init` and
//! `task_exit` in a clone that shares its memory but not its descriptors.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::state::State;
use super::{Failed, Item, Spank, submit};
use crate::container::name::FullName;
use crate::options::Options;
use crate::options::arguments::Arguments;
use crate::request::{Environment, PROTOCOL_VERSION, SiteImporter, StepFacts, StepRequest, User};
use crate::task::importer;
use crate::task::saving::{TaskCount, run_under_saver};
use crate::task::{
    Container, JoinOptions, Leadership, LifePipe, Outcome, Role, StartingContainer, StepShared, UserMessage,
    start_broker,
};

/// `SLURM_BATCH_SCRIPT`: the step that runs the batch script.
const BATCH_STEP: u32 = 0xffff_fffb;
/// `SLURM_EXTERN_CONT`: the step that holds the allocation; it has no tasks of the user's.
const EXTERN_STEP: u32 = 0xffff_fffc;

/// What tasks say that did not try to start the container themselves.
const FAILED_ELSEWHERE: &str = "container was not started successfully by another task";

/// A step that asked for a container.
#[derive(Debug)]
pub struct Step {
    /// The step manager: not its clones, not its tasks.
    manager: u32,
    options: Options,
    /// What `srun` has learned of the image's tag.
    meaning: Option<String>,
    arguments: Arguments,
    shared: StepShared,
    life: Option<LifePipe>,
    /// With `--container-save`.
    count: Option<TaskCount>,
    request: Option<StepRequest>,
    environment: Environment,
    /// What `task_init_privileged` decided, in a task.
    role: Option<TaskRole>,
    ended: BTreeSet<u32>,
    /// The site's importer has been told that the step is over.
    released: bool,
}

#[derive(Debug)]
enum TaskRole {
    Leader(Leadership, StartingContainer),
    Follower,
    Broken(String),
}

/// `slurm_spank_init`.
pub fn init(state: &mut State, spank: &mut dyn Spank, arguments: &[&str]) {
    if is_extern(spank) {
        return;
    }
    state.arguments = Arguments::parse(arguments.iter().copied());
    if submit::register(spank).is_err() {
        state.fail_later("couldn't register options on this node; its slurmd log says why".into());
    }
}

/// `slurm_spank_init_post_opt`.
pub fn init_post_opt(state: &mut State, spank: &mut dyn Spank) {
    if is_extern(spank) || state.failure().is_some() {
        return;
    }
    match Step::prepare(state, spank) {
        Ok(step) => state.step = step,
        Err(reason) => state.fail_later(reason),
    }
}

/// `slurm_spank_user_init`.
pub fn user_init(state: &mut State, spank: &mut dyn Spank) {
    let Some(step) = &mut state.step else { return };
    if let Err(reason) = step.collect(spank) {
        state.fail_later(reason);
    }
}

/// `slurm_spank_task_init_privileged`.
pub fn task_init_privileged(state: &mut State, _spank: &mut dyn Spank) {
    if state.failure().is_some() {
        return;
    }
    let Some(step) = &mut state.step else { return };
    step.role = Some(step.take_role().unwrap_or_else(TaskRole::Broken));
    // The step manager alone keeps the container: if it is killed, broker and init must see it, whoever waits for them.
    if step.manager != std::process::id() {
        step.life = None;
    }
}

/// `slurm_spank_task_init`.
pub fn task_init(state: &mut State, spank: &mut dyn Spank) -> Result<(), Failed> {
    if let Some(reason) = state.failure() {
        // Once a node is enough.
        let told_by_first = spank.number(Item::TaskId).is_ok_and(|task| task > 0);
        spank.say(UserMessage::error(if told_by_first { FAILED_ELSEWHERE } else { reason }));
        return Err(Failed);
    }
    let Some(step) = &mut state.step else { return Ok(()) };
    step.enter_container(spank).map_err(|reason| {
        if let Some(reason) = reason {
            spank.say(UserMessage::error(reason));
        }
        Failed
    })
}

/// `slurm_spank_task_exit`: when the last task of the step has ended, so does its container, before the step manager
/// looks for processes that are left.
pub fn task_exit(state: &mut State, spank: &mut dyn Spank) {
    let Some(step) = &mut state.step else { return };
    if step.manager != std::process::id() {
        return;
    }
    let tasks = step.request.as_ref().and_then(|request| request.step.as_ref()).map_or(0, |facts| facts.local_tasks);
    if let Ok(task) = spank.number(Item::TaskId) {
        step.ended.insert(task);
    }
    if step.ended.len() >= tasks as usize {
        if let Some(life) = step.life.take() {
            life.end();
        }
        step.release(spank);
    }
}

impl Step {
    /// Decides whether a container is asked for and makes what its tasks share.
    fn prepare(state: &State, spank: &mut dyn Spank) -> Result<Option<Self>, String> {
        let mut options = state.options().clone();
        for (id, variable) in submit::MERGED_LISTS {
            let Some(merged) = spank.variable(variable) else { continue };
            options.complete_list(id, &merged).map_err(|error| error.to_string())?;
            // Not for the commands inside: theirs are other lists.
            let _ = spank.remove_variable(variable.as_bytes());
        }
        let meaning = spank.variable(submit::MEANING).map(|text| String::from_utf8_lossy(&text).into_owned());
        if meaning.is_some() {
            // It is about this step's image.
            let _ = spank.remove_variable(submit::MEANING.as_bytes());
        }
        let options = options.with_environment(|name| spank.variable(name)).map_err(|error| error.to_string())?;
        if !options.enabled() {
            return match spank.variable(submit::REQUESTED).filter(|image| !image.is_empty()) {
                Some(image) if spank.number(Item::StepId) == Ok(BATCH_STEP) => Err(format!(
                    "sbatch --export keeps this Slurm from passing on --container-image={}: submit the job with \
                     --export=ALL",
                    String::from_utf8_lossy(&image)
                )),
                _ => Ok(None),
            };
        }
        let arguments = match &state.arguments {
            Ok(arguments) => arguments.clone(),
            Err(error) => return Err(format!("{error} (in plugstack.conf of this node)")),
        };
        if spank.variable("SLURM_CONTAINER").is_some_and(|value| !value.is_empty()) {
            return Err(submit::TWO_CONTAINERS.into());
        }
        let failed = |error: io::Error| format!("couldn't set up the step's shared state: {error}");
        let count = if options.save.is_some() { Some(TaskCount::create().map_err(failed)?) } else { None };
        Ok(Some(Self {
            manager: std::process::id(),
            count,
            options,
            meaning,
            arguments,
            shared: StepShared::create().map_err(failed)?,
            life: Some(LifePipe::create().map_err(failed)?),
            request: None,
            environment: Environment::default(),
            role: None,
            ended: BTreeSet::new(),
            released: false,
        }))
    }

    /// Collects everything that the container start needs to know about the step.
    fn collect(&mut self, spank: &dyn Spank) -> Result<(), String> {
        let number =
            |item: Item| spank.number(item).map_err(|error| format!("couldn't get job {}: {error}", item.name()));
        let step_id = number(Item::StepId)?;
        let user = User {
            uid: number(Item::Uid)?,
            gid: number(Item::Gid)?,
            groups: spank.groups().map_err(|error| format!("couldn't get job supplementary group ids: {error}"))?,
        };
        let facts = StepFacts {
            job_id: number(Item::JobId)?,
            step_id,
            local_tasks: number(Item::LocalTasks)?,
            total_tasks: number(Item::TotalTasks)?,
        };
        let batch_script = if step_id == BATCH_STEP { Some(batch_script(spank)?) } else { None };
        self.environment = spank.environment().map_err(|error| format!("couldn't get job environment: {error}"))?;
        self.request = Some(StepRequest {
            protocol: PROTOCOL_VERSION,
            user,
            step: Some(facts),
            image: self.options.image.clone(),
            pull: self.options.pull,
            meaning: self.meaning.clone(),
            name: self.options.name.clone(),
            job_scope: self.arguments.job_scope,
            save: self.options.save.clone(),
            entrypoint: self.options.entrypoint.unwrap_or(self.arguments.execute_entrypoint),
            entrypoint_log: self.options.entrypoint_log.unwrap_or(false),
            unshare: self.options.unshare,
            devices: self.options.devices.clone(),
            importer: self.arguments.importer.clone().map(|program| {
                let runtime = self.arguments.runtime_path.clone();
                SiteImporter { program, runtime }
            }),
            // Slurm has changed to the step's directory, or to /tmp if it could not.
            cwd: std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/")),
            mounts: self.options.mounts.clone(),
            container_env: self.options.env.clone(),
            workdir: self.options.workdir.clone(),
            mount_home: self.options.mount_home,
            remap_root: self.options.remap_root,
            writable: self.options.writable,
            batch_script,
        });
        Ok(())
    }

    /// What goes to the broker, once `user_init` has run.
    pub fn request(&self) -> Option<&StepRequest> {
        self.request.as_ref()
    }

    /// Lets the site's importer clean up after the step.
    fn release(&mut self, spank: &mut dyn Spank) {
        let Some(request) = self.request.as_ref().filter(|request| importer::is_asked(request)) else { return };
        if std::mem::replace(&mut self.released, true) {
            return;
        }
        if let Err(error) = importer::release(&self.arguments.executable, request, &self.environment) {
            spank.say(UserMessage::Log(format!("pyxis: failed to call importer release: {error}")));
        }
    }

    /// Whether this process still holds the container.
    pub fn keeps_container_alive(&self) -> bool {
        self.life.is_some()
    }

    /// In a task, as root: takes part in the election; the leader starts the broker. Never waits.
    fn take_role(&self) -> Result<TaskRole, String> {
        let (Some(request), Some(life)) = (&self.request, &self.life) else {
            return Err("internal error: no request for this step; please report it".into());
        };
        let leadership =
            match self.shared.elect().map_err(|error| format!("couldn't lock the step's state: {error}"))? {
                Role::Leader(leadership) => leadership,
                Role::Follower => return Ok(TaskRole::Follower),
            };
        let Arguments { executable, config, .. } = &self.arguments;
        match start_broker(executable, config, request, &self.environment, life.read.as_fd()) {
            Ok(starting) => Ok(TaskRole::Leader(leadership, starting)),
            Err(error) => {
                // Without it the others would find a dead leader, which says less.
                let _ = self.shared.publish(leadership, &Outcome::Failed);
                Err(format!("couldn't start the container: {error}; is pyxis installed on this node?"))
            }
        }
    }

    /// In a task, as the user: waits for the container and enters it. The error is what is left to say.
    fn enter_container(&mut self, spank: &mut dyn Spank) -> Result<(), Option<String>> {
        let task = spank.environment().map_err(|error| format!("couldn't get task environment: {error}"))?;
        let container = self.wait_for_container(&task, spank)?;
        self.save_when_done(&container, spank)?;
        let options = JoinOptions {
            container_env: self.options.env.clone(),
            workdir: self.options.workdir.clone(),
            unshare: self.options.unshare,
        };
        let environment = container.task_environment(&task, &options);
        for (name, value) in task.changes_to(&environment) {
            let changed = match value {
                Some(value) => spank.set_variable(name, value),
                None => spank.remove_variable(name),
            };
            changed.map_err(|error| {
                format!("failed to set environment variable {}: {error}", String::from_utf8_lossy(name))
            })?;
        }
        container.join(&options)?;
        if let Some(count) = &self.count {
            count.joined().map_err(|error| format!("couldn't count the step's tasks: {error}"))?;
        }
        Ok(())
    }

    /// With `--container-save`: makes this task the child of a process that saves the container when all have ended.
    fn save_when_done(&self, container: &Container, spank: &mut dyn Spank) -> Result<(), String> {
        let (Some(count), Some(request)) = (&self.count, &self.request) else { return Ok(()) };
        let (Some(target), Some(facts)) = (&request.save, &request.step) else { return Ok(()) };
        // The batch script alone may be sent signals, and Slurm sends them to the process that it has started.
        let forward_signals = facts.step_id == BATCH_STEP;
        // The options have been checked, and a step has a name: there is one.
        let name = FullName::of(request).ok().flatten().map(|(name, _)| name.to_string()).unwrap_or_default();
        let save = container.save_request(name, target.clone(), facts.local_tasks, forward_signals);
        let Arguments { executable, config, .. } = &self.arguments;
        run_under_saver(executable, config, &save, &self.environment, count, &mut |message| spank.say(message))?;
        // Slurm's is that of the saver.
        spank
            .set_variable(b"SLURM_TASK_PID", std::process::id().to_string().as_bytes())
            .map_err(|error| format!("failed to set environment variable SLURM_TASK_PID: {error}"))
    }

    fn wait_for_container(&mut self, task: &Environment, spank: &mut dyn Spank) -> Result<Container, Option<String>> {
        match self.role.take() {
            Some(TaskRole::Leader(leadership, starting)) => {
                let outcome = starting.finish(task, &mut |message| spank.say(message));
                self.shared
                    .publish(leadership, &outcome)
                    .map_err(|error| format!("couldn't tell the other tasks about the container: {error}"))?;
                match outcome {
                    Outcome::Ready(container) => Ok(container),
                    Outcome::Failed => Err(None),
                }
            }
            Some(TaskRole::Follower) => {
                let outcome = self
                    .shared
                    .wait()
                    .map_err(|error| format!("couldn't wait for the task that starts the container: {error}"))?;
                match outcome {
                    Some(Outcome::Ready(container)) => Ok(container),
                    Some(Outcome::Failed) => Err(Some(FAILED_ELSEWHERE.into())),
                    None => Err(Some("a previous task terminated unexpectedly during container setup".into())),
                }
            }
            Some(TaskRole::Broken(reason)) => Err(Some(reason)),
            None => Err(Some("internal error: task_init without task_init_privileged; please report it".into())),
        }
    }
}

fn is_extern(spank: &dyn Spank) -> bool {
    spank.number(Item::StepId) == Ok(EXTERN_STEP)
}

/// The copy of the batch script in slurmd's spool directory, which slurmstepd executes.
fn batch_script(spank: &dyn Spank) -> Result<PathBuf, String> {
    let arguments = spank.arguments().map_err(|error| format!("couldn't get job argv: {error}"))?;
    match arguments.into_iter().next() {
        Some(script) => Ok(PathBuf::from(OsString::from_vec(script))),
        None => Err("couldn't get sbatch script: argc == 0".into()),
    }
}
