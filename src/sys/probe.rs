//! The program an image's entrypoint is given to execute: it reports its process id and waits to be killed. Where it ends
//! up, its environment and working directory are what the entrypoint has prepared.
//!
//! A static executable of a few instructions, so that images need neither a shell nor a C library: an ELF header, the code
//! below, and the path of the file to report to. It writes what the link `/proc/self` says, a pid in decimal, and a newline.

use std::ffi::CStr;

/// Where the file is mapped. Any address works that is above `vm.mmap_min_addr` and below other mappings.
const ADDRESS: u64 = 0x40_0000;
const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const PROGRAM_HEADERS: u64 = 2;

#[cfg(target_arch = "x86_64")]
const MACHINE: u16 = 62;
#[cfg(target_arch = "aarch64")]
const MACHINE: u16 = 183;

#[cfg(target_arch = "x86_64")]
std::arch::global_asm!(
    ".pushsection .rodata.pyxis_probe, \"a\"",
    ".globl pyxis_probe_start",
    ".globl pyxis_probe_end",
    ".hidden pyxis_probe_start",
    ".hidden pyxis_probe_end",
    "pyxis_probe_start:",
    "mov eax, 257", // openat(AT_FDCWD, path, O_WRONLY)
    "mov edi, -100",
    "lea rsi, [rip + 5f]",
    "mov edx, 1",
    "xor r10d, r10d",
    "syscall",
    "test eax, eax",
    "js 3f",
    "mov r12d, eax",
    "sub rsp, 64",
    "mov eax, 267", // readlinkat(AT_FDCWD, "/proc/self", stack, 63)
    "mov edi, -100",
    "lea rsi, [rip + 4f]",
    "mov rdx, rsp",
    "mov r10d, 63",
    "syscall",
    "test eax, eax",
    "jle 3f",
    "mov byte ptr [rsp + rax], 10",
    "lea edx, [rax + 1]",
    "mov eax, 1", // write(file, stack, length + 1)
    "mov edi, r12d",
    "mov rsi, rsp",
    "syscall",
    "2:",
    "mov eax, 271", // ppoll(NULL, 0, NULL, NULL)
    "xor edi, edi",
    "xor esi, esi",
    "xor edx, edx",
    "xor r10d, r10d",
    "syscall",
    "jmp 2b",
    "3:",
    "mov eax, 60", // exit(125)
    "mov edi, 125",
    "syscall",
    "4: .asciz \"/proc/self\"",
    "5:",
    "pyxis_probe_end:",
    ".popsection",
);

#[cfg(target_arch = "aarch64")]
std::arch::global_asm!(
    ".pushsection .rodata.pyxis_probe, \"a\"",
    ".balign 4",
    ".globl pyxis_probe_start",
    ".globl pyxis_probe_end",
    ".hidden pyxis_probe_start",
    ".hidden pyxis_probe_end",
    "pyxis_probe_start:",
    "mov x8, #56", // openat(AT_FDCWD, path, O_WRONLY)
    "mov x0, #-100",
    "adr x1, 5f",
    "mov x2, #1",
    "mov x3, #0",
    "svc #0",
    "tbnz x0, #63, 3f",
    "mov x19, x0",
    "sub sp, sp, #64",
    "mov x8, #78", // readlinkat(AT_FDCWD, "/proc/self", stack, 63)
    "mov x0, #-100",
    "adr x1, 4f",
    "mov x2, sp",
    "mov x3, #63",
    "svc #0",
    "cmp x0, #0",
    "b.le 3f",
    "mov x2, sp",
    "mov w3, #10",
    "strb w3, [x2, x0]",
    "mov x8, #64", // write(file, stack, length + 1)
    "add x2, x0, #1",
    "mov x0, x19",
    "mov x1, sp",
    "svc #0",
    "2:",
    "mov x8, #73", // ppoll(NULL, 0, NULL, NULL)
    "mov x0, #0",
    "mov x1, #0",
    "mov x2, #0",
    "mov x3, #0",
    "svc #0",
    "b 2b",
    "3:",
    "mov x8, #93", // exit(125)
    "mov x0, #125",
    "svc #0",
    "4: .asciz \"/proc/self\"",
    "5:",
    "pyxis_probe_end:",
    ".popsection",
);

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
fn code() -> &'static [u8] {
    unsafe extern "C" {
        static pyxis_probe_start: u8;
        static pyxis_probe_end: u8;
    }
    // SAFETY: both symbols lie in one read-only section, the second after the first: see above.
    unsafe {
        let (start, end) = (&raw const pyxis_probe_start, &raw const pyxis_probe_end);
        std::slice::from_raw_parts(start, end.offset_from_unsigned(start))
    }
}

