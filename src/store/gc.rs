//! Garbage collection: layers that nobody uses go, the longest unused first, until there is room; then the records and
//! leftovers that mean nothing any more.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::str::FromStr;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::dir::{TEMPORARY, join};
use super::layer::{LAYERS, layer_path};
use super::lock::COLLECTOR;
use super::record::{BLOBS, BlobRecord, CONFIGS, ManifestRecord, ReferenceRecord, now};
use super::{LocalRecord, Result, Store, StoreError, is_regular};
use crate::image::digest::Digest;

/// Records that are written before what makes them useful are left alone for this long.
const GRACE_SECONDS: u64 = 3600;
/// A reference that a user has not asked the registry about for this long is forgotten.
const FORGET_SECONDS: u64 = 90 * 24 * 3600;

/// The node's shared mounts of layer images, which keep a layer's space although nobody leases it.
pub trait PinnedMounts {
    /// Unmounts `layer` if it is mounted. The caller makes sure that nobody takes a lease meanwhile.
    fn release(&self, layer: &Digest) -> io::Result<()>;

    /// Whether something on this node needs `layer`, without a lease of it.
    fn is_kept(&self, _layer: &Digest) -> bool {
        false
    }
}

/// A filling level.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(try_from = "WatermarkText", into = "String")]
pub enum Watermark {
    /// Bytes that all layer images of the store take.
    Bytes(u64),
    /// How full the store's file system is, with whatever else it holds, in percent.
    Percent(u8),
}

/// Between which levels the store is kept: beyond `high` layers are collected until it is down to `low`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub struct Watermarks {
    /// Collect when there is more.
    pub high: Watermark,
    /// Stop collecting when there is no more than this.
    pub low: Watermark,
}

impl Default for Watermarks {
    fn default() -> Self {
        Self { high: Watermark::Percent(85), low: Watermark::Percent(70) }
    }
}

/// Why a text is not a [`Watermark`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid size {0:?}: expected a percentage such as \"85%\", or bytes such as 500000000 or \"500GiB\"")]
pub struct InvalidWatermark(String);

#[derive(Deserialize)]
#[serde(untagged)]
enum WatermarkText {
    Bytes(u64),
    Text(String),
}

impl TryFrom<WatermarkText> for Watermark {
    type Error = InvalidWatermark;

    fn try_from(text: WatermarkText) -> std::result::Result<Self, Self::Error> {
        match text {
            WatermarkText::Bytes(bytes) => Ok(Self::Bytes(bytes)),
            WatermarkText::Text(text) => text.parse(),
        }
    }
}

impl From<Watermark> for String {
    fn from(watermark: Watermark) -> Self {
        watermark.to_string()
    }
}

impl fmt::Display for Watermark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bytes(bytes) => write!(f, "{bytes}"),
            Self::Percent(percent) => write!(f, "{percent}%"),
        }
    }
}

impl FromStr for Watermark {
    type Err = InvalidWatermark;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        let invalid = || InvalidWatermark(text.chars().take(40).collect());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let number: u64 = number.parse().map_err(|_| invalid())?;
        let shift = match unit.trim_start() {
            "%" => {
                let percent = u8::try_from(number).ok().filter(|percent| *percent <= 100).ok_or_else(invalid)?;
                return Ok(Self::Percent(percent));
            }
            "" | "B" => 0,
            "K" | "KiB" => 10,
            "M" | "MiB" => 20,
            "G" | "GiB" => 30,
            "T" | "TiB" => 40,
            _ => return Err(invalid()),
        };
        number.checked_mul(1 << shift).map(Self::Bytes).ok_or_else(invalid)
    }
}

/// How much to collect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Down to the low watermark, if the high one is exceeded.
    Watermarks(Watermarks),
    /// Until this many bytes are available.
    Available(u64),
    /// Everything that is not in use.
    Everything,
}

