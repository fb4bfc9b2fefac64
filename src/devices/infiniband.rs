//! InfiniBand and RoCE devices of NVIDIA's (Mellanox's), as `MELLANOX_VISIBLE_DEVICES` says (behaviour reference, section
//! 19): device nodes, and views of `/sys/class` with those devices only. What programs need to use them is in `verbs`.
//!
//! Without the variable nothing is done: the host's `/dev` and `/sys` show every device.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use super::edits::{ContainerEdits, DeviceNode, Link};
use super::host::Host;
use crate::mounts::entry::MountEntry;

/// Drivers of the kernel, in the order in which their devices are counted.
const DRIVERS: [&str; 2] = ["mlx4", "mlx5"];
/// Directories of `/sys/class` that list devices. Nodes need not have all of them.
const CLASSES: [&str; 4] = ["infiniband", "infiniband_verbs", "infiniband_mad", "infiniband_cm"];
/// The node for connections.
const CONNECTION_MANAGER: &str = "/dev/infiniband/rdma_cm";
/// Longest part of a value that is repeated to the user.
const MAX_SHOWN: usize = 100;

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its driver in user space: `mlx5`.
    pub provider: &'static str,
    /// Its address on the PCI bus.
    pub address: String,
    /// Class and name of what it is in `/sys/class`: `infiniband_verbs`, `uverbs0`.
    pub names: Vec<(&'static str, String)>,
}

/// A wish that cannot be fulfilled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InfinibandError {
    /// In enroot's words.
    #[error("Unknown MELLANOX device id: {id}; MELLANOX_VISIBLE_DEVICES counts the node's {count} devices from 0")]
    UnknownDevice {
        /// As it was written.
        id: String,
        /// How many there are.
        count: usize,
    },
}

impl Device {
    /// The node's devices, in the order of their addresses.
    pub fn all(node: &Host) -> Vec<Self> {
        let mut devices = Vec::new();
        for provider in DRIVERS {
            let driver = format!("/sys/bus/pci/drivers/{provider}_core");
            for address in node.names(&driver).into_iter().filter(|name| name.contains(':')) {
                let of_class = |class: &'static str| {
                    let names = node.names(format!("{driver}/{address}/{class}"));
                    names.into_iter().map(move |name| (class, name))
                };
                let names: Vec<_> = CLASSES.into_iter().flat_map(of_class).collect();
                if names.iter().any(|(class, _)| *class == "infiniband_verbs") {
                    devices.push(Self { provider, address, names });
                }
            }
        }
        devices
    }

    /// Its name, as tools show it: `mlx5_0`.
    pub fn name(&self) -> &str {
        self.names.iter().find(|(class, _)| *class == "infiniband").map_or(&self.address, |(_, name)| name)
    }

    /// Its nodes, those of management too.
    pub fn nodes(&self) -> impl Iterator<Item = String> + '_ {
        let of_node = |class: &str| matches!(class, "infiniband_verbs" | "infiniband_mad");
        self.names.iter().filter(move |(class, _)| of_node(class)).map(|(_, name)| format!("/dev/infiniband/{name}"))
    }

    fn verbs(&self) -> impl Iterator<Item = String> + '_ {
        self.nodes().filter(|path| path.starts_with("/dev/infiniband/uverbs"))
    }
}

/// Whether the value of `MELLANOX_VISIBLE_DEVICES` asks for nothing.
pub fn is_nothing(wanted: Option<&[u8]>) -> bool {
    matches!(wanted, None | Some(b"" | b"void" | b"none"))
}

/// Which of `devices` are `wanted`.
pub fn choose<'a>(devices: &'a [Device], wanted: Option<&[u8]>) -> Result<Vec<&'a Device>, InfinibandError> {
    let text = match wanted {
        _ if is_nothing(wanted) => return Ok(Vec::new()),
        Some(b"all") => return Ok(devices.iter().collect()),
        other => String::from_utf8_lossy(other.unwrap_or_default()),
    };
    let mut chosen = Vec::new();
    for id in text.split(',').map(str::trim).filter(|id| !id.is_empty()) {
        let is_number = id.bytes().all(|byte| byte.is_ascii_digit());
        let device = id.parse::<usize>().ok().filter(|_| is_number).and_then(|number| devices.get(number));
        let device = device.ok_or_else(|| InfinibandError::UnknownDevice {
            id: id.chars().take(MAX_SHOWN).flat_map(char::escape_debug).collect(),
            count: devices.len(),
        })?;
        if !chosen.contains(&device) {
            chosen.push(device);
        }
    }
    Ok(chosen)
}

