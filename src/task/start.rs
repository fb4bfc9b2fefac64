//! The leading task's part: start the broker, and wait for the container it makes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, PidfdFlags, WaitOptions};
use rustix::thread::{ThreadNameSpaceType, UnshareFlags};

use super::protocol::{MAX_MEMORY_FILE, ToBroker, ToLeader, UserMessage, descriptors};
use super::shared::{Outcome, environment_file};
use super::{Container, entrypoint};
use crate::devices::access::DeviceAccess;
use crate::request::{Environment, StepRequest, TagMeaning};
use crate::sys::channel::{self, Channel};
use crate::sys::spawn::spawn;
use crate::sys::terminal::LiveLine;
use crate::sys::{self, memfile};

/// A started broker.
#[derive(Debug)]
pub struct StartingContainer {
    channel: Channel<ToBroker, ToLeader>,
    broker: Pid,
    /// Whether the broker has to know where `srun` is.
    agrees: bool,
}

/// Starts `executable` as the broker for `request` and returns at once.
pub fn start_broker(
    executable: &Path,
    config: &Path,
    request: &StepRequest,
    job_environment: &Environment,
    life: BorrowedFd<'_>,
) -> io::Result<StartingContainer> {
    let (channel, broker_end) = channel::pair::<ToBroker, ToLeader>()?;
    let agrees = matches!(request.meaning.as_deref().and_then(TagMeaning::parse), Some(TagMeaning::Asked(_)));
    let broker_end = OwnedFd::from(broker_end);
    let request = memfile::sealed("pyxis-request", &serde_json::to_vec(request)?)?;
    let environment = environment_file(job_environment)?;

    // A job's variables have no business in a root process.
    let variables = [c"PATH=/usr/sbin:/usr/bin:/sbin:/bin".to_owned(), c"LANG=C.UTF-8".to_owned()];
    let broker = spawn(
        executable,
        &[crate::cli::BROKER.as_bytes(), config.as_os_str().as_bytes()],
        &variables,
        &[
            (broker_end.as_fd(), descriptors::CHANNEL),
            (life, descriptors::LIFE),
            (request.as_fd(), descriptors::REQUEST),
            (environment.as_fd(), descriptors::ENVIRONMENT),
        ],
    )?;
    Ok(StartingContainer { channel, broker, agrees })
}

impl StartingContainer {
    /// Sends the task's environment and waits until the container can be joined. `say` is called for every message on
    /// the way; when the outcome is `Failed`, the reason has been said.
    pub fn finish(self, task_environment: &Environment, say: &mut dyn FnMut(UserMessage)) -> Outcome {
        let outcome = self.wait_until_ready(task_environment, say).unwrap_or_else(|reason| {
            say(UserMessage::error(reason));
            Outcome::Failed
        });
        if matches!(outcome, Outcome::Failed) {
            let _ = rustix::process::kill_process(self.broker, rustix::process::Signal::KILL);
        }
        // It ends when nobody listens any more. It must not stay a child of the rank: an MPI launcher would see its SIGCHLD.
        drop(self.channel);
        let _ = rustix::io::retry_on_intr(|| rustix::process::waitpid(Some(self.broker), WaitOptions::empty()));
        outcome
    }

