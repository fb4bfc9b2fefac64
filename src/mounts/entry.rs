//! One mount, understood: what fstab options and `--container-mounts` flags mean (behaviour reference, section 15.2).

use super::spec::MountSpec;

/// A mount to be done in a container's root filesystem, as plain data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountEntry {
    /// Host path of a bind; a name otherwise.
    pub source: String,
    /// Path inside the container.
    pub target: String,
    /// What to do there.
    pub action: Action,
    /// `MOUNT_ATTR_*` to set on the topmost mount (mount_setattr(2)).
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear, as far as the host's mount is not locked.
    pub clear: u64,
    /// Propagation types, applied in order: `MS_*` and whether recursively.
    pub propagation: Vec<(u64, bool)>,
    /// What to create if the target is missing.
    pub create: Create,
    /// Go on if it fails.
    pub nofail: bool,
}

/// What a [`MountEntry`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Bind the source; with what is mounted below it if `recursive`.
    Bind {
        /// `rbind`.
        recursive: bool,
    },
    /// A new tmpfs with these `key[=value]` options.
    Tmpfs {
        /// Options the kernel understands.
        data: Vec<String>,
    },
    /// Detach what is mounted on the target.
    Detach,
}

/// `x-create=`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Create {
    /// Nothing.
    No,
    /// What the source is: a directory, or else a file.
    Auto,
    /// A directory.
    Directory,
    /// An empty file.
    File,
}

/// An option that neither we nor (for a bind) the file system can know.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("failed to mount: {from} at {target}: unknown option \"{option}\"")]
pub struct InvalidEntry {
    /// The mount's source.
    pub from: String,
    /// The mount's target.
    pub target: String,
    /// The option.
    pub option: String,
}

const RDONLY: u64 = libc::MOUNT_ATTR_RDONLY;
const NOSUID: u64 = libc::MOUNT_ATTR_NOSUID;
const NODEV: u64 = libc::MOUNT_ATTR_NODEV;
const NOEXEC: u64 = libc::MOUNT_ATTR_NOEXEC;
const ATIME: u64 = libc::MOUNT_ATTR__ATIME;
const NOATIME: u64 = libc::MOUNT_ATTR_NOATIME;
const STRICTATIME: u64 = libc::MOUNT_ATTR_STRICTATIME;
const NODIRATIME: u64 = libc::MOUNT_ATTR_NODIRATIME;
/// `relatime` is the absence of the other two.
const RELATIME: u64 = libc::MOUNT_ATTR_RELATIME;

/// What a mount flag sets and clears; later flags win.
fn attribute(option: &str) -> Option<(u64, u64)> {
    Some(match option {
        "ro" => (RDONLY, 0),
        "rw" => (0, RDONLY),
        "nosuid" => (NOSUID, 0),
        "suid" => (0, NOSUID),
        "nodev" => (NODEV, 0),
        "dev" => (0, NODEV),
        "noexec" => (NOEXEC, 0),
        "exec" => (0, NOEXEC),
        "noatime" => (NOATIME, ATIME),
        "strictatime" => (STRICTATIME, ATIME),
        "relatime" | "atime" | "nostrictatime" => (RELATIME, ATIME),
        "nodiratime" => (NODIRATIME, 0),
        "diratime" => (0, NODIRATIME),
        _ => return None,
    })
}

fn propagation(option: &str) -> Option<(u64, bool)> {
    let (name, recursive) = match option.strip_prefix('r') {
        Some(name) => (name, true),
        None => (option, false),
    };
    Some((
        match name {
            "private" => libc::MS_PRIVATE,
            "slave" => libc::MS_SLAVE,
            "shared" => libc::MS_SHARED,
            "unbindable" => libc::MS_UNBINDABLE,
            _ => return None,
        },
        recursive,
    ))
}

