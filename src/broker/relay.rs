//! What goes to and fro between the leading task and container init while a container starts.

#![forbid(unsafe_code)]

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags};
use rustix::process::Pid;

use super::error::{BrokerError, failed};
use super::named::Patience;
use super::squashfs::FuseServer;
use super::{Step, inventory, trace};
use crate::devices::access::DeviceAccess;
use crate::init::protocol::{FromInit, ToInit};
use crate::rootfs::cgroups;
use crate::sys;
use crate::sys::channel::Channel;
use crate::task::UserMessage;
use crate::task::protocol::{Entrypoint, ToBroker, ToLeader};

/// The leading task, as the broker sees it.
pub(super) struct Leader<'a> {
    pub channel: &'a Channel<ToLeader, ToBroker>,
    pub pid: Pid,
    /// It is in `task_init`, and so in its cgroups.
    arrived: bool,
    /// See [`ToBroker::LaunchedFrom`].
    pub launched_from: Option<String>,
    /// What it sent with `Proceed`.
    proceed: Option<Proceed>,
    /// What it has answered to `WantDevices`.
    devices: Option<DeviceAccess>,
}

/// See [`ToBroker::Proceed`].
struct Proceed {
    cgroup_namespace: bool,
    devices: DeviceAccess,
    descriptors: Vec<OwnedFd>,
}

impl<'a> Leader<'a> {
    pub fn new(channel: &'a Channel<ToLeader, ToBroker>, pid: Pid) -> Self {
        Self { channel, pid, proceed: None, devices: None, arrived: false, launched_from: None }
    }

    pub fn say(&self, message: UserMessage) {
        if let UserMessage::Log(line) = &message
            && trace::line(line)
        {
            return;
        }
        // A leader that is gone is noticed where the broker waits.
        let _ = self.channel.send(&ToLeader::Say(message), &[]);
    }

    fn receive(&mut self) -> Result<(), BrokerError> {
        match self.channel.receive().map_err(failed("task"))? {
            Some((ToBroker::LaunchedFrom { address }, _)) => self.launched_from = Some(address),
            Some((ToBroker::Arrived, _)) => self.arrived = true,
            Some((ToBroker::Proceed { cgroup_namespace, devices }, descriptors)) => {
                self.proceed = Some(Proceed { cgroup_namespace, devices, descriptors });
            }
            Some((ToBroker::Devices { devices }, _)) => self.devices = Some(devices),
            None => return Err(BrokerError::Cancelled),
        }
        Ok(())
    }

    pub fn wait_until_arrived(&mut self) -> Result<(), BrokerError> {
        while !self.arrived {
            self.receive()?;
        }
        Ok(())
    }
}

impl Step<'_> {
    /// Carries messages between leader and init until the container is ready; ends with the leader, the step or init.
    /// `None` if init was to join a container that has ended.
    pub(super) fn relay(
        &mut self,
        init: Pid,
        init_channel: &Channel<ToInit, FromInit>,
        server: Option<&FuseServer>,
    ) -> Result<Option<Ready>, BrokerError> {
        let Self { leader, life, config, request, host, began, .. } = self;
        let init = init.as_raw_nonzero().get();
        loop {
            let mut watched = [
                PollFd::new(leader.channel, PollFlags::IN | PollFlags::RDHUP),
                PollFd::new(init_channel, PollFlags::IN),
                PollFd::from_borrowed_fd(life.as_fd(), PollFlags::empty()),
                // Twice the same if there is no server.
                PollFd::from_borrowed_fd(server.map_or(life.as_fd(), |server| server.channel().as_fd()), PollFlags::IN),
            ];
            rustix::io::retry_on_intr(|| rustix::event::poll(&mut watched, None)).map_err(failed("poll"))?;
            let [from_leader, from_init, life_events, from_server] = watched.map(|descriptor| descriptor.revents());
            if !life_events.is_empty() {
                return Err(BrokerError::Cancelled);
            }
            // Before init, which fails without it and does not know why.
            if let (false, Some(server)) = (from_server.is_empty(), server) {
                server.receive()?;
            }
            if !from_init.is_empty() {
                match init_channel.receive().map_err(failed("container init"))? {
                    Some((FromInit::Say(message), _)) => leader.say(message),
                    // A child of ours that nobody has waited for: its pid means no other process, whoever controls it.
                    Some((FromInit::WantTaskCgroup, _)) => {
                        if let Err(error) = cgroups::join(init.unsigned_abs(), leader.pid) {
                            tracing::warn!("hooks stay outside the job's cgroup: {}", sys::reason(error));
                        }
                        init_channel.send(&ToInit::InTaskCgroup, &[]).map_err(|_| vanished())?;
                    }
                    Some((FromInit::WantInventory, _)) => {
                        let patience = Patience { leader: leader.channel.as_fd(), life: life.as_fd() };
                        let problem = inventory::take(patience, host.as_fd(), config, request.user.uid)?;
                        init_channel.send(&ToInit::Inventory { problem }, &[]).map_err(|_| vanished())?;
                    }
                    Some((FromInit::WantDevices, _)) => {
                        leader.channel.send(&ToLeader::WantDevices, &[]).map_err(|_| BrokerError::Cancelled)?;
                    }
                    Some((FromInit::Started, _)) => {
                        leader.channel.send(&ToLeader::Started { init }, &[]).map_err(|_| BrokerError::Cancelled)?;
                    }
                    Some((FromInit::Ready { workdir, entrypoint, cgroup_namespace, gpu_numbers }, descriptors)) => {
                        tracing::info!("completed container setup in {} ms", began.elapsed().as_millis());
                        return Ok(Some(Ready { workdir, entrypoint, cgroup_namespace, gpu_numbers, descriptors }));
                    }
                    Some((FromInit::Squashfuse { owner }, device)) => {
                        if let (Some(device), Some(server)) = (device.first(), server) {
                            server.serve(owner, device);
                        }
                    }
                    Some((FromInit::Gone, _)) => return Ok(None),
                    Some((FromInit::Failed { messages }, _)) => return Err(BrokerError::Init(messages)),
                    None => return Err(vanished()),
                }
            }
            if !from_leader.is_empty() {
                leader.receive()?;
                if let Some(devices) = leader.devices.take() {
                    init_channel.send(&ToInit::Devices { devices }, &[]).map_err(|_| vanished())?;
                }
                if let Some(Proceed { cgroup_namespace, devices, descriptors }) = leader.proceed.take() {
                    let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
                    let proceed = ToInit::Proceed { cgroup_namespace, devices };
                    init_channel.send(&proceed, &descriptors).map_err(|_| vanished())?;
                    // While init is busy: this takes some milliseconds.
                    if let Some(server) = server {
                        server.join(leader.pid);
                    }
                }
            }
        }
    }
}

/// What init says when the container can be joined.
pub(super) struct Ready {
    pub workdir: String,
    pub entrypoint: Option<Entrypoint>,
    pub cgroup_namespace: Option<bool>,
    pub gpu_numbers: Vec<(u32, u32)>,
    pub descriptors: Vec<OwnedFd>,
}

pub(super) fn vanished() -> BrokerError {
    BrokerError::Start("container init ended unexpectedly".into())
}