/// What a collection did, or would do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CollectReport {
    /// Layers removed, the longest unused first.
    pub removed: Vec<Digest>,
    /// Bytes that they took.
    pub freed_bytes: u64,
    /// Layers that stay, with those in use.
    pub kept_layers: usize,
    /// Bytes that they take.
    pub kept_bytes: u64,
    /// Layers that had to stay because they are in use.
    pub in_use_layers: usize,
    /// Records, locks and unfinished files removed.
    pub removed_records: usize,
    /// One line for each layer that could not be removed.
    pub problems: Vec<String>,
}

/// A layer as the collector sees it.
struct Candidate {
    layer: Digest,
    bytes: u64,
    used: (i64, u64),
}

impl Store {
    /// Bytes available to new layers on the store's file system.
    pub fn available(&self) -> Result<u64> {
        let stat = rustix::fs::fstatvfs(&self.root).map_err(|errno| self.error("examine", "", errno))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Number of layers, and the bytes that they take.
    pub fn usage(&self) -> Result<(u64, u64)> {
        let candidates = self.candidates()?;
        Ok((candidates.len() as u64, candidates.iter().map(|candidate| candidate.bytes).sum()))
    }

    /// Bytes that there are beyond `level`.
    pub fn beyond(&self, level: Watermark) -> Result<u64> {
        let stored = match level {
            Watermark::Bytes(_) => self.usage()?.1,
            Watermark::Percent(_) => 0,
        };
        self.excess(level, stored)
    }

    /// Removes unused layers until `goal` is reached, and what is left over without them. With `dry_run` only says what
    /// it would remove. One process at a time: [`StoreError::Collecting`].
    pub fn collect(&self, goal: Goal, pinned: &dyn PinnedMounts, dry_run: bool) -> Result<CollectReport> {
        let Some(_lock) = self.try_lock_file(COLLECTOR.to_owned())? else {
            return Err(StoreError::Collecting { path: self.path.clone() });
        };
        let mut candidates = self.candidates()?;
        candidates.sort_by_key(|candidate| (candidate.used, candidate.layer));
        let wanted = self.wanted(goal, candidates.iter().map(|candidate| candidate.bytes).sum())?;
        let mut report = CollectReport::default();
        for candidate in candidates {
            let removed = if report.freed_bytes >= wanted {
                false
            } else {
                self.remove_unused(&candidate.layer, pinned, dry_run, &mut report)?
            };
            if removed {
                report.freed_bytes += candidate.bytes;
                report.removed.push(candidate.layer);
            } else {
                report.kept_layers += 1;
                report.kept_bytes += candidate.bytes;
            }
        }
        if !dry_run {
            report.removed_records = self.tidy()?;
        }
        Ok(report)
    }

    fn candidates(&self) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for name in self.list(LAYERS)? {
            let Ok(layer) = format!("sha256:{name}").parse() else { continue };
            let Some(stat) = self.stat(&join(LAYERS, &name))?.filter(is_regular) else { continue };
            candidates.push(Candidate {
                layer,
                bytes: u64::try_from(stat.st_blocks).unwrap_or(0) * 512,
                used: (stat.st_mtime, stat.st_mtime_nsec),
            });
        }
        Ok(candidates)
    }

    /// Bytes to free.
    fn wanted(&self, goal: Goal, stored: u64) -> Result<u64> {
        Ok(match goal {
            Goal::Everything => u64::MAX,
            Goal::Available(bytes) => bytes.saturating_sub(self.available()?),
            Goal::Watermarks(Watermarks { high, low }) => {
                if self.excess(high, stored)? == 0 {
                    0
                } else {
                    self.excess(low, stored)?
                }
            }
        })
    }

