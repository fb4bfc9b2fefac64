//! `pyxis devices`: what this node offers, and what a container would get of it, without starting one. In a job (`srun pyxis
//! devices`) it is what a container of the step would get.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde::Serialize;

use super::run::join;
use crate::config::Config;
use crate::devices::access::DeviceAccess;
use crate::devices::cdi::{QualifiedName, Registry};
use crate::devices::edits::ContainerEdits;
use crate::devices::host::Host;
use crate::devices::infiniband;
use crate::devices::nvidia::allocation::Allocation;
use crate::devices::nvidia::driver::Driver;
use crate::devices::nvidia::inventory::{self, Inventory};
use crate::devices::plan::{GPUS, INFINIBAND, Inputs, plan};
use crate::devices::root::RootTraits;
use crate::enroot::environ;
use crate::mounts::rootdir::RootDir;
use crate::request::{Environment, StepFacts, StepRequest, User};
use crate::sys;

mod image;

type Error = Box<dyn std::error::Error>;

/// Show the devices of this node, and what of them a container would get.
///
/// With an image, which is started as by "pyxis run" to be looked at, and gets nothing: that takes root.
#[derive(Debug, Clone, clap::Args)]
pub struct DevicesArgs {
    /// The image: [USER@][REGISTRY#]IMAGE[:TAG]
    #[arg(conflicts_with = "root", value_name = "IMAGE")]
    image: Option<String>,
    /// Whose container it would be: a user name or number
    #[arg(long, value_name = "USER", default_value = "0", requires = "image")]
    user: String,
    /// Report as JSON
    #[arg(long)]
    pub json: bool,
    /// A variable of the image, or to be laid over it, as NVIDIA_VISIBLE_DEVICES=all
    #[arg(long = "env", value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// An unpacked root filesystem, whose library directories and /etc/environment count
    #[arg(long, value_name = "DIRECTORY", default_value = "/")]
    root: PathBuf,
    /// As if Slurm had given these: gpu:0,2
    #[arg(long, value_name = "NAME:INDEX[,INDEX]")]
    gres: Vec<String>,
    /// As --container-device
    #[arg(long, value_name = "VENDOR/CLASS=NAME")]
    container_device: Vec<QualifiedName>,
}

/// For the man page.
pub const JSON: &str = "\
One object with two:
  node       nvidia_driver (its version, or null), gpus (uuid, address, node, allowed, mig), infiniband (name, address,
             nodes), cdi_directories, cdi_devices (name, file), cdi_problems
  container  image (or null), variables (name, value, source: job or image), reasons (why the job has which GPUs, and
             whether a CDI specification decides: list of lines), library_directory, error (why it would not start, or null),
             device_nodes, hidden, libraries, mounts, files, links, env, hooks, notices, log";

#[derive(Debug, Serialize)]
struct Report {
    node: Node,
    container: Container,
}

