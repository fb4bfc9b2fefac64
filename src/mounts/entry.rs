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
    /// Do not mention it either.
    pub quiet: bool,
}

/// What a [`MountEntry`] does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action {
    /// Bind the source; with what is mounted below it if `recursive`.
    Bind {
        /// `rbind`.
        recursive: bool,
    },
    /// A new file system.
    New {
        /// Its type: `tmpfs`, `proc`, `overlay`, …
        kind: String,
        /// `key[=value]` options that the kernel understands.
        data: Vec<String>,
    },
    /// Change the flags of what is mounted on the target.
    Remount {
        /// Of the mount only, and not of the file system.
        bind: bool,
        /// New options of the file system.
        data: Vec<String>,
    },
    /// Move the mount from the source, a host path, to the target.
    Move,
    /// Nothing but the propagation of what is mounted on the target.
    Propagate,
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

/// Flags of a file system rather than of a mount: they count when it is made or remounted.
pub(super) const OF_FILE_SYSTEM: [&str; 7] = ["sync", "async", "dirsync", "lazytime", "nolazytime", "mand", "nomand"];

/// Options that mean something to mount(8), and nothing to a mount in a container.
const IGNORED: [&str; 15] = [
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
    "iversion",
    "noiversion",
    "norelatime",
    "_netdev",
];

/// Whether `word` is an option that has a meaning by itself, not one that is left to a file system.
pub fn is_known_option(word: &str) -> bool {
    attribute(word).is_some()
        || propagation(word).is_some()
        || OF_FILE_SYSTEM.contains(&word)
        || IGNORED.contains(&word)
        || matches!(word, "bind" | "rbind" | "remount" | "nofail" | "silent" | "loud")
        || matches!(word, "x-create=dir" | "x-create=file" | "x-create=auto" | "x-move" | "x-detach")
}

impl TryFrom<&MountSpec> for MountEntry {
    type Error = InvalidEntry;

    fn try_from(spec: &MountSpec) -> Result<Self, InvalidEntry> {
        Self::new(&spec.source, &spec.target, spec.options.iter().map(String::as_str))
    }
}

impl MountEntry {
    /// The mount of `source`, a path, `tmpfs` or `umount`, on `target` with `options`.
    pub fn new<'a>(
        source: &str,
        target: &str,
        options: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<Self, InvalidEntry> {
        let detach = (source == "umount").then_some("x-detach");
        let bind = (source != "tmpfs").then_some("bind");
        let (entry, unused) = Self::of_type("none", source, target, bind.into_iter().chain(detach).chain(options));
        match unused.into_iter().next() {
            Some(option) if entry.action != Action::Detach => {
                Err(InvalidEntry { from: entry.source, target: entry.target, option })
            }
            _ => Ok(entry),
        }
    }

    /// The mount that a whole fstab line asks for, and the options that mean nothing to it.
    pub fn of_type<'a>(
        kind: &str,
        source: &str,
        target: &str,
        options: impl Iterator<Item = &'a str>,
    ) -> (Self, Vec<String>) {
        let mut entry = Self {
            source: source.to_owned(),
            target: target.to_owned(),
            action: Action::Detach,
            set: 0,
            clear: 0,
            propagation: Vec::new(),
            create: Create::No,
            nofail: false,
            quiet: false,
        };
        let (mut data, mut of_file_system) = (Vec::new(), Vec::new());
        let mut create = [false; 3];
        let (mut bind, mut recursive, mut remount, mut movement, mut detach) = (false, false, false, false, false);
        for option in options {
            if let Some((set, clear)) = attribute(option) {
                entry.set = entry.set & !clear | set;
                entry.clear = entry.clear & !set | clear;
            } else if let Some(propagation) = propagation(option) {
                entry.propagation.push(propagation);
            } else {
                match option {
                    "bind" => bind = true,
                    "rbind" => (bind, recursive) = (true, true),
                    "remount" => remount = true,
                    "x-move" => movement = true,
                    "x-detach" => detach = true,
                    "nofail" => entry.nofail = true,
                    "silent" => entry.quiet = true,
                    "loud" => entry.quiet = false,
                    "x-create=file" => create[0] = true,
                    "x-create=dir" => create[1] = true,
                    "x-create=auto" => create[2] = true,
                    "" => {}
                    ignored if IGNORED.contains(&ignored) => {}
                    flag if OF_FILE_SYSTEM.contains(&flag) => of_file_system.push(flag.to_owned()),
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
        // A pseudo file system is named by its type; a bind is not, and pyxis's own lines leave tmpfs's away.
        let kind = if kind == "none" && source == "tmpfs" { "tmpfs" } else { kind };
        let mut with_flags = || {
            of_file_system.append(&mut data);
            std::mem::take(&mut of_file_system)
        };
        entry.action = if detach {
            Action::Detach
        } else if remount {
            Action::Remount { bind, data: if bind { Vec::new() } else { with_flags() } }
        } else if movement {
            Action::Move
        } else if bind {
            Action::Bind { recursive }
        } else if kind == "none" && !entry.propagation.is_empty() {
            Action::Propagate
        } else {
            Action::New { kind: kind.to_owned(), data: with_flags() }
        };
        (entry, data)
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
        assert_eq!(tmpfs.action, Action::New { kind: "tmpfs".into(), data: vec!["size=1m".into(), "mode=755".into()] });
        assert_eq!(entry("umount", "x-detach").action, Action::Detach);
    }

    #[test]
    fn what_a_line_of_a_type_does() {
        let action = |kind: &str, source: &str, options: &str| {
            MountEntry::of_type(kind, source, "/t", options.split(',')).0.action
        };
        let new = |kind: &str, data: &[&str]| Action::New {
            kind: kind.into(),
            data: data.iter().map(|&option| option.into()).collect(),
        };
        assert_eq!(action("proc", "none", "nosuid,hidepid=2"), new("proc", &["hidepid=2"]));
        assert_eq!(action("tmpfs", "none", "size=1,sync"), new("tmpfs", &["sync", "size=1"]));
        assert_eq!(action("none", "/s", "ro"), new("none", &[]));
        assert_eq!(action("none", "none", "rslave"), Action::Propagate);
        assert_eq!(action("none", "none", "remount,bind,ro"), Action::Remount { bind: true, data: vec![] });
        assert_eq!(
            action("tmpfs", "none", "remount,size=2"),
            Action::Remount { bind: false, data: vec!["size=2".into()] }
        );
        assert_eq!(action("none", "/s", "x-move"), Action::Move);
        assert_eq!(action("none", "/s", "x-detach,bind"), Action::Detach);
        assert_eq!(action("ext4", "/s", "bind"), Action::Bind { recursive: false });
        assert_eq!(MountEntry::of_type("none", "/s", "/t", ["bind", "x-foo"].into_iter()).1, ["x-foo"]);
        assert!(entry("/s", "bind,nofail,silent").quiet && !entry("/s", "bind,silent,loud").quiet);
    }

    #[test]
    fn a_bind_takes_no_file_system_options() {
        let error = MountEntry::new("/s", "/t", ["rbind", "size=1m"].into_iter()).unwrap_err();
        assert_eq!(error.to_string(), "failed to mount: /s at /t: unknown option \"size=1m\"");
    }
}
