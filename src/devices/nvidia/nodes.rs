//! Device nodes, and what the container finds below `/proc/driver/nvidia`.

#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::NvidiaError;
use super::driver::{Driver, Gpu, MAX_FILE, PROC, capability_node, parse_minor};
use super::select::Chosen;
use super::wish::{Channels, Wish};
use crate::devices::edits::{ContainerEdits, DeviceNode, File};
use crate::devices::host::Host;
use crate::mounts::entry::MountEntry;

/// Directory of the nodes that stand for channels to the memory of other nodes.
const CHANNELS: &str = "/dev/nvidia-caps-imex-channels";

/// Adds the node if the host has it.
fn add(edits: &mut ContainerEdits, host: &Host, path: impl Into<PathBuf>) -> bool {
    let path = path.into();
    let exists = host.exists(&path);
    if exists && !edits.device_nodes.iter().any(|node| node.path == path) {
        edits.device_nodes.push(DeviceNode { host_path: path.clone(), path, optional: false });
    }
    exists
}

/// Names in a directory that are `prefix` and a number.
fn numbered(host: &Host, directory: &str, prefix: &str) -> Vec<String> {
    let is_number = |rest: &str| !rest.is_empty() && rest.bytes().all(|byte| byte.is_ascii_digit());
    let mut names = host.names(directory);
    names.retain(|name| name.strip_prefix(prefix).is_some_and(is_number));
    names
}

