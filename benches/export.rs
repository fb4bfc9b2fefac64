//! What writing an image costs against mksquashfs with the same options: figures as Markdown. Both pack this machine's
//! `/usr/bin` with two threads, in turns. `cargo bench --bench export`; needs root, as the tests do.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use spank_pyxis::export;
use spank_pyxis::export::target::Target;
use spank_pyxis::squashfs::writer::Options;

/// What is packed.
const TREE: &str = "/usr/bin";
/// Rounds of the comparison.
const ROUNDS: usize = 5;
/// enroot's options, and those of sites that want small images.
const OPTIONS: [&str; 3] = ["-comp lzo -noD", "-comp zstd -Xcompression-level 3", "-comp lz4"];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["export", image, options] => export(Path::new(image), options),
        // Cargo's own argument is "--bench".
        _ => bench(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("export: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn export(image: &Path, options: &str) -> Result<()> {
    let (options, _) = Options::parse(options)?;
    let file = Target::open(image)?.create()?;
    export::write(File::open(TREE)?.as_fd(), &file, &options, &[])?;
    Ok(file.publish_unsynced()?)
}

/// One measured run.
#[derive(Debug, Clone, Copy)]
struct Run {
    wall: f64,
    /// User and system time.
    cpu: f64,
    /// Bytes of the image.
    size: u64,
}

fn measure(command: &mut Command, image: &Path) -> Result<Run> {
    let _ = std::fs::remove_file(image);
    rustix::fs::sync();
    let used = || -> Result<f64> {
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        // Of children that have ended, in hundredths of a second (sysconf(3), _SC_CLK_TCK).
        Ok((fields[13].parse::<f64>()? + fields[14].parse::<f64>()?) / 100.0)
    };
    let (before, start) = (used()?, Instant::now());
    let output = command.output().with_context(|| format!("{command:?}: apt-get install squashfs-tools"))?;
    let wall = start.elapsed().as_secs_f64();
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(Run { wall, cpu: used()? - before, size: std::fs::metadata(image)?.len() })
}

fn bench() -> Result<()> {
    let directory = tempfile::tempdir_in("/var/tmp")?;
    let image = directory.path().join("image.sqsh");
    println!("| {TREE}, options | mksquashfs, wall | wall | ratio | mksquashfs, CPU | CPU | ratio | size, ratio |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |");
    for options in OPTIONS {
        let options = format!("{options} -processors 2");
        let (mut theirs, mut ours) = (Vec::new(), Vec::new());
        // The first round warms the page cache.
        for round in 0..=ROUNDS {
            let mut command = Command::new("mksquashfs");
            command.arg(TREE).arg(&image).args(["-noappend", "-all-root", "-no-progress", "-no-xattrs"]);
            let run = measure(command.args(options.split(' ')), &image)?;
            let our_run = measure(
                Command::new(std::env::current_exe()?).arg("export").arg(&image).arg(format!("{options} -no-xattrs")),
                &image,
            )?;
            if round > 0 {
                theirs.push(run);
                ours.push(our_run);
            }
        }
        let (theirs, ours) = (median(&theirs), median(&ours));
        println!(
            "| `{options}` | {:.2} s | {:.2} s | {:.2} | {:.2} s | {:.2} s | {:.2} | {:.2} |",
            theirs.wall,
            ours.wall,
            ours.wall / theirs.wall,
            theirs.cpu,
            ours.cpu,
            ours.cpu / theirs.cpu,
            ours.size as f64 / theirs.size as f64,
        );
    }
    Ok(())
}

/// Of each figure on its own.
fn median(runs: &[Run]) -> Run {
    let middle = |figure: fn(&Run) -> f64| {
        let mut figures: Vec<f64> = runs.iter().map(figure).collect();
        figures.sort_by(f64::total_cmp);
        figures[figures.len() / 2]
    };
    Run { wall: middle(|run| run.wall), cpu: middle(|run| run.cpu), size: runs.last().map_or(0, |run| run.size) }
}
