//! Directory content: entries sorted by the bytes of their names, packed into blocks that can each be searched alone.
//!
//! ```text
//! block   dirent, dirent, … dirent │ name, name, … name │ zeros
//! ```

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U64};

use super::format::{BLOCK, Dirent, FileType};
use super::{Directory, DirectoryId, Target};

/// The names of a directory with `.` and `..`, in order.
pub type Listing<'a> = Vec<(&'a [u8], Target)>;

/// Lists `directory`, which is `directories[id]`.
pub fn listing(id: DirectoryId, directory: &Directory) -> Listing<'_> {
    let mut listing: Listing = Vec::with_capacity(directory.entries.len() + 2);
    listing.extend(directory.entries.iter().filter(|(_, target)| **target != Target::Nothing).map(|(n, t)| (&**n, *t)));
    for (name, target) in [(&b"."[..], id), (b"..", directory.parent)] {
        let at = listing.partition_point(|(other, _)| *other < name);
        listing.insert(at, (name, Target::Directory(target)));
    }
    listing
}

/// Cuts a listing into what fits into a block each, with the bytes used there.
pub fn blocks<'l, 'a>(listing: &'l [(&'a [u8], Target)]) -> impl Iterator<Item = (&'l [(&'a [u8], Target)], usize)> {
    let mut rest = listing;
    std::iter::from_fn(move || {
        let mut used = 0;
        let fitting = rest.iter().take_while(|(name, _)| {
            let end = used + size_of::<Dirent>() + name.len();
            let fits = end <= BLOCK;
            used = if fits { end } else { used };
            fits
        });
        let (block, later) = rest.split_at(fitting.count());
        rest = later;
        (!block.is_empty()).then_some((block, used))
    })
}

/// Writes one block's entries to `to`, which is as long as the bytes used or longer. `resolve` gives the node and type of
/// a target.
pub fn encode(entries: &[(&[u8], Target)], resolve: impl Fn(Target) -> (u64, FileType), to: &mut [u8]) {
    let (mut dirent_at, mut name_at) = (0, entries.len() * size_of::<Dirent>());
    for &(name, target) in entries {
        let (nid, file_type) = resolve(target);
        // Offsets are below BLOCK.
        let nameoff = U16::new(name_at as u16);
        let dirent = Dirent { nid: U64::new(nid), nameoff, file_type: file_type as u8, reserved: 0 };
        to[dirent_at..dirent_at + size_of::<Dirent>()].copy_from_slice(dirent.as_bytes());
        to[name_at..name_at + name.len()].copy_from_slice(name);
        dirent_at += size_of::<Dirent>();
        name_at += name.len();
    }
    to[name_at..].fill(0);
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn directory(names: impl IntoIterator<Item = Vec<u8>>) -> Directory {
        let target = Target::Directory(DirectoryId(7));
        let entries: BTreeMap<Box<[u8]>, Target> = names.into_iter().map(|name| (name.into(), target)).collect();
        Directory { attributes: Default::default(), parent: DirectoryId::ROOT, entries }
    }

    #[test]
    fn dots_are_sorted_in() {
        let mut directory = directory([b"!".to_vec(), b".-".to_vec(), b".a".to_vec(), b"a".to_vec()]);
        directory.entries.insert((*b"gone").into(), Target::Nothing);
        let names: Vec<&[u8]> = listing(DirectoryId(3), &directory).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, [&b"!"[..], b".", b".-", b"..", b".a", b"a"]);
    }

    #[test]
    fn blocks_are_filled_and_decode() {
        let directory = directory(
            (0..5_000).map(|i| vec![b'x'; i % 255 + 1].into_iter().chain(i.to_string().into_bytes()).collect()),
        );
        let listing = listing(DirectoryId(3), &directory);
        let mut decoded = Vec::new();
        for (entries, used) in blocks(&listing) {
            let mut block = vec![0xff; BLOCK];
            encode(entries, |_| (42, FileType::Directory), &mut block);
            assert!(block[used..].iter().all(|&byte| byte == 0));
            let first = usize::from(u16::from_le_bytes([block[8], block[9]]));
            let offsets =
                (0..first / 12).map(|i| usize::from(u16::from_le_bytes([block[i * 12 + 8], block[i * 12 + 9]])));
            let offsets: Vec<usize> = offsets.chain([used]).collect();
            decoded.extend(offsets.windows(2).map(|pair| block[pair[0]..pair[1]].to_vec()));
        }
        assert!(decoded.iter().eq(listing.iter().map(|(name, _)| name)));
    }
}
