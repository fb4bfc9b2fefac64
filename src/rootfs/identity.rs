//! `/etc/passwd`, `/etc/group` and the home directory (behaviour reference, section 17, `10-shadow`): programs inside find
//! the user's name, home and shell, whatever the image ships.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use crate::mounts::rootdir::RootDir;
use crate::request::{Environment, User};

/// The ids that stand for everybody who is not mapped (`/proc/sys/kernel/overflowuid`).
const OVERFLOW_ID: u32 = 65534;
/// Most bytes of a passwd or group file of an image.
const MAX_FILE: u64 = 4 << 20;
/// Most files of an image's `/etc/skel` that are copied, and most bytes of one.
const MAX_SKELETON_FILES: usize = 64;
const MAX_SKELETON_FILE: u64 = 1 << 20;
/// The shell of last resort.
const SHELL: &str = "/bin/sh";

/// What the host knows about the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostUser {
    /// Login name.
    pub name: String,
    /// Comment field.
    pub gecos: String,
    /// Home directory.
    pub home: String,
    /// Login shell.
    pub shell: String,
    /// Name of the primary group.
    pub group: String,
}

impl HostUser {
    /// From the host's name service, or, if that does not know him or does not answer, from the job's environment: a
    /// directory service that is down for a moment must not keep a job from starting.
    pub fn look_up(user: &User, environment: &Environment) -> Self {
        let entry = nix::unistd::User::from_uid(user.uid.into()).ok().flatten();
        let group = nix::unistd::Group::from_gid(user.gid.into()).ok().flatten();
        let variable = |names: &[&str]| names.iter().find_map(|name| environment.get_str(name)).map(str::to_owned);
        let field = |text: String| text.replace([':', '\n', '\0'], "_");
        let (name, gecos, home, shell) = match entry {
            Some(entry) => (
                entry.name,
                entry.gecos.to_string_lossy().into_owned(),
                entry.dir.to_string_lossy().into_owned(),
                entry.shell.to_string_lossy().into_owned(),
            ),
            None => (
                variable(&["SLURM_JOB_USER", "USER", "LOGNAME"]).unwrap_or_else(|| format!("user{}", user.uid)),
                String::new(),
                variable(&["HOME"]).unwrap_or_else(|| "/".to_owned()),
                variable(&["SHELL"]).unwrap_or_else(|| SHELL.to_owned()),
            ),
        };
        Self {
            name: field(name),
            gecos: field(gecos),
            home: field(home),
            shell: field(shell),
            group: field(group.map_or_else(|| format!("group{}", user.gid), |group| group.name)),
        }
    }
}

/// Home directory and shell that a login inside the container would have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Login {
    /// Name of the inside uid.
    pub user: String,
    /// Home directory of the inside uid.
    pub home: String,
    /// Login shell.
    pub shell: String,
}

/// Rewrites both files, makes the home directory, and says who the user is inside.
pub fn write(root: RootDir<'_>, user: &User, host: &HostUser, remap_root: bool) -> io::Result<Login> {
    let passwd = read(root, "/etc/passwd")?;
    let group = read(root, "/etc/group")?;
    let shell = if root.is_executable(&host.shell) { &host.shell } else { SHELL };
    let (passwd, login) = passwd_file(&String::from_utf8_lossy(&passwd), user, host, shell, remap_root);
    root.write_where_possible("/etc/passwd", passwd.as_bytes(), 0o644)?;
    let group = group_file(&String::from_utf8_lossy(&group), user, host);
    root.write_where_possible("/etc/group", group.as_bytes(), 0o644)?;
    let home = Path::new(&login.home);
    if home.is_absolute() && root.open(home, OFlags::PATH, Mode::empty()).is_err_and(|errno| errno == Errno::NOENT) {
        // An image may have a file on the way: a program that needs the directory will say so.
        let _ = root.ensure_directory(home, Mode::from_raw_mode(0o700)).map(|()| copy_skeleton(root, home));
    }
    Ok(login)
}

/// A file of the image's; nothing if it has none, or a link that goes in circles.
fn read(root: RootDir<'_>, path: &str) -> io::Result<Vec<u8>> {
    match root.read(path, MAX_FILE) {
        Err(error) if Errno::from_io_error(&error) == Some(Errno::LOOP) => Ok(Vec::new()),
        other => Ok(other?.unwrap_or_default()),
    }
}

/// Who the user is inside a container that runs already: nothing is written.
pub fn look_up_inside(root: RootDir<'_>, user: &User, host: &HostUser, remap_root: bool) -> io::Result<Login> {
    let passwd = read(root, "/etc/passwd")?;
    let shell = if root.is_executable(&host.shell) { &host.shell } else { SHELL };
    Ok(passwd_file(&String::from_utf8_lossy(&passwd), user, host, shell, remap_root).1)
}