    /// Bytes beyond `level`.
    fn excess(&self, level: Watermark, stored: u64) -> Result<u64> {
        Ok(match level {
            Watermark::Bytes(bytes) => stored.saturating_sub(bytes),
            Watermark::Percent(percent) => {
                let stat = rustix::fs::fstatvfs(&self.root).map_err(|errno| self.error("examine", "", errno))?;
                // As df(1) counts: what only root may use is not there.
                let used = stat.f_blocks.saturating_sub(stat.f_bfree);
                let allowed = u128::from(used + stat.f_bavail) * u128::from(percent) / 100;
                let blocks = u128::from(used).saturating_sub(allowed);
                u64::try_from(blocks).unwrap_or(u64::MAX).saturating_mul(stat.f_frsize)
            }
        })
    }

    /// Whether the layer was not in use and is gone now.
    fn remove_unused(
        &self,
        layer: &Digest,
        pinned: &dyn PinnedMounts,
        dry_run: bool,
        report: &mut CollectReport,
    ) -> Result<bool> {
        let name = layer_path(layer);
        let Some(_lock) = self.lock_unused(&name)? else {
            report.in_use_layers += 1;
            return Ok(false);
        };
        if pinned.is_kept(layer) {
            report.in_use_layers += 1;
            return Ok(false);
        }
        if dry_run {
            return Ok(true);
        }
        if let Err(error) = pinned.release(layer) {
            report.problems.push(format!("cannot unmount layer {layer}: {error}"));
            return Ok(false);
        }
        self.unlink(&name)?;
        Ok(true)
    }

