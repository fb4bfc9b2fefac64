//! Extended attributes of an inode, kept as they go to disk.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, IntoBytes};

use super::format::{XATTR_TRUSTED, XATTR_USER, XattrEntry, XattrHeader};

/// Most bytes of the entries of one inode. The format would hold 256 KiB, but listxattr(2) ends at 64.
pub const MAX_ENTRIES: usize = 64 * 1024;
/// Most bytes of an attribute's name without its prefix: `XATTR_NAME_MAX` less `trusted.`.
pub const MAX_NAME: usize = 247;

/// The attribute entries of one inode.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Xattrs(Vec<u8>);

/// An attribute, or all attributes of an inode, that cannot be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("extended attributes that are too long (names up to {MAX_NAME} bytes, {MAX_ENTRIES} bytes in all)")]
pub struct XattrTooLong;

impl Xattrs {
    /// Adds `user.NAME`. No name may be added twice.
    pub fn push_user(&mut self, name: &[u8], value: &[u8]) -> Result<(), XattrTooLong> {
        self.push(XATTR_USER, name, value, MAX_ENTRIES)
    }

    /// Adds the mark of an opaque directory (kernel document filesystems/overlayfs, "whiteouts and opaque directories").
    pub fn push_overlay_opaque(&mut self) {
        self.push_overlay(b"overlay.opaque", b"y");
    }

    /// Makes overlayfs look for whiteouts in a directory that no other layer has; it shows them as devices otherwise. This
    /// is the mark of a directory that was copied up from an unknown place, the only sign that a lower directory can give
    /// (Linux 4.12; function `ovl_get_inode`).
    pub fn push_overlay_whiteouts(&mut self) {
        self.push_overlay(b"overlay.origin", b"");
    }

    fn push_overlay(&mut self, name: &[u8], value: &[u8]) {
        // Always fits: the limit is far below what the format holds.
        let _ = self.push(XATTR_TRUSTED, name, value, usize::MAX);
    }

    fn push(&mut self, name_index: u8, name: &[u8], value: &[u8], limit: usize) -> Result<(), XattrTooLong> {
        let end = (self.0.len() + size_of::<XattrEntry>() + name.len() + value.len()).next_multiple_of(4);
        let name_len = u8::try_from(name.len()).map_err(|_| XattrTooLong)?;
        let value_size = U16::new(u16::try_from(value.len()).map_err(|_| XattrTooLong)?);
        if name.len() > MAX_NAME || end > limit {
            return Err(XattrTooLong);
        }
        self.0.extend_from_slice(XattrEntry { name_len, name_index, value_size }.as_bytes());
        self.0.extend_from_slice(name);
        self.0.extend_from_slice(value);
        self.0.resize(end, 0);
        Ok(())
    }

    /// Names, with their prefix, and values.
    pub fn iter(&self) -> impl Iterator<Item = (Vec<u8>, &[u8])> {
        let mut rest = &self.0[..];
        std::iter::from_fn(move || {
            let (entry, behind) = XattrEntry::read_from_prefix(rest).ok()?;
            let (name, behind) = behind.split_at_checked(entry.name_len.into())?;
            let value = behind.get(..entry.value_size.get().into())?;
            let length = (size_of::<XattrEntry>() + name.len() + value.len()).next_multiple_of(4);
            rest = rest.get(length..).unwrap_or_default();
            let prefix: &[u8] = if entry.name_index == XATTR_USER { b"user." } else { b"trusted." };
            Some(([prefix, name].concat(), value))
        })
    }

    /// Bytes behind the inode, header included; 0 without attributes.
    pub fn size(&self) -> usize {
        if self.0.is_empty() { 0 } else { size_of::<XattrHeader>() + self.0.len() }
    }

    /// `i_xattr_icount`.
    pub(super) fn icount(&self) -> U16 {
        // MAX_ENTRIES / 4 and a few more fit.
        U16::new(if self.0.is_empty() { 0 } else { (self.0.len() / 4 + 1) as u16 })
    }

    /// Writes them to `to`, which has [`Xattrs::size`] bytes.
    pub(super) fn encode(&self, to: &mut [u8]) {
        if let Some((header, entries)) = to.split_at_mut_checked(size_of::<XattrHeader>()) {
            header
                .copy_from_slice(XattrHeader { name_filter: U32::ZERO, shared_count: 0, reserved: [0; 7] }.as_bytes());
            entries.copy_from_slice(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_to_words() {
        let mut xattrs = Xattrs::default();
        assert_eq!((xattrs.size(), xattrs.icount().get()), (0, 0));
        xattrs.push_user(b"a", b"bc").unwrap();
        xattrs.push_overlay_opaque();
        assert_eq!((xattrs.size(), xattrs.icount().get()), (12 + 8 + 20, 8));
        let mut bytes = vec![0xff; xattrs.size()];
        xattrs.encode(&mut bytes);
        let all: Vec<_> = xattrs.iter().collect();
        assert_eq!(all, [(b"user.a".to_vec(), &b"bc"[..]), (b"trusted.overlay.opaque".to_vec(), b"y")]);
        assert_eq!(bytes[..12], [0; 12]);
        assert_eq!(&bytes[12..], b"\x01\x01\x02\0abc\0\x0e\x04\x01\0overlay.opaquey\0");
    }

    #[test]
    fn limits_hold() {
        let mut xattrs = Xattrs::default();
        assert_eq!(xattrs.push_user(&[b'a'; MAX_NAME + 1], b""), Err(XattrTooLong));
        assert_eq!(xattrs.push_user(&[b'a'; MAX_NAME], b""), Ok(()));
        assert_eq!(xattrs.push_user(b"a", &[0; 65_536]), Err(XattrTooLong));
        assert_eq!(xattrs.push_user(b"a", &[0; 65_000]), Ok(()));
        assert_eq!(xattrs.push_user(b"b", &[0; 300]), Err(XattrTooLong));
    }
}
