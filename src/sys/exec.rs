//! execve(2) as execvpe(3) does it, with a `PATH` that is not the caller's own.

#![forbid(unsafe_code)]

use std::ffi::{CStr, CString};

use nix::errno::Errno;

/// Where programs are looked for without `PATH`.
const DEFAULT_PATH: &[u8] = b"/usr/bin:/bin";

/// Becomes `program`, which is looked for in `path` (separated by colons) unless it contains a slash. Returns only if
/// that fails. A file that is executable and in no format the kernel knows is a script for `/bin/sh`.
pub fn execute(program: &CStr, arguments: &[CString], variables: &[CString], path: Option<&[u8]>) -> Errno {
    let name = program.to_bytes();
    if name.contains(&b'/') {
        return execute_file(program, arguments, variables);
    }
    if name.is_empty() {
        return Errno::ENOENT;
    }
    let mut last = Errno::ENOENT;
    for directory in path.unwrap_or(DEFAULT_PATH).split(|&byte| byte == b':') {
        let directory: &[u8] = if directory.is_empty() { b"." } else { directory };
        // Neither part has a NUL byte.
        let Ok(candidate) = CString::new([directory, b"/", name].concat()) else { return Errno::EINVAL };
        match execute_file(&candidate, arguments, variables) {
            Errno::ENOENT | Errno::ENOTDIR => {}
            // There may be one elsewhere that may be executed.
            Errno::EACCES => last = Errno::EACCES,
            other => return other,
        }
    }
    last
}

fn execute_file(file: &CStr, arguments: &[CString], variables: &[CString]) -> Errno {
    let errno = execve(file, arguments, variables);
    if errno != Errno::ENOEXEC {
        return errno;
    }
    let script = [c"/bin/sh", file].map(CStr::to_owned).into_iter().chain(arguments.iter().skip(1).cloned());
    match execve(c"/bin/sh", &script.collect::<Vec<_>>(), variables) {
        // There is no shell: what is wrong is the file.
        Errno::ENOENT => Errno::ENOEXEC,
        other => other,
    }
}

fn execve(file: &CStr, arguments: &[CString], variables: &[CString]) -> Errno {
    match nix::unistd::execve(file, arguments, variables) {
        Err(errno) => errno,
        Ok(never) => match never {},
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What does not work: the rest is seen by everybody who runs a container.
    fn refused(program: &CStr, path: Option<&[u8]>) -> Errno {
        execute(program, &[program.to_owned()], &[], path)
    }

    #[test]
    fn what_cannot_be_executed() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("file"), "").unwrap();
        let path = directory.path().as_os_str().as_encoded_bytes();
        let both = [b"/nonexistent:", path, b":/etc/passwd"].concat();
        assert_eq!(refused(c"/etc", None), Errno::EACCES);
        assert_eq!(refused(c"/etc/passwd/x", None), Errno::ENOTDIR);
        assert_eq!(refused(c"", None), Errno::ENOENT);
        assert_eq!(refused(c"no-such-program", None), Errno::ENOENT);
        assert_eq!(refused(c"no-such-program", Some(&both)), Errno::ENOENT);
        assert_eq!(refused(c"file", Some(&both)), Errno::EACCES);
        assert_eq!(refused(c"file", Some(b"")), Errno::ENOENT);
    }
}