/// What the node offers.
#[derive(Debug, Serialize)]
struct Node {
    /// Version of NVIDIA's driver.
    nvidia_driver: Option<String>,
    gpus: Vec<Gpu>,
    infiniband: Vec<Infiniband>,
    cdi_directories: Vec<PathBuf>,
    cdi_devices: Vec<CdiDevice>,
    /// Files and devices of CDI that cannot be used, a line each.
    cdi_problems: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Gpu {
    uuid: Option<String>,
    address: String,
    node: String,
    /// Whether the node lets this process open it: not if its cgroup has other devices.
    allowed: bool,
    /// GPU instance and compute instance of each part.
    mig: Vec<(u32, u32)>,
}

#[derive(Debug, Serialize)]
struct Infiniband {
    name: String,
    address: String,
    nodes: Vec<String>,
}

#[derive(Debug, Serialize)]
struct CdiDevice {
    name: String,
    file: PathBuf,
}

/// What a container would get, and what that is concluded from.
#[derive(Debug, Default, Serialize)]
struct Container {
    /// Of which image.
    image: Option<String>,
    /// Variables that decide, and whose they are.
    variables: Vec<Variable>,
    /// What else decides.
    reasons: Vec<String>,
    library_directory: String,
    /// Why it would not start.
    error: Option<String>,
    device_nodes: Vec<(PathBuf, PathBuf)>,
    hidden: Vec<PathBuf>,
    libraries: Vec<(PathBuf, Vec<String>)>,
    mounts: Vec<(String, String)>,
    files: Vec<PathBuf>,
    links: Vec<(PathBuf, PathBuf)>,
    env: Vec<(String, String)>,
    hooks: Vec<String>,
    notices: Vec<String>,
    log: Vec<String>,
}

#[derive(Debug, Serialize)]
struct Variable {
    name: &'static str,
    value: String,
    /// `job` or `image`.
    source: &'static str,
}

/// Runs the command.
pub fn run(args: &DevicesArgs, path: &Path) -> Result<ExitCode, Error> {
    let config = Config::load(path)?;
    if let Some(image) = &args.image {
        let look = |container: &Environment, root: &Path| report(args, &config, container.clone(), root);
        return Ok(ExitCode::from(image::look(image, &args.user, path, look)?));
    }
    let mut container = Environment::default();
    if args.root != Path::new("/") {
        let root = open(&args.root)?;
        if let Some(text) = RootDir::new(root.as_fd()).read("/etc/environment", environ::MAX_FILE)? {
            environ::assign(&mut container, &text, None);
        }
    }
    Ok(ExitCode::from(report(args, &config, container, &args.root)?))
}

fn open(root: &Path) -> Result<File, Error> {
    Ok(File::open(root).map_err(|error| format!("{}: {}", root.display(), sys::reason(error)))?)
}

/// Prints it, for a container with the environment `container` and the root filesystem `root`; gives the exit code.
fn report(args: &DevicesArgs, config: &Config, container: Environment, root: &Path) -> Result<u8, Error> {
    let node = Host::default();
    let report = Report { node: look_at(&node, config), container: conclude(args, &node, config, container, root)? };
    if args.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{}", text(&report));
    }
    Ok(report.container.error.is_some().into())
}

fn look_at(node: &Host, config: &Config) -> Node {
    let access = DeviceAccess::of_this_process();
    let driver = Driver::read(node);
    let gpus = driver.iter().flat_map(|driver| &driver.gpus).map(|gpu| Gpu {
        uuid: gpu.uuid.clone(),
        address: gpu.bus.to_string(),
        node: gpu.node(),
        allowed: access.allows(gpu.node()),
        mig: gpu.instances.iter().map(|part| (part.gpu_instance, part.compute_instance)).collect(),
    });
    let registry = Registry::load(&config.devices.cdi_directories, None);
    Node {
        gpus: gpus.collect(),
        nvidia_driver: driver.as_ref().map(|driver| driver.version.clone()),
        infiniband: infiniband::Device::all(node)
            .iter()
            .map(|device| Infiniband {
                name: device.name().to_owned(),
                address: device.address.clone(),
                nodes: device.nodes().collect(),
            })
            .collect(),
        cdi_directories: config.devices.cdi_directories.clone(),
        cdi_devices: registry
            .devices()
            .map(|(name, file)| CdiDevice { name: name.to_string(), file: file.to_owned() })
            .collect(),
        cdi_problems: registry.problems.iter().cloned().chain(registry.conflicts()).collect(),
    }
}

