//! Malformed and hostile layers: one line that names the entry, and nothing worse.

use spank_pyxis::import::{LayerError, LayerLimits};

use crate::archive::{Archive, Header};
use crate::support::{Image, LIMITS};

#[track_caller]
fn refused(archive: impl AsRef<[u8]>, limits: &LayerLimits) -> LayerError {
    let error = Image::try_new(archive.as_ref(), limits).expect_err("this layer must be refused");
    let line = error.to_string();
    assert!(!line.contains('\n') && line.chars().all(|character| !character.is_control()), "{line:?}");
    assert!(line.len() < 1000, "{line}");
    error
}

#[track_caller]
fn malformed(archive: Archive, expected: &str) {
    let error = refused(archive.end(), &LIMITS);
    assert!(matches!(error, LayerError::Malformed { .. }), "{error:?}");
    assert_eq!(error.to_string(), format!("malformed layer: {expected}"));
}

fn empty() -> Archive {
    Archive::default()
}

#[test]
fn paths() {
    malformed(empty().file("../x", b""), r#"entry "../x": its path contains "..""#);
    malformed(empty().file("a/../../etc/passwd", b""), r#"entry "a/../../etc/passwd": its path contains "..""#);
    malformed(empty().directory("a/.."), r#"entry "a/..": its path contains "..""#);
    malformed(empty().file("/..", b""), r#"entry "/..": its path contains "..""#);
    malformed(empty().file(".", b""), r#"entry ".": the root of the layer can only be a directory"#);
    malformed(empty().symlink("/", "/etc"), r#"entry "/": the root of the layer can only be a directory"#);
    malformed(
        empty().pax(b'x', &[("path", "n".repeat(256).as_bytes())]).file("a", b""),
        &format!(r#"entry "{}…": its path contains a name longer than 255 bytes"#, "n".repeat(200)),
    );
    malformed(
        empty().pax(b'x', &[("path", "d/".repeat(3000).as_bytes())]).directory("a"),
        &format!(r#"entry "{}…": its path is longer than 4095 bytes"#, "d/".repeat(100)),
    );
    malformed(empty().pax(b'x', &[("path", b"a\0b")]).file("a", b""), r#"entry "a\0b": its path contains a NUL"#);
    malformed(empty().file("a\n\x1b[31m/..", b""), r#"entry "a\n\u{1b}[31m/..": its path contains "..""#);
}

#[test]
fn entries_below_what_is_no_directory() {
    malformed(
        empty().symlink("a", "/b").file("b", b"").file("a/passwd", b"x"),
        r#"entry "b/passwd": it is below "b", which is not a directory"#,
    );
    malformed(empty().symlink("a", "a").file("a/b", b"x"), r#"entry "a/b": it is below "a", which is not a directory"#);
    malformed(empty().file("a", b"").directory("a/b"), r#"entry "a/b": it is below "a", which is not a directory"#);
    malformed(
        empty().file("a", b"").file("a/.wh.b", b""),
        r#"entry "a/.wh.b": it is below "a", which is not a directory"#,
    );
    malformed(
        empty().entry("a", b'4', "", 0o666, b"").file("a/b", b""),
        r#"entry "a/b": it is below "a", which is not a directory"#,
    );
    malformed(empty().file(".wh.a/b", b""), r#"entry ".wh.a/b": it is below a whiteout"#);
}

#[test]
fn links() {
    malformed(empty().hard_link("a", "b"), r#"entry "a": hard link to "b", which is not among the entries before it"#);
    malformed(
        empty().hard_link("a", "b").file("b", b""),
        r#"entry "a": hard link to "b", which is not among the entries before it"#,
    );
    malformed(
        empty().file(".wh.b", b"").hard_link("a", "b"),
        r#"entry "a": hard link to "b", which is not among the entries before it"#,
    );
    malformed(empty().directory("b").hard_link("a", "b"), r#"entry "a": hard link to "b", which is a directory"#);
    malformed(empty().hard_link("a", "/"), r#"entry "a": hard link to "/", which is a directory"#);
    malformed(
        empty().symlink("b", "/etc").hard_link("a", "b/passwd"),
        r#"entry "a": hard link to "etc/passwd", which is not among the entries before it"#,
    );
    malformed(empty().hard_link("a", "../b"), r#"entry "a": hard link to "../b", which is no valid path"#);
    let problem = "a symbolic link to an empty, too long or invalid path";
    malformed(empty().symlink("a", ""), &format!(r#"entry "a": {problem}"#));
    malformed(empty().symlink("a", &"x".repeat(4096)), &format!(r#"entry "a": {problem}"#));
    malformed(empty().pax(b'x', &[("linkpath", b"a\0b")]).symlink("a", "x"), &format!(r#"entry "a": {problem}"#));
}

#[test]
fn whiteouts_for_no_name() {
    for name in [".wh.", ".wh..", ".wh..."] {
        malformed(empty().file(name, b""), &format!(r#"entry "{name}": a whiteout for no name"#));
    }
}

#[test]
fn headers() {
    let header = || Header::new(b"a", b'0', 0);
    let mut broken = empty().file("b", b"").header(header());
    broken.0[512 + 5] ^= 1;
    malformed(broken, "header at byte 512: its checksum is wrong; is this a tar archive?");
    malformed(empty().data(&b"x".repeat(512)), "header at byte 0: its checksum is no number; is this a tar archive?");
    malformed(empty().header(header().put(124, b"12x")), r#"entry "a": its size is no number"#);
    malformed(empty().header(header().put(124, &[0xff; 12])), r#"entry "a": its size is negative"#);
    malformed(empty().header(header().put(136, b"9")), r#"entry "a": its modification time is no number"#);
    malformed(empty().header(header().put(100, b"rwx")), r#"entry "a": its mode is no number"#);
    malformed(empty().entry("a", b'M', "", 0, b""), r#"entry "a": unsupported type of entry 'M'"#);
    malformed(empty().entry("a", b'\n', "", 0, b""), r#"entry "a": unsupported type of entry '\n'"#);
    malformed(
        empty().data(&[0; 512]).file("a", b""),
        "header at byte 0: a block of zeros in the middle of the archive",
    );
    malformed(
        empty().data(&[0; 512]).data(&[1; 512]),
        "header at byte 0: a block of zeros in the middle of the archive",
    );
}

#[test]
fn extended_headers() {
    let big = |flag| empty().header(Header::new(b"x", flag, (1 << 20) + 1));
    for flag in [b'x', b'g', b'L', b'K'] {
        malformed(big(flag), "header at byte 0: an extended header of more than 1048576 bytes");
    }
    malformed(empty().pax(b'x', &[("path", b"a")]), "header at byte 1024: an extended header is followed by no entry");
    let records = |text: &[u8]| empty().header(Header::new(b"x", b'x', text.len() as u64)).data(text);
    malformed(records(b"nonsense"), "header at byte 0: a record has no length");
    malformed(records(b"9 a=b\n"), "header at byte 0: a record has a wrong length");
    malformed(records(b"5 a=b"), "header at byte 0: a record has a wrong length");
    malformed(records(b"4 a\n"), "header at byte 0: a record has no \"=\"");
    malformed(records(b"11 size=-1\n"), "header at byte 0: a record that is a number holds something else");
    malformed(records(b"11 mtime=x\n"), "header at byte 0: its modification time is no number");
    let long = "extended attributes that are too long (names up to 247 bytes, 65536 bytes in all)";
    let value = vec![b'v'; 40_000];
    let two: &[(&str, &[u8])] = &[("SCHILY.xattr.user.a", &value), ("SCHILY.xattr.user.b", &value)];
    malformed(empty().pax(b'x', two).file("a", b""), &format!(r#"entry "a": {long}"#));
    malformed(empty().pax(b'g', two).file("a", b""), &format!("header at byte 0: {long}"));
    let name = format!("SCHILY.xattr.user.{}", "n".repeat(248));
    malformed(empty().pax(b'x', &[(&name, b"")]).file("a", b""), &format!(r#"entry "a": {long}"#));
    malformed(
        empty().pax(b'x', &[("SCHILY.xattr.user.", b"")]).file("a", b""),
        "header at byte 0: an extended attribute has an invalid name",
    );
    malformed(
        empty().pax(b'x', &two[..1]).directory("/"),
        r#"entry "/": the root directory has more extended attributes than its inode has room for"#,
    );
}

/// A GNU sparse header with these pieces.
fn sparse(size: u64, stored: u64, pieces: &[(u64, u64)]) -> Archive {
    let header = Header::new(b"a", b'S', stored).put(483, format!("{size:011o}\0").as_bytes());
    let header = pieces.iter().enumerate().fold(header, |header, (number, (offset, length))| {
        header.put(386 + number * 24, format!("{offset:011o}\0{length:011o}\0").as_bytes())
    });
    empty().header(header).data(&vec![1; stored as usize])
}

#[test]
fn sparse_maps() {
    malformed(sparse(10, 4, &[(8, 4)]), r#"entry "a": its sparse map exceeds its size"#);
    malformed(sparse(100, 4, &[(8, 2), (4, 2)]), r#"entry "a": its sparse map is not in order"#);
    malformed(sparse(100, 8, &[(0, 5), (4, 3)]), r#"entry "a": its sparse map is not in order"#);
    malformed(sparse(100, 4, &[(0, 5)]), r#"entry "a": its sparse map does not fit its data"#);
    malformed(sparse(100, 6, &[(0, 5)]), r#"entry "a": its sparse map does not fit its data"#);
    let header = Header::new(b"a", b'S', 0);
    malformed(empty().header(header.clone().put(386, b"x")), r#"entry "a": its sparse map holds what is no number"#);
    malformed(empty().header(header.clone().put(483, b"x")), r#"entry "a": its real size is no number"#);
    let pax = |records: &[(&str, &[u8])], data: &[u8]| empty().pax(b'x', records).file("a", data);
    let numbers = "its sparse map holds what is no number";
    malformed(pax(&[("GNU.sparse.map", b"0,x")], b""), &format!("header at byte 0: {numbers}"));
    malformed(pax(&[("GNU.sparse.map", b"0,1")], b""), r#"entry "a": a sparse file without its size"#);
    malformed(
        pax(&[("GNU.sparse.major", b"2"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"1")], b""),
        r#"entry "a": a sparse file in an unknown version of the format"#,
    );
    let one: &[(&str, &[u8])] =
        &[("GNU.sparse.major", b"1"), ("GNU.sparse.minor", b"0"), ("GNU.sparse.realsize", b"9")];
    malformed(pax(one, b"1\n0\n9\n"), r#"entry "a": its sparse map is cut off"#);
    malformed(pax(one, &[b'1'; 1000]), &format!(r#"entry "a": {numbers}"#));
    malformed(pax(one, &b"1048577\n".repeat(64)), r#"entry "a": its sparse map is too long"#);
    // Sizes of exabytes.
    let huge: &[(&str, &[u8])] = &[("GNU.sparse.size", b"9223372036854775808"), ("GNU.sparse.map", b"")];
    malformed(pax(huge, b""), r#"entry "a": its size is beyond what a file can have"#);
    let exabytes: &[(&str, &[u8])] =
        &[("GNU.sparse.size", b"9223372036854775807"), ("GNU.sparse.map", b"0,1,9000000000000000000,1")];
    let limits = LayerLimits { max_bytes: 1 << 20, ..LIMITS };
    assert!(matches!(refused(pax(exabytes, b"xy").end(), &limits), LayerError::TooLarge));
}

#[test]
fn sparse_maps_without_end() {
    // Extension blocks that always announce another one.
    let mut archive = empty()
        .header(Header::new(b"a", b'S', 0).put(483, b"00000000000\0").put(386, b"0").put(398, b"0").put(482, b"\x01"));
    let mut block = [0; 512];
    for piece in block[..504].chunks_exact_mut(12) {
        piece[0] = b'0';
    }
    block[504] = 1;
    for _ in 0..(1 << 20) / 21 + 10 {
        archive.0.extend(block);
    }
    malformed(archive, r#"entry "a": its sparse map is too long"#);
}

#[test]
fn limits() {
    let archive = empty().file("a", &[1; 3000]).directory("b").file("c/d/e", b"x").end();
    assert_eq!(Image::try_new(&archive[..], &LIMITS).unwrap().summary.entries, 5);
    let fits = LayerLimits { max_bytes: archive.len() as u64, max_entries: 5 };
    Image::try_new(&archive[..], &fits).unwrap();
    let bytes = LayerLimits { max_bytes: fits.max_bytes - 1, ..fits };
    assert!(matches!(refused(&archive, &bytes), LayerError::TooLarge));
    let bytes = LayerLimits { max_bytes: 2000, ..fits };
    assert!(matches!(refused(&archive, &bytes), LayerError::TooLarge));
    let entries = LayerLimits { max_entries: 4, ..fits };
    assert!(matches!(refused(&archive, &entries), LayerError::TooManyEntries));
    // A size beyond the limit is refused before anything is read.
    let huge = empty().header(Header::new(b"a", b'0', u64::MAX >> 1)).0;
    assert!(matches!(refused(huge, &LIMITS), LayerError::TooLarge));
    // Attributes for all, from one global header: the image is bounded too.
    let value = vec![b'v'; 60_000];
    let archive = (0..100).fold(empty().pax(b'g', &[("SCHILY.xattr.user.a", &value)]), |archive, number| {
        archive.file(&number.to_string(), b"")
    });
    assert!(matches!(
        refused(archive.clone().end(), &LayerLimits { max_bytes: 200_000, ..LIMITS }),
        LayerError::TooLarge
    ));
    let archive = (0..300).fold(archive, |archive, number| archive.directory(&format!("d{number}")));
    malformed(archive, r#"entry "d279": too many extended attributes of directories"#);
}

#[test]
fn archives_that_are_cut_off() {
    let archive = empty()
        .pax(b'x', &[("path", b"long/name")])
        .file("a", &[7; 9000])
        .header(Header::new(b"s", b'S', 600).put(386, b"00000000000\x0000000001130\0").put(483, b"00000001130\0"))
        .data(&[1; 600])
        .0;
    for length in (1..archive.len()).step_by(7) {
        // Between entries an archive may end, with or without the padding of the last one.
        if (10_536..=10_752).contains(&length) || length >= archive.len() - 424 {
            continue;
        }
        let error = refused(&archive[..length], &LIMITS).to_string();
        assert!(
            error.contains("cut off inside it")
                || error.contains("followed by no entry")
                || error.contains("cut off in an"),
            "{length}: {error}"
        );
    }
    let error = refused(&archive[..5000], &LIMITS).to_string();
    assert_eq!(error, r#"malformed layer: entry "long/name": the archive is cut off inside it"#);
}

/// Fails where a decompressor or the network would.
#[derive(Debug)]
struct Failing<'a>(&'a [u8]);

impl std::io::Read for Failing<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self.0.read(buffer)? {
            0 => Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "incomplete gzip stream")),
            count => Ok(count),
        }
    }
}

#[test]
fn a_failing_stream_is_no_malformed_layer() {
    let archive = empty().file("a", &[7; 9000]).end();
    for length in (0..=archive.len()).step_by(7) {
        let error = Image::try_new(Failing(&archive[..length]), &LIMITS).unwrap_err();
        assert!(matches!(error, LayerError::Read(_)), "{error:?}");
        assert_eq!(error.to_string(), "cannot read the layer: incomplete gzip stream");
    }
}

#[test]
fn a_full_disk_is_no_malformed_layer() {
    let full = std::fs::File::options().read(true).write(true).open("/dev/full").unwrap();
    let error = spank_pyxis::import::write_layer(&empty().end()[..], &full, &LIMITS).unwrap_err();
    assert!(matches!(error, LayerError::Write(_)), "{error:?}");
}
