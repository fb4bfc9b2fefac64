//! What hooks have set in a container's environment, for steps that join the container later: hooks are not run again for
//! them. Container init keeps it as a memory file, where whoever may join finds it.

#![forbid(unsafe_code)]

use std::fs::File;
use std::io;
use std::path::Path;

use crate::request::Environment;
use crate::sys::memfile;
use crate::task::protocol::MAX_MEMORY_FILE;

/// Name of the memory file.
const NAME: &str = "pyxis-hook-variables";

/// A file for [`of`]; none if there is nothing to keep.
pub fn keep(variables: &Environment) -> io::Result<Option<File>> {
    match variables.iter().next() {
        Some(_) => memfile::sealed(NAME, &variables.to_block()).map(Some),
        None => Ok(None),
    }
}

/// What the container init `pid`, a process of the caller's own user, keeps.
pub fn of(pid: i32) -> Environment {
    let link = format!("/memfd:{NAME} (deleted)");
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    let path = descriptors
        .map(|entry| entry.path())
        .find(|path| std::fs::read_link(path).is_ok_and(|target| target == Path::new(&link)));
    let block = path.and_then(|path| memfile::read_all(File::open(path).ok()?, MAX_MEMORY_FILE).ok());
    Environment::from_block(&block.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_found() {
        let own = i32::try_from(std::process::id()).unwrap();
        assert!(keep(&Environment::default()).unwrap().is_none());
        let variables = Environment::from_block(b"A=1\0B=x y\0");
        let kept = keep(&variables).unwrap();
        assert_eq!(of(own), variables);
        drop(kept);
        assert_eq!(of(own), Environment::default());
    }
}
