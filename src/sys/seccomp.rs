//! Small seccomp filters (Documentation/userspace-api/seccomp_filter.rst): everything is allowed but the system calls
//! that are named, which fail with an error number, or with 0 pretend to have worked.
//!
//! Classic BPF, one comparison after the other: filters of this project name a few dozen system calls.

use std::io;

use libc::{c_long, sock_filter};

/// What happens to system calls of another ABI of the machine (32-bit, x32), which have other numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignAbi {
    /// The filter does not apply to them.
    Allow,
    /// All of them fail with this error number.
    Errno(u16),
}

/// A filter under construction. Of two rules for one system call the first that applies counts.
#[derive(Debug, Clone)]
pub struct Filter {
    foreign: ForeignAbi,
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
struct Rule {
    syscall: u32,
    when: When,
    errno: u16,
}

#[derive(Debug, Clone)]
enum When {
    Always,
    /// The low half of this argument has one of these bits.
    AnyBit(u8, u32),
    /// The low half of this argument has none of these bits.
    NoBit(u8, u32),
    /// The low half of this argument is none of these values.
    NotIn(u8, Vec<u32>),
}

/// Marks the x32 calls of x86-64, which come with the same architecture value (`__X32_SYSCALL_BIT`).
const X32_BIT: u32 = 0x4000_0000;

/// `AUDIT_ARCH_*` of <linux/audit.h>: ELF machine, 64 bit, little endian.
const NATIVE_ARCH: u32 = {
    const BITS_64: u32 = 0x8000_0000;
    const LITTLE_ENDIAN: u32 = 0x4000_0000;
    if cfg!(target_arch = "x86_64") {
        62 | BITS_64 | LITTLE_ENDIAN
    } else if cfg!(target_arch = "aarch64") {
        183 | BITS_64 | LITTLE_ENDIAN
    } else if cfg!(target_arch = "riscv64") {
        243 | BITS_64 | LITTLE_ENDIAN
    } else if cfg!(target_arch = "loongarch64") {
        258 | BITS_64 | LITTLE_ENDIAN
    } else if cfg!(all(target_arch = "powerpc64", target_endian = "little")) {
        21 | BITS_64 | LITTLE_ENDIAN
    } else {
        panic!("seccomp filters are not written for this architecture")
    }
};

// Offsets in struct seccomp_data.
const NR: u32 = 0;
const ARCH: u32 = 4;
const ARGUMENTS: u32 = 16;

impl Filter {
    /// A filter that allows everything.
    pub fn new(foreign: ForeignAbi) -> Self {
        Self { foreign, rules: Vec::new() }
    }

    /// `syscalls` return `errno`; 0 makes them do nothing and succeed.
    pub fn errno(self, syscalls: &[c_long], errno: u16) -> Self {
        self.rules(syscalls, When::Always, errno)
    }

    /// `syscall` returns `errno` if argument `index` has one of the bits of `mask`.
    pub fn errno_if_any_bit(self, syscall: c_long, index: u8, mask: u32, errno: u16) -> Self {
        self.rules(&[syscall], When::AnyBit(index, mask), errno)
    }

    /// `syscall` returns `errno` if argument `index` has none of the bits of `mask`.
    pub fn errno_if_no_bit(self, syscall: c_long, index: u8, mask: u32, errno: u16) -> Self {
        self.rules(&[syscall], When::NoBit(index, mask), errno)
    }

    /// `syscall` returns `errno` unless argument `index` is one of `allowed` (at most 250).
    pub fn errno_unless(self, syscall: c_long, index: u8, allowed: &[u32], errno: u16) -> Self {
        self.rules(&[syscall], When::NotIn(index, allowed.to_vec()), errno)
    }

    fn rules(mut self, syscalls: &[c_long], when: When, errno: u16) -> Self {
        self.rules.extend(syscalls.iter().map(|&syscall| Rule { syscall: syscall as u32, when: when.clone(), errno }));
        self
    }

    /// Applies the filter to the calling thread and to what it starts from now on. It needs `no_new_privs`, or
    /// CAP_SYS_ADMIN in the user namespace.
    pub fn load(&self) -> io::Result<()> {
        let program = self.program();
        let length = u16::try_from(program.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let prog = libc::sock_fprog { len: length, filter: program.as_ptr().cast_mut() };
        // Without this flag kernels before 5.16 slow every later instruction down that could leak speculatively.
        // Kernels before 4.17 do not know it.
        for flags in [libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW, 0] {
            // SAFETY: `prog` points to `length` instructions, which outlive the call; the kernel copies them.
            let result =
                unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const prog) };
            if result == 0 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if error.raw_os_error() != Some(libc::EINVAL) || flags == 0 {
                return Err(error);
            }
        }
        Ok(())
    }

    /// The filter as classic BPF.
    fn program(&self) -> Vec<sock_filter> {
        let allow = ret(libc::SECCOMP_RET_ALLOW);
        let foreign = match self.foreign {
            ForeignAbi::Allow => allow,
            ForeignAbi::Errno(errno) => ret_errno(errno),
        };
        let mut program = vec![load(ARCH), jump(libc::BPF_JEQ, NATIVE_ARCH, 1, 0), foreign, load(NR)];
        if cfg!(target_arch = "x86_64") {
            program.extend([jump(libc::BPF_JSET, X32_BIT, 0, 1), foreign]);
        }
        for rule in &self.rules {
            let mut body = Vec::new();
            match &rule.when {
                When::Always => {}
                When::AnyBit(index, mask) => {
                    body.extend([load(argument(*index)), jump(libc::BPF_JSET, *mask, 0, 1)]);
                }
                When::NoBit(index, mask) => {
                    body.extend([load(argument(*index)), jump(libc::BPF_JSET, *mask, 1, 0)]);
                }
                When::NotIn(index, allowed) => {
                    body.push(load(argument(*index)));
                    // To the reload of the number, behind the other comparisons and the return.
                    let left = |at: usize| (allowed.len() - at) as u8;
                    body.extend(allowed.iter().enumerate().map(|(at, &value)| jump(libc::BPF_JEQ, value, left(at), 0)));
                }
            }
            body.push(ret_errno(rule.errno));
            if body.len() > 1 {
                body.push(load(NR));
            }
            program.push(jump(libc::BPF_JEQ, rule.syscall, 0, body.len() as u8));
            program.extend(body);
        }
        program.push(allow);
        program
    }
}

