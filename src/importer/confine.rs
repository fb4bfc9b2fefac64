//! What the importer gives up before it reads anything hostile. The broker has taken its identity and capabilities away;
//! here go the system calls, files and memory that an import does not need.

#![forbid(unsafe_code)]

use std::io;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit};

use crate::sys::seccomp::{Filter, ForeignAbi};

/// Private memory of the whole process: buffers, decompression windows, the metadata of layers, stacks.
const MEMORY: u64 = 256 << 20;

/// What may be read: configuration of name resolution, time zones and trust; libraries. Besides, what [`TRUST`] names.
const READABLE: [&str; 9] =
    ["/etc", "/usr", "/lib", "/lib64", "/run", "/var/run", "/var/lib/ca-certificates", "/proc", "/sys"];

/// Where the administrator may have put other certificates (`import.environment` of the configuration).
const TRUST: [&str; 2] = ["SSL_CERT_FILE", "SSL_CERT_DIR"];

/// Confines the process, which must have one thread. Fails if the kernel has a facility and refuses it.
pub fn confine() -> io::Result<()> {
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    rustix::thread::set_no_new_privs(true)?;
    limit(Resource::Core, 0)?;
    limit(Resource::Data, MEMORY)?;
    restrict_files().map_err(|error| io::Error::other(format!("landlock: {error}")))?;
    filter().load()
}

fn limit(resource: Resource, most: u64) -> io::Result<()> {
    let maximum = rustix::process::getrlimit(resource).maximum.map_or(most, |maximum| maximum.min(most));
    rustix::process::setrlimit(resource, Rlimit { current: Some(maximum), maximum: Some(maximum) })?;
    Ok(())
}

/// Landlock (Documentation/userspace-api/landlock.rst), as far as this kernel has it: files of the system can be read,
/// nothing can be written, run or signalled. Descriptors that are passed in stay usable.
fn restrict_files() -> Result<(), landlock::RulesetError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(ABI::V6))?
        .scope(Scope::Signal)?
        .create()?;
    let trust = TRUST.into_iter().filter_map(std::env::var_os).flat_map(|paths| {
        // OpenSSL takes several directories.
        std::env::split_paths(&paths).collect::<Vec<_>>()
    });
    for path in READABLE.into_iter().map(PathBuf::from).chain(trust) {
        // What this system does not have need not be readable.
        if let Ok(place) = PathFd::new(&path) {
            let file: BitFlags<AccessFs> = AccessFs::ReadFile.into();
            let access = if path.is_dir() { file | AccessFs::ReadDir } else { file };
            ruleset = ruleset.add_rule(PathBeneath::new(place, access))?;
        }
    }
    ruleset.restrict_self()?;
    Ok(())
}

/// System calls that an import never makes, and that have made holes before.
fn filter() -> Filter {
    const EPERM: u16 = libc::EPERM as u16;
    const NAMESPACES: u32 = (libc::CLONE_NEWNS
        | libc::CLONE_NEWUSER
        | libc::CLONE_NEWPID
        | libc::CLONE_NEWNET
        | libc::CLONE_NEWIPC
        | libc::CLONE_NEWUTS
        | libc::CLONE_NEWCGROUP) as u32;
    const FAMILIES: [u32; 4] =
        [libc::AF_UNIX as u32, libc::AF_INET as u32, libc::AF_INET6 as u32, libc::AF_NETLINK as u32];
    // Linux 6.15, 6.17; unknown to libc.
    const OPEN_TREE_ATTR: libc::c_long = 467;
    const FILE_SETATTR: libc::c_long = 469;
    // Only threads: a process of its own could outlive the importer.
    #[cfg(target_arch = "x86_64")]
    let forks = [libc::SYS_fork, libc::SYS_vfork];
    #[cfg(not(target_arch = "x86_64"))]
    let forks = [];
    Filter::new(ForeignAbi::Errno(EPERM))
        // Other programs and processes.
        .errno(&forks, EPERM)
        .errno_if_no_bit(libc::SYS_clone, 0, libc::CLONE_THREAD as u32, EPERM)
        .errno(&[libc::SYS_execve, libc::SYS_execveat, libc::SYS_ptrace, libc::SYS_process_vm_readv], EPERM)
        .errno(&[libc::SYS_process_vm_writev, libc::SYS_process_madvise, libc::SYS_pidfd_getfd, libc::SYS_kcmp], EPERM)
        // Mounts and namespaces.
        .errno(&[libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root, libc::SYS_chroot, libc::SYS_setns], EPERM)
        .errno(&[libc::SYS_unshare, libc::SYS_open_tree, libc::SYS_move_mount, libc::SYS_mount_setattr], EPERM)
        .errno(&[libc::SYS_fsopen, libc::SYS_fsconfig, libc::SYS_fsmount, libc::SYS_fspick, OPEN_TREE_ATTR], EPERM)
        .errno_if_any_bit(libc::SYS_clone, 0, NAMESPACES, EPERM)
        // Its flags are in memory, where a filter cannot look: glibc then takes clone.
        .errno(&[libc::SYS_clone3], libc::ENOSYS as u16)
        // Files other than the ones that are passed in.
        .errno(&[libc::SYS_open_by_handle_at, libc::SYS_name_to_handle_at, libc::SYS_mknodat, FILE_SETATTR], EPERM)
        .errno(&[libc::SYS_quotactl, libc::SYS_acct, libc::SYS_swapon, libc::SYS_swapoff], EPERM)
        // Kernel interfaces with a history.
        .errno(&[libc::SYS_bpf, libc::SYS_perf_event_open, libc::SYS_userfaultfd, libc::SYS_fanotify_init], EPERM)
        .errno(&[libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register], EPERM)
        .errno(&[libc::SYS_io_setup, libc::SYS_io_submit, libc::SYS_add_key, libc::SYS_request_key], EPERM)
        .errno(&[libc::SYS_keyctl, libc::SYS_personality, libc::SYS_vmsplice, libc::SYS_syslog], EPERM)
        .errno_unless(libc::SYS_socket, 0, &FAMILIES, EPERM)
        // The machine.
        .errno(&[libc::SYS_kexec_load, libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module], EPERM)
        .errno(&[libc::SYS_reboot, libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_adjtimex], EPERM)
        .errno(&[libc::SYS_clock_adjtime, libc::SYS_sethostname, libc::SYS_setdomainname], EPERM)
}
