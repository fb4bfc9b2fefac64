//! `/etc/ld.so.cache`, in which glibc's dynamic linker finds libraries by name (ld.so(8), ldconfig(8)): which libraries the
//! host has, and the cache of a container in which some of the host's have appeared.
//!
//! The format is that of glibc's `elf/dl-cache.h`: a header, entries sorted for binary search, strings, and since 2.33
//! extensions. Files from before 2.32 begin with the same in an older form. A cache in an image is hostile input: every
//! offset is checked, and what all strings may have together is bounded.

#![forbid(unsafe_code)]

mod merge;
mod musl;
mod write;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

pub use merge::{Addition, merge};
pub use musl::{musl_path, musl_path_file};
pub use write::GENERATOR;

/// Where it is.
pub const PATH: &str = "/etc/ld.so.cache";
/// Most bytes of a cache that is read: those of the largest images have a tenth.
pub const MAX_FILE: u64 = 8 << 20;

/// Beginning of the old form.
const OLD_MAGIC: &[u8] = b"ld.so-1.7.0";
/// Length of the old form's header and of each of its entries.
const OLD_HEADER: usize = 16;
const OLD_ENTRY: usize = 12;
/// Beginning of the form in use, and its version.
const MAGIC: &[u8] = b"glibc-ld.so.cache1.1";
const HEADER: usize = 48;
const ENTRY: usize = 24;
/// `cache_extension_magic`, and the tags of the sections.
const EXTENSION_MAGIC: u32 = 0xeaa4_2174;
const TAG_GENERATOR: u32 = 0;
const TAG_HWCAPS: u32 = 1;
/// More sections than any release writes.
const MAX_SECTIONS: usize = 64;
/// Byte order, in the header's flags: not said, or said to be this machine's.
const ORDER_MASK: u8 = 3;
const ORDER: u8 = if cfg!(target_endian = "little") { 2 } else { 3 };
/// Longest string, as of a path (`PATH_MAX`), and most bytes of all.
const MAX_STRING: usize = 4096;
const MAX_STRINGS: usize = 32 << 20;

/// Why a file is no cache that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CacheError {
    /// Something else, or of another machine.
    #[error("it is no cache of a dynamic linker on this machine")]
    Unknown,
    /// Cut off, or damaged.
    #[error("it is damaged")]
    Damaged,
    /// More than any system has.
    #[error("its strings have more than {} MiB", MAX_STRINGS >> 20)]
    TooLarge,
}

/// A cache, in the order of its file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cache<'a> {
    /// The libraries.
    pub entries: Vec<Entry<'a>>,
    /// Names of the subdirectories of `glibc-hwcaps` that entries refer to by their position here.
    pub hwcaps: Vec<&'a [u8]>,
    /// Who wrote it, if it says so.
    pub generator: Option<&'a [u8]>,
}

/// A library.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry<'a> {
    /// What programs ask for: mostly the SONAME.
    pub name: &'a [u8],
    /// Where it is: absolute.
    pub path: &'a [u8],
    /// Kind and architecture.
    pub flags: i32,
    /// Oldest kernel it works with; 0 is any.
    pub os_version: u32,
    /// Processor features that it needs.
    pub hwcap: u64,
}

/// For which programs a library is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Abi {
    /// The machine's own 64-bit programs.
    Native,
    /// Its 32-bit programs.
    Bits32,
    /// Others.
    Foreign,
}

/// The kind of library that glibc 2 has.
const LIBC6: i32 = 3;
/// The architecture, in an entry's flags (`FLAG_REQUIRED_MASK`).
const ABI_MASK: i32 = 0xff00;
const NATIVE: i32 = match () {
    () if cfg!(target_arch = "x86_64") => 0x0300,
    () if cfg!(target_arch = "aarch64") => 0x0a00,
    () if cfg!(target_arch = "powerpc64") => 0x0500,
    () if cfg!(target_arch = "s390x") => 0x0400,
    () if cfg!(target_arch = "riscv64") => 0x1000,
    () if cfg!(target_arch = "loongarch64") => 0x1200,
    () => 0,
};
const BITS32: i32 = if cfg!(target_arch = "aarch64") { 0x0900 } else { 0 };
/// Bit 62 of `hwcap`: the lower half is a position in [`Cache::hwcaps`], and above it may be ten bits of an ISA level.
const HWCAP_EXTENSION: u64 = 1 << 30;
const ISA_LEVEL_MASK: u64 = (1 << 10) - 1;

impl Abi {
    fn flags(self) -> i32 {
        LIBC6 | if self == Self::Bits32 { BITS32 } else { NATIVE }
    }
}

impl<'a> Entry<'a> {
    /// The library's path.
    pub fn path(&self) -> &'a Path {
        Path::new(OsStr::from_bytes(self.path))
    }

    /// For which programs it is.
    pub fn abi(&self) -> Abi {
        match self.flags & ABI_MASK {
            NATIVE => Abi::Native,
            BITS32 => Abi::Bits32,
            _ => Abi::Foreign,
        }
    }

    /// Position in [`Cache::hwcaps`] if it is in such a subdirectory.
    fn hwcaps(&self) -> Option<usize> {
        let extension = (self.hwcap >> 32) & !ISA_LEVEL_MASK == HWCAP_EXTENSION;
        extension.then_some(self.hwcap as u32 as usize)
    }
}