    /// An exclusive lock on a file that nobody has locked, and that still has its name.
    fn lock_unused(&self, name: &str) -> Result<Option<std::os::fd::OwnedFd>> {
        // For writing: NFS has no exclusive lock on a read-only descriptor.
        let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = match rustix::fs::openat(&self.root, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(self.error("open", name, errno)),
        };
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(self.error("lock", name, errno)),
        }
        let stat = rustix::fs::fstat(&file).map_err(|errno| self.error("examine", name, errno))?;
        Ok(self.leads_to(name, &stat)?.then_some(file))
    }

    /// Removes records of layers that are gone, and what dead processes left. Returns how many files.
    fn tidy(&self) -> Result<usize> {
        let mut removed = 0;
        for directory in ["", LAYERS, BLOBS, CONFIGS] {
            removed += self.remove_unfinished(directory)?;
        }
        for name in self.list("locks")? {
            let name = join("locks", &name);
            // A lock's holder removes it when it lets go.
            if name != COLLECTOR && self.try_lock_file(name)?.is_some() {
                removed += 1;
            }
        }
        for name in self.records(BLOBS)? {
            let path = join(BLOBS, &name);
            let used = match self.read_json::<BlobRecord>(&path)? {
                Some(record) => self.layer_length(&record.diff_id)?.is_some(),
                None => false,
            };
            removed += self.remove_unless(used || self.is_recent(&path)?, &path)?;
        }
        let mut configs = HashSet::new();
        for user in self.list("confirmed")? {
            removed += self.tidy_user(&join("confirmed", &user), &mut configs)?;
        }
        for name in self.records(CONFIGS)? {
            let path = join(CONFIGS, &name);
            removed += self.remove_unless(configs.contains(&name) || self.is_recent(&path)?, &path)?;
        }
        Ok(removed)
    }

    /// The records of one user; adds the file names of the configs that they need to `configs`. A record that is renewed
    /// at this moment may be lost: then its user's registry is asked once more.
    fn tidy_user(&self, directory: &str, configs: &mut HashSet<String>) -> Result<usize> {
        let (references, manifests) = (join(directory, "references"), join(directory, "manifests"));
        let mut removed = self.remove_unfinished(&references)? + self.remove_unfinished(&manifests)?;
        let mut named = HashSet::new();
        for name in self.records(&references)? {
            let path = join(&references, &name);
            let mut used = false;
            if let Some(record) = self.read_json::<ReferenceRecord>(&path)?
                && now().saturating_sub(record.confirmed_at) < FORGET_SECONDS
                && self.complete_manifest(&join(&manifests, &record.manifest.hex()))?.is_some()
            {
                named.insert(record.manifest.hex());
                used = true;
            }
            removed += self.remove_unless(used, &path)?;
        }
        for name in self.records(&manifests)? {
            let path = join(&manifests, &name);
            // It is written before the reference record that names it.
            let used = named.contains(&name) || self.is_recent(&path)?;
            match self.complete_manifest(&path)? {
                Some(record) if used => {
                    configs.insert(record.config.hex());
                }
                _ => removed += self.remove_unless(false, &path)?,
            }
        }
        Ok(removed + self.tidy_local(&join(directory, "local"), configs)?)
    }

    /// The records of one user's own files; as [`Store::tidy_user`].
    fn tidy_local(&self, directory: &str, configs: &mut HashSet<String>) -> Result<usize> {
        let mut removed = self.remove_unfinished(directory)?;
        for name in self.records(directory)? {
            let path = join(directory, &name);
            let mut used = false;
            if let Some(record) = self.read_json::<LocalRecord>(&path)?
                && now().saturating_sub(record.confirmed_at) < FORGET_SECONDS
            {
                let lengths = record.layers.iter().map(|layer| self.layer_length(layer));
                used = lengths.sum::<Result<Option<u64>>>()?.is_some();
                if used {
                    configs.insert(record.config.hex());
                }
            }
            removed += self.remove_unless(used, &path)?;
        }
        Ok(removed)
    }

    /// A manifest record, if all its layers are there.
    fn complete_manifest(&self, name: &str) -> Result<Option<ManifestRecord>> {
        let Some(record) = self.read_json::<ManifestRecord>(name)? else { return Ok(None) };
        for layer in &record.layers {
            if self.layer_length(&layer.diff_id)?.is_none() {
                return Ok(None);
            }
        }
        Ok(Some(record))
    }

    /// The names in a directory of records.
    fn records(&self, directory: &str) -> Result<Vec<String>> {
        Ok(self.list(directory)?.into_iter().filter(|name| !name.starts_with(TEMPORARY)).collect())
    }

    /// How many files dead processes have left, which the next collection removes. Changes nothing.
    pub fn leftovers(&self) -> Result<usize> {
        let mut found = 0;
        for directory in ["", LAYERS, BLOBS, CONFIGS] {
            for name in self.list(directory)?.into_iter().filter(|name| name.starts_with(TEMPORARY)) {
                found += usize::from(self.lock_unused(&join(directory, &name))?.is_some());
            }
        }
        for name in self.list("locks")?.into_iter().filter(|name| join("locks", name) != COLLECTOR) {
            found += usize::from(self.lock_unused(&join("locks", &name))?.is_some());
        }
        Ok(found)
    }

    fn remove_unfinished(&self, directory: &str) -> Result<usize> {
        let mut removed = 0;
        for name in self.list(directory)?.into_iter().filter(|name| name.starts_with(TEMPORARY)) {
            let path = join(directory, &name);
            if let Some(_lock) = self.lock_unused(&path)? {
                self.unlink(&path)?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    fn remove_unless(&self, used: bool, name: &str) -> Result<usize> {
        if used {
            return Ok(0);
        }
        self.unlink(name)?;
        Ok(1)
    }

    fn is_recent(&self, name: &str) -> Result<bool> {
        let modified = self.stat(name)?.map_or(0, |stat| u64::try_from(stat.st_mtime).unwrap_or(0));
        Ok(now().saturating_sub(modified) < GRACE_SECONDS)
    }

    /// Bytes of a layer image; `None` if the store has it not.
    pub(super) fn layer_length(&self, layer: &Digest) -> Result<Option<u64>> {
        let stat = self.stat(&layer_path(layer))?;
        Ok(stat.filter(is_regular).map(|stat| u64::try_from(stat.st_size).unwrap_or(0)))
    }

    fn stat(&self, name: &str) -> Result<Option<rustix::fs::Stat>> {
        match rustix::fs::statat(&self.root, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(self.error("examine", name, errno)),
        }
    }
}
