//! The filter every task runs under (behaviour reference, section 8): with one mapped uid, changing owners cannot work, and
//! package managers do it all the time. So it pretends to have worked.

use crate::sys::seccomp::{Filter, ForeignAbi};

/// Changing owners and identities succeeds and does nothing. `setfsuid(-1)` and `setfsgid(-1)`, which only ask, are
/// executed. Programs of another ABI are not filtered.
pub fn fake_ownership() -> Filter {
    let mut calls = vec![
        libc::SYS_fchown,
        libc::SYS_fchownat,
        libc::SYS_setuid,
        libc::SYS_setgid,
        libc::SYS_setreuid,
        libc::SYS_setregid,
        libc::SYS_setresuid,
        libc::SYS_setresgid,
        libc::SYS_setgroups,
    ];
    #[cfg(not(any(target_arch = "aarch64", target_arch = "riscv64", target_arch = "loongarch64")))]
    calls.extend([libc::SYS_chown, libc::SYS_lchown]);
    calls.sort_unstable();
    Filter::new(ForeignAbi::Allow).errno(&calls, 0).errno_unless(libc::SYS_setfsuid, 0, &[u32::MAX], 0).errno_unless(
        libc::SYS_setfsgid,
        0,
        &[u32::MAX],
        0,
    )
}
