//! OCI hooks of a container: those of its devices (CDI), then those of the administrator's directories. As enroot's hooks,
//! they run as the user, and can do nothing that he could not.

#![forbid(unsafe_code)]

use std::borrow::Cow;
use std::time::Duration;

use super::{InitError, Start, step};
use crate::devices::edits::{Hook, HookStage};
use crate::hooks::oci::bundle::Description;
use crate::hooks::oci::{self, Facts};
use crate::hooks::workspace::Workspace;
use crate::hooks::{Call, run};
use crate::image::config::ImageConfig;
use crate::mounts::entry::{Action, MountEntry};
use crate::request::Environment;

/// The hooks, and what they are told.
#[derive(Debug, Default)]
pub struct OciHooks {
    hooks: Vec<Hook>,
    /// For the last stage: what is there then has no bundle.
    state: Vec<u8>,
}

/// A container that is furnished, before its root is the root.
#[derive(Debug, Clone, Copy)]
pub struct Furnishing<'a> {
    /// Where its root is.
    pub root: &'a str,
    /// Whether it becomes read-only.
    pub is_readonly: bool,
    /// Whether its user is root inside.
    pub remap_root: bool,
    /// Its environment.
    pub environment: &'a Environment,
    /// The environment of what runs on the host for it.
    pub host: &'a Environment,
}

impl OciHooks {
    /// `of_devices` and what the directories say for this container; a line each for what is not run.
    pub fn find(
        start: &Start<'_>,
        image: &ImageConfig,
        of_devices: Vec<Hook>,
    ) -> Result<(Self, Vec<String>), InitError> {
        let is_bind = |entry: MountEntry| matches!(entry.action, Action::Bind { .. });
        let mut mounts = start.request.mounts.iter();
        let facts = Facts {
            annotations: &image.labels,
            has_bind_mounts: mounts.any(|spec| MountEntry::try_from(spec).is_ok_and(is_bind)),
        };
        let found = oci::find(&start.hooks.oci_directories, facts)
            .map_err(|error| InitError::Log(vec![format!("[ERROR] {error}")]))?;
        let hooks = of_devices.into_iter().chain(found.hooks).collect();
        Ok((Self { hooks, state: Vec::new() }, found.log))
    }

    /// Whether there is anything to run.
    pub fn is_empty(&self) -> bool {
        self.hooks.is_empty()
    }

    /// Runs the stages before the root is switched. Gives what the hooks have said.
    pub fn create(
        &mut self,
        start: &Start<'_>,
        image: &ImageConfig,
        container: Furnishing<'_>,
    ) -> Result<Vec<String>, InitError> {
        let bundle = Workspace::cover(start.runtime).map_err(step("OCI hooks"))?;
        let text = |(name, value): (&[u8], &[u8])| String::from_utf8_lossy(&[name, b"=", value].concat()).into_owned();
        let pid = rustix::process::getpid().as_raw_nonzero().get();
        let user = &start.request.user;
        let description = Description {
            id: match &start.request.step {
                Some(facts) => format!("{}.{}", facts.job_id, facts.step_id),
                None => format!("pyxis-{pid}"),
            },
            pid,
            bundle: &bundle,
            root: container.root,
            is_readonly: container.is_readonly,
            user: if container.remap_root { (0, 0) } else { (user.uid, user.gid) },
            env: container.environment.iter().map(text).collect(),
            args: [&image.entrypoint[..], &image.cmd].concat(),
            cwd: super::plan::workdir(image),
            annotations: &image.labels,
        };
        description.write().map_err(step("the OCI hooks' config.json"))?;
        self.state = description.state(HookStage::StartContainer);
        let mut said = Vec::new();
        for stage in [HookStage::CreateRuntime, HookStage::CreateContainer] {
            said.extend(self.run(start, stage, container.host, description.state(stage))?);
        }
        Ok(said)
    }

    /// Runs the last stage, inside the container and with its environment.
    pub fn start(&self, start: &Start<'_>, environment: &Environment) -> Result<Vec<String>, InitError> {
        self.run(start, HookStage::StartContainer, environment, self.state.clone())
    }

    fn run(
        &self,
        start: &Start<'_>,
        stage: HookStage,
        environment: &Environment,
        state: Vec<u8>,
    ) -> Result<Vec<String>, InitError> {
        let hooks = self.hooks.iter().filter(|hook| hook.stage == stage);
        let calls: Vec<Call<'_>> = hooks
            .map(|hook| {
                let (seconds, limit) = match hook.timeout_seconds {
                    Some(seconds) => (seconds, "its own timeout"),
                    None => (start.hooks.timeout_seconds, "[hooks] timeout_seconds"),
                };
                let mut environment = environment.clone();
                for (name, value) in hook.env.iter().filter_map(|entry| entry.split_once('=')) {
                    environment.set(name, value);
                }
                Call {
                    program: hook.path.clone(),
                    arguments: hook.args.clone(),
                    environment: Cow::Owned(environment),
                    input: state.clone(),
                    time: Duration::from_secs(seconds.into()),
                    limit,
                    name: format!("OCI hook {} of {}", hook.path.display(), hook.origin),
                }
            })
            .collect();
        if calls.is_empty() {
            return Ok(Vec::new());
        }
        run(&calls, &start.request.cwd).map_err(|error| {
            InitError::Log(error.log.into_iter().chain([format!("[ERROR] {}", error.reason)]).collect())
        })
    }
}
