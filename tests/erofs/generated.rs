//! Layers that nobody thought of.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use crate::archive::{Archive, Header};
use crate::reader;
use crate::support::{Image, LIMITS, unpacked};
use crate::tree::{self, Kind};

/// One entry of a tree without contradictions.
#[derive(Debug, Clone)]
enum Item {
    File(Vec<u8>),
    Sparse(Vec<(u16, u16)>, u16),
    Directory,
    Symlink(String),
    Fifo,
    HardLink(prop::sample::Index),
}

fn item() -> impl Strategy<Value = Item> {
    // Around the sizes at which the layout changes, and anything.
    let size = prop_oneof![0..200_usize, 3900..4200_usize, 8000..8400_usize, 0..40_000_usize];
    prop_oneof![
        4 => (any::<u8>(), size).prop_map(|(byte, size)| Item::File(vec![byte; size])),
        1 => (prop::collection::vec((any::<u16>(), 1..20_000_u16), 1..8), any::<u16>())
            .prop_map(|(pieces, end)| Item::Sparse(pieces, end)),
        2 => Just(Item::Directory),
        1 => "[a-z/.]{1,300}".prop_map(Item::Symlink),
        1 => Just(Item::Fifo),
        1 => any::<prop::sample::Index>().prop_map(Item::HardLink),
    ]
}

type Xattrs = BTreeMap<String, Vec<u8>>;

#[derive(Debug, Clone)]
struct Entry {
    parent: prop::sample::Index,
    name: String,
    item: Item,
    mode: u32,
    mtime: (u32, u32),
    xattrs: Xattrs,
}

fn entry() -> impl Strategy<Value = Entry> {
    let name = prop_oneof![4 => "[a-zA-Z0-9._ ä-]{1,12}", 1 => "[a-z]{100,250}"];
    let name = name
        .prop_filter("a name of its own", |name| !matches!(&name[..], "." | ".." | "dev") && !name.starts_with(".wh."));
    let xattrs = prop::collection::btree_map("[a-z.%=]{1,30}", prop::collection::vec(any::<u8>(), 0..200), 0..3);
    let xattrs = prop_oneof![3 => Just(Xattrs::new()), 1 => xattrs];
    let mtime = (any::<u32>(), 0..1_000_000_000_u32);
    (any::<prop::sample::Index>(), name, item(), 0..=0o7777_u32, mtime, xattrs)
        .prop_map(|(parent, name, item, mode, mtime, xattrs)| Entry { parent, name, item, mode, mtime, xattrs })
}

/// The archive of a tree made of these entries, each in one of the directories before it.
fn archive(entries: &[Entry]) -> Vec<u8> {
    let mut archive = Archive::default().entry("./", b'5', "", 0o755, b"");
    let (mut directories, mut files, mut taken) = (vec![String::new()], Vec::new(), BTreeSet::new());
    for entry in entries {
        let path = format!("{}{}", directories[entry.parent.index(directories.len())], entry.name);
        if path.len() > 3000 || !taken.insert(path.clone()) {
            continue;
        }
        let mtime = format!("{}.{:09}", entry.mtime.0, entry.mtime.1);
        let mut records: Vec<(String, Vec<u8>)> =
            vec![("path".into(), path.clone().into()), ("mtime".into(), mtime.into())];
        if matches!(entry.item, Item::File(_) | Item::Sparse(..) | Item::Directory) {
            let escape = |name: &str| name.replace('%', "%25").replace('=', "%3D");
            let name = |name: &str| format!("SCHILY.xattr.user.{}", escape(name));
            records.extend(entry.xattrs.iter().map(|(key, value)| (name(key), value.clone())));
        }
        let (flag, content) = match &entry.item {
            Item::File(content) => (b'0', content.clone()),
            Item::Sparse(pieces, end) => {
                let (mut at, mut map) = (0, Vec::new());
                for (number, &(gap, length)) in pieces.iter().enumerate() {
                    // GNU tar expects whole blocks but for the last piece.
                    let length = if number + 1 == pieces.len() { length } else { length.next_multiple_of(512) };
                    map.push((at + u64::from(gap), u64::from(length)));
                    at += u64::from(gap) + u64::from(length);
                }
                // A piece without content makes GNU tar extend the file to its size.
                map.push((at + u64::from(*end), 0));
                let text: Vec<String> = map.iter().map(|(offset, length)| format!("{offset},{length}")).collect();
                records.push(("GNU.sparse.size".into(), (at + u64::from(*end)).to_string().into()));
                records.push(("GNU.sparse.numblocks".into(), map.len().to_string().into()));
                records.push(("GNU.sparse.map".into(), text.join(",").into()));
                (b'0', map.iter().flat_map(|&(offset, length)| vec![offset as u8 | 1; length as usize]).collect())
            }
            Item::Directory => {
                directories.push(format!("{path}/"));
                (b'5', Vec::new())
            }
            Item::Symlink(target) => {
                records.push(("linkpath".into(), target.clone().into()));
                (b'2', Vec::new())
            }
            Item::Fifo => (b'6', Vec::new()),
            Item::HardLink(_) if files.is_empty() => continue,
            Item::HardLink(index) => {
                let target: &String = &files[index.index(files.len())];
                records.push(("linkpath".into(), target.clone().into()));
                (b'1', Vec::new())
            }
        };
        if !matches!(entry.item, Item::Directory) {
            files.push(path);
        }
        let records: Vec<(&str, &[u8])> = records.iter().map(|(key, value)| (&key[..], &value[..])).collect();
        // GNU tar ignores PAX sparse maps in its own dialect.
        let header = Header::new(b"name", flag, content.len() as u64).mode(entry.mode).put(257, b"ustar\x0000");
        archive = archive.pax(b'x', &records).header(header).data(&content);
    }
    archive.end()
}