/// Options that mean something to mount(8) or to the whole file system, and nothing to a mount in a container.
const IGNORED: [&str; 25] = [
    "auto",
    "noauto",
    "defaults",
    "user",
    "nouser",
    "users",
    "nousers",
    "owner",
    "noowner",
    "group",
    "nogroup",
    "sync",
    "async",
    "dirsync",
    "lazytime",
    "nolazytime",
    "mand",
    "nomand",
    "iversion",
    "noiversion",
    "norelatime",
    "silent",
    "loud",
    "_netdev",
    "x-detach",
];

impl TryFrom<&MountSpec> for MountEntry {
    type Error = InvalidEntry;

    fn try_from(spec: &MountSpec) -> Result<Self, InvalidEntry> {
        Self::new(&spec.source, &spec.target, spec.options.iter().map(String::as_str))
    }
}

impl MountEntry {
    /// The mount of `source` on `target` with `options`.
    pub fn new<'a>(
        source: &str,
        target: &str,
        options: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Self, InvalidEntry> {
        let detach = source == "umount" || options.clone().any(|option| option == "x-detach");
        let mut entry = Self {
            source: source.to_owned(),
            target: target.to_owned(),
            action: Action::Bind { recursive: false },
            set: 0,
            clear: 0,
            propagation: Vec::new(),
            create: Create::No,
            nofail: false,
        };
        let mut data = Vec::new();
        let mut create = [false; 3];
        for option in options {
            if let Some((set, clear)) = attribute(option) {
                entry.set = entry.set & !clear | set;
                entry.clear = entry.clear & !set | clear;
            } else if let Some(propagation) = propagation(option) {
                entry.propagation.push(propagation);
            } else {
                match option {
                    "bind" => {}
                    "rbind" => entry.action = Action::Bind { recursive: true },
                    "nofail" => entry.nofail = true,
                    "x-create=file" => create[0] = true,
                    "x-create=dir" => create[1] = true,
                    "x-create=auto" => create[2] = true,
                    "" => {}
                    ignored if IGNORED.contains(&ignored) => {}
                    other => data.push(other.to_owned()),
                }
            }
        }
        entry.create = match create {
            [true, ..] => Create::File,
            [_, true, _] => Create::Directory,
            [_, _, true] => Create::Auto,
            _ => Create::No,
        };
        if detach {
            entry.action = Action::Detach;
        } else if source == "tmpfs" {
            entry.action = Action::Tmpfs { data };
        } else if let Some(option) = data.into_iter().next() {
            return Err(InvalidEntry { from: entry.source, target: entry.target, option });
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(source: &str, options: &str) -> MountEntry {
        MountEntry::new(source, "/t", options.split(',')).unwrap()
    }

    #[test]
    fn later_flags_win() {
        let both = entry("/s", "rbind,ro,nosuid,rw");
        assert_eq!((both.set, both.clear), (NOSUID, RDONLY));
        let atime = entry("/s", "bind,noatime,relatime,nodiratime");
        assert_eq!((atime.set, atime.clear), (NODIRATIME, ATIME));
        assert_eq!(atime.action, Action::Bind { recursive: false });
    }

    #[test]
    fn file_beats_directory_beats_auto() {
        assert_eq!(entry("/s", "x-create=auto,rbind,x-create=dir").create, Create::Directory);
        assert_eq!(entry("/s", "x-create=auto,x-create=dir,x-create=file").create, Create::File);
        assert_eq!(entry("/s", "rbind").create, Create::No);
    }

    #[test]
    fn propagation_and_file_system_options() {
        assert_eq!(
            entry("/s", "rbind,unbindable,rslave").propagation,
            [(libc::MS_UNBINDABLE, false), (libc::MS_SLAVE, true)]
        );
        let tmpfs = entry("tmpfs", "x-create=dir,size=1m,mode=755,nodev");
        assert_eq!(tmpfs.action, Action::Tmpfs { data: vec!["size=1m".into(), "mode=755".into()] });
        assert_eq!(entry("umount", "x-detach").action, Action::Detach);
    }

    #[test]
    fn a_bind_takes_no_file_system_options() {
        let error = MountEntry::new("/s", "/t", ["rbind", "size=1m"].into_iter()).unwrap_err();
        assert_eq!(error.to_string(), "failed to mount: /s at /t: unknown option \"size=1m\"");
    }
}
