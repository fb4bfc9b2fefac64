//! What the broker and container init say to each other.
//!
//! ```text
//! init   → Say …                                at any time
//! init   → Started                              in its user namespace
//! broker → Root (+ detached overlay mount)      as soon as it exists: before Started
//!          or Squashfuse, to which init answers with Squashfuse (+ /dev/fuse), after Started
//!          or Tree
//! broker → Proceed (as the leader sent it)
//! init   → WantTaskCgroup                       if it starts programs on the host
//! broker → InTaskCgroup
//! init   → WantInventory                        if it needs to know more of GPUs than the kernel says
//! broker → Inventory
//! init   → Ready (+ environment)                or Failed
//! ```
//!
//! An init that joins a running container says `Ready` at once, or `Gone`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::devices::access::DeviceAccess;
use crate::task::UserMessage;
use crate::task::protocol::Entrypoint;

/// From the broker to init.
#[derive(Debug, Serialize, Deserialize)]
pub enum ToInit {
    /// One descriptor: the root filesystem, a detached mount.
    Root,
    /// Make the root filesystem yourself, over a FUSE server.
    Squashfuse,
    /// The root filesystem is a directory of the user's.
    Tree {
        /// Where it is on the host.
        path: PathBuf,
    },
    /// The descriptors of [`ToBroker::Proceed`](crate::task::protocol::ToBroker::Proceed).
    Proceed {
        /// Whether the second descriptor is there.
        cgroup_namespace: bool,
        /// What the cgroups keep the task from.
        devices: DeviceAccess,
    },
    /// The answer to [`FromInit::WantDevices`].
    Devices {
        /// What the cgroups keep the task from.
        devices: DeviceAccess,
    },
    /// [`FromInit::WantTaskCgroup`] is done.
    InTaskCgroup,
    /// [`FromInit::WantInventory`] is done.
    Inventory {
        /// Why there is none.
        problem: Option<String>,
    },
}

/// From init to the broker.
#[derive(Debug, Serialize, Deserialize)]
pub enum FromInit {
    /// Pass this on.
    Say(UserMessage),
    /// Init is in its user namespace, which others may join now.
    Started,
    /// Init is about to run what the site or the user wrote: that belongs into the task's cgroups, to which its children
    /// come with init itself. After Proceed.
    WantTaskCgroup,
    /// What is the task kept from? Before Ready, and without Proceed.
    WantDevices,
    /// The inventory of the node's GPUs ([`crate::devices::nvidia::inventory`]) is missing, or too old.
    WantInventory,
    /// One descriptor: `/dev/fuse`, mounted; somebody has to answer there.
    Squashfuse {
        /// Whose the files are in the user namespace.
        owner: (u32, u32),
    },
    /// The container can be joined. The descriptors of [`ToLeader::Ready`](crate::task::protocol::ToLeader::Ready).
    Ready {
        /// The image's working directory.
        workdir: String,
        /// What the leading task has to run first.
        entrypoint: Option<Entrypoint>,
        /// Whether the container has a cgroup namespace, if that is not the leader's to say: it was there before.
        cgroup_namespace: Option<bool>,
        /// As in [`ToLeader::Ready`](crate::task::protocol::ToLeader::Ready).
        gpu_numbers: Vec<(u32, u32)>,
    },
    /// The running container that init was to join has ended.
    Gone,
    /// The start failed.
    Failed {
        /// For the user.
        messages: Vec<UserMessage>,
    },
}
