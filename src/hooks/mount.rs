//! `enroot-mount [--root DIRECTORY] [--pass NUMBER] FSTAB...`: what hooks mount with. The files' lines (`-` is standard
//! input) are mounted in the caller's namespace, with targets below the root (behaviour reference, section 15).

#![forbid(unsafe_code)]

use std::ffi::OsString;
use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use rustix::fs::{Mode, OFlags};

use crate::mounts::apply::apply;
use crate::mounts::fstab::{Fstab, MAX_FILE, Pass};
use crate::mounts::rootdir::RootDir;
use crate::sys;

const USAGE: &str = "usage: enroot-mount [--root DIRECTORY] [--pass NUMBER] FSTAB...";

struct Arguments {
    root: PathBuf,
    pass: Option<Pass>,
    files: Vec<PathBuf>,
}

/// Entry point: `arguments` without `argv[0]`.
pub fn main(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let Some(arguments) = parse(arguments) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn parse(mut arguments: impl Iterator<Item = OsString>) -> Option<Arguments> {
    let mut parsed = Arguments { root: "/".into(), pass: Some(Pass::AfterHooks), files: Vec::new() };
    while let Some(argument) = arguments.next() {
        let text = argument.to_str().unwrap_or_default();
        let (option, value) = match text.split_once('=').filter(|_| text.starts_with("--")) {
            Some((option, value)) => (option, Some(OsString::from(value))),
            None => (text, None),
        };
        match option {
            "--root" | "-r" => parsed.root = value.or_else(|| arguments.next())?.into(),
            "--pass" | "-p" => {
                let value = value.or_else(|| arguments.next())?;
                parsed.pass = match value.to_str()?.parse::<i64>().ok()? {
                    -1 => Some(Pass::BeforeHooks),
                    0 => Some(Pass::AfterHooks),
                    _ => None,
                };
            }
            "-" => parsed.files.push("-".into()),
            _ if text.starts_with('-') => return None,
            _ => parsed.files.push(argument.into()),
        }
    }
    (!parsed.files.is_empty()).then_some(parsed)
}

fn run(arguments: &Arguments) -> Result<(), String> {
    let opening = |path: &Path, error: String| format!("enroot-mount: failed to open: {}: {error}", path.display());
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = rustix::fs::open(&arguments.root, flags, Mode::empty())
        .map_err(|error| opening(&arguments.root, sys::reason(error)))?;
    let cwd = std::env::current_dir().map_err(|error| format!("enroot-mount: {}", sys::reason(error)))?;
    for path in &arguments.files {
        let text = read(path).map_err(|error| opening(path, sys::reason(error)))?;
        let fstab = Fstab::parse(&text, &path.to_string_lossy(), None).map_err(|error| error.to_string())?;
        for warning in &fstab.warnings {
            eprintln!("enroot-mount: {warning}");
        }
        for entry in arguments.pass.into_iter().flat_map(|pass| fstab.of(pass)) {
            let tolerated = apply(RootDir::new(root.as_fd()), &cwd, entry).map_err(|error| error.to_string())?;
            if let Some(error) = tolerated {
                eprintln!("{error}");
            }
        }
    }
    Ok(())
}

fn read(path: &Path) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    match path.to_str() {
        Some("-") => std::io::stdin().lock().take(MAX_FILE + 1).read_to_end(&mut bytes)?,
        _ => File::open(path)?.take(MAX_FILE + 1).read_to_end(&mut bytes)?,
    };
    if bytes.len() as u64 > MAX_FILE {
        return Err(std::io::Error::other(format!("more than {MAX_FILE} bytes")));
    }
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments() {
        let parse = |arguments: &[&str]| parse(arguments.iter().map(OsString::from));
        let parsed = parse(&["--root", "/r", "-"]).unwrap();
        assert_eq!((parsed.root, parsed.pass, parsed.files), ("/r".into(), Some(Pass::AfterHooks), vec!["-".into()]));
        let parsed = parse(&["--root=/r", "--pass", "-1", "/a", "/b"]).unwrap();
        assert_eq!((parsed.pass, parsed.files.len()), (Some(Pass::BeforeHooks), 2));
        assert_eq!(parse(&["--pass", "3", "-"]).unwrap().pass, None);
        for wrong in [&["--root"][..], &[], &["--root", "/r"], &["--what", "-"], &["--pass", "x", "-"]] {
            assert!(parse(wrong).is_none(), "{wrong:?}");
        }
    }
}