/// The executable that reports to the file `report`. `None` for machines without one.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
pub fn executable(report: &CStr) -> Option<Vec<u8>> {
    let start = HEADER + PROGRAM_HEADER * PROGRAM_HEADERS;
    let (code, path) = (code(), report.to_bytes_with_nul());
    let size = start + (code.len() + path.len()) as u64;
    let mut file = Vec::new();
    // Elf64_Ehdr of elf(5): 64 bits, this machine's byte order, an executable.
    let order = if cfg!(target_endian = "little") { 1 } else { 2 };
    file.extend([0x7f, b'E', b'L', b'F', 2, order, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let halves = |values: &[u16], file: &mut Vec<u8>| file.extend(values.iter().flat_map(|value| value.to_ne_bytes()));
    halves(&[2, MACHINE], &mut file);
    file.extend(1_u32.to_ne_bytes());
    for word in [ADDRESS + start, HEADER, 0] {
        file.extend(word.to_ne_bytes());
    }
    file.extend(0_u32.to_ne_bytes());
    halves(&[HEADER as u16, PROGRAM_HEADER as u16, PROGRAM_HEADERS as u16, 64, 0, 0], &mut file);
    // Two Elf64_Phdr: the whole file, readable and executable; a stack that is not executable.
    const LOAD: u32 = 1;
    const GNU_STACK: u32 = 0x6474_e551;
    for (kind, flags, address, size, align) in [(LOAD, 5_u32, ADDRESS, size, 0x1000), (GNU_STACK, 6, 0, 0, 16)] {
        file.extend(kind.to_ne_bytes());
        file.extend(flags.to_ne_bytes());
        for word in [0, address, address, size, size, align] {
            file.extend(u64::to_ne_bytes(word));
        }
    }
    file.extend(code);
    file.extend(path);
    Some(file)
}

/// The executable that reports to the file `report`. `None` for machines without one.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
pub fn executable(_report: &CStr) -> Option<Vec<u8>> {
    None
}

/// What a shell has to be told to do the same.
pub fn shell_script(report: &str) -> String {
    format!("echo $$ >{report}; kill -STOP $$")
}

#[cfg(test)]
mod tests {
    use std::ffi::CString;
    use std::fs::File;
    use std::io::{BufRead, BufReader};
    use std::os::fd::AsRawFd;
    use std::process::{Child, Command};

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;
    use crate::sys::memfile;

    fn reports_itself(start: impl FnOnce(&str) -> Child) {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let mut child = start(&format!("/proc/{}/fd/{}", std::process::id(), write.as_raw_fd()));
        let mut line = String::new();
        BufReader::new(File::from(read)).read_line(&mut line).unwrap();
        assert_eq!(line, format!("{}\n", child.id()));
        let environment = std::fs::read(format!("/proc/{}/environ", child.id())).unwrap();
        assert_eq!(environment, b"A=b\0");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
    fn the_probe_reports_its_pid_and_waits() {
        reports_itself(|report| {
            let executable = executable(&CString::new(report).unwrap()).unwrap();
            let file = memfile::executable("probe", &executable).unwrap();
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            Command::new(path).arg("ignored").env_clear().env("A", "b").spawn().unwrap()
        });
        // Nowhere to report to.
        let lost = memfile::executable("probe", &executable(c"/nonexistent/file").unwrap()).unwrap();
        let status = Command::new(format!("/proc/{}/fd/{}", std::process::id(), lost.as_raw_fd())).status().unwrap();
        assert_eq!(status.code(), Some(125));
    }

    #[test]
    fn so_does_a_shell() {
        reports_itself(|report| {
            Command::new("/bin/sh").args(["-c", &shell_script(report)]).env_clear().env("A", "b").spawn().unwrap()
        });
    }
}