/// Copies the regular files of the image's `/etc/skel` to the new directory `home`, as useradd(8) would. What cannot be
/// copied is left out: no job needs it.
fn copy_skeleton(root: RootDir<'_>, home: &Path) {
    let Ok(skeleton) = root.open(Path::new("/etc/skel"), OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()) else {
        return;
    };
    let Ok(entries) = rustix::fs::Dir::new(skeleton) else { return };
    for entry in entries.take(MAX_SKELETON_FILES).flatten() {
        let Ok(name) = entry.file_name().to_str() else { continue };
        if let Ok(Some(content)) = root.read(&format!("/etc/skel/{name}"), MAX_SKELETON_FILE)
            && let Some(target) = home.join(name).to_str()
        {
            let _ = root.write(target, &content, 0o600);
        }
    }
}

/// The new passwd(5): root, nobody and the user first, then what is valid of the image's and not a duplicate.
fn passwd_file(image: &str, user: &User, host: &HostUser, shell: &str, remap_root: bool) -> (String, Login) {
    let lines: Vec<Vec<&str>> = image
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .filter(|fields| {
            fields.len() == 7
                && !fields[0].is_empty()
                && fields[0] != "_apt"
                && fields[2].parse::<u32>().is_ok()
                && fields[3].parse::<u32>().is_ok()
        })
        .collect();
    let root = lines.iter().find(|fields| fields[0] == "root");
    let root_home = root.map(|fields| fields[5]).filter(|home| home.starts_with('/')).unwrap_or("/root");
    let root_shell = root.map(|fields| fields[6]).filter(|shell| !shell.is_empty()).unwrap_or(SHELL);
    let root_shell = if remap_root { shell } else { root_shell };

    let mut names = HashSet::new();
    let mut text = String::new();
    let mut add = |name: &str, rest: String| {
        if names.insert(name.to_owned()) {
            text.push_str(&format!("{name}:{rest}\n"));
        }
    };
    add("root", format!("x:0:0:root:{root_home}:{root_shell}"));
    add("nobody", format!("x:{OVERFLOW_ID}:{OVERFLOW_ID}:nobody:/nonexistent:/usr/sbin/nologin"));
    add(&host.name, format!("x:{}:{}:{}:{}:{shell}", user.uid, user.gid, host.gecos, host.home));
    for fields in &lines {
        add(fields[0], fields[1..].join(":"));
    }
    let login = match remap_root || user.uid == 0 {
        true => Login { user: "root".into(), home: root_home.into(), shell: root_shell.into() },
        false => Login { user: host.name.clone(), home: host.home.clone(), shell: shell.into() },
    };
    (text, login)
}

/// The new group(5), likewise; of the user's groups only the primary one, since no other is mapped.
fn group_file(image: &str, user: &User, host: &HostUser) -> String {
    let mut names = HashSet::new();
    let mut text = String::new();
    let mut add = |name: &str, rest: String| {
        if names.insert(name.to_owned()) {
            text.push_str(&format!("{name}:{rest}\n"));
        }
    };
    add("root", "x:0:".into());
    add("nogroup", format!("x:{OVERFLOW_ID}:"));
    add(&host.group, format!("x:{}:", user.gid));
    for line in image.lines() {
        let fields: Vec<&str> = line.split(':').collect();
        if fields.len() == 4 && !fields[0].is_empty() && fields[2].parse::<u32>().is_ok() {
            add(fields[0], fields[1..].join(":"));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const IMAGE: &str = "root:x:0:0:root:/root:/bin/ash\n_apt:x:100:65534::/nonexistent:/bin/false\nbroken\n\
                         bad:x:abc:1:::\nwww:x:33:33:www:/var/www:/sbin/nologin\nalice:x:5:5:image's:/x:/y\nwww:x:34:34:::\n";

    fn alice() -> (User, HostUser) {
        (
            User { uid: 1000, gid: 100, groups: vec![] },
            HostUser {
                name: "alice".into(),
                gecos: "Alice".into(),
                home: "/home/alice".into(),
                shell: "/bin/bash".into(),
                group: "users".into(),
            },
        )
    }

    #[test]
    fn the_user_comes_first_and_the_image_after() {
        let (user, host) = alice();
        let (text, login) = passwd_file(IMAGE, &user, &host, "/bin/sh", false);
        assert_eq!(
            text,
            "root:x:0:0:root:/root:/bin/ash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n\
             alice:x:1000:100:Alice:/home/alice:/bin/sh\nwww:x:33:33:www:/var/www:/sbin/nologin\n"
        );
        assert_eq!(login, Login { user: "alice".into(), home: "/home/alice".into(), shell: "/bin/sh".into() });
    }

    #[test]
    fn a_remapped_user_is_root() {
        let (user, host) = alice();
        let (text, login) = passwd_file("", &user, &host, "/bin/bash", true);
        assert!(text.starts_with("root:x:0:0:root:/root:/bin/bash\n"), "{text}");
        assert_eq!(login, Login { user: "root".into(), home: "/root".into(), shell: "/bin/bash".into() });
    }

    #[test]
    fn groups_are_weeded_too() {
        let (user, host) = alice();
        assert_eq!(
            group_file("root:x:0:\nusers:x:50:bob\naudio:x:29:alice\nbad\n", &user, &host),
            "root:x:0:\nnogroup:x:65534:\nusers:x:100:\naudio:x:29:alice\n"
        );
    }
}
