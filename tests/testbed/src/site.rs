//! The directory of one testbed: claimed while its process lives, cleaned up after one that was killed.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::{self, Daemon};

/// Where testbeds live: on a disk (layer images cannot be mounted from a tmpfs) and reachable by every user.
const ROOT: &str = "/var/tmp/pyxis-testbed";

/// The directory of one testbed. Dropping it ends every recorded process and removes the directory.
#[derive(Debug)]
pub struct Site {
    directory: PathBuf,
    lock: Option<File>,
}

impl Site {
    /// Makes a new, empty site called `name` and cleans up what killed testbeds left.
    pub fn create(name: &str) -> Result<Self> {
        // One at a time: a site that is just being made looks abandoned.
        let _making = lock_file("making.lock")?;
        remove_abandoned()?;
        let directory = Path::new(ROOT).join(name);
        if directory.join("keep").exists() {
            bail!("{} is in use: end it with `testbed down {name}` first", directory.display());
        }
        make_directory(&directory)?;
        let lock = File::create(directory.join("lock"))?;
        lock.try_lock().with_context(|| format!("{} belongs to a running testbed", directory.display()))?;
        for part in ["etc", "log", "state"] {
            make_directory(&directory.join(part))?;
        }
        Ok(Self { directory, lock: Some(lock) })
    }

    /// A path in the site.
    pub fn path(&self, relative: &str) -> PathBuf {
        self.directory.join(relative)
    }

    /// Makes a directory in the site, open to everybody for reading.
    pub fn make_directory(&self, relative: &str) -> Result<PathBuf> {
        let path = self.path(relative);
        make_directory(&path)?;
        Ok(path)
    }

    /// Writes a file in the site.
    pub fn write(&self, relative: &str, contents: impl AsRef<[u8]>) -> Result<PathBuf> {
        let path = self.path(relative);
        fs::write(&path, contents).with_context(|| path.display().to_string())?;
        Ok(path)
    }

    /// Starts a daemon that is ended with the site.
    pub fn daemon(&self, name: &str, command: &mut Command) -> Result<Daemon> {
        Daemon::start(name, command, &self.path(&format!("log/{name}.log")), &self.path("processes"))
    }

    /// Leaves everything running after this process has ended; [`remove`] ends it.
    pub fn keep(mut self) -> Result<()> {
        self.write("keep", "")?;
        self.lock = None;
        Ok(())
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.lock.is_some()
            && let Err(error) = dismantle(&self.directory)
        {
            eprintln!("testbed: {error:#}");
        }
    }
}

/// Waits until no other test uses the ordinary users' home directories, and keeps them until the file is dropped.
pub fn claim_homes() -> Result<File> {
    lock_file("homes.lock")
}

/// Waits for a lock that all testbeds share.
fn lock_file(name: &str) -> Result<File> {
    make_directory(Path::new(ROOT))?;
    let lock = File::create(Path::new(ROOT).join(name))?;
    lock.lock().with_context(|| format!("cannot lock {ROOT}/{name}"))?;
    Ok(lock)
}

/// Ends a testbed that was kept running. `false`: there is none of that name.
pub fn remove(name: &str) -> Result<bool> {
    let directory = Path::new(ROOT).join(name);
    match directory.exists() {
        true => dismantle(&directory).map(|()| true),
        false => Ok(false),
    }
}

/// Removes the sites of testbeds that were killed.
fn remove_abandoned() -> Result<()> {
    for entry in fs::read_dir(ROOT)? {
        let directory = entry?.path();
        // Without a lock it is no site, or one that is just being removed.
        let Ok(lock) = File::open(directory.join("lock")) else { continue };
        let free = !matches!(lock.try_lock(), Err(TryLockError::WouldBlock));
        // In this order: who keeps a site says so before he lets go of the lock.
        if free && !directory.join("keep").exists() {
            dismantle(&directory)?;
        }
    }
    Ok(())
}

fn dismantle(directory: &Path) -> Result<()> {
    process::end_recorded(&directory.join("processes"));
    // Processes that write into the directory may need a moment to die with their namespace.
    crate::wait::until(&format!("{} to be removable", directory.display()), crate::wait::DEADLINE / 2, || {
        match fs::remove_dir_all(directory) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => None,
            _ => Some(()),
        }
    })
}

/// Like `mkdir -p -m 0755`, whatever the umask.
fn make_directory(path: &Path) -> Result<()> {
    use std::os::unix::fs::PermissionsExt;
    DirBuilder::new().recursive(true).mode(0o755).create(path).with_context(|| path.display().to_string())?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).with_context(|| path.display().to_string())
}
