//! Directories: listings, and looking for one name.

use std::cmp::Ordering;

use super::format::{DIRECTORY_RUN, DirectoryEntry, DirectoryHeader, DirectoryIndex, FileType, METADATA, NAME_MAX};
use super::inode::{Content, DirectoryContent, Inode, InodeRef};
use super::metadata::Cursor;
use super::{Error, Image};

const PART: &str = "directory";

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// 1 to 255 bytes without `/` and NUL; neither `.` nor `..`.
    pub name: Box<[u8]>,
    /// What it names.
    pub inode: InodeRef,
    /// Its number, as [`Inode::number`] in a sound image.
    pub number: u32,
    /// Its type; that of the inode counts where they differ.
    pub file_type: FileType,
}

/// The entries of a directory, in order of their names in a sound image. Ends at the first error.
#[derive(Debug, Clone)]
pub struct Entries<'a> {
    cursor: Cursor<'a>,
    /// Bytes of the listing that are left.
    left: u32,
    header: DirectoryHeader,
    /// Entries behind the header that are left.
    run: u32,
}

impl Image {
    /// The entries of a directory. `.` and `..` are not among them.
    pub fn read_dir(&self, directory: &Inode) -> Result<Entries<'_>, Error> {
        let content = content(directory)?;
        Ok(self.entries(content, content.size))
    }

    /// The entry called `name`.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<Entry>, Error> {
        for entry in self.skip_to(content(directory)?, name)? {
            let entry = entry?;
            match (*entry.name).cmp(name) {
                Ordering::Less => {}
                Ordering::Equal => return Ok(Some(entry)),
                Ordering::Greater => break,
            }
        }
        Ok(None)
    }

    fn entries(&self, content: &DirectoryContent, left: u32) -> Entries<'_> {
        let header = DirectoryHeader { count: 0.into(), block: 0.into(), number: 0.into() };
        Entries { cursor: self.blocks.cursor(PART, content.listing), left, header, run: 0 }
    }

    /// The entries from the last place of the index on that is not behind `name`.
    fn skip_to(&self, content: &DirectoryContent, name: &[u8]) -> Result<Entries<'_>, Error> {
        let table = self.superblock().directory_table.get();
        let (count, position) = content.index;
        let mut index = self.blocks.cursor("directory index", position);
        let mut listing = content.listing;
        let mut skipped = 0;
        let mut first = [0; NAME_MAX + 1];
        for _ in 0..count {
            let entry: DirectoryIndex = index.read()?;
            let first = (entry.name_size.get() as usize).checked_add(1).and_then(|size| first.get_mut(..size));
            let first = first.ok_or_else(|| index.damaged("a name that is too long"))?;
            index.read_exact(first)?;
            if *first > *name {
                break;
            }
            skipped = entry.position.get();
            listing.block = table.saturating_add(entry.block.get().into());
            // The index has the block only: the offset follows from the place in the listing, of which all blocks but the
            // last are full.
            listing.offset = (content.listing.offset as u64).saturating_add(skipped.into()) as usize % METADATA;
        }
        let left = content.size.checked_sub(skipped).ok_or_else(|| index.damaged("a place behind the listing"))?;
        Ok(self.entries(&DirectoryContent { listing, ..content.clone() }, left))
    }
}

fn content(directory: &Inode) -> Result<&DirectoryContent, Error> {
    match &directory.content {
        Content::Directory(content) => Ok(content),
        _ => Err(Error::damaged("inode", directory.reference.number(), "not a directory")),
    }
}

impl Entries<'_> {
    fn take(&mut self, bytes: usize) -> Result<(), Error> {
        let left = u32::try_from(bytes).ok().and_then(|bytes| self.left.checked_sub(bytes));
        self.left = left.ok_or_else(|| self.cursor.damaged("an entry that ends behind the listing"))?;
        Ok(())
    }

    fn read_entry(&mut self) -> Result<Entry, Error> {
        if self.run == 0 {
            self.take(size_of::<DirectoryHeader>())?;
            self.header = self.cursor.read()?;
            self.run = self.header.count.get().saturating_add(1);
            if self.run > DIRECTORY_RUN {
                return Err(self.cursor.damaged("a header for too many entries"));
            }
        }
        self.take(size_of::<DirectoryEntry>())?;
        let entry: DirectoryEntry = self.cursor.read()?;
        let size = usize::from(entry.name_size.get()) + 1;
        self.take(size)?;
        if size > NAME_MAX {
            return Err(self.cursor.damaged("a name that is too long"));
        }
        let mut name = vec![0; size].into_boxed_slice();
        self.cursor.read_exact(&mut name)?;
        if matches!(&*name, b"." | b"..") || name.iter().any(|byte| matches!(byte, b'/' | 0)) {
            return Err(self.cursor.damaged("an impossible name"));
        }
        let file_type = FileType::new(entry.file_type.get());
        let file_type = file_type.ok_or_else(|| self.cursor.damaged("an entry of unknown type"))?;
        self.run -= 1;
        Ok(Entry {
            name,
            inode: InodeRef::new(u64::from(self.header.block.get()) << 16 | u64::from(entry.offset.get())),
            number: self.header.number.get().wrapping_add_signed(entry.number.get().into()),
            file_type,
        })
    }
}

impl Iterator for Entries<'_> {
    type Item = Result<Entry, Error>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let entry = self.read_entry();
        if entry.is_err() {
            self.left = 0;
        }
        Some(entry)
    }
}
