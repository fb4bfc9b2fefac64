//! What follows the data: inodes, directories, the tables that lead to them, and the superblock.
//!
//! An entry of a directory says where the inode is, and a directory's inode where its entries are: so a directory comes
//! after everything in it, and the root last.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;

use super::blocks::{Blocks, Data};
use super::compress::Compressor;
use super::metadata::{METADATA_BLOCK, Place, Table};
use super::tree::{Entries, Kind, Node, NodeId, Tree};
use super::xattr::{NO_XATTRS, XattrTable};
use super::{Attributes, Options, SUPERBLOCK, Special};

const MAGIC: u32 = 0x7371_7368;
const NO_TABLE: u64 = u64::MAX;
const NO_FRAGMENT: u32 = u32::MAX;
/// The image ends with a whole page.
const PAGE: u64 = 4096;
/// Most entries behind one header of a directory.
const RUN: usize = 256;

// Superblock flags.
const STORED_INODES: u16 = 1 << 0;
const STORED_DATA: u16 = 1 << 1;
const STORED_FRAGMENTS: u16 = 1 << 3;
const NO_FRAGMENTS: u16 = 1 << 4;
const ALWAYS_FRAGMENTS: u16 = 1 << 5;
const EXPORTABLE: u16 = 1 << 7;
const STORED_XATTRS: u16 = 1 << 8;
const NO_XATTR_TABLE: u16 = 1 << 9;
const COMPRESSOR_OPTIONS: u16 = 1 << 10;
const STORED_IDS: u16 = 1 << 11;

/// Inode types; with extended attributes, many links or large sizes, [`EXTENDED`] more.
mod types {
    pub const DIRECTORY: u16 = 1;
    pub const FILE: u16 = 2;
    pub const SYMLINK: u16 = 3;
    pub const BLOCK_DEVICE: u16 = 4;
    pub const CHARACTER_DEVICE: u16 = 5;
    pub const FIFO: u16 = 6;
    pub const SOCKET: u16 = 7;
    pub const EXTENDED: u16 = 7;
}

/// An inode that has its place.
#[derive(Debug, Clone, Copy, Default)]
struct Written {
    number: u32,
    place: Option<Place>,
}

/// Writes everything but the data.
pub fn finish(blocks: Blocks, tree: Tree, options: &Options, now: u32) -> io::Result<File> {
    let table = |compressed: bool| -> io::Result<Table> {
        let compressor = || Compressor::new(options.compression, options.level(), options.block_size);
        Ok(Table::new(if compressed { Some(compressor()?) } else { None }))
    };
    let mut builder = Builder {
        tree: &tree,
        data: &blocks.data,
        latest: options.time.unwrap_or(u32::MAX),
        store_xattrs: options.xattrs,
        inodes: table(options.compress_inodes)?,
        directories: table(options.compress_inodes)?,
        xattrs: XattrTable::new(table(options.compress_xattrs)?),
        written: vec![Written::default(); tree.len()],
        references: Vec::with_capacity(tree.len()),
    };
    let root = builder.build()?;
    let Builder { inodes, directories, xattrs, references, .. } = builder;

    let mut tail = Tail { output: blocks.output, position: blocks.position };
    let inode_table = tail.table(inodes)?;
    let directory_table = tail.table(directories)?;
    let mut fragments = table(options.compress_inodes)?;
    for (start, size) in &blocks.fragments {
        fragments.write(&start.to_le_bytes())?;
        fragments.write(&size.to_le_bytes())?;
        fragments.write(&0u32.to_le_bytes())?;
    }
    let fragment_table = tail.indexed(fragments)?;
    let export_table = if options.exports {
        let mut export = table(options.compress_inodes)?;
        for reference in &references {
            export.write(&reference.to_le_bytes())?;
        }
        tail.indexed(export)?
    } else {
        NO_TABLE
    };
    let mut owners = table(options.compress_ids && options.compress_inodes)?;
    owners.write(&0u32.to_le_bytes())?;
    let id_table = tail.indexed(owners)?;
    let xattr_table = match xattrs.finish(table(options.compress_xattrs)?, tail.position)? {
        Some((bytes, header)) => tail.append(&bytes)? + header,
        None => NO_TABLE,
    };
    let bytes_used = tail.position;
    if options.pad {
        let padding = bytes_used.next_multiple_of(PAGE) - bytes_used;
        tail.append(&vec![0; padding as usize])?;
    }

    let flag = |set: bool, flag: u16| if set { flag } else { 0 };
    let flags = flag(!options.compress_inodes, STORED_INODES)
        | flag(!options.compress_data, STORED_DATA)
        | flag(!options.compress_fragments, STORED_FRAGMENTS)
        | flag(!options.fragments, NO_FRAGMENTS)
        | flag(options.fragments && options.tail_ends, ALWAYS_FRAGMENTS)
        | flag(options.exports, EXPORTABLE)
        | flag(!options.compress_xattrs, STORED_XATTRS)
        | flag(xattr_table == NO_TABLE, NO_XATTR_TABLE)
        | flag(options.compression.stored_options().is_some(), COMPRESSOR_OPTIONS)
        | flag(!(options.compress_ids && options.compress_inodes), STORED_IDS);
    let mut superblock = Bytes::with_capacity(SUPERBLOCK);
    superblock.u32(MAGIC);
    superblock.u32(references.len() as u32);
    superblock.u32(now);
    superblock.u32(options.block_size as u32);
    superblock.u32(blocks.fragments.len() as u32);
    superblock.u16(options.compression.id());
    superblock.u16(options.block_size.trailing_zeros() as u16);
    superblock.u16(flags);
    superblock.u16(1); // owners
    superblock.u16(4); // version 4.0
    superblock.u16(0);
    superblock.u64(root.reference());
    superblock.u64(bytes_used);
    for table in [id_table, xattr_table, inode_table, directory_table, fragment_table, export_table] {
        superblock.u64(table);
    }
    let file = tail.output.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.write_all_at(&superblock.0, 0)?;
    Ok(file)
}

