//! Unpacks a squashfs image: `pyxis create`. The image is hostile: the reader checks what it says, and [`TreeWriter`] where
//! it leads; here is counted what it takes.

use std::collections::HashMap;
use std::io;

use super::tree::{Attributes, TreeWriter};
use crate::import::LayerLimits;
use crate::squashfs::reader::{self, FileType, Image, Inode, InodeRef};
use crate::sys;

/// Bytes of content copied at once; whole blocks of every image.
const BUFFER: usize = 1 << 20;

/// Why an image cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The image.
    #[error(transparent)]
    Image(#[from] reader::Error),
    /// What it unpacks to.
    #[error("cannot write {path}: {}", sys::reason(.cause))]
    Write {
        /// In the image, printable.
        path: String,
        /// Why not.
        cause: io::Error,
    },
    /// More content than may be.
    #[error("the image unpacks to more than {0} bytes (import.max_layer_bytes in pyxis.toml)")]
    TooLarge(u64),
}

/// Writes everything in `image` to `tree`. Devices and sockets are left out, and of extended attributes all but those of
/// users.
pub fn unpack(image: &Image, tree: &mut TreeWriter<'_>, limits: &LayerLimits) -> Result<(), UnpackError> {
    let root = image.inode(image.root())?;
    let mut unpacking = Unpacking { image, tree, left: limits.max_bytes, limits, links: HashMap::new() };
    // The names from the root down to where we are, and for each depth how long the path is.
    let (mut path, mut lengths) = (Vec::new(), Vec::new());
    let mut directories = vec![(Vec::new(), unpacking.attributes(&root)?)];
    for visit in image.walk(limits.max_entries)? {
        let visit = visit?;
        lengths.truncate(visit.depth);
        path.truncate(lengths.last().copied().unwrap_or(0));
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(&visit.entry.name);
        if visit.inode.is_directory() {
            lengths.push(path.len());
            unpacking.tree.directory(&path).map_err(write_error(&path))?;
            directories.push((path.clone(), unpacking.attributes(&visit.inode)?));
        } else {
            unpacking.add(&path, &visit.inode)?;
        }
    }
    for (path, attributes) in &directories {
        unpacking.tree.attributes(path, attributes).map_err(write_error(path))?;
    }
    Ok(())
}

fn write_error(path: &[u8]) -> impl Fn(io::Error) -> UnpackError + '_ {
    move |cause| {
        let path = String::from_utf8_lossy(path).chars().take(200).flat_map(char::escape_debug).collect();
        UnpackError::Write { path, cause }
    }
}

struct Unpacking<'a, 'b> {
    image: &'a Image,
    tree: &'a mut TreeWriter<'b>,
    limits: &'a LayerLimits,
    /// Bytes that may still come.
    left: u64,
    /// Files with several names, and the first of them.
    links: HashMap<InodeRef, Vec<u8>>,
}

impl Unpacking<'_, '_> {
    /// Adds what is no directory.
    fn add(&mut self, path: &[u8], inode: &Inode) -> Result<(), UnpackError> {
        if inode.nlink > 1 {
            if let Some(first) = self.links.get(&inode.reference) {
                return self.tree.link(first, path).map_err(write_error(path));
            }
            self.links.insert(inode.reference, path.to_vec());
        }
        let attributes = self.attributes(inode)?;
        match inode.file_type() {
            FileType::Regular => self.file(path, inode, &attributes),
            FileType::Symlink => {
                let target = self.image.read_link(inode)?;
                self.tree.symlink(path, &attributes, &target).map_err(write_error(path))
            }
            FileType::Fifo => self.tree.fifo(path, &attributes).map_err(write_error(path)),
            FileType::Block | FileType::Character | FileType::Socket | FileType::Directory => {
                self.links.remove(&inode.reference);
                Ok(())
            }
        }
    }

    fn file(&mut self, path: &[u8], inode: &Inode, attributes: &Attributes) -> Result<(), UnpackError> {
        let failed = write_error(path);
        let file = self.image.file(inode)?;
        let mut to = self.tree.file(path, attributes).map_err(&failed)?;
        let mut buffer = Vec::new();
        let mut end = 0;
        for (offset, length) in self.image.data_extents(&file)? {
            self.left = self.left.checked_sub(length).ok_or(UnpackError::TooLarge(self.limits.max_bytes))?;
            to.hole(offset - end).map_err(&failed)?;
            end = offset + length;
            let mut at = offset;
            while at < end {
                buffer.resize(usize::try_from(end - at).unwrap_or(BUFFER).min(BUFFER), 0);
                let count = self.image.read_at(&file, at, &mut buffer)?;
                if count == 0 {
                    return Err(failed(io::ErrorKind::UnexpectedEof.into()));
                }
                to.write(&buffer[..count]).map_err(&failed)?;
                at += count as u64;
            }
        }
        to.hole(file.size() - end).map_err(&failed)?;
        to.finish().map_err(failed)
    }

    fn attributes(&self, inode: &Inode) -> Result<Attributes, UnpackError> {
        let xattrs = self.image.xattrs(inode)?.into_iter().map(|xattr| (xattr.name, xattr.value));
        Ok(Attributes {
            mode: inode.permissions,
            mtime: (inode.mtime.into(), 0),
            xattrs: xattrs.filter(|(name, _)| name.starts_with(b"user.")).collect(),
        })
    }
}
