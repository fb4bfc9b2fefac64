//! The store, what lives until the next boot, and mounting from the one into the other.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::super::{Check, Status, file_system};
use super::{is_root, not_looked_at};
use crate::config::Config;
use crate::container::collect::collect;
use crate::rootfs::probe;
use crate::store::{Store, Watermark, count, size};

pub fn store(config: &Config) -> Check {
    let name = "store";
    if !is_root() {
        return not_looked_at(name);
    }
    let path = &config.store.path;
    let store = match Store::examine(path) {
        Ok(Some(store)) => store,
        Ok(None) => return Check::ok(name, format!("{} is made when the first image is imported", path.display())),
        Err(error) => return Check::bad(name, Status::Failed, error.to_string(), ""),
    };
    let shown = path.display();
    let status = match rustix::fs::statvfs(path) {
        Ok(status) => status,
        Err(errno) => return Check::bad(name, Status::Failed, format!("{shown}: {}", crate::sys::reason(errno)), ""),
    };
    if status.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY) {
        let remedy = "images that are there can be used, and none can be imported: remount it read-write";
        return Check::bad(name, Status::Warning, format!("{shown} is on a read-only file system"), remedy);
    }
    if let Err(error) = store.new_layer() {
        return Check::bad(name, Status::Failed, error.to_string(), "");
    }
    let used = status.f_blocks.saturating_sub(status.f_bfree);
    let percent = used * 100 / (used + status.f_bavail).max(1);
    let available = format!("{shown}, {} available", size(status.f_bavail.saturating_mul(status.f_frsize)));
    if let Watermark::Percent(high) = config.store.watermarks.high
        && percent > u64::from(high)
    {
        let detail =
            format!("{available}: {percent}% of its file system are used, and store.watermarks.high is {high}%");
        return Check::bad(name, Status::Warning, detail, "run \"pyxis gc\"; if that does not help, free space there");
    }
    if status.f_files > 0 && status.f_favail < 1000 {
        let detail = format!("{available}, and only {} inodes", status.f_favail);
        return Check::bad(name, Status::Warning, detail, "remove files from that file system");
    }
    Check::ok(name, available)
}

/// Whether locks work there: on some network file systems they have to be asked for when it is mounted.
pub fn locks(config: &Config) -> Check {
    let name = "store locks";
    if !is_root() {
        return not_looked_at(name);
    }
    match Store::examine(&config.store.path).and_then(|store| store.as_ref().map_or(Ok(()), Store::try_locks)) {
        Ok(()) => Check::ok(name, "flock works"),
        Err(error) => {
            let remedy = "mount that file system with locks (Lustre: -o flock; NFS: without nolock)";
            Check::bad(name, Status::Failed, error.to_string(), remedy)
        }
    }
}

/// What killed processes have left.
pub fn leftovers(config: &Config) -> Check {
    let name = "leftovers";
    if !is_root() {
        return not_looked_at(name);
    }
    let in_store = match Store::examine(&config.store.path).and_then(|store| store.map_or(Ok(0), |s| s.leftovers())) {
        Ok(found) => found,
        Err(error) => return Check::bad(name, Status::Warning, error.to_string(), ""),
    };
    let containers = collect(&config.container.path, &config.runtime.path, true);
    if let Some(problem) = containers.problems.into_iter().next() {
        return Check::bad(name, Status::Warning, problem, "");
    }
    match in_store + containers.leftovers {
        0 => Check::ok(name, "none"),
        found => Check::bad(
            name,
            Status::Warning,
            format!("{} of killed processes", count(found, "thing")),
            "run \"pyxis gc\"",
        ),
    }
}

pub fn runtime(config: &Config) -> Check {
    let (name, path) = ("runtime directory", &config.runtime.path);
    let shown = path.display();
    let status = match fs::symlink_metadata(path) {
        Ok(status) => status,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return match existing_parent(path) {
                Some(_) => Check::ok(name, format!("{shown} is made by the first container")),
                None => Check::bad(name, Status::Failed, format!("{shown}: its parent is missing"), "set runtime.path"),
            };
        }
        Err(error) => return Check::bad(name, Status::Failed, format!("{shown}: {}", crate::sys::reason(error)), ""),
    };
    if !status.is_dir() || status.uid() != 0 || status.mode() & 0o022 != 0 {
        let remedy = format!(
            "it has to be a directory of root's that nobody else can write to: chown root {shown}; chmod 755 {shown}"
        );
        return Check::bad(
            name,
            Status::Failed,
            format!("{shown} is uid {}'s, mode {:o}", status.uid(), status.mode() & 0o7777),
            remedy,
        );
    }
    Check::ok(name, shown.to_string())
}