/// What the container gets: of `all` devices of the node those that are `chosen`, and no others.
pub fn plan(node: &Host, all: &[Device], chosen: &[&Device]) -> ContainerEdits {
    let mut edits = ContainerEdits::default();
    if chosen.is_empty() {
        return edits;
    }
    let others = all.iter().filter(|device| !chosen.contains(device));
    edits.hidden = others.flat_map(Device::nodes).filter(|path| node.exists(path)).map(PathBuf::from).collect();
    let device_node = |path: String| DeviceNode { host_path: path.clone().into(), path: path.into(), optional: false };
    edits.device_nodes = chosen.iter().flat_map(|device| device.verbs()).map(device_node).collect();
    match node.exists(CONNECTION_MANAGER) {
        true => edits.device_nodes.push(device_node(CONNECTION_MANAGER.into())),
        false => edits.notices.push(format!(
            "the node has no {CONNECTION_MANAGER}: programs that connect by RDMA addresses will fail; the administrator can \
             load the kernel module rdma_ucm"
        )),
    }
    for class in CLASSES {
        let directory = format!("/sys/class/{class}");
        if !node.is_directory(&directory) {
            continue;
        }
        let options = ["nosuid", "nodev", "noexec", "mode=755", "size=1m"];
        edits.mounts.push(MountEntry::of_type("tmpfs", "tmpfs", &directory, options.into_iter()).0);
        let version = format!("{directory}/abi_version");
        if node.exists(&version) {
            let options = ["x-create=file", "bind", "ro", "nosuid", "nodev", "noexec", "private"];
            edits.mounts.extend(MountEntry::new(&version, &version, options.into_iter()));
        }
        for device in chosen {
            for (_, name) in device.names.iter().filter(|(of, _)| *of == class) {
                // As sysfs links it, but through the bus: what is there is not covered.
                let target = format!("/sys/bus/pci/devices/{}/{class}/{name}", device.address);
                let path = format!("{directory}/{name}");
                let target = node.link(&path).unwrap_or_else(|| target.into());
                edits.links.push(Link { path: path.into(), target });
            }
        }
    }
    edits
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;

    /// A node whose sysfs has these devices: driver, address, number.
    pub fn node(directory: &Path, devices: &[(&str, &str, u32)], classes: &[&str]) -> Host {
        let make = |path: String| fs::create_dir_all(directory.join(path.trim_start_matches('/'))).unwrap();
        let touch = |path: String| {
            let path = directory.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "6\n").unwrap();
        };
        for class in classes {
            touch(format!("/sys/class/{class}/abi_version"));
        }
        for (driver, address, number) in devices {
            let device = format!("/sys/devices/pci0000:00/{address}");
            make(format!("/sys/bus/pci/drivers/{driver}_core"));
            let driver_link = directory.join(format!("sys/bus/pci/drivers/{driver}_core/{address}"));
            symlink(format!("../../../../devices/pci0000:00/{address}"), driver_link).unwrap();
            for (class, name) in [
                ("infiniband", format!("{driver}_{number}")),
                ("infiniband_verbs", format!("uverbs{number}")),
                ("infiniband_mad", format!("umad{number}")),
            ] {
                make(format!("{device}/{class}/{name}"));
                if classes.contains(&class) {
                    let link = directory.join(format!("sys/class/{class}/{name}"));
                    symlink(format!("../../devices/pci0000:00/{address}/{class}/{name}"), link).unwrap();
                }
            }
            touch(format!("/dev/infiniband/uverbs{number}"));
            touch(format!("/dev/infiniband/umad{number}"));
        }
        touch(CONNECTION_MANAGER.to_owned());
        Host::at(directory)
    }

    const THREE: [(&str, &str, u32); 3] =
        [("mlx5", "0000:81:00.0", 0), ("mlx5", "0000:12:00.0", 1), ("mlx4", "0000:99:00.0", 2)];

    #[test]
    fn devices_are_counted_by_driver_and_address() {
        let directory = tempfile::tempdir().unwrap();
        let node = node(directory.path(), &THREE, &CLASSES[..3]);
        let all = Device::all(&node);
        let names: Vec<_> = all.iter().map(Device::name).collect();
        assert_eq!(names, ["mlx4_2", "mlx5_1", "mlx5_0"]);
        let chosen = |wanted: &str| {
            choose(&all, Some(wanted.as_bytes()))
                .map(|chosen| chosen.iter().map(|device| device.name().to_owned()).collect::<Vec<_>>())
                .map_err(|error| error.to_string())
        };
        assert_eq!(chosen("all").unwrap(), names);
        assert_eq!(chosen("2, 0,2").unwrap(), ["mlx5_0", "mlx4_2"]);
        for nothing in ["", "void", "none"] {
            assert_eq!(chosen(nothing).unwrap(), [""; 0]);
        }
        assert_eq!(choose(&all, None).unwrap(), Vec::<&Device>::new());
        for unknown in ["3", "-1", "mlx5_0", "+1", "0x1", "99999999999999999999", "a\nb"] {
            let error = chosen(&format!("0,{unknown}")).unwrap_err();
            let expected = format!("Unknown MELLANOX device id: {};", unknown.escape_debug());
            assert!(error.starts_with(&expected) && !error.contains('\n'), "{error}");
        }
    }

    #[test]
    fn exactly_what_is_chosen_can_be_seen() {
        let directory = tempfile::tempdir().unwrap();
        // Nodes without the connection manager's class, or without management, are as good.
        for classes in [&CLASSES[..2], &CLASSES[..3], &CLASSES[..]] {
            let root = directory.path().join(classes.len().to_string());
            let node = node(&root, &THREE, classes);
            let all = Device::all(&node);
            let edits = plan(&node, &all, &[&all[1]]);
            let nodes: Vec<_> = edits.device_nodes.iter().map(|node| node.path.to_str().unwrap()).collect();
            assert_eq!(nodes, ["/dev/infiniband/uverbs1", CONNECTION_MANAGER]);
            let mut hidden: Vec<_> =
                edits.hidden.iter().map(|path| path.file_name().unwrap().to_str().unwrap()).collect();
            hidden.sort_unstable();
            assert_eq!(hidden, ["umad0", "umad2", "uverbs0", "uverbs2"]);
            let covered: Vec<_> = edits.mounts.iter().filter(|entry| entry.source == "tmpfs").collect();
            assert_eq!(covered.len(), classes.len());
            let versions = edits.mounts.iter().filter(|entry| entry.target.ends_with("/abi_version"));
            assert_eq!(versions.count(), classes.len());
            let link = &edits.links[0];
            assert_eq!(link.path, Path::new("/sys/class/infiniband/mlx5_1"));
            assert_eq!(link.target, Path::new("../../devices/pci0000:00/0000:12:00.0/infiniband/mlx5_1"));
            assert_eq!(edits.links.len(), classes.len().min(3));
            assert_eq!(edits.notices, [""; 0]);
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let node = node(directory.path(), &THREE[..1], &CLASSES[..2]);
        fs::remove_file(directory.path().join(CONNECTION_MANAGER.trim_start_matches('/'))).unwrap();
        let all = Device::all(&node);
        let edits = plan(&node, &all, &all.iter().collect::<Vec<_>>());
        assert_eq!((edits.device_nodes.len(), edits.notices.len(), edits.hidden.len()), (1, 1, 0));
        assert!(edits.notices[0].contains("rdma_ucm"));
        // No devices at all: nothing is done, and nothing is wrong.
        let none = Host::at(directory.path().join("none"));
        assert_eq!(choose(&Device::all(&none), Some(b"all")).unwrap().len(), 0);
        assert_eq!(plan(&none, &[], &[]), ContainerEdits::default());
    }
}