    fn wait_until_ready(
        &self,
        task_environment: &Environment,
        say: &mut dyn FnMut(UserMessage),
    ) -> Result<Outcome, String> {
        let (mut entered, mut cgroup_namespace) = (false, false);
        // A thousand nodes need not say it all.
        let is_first_node = task_environment.get_str("SLURM_NODEID").is_none_or(|node| node == "0");
        let mut progress = LiveLine::stderr();
        // A broker that is gone has left a message that says why: it is read below.
        if let Some(address) = task_environment.get_str("SLURM_LAUNCH_NODE_IPADDR").filter(|_| self.agrees) {
            let _ = self.channel.send(&ToBroker::LaunchedFrom { address: address.to_owned() }, &[]);
        }
        let _ = self.channel.send(&ToBroker::Arrived, &[]);
        // While the broker is busy.
        let devices = DeviceAccess::of_this_process();
        loop {
            let received = self
                .channel
                .receive()
                .map_err(|error| format!("could not start container: broker: {}", sys::reason(error)))?;
            if !matches!(received, Some((ToLeader::Progress { .. }, _))) {
                progress.clear();
            }
            match received {
                Some((ToLeader::Say(message), _)) => say(message),
                Some((ToLeader::Progress { line, .. }, _)) if progress.is_live() => progress.show(&line),
                Some((ToLeader::Progress { line, due }, _)) => {
                    if due && is_first_node {
                        say(UserMessage::Notice(format!("pyxis: {line}")));
                    }
                }
                Some((ToLeader::WantDevices, _)) => {
                    // As above.
                    let _ = self.channel.send(&ToBroker::Devices { devices: devices.clone() }, &[]);
                }
                Some((ToLeader::Started { init }, _)) => {
                    let environment = environment_file(task_environment)
                        .map_err(|error| format!("could not start container: environment: {}", sys::reason(error)))?;
                    // If this fails because init has failed, the broker is about to say why; else joining will.
                    let entry = enter_user_namespace(init);
                    entered = entry.is_ok();
                    let namespace = entry.unwrap_or_default();
                    cgroup_namespace = namespace.is_some();
                    let mut descriptors = vec![environment.as_fd()];
                    descriptors.extend(namespace.as_ref().map(AsFd::as_fd));
                    let proceed = ToBroker::Proceed { cgroup_namespace, devices: devices.clone() };
                    let _ = self.channel.send(&proceed, &descriptors);
                }
                Some((
                    ToLeader::Ready { init, workdir, entrypoint, cgroup_namespace: there, gpu_numbers },
                    descriptors,
                )) => {
                    let cgroup_namespace = there.unwrap_or(cgroup_namespace);
                    let mut descriptors = descriptors.into_iter();
                    let block = descriptors
                        .next()
                        .ok_or("couldn't read container environment")
                        .map(|file| memfile::read_all(File::from(file), MAX_MEMORY_FILE))?
                        .map_err(|error| format!("couldn't read container environment: {}", sys::reason(error)))?;
                    let mut container =
                        Container::new(init, workdir, cgroup_namespace, Environment::from_block(&block));
                    container.entered = entered;
                    container.gpu_numbers = gpu_numbers;
                    let Some(entrypoint) = entrypoint else { return Ok(Outcome::Ready(container)) };
                    let report = descriptors.next().ok_or("couldn't run the entrypoint: no pipe")?;
                    let broker = (self.broker, self.channel.as_fd());
                    return Ok(match entrypoint::run(&entrypoint, &container, report, broker, say) {
                        Ok(prepared) => Outcome::Ready(container.prepared(prepared)),
                        Err(()) => Outcome::Failed,
                    });
                }
                Some((ToLeader::Failed, _)) => return Ok(Outcome::Failed),
                None => return Err("container start was interrupted".into()),
            }
        }
    }
}

/// Enters init's user namespace and makes the container's cgroup namespace there, rooted at the cgroup of the calling
/// task: init itself was started before Slurm had put the task into its cgroup, and moving a process costs milliseconds.
/// `None` where the kernel has no cgroup namespaces.
fn enter_user_namespace(init: i32) -> io::Result<Option<OwnedFd>> {
    let init = Pid::from_raw(init).ok_or_else(|| io::Error::other("no container init"))?;
    let init = rustix::process::pidfd_open(init, PidfdFlags::empty())?;
    rustix::thread::move_into_thread_name_spaces(init.as_fd(), ThreadNameSpaceType::USER)?;
    // SAFETY: a cgroup namespace changes what cgroup paths this single-threaded process sees, no descriptor or memory.
    if unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }.is_err() {
        return Ok(None);
    }
    Ok(Some(rustix::fs::open("/proc/self/ns/cgroup", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?))
}
