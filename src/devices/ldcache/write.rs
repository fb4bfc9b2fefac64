//! The writer: entries in the order in which glibc searches for them, strings, and who wrote it.

use std::cmp::{Ordering, Reverse};
use std::collections::HashMap;

use super::{Cache, EXTENSION_MAGIC, Entry, HEADER, MAGIC, ORDER, TAG_GENERATOR, TAG_HWCAPS};

/// What we write as the generator; `ldconfig -p` shows it.
pub const GENERATOR: &str = "pyxis, with the devices of a container";

impl Cache<'_> {
    /// The content of a cache file. All releases of glibc since 2.2 read it.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut entries: Vec<&Entry<'_>> = self.entries.iter().collect();
        // Equal ones stay in their order: the first is found.
        entries.sort_by(|one, other| self.compare(one, other));
        let mut file = Vec::with_capacity(HEADER + entries.len() * 128);
        let mut strings = StringTable { start: HEADER + entries.len() * super::ENTRY, ..StringTable::default() };
        file.extend_from_slice(MAGIC);
        file.resize(HEADER, 0);
        for entry in &entries {
            let path = strings.add(entry.path);
            // Mostly the path's end.
            let directory = entry.path.strip_suffix(entry.name).filter(|directory| directory.ends_with(b"/"));
            let name = match directory {
                Some(directory) => path + length(directory),
                None => strings.add(entry.name),
            };
            file.extend(entry.flags.to_ne_bytes());
            for number in [name, path, entry.os_version] {
                file.extend(number.to_ne_bytes());
            }
            file.extend(entry.hwcap.to_ne_bytes());
        }
        let hwcaps: Vec<u32> = self.hwcaps.iter().map(|name| strings.add(name)).collect();
        let strings_length = length(&strings.bytes);
        file.append(&mut strings.bytes);
        file.resize(file.len().next_multiple_of(4), 0);

        let count = 1 + u32::from(!hwcaps.is_empty());
        let directory = length(&file);
        let generator = directory + 8 + 16 * count;
        let generator_length = length(GENERATOR.as_bytes());
        let mut sections = vec![[TAG_GENERATOR, 0, generator, generator_length]];
        if !hwcaps.is_empty() {
            let at = (generator + generator_length).next_multiple_of(4);
            sections.push([TAG_HWCAPS, 0, at, 4 * hwcaps.len() as u32]);
        }
        for number in [EXTENSION_MAGIC, count].into_iter().chain(sections.into_iter().flatten()) {
            file.extend(number.to_ne_bytes());
        }
        file.extend_from_slice(GENERATOR.as_bytes());
        file.resize(file.len().next_multiple_of(4), 0);
        file.extend(hwcaps.into_iter().flat_map(u32::to_ne_bytes));

        file[20..24].copy_from_slice(&(entries.len() as u32).to_ne_bytes());
        file[24..28].copy_from_slice(&strings_length.to_ne_bytes());
        file[28] = ORDER;
        file[32..36].copy_from_slice(&directory.to_ne_bytes());
        file
    }

    /// The order of `elf/cache.c`: names descending, then flags descending, then what is for particular processors before
    /// what is for all.
    fn compare(&self, one: &Entry<'_>, other: &Entry<'_>) -> Ordering {
        let hwcaps = |entry: &Entry<'_>| entry.hwcaps().and_then(|position| self.hwcaps.get(position));
        let specific = |entry: &Entry<'_>| match hwcaps(entry) {
            Some(name) => (Some(*name), Reverse(0)),
            None => (None, Reverse(entry.hwcap)),
        };
        compare_names(other.name, one.name).then(other.flags.cmp(&one.flags)).then_with(|| {
            let (one, other) = (specific(one), specific(other));
            match (one.0, other.0) {
                (Some(_), None) => Ordering::Less,
                (None, Some(_)) => Ordering::Greater,
                _ => one.cmp(&other),
            }
        })
    }
}

/// `_dl_cache_libcmp`: numbers in names compare as numbers.
fn compare_names(one: &[u8], other: &[u8]) -> Ordering {
    let (mut one, mut other) = (one, other);
    loop {
        let digit = |rest: &[u8]| rest.first().is_some_and(u8::is_ascii_digit);
        match (digit(one), digit(other)) {
            (true, true) => {
                let numbers = (number(&mut one), number(&mut other));
                if numbers.0 != numbers.1 {
                    return numbers.0.cmp(&numbers.1);
                }
            }
            (true, false) => return Ordering::Greater,
            (false, true) => return Ordering::Less,
            (false, false) => match (one.split_first(), other.split_first()) {
                (Some((first, rest)), Some((second, others))) if first == second => (one, other) = (rest, others),
                (first, second) => return first.map(|(byte, _)| byte).cmp(&second.map(|(byte, _)| byte)),
            },
        }
    }
}

/// Takes a number off the beginning; what is too large for an `int` overflows there, too.
fn number(rest: &mut &[u8]) -> i32 {
    let mut value = 0_i32;
    while let Some((digit, others)) = rest.split_first().filter(|(digit, _)| digit.is_ascii_digit()) {
        value = value.wrapping_mul(10).wrapping_add(i32::from(digit - b'0'));
        *rest = others;
    }
    value
}

/// Offsets in the file are 32 bits; what is read and added is bounded far below.
fn length(bytes: &[u8]) -> u32 {
    bytes.len() as u32
}

/// Strings, each once.
#[derive(Default)]
struct StringTable<'a> {
    /// Offset of the first.
    start: usize,
    bytes: Vec<u8>,
    offsets: HashMap<&'a [u8], u32>,
}

impl<'a> StringTable<'a> {
    fn add(&mut self, string: &'a [u8]) -> u32 {
        *self.offsets.entry(string).or_insert_with(|| {
            let offset = (self.start + self.bytes.len()) as u32;
            self.bytes.extend_from_slice(string);
            self.bytes.push(0);
            offset
        })
    }
}
