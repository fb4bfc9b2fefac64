//! What this kernel can do, as far as containers are made in different ways for it: found by trying, once since the node was
//! booted, and kept in `RUNTIME/kernel`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::probe;

/// What was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kernel {
    /// Overlayfs takes idmapped layers (Linux 5.19).
    pub idmapped_layers: bool,
}

/// What the kernel could do and is not to be asked for: `[debug]`, for tests of the other ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// Overlayfs with idmapped layers: users have layers of their own.
    IdmappedLayers,
    /// EROFS from a file: loop devices.
    LayersFromFiles,
    /// A mount namespace for all containers' layers: each mounts them for itself.
    SharedLayers,
}

impl Kernel {
    /// What is known of this node's kernel; what nobody knows yet is tried with an image in `store`. Single-threaded
    /// callers only.
    pub fn of_node(store: &Path, runtime: &Path) -> Self {
        let path = runtime.join("kernel");
        if let Some(known) = read(&path) {
            return known;
        }
        let found = match probe::container_root(store, runtime) {
            Ok(kernel) => kernel,
            // It may be cured, and the container's start says what is wrong.
            Err(_) => return Self { idmapped_layers: true },
        };
        // Whoever comes next tries it again if this fails.
        let _ = write(&path, &found);
        found
    }
}

fn read(path: &Path) -> Option<Kernel> {
    let mut text = Vec::new();
    File::open(path).ok()?.take(1000).read_to_end(&mut text).ok()?;
    serde_json::from_slice(&text).ok()
}

fn write(path: &Path, kernel: &Kernel) -> std::io::Result<()> {
    let new = path.with_file_name(format!("kernel.{}", std::process::id()));
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mut file = File::from(rustix::fs::open(&new, flags, Mode::from_raw_mode(0o644))?);
    file.write_all(&serde_json::to_vec(kernel)?)?;
    std::fs::rename(&new, path)
}
