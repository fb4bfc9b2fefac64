//! Layer images in which everything belongs to one user, made of those in which it is root's: for kernels whose overlayfs
//! does not take idmapped layers. Everything else is the same, byte for byte.
//!
//! Reads any EROFS image without compression whose blocks have 4096 bytes, as hostile input.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::FromBytes;

use super::format::{BLOCK, BLOCK_BITS, COMPAT_SB_CHKSUM, MAGIC, SLOT, SUPER_OFFSET, SuperBlock, crc32c};

/// Bytes of a compact inode, of which the kernel document tells ("On-disk details"); an extended one has twice as many.
const COMPACT: usize = 32;
/// Bytes of a directory entry.
const DIRENT: usize = 12;
/// Largest directory.
const MAX_DIRECTORY: u64 = 1 << 30;

/// Why an image cannot be given to somebody.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// Reading or writing.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Not an image that is understood here.
    #[error("not a layer image that can be given to a user: {0}")]
    Image(&'static str),
}

/// Where an inode is, and of which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Place {
    offset: u64,
    extended: bool,
}

/// Writes the image in `from` to `to`, which is empty, with `uid` and `gid` as the owner of everything. At most `limit`
/// files and directories.
pub fn give(from: &File, to: &File, uid: u32, gid: u32, limit: u64) -> Result<u64, OwnerError> {
    let mut first = [0; BLOCK];
    from.read_exact_at(&mut first, 0)?;
    let (super_block, _) = SuperBlock::read_from_prefix(first.get(SUPER_OFFSET..).unwrap_or_default())
        .map_err(|_| OwnerError::Image("no superblock"))?;
    if super_block.magic.get() != MAGIC || super_block.blkszbits != BLOCK_BITS {
        return Err(OwnerError::Image("no superblock, or other blocks"));
    }
    let length = from.metadata()?.len();
    let image = Image { file: from, length, metadata: u64::from(super_block.meta_blkaddr.get()) << BLOCK_BITS };
    let places = image.inodes(super_block.root_nid.get().into(), limit)?;

    let mut copied = 0;
    while copied < length {
        let piece = usize::try_from(length - copied).unwrap_or(usize::MAX).min(1 << 30);
        let (mut input, mut output) = (copied, copied);
        match rustix::fs::copy_file_range(from, Some(&mut input), to, Some(&mut output), piece) {
            Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(count) => copied += count as u64,
            Err(rustix::io::Errno::INTR) => {}
            // Between file systems that cannot do it.
            Err(_) => {
                let mut buffer = vec![0; piece.min(1 << 20)];
                from.read_exact_at(&mut buffer, copied)?;
                to.write_all_at(&buffer, copied)?;
                copied += buffer.len() as u64;
            }
        }
    }
    for place in &places {
        if place.extended {
            let (uid, gid) = (uid.to_le_bytes(), gid.to_le_bytes());
            to.write_all_at(&[uid, gid].concat(), place.offset + 24)?;
        } else {
            let narrow = |id: u32| u16::try_from(id).map_err(|_| OwnerError::Image("its inodes take small ids only"));
            let (uid, gid) = (narrow(uid)?.to_le_bytes(), narrow(gid)?.to_le_bytes());
            to.write_all_at(&[uid, gid].concat(), place.offset + 24)?;
        }
    }
    if super_block.feature_compat.get() & COMPAT_SB_CHKSUM != 0 {
        // The first block may hold inodes.
        to.read_exact_at(&mut first, 0)?;
        let at = SUPER_OFFSET + 4;
        if let Some(checksum) = first.get_mut(at..at + 4) {
            checksum.fill(0);
        }
        let checksum = crc32c(first.get(SUPER_OFFSET..).unwrap_or_default());
        to.write_all_at(&checksum.to_le_bytes(), at as u64)?;
    }
    Ok(length)
}

struct Image<'a> {
    file: &'a File,
    length: u64,
    /// Where node 0 is.
    metadata: u64,
}

/// What matters of an inode.
struct Inode {
    place: Place,
    directory: bool,
    layout: u16,
    size: u64,
    address: u64,
    /// Where what is inline begins.
    tail: u64,
}

