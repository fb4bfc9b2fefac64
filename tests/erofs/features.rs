//! What entries mean in a layer.

use std::collections::BTreeMap;

use crate::archive::{Archive, Header};
use crate::support::Image;
use crate::tree::{Content, Kind, Tree};

/// The tree as lines: a letter for the kind, the path, an attribute or target.
fn lines(tree: &Tree) -> Vec<String> {
    let mut lines = Vec::new();
    for (path, node) in tree {
        let path = String::from_utf8_lossy(path);
        lines.push(match &node.kind {
            Kind::Directory if node.xattrs.contains_key(&b"trusted.overlay.opaque"[..]) => format!("o {path}"),
            Kind::Directory if path.is_empty() => continue,
            Kind::Directory => format!("d {path}"),
            Kind::File { size, .. } => format!("f {path} {size}"),
            Kind::Symlink(target) => format!("l {path} {}", String::from_utf8_lossy(target)),
            Kind::Fifo => format!("p {path}"),
            Kind::Whiteout => format!("w {path}"),
            Kind::Device => format!("device {path}"),
        });
    }
    lines
}

#[track_caller]
fn check(archive: Archive, expected: &[&str]) -> Tree {
    let tree = Image::new(&archive.end()[..]).tree();
    assert_eq!(lines(&tree), expected);
    tree
}

#[test]
fn whiteouts_hide_what_is_below() {
    let tree = check(
        Archive::default().directory("a").file("a/.wh.b", b"").file("a/.wh..hidden", b"").file(".wh.c", b"x"),
        &["d a", "w a/.hidden", "w a/b", "w c"],
    );
    // One inode serves for all.
    assert_eq!(tree[&b"c"[..]].nlink, 3);
    assert_eq!(tree[&b"c"[..]].mode, 0);
}

#[test]
fn opaque_directories_hide_what_is_below() {
    check(Archive::default().directory("a").file("a/.wh..wh..opq", b"").file("a/b", b"x"), &["o a", "f a/b 1"]);
    check(Archive::default().file("a/b/.wh..wh..opq", b""), &["d a", "o a/b"]);
    // The order does not matter, and whiteouts would only show.
    check(
        Archive::default().file("a/.wh.b", b"").file("a/c/.wh.d", b"").file("a/.wh..wh..opq", b"").directory("a"),
        &["o a", "d a/c"],
    );
    check(Archive::default().file(".wh..wh..opq", b"").file(".wh.b", b""), &["o "]);
}

#[test]
fn what_is_below_a_link_is_where_it_leads() {
    check(
        Archive::default()
            .symlink("bin", "usr/bin")
            .symlink("usr/lib", "/../../lib")
            .file("bin/sh", b"x")
            .file("usr/lib/libc.so", b"xy")
            .hard_link("sh", "bin/sh")
            .file("bin/.wh.ls", b""),
        &[
            "l bin usr/bin",
            "d lib",
            "f lib/libc.so 2",
            "f sh 1",
            "d usr",
            "d usr/bin",
            "w usr/bin/ls",
            "f usr/bin/sh 1",
            "l usr/lib /../../lib",
        ],
    );
}

#[test]
fn a_layer_may_replace_what_it_hides() {
    check(Archive::default().file(".wh.a", b"").file("a", b"new"), &["f a 3"]);
    check(Archive::default().file("a", b"new").file(".wh.a", b""), &["f a 3"]);
    check(Archive::default().file(".wh.a", b"").directory("a").file("a/b", b""), &["o a", "f a/b 0"]);
    check(Archive::default().directory("a").file("a/b", b"").file(".wh.a", b""), &["o a", "f a/b 0"]);
    check(Archive::default().file(".wh.a", b"").file("a/b", b""), &["o a", "f a/b 0"]);
}

