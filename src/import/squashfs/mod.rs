//! From a squashfs image to a layer image.
//!
//! ```text
//! walk ─▶ visits, pieces ═════════════════════════▶ EROFS ─▶ file
//!            └─▶ pieces ═▶ decompression (threads) ─▶┘ └─▶ sha256
//! ```
//!
//! What a layer has, the image has ([`super::layer`]): owner 0:0, the owner's permissions, no devices, an empty `/dev`, of
//! the extended attributes those of users. A layer's whiteouts mean nothing here.
//!
//! The layer's name is a digest of what is written, in the order of the image's directories: the same content gives the
//! same name and the same bytes, however the image was compressed (but for sparse files: a hole is whole blocks of it).

mod pieces;

use std::collections::HashMap;
use std::fs::File;

use super::error::LayerError;
use super::layer::LayerLimits;
use crate::erofs::{Attributes, Directory, DirectoryId, Extent, InodeId, SYMLINK_MAX, Target, Writer, Xattrs};
use crate::image::digest::Digest;
use crate::squashfs::reader::{Error, FileType, Image, Inode, InodeRef};
use pieces::{Found, Item, Items};

/// How much larger than its content a layer image may be.
const IMAGE_SLACK: u64 = 1 << 20;
/// Begins what the digest is of, so that no tar stream has the same.
const DOMAIN: &[u8] = b"pyxis squashfs image 1\0";

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Converted {
    /// Digest of the content: the layer's name.
    pub content: Digest,
    /// Bytes of the files' content, without holes.
    pub unpacked: u64,
    /// Bytes of the layer image.
    pub image: u64,
}

/// Writes the layer image of `image` to `out`, an empty file open for reading and writing. `progress` is called with bytes
/// of content. On failure the content of `out` is undefined. Nothing is synced.
pub fn write_squashfs(
    image: &Image,
    out: &File,
    limits: &LayerLimits,
    progress: impl FnMut(u64),
) -> Result<Converted, LayerError> {
    let root = image.inode(image.root())?;
    std::thread::scope(|scope| {
        let items = pieces::start(scope, image, limits.max_entries.min(u32::MAX.into()))?;
        let digest = pieces::Hashing::start(scope)?;
        let writer = Writer::new(out, limits.max_bytes.saturating_add(IMAGE_SLACK))?;
        let mut conversion = Conversion {
            image,
            writer,
            directories: Vec::new(),
            path: Vec::new(),
            links: HashMap::new(),
            digest,
            unpacked: 0,
            progress,
        };
        conversion.digest.add(DOMAIN.to_vec());
        conversion.directory(DirectoryId::ROOT, &root, b"/")?;
        conversion.run(items)
    })
}

/// An image that is being written.
struct Conversion<'a, P> {
    image: &'a Image,
    writer: Writer<'a>,
    directories: Vec<Directory>,
    /// The directories from the root down to where the walk is.
    path: Vec<DirectoryId>,
    /// Files with several names, and how many came before.
    links: HashMap<InodeRef, (u64, InodeId)>,
    digest: pieces::Hashing,
    unpacked: u64,
    progress: P,
}