/// The end of the image, from the first table on.
struct Tail {
    output: BufWriter<File>,
    position: u64,
}

impl Tail {
    /// Appends `bytes` and returns where they begin.
    fn append(&mut self, bytes: &[u8]) -> io::Result<u64> {
        let start = self.position;
        self.output.write_all(bytes)?;
        self.position += bytes.len() as u64;
        Ok(start)
    }

    /// Appends a table and returns where it begins.
    fn table(&mut self, table: Table) -> io::Result<u64> {
        self.append(&table.finish()?.0)
    }

    /// Appends a table and the list of its blocks, and returns where that list begins.
    fn indexed(&mut self, table: Table) -> io::Result<u64> {
        let (bytes, starts) = table.finish()?;
        let start = self.append(&bytes)?;
        let list: Vec<u8> = starts.iter().flat_map(|offset| (start + offset).to_le_bytes()).collect();
        self.append(&list)
    }
}

struct Builder<'a> {
    tree: &'a Tree,
    data: &'a [Data],
    latest: u32,
    store_xattrs: bool,
    inodes: Table,
    directories: Table,
    xattrs: XattrTable,
    written: Vec<Written>,
    /// References to the inodes, by number.
    references: Vec<u64>,
}

/// Part of a directory's index: which entries are in which metadata block.
struct IndexEntry<'a> {
    /// Bytes of the listing before it.
    offset: u32,
    block: u32,
    name: &'a [u8],
}

impl<'a> Builder<'a> {
    /// Writes all inodes and directories; returns the root's place.
    fn build(&mut self) -> io::Result<Place> {
        // Each directory behind the one that it is in.
        let mut order = vec![(NodeId::ROOT, NodeId::ROOT)];
        let mut next = 0;
        while let Some(&(directory, _)) = order.get(next) {
            next += 1;
            for &child in self.entries(directory).values() {
                if matches!(self.tree.node(child).kind, Kind::Directory(_)) {
                    order.push((child, directory));
                }
            }
        }
        // The other way round, and a directory's number has to be known before those of what is in it are written.
        let mut number = 0;
        for &(directory, _) in order.iter().rev() {
            for &child in self.entries(directory).values().chain([&directory]) {
                let written = &mut self.written[child.index()];
                if written.number == 0 {
                    number += 1;
                    written.number = number;
                }
            }
        }
        for &(directory, parent) in order.iter().rev() {
            for &child in self.entries(directory).values() {
                if self.written[child.index()].place.is_none() {
                    self.inode(child)?;
                }
            }
            self.directory(directory, parent)?;
        }
        self.written[NodeId::ROOT.index()].place.ok_or_else(|| io::Error::other("no root directory"))
    }

