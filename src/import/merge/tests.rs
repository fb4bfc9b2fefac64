//! Compared with a model that does the same the other way round: it works out the tree of each layer and lays them over
//! each other from the lowest up.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

const LIMITS: LayerLimits = LayerLimits { max_bytes: 1 << 20, max_entries: 10_000 };

/// An inode of either tree. Equal numbers are one file.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Node {
    Directory(u16),
    File(usize, String),
    Symlink(usize, String),
    Device,
}

type Nodes = BTreeMap<String, Node>;

fn below<'a>(nodes: &'a Nodes, path: &str) -> Vec<&'a String> {
    let prefix = format!("{path}/");
    nodes.keys().filter(|key| path.is_empty() && !key.is_empty() || key.starts_with(&prefix)).collect()
}

fn remove(nodes: &mut Nodes, path: &str) {
    for key in below(nodes, path).into_iter().cloned().collect::<Vec<_>>() {
        nodes.remove(&key);
    }
    nodes.remove(path);
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn parent(path: &str) -> Option<&str> {
    path.rsplit_once('/').map(|(parent, _)| parent)
}

/// A sink that insists on what [`Sink`] promises.
#[derive(Debug, Default)]
struct Memory {
    nodes: Nodes,
    made: usize,
    read: u64,
}

impl Memory {
    fn make(&mut self, path: &[u8], node: Node) -> Result<(), LayerError> {
        let path = text(path);
        if let Some(parent) = parent(&path) {
            assert!(matches!(self.nodes.get(parent), Some(Node::Directory(_))), "{path}");
        }
        assert!(
            !path.is_empty() && !path.starts_with('/') && self.nodes.insert(path.clone(), node).is_none(),
            "{path}"
        );
        self.made += 1;
        Ok(())
    }
}

impl Sink for Memory {
    fn directory(&mut self, path: &[u8]) -> Result<(), LayerError> {
        self.make(path, Node::Directory(0o700))
    }

    fn file(&mut self, path: &[u8], _: &Attributes, content: Content<'_>) -> Result<(), LayerError> {
        let mut bytes = vec![0; content.size as usize];
        self.read += content.size;
        for extent in content.extents {
            let (start, end) = (extent.offset as usize, (extent.offset + extent.length) as usize);
            (content.read)(&mut bytes[start..end])?;
        }
        self.make(path, Node::File(self.made, text(&bytes)))
    }

    fn symlink(&mut self, path: &[u8], _: &Attributes, target: &[u8]) -> Result<(), LayerError> {
        self.make(path, Node::Symlink(self.made, text(target)))
    }

    fn fifo(&mut self, path: &[u8], _: &Attributes) -> Result<(), LayerError> {
        self.make(path, Node::File(self.made, "fifo".into()))
    }

    fn link(&mut self, existing: &[u8], path: &[u8]) -> Result<(), LayerError> {
        let node = self.nodes[&text(existing)].clone();
        assert!(!matches!(node, Node::Directory(_)));
        self.make(path, node)
    }

    fn remove(&mut self, path: &[u8]) -> Result<(), LayerError> {
        let path = text(path);
        assert!(self.nodes.contains_key(&path), "{path}");
        remove(&mut self.nodes, &path);
        Ok(())
    }

    fn attributes(&mut self, path: &[u8], attributes: &Attributes) -> Result<(), LayerError> {
        if !path.is_empty() {
            assert!(matches!(self.nodes.get(&text(path)), Some(Node::Directory(_))));
        }
        self.nodes.insert(text(path), Node::Directory(attributes.mode));
        Ok(())
    }
}

/// An entry of a generated layer.
#[derive(Debug, Clone)]
enum Step {
    Directory(String, u16),
    File(String, String),
    Symlink(String),
    Device(String),
    /// To an earlier path, chosen by number.
    Link(String, usize),
    Whiteout(String, String),
    Opaque(String),
}

fn header(path: &str, flag: u8, mode: u16, size: usize, link: &str) -> [u8; 512] {
    let mut header = [0u8; 512];
    header[..path.len()].copy_from_slice(path.as_bytes());
    header[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
    header[124..135].copy_from_slice(format!("{size:011o}").as_bytes());
    header[136..147].copy_from_slice(b"00000000000");
    header[156] = flag;
    header[157..157 + link.len()].copy_from_slice(link.as_bytes());
    header[257..263].copy_from_slice(b"ustar\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().map(|&byte| u32::from(byte)).sum();
    header[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
    header
}

#[derive(Debug, Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn add(&mut self, path: &str, flag: u8, mode: u16, link: &str) {
        self.0.extend(header(path, flag, mode, 0, link));
    }

    fn file(&mut self, path: &str, content: &str) {
        self.0.extend(header(path, b'0', 0o644, content.len(), ""));
        self.0.extend(content.as_bytes());
        self.0.resize(self.0.len().next_multiple_of(512), 0);
    }
}

/// What one layer says.
#[derive(Debug, Default)]
struct Model {
    nodes: Nodes,
    /// Directories that were described, rather than implied.
    described: BTreeSet<String>,
    opaque: BTreeSet<String>,
    hidden: BTreeSet<String>,
    /// Paths of links, and what they lead to. They stay as they are: what a link means whose target is replaced later is
    /// tested below.
    linked: BTreeSet<String>,
}

impl Model {
    /// Whether the directories on the way to `path` can be there; they are then.
    fn enter(&mut self, path: &str) -> bool {
        let Some(above) = parent(path) else { return true };
        if !self.enter(above) {
            return false;
        }
        match self.nodes.get(above) {
            Some(Node::Directory(_)) => true,
            Some(Node::Device) => {
                self.nodes.insert(above.into(), Node::Directory(0o755));
                // What was there hid the directory that lower layers may have.
                self.opaque.insert(above.into());
                self.described.insert(above.into());
                true
            }
            Some(_) => false,
            None => {
                self.nodes.insert(above.into(), Node::Directory(0o755));
                true
            }
        }
    }

    fn set(&mut self, path: &str, node: Node) {
        remove(&mut self.nodes, path);
        self.described.retain(|other| other != path && !other.starts_with(&format!("{path}/")));
        self.nodes.insert(path.into(), node);
    }

    /// Applies a step, if it is one that a layer can have, and writes it down.
    fn apply(&mut self, step: &Step, number: usize, tar: &mut Tar) {
        let (path, whole) = match step {
            Step::Directory(path, _) | Step::File(path, _) | Step::Symlink(path) => (path, path.clone()),
            Step::Device(path) | Step::Link(path, _) => (path, path.clone()),
            Step::Whiteout(directory, name) => (directory, format!("{directory}/{name}")),
            Step::Opaque(directory) => (directory, format!("{directory}/x")),
        };
        let linkable: Vec<(String, Node)> = self
            .nodes
            .iter()
            .filter(|(other, node)| *other != path && !matches!(node, Node::Directory(_) | Node::Device))
            // Which this does not replace.
            .filter(|(other, _)| !other.starts_with(&format!("{path}/")) && !path.starts_with(&format!("{other}/")))
            .map(|(other, node)| (other.clone(), node.clone()))
            .collect();
        let replaces = !matches!(step, Step::Whiteout(..) | Step::Opaque(_));
        if replaces && self.linked.iter().any(|linked| linked == path || linked.starts_with(&format!("{path}/"))) {
            return;
        }
        if matches!(step, Step::Link(..)) && linkable.is_empty() || !self.enter(&whole) {
            return;
        }
        match step {
            Step::Directory(_, mode) => {
                match self.nodes.get(path) {
                    Some(Node::Directory(_)) => drop(self.nodes.insert(path.clone(), Node::Directory(*mode))),
                    Some(_) => {
                        self.set(path, Node::Directory(*mode));
                        self.opaque.insert(path.clone());
                    }
                    None => self.set(path, Node::Directory(*mode)),
                }
                self.described.insert(path.clone());
                tar.add(path, b'5', *mode, "");
            }
            Step::File(_, content) => {
                self.set(path, Node::File(number, content.clone()));
                tar.file(path, content);
            }
            Step::Symlink(_) => {
                self.set(path, Node::Symlink(number, "to/somewhere".into()));
                tar.add(path, b'2', 0o777, "to/somewhere");
            }
            Step::Device(_) => {
                self.set(path, Node::Device);
                tar.add(path, b'3', 0o666, "");
            }
            Step::Link(_, index) => {
                let (other, node) = &linkable[index % linkable.len()];
                self.linked.extend([path.clone(), other.clone()]);
                self.set(path, node.clone());
                tar.add(path, b'1', 0o644, other);
            }
            Step::Whiteout(directory, name) => {
                self.hidden.insert(format!("{directory}/{name}"));
                tar.add(&format!("{directory}/.wh.{name}"), b'0', 0o644, "");
            }
            Step::Opaque(directory) => {
                self.opaque.insert(directory.clone());
                tar.add(&format!("{directory}/.wh..wh..opq"), b'0', 0o644, "");
            }
        }
    }

    fn lay_over(self, lower: &mut Nodes) {
        for path in &self.hidden {
            remove(lower, path);
        }
        for path in &self.opaque {
            for key in below(lower, path).into_iter().cloned().collect::<Vec<_>>() {
                lower.remove(&key);
            }
        }
        for (path, node) in self.nodes {
            match (&node, lower.get(&path)) {
                (Node::Directory(_), Some(Node::Directory(_))) if !self.described.contains(&path) => {}
                (Node::Directory(_), Some(Node::Directory(_)) | None) => drop(lower.insert(path, node)),
                (Node::Device, _) => remove(lower, &path),
                _ => {
                    remove(lower, &path);
                    lower.insert(path, node);
                }
            }
        }
    }
}

/// With inode numbers in the order of paths, so that equal trees are equal.
fn renumbered(nodes: &Nodes) -> Nodes {
    let mut numbers = BTreeMap::new();
    let mut number = |old: usize| {
        let next = numbers.len();
        *numbers.entry(old).or_insert(next)
    };
    let node = |node: &Node, number: &mut dyn FnMut(usize) -> usize| match node {
        Node::File(old, content) => Node::File(number(*old), content.clone()),
        Node::Symlink(old, target) => Node::Symlink(number(*old), target.clone()),
        other => other.clone(),
    };
    let nodes = nodes.iter().filter(|(path, _)| !path.is_empty());
    nodes.map(|(path, found)| (path.clone(), node(found, &mut number))).collect()
}

fn merged(tars: &[Tar]) -> Result<Memory, LayerError> {
    let mut merge = Merge::new(Memory::default(), LIMITS);
    for tar in tars.iter().rev() {
        if merge.layer(&tar.0[..])? {
            merge.links(&tar.0[..])?;
        }
    }
    merge.finish()
}

fn name() -> impl Strategy<Value = String> {
    prop::sample::select(vec!["a", "b", "c"]).prop_map(str::to_owned)
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(name(), 1..4).prop_map(|names| format!("top/{}", names.join("/")))
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (path(), prop::sample::select(vec![0o755, 0o711, 0o700])).prop_map(|(path, mode)| Step::Directory(path, mode)),
        4 => (path(), "[a-z]{0,4}").prop_map(|(path, content)| Step::File(path, content)),
        1 => path().prop_map(Step::Symlink),
        1 => path().prop_map(Step::Device),
        3 => (path(), any::<usize>()).prop_map(|(path, index)| Step::Link(path, index)),
        2 => (path(), name()).prop_map(|(path, name)| Step::Whiteout(path, name)),
        1 => path().prop_map(Step::Opaque),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn it_is_the_same_from_above_as_from_below(layers in prop::collection::vec(prop::collection::vec(step(), 0..10), 1..4)) {
        let (mut expected, mut tars, mut number) = (Nodes::new(), Vec::new(), 0);
        for steps in &layers {
            let (mut model, mut tar) = (Model::default(), Tar::default());
            for step in steps {
                number += 1;
                model.apply(step, number, &mut tar);
            }
            model.lay_over(&mut expected);
            tars.push(tar);
        }
        let merged = merged(&tars).map_err(|error| TestCaseError::fail(format!("{error}: {layers:#?}")))?;
        prop_assert_eq!(renumbered(&merged.nodes), renumbered(&expected), "{:#?}", layers);
    }

    #[test]
    fn any_names_are_judged(layers in prop::collection::vec(prop::collection::vec(
        (prop::sample::select(vec!["a", "a/b", "dev/a", "dev", ".wh.a", "a/.wh..wh..opq", ".wh..wh.plnk/x", "../x", ".", ""]),
         prop::sample::select(b"012356".to_vec()),
         prop::sample::select(vec!["a", "dev/a", ".wh..wh.plnk/x", "a/b", "/", ".."])), 0..8), 1..3)) {
        let tars: Vec<Tar> = layers.iter().map(|entries| {
            let mut tar = Tar::default();
            for (path, flag, link) in entries {
                tar.add(path, *flag, 0o644, link);
            }
            tar
        }).collect();
        if let Err(error) = merged(&tars) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }
}

#[test]
fn what_is_hidden_is_not_written() {
    let (mut lower, mut upper) = (Tar::default(), Tar::default());
    lower.file("etc/changed", "old content");
    lower.file("etc/gone", "old content");
    lower.file("opaque/old", "old content");
    upper.file("etc/changed", "new");
    upper.add("etc/.wh.gone", b'0', 0o644, "");
    upper.add("opaque/.wh..wh..opq", b'0', 0o644, "");
    let merged = merged(&[lower, upper]).unwrap();
    assert_eq!(merged.read, 3);
}

#[test]
fn devices_are_left_out_and_links_to_them_work() {
    let mut tar = Tar::default();
    tar.file("dev/file", "in dev");
    tar.add("dev/null", b'3', 0o666, "");
    tar.file(".wh..wh.plnk/1.2", "aufs");
    tar.add("from-dev", b'1', 0o644, "dev/file");
    tar.add("again", b'1', 0o644, "from-dev");
    tar.add("from-aufs", b'1', 0o644, "./.wh..wh.plnk/1.2");
    let merged = merged(&[tar]).unwrap();
    let names: Vec<&str> = merged.nodes.keys().map(String::as_str).collect();
    assert_eq!(names, ["", "again", "from-aufs", "from-dev"]);
    assert_eq!(merged.nodes["again"], merged.nodes["from-dev"]);
    assert!(matches!(&merged.nodes["from-aufs"], Node::File(_, content) if content == "aufs"));
}

#[test]
fn a_link_is_to_what_was_there_when_it_was_made() {
    let (mut lower, mut upper) = (Tar::default(), Tar::default());
    upper.file("file", "upper");
    for content in ["one", "two", "three"] {
        lower.file("file", content);
        lower.add(&format!("link-{content}"), b'1', 0o644, "file");
    }
    let merged = merged(&[lower, upper]).unwrap();
    for content in ["one", "two", "three"] {
        let node = &merged.nodes[&format!("link-{content}")];
        assert!(matches!(node, Node::File(_, found) if found == content), "{content}: {node:?}");
    }
}

#[test]
fn a_link_to_nothing_is_named() {
    let mut tar = Tar::default();
    tar.add("link", b'1', 0o644, "nowhere");
    let error = merged(&[tar]).unwrap_err().to_string();
    assert_eq!(
        error,
        "malformed layer: entry \"link\": hard link to \"nowhere\", which is not among the entries before it"
    );
}

#[test]
fn our_own_files_go_where_links_lead() {
    let mut tar = Tar::default();
    tar.add("etc", b'2', 0o777, "/usr/etc/");
    tar.add("usr/etc/loop", b'2', 0o777, "loop");
    tar.file("usr/etc/rc", "the image's");
    tar.file("usr/etc/fstab/file", "");
    tar.add("work", b'2', 0o777, "a/../../b");
    let mut merge = Merge::new(Memory::default(), LIMITS);
    assert!(!merge.layer(&tar.0[..]).unwrap());
    merge.put(b"/etc/rc", 0o755, b"ours").unwrap();
    merge.put(b"etc/fstab", 0o644, b"").unwrap();
    merge.ensure_directory(b"/work/below").unwrap();
    assert!(merge.put(b"etc/loop/x", 0o644, b"").is_err());
    let nodes = merge.finish().unwrap().nodes;
    assert!(matches!(&nodes["usr/etc/rc"], Node::File(_, content) if content == "ours"));
    assert!(matches!(&nodes["usr/etc/fstab"], Node::File(_, content) if content.is_empty()));
    assert!(matches!(&nodes["b/below"], Node::Directory(0o755)));
    assert!(!nodes.contains_key("usr/etc/fstab/file"));
}