/// Nothing of ours is mounted where the host sees it, save the place where the layers' own namespace is kept.
pub fn stale_mounts(config: &Config) -> Check {
    let name = "stale mounts";
    let table = match fs::read_to_string("/proc/self/mountinfo") {
        Ok(table) => table,
        Err(error) => return Check::bad(name, Status::Unknown, crate::sys::reason(error), ""),
    };
    let stale = stale_of(&table, &config.runtime.path, &config.store.path.join("layers"));
    match stale.first() {
        None => Check::ok(name, "none"),
        Some(first) => Check::bad(
            name,
            Status::Warning,
            format!("{} of Pyxis in the host's mount table, the first at {first}", count(stale.len(), "mount")),
            format!("umount {first}"),
        ),
    }
}

fn stale_of<'a>(table: &'a str, runtime: &Path, layers: &Path) -> Vec<&'a str> {
    let own = [runtime.to_owned(), runtime.join("mounts"), runtime.join("mounts/layers")];
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .filter(|point| {
            let point = Path::new(point);
            (point.starts_with(runtime) && !own.iter().any(|own| own == point)) || point.starts_with(layers)
        })
        .collect()
}

pub fn root_filesystem(config: &Config) -> Check {
    let name = "root filesystem";
    if !is_root() {
        let missing: Vec<Check> =
            ["overlay", "erofs"].map(file_system).into_iter().filter(|check| check.status != Status::Ok).collect();
        return match missing.into_iter().next() {
            None => Check::bad(name, Status::Unknown, "the kernel has overlay and erofs; not tried", "run it as root"),
            // It may be a module that is loaded when it is needed.
            Some(check) => Check {
                name: name.into(),
                status: Status::Unknown,
                detail: format!("{}: {}", check.name, check.detail),
                ..check
            },
        };
    }
    let Some(directory) = existing_parent(&config.store.path) else {
        return Check::bad(name, Status::Failed, format!("{}: its parent is missing", config.store.path.display()), "");
    };
    if is_read_only(&directory) {
        return Check::bad(name, Status::Unknown, "not tried: the store is on a read-only file system", "");
    }
    match probe::container_root(&directory, &config.runtime.path) {
        Ok(kernel) if kernel.idmapped_layers => Check::ok(name, "an image can be mounted, idmapped and overlaid"),
        Ok(_) => Check::ok(
            name,
            "an image can be mounted and overlaid; overlayfs takes no idmapped layers: users have copies",
        ),
        Err(error) => {
            Check::bad(name, Status::Failed, error, "no container starts: \"modprobe erofs overlay loop\" may help")
        }
    }
}

pub fn named_containers(config: &Config) -> Check {
    let (name, path) = ("named containers", &config.container.path);
    if !is_root() {
        return not_looked_at(name);
    }
    if !path.exists() {
        return Check::ok(name, format!("{} is made by the first one", path.display()));
    }
    match probe::upper_layers(path) {
        Ok(()) => Check::ok(name, format!("kept in {}", path.display())),
        Err(error) => {
            let remedy =
                "steps with --container-name fail: set container.path to a directory on a local disk (ext4, xfs)";
            Check::bad(name, Status::Warning, error, remedy)
        }
    }
}

fn is_read_only(path: &Path) -> bool {
    rustix::fs::statvfs(path).is_ok_and(|status| status.f_flag.contains(rustix::fs::StatVfsMountFlags::RDONLY))
}

/// The directory itself, or the nearest above it that exists, below `/`.
fn existing_parent(path: &Path) -> Option<PathBuf> {
    path.ancestors().find(|ancestor| ancestor.is_dir()).map(Path::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_should_not_be_seen() {
        let line = |point: &str| format!("1 2 0:3 / {point} rw - tmpfs x rw\n");
        let table: String = [
            "/",
            "/run/pyxis",
            "/run/pyxis/mounts",
            "/run/pyxis/mounts/layers",
            "/run/pyxis/root",
            "/run/pyxis-other",
            "/s/layers/x",
        ]
        .map(line)
        .concat();
        assert_eq!(
            stale_of(&table, Path::new("/run/pyxis"), Path::new("/s/layers")),
            ["/run/pyxis/root", "/s/layers/x"]
        );
    }
}