/// Where the low half of an argument is.
fn argument(index: u8) -> u32 {
    ARGUMENTS + 8 * u32::from(index) + if cfg!(target_endian = "big") { 4 } else { 0 }
}

fn load(offset: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16, jt: 0, jf: 0, k: offset }
}

fn jump(test: u32, value: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k: value }
}

fn ret(action: u32) -> sock_filter {
    sock_filter { code: (libc::BPF_RET | libc::BPF_K) as u16, jt: 0, jf: 0, k: action }
}

fn ret_errno(errno: u16) -> sock_filter {
    ret(libc::SECCOMP_RET_ERRNO | u32::from(errno))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EPERM: u16 = libc::EPERM as u16;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
    const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;

    /// What the program returns for a call: the kernel's interpreter, for the instructions that we use.
    fn evaluate(program: &[sock_filter], arch: u32, nr: u32, arguments: [u64; 6]) -> u32 {
        let (mut accumulator, mut at) = (0u32, 0);
        loop {
            let instruction = program[at];
            let k = instruction.k;
            at += 1;
            match u32::from(instruction.code) {
                code if code == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = match k {
                        NR => nr,
                        ARCH => arch,
                        _ => arguments[(k - ARGUMENTS) as usize / 8] as u32,
                    }
                }
                code if code == libc::BPF_RET | libc::BPF_K => return k,
                code => {
                    let holds = if code & 0xf0 == libc::BPF_JSET { accumulator & k != 0 } else { accumulator == k };
                    at += usize::from(if holds { instruction.jt } else { instruction.jf });
                }
            }
        }
    }

    fn filter(foreign: ForeignAbi) -> Vec<sock_filter> {
        Filter::new(foreign)
            .errno(&[libc::SYS_mount, libc::SYS_ptrace], EPERM)
            .errno_if_any_bit(libc::SYS_clone, 0, libc::CLONE_NEWUSER as u32, EPERM)
            .errno_if_no_bit(libc::SYS_clone, 0, libc::CLONE_VM as u32, EPERM)
            .errno_unless(libc::SYS_socket, 0, &[1, 2, 10], EPERM)
            .errno(&[libc::SYS_fchown], 0)
            .program()
    }

    #[test]
    fn rules_decide_by_number_and_argument() {
        let program = filter(ForeignAbi::Allow);
        for (syscall, arguments, verdict) in [
            (libc::SYS_read, [0; 6], ALLOW),
            (libc::SYS_mount, [0; 6], DENY),
            (libc::SYS_ptrace, [0; 6], DENY),
            (libc::SYS_clone, [libc::CLONE_VM as u64, 0, 0, 0, 0, 0], ALLOW),
            (libc::SYS_clone, [(libc::CLONE_VM | libc::CLONE_NEWUSER) as u64, 0, 0, 0, 0, 0], DENY),
            (libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0], DENY),
            (libc::SYS_socket, [1, 0, 0, 0, 0, 0], ALLOW),
            (libc::SYS_socket, [10, 0, 0, 0, 0, 0], ALLOW),
            (libc::SYS_socket, [17, 0, 0, 0, 0, 0], DENY),
            (libc::SYS_fchown, [0; 6], libc::SECCOMP_RET_ERRNO),
        ] {
            assert_eq!(evaluate(&program, NATIVE_ARCH, syscall as u32, arguments), verdict, "{syscall} {arguments:?}");
        }
    }

    #[test]
    fn other_abis_are_treated_as_asked() {
        for (foreign, verdict) in [(ForeignAbi::Allow, ALLOW), (ForeignAbi::Errno(EPERM), DENY)] {
            let program = filter(foreign);
            assert_eq!(evaluate(&program, 0x4000_0003, libc::SYS_mount as u32, [0; 6]), verdict);
            if cfg!(target_arch = "x86_64") {
                assert_eq!(evaluate(&program, NATIVE_ARCH, libc::SYS_read as u32 | X32_BIT, [0; 6]), verdict);
            }
        }
    }

    #[test]
    fn the_kernel_enforces_it() {
        // Filter and no_new_privs belong to a thread: the test runner's other threads stay free.
        let outcome = std::thread::spawn(|| {
            rustix::thread::set_no_new_privs(true).unwrap();
            Filter::new(ForeignAbi::Errno(EPERM))
                .errno(&[libc::SYS_unshare], EPERM)
                .errno(&[libc::SYS_getpriority], 0)
                .load()
                .unwrap();
            // SAFETY: neither call touches memory.
            let unshared = unsafe { libc::syscall(libc::SYS_unshare, libc::CLONE_FS) };
            let error = io::Error::last_os_error();
            // SAFETY: as above.
            (unshared, error.raw_os_error(), unsafe { libc::syscall(libc::SYS_getpriority, 99, 0) })
        });
        assert_eq!(outcome.join().unwrap(), (-1, Some(libc::EPERM), 0));
    }
}