impl<'a> Cache<'a> {
    /// Reads the content of a cache file.
    pub fn parse(file: &'a [u8]) -> Result<Self, CacheError> {
        let mut strings = Strings { left: MAX_STRINGS };
        if file.starts_with(MAGIC) {
            return Self::parse_new(file, 0, &mut strings);
        }
        if !file.starts_with(OLD_MAGIC) {
            return Err(CacheError::Unknown);
        }
        let count = usize::try_from(u32_at(file, 12)?).map_err(|_| CacheError::Damaged)?;
        let end = count.checked_mul(OLD_ENTRY).and_then(|length| length.checked_add(OLD_HEADER));
        let end = end.filter(|&end| end <= file.len()).ok_or(CacheError::Damaged)?;
        // Aligned as its writer aligned 64-bit numbers.
        for start in [end.next_multiple_of(8), end] {
            if file.get(start..).is_some_and(|rest| rest.starts_with(MAGIC)) {
                return Self::parse_new(file, start, &mut strings);
            }
        }
        let entry = |at: &'a [u8]| {
            let (flags, name, path) = (u32_at(at, 0)?, u32_at(at, 4)?, u32_at(at, 8)?);
            let (name, path) = (strings.read(file, end, name)?, strings.read(file, end, path)?);
            Ok(Entry { name, path, flags: flags.cast_signed(), os_version: 0, hwcap: 0 })
        };
        let entries = file[OLD_HEADER..end].chunks_exact(OLD_ENTRY).map(entry).collect::<Result<_, _>>()?;
        Ok(Self { entries, ..Self::default() })
    }

    fn parse_new(file: &'a [u8], start: usize, strings: &mut Strings) -> Result<Self, CacheError> {
        let header = file.get(start..start + HEADER).ok_or(CacheError::Damaged)?;
        if !matches!(header[28] & ORDER_MASK, 0 | ORDER) {
            return Err(CacheError::Unknown);
        }
        let count = usize::try_from(u32_at(header, 20)?).map_err(|_| CacheError::Damaged)?;
        let entries = count
            .checked_mul(ENTRY)
            .and_then(|length| file[start + HEADER..].get(..length))
            .ok_or(CacheError::Damaged)?;
        let mut cache = Self::default();
        let extensions = usize::try_from(u32_at(header, 32)?).unwrap_or(usize::MAX);
        if extensions != 0 {
            cache.read_extensions(file, start, extensions, strings)?;
        }
        for at in entries.chunks_exact(ENTRY) {
            let entry = Entry {
                flags: u32_at(at, 0)?.cast_signed(),
                name: strings.read(file, start, u32_at(at, 4)?)?,
                path: strings.read(file, start, u32_at(at, 8)?)?,
                os_version: u32_at(at, 12)?,
                hwcap: u64::from_ne_bytes(at[16..ENTRY].try_into().map_err(|_| CacheError::Damaged)?),
            };
            // As the linker does: what refers to nothing is passed over.
            if entry.hwcaps().is_none_or(|position| position < cache.hwcaps.len()) {
                cache.entries.push(entry);
            }
        }
        Ok(cache)
    }

    /// The sections behind the strings. Those that nobody knows are passed over.
    fn read_extensions(
        &mut self,
        file: &'a [u8],
        start: usize,
        at: usize,
        strings: &mut Strings,
    ) -> Result<(), CacheError> {
        let directory = file.get(at..).ok_or(CacheError::Damaged)?;
        if u32_at(directory, 0)? != EXTENSION_MAGIC {
            return Err(CacheError::Damaged);
        }
        let count = usize::try_from(u32_at(directory, 4)?).unwrap_or(usize::MAX).min(MAX_SECTIONS);
        let sections = directory[8..].get(..count * 16).ok_or(CacheError::Damaged)?;
        for section in sections.chunks_exact(16) {
            let number = |at| u32_at(section, at).map(|number| usize::try_from(number).unwrap_or(usize::MAX));
            let (offset, size) = (number(8)?, number(12)?);
            let content = file.get(offset..).and_then(|rest| rest.get(..size)).ok_or(CacheError::Damaged)?;
            match u32_at(section, 0)? {
                TAG_GENERATOR => self.generator = Some(content.split(|&byte| byte == 0).next().unwrap_or_default()),
                TAG_HWCAPS => {
                    let names = content.chunks_exact(4).map(|name| strings.read(file, start, u32_at(name, 0)?));
                    self.hwcaps = names.collect::<Result<_, _>>()?;
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether [`Cache::to_bytes`] wrote it, and not ldconfig.
    pub fn is_ours(&self) -> bool {
        self.generator == Some(GENERATOR.as_bytes())
    }
}

/// Reads strings, and remembers how much has been read: many entries may refer to one string.
struct Strings {
    left: usize,
}

impl Strings {
    fn read<'a>(&mut self, file: &'a [u8], base: usize, offset: u32) -> Result<&'a [u8], CacheError> {
        let at = usize::try_from(offset).ok().and_then(|offset| base.checked_add(offset));
        let rest = at.and_then(|at| file.get(at..)).ok_or(CacheError::Damaged)?;
        let rest = &rest[..rest.len().min(MAX_STRING)];
        let length = rest.iter().position(|&byte| byte == 0).ok_or(CacheError::Damaged)?;
        self.left = self.left.checked_sub(length + 1).ok_or(CacheError::TooLarge)?;
        Ok(&rest[..length])
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Result<u32, CacheError> {
    let bytes = bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).ok_or(CacheError::Damaged)?;
    Ok(u32::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests;