impl Image<'_> {
    /// All inodes that can be reached from `root`, in order.
    fn inodes(&self, root: u64, limit: u64) -> Result<Vec<Place>, OwnerError> {
        let mut seen = HashSet::from([root]);
        let mut waiting = vec![root];
        let mut places = Vec::new();
        while let Some(nid) = waiting.pop() {
            let inode = self.inode(nid)?;
            places.push(inode.place);
            if inode.directory {
                for entry in self.entries(&inode)? {
                    if seen.insert(entry) {
                        waiting.push(entry);
                    }
                }
            }
            if seen.len() as u64 > limit {
                return Err(OwnerError::Image("it has too many files"));
            }
        }
        places.sort_unstable();
        Ok(places)
    }

    fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, OwnerError> {
        if offset.checked_add(length as u64).is_none_or(|end| end > self.length) {
            return Err(OwnerError::Image("something is beyond its end"));
        }
        let mut bytes = vec![0; length];
        self.file.read_exact_at(&mut bytes, offset)?;
        Ok(bytes)
    }

    fn inode(&self, nid: u64) -> Result<Inode, OwnerError> {
        let offset = nid.checked_mul(SLOT as u64).and_then(|offset| offset.checked_add(self.metadata));
        let offset = offset.ok_or(OwnerError::Image("an inode is beyond its end"))?;
        let bytes = self.read(offset, COMPACT)?;
        let format = number(&bytes, 0, 2);
        let (extended, layout) = (format & 1 == 1, (format >> 1 & 7) as u16);
        let size = if extended { number(&bytes, 8, 8) } else { number(&bytes, 8, 4) };
        let attributes = match number(&bytes, 2, 2) {
            0 => 0,
            count => 12 + (count - 1) * 4,
        };
        let own = if extended { 2 * COMPACT } else { COMPACT } as u64;
        if extended {
            // All of it is there.
            self.read(offset, 2 * COMPACT)?;
        }
        Ok(Inode {
            place: Place { offset, extended },
            directory: number(&bytes, 4, 2) & 0o170_000 == 0o040_000,
            layout,
            size,
            address: number(&bytes, 16, 4) << BLOCK_BITS,
            tail: offset + own + attributes,
        })
    }

    /// The nodes that a directory names.
    fn entries(&self, directory: &Inode) -> Result<Vec<u64>, OwnerError> {
        if directory.size > MAX_DIRECTORY {
            return Err(OwnerError::Image("a directory is too large"));
        }
        let block = BLOCK as u64;
        let mut nodes = Vec::new();
        let mut at = 0;
        while at < directory.size {
            let length = (directory.size - at).min(block);
            let is_tail = length < block || at + block > directory.size;
            let offset = match (directory.layout, is_tail) {
                (0, _) | (2, false) => directory.address + at,
                (2, true) => directory.tail,
                _ => return Err(OwnerError::Image("a directory is compressed")),
            };
            let bytes = self.read(offset, length as usize)?;
            // The names begin behind the last entry.
            let count = number(&bytes, 8, 2) as usize / DIRENT;
            if count == 0 || count * DIRENT > bytes.len() {
                return Err(OwnerError::Image("a directory is damaged"));
            }
            nodes.extend((0..count).map(|index| number(&bytes, index * DIRENT, 8)));
            at += block;
        }
        Ok(nodes)
    }
}

/// The little-endian number of `length` bytes at `at`; what is beyond the end is 0.
fn number(bytes: &[u8], at: usize, length: usize) -> u64 {
    let bytes = bytes.get(at..).unwrap_or_default().iter().take(length);
    bytes.rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::import::{LayerLimits, write_layer};

    fn layer() -> File {
        let mut archive = tar::Builder::new(Vec::new());
        for index in 0..500 {
            let mut header = tar::Header::new_gnu();
            header.set_size(index);
            header.set_mode(0o644);
            let path = format!("directory/with a rather long name of its own {index:0100}");
            archive.append_data(&mut header, path, &vec![7; index as usize][..]).unwrap();
        }
        let file = tempfile::tempfile().unwrap();
        let limits = LayerLimits { max_bytes: 1 << 30, max_entries: 10_000 };
        write_layer(&archive.into_inner().unwrap()[..], &file, &limits).unwrap();
        file
    }

    #[test]
    fn only_owners_and_the_checksum_differ() {
        let (from, to) = (layer(), tempfile::tempfile().unwrap());
        let length = give(&from, &to, 0x1234_5678, 0x9abc_def0, 10_000).unwrap();
        let read = |file: &File| {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        let (before, after) = (read(&from), read(&to));
        let differing: Vec<usize> = (0..before.len()).filter(|&at| before[at] != after[at]).collect();
        let owners =
            after.windows(8).filter(|bytes| *bytes == [0x78, 0x56, 0x34, 0x12, 0xf0, 0xde, 0xbc, 0x9a]).count();
        // Files, the directory, the root.
        assert_eq!(owners, 502);
        let checksum = differing.iter().filter(|&&at| (SUPER_OFFSET + 4..SUPER_OFFSET + 8).contains(&at)).count();
        assert_eq!(differing.len(), owners * 8 + checksum);
        // And back.
        let back = tempfile::tempfile().unwrap();
        give(&to, &back, 0, 0, 10_000).unwrap();
        assert_eq!(read(&back), before);
    }

    #[test]
    fn what_is_no_image_is_refused() {
        let to = tempfile::tempfile().unwrap();
        let mut short = tempfile::tempfile().unwrap();
        assert!(give(&short, &to, 1, 1, 10).is_err());
        short.write_all(&[0; 8192]).unwrap();
        assert!(matches!(give(&short, &to, 1, 1, 10), Err(OwnerError::Image(_))));
        assert!(matches!(give(&layer(), &to, 1, 1, 100), Err(OwnerError::Image("it has too many files"))));
    }

    /// Whatever is broken, it ends, and is an error or an image.
    #[test]
    fn damage_is_survived() {
        let from = layer();
        let mut bytes = vec![0; from.metadata().unwrap().len() as usize];
        from.read_exact_at(&mut bytes, 0).unwrap();
        for seed in 0_usize..300 {
            let mut damaged = bytes.clone();
            for step in 0..20 {
                let at = SUPER_OFFSET + (seed * 7919 + step * step * 104_729) % (bytes.len() - SUPER_OFFSET);
                damaged[at] = damaged[at].wrapping_add((seed + step) as u8 | 1);
            }
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(&damaged).unwrap();
            let _ = give(&file, &tempfile::tempfile().unwrap(), 1, 1, 10_000);
        }
    }
}
