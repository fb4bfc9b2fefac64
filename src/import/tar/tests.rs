//! Compared with the `tar` crate, which reads and writes the same dialects. What GNU tar writes is judged in
//! `tests/erofs`.

use proptest::prelude::*;

use super::*;

/// An entry as both readers show it.
#[derive(Debug, PartialEq)]
struct Seen {
    path: Vec<u8>,
    flag: u8,
    link: Vec<u8>,
    mode: u32,
    mtime: u64,
    content: Vec<u8>,
}

fn ours(archive: &[u8]) -> Vec<Seen> {
    let mut reader = Archive::new(archive, u64::MAX);
    let mut seen = Vec::new();
    while let Some(entry) = reader.next().unwrap() {
        let (flag, size, link) = match entry.kind {
            Kind::File { size } => (b'0', size, Vec::new()),
            Kind::Sparse { size, .. } => (b'S', size, Vec::new()),
            Kind::HardLink { target } => (b'1', 0, target),
            Kind::Symlink { target } => (b'2', 0, target),
            Kind::Device => (b'3', 0, Vec::new()),
            Kind::Directory => (b'5', 0, Vec::new()),
            Kind::Fifo => (b'6', 0, Vec::new()),
        };
        let mut content = vec![0; size as usize];
        reader.read(&mut content).unwrap();
        assert_eq!(entry.mtime.1, 0);
        let (mode, mtime) = (entry.mode.into(), entry.mtime.0 as u64);
        seen.push(Seen { path: entry.path, flag, link, mode, mtime, content });
    }
    assert_eq!(reader.position(), archive.len() as u64);
    seen
}

fn theirs(archive: &[u8]) -> Vec<Seen> {
    let mut reader = tar::Archive::new(archive);
    let mut seen = Vec::new();
    for entry in reader.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut content = Vec::new();
        entry.read_to_end(&mut content).unwrap();
        let header = entry.header();
        seen.push(Seen {
            path: entry.path_bytes().into_owned(),
            flag: header.entry_type().as_byte(),
            link: entry.link_name_bytes().unwrap_or_default().into_owned(),
            mode: header.mode().unwrap(),
            mtime: header.mtime().unwrap(),
            content,
        });
    }
    seen
}

#[derive(Debug, Clone)]
struct Written {
    path: String,
    flag: u8,
    link: String,
    mode: u32,
    mtime: u64,
    content: Vec<u8>,
    gnu: bool,
    pax: bool,
}

fn written() -> impl Strategy<Value = Written> {
    let name = || prop_oneof!["[a-z ä=%]{1,20}", "[a-z]{90,110}", "([a-z]{1,40}/){1,12}[a-z]{1,250}"];
    let flag = prop::sample::select(&b"0012356"[..]);
    let mtime = prop_oneof![0..1_u64 << 33, 0..1_u64 << 50];
    let content = prop::collection::vec(any::<u8>(), 0..1500);
    let fields = (name(), flag, name(), 0..=0o7777_u32, mtime, content, any::<bool>(), any::<bool>());
    fields.prop_map(|(path, flag, link, mode, mtime, content, gnu, pax)| {
        let link = if matches!(flag, b'1' | b'2') { link } else { String::new() };
        let content = if flag == b'0' { content } else { Vec::new() };
        // ustar has no number beyond 33 bits.
        let mtime = if gnu { mtime } else { mtime & ((1 << 33) - 1) };
        Written { path, flag, link, mode, mtime, content, gnu, pax }
    })
}

fn write(entries: &[Written]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = if entry.gnu { tar::Header::new_gnu() } else { tar::Header::new_ustar() };
        header.set_entry_type(tar::EntryType::new(entry.flag));
        header.set_mode(entry.mode);
        header.set_mtime(entry.mtime);
        header.set_size(entry.content.len() as u64);
        if entry.pax {
            let mut records = vec![("path", entry.path.as_bytes())];
            if !entry.link.is_empty() {
                records.push(("linkpath", entry.link.as_bytes()));
            }
            builder.append_pax_extensions(records).unwrap();
            header.as_mut_bytes()[..2].copy_from_slice(b"no");
            header.set_cksum();
            builder.append(&header, &entry.content[..]).unwrap();
        } else if entry.link.is_empty() {
            builder.append_data(&mut header, &entry.path, &entry.content[..]).unwrap();
        } else {
            builder.append_link(&mut header, &entry.path, &entry.link).unwrap();
        }
    }
    builder.into_inner().unwrap()
}

proptest! {
    #[test]
    fn agrees_with_the_tar_crate(entries in prop::collection::vec(written(), 0..20)) {
        let archive = write(&entries);
        let seen = ours(&archive);
        prop_assert_eq!(&seen, &theirs(&archive));
        prop_assert_eq!(seen.len(), entries.len());
        for (seen, entry) in seen.iter().zip(&entries) {
            prop_assert_eq!(&seen.path, entry.path.as_bytes());
            prop_assert_eq!(&seen.link, entry.link.as_bytes());
            prop_assert_eq!((seen.mode, seen.mtime), (entry.mode, entry.mtime));
            prop_assert_eq!(&seen.content, &entry.content);
        }
    }

    /// Whatever it says, an archive that is not one is refused or read to its end, not more.
    #[test]
    fn any_bytes_are_read_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..3000)) {
        let mut reader = Archive::new(&bytes[..], 1 << 20);
        while let Ok(Some(_)) = reader.next() {}
        prop_assert!(reader.position() <= bytes.len() as u64);
    }
}

#[test]
fn content_that_is_not_read_is_skipped() {
    let entry = |path: &str, content| Written {
        path: path.into(),
        flag: b'0',
        link: String::new(),
        mode: 0o644,
        mtime: 0,
        content,
        gnu: true,
        pax: false,
    };
    let archive = write(&[entry("a", vec![1; 300_000]), entry("b", vec![2; 700]), entry("c", vec![])]);
    let mut reader = Archive::new(&archive[..], u64::MAX);
    let mut paths = Vec::new();
    while let Some(entry) = reader.next().unwrap() {
        if entry.path == b"b" {
            reader.read(&mut [0; 100]).unwrap();
        }
        paths.push(entry.path);
    }
    assert_eq!(paths, [b"a", b"b", b"c"]);
}
