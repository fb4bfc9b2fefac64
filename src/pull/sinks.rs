//! Where a merged image goes: into a squashfs image, or into a directory.

use std::io;
use std::os::fd::BorrowedFd;

use crate::erofs::{Attributes, Extent};
use crate::import::LayerError;
use crate::import::merge::{Content, Sink};
use crate::squashfs::writer::{self, Special, Writer};
use crate::unpacked::tree::{self, TreeWriter};

/// Bytes of content copied at once.
const BUFFER: usize = 1 << 20;

/// Writes a squashfs image.
#[derive(Debug)]
pub struct SquashfsSink(pub Writer);

/// Writes files into a directory.
#[derive(Debug)]
pub struct DirectorySink<'a> {
    tree: TreeWriter<'a>,
    buffer: Vec<u8>,
}

impl<'a> DirectorySink<'a> {
    /// Writes below `root`, which is empty.
    pub fn new(root: BorrowedFd<'a>) -> Self {
        Self { tree: TreeWriter::new(root), buffer: vec![0; BUFFER] }
    }
}

fn write_error(error: writer::Error) -> LayerError {
    LayerError::Write(match error {
        writer::Error::Write(error) => error,
        other => io::Error::other(other.to_string()),
    })
}

fn squashfs_attributes(attributes: &Attributes) -> writer::Attributes {
    writer::Attributes {
        mode: attributes.mode,
        mtime: attributes.mtime,
        xattrs: attributes.xattrs.iter().map(|(name, value)| (name, value.to_vec())).collect(),
    }
}

fn tree_attributes(attributes: &Attributes) -> tree::Attributes {
    tree::Attributes {
        mode: attributes.mode,
        mtime: (attributes.mtime, attributes.mtime_nsec),
        xattrs: attributes.xattrs.iter().map(|(name, value)| (name, value.to_vec())).collect(),
    }
}

impl Sink for SquashfsSink {
    fn directory(&mut self, path: &[u8]) -> Result<(), LayerError> {
        self.0.directory(path, writer::Attributes::default()).map_err(write_error)
    }

    fn file(&mut self, path: &[u8], attributes: &Attributes, content: Content<'_>) -> Result<(), LayerError> {
        let mut file = self.0.begin_file(path, squashfs_attributes(attributes)).map_err(write_error)?;
        let mut at = 0;
        for &Extent { offset, length } in content.extents {
            file.hole(offset - at).map_err(write_error)?;
            let mut left = length;
            while left > 0 {
                let space = file.space().map_err(write_error)?;
                let now = usize::try_from(left).unwrap_or(usize::MAX).min(space.len());
                (content.read)(&mut space[..now])?;
                file.advance(now);
                left -= now as u64;
            }
            at = offset + length;
        }
        file.hole(content.size - at).map_err(write_error)?;
        file.finish().map_err(write_error)
    }

    fn symlink(&mut self, path: &[u8], attributes: &Attributes, target: &[u8]) -> Result<(), LayerError> {
        self.0.symlink(path, squashfs_attributes(attributes), target).map_err(write_error)
    }

    fn fifo(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError> {
        self.0.special(path, squashfs_attributes(attributes), Special::Fifo).map_err(write_error)
    }

    fn link(&mut self, existing: &[u8], path: &[u8]) -> Result<(), LayerError> {
        self.0.hard_link(path, existing).map_err(write_error)
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), LayerError> {
        self.0.remove(path);
        Ok(())
    }

    fn attributes(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError> {
        self.0.directory(path, squashfs_attributes(attributes)).map_err(write_error)
    }
}

impl Sink for DirectorySink<'_> {
    fn directory(&mut self, path: &[u8]) -> Result<(), LayerError> {
        self.tree.directory(path).map_err(LayerError::Write)
    }

    fn file(&mut self, path: &[u8], attributes: &Attributes, content: Content<'_>) -> Result<(), LayerError> {
        let mut file = self.tree.file(path, &tree_attributes(attributes)).map_err(LayerError::Write)?;
        let mut at = 0;
        for &Extent { offset, length } in content.extents {
            file.hole(offset - at).map_err(LayerError::Write)?;
            let mut left = length;
            while left > 0 {
                let now = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
                let buffer = &mut self.buffer[..now];
                (content.read)(buffer)?;
                file.write(buffer).map_err(LayerError::Write)?;
                left -= now as u64;
            }
            at = offset + length;
        }
        file.hole(content.size - at).map_err(LayerError::Write)?;
        file.finish().map_err(LayerError::Write)
    }

    fn symlink(&mut self, path: &[u8], attributes: &Attributes, target: &[u8]) -> Result<(), LayerError> {
        self.tree.symlink(path, &tree_attributes(attributes), target).map_err(LayerError::Write)
    }

    fn fifo(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError> {
        self.tree.fifo(path, &tree_attributes(attributes)).map_err(LayerError::Write)
    }

    fn link(&mut self, existing: &[u8], path: &[u8]) -> Result<(), LayerError> {
        self.tree.link(existing, path).map_err(LayerError::Write)
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), LayerError> {
        self.tree.remove(path).map_err(LayerError::Write)
    }

    fn attributes(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError> {
        self.tree.attributes(path, &tree_attributes(attributes)).map_err(LayerError::Write)
    }
}
