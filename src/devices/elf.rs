//! What ldconfig takes from a shared library: its class and its SONAME (elf(5); System V ABI, "Dynamic Section"). The file may
//! be anything: every offset is checked, and little is read.

#![forbid(unsafe_code)]

use std::fs::File;
use std::os::unix::fs::FileExt;

/// Most program headers, and most entries of the dynamic section: far more than any library has.
const MAX_HEADERS: u16 = 256;
const MAX_DYNAMIC: u64 = 1024;
/// Longest SONAME: that of a file.
const MAX_NAME: usize = 255;

const PT_LOAD: u64 = 1;
const PT_DYNAMIC: u64 = 2;
const DT_STRTAB: u64 = 5;
const DT_SONAME: u64 = 14;

/// A shared library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Elf {
    /// Whether it is for 32-bit programs.
    pub is_32_bit: bool,
    /// By what programs ask for it; none if it has none, or none that could be a file's name.
    pub soname: Option<String>,
}

/// The fields of one class, in bytes: where they are, and how long a word is.
struct Layout {
    word: usize,
    header_offset: usize,
    header_size: usize,
    header_count: usize,
    offset: usize,
    address: usize,
    size: usize,
}

const BITS_64: Layout =
    Layout { word: 8, header_offset: 32, header_size: 54, header_count: 56, offset: 8, address: 16, size: 32 };
const BITS_32: Layout =
    Layout { word: 4, header_offset: 28, header_size: 42, header_count: 44, offset: 4, address: 8, size: 16 };

/// A little-endian or big-endian number, as this machine's are.
fn number(bytes: &[u8], at: usize, length: usize) -> Option<u64> {
    let mut wide = [0; 8];
    let bytes = bytes.get(at..at.checked_add(length)?)?;
    match cfg!(target_endian = "little") {
        true => wide.get_mut(..length)?.copy_from_slice(bytes),
        false => wide.get_mut(8 - length..)?.copy_from_slice(bytes),
    }
    Some(u64::from_ne_bytes(wide))
}

impl Elf {
    /// `None` if it is no ELF file of this machine's byte order.
    pub fn read(file: &File) -> Option<Self> {
        let mut header = [0; 64];
        let length = file.read_at(&mut header, 0).ok()?;
        let header = header.get(..length)?;
        let order = if cfg!(target_endian = "little") { 1 } else { 2 };
        if !header.starts_with(b"\x7fELF") || header.get(5).is_some_and(|found| *found != order) {
            return None;
        }
        let is_32_bit = *header.get(4)? == 1;
        let layout = if is_32_bit { &BITS_32 } else { &BITS_64 };
        Some(Self { is_32_bit, soname: layout.soname(file, header) })
    }
}

impl Layout {
    fn soname(&self, file: &File, header: &[u8]) -> Option<String> {
        let size =
            usize::try_from(number(header, self.header_size, 2)?).ok().filter(|size| (32..=64).contains(size))?;
        let count = number(header, self.header_count, 2)?.min(MAX_HEADERS.into());
        let headers = read(file, number(header, self.header_offset, self.word)?, size.checked_mul(count as usize)?)?;
        // What is where: address, place in the file, size.
        let (mut loaded, mut dynamic) = (Vec::new(), None);
        for header in headers.chunks_exact(size) {
            let field = |at| number(header, at, self.word);
            let place = (field(self.address)?, field(self.offset)?, field(self.size)?);
            match number(header, 0, 4)? {
                PT_LOAD => loaded.push(place),
                PT_DYNAMIC => dynamic = Some(place),
                _ => {}
            }
        }
        let (_, offset, size) = dynamic?;
        let entries = read(file, offset, usize::try_from(size.min(MAX_DYNAMIC * 2 * self.word as u64)).ok()?)?;
        let value = |tag: u64| {
            let mut entries = entries.chunks_exact(2 * self.word);
            let found = entries.find(|entry| number(entry, 0, self.word) == Some(tag))?;
            number(found, self.word, self.word)
        };
        let (strings, name) = (value(DT_STRTAB)?, value(DT_SONAME)?);
        let (address, offset, _) =
            loaded.into_iter().find(|(address, _, size)| strings >= *address && strings - address < *size)?;
        let place = offset.checked_add(strings - address)?.checked_add(name)?;
        let text = read(file, place, MAX_NAME + 1)?;
        let end = text.iter().position(|&byte| byte == 0)?;
        let name = std::str::from_utf8(text.get(..end)?).ok()?;
        let is_name = !name.is_empty() && !name.contains(['/', '\n']) && !name.starts_with('.');
        is_name.then(|| name.to_owned())
    }
}