    fn entries(&self, directory: NodeId) -> &'a Entries {
        static NONE: Entries = Entries::new();
        match &self.tree.node(directory).kind {
            Kind::Directory(entries) => entries,
            _ => &NONE,
        }
    }

    /// Writes the inode of anything but a directory.
    fn inode(&mut self, id: NodeId) -> io::Result<()> {
        let node = self.tree.node(id);
        let xattrs = self.xattrs(&node.attributes)?;
        let extended = xattrs != NO_XATTRS;
        let mut bytes = Bytes::default();
        let kind = match &node.kind {
            Kind::Directory(_) => return Ok(()),
            Kind::File(data) => {
                let data = &self.data[data.0 as usize];
                return self.file(id, node, data, xattrs);
            }
            Kind::Symlink(target) => {
                bytes.u32(node.links);
                bytes.u32(target.len() as u32);
                bytes.0.extend_from_slice(target);
                types::SYMLINK
            }
            Kind::Special(special) => {
                bytes.u32(node.links);
                let mut device = |major: u32, minor: u32| bytes.u32(minor & 0xff | major << 8 | (minor & !0xff) << 12);
                match *special {
                    Special::BlockDevice { major, minor } => {
                        device(major, minor);
                        types::BLOCK_DEVICE
                    }
                    Special::CharacterDevice { major, minor } => {
                        device(major, minor);
                        types::CHARACTER_DEVICE
                    }
                    Special::Fifo => types::FIFO,
                    Special::Socket => types::SOCKET,
                }
            }
        };
        if extended {
            bytes.u32(xattrs);
        }
        self.write_inode(id, if extended { kind + types::EXTENDED } else { kind }, &bytes)
    }

    fn file(&mut self, id: NodeId, node: &Node, data: &Data, xattrs: u32) -> io::Result<()> {
        let (fragment, offset) = data.fragment.unwrap_or((NO_FRAGMENT, 0));
        let mut bytes = Bytes::default();
        let basic = match (u32::try_from(data.start), u32::try_from(data.size)) {
            (Ok(start), Ok(size)) if node.links == 1 && data.sparse == 0 && xattrs == NO_XATTRS => Some((start, size)),
            _ => None,
        };
        let kind = match basic {
            Some((start, size)) => {
                bytes.u32(start);
                bytes.u32(fragment);
                bytes.u32(offset);
                bytes.u32(size);
                types::FILE
            }
            None => {
                bytes.u64(data.start);
                bytes.u64(data.size);
                bytes.u64(data.sparse);
                bytes.u32(node.links);
                bytes.u32(fragment);
                bytes.u32(offset);
                bytes.u32(xattrs);
                types::FILE + types::EXTENDED
            }
        };
        for &block in &data.blocks {
            bytes.u32(block);
        }
        self.write_inode(id, kind, &bytes)
    }

    /// Writes a directory's entries, all of which have their inodes, and its inode.
    fn directory(&mut self, id: NodeId, parent: NodeId) -> io::Result<()> {
        let node = self.tree.node(id);
        let entries: Vec<(&[u8], NodeId)> = self.entries(id).iter().map(|(name, child)| (&**name, *child)).collect();
        let start = self.directories.place()?;
        let mut size: u32 = 0;
        let mut index: Vec<IndexEntry<'_>> = Vec::new();
        let mut rest = entries.as_slice();
        while let Some(&(name, _)) = rest.first() {
            let (header, count, length) = self.run(rest, METADATA_BLOCK)?;
            // The kernel searches from the last entry of the index on whose name is not behind the one it looks for.
            let last = index.last().map_or(0, |entry| entry.offset);
            if size > 0 && size - last + length > METADATA_BLOCK as u32 {
                let block = self.directories.place()?.block;
                let block = u32::try_from(block).map_err(|_| too_many())?;
                index.push(IndexEntry { offset: size, block, name });
            }
            self.directories.write(&header)?;
            size = size.checked_add(length).ok_or_else(too_many)?;
            rest = &rest[count..];
        }

        let subdirectories =
            entries.iter().filter(|(_, child)| matches!(self.tree.node(*child).kind, Kind::Directory(_))).count();
        let links = u32::try_from(subdirectories).unwrap_or(u32::MAX).saturating_add(2);
        let parent = if id == NodeId::ROOT { self.tree.len() as u32 + 1 } else { self.written[parent.index()].number };
        let xattrs = self.xattrs(&node.attributes)?;
        let block = u32::try_from(start.block).map_err(|_| too_many())?;
        // "." and ".." count, although they are not stored.
        let size = size.checked_add(3).ok_or_else(too_many)?;
        let mut bytes = Bytes::default();
        let kind = match u16::try_from(size) {
            Ok(size) if xattrs == NO_XATTRS && index.is_empty() => {
                bytes.u32(block);
                bytes.u32(links);
                bytes.u16(size);
                bytes.u16(start.offset);
                bytes.u32(parent);
                types::DIRECTORY
            }
            _ => {
                index.truncate(u16::MAX.into());
                bytes.u32(links);
                bytes.u32(size);
                bytes.u32(block);
                bytes.u32(parent);
                bytes.u16(index.len() as u16);
                bytes.u16(start.offset);
                bytes.u32(xattrs);
                for entry in &index {
                    bytes.u32(entry.offset);
                    bytes.u32(entry.block);
                    bytes.u32(entry.name.len() as u32 - 1);
                    bytes.0.extend_from_slice(entry.name);
                }
                types::DIRECTORY + types::EXTENDED
            }
        };
        self.write_inode(id, kind, &bytes)
    }

    /// As many entries as go behind one header, with it: those whose inodes are in the same block and whose numbers are
    /// near. Returns the bytes, the number of entries, and the number of bytes.
    fn run(&self, entries: &[(&[u8], NodeId)], most: usize) -> io::Result<(Vec<u8>, usize, u32)> {
        let first = entries.first().map_or(Written::default(), |(_, id)| self.written[id.index()]);
        let place = first.place.ok_or_else(|| io::Error::other("an entry without inode"))?;
        let block = u32::try_from(place.block).map_err(|_| too_many())?;
        let mut bytes = Bytes::default();
        bytes.u32(0);
        bytes.u32(block);
        bytes.u32(first.number);
        let mut count = 0;
        for (name, id) in entries.iter().take(RUN) {
            let Written { number, place: Some(here) } = self.written[id.index()] else {
                return Err(io::Error::other("an entry without inode"));
            };
            let delta = i16::try_from(i64::from(number) - i64::from(first.number));
            let (Ok(delta), true) = (delta, here.block == place.block) else { break };
            if count > 0 && bytes.0.len() + 8 + name.len() > most {
                break;
            }
            bytes.u16(here.offset);
            bytes.u16(delta.cast_unsigned());
            bytes.u16(match &self.tree.node(*id).kind {
                Kind::Directory(_) => types::DIRECTORY,
                Kind::File(_) => types::FILE,
                Kind::Symlink(_) => types::SYMLINK,
                Kind::Special(Special::BlockDevice { .. }) => types::BLOCK_DEVICE,
                Kind::Special(Special::CharacterDevice { .. }) => types::CHARACTER_DEVICE,
                Kind::Special(Special::Fifo) => types::FIFO,
                Kind::Special(Special::Socket) => types::SOCKET,
            });
            // Names have 1 to 255 bytes.
            bytes.u16(name.len() as u16 - 1);
            bytes.0.extend_from_slice(name);
            count += 1;
        }
        let Bytes(mut bytes) = bytes;
        bytes[..4].copy_from_slice(&(count as u32 - 1).to_le_bytes());
        let length = bytes.len() as u32;
        Ok((bytes, count, length))
    }

    fn xattrs(&mut self, attributes: &Attributes) -> io::Result<u32> {
        if self.store_xattrs { self.xattrs.add(&attributes.xattrs) } else { Ok(NO_XATTRS) }
    }

    fn write_inode(&mut self, id: NodeId, kind: u16, rest: &Bytes) -> io::Result<()> {
        let attributes = &self.tree.node(id).attributes;
        let number = self.written[id.index()].number;
        let mut header = Bytes::with_capacity(16);
        header.u16(kind);
        header.u16(attributes.mode & 0o7777);
        header.u16(0); // owner
        header.u16(0); // group
        header.u32((attributes.mtime.clamp(0, i64::from(u32::MAX)) as u32).min(self.latest));
        header.u32(number);
        let place = self.inodes.place()?;
        self.inodes.write(&header.0)?;
        self.inodes.write(&rest.0)?;
        self.written[id.index()].place = Some(place);
        // Numbers are given in the order in which inodes are written.
        debug_assert_eq!(self.references.len() as u32 + 1, number);
        self.references.push(place.reference());
        Ok(())
    }
}

fn too_many() -> io::Error {
    io::Error::other("too many files")
}

/// Numbers, little endian.
#[derive(Debug, Default)]
struct Bytes(Vec<u8>);

impl Bytes {
    fn with_capacity(capacity: usize) -> Self {
        Self(Vec::with_capacity(capacity))
    }

    fn u16(&mut self, value: u16) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend_from_slice(&value.to_le_bytes());
    }
}