#[test]
fn of_two_entries_the_later_counts() {
    check(Archive::default().file("a", b"one").file("./a", b"three"), &["f a 5"]);
    check(Archive::default().file("a", b"one").symlink("a", "b"), &["l a b"]);
    check(Archive::default().directory("a").file("a/b", b"").file("a", b"x"), &["f a 1"]);
    // A file hides a directory below; a directory in its place does not bring that back.
    check(Archive::default().file("a", b"one").directory("a"), &["o a"]);
    let tree = check(
        Archive::default().entry("a", b'5', "", 0o700, b"").file("a/b", b"x").entry("a/", b'5', "", 0o1777, b""),
        &["d a", "f a/b 1"],
    );
    assert_eq!(tree[&b"a"[..]].mode, 0o1777);
}

#[test]
fn directories_are_implied() {
    let tree = check(Archive::default().file("/a/b/./c//d", b"x"), &["d a", "d a/b", "d a/b/c", "f a/b/c/d 1"]);
    assert_eq!((tree[&b"a/b"[..]].mode, tree[&b"a/b"[..]].mtime), (0o755, (0, 0)));
    assert_eq!((tree[&b""[..]].mode, tree[&b""[..]].nlink), (0o755, 3));
    // An entry for it may still come.
    let tree = check(Archive::default().file("a/b", b"").entry("a", b'5', "", 0o2750, b""), &["d a", "f a/b 0"]);
    assert_eq!((tree[&b"a"[..]].mode, tree[&b"a"[..]].mtime), (0o2750, (1_600_000_000, 0)));
}

#[test]
fn the_root_has_attributes() {
    let tree =
        check(Archive::default().pax(b'x', &[("SCHILY.xattr.user.x", b"y")]).entry("./", b'5', "", 0o1711, b""), &[]);
    let root = &tree[&b""[..]];
    assert_eq!((root.mode, root.mtime), (0o1711, (1_600_000_000, 0)));
    assert_eq!(root.xattrs, BTreeMap::from([(b"user.x".to_vec(), b"y".to_vec())]));
}

#[test]
fn hard_links_share_an_inode() {
    let tree = check(
        Archive::default()
            .file("a/b", b"content")
            .hard_link("c", "/a/b")
            .hard_link("d", "./c")
            .symlink("s", "t")
            .hard_link("t", "s"),
        &["d a", "f a/b 7", "f c 7", "f d 7", "l s t", "l t t"],
    );
    assert_eq!((tree[&b"d"[..]].nlink, &tree[&b"d"[..]].same_as[..]), (3, &b"a/b"[..]));
    assert_eq!((tree[&b"t"[..]].nlink, &tree[&b"t"[..]].same_as[..]), (2, &b"s"[..]));
    // To an entry that is replaced afterwards.
    let tree = check(
        Archive::default().file("a", b"old").hard_link("b", "a").file("a", b"newer").hard_link("c", "a"),
        &["f a 5", "f b 3", "f c 5"],
    );
    assert_eq!((tree[&b"a"[..]].nlink, tree[&b"b"[..]].nlink), (2, 1));
    // The size that some writers give them is none.
    check(
        Archive::default().file("a", b"x").header(Header::new(b"b", b'1', 1000).link(b"a")).file("c", b""),
        &["f a 1", "f b 1", "f c 0"],
    );
}

#[test]
fn devices_and_dev_are_left_out() {
    check(
        Archive::default()
            .entry("null", b'3', "", 0o666, b"")
            .entry("a/disk", b'4', "", 0o666, b"")
            .entry("a/again", b'1', "a/disk", 0o666, b"")
            .directory("dev")
            .file("dev/file", b"x")
            .file("dev/shm/.wh..wh..opq", b"")
            .file("dev/.wh..wh..opq", b"")
            .file("dev/.wh.x", b"")
            .hard_link("linked", "dev/file")
            .file("a/dev/file", b"x"),
        &["d a", "d a/dev", "f a/dev/file 1", "d dev", "f linked 1"],
    );
    check(Archive::default().symlink("dev", "a"), &["l dev a"]);
}

