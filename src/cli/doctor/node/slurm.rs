//! Slurm: whether it loads the plugin, and whether that is a release we know.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use super::super::{Check, Status};
use crate::devices::slurm_config::{MAX_FILE, value};
use crate::options::arguments::Arguments;
use crate::sys::command::{Stream, capture};

/// The plugin's file.
const PLUGIN: &str = "spank_pyxis.so";
/// Where slurm.conf is: by default, and where slurmd keeps what slurmctld has sent it (slurm.conf(5), configless).
const CONFIGURATIONS: [&str; 2] = ["/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf"];
/// Most files that include one another.
const MAX_FILES: usize = 100;
/// Releases by what `-V` says, the first and the last that are known.
const KNOWN: ((u32, u32), (u32, u32)) = ((20, 11), (26, 11));
/// How long a program of Slurm's may take to say its version.
const TIME: Duration = Duration::from_secs(1);

/// One line that loads the plugin.
#[derive(Debug)]
struct Line {
    file: PathBuf,
    plugin: PathBuf,
    arguments: Vec<String>,
}

/// `config`: the configuration that is being looked at.
pub fn plugin(config: &Path) -> Check {
    let name = "plugin";
    let conf = std::env::var_os("SLURM_CONF").map(PathBuf::from).into_iter();
    let conf = conf.chain(CONFIGURATIONS.map(PathBuf::from)).find(|path| path.exists());
    let Some(conf) = conf else {
        let detail = format!("no slurm.conf at {}", CONFIGURATIONS.join(", "));
        return Check::bad(name, Status::Unknown, detail, "set SLURM_CONF");
    };
    let text = match read(&conf) {
        Ok(text) => text,
        Err(error) => return Check::bad(name, Status::Unknown, error, ""),
    };
    let stack = match value(&text, "PlugStackConfig") {
        Some(path) => PathBuf::from(path),
        None => conf.with_file_name("plugstack.conf"),
    };
    let lines = match lines(&stack) {
        Ok(lines) => lines,
        Err(error) => {
            let remedy = "Slurm's commands fail with it: make it readable for everybody";
            return Check::bad(name, Status::Failed, error, remedy);
        }
    };
    let Some(first) = lines.first() else {
        let detail = format!("{} does not load {PLUGIN}", stack.display());
        return Check::bad(name, Status::Failed, detail, "add the line: include /usr/share/pyxis/*");
    };
    if let Some(second) = lines.get(1) {
        let detail = format!("{PLUGIN} is loaded twice, by {} and by {}", first.file.display(), second.file.display());
        return Check::bad(name, Status::Warning, detail, "remove one of the lines");
    }
    examine(first, config)
}

fn examine(line: &Line, config: &Path) -> Check {
    let (name, shown) = ("plugin", line.plugin.display());
    if !line.plugin.is_absolute() {
        // Slurm finds it in its PluginDir, whose default only Slurm knows.
        return Check::bad(name, Status::Unknown, format!("{shown} is no absolute path"), "write the whole path");
    }
    if let Err(error) = trusted(&line.plugin) {
        return Check::bad(name, Status::Failed, error, "every job step loads it as root");
    }
    if let Err(error) = load(&line.plugin) {
        return Check::bad(name, Status::Failed, format!("{shown} cannot be loaded: {error}"), "install it again");
    }
    let arguments = match Arguments::parse(line.arguments.iter().map(String::as_str)) {
        Ok(arguments) => arguments,
        Err(error) => {
            let remedy = format!("correct {}", line.file.display());
            return Check::bad(name, Status::Failed, error.to_string(), remedy);
        }
    };
    if let Err(error) = trusted(&arguments.executable) {
        return Check::bad(name, Status::Failed, error, "install it, or set executable= behind the plugin's path");
    }
    if arguments.config != config {
        let used = arguments.config.display();
        let detail = format!("steps use the configuration {used}, and this is about {}", config.display());
        return Check::bad(name, Status::Warning, detail, format!("pyxis --config {used} doctor --node"));
    }
    Check::ok(name, format!("{shown}, by {}", line.file.display()))
}

/// Whether what is run as root can be changed by root only.
fn trusted(path: &Path) -> Result<(), String> {
    let status = fs::metadata(path).map_err(|error| format!("{}: {}", path.display(), crate::sys::reason(error)))?;
    if !status.is_file() {
        return Err(format!("{} is no file", path.display()));
    }
    if status.uid() != 0 || status.mode() & 0o022 != 0 {
        let (uid, mode) = (status.uid(), status.mode() & 0o7777);
        return Err(format!("{} can be changed by others than root (uid {uid}, mode {mode:o})", path.display()));
    }
    Ok(())
}