/// Nodes for the chosen GPUs and for what else is wanted; those of other GPUs are hidden.
pub fn plan(
    edits: &mut ContainerEdits,
    host: &Host,
    driver: &Driver,
    wish: &Wish,
    chosen: &[Chosen<'_>],
) -> Result<(), NvidiaError> {
    if !add(edits, host, "/dev/nvidiactl") {
        edits.notices.push(missing("/dev/nvidiactl"));
    }
    for one in chosen {
        let node = one.gpu.node();
        if !add(edits, host, &node) {
            edits.notices.push(missing(&node));
        }
    }
    if wish.capabilities.compute {
        if !add(edits, host, "/dev/nvidia-uvm") && !chosen.is_empty() {
            edits.notices.push(
                "NVIDIA: kernel module nvidia_uvm is not loaded on this node, without which CUDA does not work".into(),
            );
        }
        add(edits, host, "/dev/nvidia-uvm-tools");
    }
    if wish.capabilities.compute || wish.gdrcopy {
        add(edits, host, "/dev/gdrdrv");
    }
    if wish.capabilities.display {
        add(edits, host, "/dev/nvidia-modeset");
    }
    if wish.nvswitch {
        add(edits, host, "/dev/nvidia-nvswitchctl");
        for name in numbered(host, "/dev", "nvidia-nvswitch") {
            add(edits, host, Path::new("/dev").join(name));
        }
    }
    if wish.storage {
        for name in numbered(host, "/dev", "nvidia-fs") {
            add(edits, host, Path::new("/dev").join(name));
        }
    }
    channels(edits, host, wish)?;
    hide(edits, host, driver, chosen);
    Ok(())
}

fn missing(node: &str) -> String {
    format!(
        "NVIDIA: {node} is missing on this node, though the driver is loaded: nvidia-modprobe -u -c0 or \
         nvidia-persistenced makes it"
    )
}

fn channels(edits: &mut ContainerEdits, host: &Host, wish: &Wish) -> Result<(), NvidiaError> {
    let present = numbered(host, CHANNELS, "channel");
    match &wish.channels {
        Channels::All if wish.capabilities.compute && !present.is_empty() => {
            let options = ["x-create=dir", "bind", "ro", "nosuid", "noexec", "private", "nofail"];
            edits.mounts.extend(MountEntry::new(CHANNELS, CHANNELS, options.into_iter()));
        }
        Channels::All => {}
        Channels::Listed(numbers) => {
            let names: Vec<String> = numbers.iter().map(|number| format!("channel{number}")).collect();
            for (name, number) in names.iter().zip(numbers) {
                if !present.contains(name) {
                    return Err(NvidiaError::UnknownChannel(super::wish::shown(number)));
                }
                add(edits, host, Path::new(CHANNELS).join(name));
            }
            let others = present.iter().filter(|name| !names.contains(name));
            edits.hidden.extend(others.map(|name| Path::new(CHANNELS).join(name)));
        }
    }
    Ok(())
}

/// What is not chosen is not seen either, where the container has the host's `/dev`.
pub fn hide(edits: &mut ContainerEdits, host: &Host, driver: &Driver, chosen: &[Chosen<'_>]) {
    let is_chosen = |minor: u32| chosen.iter().any(|one| one.gpu.minor == minor);
    let others = driver.gpus.iter().filter(|gpu| !is_chosen(gpu.minor));
    hide_gpus(edits, host, others);
    let capabilities = |one: &Chosen<'_>| one.instances.iter().flat_map(|instance| instance.capabilities).collect();
    let kept: BTreeSet<u32> = chosen.iter().flat_map(|one| -> Vec<u32> { capabilities(one) }).collect();
    let all: BTreeSet<u32> =
        driver.gpus.iter().flat_map(|gpu| &gpu.instances).flat_map(|instance| instance.capabilities).collect();
    let others = all.difference(&kept).map(|&minor| capability_node(minor)).filter(|node| host.exists(node));
    edits.hidden.extend(others.map(PathBuf::from));
}

/// Hides the nodes of these GPUs.
pub fn hide_gpus<'a>(edits: &mut ContainerEdits, host: &Host, gpus: impl Iterator<Item = &'a Gpu>) {
    edits.hidden.extend(gpus.map(Gpu::node).filter(|node| host.exists(node)).map(PathBuf::from));
}

/// A `/proc/driver/nvidia` with the chosen GPUs only, and nodes for their parts.
pub fn plan_proc(edits: &mut ContainerEdits, host: &Host, wish: &Wish, chosen: &[Chosen<'_>]) {
    let options = ["nosuid", "nodev", "noexec", "mode=555", "size=1m"];
    edits.mounts.push(MountEntry::of_type("tmpfs", "tmpfs", PROC, options.into_iter()).0);
    for name in ["params", "version", "registry"] {
        let path = format!("{PROC}/{name}");
        let Ok(content) = host.read_text(&path, MAX_FILE) else { continue };
        let content = if name == "params" { without_modification(&content) } else { content };
        edits.files.push(File { path: path.into(), mode: 0o444, content: content.into_bytes() });
    }
    let bind = |path: &str, create: &str| {
        let create = format!("x-create={create}");
        let options = [create.as_str(), "bind", "ro", "nosuid", "nodev", "noexec", "private"];
        MountEntry::new(path, path, options.into_iter())
    };
    let mut capabilities = Vec::new();
    for one in chosen {
        edits.mounts.extend(bind(&format!("{PROC}/gpus/{}", one.gpu.directory), "dir"));
        for instance in &one.instances {
            let gpu_instance = format!("{}/gi{}", one.gpu.capabilities(), instance.gpu_instance);
            let [of_gpu_instance, of_compute_instance] = instance.capabilities;
            capabilities.push((format!("{gpu_instance}/access"), of_gpu_instance));
            capabilities.push((format!("{gpu_instance}/ci{}/access", instance.compute_instance), of_compute_instance));
        }
    }
    for name in &wish.mig_capabilities {
        let path = format!("{PROC}/capabilities/mig/{name}");
        let minor = host.read_text(&path, MAX_FILE).ok().and_then(|text| parse_minor(&text));
        capabilities.extend(minor.map(|minor| (path, minor)));
    }
    for (path, minor) in capabilities {
        let node = capability_node(minor);
        if add(edits, host, &node) {
            if !edits.mounts.iter().any(|mount| mount.target == path) {
                edits.mounts.extend(bind(&path, "file"));
            }
        } else {
            edits.notices.push(missing(&node));
        }
    }
}

/// The driver's parameters, by which programs in the container do not try to make device nodes.
fn without_modification(params: &str) -> String {
    let line = |line: &str| match line.starts_with("ModifyDeviceFiles:") {
        true => "ModifyDeviceFiles: 0\n".to_owned(),
        false => format!("{line}\n"),
    };
    params.lines().map(line).collect()
}
