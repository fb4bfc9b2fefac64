//! Extended attributes.

use zerocopy::little_endian::{U32, U64};

use super::format::{NONE_64, XATTR_ELSEWHERE, XattrEntry, XattrId, XattrTable};
use super::inode::Inode;
use super::metadata::Position;
use super::{Error, Image};

const PART: &str = "extended attributes";

/// Most bytes of the names and values of one file's attributes; the kernel's `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`.
const MAX: usize = 1 << 16;

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// With its prefix: `user.mime_type`.
    pub name: Vec<u8>,
    /// Any bytes.
    pub value: Vec<u8>,
}

impl Image {
    /// The extended attributes of a file: `user.`, `trusted.` and `security.`.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, Error> {
        let table = self.superblock().xattr_table.get();
        let Some(index) = inode.xattr else { return Ok(Vec::new()) };
        if table == NONE_64 {
            return Ok(Vec::new());
        }
        let header = {
            let mut header = XattrTable { start: 0.into(), ids: 0.into(), unused: 0.into() };
            self.blocks.read(PART, table, zerocopy::IntoBytes::as_mut_bytes(&mut header))?;
            header
        };
        if index >= header.ids.get() {
            return Err(Error::damaged(PART, table, "an entry that does not exist"));
        }
        let addresses = table.saturating_add(size_of::<XattrTable>() as u64);
        let id: XattrId = self.blocks.table_entry(PART, addresses, index.into())?;
        let at = |reference: U64| Position::new(header.start.get(), reference.get());
        let mut cursor = self.blocks.cursor(PART, at(id.reference));
        let (mut xattrs, mut total) = (Vec::new(), 0usize);
        for _ in 0..id.count.get() {
            let entry: XattrEntry = cursor.read()?;
            let prefix: &[u8] = match entry.prefix.get() & !XATTR_ELSEWHERE {
                0 => b"user.",
                1 => b"trusted.",
                2 => b"security.",
                _ => return Err(cursor.damaged("an unknown prefix")),
            };
            let mut name = vec![0; usize::from(entry.name_size.get())];
            cursor.read_exact(&mut name)?;
            let mut size = cursor.read::<U32>()?.get();
            let mut elsewhere = None;
            if entry.prefix.get() & XATTR_ELSEWHERE != 0 {
                if size as usize != size_of::<U64>() {
                    return Err(cursor.damaged("a reference of impossible size"));
                }
                let mut there = self.blocks.cursor(PART, at(cursor.read()?));
                size = there.read::<U32>()?.get();
                elsewhere = Some(there);
            }
            // An attribute without a name is not empty either: this ends.
            total = total.saturating_add(prefix.len() + name.len()).saturating_add(size as usize);
            if total > MAX {
                return Err(cursor.damaged("more than 64 KiB for one file"));
            }
            let mut value = vec![0; size as usize];
            elsewhere.as_mut().unwrap_or(&mut cursor).read_exact(&mut value)?;
            xattrs.push(Xattr { name: [prefix, &name].concat(), value });
        }
        Ok(xattrs)
    }
}
