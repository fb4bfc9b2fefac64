//! What runs in containers: the processes of this user that have a mount namespace of their own, as proc(5) shows them.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::param::clock_ticks_per_second;

use crate::sys::time::local_time;

/// A process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub command_name: String,
    pub state: char,
    /// Clock ticks since the boot.
    pub started: u64,
    /// Clock ticks of processor time.
    pub time: u64,
    /// Inode of its mount namespace.
    pub mount_namespace: u64,
    /// Inode of its user namespace.
    pub user_namespace: u64,
    /// Device and inode of its root directory.
    pub root: (u64, u64),
    /// Whether enroot has marked its root.
    pub is_marked: bool,
    pub command: String,
}

/// The processes of `uid` by mount namespace, the oldest of each first; without those in the caller's own one. What ends
/// meanwhile is left out.
pub fn in_containers(uid: u32) -> io::Result<BTreeMap<u64, Vec<Process>>> {
    let own = namespace(Path::new("/proc/self"), "mnt").ok_or(io::ErrorKind::Unsupported)?;
    let mut found: BTreeMap<u64, Vec<Process>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let path = entry.path();
        if fs::metadata(&path).is_ok_and(|metadata| metadata.uid() == uid)
            && let Some(mount_namespace) = namespace(&path, "mnt").filter(|namespace| *namespace != own)
            && let Some(process) = read(&path, pid, mount_namespace)
        {
            found.entry(mount_namespace).or_default().push(process);
        }
    }
    for processes in found.values_mut() {
        processes.sort_by_key(|process| (process.started, process.pid));
    }
    Ok(found)
}

/// Inode of a namespace of the process at `path`.
fn namespace(path: &Path, kind: &str) -> Option<u64> {
    fs::metadata(path.join("ns").join(kind)).ok().map(|metadata| metadata.ino())
}

fn read(path: &Path, pid: i32, mount_namespace: u64) -> Option<Process> {
    let root = fs::metadata(path.join("root")).ok()?;
    let stat = fs::read(path.join("stat")).ok()?;
    let (command_name, state, time, started) = parse_stat(&String::from_utf8_lossy(&stat))?;
    let line = fs::read(path.join("cmdline")).ok()?;
    let words: Vec<String> = line.split(|&byte| byte == 0).map(printable).collect();
    let command = words.join(" ").trim_end().to_owned();
    Some(Process {
        pid,
        command: if command.is_empty() { format!("[{command_name}]") } else { command },
        command_name,
        state,
        started,
        time,
        mount_namespace,
        user_namespace: namespace(path, "user")?,
        root: (root.dev(), root.ino()),
        is_marked: fs::symlink_metadata(path.join("root/.lock")).is_ok_and(|metadata| metadata.is_file()),
    })
}

/// Name, state, processor time and start from `/proc/PID/stat`.
fn parse_stat(text: &str) -> Option<(String, char, u64, u64)> {
    let (start, rest) = text.rsplit_once(')')?;
    let name = printable(start.split_once('(')?.1.as_bytes());
    let fields: Vec<&str> = rest.split_ascii_whitespace().collect();
    let number = |index: usize| fields.get(index).and_then(|field| field.parse::<u64>().ok());
    Some((name, fields.first()?.chars().next()?, number(11)? + number(12)?, number(19)?))
}

fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

impl Process {
    /// When it was started: the time of the day, or the date if that is not today.
    pub fn started(&self) -> String {
        let Some(boot) = fs::read_to_string("/proc/stat").ok().and_then(|text| parse_boot_time(&text)) else {
            return "?".to_owned();
        };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        clock(boot + self.started / clock_ticks_per_second(), now)
    }

    /// Processor time.
    pub fn time(&self) -> String {
        let seconds = self.time / clock_ticks_per_second();
        format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
    }
}

/// Seconds since 1970 at which the machine was booted, from `/proc/stat`.
fn parse_boot_time(text: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix("btime ")).and_then(|number| number.trim().parse().ok())
}

fn clock(then: u64, now: u64) -> String {
    const MONTHS: [&str; 12] = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let (Some(then), Some(now)) = (local_time(then), local_time(now)) else { return "?".to_owned() };
    match (then.year, then.month, then.day) == (now.year, now.month, now.day) {
        true => format!("{:02}:{:02}", then.hour, then.minute),
        false => format!("{}{:02}", MONTHS.get(then.month).unwrap_or(&"?"), then.day),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_understood() {
        let stat = "7 (a) b\n) S 1 7 7 0 -1 4194304 1 2 3 4 150 50 0 0 20 0 1 0 8000 1 2";
        assert_eq!(parse_stat(stat), Some(("a) b?".into(), 'S', 200, 8000)));
        assert_eq!(parse_stat("7 (a S 1"), None);
        assert_eq!(parse_boot_time("cpu 1\nbtime 123\n"), Some(123));
        assert_eq!(clock(0, 86_400 * 400).len(), 5);
    }
}