#[test]
fn what_aufs_left_behind_is_left_out() {
    check(
        Archive::default()
            .directory(".wh..wh.plnk")
            .file(".wh..wh.plnk/17.5", b"content")
            .hard_link("a/b", ".wh..wh.plnk/17.5")
            .file(".wh..wh.aufs", b"")
            .directory("a/.wh..wh.orph"),
        &["d a", "f a/b 7"],
    );
}

#[test]
fn the_owner_may_use_what_is_his() {
    let modes = [(b'0', 0o000, 0o400), (b'0', 0o011, 0o511), (b'0', 0o4711, 0o4711), (b'5', 0o000, 0o700)];
    let modes = modes.into_iter().chain([(b'5', 0o1055, 0o1755), (b'6', 0o000, 0o400), (b'2', 0o000, 0o777)]);
    for (flag, mode, expected) in modes {
        let tree = Image::new(&Archive::default().entry("a", flag, "b", mode, b"").end()[..]).tree();
        assert_eq!(tree[&b"a"[..]].mode, expected, "{flag} {mode:o}");
        assert_eq!(tree[&b"a"[..]].owner, (0, 0));
    }
}

#[test]
fn attributes_are_those_of_users() {
    let large = vec![b'v'; 60_000];
    let records: &[(&str, &[u8])] = &[
        ("SCHILY.xattr.user.small", b"1"),
        ("SCHILY.xattr.user.large", &large),
        ("SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        ("SCHILY.xattr.security.capability", b"x"),
    ];
    let archive = Archive::default()
        .pax(b'x', records)
        .file("file", &[b'd'; 5000])
        .pax(b'x', records)
        .directory("directory")
        .pax(b'x', records)
        .symlink("link", "file");
    let tree = Image::new(&archive.file("directory/.wh..wh..opq", b"").end()[..]).judged();
    let mut expected =
        BTreeMap::from([(b"user.small".to_vec(), b"1".to_vec()), (b"user.large".to_vec(), large.clone())]);
    assert_eq!(tree[&b"file"[..]].xattrs, expected);
    expected.insert(b"trusted.overlay.opaque".to_vec(), b"y".to_vec());
    assert_eq!(tree[&b"directory"[..]].xattrs, expected);
    assert!(tree[&b"link"[..]].xattrs.is_empty());
}

#[test]
fn names_and_links_may_be_long() {
    let names = vec!["n".repeat(255); 15].join("/");
    let target = "t".repeat(4095);
    let archive = Archive::default().file(&names, b"1").symlink("link", &target).symlink("inline", &target[..4032]);
    let image = Image::new(&archive.end()[..]);
    image.fsck();
    assert_eq!(image.tree()[names.as_bytes()].kind, Kind::File { size: 1, content: Content::of(b"1") });
    let mount = image.mount();
    assert_eq!(std::fs::read(mount.path().join(names)).unwrap(), b"1");
    assert_eq!(std::fs::read_link(mount.path().join("link")).unwrap().as_os_str().len(), 4095);
    assert_eq!(std::fs::read_link(mount.path().join("inline")).unwrap().as_os_str().len(), 4032);
}

#[test]
fn directories_may_be_deep() {
    // `fsck.erofs` recurses, and runs out of stack.
    let path = vec!["d"; 2030].join("/");
    let image = Image::new(&Archive::default().file(&path, b"deep").end()[..]);
    assert_eq!(image.tree().len(), 2031);
    assert_eq!(std::fs::read(image.mount().path().join(path)).unwrap(), b"deep");
}

#[test]
fn odd_headers_are_understood() {
    let with = |header: Header| Archive::default().header(header).data(b"data");
    let file = |flag| Header::new(b"a", flag, 4);
    check(with(file(0)), &["f a 4"]);
    check(with(file(b'7')), &["f a 4"]);
    check(with(file(b'0').put(124, b"        4   ")), &["f a 4"]);
    check(with(file(b'0').put(124, b"\x80\0\0\0\0\0\0\0\0\0\0\x04")), &["f a 4"]);
    // ustar's and star's prefix.
    let ustar = || file(b'0').put(257, b"ustar\x0000").put(345, b"some/where");
    check(with(ustar()), &["d some", "d some/where", "f some/where/a 4"]);
    check(with(ustar().put(476, b"00000000000\0").put(508, b"tar\0")), &["d some", "d some/where", "f some/where/a 4"]);
    // GNU has other things there.
    check(with(file(b'0').put(345, b"14000000000\0")), &["f a 4"]);
    // v7 has no magic, and marks directories by their name.
    check(with(Header::new(b"a/", 0, 4).put(257, &[0; 8])), &["d a"]);
    // GNU's incremental directories have content, volume labels have no meaning.
    check(with(file(b'D')).header(Header::new(b"label", b'V', 0)).file("a/b", b"x"), &["d a", "f a/b 1"]);
    // Solaris' extended header; records that take others back.
    let records: &[(&str, &[u8])] = &[("path", b"x"), ("path", b""), ("linkpath", b"t"), ("comment", b"c")];
    check(Archive::default().pax(b'X', records).symlink("a", "b"), &["l a t"]);
    // A global header is for all, a local one for the next.
    check(
        Archive::default()
            .pax(b'g', &[("linkpath", b"g")])
            .pax(b'x', &[("linkpath", b"l")])
            .symlink("a", "")
            .symlink("b", "s"),
        &["l a l", "l b g"],
    );
    // Size and path in extended headers win.
    check(
        Archive::default()
            .pax(b'x', &[("size", b"4"), ("path", b"p/q")])
            .header(Header::new(b"a", b'0', 0))
            .data(b"data"),
        &["d p", "f p/q 4"],
    );
}

#[test]
fn archives_may_end_early_or_late() {
    let archive = Archive::default().file("a", b"x");
    for (tail, unpacked) in [(0, 1024), (512, 1536), (1024, 2048), (9000, 10_024)] {
        let bytes = [&archive.0[..], &vec![0; tail]].concat();
        assert_eq!(Image::new(&bytes[..]).summary.unpacked, unpacked);
    }
    // umoci leaves out the padding of the last entry.
    assert_eq!(Image::new(&archive.0[..513]).summary.unpacked, 513);
    // What follows the end is read, and is nothing.
    let bytes = [archive.clone().end(), b"junk".repeat(5000)].concat();
    assert_eq!(Image::new(&bytes[..]).summary.unpacked, bytes.len() as u64);
}

#[test]
fn everything_at_once() {
    let long = format!("{}/{}", "x".repeat(200), "y".repeat(200));
    let mut map = b"2\n1000000\n4\n53687091000\n3\n".to_vec();
    map.resize(512, 0);
    let archive = Archive::default()
        .entry("./", b'5', "", 0o755, b"")
        .directory("etc")
        .file("etc/empty", b"")
        .file("etc/.wh.gone", b"")
        .directory("opaque")
        .file("opaque/.wh..wh..opq", b"")
        .file(&long, b"long")
        .hard_link("hard", &long)
        .symlink("soft", &long)
        .entry("fifo", b'6', "", 0o600, b"")
        .pax(b'x', &[("path", b"pax"), ("mtime", b"1234567890.987654321"), ("SCHILY.xattr.user.k", b"v")])
        .file("short", &[7; 10_000])
        .pax(
            b'x',
            &[
                ("GNU.sparse.major", b"1"),
                ("GNU.sparse.minor", b"0"),
                ("GNU.sparse.name", b"sparse"),
                ("GNU.sparse.realsize", b"53687091200"),
            ],
        )
        .file("GNUSparseFile.0/sparse", &[&map[..], b"data", b"end"].concat());
    let tree = Image::new(&archive.end()[..]).judged();
    assert_eq!(tree.len(), 12);
    assert_eq!(tree[&b"pax"[..]].mtime, (1_234_567_890, 987_654_321));
    assert_eq!(tree[&b"hard"[..]].same_as, b"hard");
    assert_eq!(tree[long.as_bytes()].same_as, b"hard");
    assert!(matches!(tree[&b"sparse"[..]].kind, Kind::File { size: 53_687_091_200, .. }));
}
