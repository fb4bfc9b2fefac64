//! Puts inodes and data where they belong, in one pass.

use std::fs::File;
use std::mem::offset_of;

use sha2::{Digest, Sha256};
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U32, U64};

use super::chunks::{Chunks, Extent};
use super::directory::{self, blocks, listing};
use super::format::{
    Address, BLOCK, BLOCK_BITS, COMPAT_MTIME, COMPAT_SB_CHKSUM, FileType, HOLE, INCOMPAT_CHUNKED_FILE, INODE, Inode,
    Layout, MAGIC, ROOT_OFFSET, SLOT, SUPER_OFFSET, SuperBlock, crc32c,
};
use super::output::{Block, Output};
use super::plan::{OPEN_BLOCKS, Place, Plan, best_fit};
use super::{Attributes, Directory, DirectoryId, Error, InodeId, Target, Xattrs};

/// Writes an image: first the inodes and data of everything that is no directory, in any order, then
/// ([`Writer::finish`]) the directories.
///
/// The superblock's UUID is made from a hash of all inodes and names: overlayfs wants the file systems below it to have
/// different ones, and equal layers to stay equal.
#[derive(Debug)]
pub struct Writer<'a> {
    output: Output<'a>,
    open: Vec<MetadataBlock>,
    inodes: Vec<Placed>,
    identity: Sha256,
    has_chunks: bool,
}

/// A metadata block that still has room.
#[derive(Debug)]
struct MetadataBlock {
    bytes: Box<Block>,
    used: usize,
    /// The inodes in it and their offsets.
    inodes: Vec<(InodeId, usize)>,
}

/// An inode of the image.
#[derive(Debug, Clone, Copy)]
struct Placed {
    /// 0 while its metadata block is open.
    nid: u64,
    file_type: FileType,
    /// Names counted so far; on disk there is a 1.
    nlink: u32,
}

impl<'a> Writer<'a> {
    /// Begins an image of at most `limit` bytes in `file`, which must be empty and open for reading and writing.
    pub fn new(file: &'a File, limit: u64) -> Result<Self, Error> {
        let mut output = Output::new(file, limit);
        output.reserve(BLOCK as u64)?;
        output.zeros(BLOCK as u64)?;
        Ok(Self { output, open: Vec::new(), inodes: Vec::new(), identity: Sha256::new(), has_chunks: false })
    }