/// What may come in any order, with contradictions.
#[derive(Debug, Clone)]
enum Step {
    File(String, u8),
    Directory(String),
    Symlink(String),
    Device(String),
    HardLink(String, String),
    Whiteout(String),
    Opaque(String),
}

fn step() -> impl Strategy<Value = Step> {
    let path = || "[abc](/[abc]){0,3}";
    prop_oneof![
        3 => (path(), any::<u8>()).prop_map(|(path, size)| Step::File(path, size)),
        3 => path().prop_map(Step::Directory),
        1 => path().prop_map(Step::Symlink),
        1 => path().prop_map(Step::Device),
        1 => (path(), path()).prop_map(|(path, target)| Step::HardLink(path, target)),
        2 => path().prop_map(Step::Whiteout),
        1 => path().prop_map(Step::Opaque),
    ]
}

/// What a name stands for, in the model.
#[derive(Debug, Clone, PartialEq)]
enum Modelled {
    File(u8),
    Directory { opaque: bool },
    Symlink,
    Device,
    Whiteout,
}

/// The layer as a map of whole paths: slow, and obvious. `None`: the step is an error.
#[derive(Debug, Default)]
struct Model(BTreeMap<String, Modelled>);

/// What all links lead to.
const TARGET: &str = "/c/a";

impl Model {
    /// `path` without links on the way to it; one that goes in circles stays as it is.
    fn resolved(&self, path: &str) -> String {
        let mut resolved = path.to_owned();
        for _ in 0..50 {
            let link = resolved
                .match_indices('/')
                .find(|(slash, _)| self.0.get(&resolved[..*slash]) == Some(&Modelled::Symlink));
            let Some((slash, _)) = link else { return resolved };
            resolved = format!("{}{}", &TARGET[1..], &resolved[slash..]);
        }
        path.to_owned()
    }

    fn parents(&mut self, path: &str) -> Option<()> {
        for (slash, _) in path.match_indices('/') {
            let parent = &path[..slash];
            let new = match self.0.get(parent) {
                Some(Modelled::Directory { .. }) => continue,
                Some(Modelled::Whiteout) => Modelled::Directory { opaque: true },
                None => Modelled::Directory { opaque: false },
                Some(_) => return None,
            };
            self.0.insert(parent.into(), new);
        }
        Some(())
    }

    fn replace(&mut self, path: &str, new: Modelled) {
        self.0.retain(|other, _| !other.starts_with(&format!("{path}/")));
        self.0.insert(path.into(), new);
    }

    fn apply(&mut self, step: &Step) -> Option<()> {
        let step = &match step {
            Step::File(path, size) => Step::File(self.resolved(path), *size),
            Step::Directory(path) => Step::Directory(self.resolved(path)),
            Step::Symlink(path) => Step::Symlink(self.resolved(path)),
            Step::Device(path) => Step::Device(self.resolved(path)),
            Step::HardLink(path, target) => Step::HardLink(self.resolved(path), self.resolved(target)),
            Step::Whiteout(path) => Step::Whiteout(self.resolved(path)),
            Step::Opaque(path) => Step::Opaque(self.resolved(&format!("{path}/x"))[..].trim_end_matches("/x").into()),
        };
        let (Step::File(path, _) | Step::Directory(path) | Step::Symlink(path) | Step::Device(path)) = step else {
            return match step {
                Step::Whiteout(path) => {
                    self.parents(path)?;
                    match self.0.get_mut(path) {
                        Some(Modelled::Directory { opaque }) => *opaque = true,
                        Some(Modelled::Device) | None => {
                            self.0.insert(path.clone(), Modelled::Whiteout);
                        }
                        Some(_) => {}
                    }
                    Some(())
                }
                Step::Opaque(path) => {
                    self.parents(&format!("{path}/x"))?;
                    self.0.insert(path.clone(), Modelled::Directory { opaque: true });
                    Some(())
                }
                Step::HardLink(path, target) => {
                    self.parents(path)?;
                    let found = self
                        .0
                        .get(target)
                        .filter(|found| !matches!(found, Modelled::Whiteout | Modelled::Directory { .. }));
                    let found = found?.clone();
                    self.replace(path, found);
                    Some(())
                }
                _ => None,
            };
        };
        self.parents(path)?;
        match (step, self.0.get(path)) {
            (Step::File(_, size), _) => self.replace(path, Modelled::File(*size)),
            (Step::Symlink(_), _) => self.replace(path, Modelled::Symlink),
            (Step::Device(_), _) => self.replace(path, Modelled::Device),
            (_, Some(Modelled::Directory { .. })) => {}
            (_, other) => {
                let opaque = other.is_some();
                self.replace(path, Modelled::Directory { opaque });
            }
        }
        Some(())
    }

