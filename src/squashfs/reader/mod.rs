//! Reads squashfs images, lazily: for the FUSE server, for the conversion to a layer, and for `pyxis create`.
//!
//! An image is hostile input. Every size, offset and reference is checked where it is used; memory is bounded by the
//! caches of [`Image`] whatever the image says; nothing recurses. What an image may still be is large: who walks all of
//! it ([`Walk`]) sets a limit.
//!
//! ```text
//! Image::open ─ root ─▶ Inode ─ read_dir / lookup ─▶ Entry ─ inode ─▶ Inode ─ file ─▶ File ─ read_at ─▶ bytes
//! ```
//!
//! All methods take `&self`, and many threads may use one [`Image`].

mod cache;
mod decompress;
mod directory;
mod file;
mod format;
mod image;
mod inode;
mod metadata;
mod walk;
mod xattr;

pub use directory::{Entries, Entry};
pub use file::File;
pub use format::{Compressor, FileType};
pub use image::Image;
pub use inode::{Inode, InodeRef};
pub use walk::{Visit, Walk};
pub use xattr::Xattr;

/// Why an image, or a part of it, cannot be read. Renders as one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// It begins otherwise.
    #[error("not a squashfs image")]
    NotSquashfs,
    /// Of another time or byte order.
    #[error("squashfs version {major}.{minor}, of which only 4.0 is known: make it anew with mksquashfs")]
    Version {
        /// As the image says.
        major: u16,
        /// As the image says.
        minor: u16,
    },
    /// An unknown method.
    #[error("compressed by a method that is not known (number {0})")]
    Compressor(u16),
    /// The file is shorter than the image.
    #[error("truncated: {actual} of {expected} bytes are there: copy it anew")]
    Truncated {
        /// What the image says.
        expected: u64,
        /// What the file has.
        actual: u64,
    },
    /// The image contradicts itself.
    #[error("damaged squashfs image: {part} at byte {at}: {problem}")]
    Damaged {
        /// Which part of it.
        part: &'static str,
        /// About where.
        at: u64,
        /// What is wrong there.
        problem: &'static str,
    },
    /// The file cannot be read: not the image's fault.
    #[error("cannot read the image: {}", crate::sys::reason(std::io::Error::from_raw_os_error(*.0)))]
    Read(i32),
    /// A limit of the caller's.
    #[error("more than {0} files and directories")]
    TooManyEntries(u64),
}

impl Error {
    fn damaged(part: &'static str, at: u64, problem: &'static str) -> Self {
        Self::Damaged { part, at, problem }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Self::Read(error.raw_os_error().unwrap_or(libc::EIO))
    }
}
