//! Small adaptations of an image to the host and to a single mapped user, done natively: what enroot's hooks do
//! (behaviour reference, section 17).

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::mounts::entry::Create;
use crate::mounts::rootdir::RootDir;

/// Most bytes of a time zone file.
const MAX_ZONE: u64 = 1 << 20;

/// `10-aptfix`: apt drops to a user of its own for downloads, which a container with one mapped uid has not.
pub fn let_apt_stay_root(root: RootDir<'_>) -> io::Result<()> {
    if root.read("/etc/debian_version", MAX_ZONE)?.is_some() {
        root.write("/etc/apt/apt.conf.d/enroot", b"APT::Sandbox::User \"root\";\n", 0o644)?;
    }
    Ok(())
}

/// `10-localtime`: the container's clock shows the host's time zone. Where the host's `/etc/localtime` is a link, the
/// link is copied, and the zone's file too if the image lacks it.
pub fn copy_time_zone(root: RootDir<'_>) -> io::Result<()> {
    let Ok(link) = std::fs::read_link("/etc/localtime") else { return Ok(()) };
    let etc = match root.open(Path::new("/etc"), OFlags::PATH | OFlags::DIRECTORY, Mode::empty()) {
        Ok(etc) => etc,
        // A scratch image: it has no libc that would look.
        Err(_) => return Ok(()),
    };
    let there = rustix::fs::readlinkat(&etc, "localtime", Vec::new());
    if !there.is_ok_and(|there| there.as_bytes() == link.as_os_str().as_bytes()) {
        match rustix::fs::unlinkat(&etc, "localtime", AtFlags::empty()) {
            Err(Errno::NOENT) => {}
            // The image's own idea of it stays.
            Err(Errno::ISDIR) => return Ok(()),
            other => other?,
        }
        match rustix::fs::symlinkat(&link, &etc, "localtime") {
            // By a container that shares this root.
            Err(Errno::EXIST) => {}
            other => other?,
        }
    }
    let zone = Path::new("/etc").join(&link);
    let Some(zone) = zone.to_str() else { return Ok(()) };
    if root.read(zone, MAX_ZONE)?.is_none() {
        let file = std::fs::File::open("/etc/localtime")?;
        let mut content = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, MAX_ZONE), &mut content)?;
        root.write(zone, &content, 0o644)?;
    }
    Ok(())
}

/// The image's working directory exists, also when no layer brings it.
pub fn make_working_directory(root: RootDir<'_>, path: &str) -> Result<(), Errno> {
    match root.mount_point(Path::new(path), Create::No) {
        Err(Errno::NOENT) => root.ensure_directory(Path::new(path), Mode::from_raw_mode(0o755)),
        other => other.map(drop),
    }
}
