//! What a cold import costs beyond what it must: the figures of the README, as Markdown.
//!
//! The floor is a small program that does nothing but the unavoidable work on the same blobs with the same libraries and
//! cores: download over loopback, digest of the blob, decompression, digest of the stream, write each byte once. It is
//! written in two ways (a thread a layer; three threads a layer), and the faster one counts. Import and floors run in
//! turns. `cargo bench --bench import`; needs root, as the tests do.

use std::fs::File;
use std::io::{self, BufReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitCode};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use flate2::bufread::MultiGzDecoder;
use sha2::{Digest, Sha256};
use spank_pyxis::image::reference::ImageReference;
use spank_pyxis::importer::pipe;
use spank_pyxis::importer::protocol::{self, ImportLimits, LayerDescriptor, Report};
use spank_pyxis::registry::config::{RegistryConfig, RegistryEntry};
use spank_pyxis::registry::proxy::{Source, Variables};
use spank_pyxis::sys::channel::{self, Channel};
use testbed::registry::{Registry, RegistryOptions};
use testbed::{Site, images};

/// Rounds of the comparison.
const ROUNDS: usize = 5;
/// Least unpacked size of the image.
const SIZE: u64 = 2 << 30;
/// Layers at a time, for floor and import.
const LAYERS: usize = 3;
const REPOSITORY: &str = "installed";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["importer", channel] => return importer(channel),
        ["floor", way, host, directory, ref layers @ ..] => floor(way, host, Path::new(directory), layers),
        // Cargo's own argument is "--bench".
        _ => bench(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("import: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn bench() -> Result<()> {
    let site = Site::create(&format!("bench-import-{}", std::process::id()))?;
    let registry = Registry::start(&site, "hub", RegistryOptions::default())?;
    registry.push(&images::installed(SIZE)?, &format!("{REPOSITORY}:latest"))?;
    let directory = site.make_directory("state/layers")?;

    let mut imports = Vec::new();
    let mut floors = [("a thread a layer", Vec::new()), ("three threads a layer", Vec::new())];
    let mut layers = Vec::new();
    for round in 0..=ROUNDS {
        let import = run_import(&registry, &directory)?;
        layers.clone_from(&import.layers);
        // The first round warms the registry's page cache.
        if round > 0 {
            imports.push(import);
        }
        for (way, runs) in &mut floors {
            let run = run_floor(way, &registry, &directory, &layers)?;
            if round > 0 {
                runs.push(run);
            }
        }
    }
    report(&imports, &floors, &layers);
    Ok(())
}

/// One measured run.
#[derive(Debug, Clone, Default)]
struct Run {
    wall: f64,
    /// User and system time of the process.
    cpu: f64,
    /// Peak resident memory.
    memory: u64,
    /// Bytes that the process had written to files.
    written: u64,
    layers: Vec<LayerDescriptor>,
    unpacked: u64,
    image: u64,
}

impl Run {
    /// Adds what the kernel counted for the process, which is still there.
    fn account(&mut self, child: &Child) -> Result<()> {
        let read =
            |file: &str| std::fs::read_to_string(format!("/proc/{}/{file}", child.id())).context(file.to_owned());
        let field = |text: &str, name: &str| -> Result<u64> {
            let line = text.lines().find(|line| line.starts_with(name)).with_context(|| name.to_owned())?;
            Ok(line.split_whitespace().nth(1).with_context(|| name.to_owned())?.parse()?)
        };
        self.memory = field(&read("status")?, "VmHWM:")? << 10;
        self.written = field(&read("io")?, "write_bytes:")?;
        let stat = read("stat")?;
        let times: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
        // In hundredths of a second (sysconf(3), _SC_CLK_TCK).
        self.cpu = (times[11].parse::<f64>()? + times[12].parse::<f64>()?) / 100.0;
        Ok(())
    }
}

fn run_import(registry: &Registry, directory: &Path) -> Result<Run> {
    settle()?;
    let (broker, end) = channel::pair::<protocol::Command, Report>()?;
    let end = OwnedFd::from(end);
    rustix::io::fcntl_setfd(&end, rustix::io::FdFlags::empty())?;
    let start = Instant::now();
    let mut child = Command::new(std::env::current_exe()?).args(["importer", &end.as_raw_fd().to_string()]).spawn()?;
    drop(end);
    let next = || -> Result<Report> {
        match broker.receive()?.context("the importer is gone")?.0 {
            Report::Failed { message, .. } => bail!(message),
            report => Ok(report),
        }
    };
    let mut registries = RegistryConfig::default();
    registries.registry.insert(registry.host(), RegistryEntry { insecure: true, ..RegistryEntry::default() });
    let limits = ImportLimits { max_layer_bytes: 1 << 40, max_layer_entries: 10_000_000, max_connections: LAYERS };
    let reference = ImageReference::parse(&format!("{}/{REPOSITORY}", registry.host()))?;
    broker.send(
        &protocol::Command::Resolve {
            reference,
            registries: Box::new(registries),
            proxy: (Source::Job, Variables::default()),
            site_files: vec![],
            limits,
        },
        &[],
    )?;
    let Report::Resolved { layers, .. } = next()? else { bail!("out of turn") };
    let mut run = Run { layers, ..Run::default() };
    let files: Vec<File> = run.layers.iter().map(|_| unnamed(directory)).collect::<Result<_>>()?;
    for (layer, file) in files.iter().enumerate() {
        broker.send(&protocol::Command::Fetch { layer }, &[file.as_fd()])?;
    }
    let mut missing = files.len();
    while missing > 0 {
        if let Report::Fetched { unpacked, image, .. } = next()? {
            run.unpacked += unpacked;
            run.image += image;
            missing -= 1;
        }
    }
    run.wall = start.elapsed().as_secs_f64();
    run.account(&child)?;
    drop(broker);
    ensure!(child.wait()?.success());
    Ok(run)
}

fn importer(channel: &str) -> ExitCode {
    let Ok(number) = channel.parse() else { return ExitCode::FAILURE };
    // SAFETY: the descriptor was inherited for this, and nothing else in this process knows its number.
    spank_pyxis::importer::run(Channel::from(unsafe { OwnedFd::from_raw_fd(number) }))
}

fn run_floor(way: &str, registry: &Registry, directory: &Path, layers: &[LayerDescriptor]) -> Result<Run> {
    settle()?;
    let layers = layers.iter().map(|layer| format!("{},{}", layer.blob, layer.diff_id));
    let start = Instant::now();
    let mut child = Command::new(std::env::current_exe()?)
        .args(["floor", way, &registry.host()])
        .arg(directory)
        .args(layers)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    let mut said = [0; 4];
    child.stdout.take().context("stdout")?.read_exact(&mut said).context("the floor program failed")?;
    let mut run = Run { wall: start.elapsed().as_secs_f64(), ..Run::default() };
    run.account(&child)?;
    drop(child.stdin.take());
    ensure!(child.wait()?.success());
    Ok(run)
}

/// The floor program. Says `done`, and stays until its standard input closes, to be looked at.
fn floor(way: &str, host: &str, directory: &Path, layers: &[&str]) -> Result<()> {
    let queue = Mutex::new(layers.iter());
    let agent = ureq::Agent::new_with_defaults();
    let work = || -> Result<()> {
        while let Some(layer) = { queue.lock().ok().and_then(|mut queue| queue.next()) } {
            let (blob, diff_id) = layer.split_once(',').context("a layer is BLOB,DIFFID")?;
            let url = format!("http://{host}/v2/{REPOSITORY}/blobs/{blob}");
            let body = agent.get(&url).call()?.into_body().into_reader();
            let file = unnamed(directory)?;
            let digests = if way == "a thread a layer" { inline(body, file)? } else { staged(body, file)? };
            ensure!(digests == [blob.to_owned(), diff_id.to_owned()], "wrong digests: {digests:?}");
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..LAYERS).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
    })?;
    io::stdout().write_all(b"done")?;
    io::stdout().flush()?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Everything in one thread.
fn inline(body: impl Read, mut file: File) -> Result<[String; 2]> {
    let mut blob = Hashed { inner: body, hash: Sha256::new() };
    let mut stream = MultiGzDecoder::new(BufReader::with_capacity(pipe::BUFFER, &mut blob));
    let mut hash = Sha256::new();
    let mut buffer = vec![0; pipe::BUFFER];
    loop {
        match fill(&mut stream, &mut buffer)? {
            0 => break,
            count => {
                hash.update(&buffer[..count]);
                file.write_all(&buffer[..count])?;
            }
        }
    }
    Ok([text(blob.hash), text(hash)])
}

/// Download and digest, decompression and digest, writing: a thread each.
fn staged(mut body: impl Read + Send, mut file: File) -> Result<[String; 2]> {
    let (to_inflate, from_download) = pipe::pipe();
    let (to_file, mut from_inflate) = pipe::pipe();
    std::thread::scope(|scope| {
        let download = scope.spawn(move || pump(&mut body, to_inflate));
        let inflate = scope.spawn(move || pump(&mut MultiGzDecoder::new(from_download), to_file));
        let mut buffer = vec![0; 4 * pipe::BUFFER];
        loop {
            match fill(&mut from_inflate, &mut buffer)? {
                0 => break,
                count => file.write_all(&buffer[..count])?,
            }
        }
        let joined = |thread: std::thread::ScopedJoinHandle<'_, Result<String>>| {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
        };
        Ok([joined(download)?, joined(inflate)?])
    })
}