    /// Adds a regular file of `size` bytes. `fill` is called with slices to fill completely, one after the other, until
    /// the whole content has been asked for.
    pub fn file<E: From<Error>>(
        &mut self,
        attributes: &Attributes,
        size: u64,
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<InodeId, E> {
        let tail = (size % BLOCK as u64) as usize;
        let inline = INODE + attributes.xattrs.size() + tail <= BLOCK;
        let (layout, tail) = if inline && tail > 0 { (Layout::FlatInline, tail) } else { (Layout::FlatPlain, 0) };
        let outside = size - tail as u64;
        let address = if outside > 0 { Address::Block(self.output.block()) } else { Address::None };
        self.data(outside, &mut fill)?;
        let inode = self.inode(FileType::Regular, attributes, layout, size, address);
        self.put(FileType::Regular, inode, &attributes.xattrs, tail, |to| if to.is_empty() { Ok(()) } else { fill(to) })
    }

    /// Adds a sparse file of `size` bytes with data in `extents`, which are in order, do not overlap and end within the
    /// file. `fill` is asked for the data of all extents, one after the other.
    pub fn sparse_file<E: From<Error>>(
        &mut self,
        attributes: &Attributes,
        size: u64,
        extents: &[Extent],
        mut fill: impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<InodeId, E> {
        if let [Extent { offset: 0, length }] = extents
            && *length == size
        {
            return self.file(attributes, size, fill);
        }
        let chunks = Chunks::plan(size, extents).ok_or(Error::TooLarge)?;
        self.output.reserve(chunks.blocks * BLOCK as u64 + chunks.count * 4)?;
        let mut map = vec![HOLE; chunks.count as usize];
        for run in chunks.runs(extents) {
            let start = self.output.block();
            for (address, number) in map[run.first as usize..=run.last as usize].iter_mut().zip(0..) {
                *address = U32::new(start + (number << chunks.bits));
            }
            let mut at = run.first * chunks.bytes();
            let end = at + run.blocks * BLOCK as u64;
            for extent in run.extents {
                self.output.zeros(extent.offset - at)?;
                self.fill(extent.length, &mut fill)?;
                at = extent.offset + extent.length;
            }
            self.output.zeros(end - at)?;
        }
        self.has_chunks = true;
        let address = Address::ChunkBits(chunks.bits);
        let inode = self.inode(FileType::Regular, attributes, Layout::ChunkBased, size, address);
        let map = map.as_bytes();
        self.put(FileType::Regular, inode, &attributes.xattrs, map.len(), |to| {
            to.copy_from_slice(map);
            Ok(())
        })
    }

    /// Adds a symbolic link; `target` has 1 to [`super::SYMLINK_MAX`] bytes. Extended attributes are left out: a link
    /// cannot have those of users.
    pub fn symlink(&mut self, attributes: &Attributes, target: &[u8]) -> Result<InodeId, Error> {
        let (size, xattrs) = (target.len() as u64, Xattrs::default());
        if INODE + target.len() <= BLOCK {
            let inode = self.inode(FileType::Symlink, attributes, Layout::FlatInline, size, Address::None);
            return self.put(
                FileType::Symlink,
                Inode { xattr_icount: U16::ZERO, ..inode },
                &xattrs,
                target.len(),
                |to| {
                    to.copy_from_slice(target);
                    Ok(())
                },
            );
        }
        let address = Address::Block(self.output.block());
        self.output.reserve(BLOCK as u64)?;
        self.output.append(target)?;
        self.output.pad()?;
        let inode = self.inode(FileType::Symlink, attributes, Layout::FlatPlain, size, address);
        self.put(FileType::Symlink, Inode { xattr_icount: U16::ZERO, ..inode }, &xattrs, 0, |_| Ok(()))
    }

    /// Adds a named pipe; without extended attributes, as for links.
    pub fn fifo(&mut self, attributes: &Attributes) -> Result<InodeId, Error> {
        self.special(FileType::Fifo, attributes)
    }

    /// Adds overlay's whiteout, a character device with number 0:0. One serves for all names of a layer.
    pub fn whiteout(&mut self) -> Result<InodeId, Error> {
        self.special(FileType::Character, &Attributes::default())
    }

    fn special(&mut self, file_type: FileType, attributes: &Attributes) -> Result<InodeId, Error> {
        let inode = self.inode(file_type, attributes, Layout::FlatPlain, 0, Address::None);
        self.put(file_type, Inode { xattr_icount: U16::ZERO, ..inode }, &Xattrs::default(), 0, |_| Ok(()))
    }

    /// Writes `length` bytes of content as whole blocks.
    fn data<E: From<Error>>(
        &mut self,
        length: u64,
        fill: &mut impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.output.reserve(length.checked_next_multiple_of(BLOCK as u64).ok_or(Error::TooLarge)?)?;
        self.fill(length, fill)?;
        Ok(self.output.pad()?)
    }

    /// Lets `fill` write straight into the output's buffer.
    fn fill<E: From<Error>>(
        &mut self,
        mut length: u64,
        fill: &mut impl FnMut(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        while length > 0 {
            let space = self.output.space(length)?;
            let now = space.len();
            fill(space)?;
            self.output.advance(now);
            length -= now as u64;
        }
        Ok(())
    }

    /// The next inode.
    fn inode(
        &self,
        file_type: FileType,
        attributes: &Attributes,
        layout: Layout,
        size: u64,
        address: Address,
    ) -> Inode {
        inode(self.inodes.len(), file_type, attributes, layout, size, address)
    }

    /// Places an inode with its attributes and the `extra` bytes that `fill` writes behind them.
    fn put<E: From<Error>>(
        &mut self,
        file_type: FileType,
        inode: Inode,
        xattrs: &Xattrs,
        extra: usize,
        fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<InodeId, E> {
        let id = InodeId(u32::try_from(self.inodes.len()).map_err(|_| Error::TooLarge)?);
        self.inodes.push(Placed { nid: 0, file_type, nlink: 0 });
        self.identity.update(inode.as_bytes());
        let length = INODE + xattrs.size() + extra;
        if length <= BLOCK {
            return encode(&inode, xattrs, self.room(id, length)?, fill).map(|()| id);
        }
        // Larger than a block (a block map, or many attributes): a run of blocks of its own.
        self.output.reserve(length.next_multiple_of(BLOCK) as u64)?;
        self.inodes[id.0 as usize].nid = self.output.position() / SLOT as u64;
        let mut bytes = vec![0; length];
        encode(&inode, xattrs, &mut bytes, fill)?;
        self.output.append(&bytes)?;
        self.output.pad()?;
        Ok(id)
    }

    /// Room for inode `id` in a metadata block.
    fn room(&mut self, id: InodeId, length: usize) -> Result<&mut [u8], Error> {
        let index = match best_fit(self.open.iter().map(|block| block.used), length) {
            Some(index) => index,
            None => {
                if self.open.len() == OPEN_BLOCKS {
                    self.close_fullest()?;
                }
                self.open.push(MetadataBlock { bytes: Block::zeroed(), used: 0, inodes: Vec::new() });
                self.open.len() - 1
            }
        };
        let block = &mut self.open[index];
        let start = block.used;
        block.used = (start + length).next_multiple_of(SLOT);
        block.inodes.push((id, start));
        Ok(&mut block.bytes.0[start..start + length])
    }

    /// Writes the fullest open metadata block: now its inodes have addresses.
    fn close_fullest(&mut self) -> Result<(), Error> {
        let Some(fullest) = (0..self.open.len()).max_by_key(|&index| self.open[index].used) else { return Ok(()) };
        let block = self.open.swap_remove(fullest);
        self.output.reserve(BLOCK as u64)?;
        for (id, offset) in block.inodes {
            self.inodes[id.0 as usize].nid = (self.output.position() + offset as u64) / SLOT as u64;
        }
        self.output.append(&block.bytes.0)
    }

    /// Adds the directories, of which the first is the root, and completes the image. Returns its size in bytes.
    /// Directories that the root does not lead to are left out.
    pub fn finish(mut self, directories: &[Directory]) -> Result<u64, Error> {
        while !self.open.is_empty() {
            self.close_fullest()?;
        }
        let (order, subdirectories) = self.count_links(directories);
        let Self { mut output, inodes, mut identity, has_chunks, .. } = self;
        let plan = Plan::new(directories, &order, output.block())?;
        output.reserve(plan.blocks() * BLOCK as u64)?;

        let resolve = |target| match target {
            Target::Directory(id) => (plan.nids[id.index()], FileType::Directory),
            Target::Inode(id) => (inodes[id.0 as usize].nid, inodes[id.0 as usize].file_type),
            // `listing` leaves these out.
            Target::Nothing => (0, FileType::Regular),
        };
        let encode_place = |place: &Place, to: &mut [u8]| {
            let directory = &directories[place.id.index()];
            let layout = if place.inline { Layout::FlatInline } else { Layout::FlatPlain };
            let address = if place.outside > 0 { Address::Block(place.data) } else { Address::None };
            let serial = inodes.len() + place.id.index();
            let inode = inode(serial, FileType::Directory, &directory.attributes, layout, place.size, address);
            let inode = Inode { nlink: U32::new(2 + subdirectories[place.id.index()]), ..inode };
            encode(&inode, &directory.attributes.xattrs, to, |to| {
                if place.inline
                    && let Some((entries, _)) = blocks(&listing(place.id, directory)).last()
                {
                    directory::encode(entries, resolve, to);
                }
                Ok::<(), Error>(())
            })
        };

        // The inodes, in the order of their addresses, a block (or a larger inode) at a time.
        let mut places: Vec<&Place> = plan.places.iter().skip(1).collect();
        places.sort_unstable_by_key(|place| place.nid);
        let mut bytes = Vec::new();
        for places in places.chunk_by(|a, b| block_of(a.nid) == block_of(b.nid)) {
            bytes.clear();
            for place in places {
                let start = bytes.len().next_multiple_of(SLOT);
                bytes.resize(start + place.length, 0);
                encode_place(place, &mut bytes[start..])?;
            }
            identity.update(&bytes);
            output.append(&bytes)?;
            output.pad()?;
        }
        // The blocks of entries.
        let mut block = Block::zeroed();
        for place in &plan.places {
            let listing = listing(place.id, &directories[place.id.index()]);
            for (entries, _) in blocks(&listing).take(place.outside as usize) {
                directory::encode(entries, resolve, &mut block.0);
                identity.update(block.0);
                output.append(&block.0)?;
            }
        }
        let size = output.position();
        output.complete()?;
        patch_links(&output, &inodes)?;

        let mut first = Block::zeroed();
        let root = &plan.places[0];
        encode_place(root, &mut first.0[ROOT_OFFSET..ROOT_OFFSET + root.length])?;
        identity.update(first.0);
        let live = inodes.iter().filter(|inode| inode.nlink > 0).count() + order.len();
        let super_block = SuperBlock {
            magic: U32::new(MAGIC),
            checksum: U32::ZERO,
            feature_compat: U32::new(COMPAT_SB_CHKSUM | COMPAT_MTIME),
            blkszbits: BLOCK_BITS,
            sb_extslots: 0,
            root_nid: U16::new((ROOT_OFFSET / SLOT) as u16),
            inos: U64::new(live as u64),
            build_time: U64::ZERO,
            build_time_nsec: U32::ZERO,
            blocks: U32::new((size / BLOCK as u64) as u32),
            meta_blkaddr: U32::ZERO,
            xattr_blkaddr: U32::ZERO,
            uuid: uuid(&identity.finalize().into()),
            volume_name: [0; 16],
            feature_incompat: U32::new(if has_chunks { INCOMPAT_CHUNKED_FILE } else { 0 }),
            unused: [0; 44],
        };
        first.0[SUPER_OFFSET..ROOT_OFFSET].copy_from_slice(super_block.as_bytes());
        let checksum = crc32c(&first.0[SUPER_OFFSET..]).to_le_bytes();
        let at = SUPER_OFFSET + offset_of!(SuperBlock, checksum);
        first.0[at..at + checksum.len()].copy_from_slice(&checksum);
        output.rewrite([0], |_, memory| *memory = first.0)?;
        Ok(size)
    }

    /// Walks the tree breadth first, so that the inodes of a directory's subdirectories lie together. Counts each inode's
    /// names; returns the directories in order, and how many subdirectories each has.
    fn count_links(&mut self, directories: &[Directory]) -> (Vec<DirectoryId>, Vec<u32>) {
        let mut order = vec![DirectoryId::ROOT];
        let mut subdirectories = vec![0; directories.len()];
        let mut at = 0;
        while let Some(&id) = order.get(at) {
            at += 1;
            for target in directories[id.index()].entries.values() {
                match target {
                    Target::Directory(child) => {
                        subdirectories[id.index()] += 1;
                        order.push(*child);
                    }
                    Target::Inode(inode) => self.inodes[inode.0 as usize].nlink += 1,
                    Target::Nothing => {}
                }
            }
        }
        (order, subdirectories)
    }
}

/// Corrects the link counts that are not 1: they are known only at the end.
fn patch_links(output: &Output<'_>, inodes: &[Placed]) -> Result<(), Error> {
    let mut linked: Vec<(u64, u32)> =
        inodes.iter().filter(|inode| inode.nlink > 1).map(|inode| (inode.nid, inode.nlink)).collect();
    linked.sort_unstable();
    let mut touched: Vec<u32> = linked.iter().map(|&(nid, _)| block_of(nid)).collect();
    touched.dedup();
    let mut linked = linked.into_iter().peekable();
    output.rewrite(touched, |block, memory| {
        while let Some((nid, nlink)) = linked.next_if(|&(nid, _)| block_of(nid) == block) {
            let at = (nid * SLOT as u64 % BLOCK as u64) as usize + offset_of!(Inode, nlink);
            memory[at..at + size_of::<u32>()].copy_from_slice(&nlink.to_le_bytes());
        }
    })
}

/// The block that holds inode `nid`. Addresses have 32 bits.
fn block_of(nid: u64) -> u32 {
    (nid * SLOT as u64 / BLOCK as u64) as u32
}

/// The inode number `serial`, with one name.
fn inode(
    serial: usize,
    file_type: FileType,
    attributes: &Attributes,
    layout: Layout,
    size: u64,
    address: Address,
) -> Inode {
    Inode {
        format: layout.format(),
        xattr_icount: attributes.xattrs.icount(),
        mode: U16::new(file_type.mode() | attributes.mode & 0o7777),
        reserved: U16::ZERO,
        size: U64::new(size),
        u: address.encode(),
        ino: U32::new(serial as u32 + 1),
        uid: U32::ZERO,
        gid: U32::ZERO,
        mtime: U64::new(attributes.mtime as u64),
        mtime_nsec: U32::new(attributes.mtime_nsec),
        nlink: U32::new(1),
        reserved2: [0; 16],
    }
}

/// Writes an inode, its attributes and what `fill` puts behind them to `to`.
fn encode<E>(
    inode: &Inode,
    xattrs: &Xattrs,
    to: &mut [u8],
    fill: impl FnOnce(&mut [u8]) -> Result<(), E>,
) -> Result<(), E> {
    let (head, rest) = to.split_at_mut(INODE);
    head.copy_from_slice(inode.as_bytes());
    let (attributes, extra) = rest.split_at_mut(xattrs.size());
    xattrs.encode(attributes);
    fill(extra)
}

/// A version 8 UUID (RFC 9562: custom content) made from a hash.
fn uuid(hash: &[u8; 32]) -> [u8; 16] {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&hash[..16]);
    uuid[6] = uuid[6] & 0x0f | 0x80;
    uuid[8] = uuid[8] & 0x3f | 0x80;
    uuid
}
