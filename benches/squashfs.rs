//! What a step from a large squashfs file costs in each of the three ways to run one: figures as Markdown. All take turns,
//! so that what else the machine does hits all alike. `cargo bench --bench squashfs`; needs root, as the tests do.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result};
use testbed::install::Build;
use testbed::{ClusterOptions, Testbed, images, process, wait};

/// Rounds of each comparison, unless `PYXIS_BENCH_ROUNDS` says so.
const ROUNDS: usize = 5;
/// Least bytes of the file.
const LARGE: u64 = 2 << 30;
const MODES: [&str; 3] = ["fuse", "kernel", "convert"];
/// Reads every byte of the image.
const READ_ALL: &str = "find / -xdev -type f -exec cat {} + 2>/dev/null | wc -c";

fn rounds() -> usize {
    std::env::var("PYXIS_BENCH_ROUNDS").ok().and_then(|rounds| rounds.parse().ok()).unwrap_or(ROUNDS)
}

fn main() -> ExitCode {
    match bench() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("squashfs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let build = Build::of(env!("CARGO_BIN_EXE_pyxis"));
    let options = ClusterOptions { nodes: 1, ..ClusterOptions::default() };
    let bed = Testbed::start(&format!("bench-squashfs-{}", std::process::id()), &build, &options)?;
    let usual = testbed::install::hub_mirror(&bed.hub.host());
    let image = large(&bed)?;
    let size = fs::metadata(&image)?.len();
    let set_mode = |mode: &str| bed.pyxis.configure(&format!("{usual}[squashfs]\nmode = \"{mode}\"\n"));
    let step = |script: &str| -> Result<f64> {
        let option = format!("--container-image={}", image.display());
        timed(&mut bed.cluster.command(0, "srun", ["-n1", &option, "sh", "-c", script]))
    };
    let forget = || -> Result<()> {
        let mut command = bed.cluster.nodes()[0].command(&bed.pyxis.executable.display().to_string());
        command.arg("--config").arg(&bed.pyxis.config).args(["gc", "--all"]);
        process::output_of(&mut command).map(drop)
    };
    println!("A squashfs file of {:.1} GiB (zstd); medians of {} rounds.\n", gib(size), rounds());
    println!("| | bare step | unsquashfs | {} |", MODES.join(" | "));
    println!("| --- | ---: | ---: | ---: | ---: | ---: |");

    let bare = || timed(&mut bed.cluster.command(0, "srun", ["-n1", "/bin/true"]));
    let target = image.with_extension("unpacked");
    let unpack = || -> Result<f64> {
        let mut command = Command::new("unsquashfs");
        command.args(["-no-progress", "-quiet", "-processors", "2", "-dest"]).arg(&target).arg(&image);
        let time = timed(&mut command);
        fs::remove_dir_all(&target)?;
        time
    };
    let mut first = Series::new("the first step");
    let mut again = Series::new("the next step");
    // The first round fills caches.
    for round in 0..=rounds() {
        let bare = bare()?;
        let unpacked = unpack()?;
        let (mut firsts, mut nexts) = (vec![bare, unpacked], vec![bare, f64::NAN]);
        for mode in MODES {
            set_mode(mode)?;
            forget()?;
            firsts.push(step("true").context(mode)?);
            nexts.push(step("true").context(mode)?);
        }
        if round > 0 {
            first.rounds.push(firsts);
            again.rounds.push(nexts);
        }
    }
    first.print();
    again.print();
    // Minutes of unpacking: once is enough to tell the three apart.
    let mut readings = vec![bare()?, f64::NAN];
    for mode in MODES {
        set_mode(mode)?;
        step("true").context(mode)?;
        readings.push(step(READ_ALL).context(mode)?);
    }
    let mut reading = Series::new("a step that reads all of it, once");
    reading.rounds.push(readings);
    reading.print();
    println!("\nTimes in ms; in parentheses as a multiple of the kernel's.");
    Ok(())
}

/// One figure: in each round a time of each contender, in milliseconds.
struct Series {
    name: &'static str,
    rounds: Vec<Vec<f64>>,
}

impl Series {
    fn new(name: &'static str) -> Self {
        Self { name, rounds: Vec::new() }
    }

    fn median(&self, contender: usize) -> f64 {
        let mut values: Vec<f64> = self.rounds.iter().map(|round| round[contender]).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    }

    fn print(&self) {
        // Behind the bare step and unsquashfs comes FUSE, then the kernel.
        let kernel = self.median(3);
        let columns: Vec<String> = (0..5)
            .map(|contender| self.median(contender))
            .map(|time| if time.is_nan() { String::new() } else { format!("{time:.0} ({:.2})", time / kernel) })
            .collect();
        println!("| {} | {} |", self.name, columns.join(" | "));
    }
}

fn timed(command: &mut Command) -> Result<f64> {
    let start = Instant::now();
    process::run(command, wait::DEADLINE * 20)?.success()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// A file of user 0's with a small system, and what is installed on this machine.
fn large(bed: &Testbed) -> Result<PathBuf> {
    let tree = bed.site.make_directory("state/squashfs")?.join("tree");
    images::busybox_tree(&tree)?;
    let user = bed.cluster.user(0);
    let file = user.home.join(format!("bench-{}.sqsh", std::process::id()));
    let toolchain = process::output_of(Command::new("rustc").args(["--print", "sysroot"]))?;
    let pack = |source: &Path| -> Result<()> {
        let options = ["-no-progress", "-quiet", "-all-root", "-comp", "zstd", "-Xcompression-level", "3"];
        process::output_of(Command::new("mksquashfs").arg(source).arg(&file).args(options)).map(drop)
    };
    pack(&tree)?;
    for source in [toolchain.trim(), "/usr/lib", "/usr/share", "/usr/bin"] {
        if fs::metadata(&file)?.len() < LARGE {
            // What is one directory more of the image keeps its name.
            process::output_of(
                Command::new("mksquashfs")
                    .arg(source)
                    .arg(&file)
                    .args(["-no-progress", "-quiet", "-all-root"])
                    .args(["-keep-as-directory"]),
            )?;
        }
    }
    // A machine with less installed: what does not compress makes up for it.
    let missing = LARGE.saturating_sub(fs::metadata(&file)?.len());
    if missing > 0 {
        let rest = tree.with_extension("rest");
        let mut noise = std::io::Read::take(fs::File::open("/dev/urandom")?, missing);
        std::io::copy(&mut noise, &mut fs::File::create(&rest)?)?;
        process::output_of(Command::new("mksquashfs").arg(&rest).arg(&file).args([
            "-no-progress",
            "-quiet",
            "-all-root",
        ]))?;
        fs::remove_file(rest)?;
    }
    std::os::unix::fs::chown(&file, Some(user.uid), Some(user.gid))?;
    // What was changed just now is not remembered.
    std::thread::sleep(std::time::Duration::from_secs(5));
    Ok(file)
}
