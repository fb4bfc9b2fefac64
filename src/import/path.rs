//! Paths in a layer.

use crate::erofs::NAME_MAX;

/// Most bytes of a path: `PATH_MAX` less its NUL. It also bounds how deep directories go.
const PATH_MAX: usize = 4095;

/// What marks a whiteout (image-spec, layer.md, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// What marks the bookkeeping of aufs, among it the opaque whiteout.
const AUFS: &[u8] = b".wh..wh.";
/// The name that makes its directory opaque.
const OPAQUE: &[u8] = b".wh..wh..opq";

/// The components of a path. A leading `/` counts for nothing, as for GNU tar and Docker: `/etc` is `etc` of the layer.
pub fn components(path: &[u8]) -> Result<Vec<&[u8]>, &'static str> {
    if path.len() > PATH_MAX {
        return Err("its path is longer than 4095 bytes");
    }
    if path.contains(&0) {
        return Err("its path contains a NUL");
    }
    path.split(|&byte| byte == b'/')
        .filter(|component| !matches!(*component, b"" | b"."))
        .map(|component| match component {
            b".." => Err("its path contains \"..\""),
            _ if component.len() > NAME_MAX => Err("its path contains a name longer than 255 bytes"),
            _ => Ok(component),
        })
        .collect()
}

/// What the name of an entry means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name<'a> {
    /// A file or directory.
    Plain,
    /// The file or directory with this name in lower layers is gone.
    Whiteout(&'a [u8]),
    /// What lower layers have in this directory is gone.
    Opaque,
    /// Bookkeeping of aufs, which is not part of the image's file system. Entries may be hard links to it.
    Aufs,
}

impl<'a> Name<'a> {
    /// Classifies `name`.
    pub fn new(name: &'a [u8]) -> Result<Self, &'static str> {
        match name.strip_prefix(WHITEOUT) {
            None => Ok(Self::Plain),
            Some(_) if name == OPAQUE => Ok(Self::Opaque),
            Some(_) if name.starts_with(AUFS) => Ok(Self::Aufs),
            Some(b"" | b"." | b"..") => Err("a whiteout for no name"),
            Some(hidden) => Ok(Self::Whiteout(hidden)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_normalized() {
        for (path, expected) in [
            (&b"./a//b/./c/"[..], &[&b"a"[..], b"b", b"c"][..]),
            (b"/a", &[b"a"]),
            (b"./", &[]),
            (b"", &[]),
            (b"/..a/b..", &[b"..a", b"b.."]),
        ] {
            assert_eq!(components(path), Ok(expected.to_vec()));
        }
        for path in [&b".."[..], b"a\0", b"a/../b", b"/../x", &[b'x'; 256], &b"a/".repeat(2048)] {
            assert!(components(path).is_err());
        }
    }

    #[test]
    fn names_are_classified() {
        for (name, expected) in [
            (&b"a.wh."[..], Ok(Name::Plain)),
            (b".wh.a", Ok(Name::Whiteout(b"a"))),
            (b".wh..a", Ok(Name::Whiteout(b".a"))),
            (b".wh...a", Ok(Name::Whiteout(b"..a"))),
            (b".wh..wh..opq", Ok(Name::Opaque)),
            (b".wh..wh.plnk", Ok(Name::Aufs)),
        ] {
            assert_eq!(Name::new(name), expected);
        }
        for name in [&b".wh."[..], b".wh..", b".wh..."] {
            assert!(Name::new(name).is_err());
        }
    }
}