fn pump(from: &mut impl Read, to: pipe::Writer) -> Result<String> {
    let mut hash = Sha256::new();
    while to.pump::<anyhow::Error>(from, anyhow::Error::from, |bytes| hash.update(bytes))? {}
    to.finish();
    Ok(text(hash))
}

/// Hashes what is read.
struct Hashed<R> {
    inner: R,
    hash: Sha256,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(&buffer[..count]);
        Ok(count)
    }
}

fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match from.read(&mut buffer[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    Ok(filled)
}

fn text(hash: Sha256) -> String {
    spank_pyxis::image::digest::Digest::from_bytes(hash.finalize().into()).to_string()
}

/// A file without a name, as the store makes them.
fn unnamed(directory: &Path) -> Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(rustix::fs::open(directory, flags, Mode::from(0o600))?.into())
}

/// Waits until earlier runs' bytes are on the disk.
fn settle() -> Result<()> {
    rustix::fs::sync();
    Ok(())
}

fn report(imports: &[Run], floors: &[(&str, Vec<Run>)], layers: &[LayerDescriptor]) {
    let median = |runs: &[Run], value: &dyn Fn(&Run) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(value).collect();
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
    let wall = |run: &Run| run.wall;
    let Some(first) = imports.first() else { return };
    let compressed: u64 = layers.iter().map(|layer| layer.size).sum();
    println!(
        "Cold import of {} layers, {:.2} GiB compressed, {:.2} GiB unpacked, over loopback; medians of {} runs in turns.\n",
        layers.len(),
        gib(compressed),
        gib(first.unpacked),
        imports.len()
    );
    println!("| | wall | CPU | peak memory | bytes written, of unpacked |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let row = |name: &str, runs: &[Run]| {
        println!(
            "| {name} | {:.2} s | {:.2} s | {:.0} MiB | {:.3} |",
            median(runs, &wall),
            median(runs, &|run| run.cpu),
            runs.iter().map(|run| run.memory).max().unwrap_or(0) as f64 / f64::from(1 << 20),
            median(runs, &|run| run.written as f64) / first.unpacked as f64,
        );
    };
    for (way, runs) in floors {
        row(&format!("floor, {way}"), runs);
    }
    row("import", imports);
    let floor = floors.iter().map(|(_, runs)| median(runs, &wall)).fold(f64::INFINITY, f64::min);
    println!("\nImport / floor: {:.2}", median(imports, &wall) / floor);
    println!("Image / unpacked: {:.3}", first.image as f64 / first.unpacked as f64);
}
