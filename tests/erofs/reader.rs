//! A second opinion on images: reads them with nothing but the format's description, without the kernel and without the
//! writer's code, and checks what the kernel does not: that nothing overlaps, that link counts are right, that
//! directories are sorted.
//!
//! Also used by the fuzz targets.

use std::collections::{BTreeMap, HashMap};

use crate::tree::{Content, Kind, Node, Tree, link};

/// Reads a whole image.
pub fn read(image: &[u8]) -> Result<Tree, String> {
    let mut reader = Reader { image, ranges: Vec::new(), inodes: HashMap::new(), links: HashMap::new() };
    let tree = reader.tree()?;
    reader.ranges.sort_unstable();
    if let Some(pair) = reader.ranges.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        return Err(format!("{pair:?} overlap"));
    }
    Ok(tree)
}

struct Reader<'a> {
    image: &'a [u8],
    /// What is taken: start, end, inode.
    ranges: Vec<(u64, u64, u64)>,
    inodes: HashMap<Vec<u8>, u64>,
    /// Inode: its link count and the names found.
    links: HashMap<u64, (u64, u64)>,
}

struct Inode {
    layout: u16,
    mode: u32,
    size: u64,
    address: u32,
    /// Where the inode's attributes end.
    end: u64,
    node: Node,
}

