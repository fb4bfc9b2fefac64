//! What a container costs a step: the figures of the README, as Markdown.
//!
//! Everything is measured in turns (a bare step, a contained one, a bare one, …), so that what else the machine does
//! hits all alike, and reported as medians. `cargo bench --bench step`; needs root, as the tests do.

#![forbid(unsafe_code)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use testbed::allocation::Allocation;
use testbed::install::Build;
use testbed::{ClusterOptions, Running, Testbed, images, process, wait};

/// Libraries of a device.
const LIBRARIES: usize = 60;
/// Rounds of each comparison, unless `PYXIS_BENCH_ROUNDS` says so.
const ROUNDS: usize = 60;
/// Unpacked size of the large image.
const LARGE: u64 = 2 << 30;

fn rounds() -> usize {
    std::env::var("PYXIS_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS)
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("step: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let build = Build::of(env!("CARGO_BIN_EXE_pyxis"));
    let options = ClusterOptions { nodes: 1, ..ClusterOptions::default() };
    let bed = Testbed::start(&format!("bench-{}", std::process::id()), &build, &options)?;
    bed.hub.push(&images::busybox(&bed.site.make_directory("state/alpine")?)?, "library/alpine:latest")?;
    bed.hub.push(&images::large(LARGE)?, "library/large:latest")?;
    // Into the store, to stay there: a disk that is nearly full would have each image make room for the other.
    let stay = "[store]\nwatermarks = { high = \"99%\", low = \"98%\" }\n";
    bed.pyxis.configure(&(testbed::install::hub_mirror(&bed.hub.host()) + stay))?;
    for image in ["alpine", "large"] {
        bed.cluster.srun([&format!("--container-image={image}"), "true"])?.success()?;
    }
    let plugin = fs::metadata(&build.plugin)?.len();
    println!("| figure | baseline | with Pyxis | difference | ratio | CPU, baseline | CPU, with Pyxis |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    steps(&bed)?;
    named(&bed)?;
    devices(&bed)?;
    plugin_alone(&bed)?;
    runtimes(&bed)?;
    println!("\nMedians of {} alternating runs; CPU is the mean of the whole machine's, idle time left out.", rounds());
    println!("Size of the plugin, stripped: {:.2} MiB.", plugin as f64 / f64::from(1 << 20));
    Ok(())
}

/// One way to do the same thing.
struct Contender<'a> {
    name: String,
    run: Box<dyn FnMut() -> Result<()> + 'a>,
    /// Milliseconds of each round.
    wall: Vec<f64>,
    /// CPU milliseconds of all rounds.
    cpu: f64,
}

impl<'a> Contender<'a> {
    fn new(name: impl Into<String>, run: impl FnMut() -> Result<()> + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run), wall: Vec::new(), cpu: 0.0 }
    }

    fn round(&mut self) -> Result<()> {
        let (busy, start) = (busy_milliseconds()?, Instant::now());
        (self.run)()?;
        self.wall.push(start.elapsed().as_secs_f64() * 1e3);
        self.cpu += busy_milliseconds()? - busy;
        Ok(())
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

/// Runs all in turns and prints a line for each against the first.
fn compare(contenders: &mut [Contender<'_>]) -> Result<()> {
    // The first round of each fills caches.
    for round in 0..=rounds() {
        for contender in contenders.iter_mut() {
            contender.round().with_context(|| contender.name.clone())?;
            if round == 0 {
                contender.wall.clear();
                contender.cpu = 0.0;
            }
        }
    }
    let Some((baseline, others)) = contenders.split_first() else { return Ok(()) };
    for other in others {
        let differences: Vec<_> = other.wall.iter().zip(&baseline.wall).map(|(with, without)| with - without).collect();
        let (with, without, rounds) = (median(&other.wall), median(&baseline.wall), rounds() as f64);
        println!(
            "| {} against {} | {without:.1} ms | {with:.1} ms | {:+.1} ms | {:.2} | {:.1} ms | {:.1} ms |",
            other.name,
            baseline.name,
            median(&differences),
            with / without,
            baseline.cpu / rounds,
            other.cpu / rounds,
        );
    }
    Ok(())
}

/// Time that all processors together have not been idle, in milliseconds since boot (proc(5), `/proc/stat`; ticks of
/// 10 ms).
fn busy_milliseconds() -> Result<f64> {
    let stat = fs::read_to_string("/proc/stat")?;
    let fields = stat.lines().next().unwrap_or_default().split_whitespace().skip(1);
    let ticks: Vec<f64> = fields.map(|field| field.parse().unwrap_or(0.0)).collect();
    ensure!(ticks.len() > 7, "unexpected /proc/stat");
    // user nice system idle iowait irq softirq steal
    Ok((ticks[0] + ticks[1] + ticks[2] + ticks[5] + ticks[6]) * 10.0)
}

fn allocate(bed: &Testbed) -> Result<Allocation<'_>> {
    Allocation::new(&bed.cluster, &["-N1", "-n16"])
}

/// Runs `srun OPTIONS true` in the job.
fn step(job: &Allocation<'_>, options: &[String]) -> Result<()> {
    quiet(job.srun(["-N1", "--mpi=none"]).args(options).arg("/bin/true"))
}

/// Runs a command for its success only.
fn quiet(command: &mut Command) -> Result<()> {
    let output = command.stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// A step in an image that is in the store, against the same step without a container.
fn steps(bed: &Testbed) -> Result<()> {
    let allocation = allocate(bed)?;
    for tasks in [1, 8] {
        let options = |image: Option<&str>| -> Vec<String> {
            std::iter::once(format!("-n{tasks}")).chain(image.map(|name| format!("--container-image={name}"))).collect()
        };
        let noun = if tasks == 1 { "1 task" } else { "8 tasks" };
        let contender = |name: String, image: Option<&str>| {
            let (allocation, options) = (&allocation, options(image));
            Contender::new(name, move || step(allocation, &options))
        };
        compare(&mut [
            contender(format!("a bare step, {noun}"), None),
            contender("a step in a 2 MiB image".into(), Some("alpine")),
            contender("a step in a 2 GiB image".into(), Some("large")),
        ])?;
    }
    Ok(())
}

/// Steps in a container that is kept, against the same step without a container: one after the other, and in one that
/// another step runs.
fn named(bed: &Testbed) -> Result<()> {
    let allocation = allocate(bed)?;
    let options = |words: &[&str]| -> Vec<String> { ["-n1"].iter().chain(words).map(|&word| word.into()).collect() };
    step(&allocation, &options(&["--container-image=alpine", "--container-name=stopped"]))?;
    let arguments = ["--overlap", "--mpi=none", "-n1", "--container-image=alpine", "--container-name=running"];
    let mut command = allocation.srun(arguments.iter().chain(&["sh", "-c", "echo up; exec cat"]));
    let mut running = Running::start(command.stdin(Stdio::piped()))?;
    running.wait_for_text("up", wait::DEADLINE)?;
    let contender = |name: &str, words: &[&str]| {
        let (allocation, options) = (&allocation, options(&[&["--overlap"], words].concat()));
        Contender::new(name, move || step(allocation, &options))
    };
    compare(&mut [
        contender("a bare step beside another one", &[]),
        contender("a second step in a named container", &["--container-name=stopped"]),
        contender("a step that attaches to a running container", &["--container-name=running:exec"]),
        contender("a step that shares its root filesystem only", &["--container-name=running:no_exec"]),
    ])?;
    running.write_stdin(b"")?;
    running.wait(wait::DEADLINE)?.success().map(drop)
}

/// A step in whose container the libraries of a GPU's driver appear, as many as NVIDIA's has with the capabilities
/// `compute`, `utility` and `graphics`, against the same step without.
fn devices(bed: &Testbed) -> Result<()> {
    let directory = bed.site.path("etc/cdi");
    fs::create_dir_all(&directory)?;
    let target = "/usr/lib64";
    let (mut mounts, mut links) = (Vec::new(), Vec::new());
    for number in 0..LIBRARIES {
        let name = format!("libdriver-{number}.so");
        let file = directory.join(format!("{name}.550.54.15"));
        fs::write(&file, "\x7fELF\x02")?;
        mounts.push(json!({"hostPath": file, "containerPath": format!("{target}/{name}.550.54.15"),
                           "options": ["ro", "nosuid", "nodev", "bind"]}));
        links.extend(["--link".to_owned(), format!("{name}.550.54.15::{target}/{name}.1")]);
    }
    let hook =
        |args: Vec<String>| json!({"hookName": "createContainer", "path": "/usr/bin/nvidia-cdi-hook", "args": args});
    let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect::<Vec<_>>();
    let hooks = [
        hook([words(&["nvidia-cdi-hook", "create-symlinks"]), links].concat()),
        hook(words(&["nvidia-cdi-hook", "update-ldcache", "--folder", target])),
    ];
    let specification = json!({"cdiVersion": "0.6.0", "kind": "bench.pyxis/gpu", "devices": [
        {"name": "0", "containerEdits": {"mounts": mounts, "hooks": hooks, "deviceNodes": [{"path": "/dev/null"}]}}]});
    fs::write(directory.join("gpu.json"), specification.to_string())?;
    let settings = format!("[devices]\ncdi_directories = [{directory:?}]\n");
    bed.pyxis.configure(&(testbed::install::hub_mirror(&bed.hub.host()) + &settings))?;
    let allocation = allocate(bed)?;
    let contender = |name: &str, device: Option<&str>| {
        let words = ["-n1", "--container-image=alpine"].into_iter().chain(device);
        let (allocation, options) = (&allocation, words.map(str::to_owned).collect::<Vec<_>>());
        Contender::new(name, move || step(allocation, &options))
    };
    compare(&mut [
        contender("one without devices", None),
        contender(
            &format!("a step with {LIBRARIES} libraries of a device"),
            Some("--container-device=bench.pyxis/gpu=0"),
        ),
    ])
}

/// A step without any option, with the plugin loaded and without.
fn plugin_alone(bed: &Testbed) -> Result<()> {
    let allocation = allocate(bed)?;
    let bare = ["-n1".to_owned()];
    compare(&mut [
        Contender::new("`srun true` without plugins", || {
            bed.cluster.set_plugstack("")?;
            step(&allocation, &bare)
        }),
        Contender::new("`srun true`", || {
            bed.cluster.set_plugstack(&bed.pyxis.plugstack)?;
            step(&allocation, &bare)
        }),
    ])
}

/// `pyxis run` against other ways to start a container, all on the node and as the same user where they can.
fn runtimes(bed: &Testbed) -> Result<()> {
    let node = &bed.cluster.nodes()[0];
    let user = bed.cluster.user(0);
    if Path::new("/sys/fs/cgroup/unified").exists() {
        // crun refuses machines that have both versions of cgroups mounted.
        quiet(node.command("mount").args(["-t", "cgroup2", "cgroup2", "/sys/fs/cgroup"]))?;
    }
    let tree = bed.site.make_directory("state/bundle/rootfs")?;
    images::busybox_tree(&tree)?;
    let bundle = write_bundle(&tree)?;
    let text = |path: &Path| path.display().to_string();
    let pyxis = || {
        let mut command = node.command(&text(&bed.pyxis.executable));
        command.arg("--config").arg(&bed.pyxis.config).args(["run", "--user", &user.name, "alpine", "--", "/bin/true"]);
        quiet(&mut command)
    };
    let crun =
        || quiet(node.command("crun").args(["--cgroup-manager=disabled", "run", "--bundle", &text(&bundle), "bench"]));
    let bwrap = || {
        let mut command = node.command("setpriv");
        command.args(["--reuid", &user.uid.to_string(), "--regid", &user.gid.to_string(), "--init-groups", "bwrap"]);
        command.args(["--bind", &text(&tree), "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/tmp", "/bin/true"]);
        quiet(&mut command)
    };
    compare(&mut [Contender::new("`crun run`", crun), Contender::new("`pyxis run`", pyxis)])?;
    compare(&mut [Contender::new("`bwrap`", bwrap), Contender::new("`pyxis run`", pyxis)])
}

/// A runtime-spec bundle around `tree`: crun's own template with another command.
fn write_bundle(tree: &Path) -> Result<PathBuf> {
    let bundle = tree.parent().context("the tree is in a bundle")?.to_owned();
    fs::set_permissions(&bundle, fs::Permissions::from_mode(0o755))?;
    process::output_of(Command::new("crun").arg("spec").current_dir(&bundle))?;
    let config = bundle.join("config.json");
    let mut spec: Value = serde_json::from_slice(&fs::read(&config)?)?;
    spec["process"]["args"] = json!(["/bin/true"]);
    spec["process"]["terminal"] = json!(false);
    spec["root"] = json!({ "path": "rootfs", "readonly": false });
    fs::write(&config, serde_json::to_vec(&spec)?)?;
    Ok(bundle)
}