/// Maps the library as Slurm would, in this process, which ends soon.
fn load(path: &Path) -> Result<(), String> {
    let c_path = CString::new(path.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: the path is NUL-terminated; the library's constructor only fills in a number (`plugin::version`).
    let handle = unsafe { libc::dlopen(c_path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
    if !handle.is_null() {
        // SAFETY: the handle was just returned, and the name is NUL-terminated.
        let symbol = unsafe { libc::dlsym(handle, c"slurm_spank_init".as_ptr()) };
        return if symbol.is_null() { Err("it has no slurm_spank_init".into()) } else { Ok(()) };
    }
    // SAFETY: after a failure dlerror returns a string that lives until the next call, or null.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return Err("unknown reason".into());
    }
    // SAFETY: not null, so a NUL-terminated string: see above.
    Err(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

fn read(path: &Path) -> Result<String, String> {
    let failed = |error| format!("cannot read {}: {}", path.display(), crate::sys::reason(error));
    let file = fs::File::open(path).map_err(failed)?;
    let mut text = Vec::new();
    std::io::Read::read_to_end(&mut std::io::Read::take(file, MAX_FILE), &mut text).map_err(failed)?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

/// The lines of `stack`, and of what it includes, that load the plugin. A file that does not exist has none.
fn lines(stack: &Path) -> Result<Vec<Line>, String> {
    let mut found = Vec::new();
    let mut files = vec![stack.to_owned()];
    let mut count = 0;
    while let Some(file) = files.pop() {
        count += 1;
        if count > MAX_FILES {
            return Err(format!("{} includes more than {MAX_FILES} files", stack.display()));
        }
        if !file.exists() {
            continue;
        }
        let mut included = Vec::new();
        for line in read(&file)?.lines() {
            let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
            match (words.next(), words.next()) {
                (Some("include"), Some(pattern)) => {
                    let directory = file.parent().unwrap_or(Path::new("/"));
                    included.extend(expand(&directory.join(pattern)));
                }
                (Some("required" | "optional"), Some(plugin)) if Path::new(plugin).ends_with(PLUGIN) => {
                    let arguments = words.map(str::to_owned).collect();
                    found.push(Line { file: file.clone(), plugin: plugin.into(), arguments });
                }
                _ => {}
            }
        }
        files.extend(included.into_iter().rev());
    }
    Ok(found)
}

/// The existing paths that `pattern` stands for, sorted: `*` and `?` as in glob(7).
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::new()];
    for part in pattern.components() {
        let part = part.as_os_str();
        if !part.as_bytes().iter().any(|byte| b"*?".contains(byte)) {
            paths.iter_mut().for_each(|path| path.push(part));
            continue;
        }
        let mut matching = Vec::new();
        for directory in &paths {
            let names = fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.file_name());
            let fits = |name: &std::ffi::OsString| {
                !name.as_bytes().starts_with(b".") && matches(part.as_bytes(), name.as_bytes())
            };
            matching.extend(names.filter(fits).map(|name| directory.join(name)));
        }
        matching.sort();
        paths = matching;
    }
    paths.retain(|path| path.exists());
    paths
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=text.len()).any(|end| text.get(end..).is_some_and(|text| matches(rest, text))),
        (Some((b'?', pattern)), Some((_, text))) => matches(pattern, text),
        (Some((wanted, pattern)), Some((found, text))) => wanted == found && matches(pattern, text),
        _ => false,
    }
}

pub fn release() -> Check {
    let name = "Slurm";
    for program in ["slurmd", "srun"] {
        let mut command = Command::new(program);
        command
            .arg("-V")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin:/opt/slurm/sbin:/opt/slurm/bin");
        let Ok(said) = capture(&mut command, Stream::Output, 200, TIME) else { continue };
        let text = String::from_utf8_lossy(&said.text).trim().to_owned();
        return match parse(&text) {
            Some(release) if release < KNOWN.0 => Check::bad(
                name,
                Status::Failed,
                format!("{text} is older than 20.11"),
                "the plugin needs a newer Slurm",
            ),
            Some(release) if release > KNOWN.1 => {
                let detail = format!("{text} is newer than what this release of Pyxis has seen");
                Check::bad(name, Status::Warning, detail, "look for a newer Pyxis")
            }
            Some(_) => Check::ok(name, text),
            None => Check::bad(name, Status::Unknown, format!("{program} -V says {text:?}"), ""),
        };
    }
    Check::bad(name, Status::Unknown, "neither slurmd nor srun is there", "")
}

/// Major and minor number of `slurm-wlm 22.05.8`.
fn parse(text: &str) -> Option<(u32, u32)> {
    let mut numbers = text.split_whitespace().nth(1)?.split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_as_slurm_says_them() {
        assert_eq!(parse("slurm-wlm 22.05.8"), Some((22, 5)));
        assert_eq!(parse("slurm 26.05.0-0rc1"), Some((26, 5)));
        assert_eq!(parse("command not found"), None);
    }

    #[test]
    fn the_stack_is_read_as_slurm_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let write = |name: &str, text: &str| fs::write(path(name), text).unwrap();
        fs::create_dir(path("d")).unwrap();
        write(
            "plugstack.conf",
            "# comment\ninclude d/*.conf\noptional other.so spank_pyxis.so\ninclude /nonexistent/*\n",
        );
        write("d/b.conf", "required\t/x/spank_pyxis.so a=1 b # c\n");
        write("d/a.conf", "#required /y/spank_pyxis.so\n");
        write("d/c", "required /z/spank_pyxis.so\n");
        let found = lines(&path("plugstack.conf")).unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(
            (found[0].plugin.to_str().unwrap(), found[0].arguments.join(" ")),
            ("/x/spank_pyxis.so", "a=1 b".into())
        );
        write("d/a.conf", "include ./*.conf\n");
        assert!(lines(&path("plugstack.conf")).unwrap_err().contains("more than 100"));
        assert!(lines(&path("missing")).unwrap().is_empty());
    }
}