    /// Without what an image does not show.
    fn shown(&self) -> BTreeMap<String, Modelled> {
        let hidden = |path: &str| {
            path.match_indices('/').any(|(slash, _)| self.0[&path[..slash]] == Modelled::Directory { opaque: true })
        };
        let shown = |(path, node): &(&String, &Modelled)| match node {
            Modelled::Device => false,
            Modelled::Whiteout => !hidden(path),
            _ => true,
        };
        self.0.iter().filter(shown).map(|(path, node)| (path.clone(), node.clone())).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn trees_are_what_gnu_tar_unpacks(entries in prop::collection::vec(entry(), 1..60)) {
        let archive = archive(&entries);
        tree::assert_same(&Image::new(&archive[..]).judged(), &unpacked(&archive));
    }
}

proptest! {
    #[test]
    fn contradictions_are_settled_as_in_the_model(steps in prop::collection::vec(step(), 0..40)) {
        let (mut archive, mut model, mut refused) = (Archive::default(), Model::default(), false);
        for step in &steps {
            archive = match step {
                Step::File(path, size) => archive.file(path, &vec![1; (*size).into()]),
                Step::Directory(path) => archive.directory(path),
                Step::Symlink(path) => archive.symlink(path, TARGET),
                Step::Device(path) => archive.entry(path, b'3', "", 0o666, b""),
                Step::HardLink(path, target) => archive.hard_link(path, target),
                Step::Whiteout(path) => match path.rsplit_once('/') {
                    Some((parent, name)) => archive.file(&format!("{parent}/.wh.{name}"), b""),
                    None => archive.file(&format!(".wh.{path}"), b""),
                },
                Step::Opaque(path) => archive.file(&format!("{path}/.wh..wh..opq"), b""),
            };
            if model.apply(step).is_none() {
                refused = true;
                break;
            }
        }
        let archive = archive.end();
        match Image::try_new(&archive[..], &LIMITS) {
            Err(error) => prop_assert!(refused, "{}", error),
            Ok(image) => {
                prop_assert!(!refused);
                let shown: BTreeMap<String, Modelled> = image
                    .tree()
                    .into_iter()
                    .filter(|(path, _)| !path.is_empty())
                    .map(|(path, node)| {
                        let opaque = node.xattrs.contains_key(&b"trusted.overlay.opaque"[..]);
                        let modelled = match node.kind {
                            Kind::File { size, .. } => Modelled::File(size as u8),
                            Kind::Symlink(_) => Modelled::Symlink,
                            Kind::Directory => Modelled::Directory { opaque },
                            Kind::Whiteout => Modelled::Whiteout,
                            kind => panic!("{kind:?}"),
                        };
                        (String::from_utf8(path).unwrap(), modelled)
                    })
                    .collect();
                prop_assert_eq!(shown, model.shown());
            }
        }
    }

    /// Archives with some bytes changed, headers with their checksums made right.
    #[test]
    fn damaged_archives_are_refused_or_sound(
        seed in prop::sample::select(vec!["gnu", "pax-0.0", "pax-0.1", "pax-1.0", "pax-global", "ustar", "v7"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let mut archive = std::fs::read(format!("{}/fuzz/seeds/tar_to_erofs/{seed}", env!("CARGO_MANIFEST_DIR"))).unwrap();
        let headers: Vec<usize> =
            (0..archive.len() / 512).map(|block| block * 512).filter(|at| &archive[at + 257..at + 262] == b"ustar").collect();
        for (at, byte) in changes {
            let at = at.index(archive.len());
            archive[at] = byte;
        }
        for at in headers {
            let header = &mut archive[at..at + 512];
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
        match Image::try_new(&archive[..], &LIMITS) {
            Ok(image) => drop(reader::read(&image.bytes()).unwrap()),
            Err(error) => prop_assert!(!error.to_string().contains('\n')),
        }
    }
}
