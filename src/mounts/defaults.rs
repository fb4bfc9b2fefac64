//! The mounts every container gets (behaviour reference, section 14.1), as fstab lines.

use super::entry::MountEntry;

/// Source, target and options, in order.
const DEFAULT_MOUNTS: [(&str, &str, &str); 11] = [
    ("/proc", "/proc", "x-create=dir,rbind,rw,nosuid,nodev,noexec,rslave"),
    ("/sys", "/sys", "x-create=dir,rbind,ro,nosuid,nodev,noexec,rslave"),
    ("/dev", "/dev", "x-create=dir,rbind,rw,nosuid,noexec,rslave"),
    ("tmpfs", "/tmp", "x-create=dir,rw,nosuid,nodev,mode=755"),
    ("tmpfs", "/var/run", "x-create=dir,rw,nosuid,nodev,mode=755"),
    ("tmpfs", "/var/lock", "x-create=dir,rw,nosuid,nodev,mode=755"),
    ("/dev/shm", "/dev/shm", "bind,rw,nosuid,nodev,noexec,nofail"),
    ("/etc/hosts", "/etc/hosts", "x-create=file,bind,ro,nosuid,nodev,noexec,private,nofail"),
    ("/etc/hostname", "/etc/hostname", "x-create=file,bind,ro,nosuid,nodev,noexec,private,nofail"),
    ("/etc/resolv.conf", "/etc/resolv.conf", "x-create=file,bind,ro,nosuid,nodev,noexec,private,nofail"),
    ("/etc/machine-id", "/etc/machine-id", "x-create=file,bind,ro,nosuid,nodev,noexec,private,nofail"),
];

/// The default mounts, in order.
pub fn default_mounts() -> impl Iterator<Item = MountEntry> {
    DEFAULT_MOUNTS.iter().filter_map(|(source, target, options)| {
        // The tests read every line.
        MountEntry::new(source, target, options.split(',')).ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_line_is_understood() {
        assert_eq!(default_mounts().count(), DEFAULT_MOUNTS.len());
    }
}