/// Plans a container as its start would.
fn conclude(
    args: &DevicesArgs,
    node: &Host,
    config: &Config,
    mut container: Environment,
    root: &Path,
) -> Result<Container, Error> {
    let root = open(root)?;
    let image = RootDir::new(root.as_fd());
    let traits = RootTraits::of(image);
    let mut job: Environment = std::env::vars_os().map(|(name, value)| join(name, value)).collect();
    for variable in &args.env {
        let (name, value) = variable.split_once('=').ok_or_else(|| format!("--env {variable}: no NAME=VALUE"))?;
        container.set(name, value);
    }
    for gres in &args.gres {
        let (name, list) = gres.split_once(':').ok_or_else(|| format!("--gres {gres}: no NAME:INDEX[,INDEX]"))?;
        job.set(format!("SLURM_STEP_{}S", name.to_uppercase()), list);
    }
    let mut concluded = Container {
        image: args.image.clone(),
        library_directory: traits.library_directory.clone(),
        ..Container::default()
    };
    for name in [GPUS, "NVIDIA_DRIVER_CAPABILITIES", INFINIBAND] {
        let found = job.get(name).map(|value| (value, "job"));
        if let Some((value, source)) = found.or_else(|| Some((container.get(name)?, "image"))) {
            let value = String::from_utf8_lossy(value).into_owned();
            concluded.variables.push(Variable { name, value, source });
        }
    }
    let request = request(args, &job)?;
    let refused = DeviceAccess::of_this_process();
    if let Some(driver) = Driver::read(node).filter(|driver| !driver.gpus.is_empty()) {
        concluded.reasons.push(Allocation::of(node, &driver, request.step.as_ref(), &job, &refused).reason());
    }
    let inputs = Inputs {
        node,
        request: &request,
        host: &job,
        container: &container,
        job: &job,
        refused: &refused,
        settings: &config.devices,
        image,
        root: &traits,
    };
    match plan(&inputs, &mut || take_inventory(node)) {
        Ok(edits) => concluded.fill(edits),
        Err(error) => concluded.error = Some(error.to_string()),
    }
    Ok(concluded)
}

fn take_inventory(node: &Host) -> Result<Inventory, String> {
    let driver = Driver::read(node).ok_or("the NVIDIA driver is gone")?;
    let key = inventory::key(node, &driver);
    let taken = inventory::take_elsewhere()?;
    Inventory::parse(&taken, &key).ok_or_else(|| "NVML and the kernel say different things about the GPUs".into())
}

/// Of a step, if this is one or is to be as if it were.
fn request(args: &DevicesArgs, job: &Environment) -> Result<StepRequest, Error> {
    let number = |name: &str| job.get_str(name).and_then(|text| text.parse().ok());
    let step = number("SLURM_STEP_ID").or_else(|| (!args.gres.is_empty()).then_some(0));
    let groups = nix::unistd::getgroups().unwrap_or_default();
    let user = User {
        uid: rustix::process::getuid().as_raw(),
        gid: rustix::process::getgid().as_raw(),
        groups: groups.into_iter().map(nix::unistd::Gid::as_raw).collect(),
    };
    let step = step.map(|step_id| StepFacts {
        job_id: number("SLURM_JOB_ID").unwrap_or_default(),
        step_id,
        local_tasks: 1,
        total_tasks: 1,
    });
    Ok(StepRequest {
        step,
        devices: args.container_device.clone(),
        ..StepRequest::bare(user, std::env::current_dir()?)
    })
}

impl Container {
    fn fill(&mut self, edits: ContainerEdits) {
        self.device_nodes = edits.device_nodes.into_iter().map(|node| (node.host_path, node.path)).collect();
        self.hidden = edits.hidden;
        self.libraries = edits.libraries.into_iter().map(|library| (library.path, library.names)).collect();
        self.mounts = edits.mounts.into_iter().map(|entry| (entry.source, entry.target)).collect();
        self.files = edits.files.into_iter().map(|file| file.path).collect();
        self.links = edits.links.into_iter().map(|link| (link.path, link.target)).collect();
        self.env = edits.env;
        let hook = |hook: crate::devices::edits::Hook| format!("{} for {}", hook.path.display(), hook.origin);
        self.hooks = edits.hooks.into_iter().map(hook).collect();
        self.notices = edits.notices;
        self.log = edits.log;
    }
}