/// What of `length` bytes from `offset` on there is.
fn read(file: &File, offset: u64, length: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; length];
    let length = file.read_at(&mut bytes, offset).ok()?;
    bytes.truncate(length);
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use proptest::prelude::*;

    use super::*;

    fn of(bytes: &[u8]) -> Option<Elf> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        Elf::read(&file)
    }

    /// The C library that this test is linked with.
    fn libc() -> Vec<u8> {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let path = maps.lines().find_map(|line| line.split_whitespace().nth(5).filter(|path| path.contains("libc.so")));
        std::fs::read(path.unwrap()).unwrap()
    }

    #[test]
    fn the_soname_of_a_library() {
        let libc = libc();
        assert_eq!(of(&libc), Some(Elf { is_32_bit: false, soname: Some("libc.so.6".into()) }));
        // Cut off wherever, it has none.
        for length in [5, 6, 40, 64, 100, 4096] {
            assert_eq!(of(&libc[..length]), Some(Elf { is_32_bit: false, soname: None }), "{length}");
        }
    }

    /// A file of nothing but what is looked at.
    fn small(class: u8, name: &[u8]) -> Vec<u8> {
        let layout = if class == 1 { &BITS_32 } else { &BITS_64 };
        let word = layout.word;
        let mut file = vec![0; 512];
        file[..6].copy_from_slice(&[0x7f, b'E', b'L', b'F', class, if cfg!(target_endian = "little") { 1 } else { 2 }]);
        let mut put = |at: usize, length: usize, value: u64| {
            let bytes = value.to_ne_bytes();
            let bytes = if cfg!(target_endian = "little") { &bytes[..length] } else { &bytes[8 - length..] };
            file[at..at + length].copy_from_slice(bytes);
        };
        put(layout.header_offset, word, 64);
        put(layout.header_size, 2, 56);
        put(layout.header_count, 2, 2);
        for (header, (kind, address, offset, size)) in
            [(PT_LOAD, 0x1000, 0, 512), (PT_DYNAMIC, 0x1100, 256, 64)].into_iter().enumerate()
        {
            let at = 64 + 56 * header;
            put(at, 4, kind);
            put(at + layout.address, word, address);
            put(at + layout.offset, word, offset);
            put(at + layout.size, word, size);
        }
        for (entry, (tag, value)) in [(DT_SONAME, 4), (DT_STRTAB, 0x1000 + 384)].into_iter().enumerate() {
            put(256 + 2 * word * entry, word, tag);
            put(256 + 2 * word * entry + word, word, value);
        }
        file[388..388 + name.len()].copy_from_slice(name);
        file
    }

    #[test]
    fn both_classes_and_names_that_are_none() {
        for (class, is_32_bit) in [(1, true), (2, false)] {
            let found = |name: &[u8]| of(&small(class, name)).unwrap();
            assert_eq!(found(b"libx.so.1"), Elf { is_32_bit, soname: Some("libx.so.1".into()) });
            for name in [&b""[..], b"../x", b"a/b", b"\xff\xfe", b"..", b"a\nb"] {
                assert_eq!(found(name).soname, None, "{name:?}");
            }
        }
        assert_eq!(of(b"#!/bin/sh\n"), None);
        assert_eq!(of(b""), None);
    }

    proptest! {
        #[test]
        fn nothing_breaks_it(mut bytes in prop::collection::vec(any::<u8>(), 0..700), changes in prop::collection::vec((0_usize..512, any::<u8>()), 0..8)) {
            let _ = of(&bytes);
            bytes = small(2, b"libx.so.1");
            for (at, byte) in changes {
                bytes[at] = byte;
            }
            let _ = of(&bytes);
        }
    }
}