impl<P: FnMut(u64)> Conversion<'_, P> {
    fn run(mut self, mut items: Items) -> Result<Converted, LayerError> {
        while let Some(item) = items.next() {
            match item? {
                Item::Visit(found) => self.visit(&found, &mut items)?,
                Item::Piece(_) => return Err(LayerError::entry(b"", "internal error: content without a file")),
            }
        }
        if let Some(Target::Directory(dev)) =
            self.directories.first().and_then(|root| root.entries.get(&b"dev"[..]).copied())
            && let Some(dev) = self.directories.get_mut(dev.index())
        {
            dev.entries.clear();
        }
        let image = self.writer.finish(&self.directories)?;
        Ok(Converted { content: self.digest.finish()?, unpacked: self.unpacked, image })
    }

    fn visit(&mut self, found: &Found, items: &mut Items) -> Result<(), LayerError> {
        let (name, inode) = (&found.visit.entry.name, &found.visit.inode);
        self.path.truncate(found.visit.depth + 1);
        let parent = self.path.last().copied().unwrap_or(DirectoryId::ROOT);
        let target = match inode.file_type() {
            FileType::Directory => {
                // The limit of entries keeps this within 32 bits.
                let id = DirectoryId(self.directories.len() as u32);
                self.directory(parent, inode, name)?;
                Target::Directory(id)
            }
            FileType::Block | FileType::Character | FileType::Socket => return Ok(()),
            _ => match self.links.get(&inode.reference).copied() {
                Some((number, known)) => {
                    self.note(name, inode, b"link", &number.to_le_bytes());
                    Target::Inode(known)
                }
                None => Target::Inode(self.file(found, items)?),
            },
        };
        if let Some(directory) = self.directories.get_mut(parent.index()) {
            directory.entries.insert(name.clone(), target);
        }
        Ok(())
    }

    fn directory(&mut self, parent: DirectoryId, inode: &Inode, name: &[u8]) -> Result<(), LayerError> {
        let attributes = self.attributes(name, inode)?;
        self.note(name, inode, b"directory", &(self.path.len() as u64).to_le_bytes());
        self.path.push(DirectoryId(self.directories.len() as u32));
        self.directories.push(Directory { attributes, parent, entries: Default::default() });
        Ok(())
    }

    fn file(&mut self, found: &Found, items: &mut Items) -> Result<InodeId, LayerError> {
        let (name, inode) = (&found.visit.entry.name, &found.visit.inode);
        let attributes = self.attributes(name, inode)?;
        let id = match inode.file_type() {
            FileType::Symlink => {
                let target = self.image.read_link(inode)?;
                if target.len() > SYMLINK_MAX {
                    return Err(LayerError::entry(name, "a symbolic link to a path that is too long"));
                }
                self.note(name, inode, b"symlink", &target);
                self.writer.symlink(&attributes, &target)?
            }
            FileType::Fifo => {
                self.note(name, inode, b"fifo", b"");
                self.writer.fifo(&attributes)?
            }
            _ => {
                let extents: Vec<u8> = found
                    .extents
                    .iter()
                    .flat_map(|(offset, length)| [offset.to_le_bytes(), length.to_le_bytes()])
                    .flatten()
                    .collect();
                self.note(name, inode, b"file", &extents);
                let extents: Vec<Extent> =
                    found.extents.iter().map(|&(offset, length)| Extent { offset, length }).collect();
                self.content(&attributes, inode.size(), &extents, items)?
            }
        };
        if inode.nlink > 1 {
            self.links.insert(inode.reference, (self.links.len() as u64, id));
        }
        Ok(id)
    }

    fn content(
        &mut self,
        attributes: &Attributes,
        size: u64,
        extents: &[Extent],
        items: &mut Items,
    ) -> Result<InodeId, LayerError> {
        let Self { writer, digest, unpacked, progress, .. } = self;
        let (mut piece, mut at) = (std::sync::Arc::new(Vec::new()), 0);
        let fill = |mut to: &mut [u8]| -> Result<(), LayerError> {
            while !to.is_empty() {
                let rest = piece.get(at..).unwrap_or_default();
                if rest.is_empty() {
                    piece = items.piece()?;
                    at = 0;
                    digest.share(&piece);
                    *unpacked += piece.len() as u64;
                    progress(piece.len() as u64);
                    continue;
                }
                let now = rest.len().min(to.len());
                let (filled, left) = to.split_at_mut(now);
                filled.copy_from_slice(rest.get(..now).unwrap_or_default());
                to = left;
                at += now;
            }
            Ok(())
        };
        if extents.is_empty() && size == 0 {
            return writer.file(attributes, 0, fill);
        }
        writer.sparse_file(attributes, size, extents, fill)
    }

    fn attributes(&self, name: &[u8], inode: &Inode) -> Result<Attributes, LayerError> {
        let permissions = inode.permissions;
        let mode = match inode.file_type() {
            FileType::Directory => permissions | 0o700,
            FileType::Symlink => 0o777,
            _ if permissions & 0o111 != 0 => permissions | 0o500,
            _ => permissions | 0o400,
        };
        let mut xattrs = Xattrs::default();
        if matches!(inode.file_type(), FileType::Directory | FileType::Regular) {
            let mut seen = Vec::new();
            for xattr in self.image.xattrs(inode)? {
                let Some(user) = xattr.name.strip_prefix(b"user.").filter(|user| !user.is_empty()) else { continue };
                if seen.iter().any(|known| known == user) {
                    return Err(LayerError::entry(name, "an extended attribute that is there twice"));
                }
                xattrs.push_user(user, &xattr.value).map_err(|error| LayerError::entry(name, error.to_string()))?;
                seen.push(user.to_vec());
            }
        }
        Ok(Attributes { mode, mtime: inode.mtime.into(), mtime_nsec: 0, xattrs })
    }

    /// Lets the digest depend on an inode, its name, and what is particular to its type.
    fn note(&mut self, name: &[u8], inode: &Inode, kind: &[u8], particular: &[u8]) {
        let mut bytes = Vec::with_capacity(64 + name.len() + particular.len());
        for field in [kind, name, particular] {
            bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        bytes.extend_from_slice(&u64::from(inode.permissions).to_le_bytes());
        bytes.extend_from_slice(&u64::from(inode.mtime).to_le_bytes());
        // That of a listing depends on where the inodes are.
        let size = if inode.is_directory() { 0 } else { inode.size() };
        bytes.extend_from_slice(&size.to_le_bytes());
        let xattrs = self.image.xattrs(inode).unwrap_or_default();
        bytes.extend_from_slice(&(xattrs.len() as u64).to_le_bytes());
        for field in xattrs.iter().flat_map(|xattr| [&xattr.name, &xattr.value]) {
            bytes.extend_from_slice(&(field.len() as u64).to_le_bytes());
            bytes.extend_from_slice(field);
        }
        self.digest.add(bytes);
    }
}

impl From<Error> for LayerError {
    fn from(error: Error) -> Self {
        match error {
            Error::TooManyEntries(_) => Self::TooManyEntries,
            Error::Read(code) => Self::Read(std::io::Error::from_raw_os_error(code)),
            other => Self::Squashfs(other),
        }
    }
}