/// Lines for people, in the order in which they ask.
fn text(report: &Report) -> String {
    let mut lines = Vec::new();
    let Report { node, container } = report;
    match &node.nvidia_driver {
        Some(version) => lines.push(format!("NVIDIA driver {version}")),
        None => lines.push("NVIDIA driver: none is loaded".into()),
    }
    for (index, gpu) in node.gpus.iter().enumerate() {
        let uuid = gpu.uuid.as_deref().unwrap_or("-");
        let refused = if gpu.allowed { "" } else { "   refused by this process's cgroup" };
        lines.push(format!("    GPU {index}   {uuid}   {}   {}{refused}", gpu.address, gpu.node));
        lines.extend(gpu.mig.iter().map(|(gi, ci)| format!("        MIG: GPU instance {gi}, compute instance {ci}")));
    }
    lines.push(if node.infiniband.is_empty() { "InfiniBand: none".into() } else { "InfiniBand".to_owned() });
    for (index, device) in node.infiniband.iter().enumerate() {
        lines.push(format!("    {index}   {}   {}   {}", device.name, device.address, device.nodes.join(" ")));
    }
    let directories: Vec<String> = node.cdi_directories.iter().map(|path| path.display().to_string()).collect();
    let none = if node.cdi_devices.is_empty() { "none in " } else { "" };
    lines.push(format!("CDI: {none}{}", directories.join(", ")));
    lines.extend(node.cdi_devices.iter().map(|device| format!("    {}   {}", device.name, device.file.display())));
    lines.extend(node.cdi_problems.iter().map(|problem| format!("    not usable: {problem}")));

    let of = container.image.as_ref().map(|image| format!(" of {image}")).unwrap_or_default();
    lines.push(format!("A container{of}"));
    for variable in &container.variables {
        lines.push(format!("    {}={} of the {}", variable.name, variable.value, variable.source));
    }
    lines.extend(container.reasons.iter().map(|reason| format!("    {reason}")));
    let mut add = |what: &str, text: String| lines.push(format!("    {what:<12} {text}"));
    if let Some(error) = &container.error {
        add("fails", error.clone());
    }
    for (host, path) in &container.device_nodes {
        let from = if host == path { String::new() } else { format!(" of {}", host.display()) };
        add("device", format!("{}{from}", path.display()));
    }
    container.hidden.iter().for_each(|path| add("hidden", path.display().to_string()));
    for (path, names) in &container.libraries {
        let directory = &container.library_directory;
        add("library", format!("{} in {directory} as {}", path.display(), names.join(", ")));
    }
    for (source, target) in &container.mounts {
        add("mount", if source == target { target.clone() } else { format!("{target} from {source}") });
    }
    container.files.iter().for_each(|path| add("file", path.display().to_string()));
    container.links.iter().for_each(|(path, to)| add("link", format!("{} to {}", path.display(), to.display())));
    container.env.iter().for_each(|(name, value)| add("variable", format!("{name}={value}")));
    container.hooks.iter().for_each(|hook| add("hook", hook.clone()));
    container.notices.iter().for_each(|text| add("notice", text.clone()));
    container.log.iter().for_each(|text| add("log", text.clone()));
    let gets_nothing = container.error.is_none()
        && container.device_nodes.is_empty()
        && container.libraries.is_empty()
        && container.mounts.is_empty()
        && container.env.is_empty();
    if gets_nothing {
        let text = format!("nothing: {GPUS}, {INFINIBAND}, --container-device and [devices.gres] ask for nothing here");
        add("gets", text);
    }
    lines.iter().map(|line| one_line(line) + "\n").collect()
}

/// What files and variables say cannot begin a line of its own.
fn one_line(text: &str) -> String {
    let escape = |character: char| match character.is_control() {
        true => character.escape_default().collect::<String>(),
        false => character.to_string(),
    };
    text.chars().map(escape).collect()
}