impl Reader<'_> {
    fn bytes(&self, offset: u64, length: u64) -> Result<&[u8], String> {
        let end = offset.checked_add(length).filter(|&end| end <= self.image.len() as u64);
        end.map(|end| &self.image[offset as usize..end as usize]).ok_or(format!("{offset}+{length} is outside"))
    }

    fn u16(&self, offset: u64) -> Result<u16, String> {
        Ok(u16::from_le_bytes(self.bytes(offset, 2)?.try_into().unwrap()))
    }

    fn u32(&self, offset: u64) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.bytes(offset, 4)?.try_into().unwrap()))
    }

    fn u64(&self, offset: u64) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.bytes(offset, 8)?.try_into().unwrap()))
    }

    fn tree(&mut self) -> Result<Tree, String> {
        ensure(self.u32(1024)? == 0xe0f5_e1e2, "magic")?;
        let mut first = self.bytes(1024, 3072)?.to_vec();
        first[4..8].fill(0);
        ensure(crc32c(&first) == self.u32(1028)?, "checksum")?;
        ensure(self.u32(1024 + 36)? as usize * 4096 == self.image.len(), "size")?;
        let has_chunks = self.u32(1024 + 80)? == 4;
        ensure(has_chunks || self.u32(1024 + 80)? == 0, "features")?;
        ensure(self.u32(1024 + 40)? == 0, "metadata address")?;
        self.ranges.push((0, 1152, 0));

        let root = u64::from(self.u16(1024 + 14)?);
        let mut tree = Tree::new();
        let mut pending = vec![(Vec::new(), root, root)];
        while let Some((path, nid, parent)) = pending.pop() {
            let inode = self.inode(nid)?;
            let seen = self.links.entry(nid).or_insert((inode.node.nlink, 0));
            seen.1 += 1;
            let first = seen.1 == 1;
            let mut node = inode.node.clone();
            if inode.layout == 4 {
                ensure(has_chunks, "chunks without the feature")?;
            }
            match inode.mode & 0o170000 {
                0o040000 => {
                    ensure(first, "a directory with two names")?;
                    let mut subdirectories = 0;
                    for (name, child, kind) in self.entries(nid, &inode)? {
                        match &name[..] {
                            b"." => ensure(child == nid, "wrong dot")?,
                            b".." => ensure(child == parent, "wrong dot dot")?,
                            _ => {
                                ensure(!name.is_empty() && !name.contains(&b'/') && !name.contains(&0), "bad name")?;
                                ensure(kind == file_type(self.inode(child)?.mode), "wrong type in directory")?;
                                subdirectories += u64::from(kind == 2);
                                let above = if path.is_empty() { Vec::new() } else { [&path[..], b"/"].concat() };
                                pending.push(([above, name].concat(), child, nid));
                            }
                        }
                    }
                    ensure(node.nlink == 2 + subdirectories, "link count of a directory")?;
                }
                0o100000 => {
                    let content = self.content(nid, &inode, first)?;
                    node.kind = Kind::File { size: inode.size, content };
                }
                0o120000 => node.kind = Kind::Symlink(self.flat(nid, &inode, first)?),
                0o010000 => node.kind = Kind::Fifo,
                0o020000 => {
                    ensure(inode.address == 0, "a device")?;
                    node.kind = Kind::Whiteout;
                }
                _ => return Err(format!("mode {:o}", inode.mode)),
            }
            self.inodes.insert(path.clone(), nid);
            tree.insert(path, node);
        }
        ensure(self.u64(1024 + 16)? == self.links.len() as u64, "number of inodes")?;
        let directories = tree.values().filter(|node| node.kind == Kind::Directory).count();
        ensure(directories <= self.links.len(), "number of directories")?;
        for (nid, (links, names)) in &self.links {
            ensure(self.inode(*nid)?.mode & 0o170000 == 0o040000 || links == names, "link count")?;
        }
        link(&mut tree, &self.inodes);
        Ok(tree)
    }

    fn inode(&self, nid: u64) -> Result<Inode, String> {
        let at = nid.checked_mul(32).ok_or("nid")?;
        let format = self.u16(at)?;
        ensure(format & 1 == 1 && matches!(format >> 1, 0 | 2 | 4), "format")?;
        let mode = u32::from(self.u16(at + 4)?);
        let icount = u64::from(self.u16(at + 2)?);
        let xattr_size = if icount == 0 { 0 } else { 12 + (icount - 1) * 4 };
        let mut xattrs = BTreeMap::new();
        let mut entry = at + 64 + 12;
        while entry < at + 64 + xattr_size {
            let [name_length, prefix] = *self.bytes(entry, 2)? else { unreachable!() };
            let value_length = u64::from(self.u16(entry + 2)?);
            let prefix = match prefix {
                1 => &b"user."[..],
                4 => b"trusted.",
                _ => return Err("attribute prefix".into()),
            };
            let name = [prefix, self.bytes(entry + 4, name_length.into())?].concat();
            let value = self.bytes(entry + 4 + u64::from(name_length), value_length)?.to_vec();
            ensure(xattrs.insert(name, value).is_none(), "attribute twice")?;
            entry += (4 + u64::from(name_length) + value_length).next_multiple_of(4);
        }
        ensure(entry == at + 64 + xattr_size || xattr_size == 0, "attribute size")?;
        Ok(Inode {
            layout: format >> 1,
            mode,
            size: self.u64(at + 8)?,
            address: self.u32(at + 16)?,
            end: at + 64 + xattr_size,
            node: Node {
                kind: Kind::Directory,
                mode: mode & 0o7777,
                owner: (self.u32(at + 24)?, self.u32(at + 28)?),
                mtime: (self.u64(at + 32)? as i64, self.u32(at + 40)?),
                nlink: self.u32(at + 44)?.into(),
                xattrs,
                same_as: Vec::new(),
            },
        })
    }

    /// Where the content of a flat inode is: whole blocks, and the tail behind the inode.
    fn flat_ranges(&self, inode: &Inode) -> Result<[(u64, u64); 2], String> {
        let tail = if inode.layout == 2 { inode.size - inode.size.saturating_sub(1) / 4096 * 4096 } else { 0 };
        ensure(inode.end % 4096 + tail <= 4096 || tail == 0, "tail crosses a block")?;
        let outside = inode.size - tail;
        ensure(inode.layout != 2 || outside.is_multiple_of(4096), "tail")?;
        let start = u64::from(inode.address) * 4096;
        ensure(outside == 0 || start > 0, "data in block 0")?;
        Ok([(start, outside), (inode.end, tail)])
    }

    fn flat(&mut self, nid: u64, inode: &Inode, first: bool) -> Result<Vec<u8>, String> {
        let [(start, outside), (end, tail)] = self.flat_ranges(inode)?;
        if first {
            self.ranges.push((nid * 32, end + tail, nid));
            self.ranges.push((start, start + outside.next_multiple_of(4096), nid));
        }
        Ok([self.bytes(start, outside)?, self.bytes(end, tail)?].concat())
    }

    fn content(&mut self, nid: u64, inode: &Inode, first: bool) -> Result<u64, String> {
        if inode.layout != 4 {
            return Ok(Content::of(&self.flat(nid, inode, first)?));
        }
        ensure(inode.address < 32, "chunk format")?;
        let chunk = 4096_u64 << inode.address;
        let count = inode.size.div_ceil(chunk);
        let mut content = Content::default();
        for number in 0..count {
            let address = self.u32(inode.end + number * 4)?;
            if address == u32::MAX {
                continue;
            }
            let (start, length) = (u64::from(address) * 4096, chunk.min(inode.size - number * chunk));
            if first {
                self.ranges.push((start, start + length.next_multiple_of(4096), nid));
            }
            for (block, at) in self.bytes(start, length)?.chunks(4096).zip(number * chunk / 4096..) {
                content.block(at, block);
            }
        }
        if first {
            self.ranges.push((nid * 32, inode.end + count * 4, nid));
        }
        Ok(content.finish())
    }

    fn entries(&mut self, nid: u64, inode: &Inode) -> Result<Vec<(Vec<u8>, u64, u8)>, String> {
        let bytes = self.flat(nid, inode, true)?;
        let mut entries: Vec<(Vec<u8>, u64, u8)> = Vec::new();
        for block in bytes.chunks(4096) {
            let offset = |at: usize| usize::from(u16::from_le_bytes([block[at + 8], block[at + 9]]));
            ensure(block.len() >= 12, "short directory block")?;
            let first = offset(0);
            ensure(first >= 12 && first.is_multiple_of(12) && first < block.len(), "first name")?;
            for at in (0..first).step_by(12) {
                let start = offset(at);
                let end = if at + 12 < first { offset(at + 12) } else { block.len() };
                let name = block.get(start..end).ok_or("name offsets")?;
                let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
                let child = u64::from_le_bytes(block[at..at + 8].try_into().unwrap());
                ensure(entries.last().is_none_or(|(last, ..)| &last[..] < name), "order of names")?;
                entries.push((name.to_vec(), child, block[at + 10]));
            }
        }
        ensure(entries.iter().filter(|(name, ..)| matches!(&name[..], b"." | b"..")).count() == 2, "dots")?;
        Ok(entries)
    }
}

fn ensure(condition: bool, problem: &str) -> Result<(), String> {
    if condition { Ok(()) } else { Err(problem.into()) }
}

fn file_type(mode: u32) -> u8 {
    match mode & 0o170000 {
        0o100000 => 1,
        0o040000 => 2,
        0o020000 => 3,
        0o010000 => 5,
        0o120000 => 7,
        _ => 0,
    }
}

fn crc32c(bytes: &[u8]) -> u32 {
    let mut remainder = u32::MAX;
    for byte in bytes {
        remainder ^= u32::from(*byte);
        for _ in 0..8 {
            let low = remainder & 1;
            remainder >>= 1;
            if low == 1 {
                remainder ^= 0x82f6_3b78;
            }
        }
    }
    remainder
}
