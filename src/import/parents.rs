//! Entries below symbolic links of their own layer: `bin -> usr/bin`, then `bin/sh`. Who unpacks a layer entry by entry has
//! the kernel follow such links, and some tools write layers that count on it; so what they mean is followed here, too.
//! Nothing can lead out of the layer: the links are text, and `..` stops at its root.

use std::collections::BTreeMap;

use super::path::components;
use super::tar::{Entry, Kind};

/// Most links on the way to an entry, as for the kernel's own look-ups.
const MAX_LINKS: u32 = 40;
/// Most names that are left to be looked up, links' targets among them.
const MAX_NAMES: usize = 4096;
/// Most bytes of paths and targets that are kept. What is below further links is refused, as below any file.
const MAX_BYTES: usize = 16 << 20;

/// The symbolic links of a layer, as far as it has been read.
#[derive(Debug, Default)]
pub struct ParentLinks {
    targets: BTreeMap<Vec<u8>, Vec<u8>>,
    bytes: usize,
}

impl ParentLinks {
    /// Says where the layer's next entry is, and what a hard link is to, without symbolic links on the way. Paths that
    /// cannot be followed stay as they are.
    pub fn apply(&mut self, entry: &mut Entry) {
        if !self.targets.is_empty() {
            self.follow(&mut entry.path);
            if let Kind::HardLink { target } = &mut entry.kind {
                self.follow(target);
            }
        }
        let target = match &entry.kind {
            Kind::Symlink { target } => Some(target.clone()),
            Kind::HardLink { target } => normalized(target).and_then(|path| self.targets.get(&path).cloned()),
            _ => None,
        };
        if (target.is_some() || !self.targets.is_empty())
            && let Some(path) = normalized(&entry.path)
        {
            if entry.kind != Kind::Directory {
                self.forget_below(&path);
            }
            self.note(path, target);
        }
    }

    /// A directory that is replaced takes its links with it.
    fn forget_below(&mut self, path: &[u8]) {
        let below = [path, b"/"].concat();
        while let Some((found, _)) = self.targets.range::<Vec<u8>, _>(&below..).next()
            && found.starts_with(&below)
        {
            let found = found.clone();
            self.note(found, None);
        }
    }

    /// The entry at `path` is a link to `target`, or no link.
    fn note(&mut self, path: Vec<u8>, target: Option<Vec<u8>>) {
        if let Some(target) = self.targets.remove(&path) {
            self.bytes -= path.len() + target.len();
        }
        if let Some(target) = target
            && self.bytes + path.len() + target.len() <= MAX_BYTES
        {
            self.bytes += path.len() + target.len();
            self.targets.insert(path, target);
        }
    }

    fn follow(&self, path: &mut Vec<u8>) {
        let followed = match components(path).as_deref() {
            Ok([parents @ .., name]) => self.resolve(parents).map(|mut directory| {
                if !directory.is_empty() {
                    directory.push(b'/');
                }
                directory.extend_from_slice(name);
                directory
            }),
            _ => None,
        };
        if let Some(followed) = followed {
            *path = followed;
        }
    }

    /// The directory with the names `parents`; `None` if there is no link on the way to it, or too many.
    fn resolve(&self, parents: &[&[u8]]) -> Option<Vec<u8>> {
        let mut left: Vec<&[u8]> = parents.iter().rev().copied().collect();
        let (mut path, mut links) = (Vec::new(), 0);
        while let Some(name) = left.pop() {
            let parent = path.len();
            match name {
                b"" | b"." => continue,
                b".." => {
                    path.truncate(path.iter().rposition(|&byte| byte == b'/').unwrap_or(0));
                    continue;
                }
                _ if path.is_empty() => path.extend_from_slice(name),
                _ => {
                    path.push(b'/');
                    path.extend_from_slice(name);
                }
            }
            if let Some(target) = self.targets.get(&path) {
                links += 1;
                path.truncate(if target.first() == Some(&b'/') { 0 } else { parent });
                left.extend(target.split(|&byte| byte == b'/').rev());
                if links > MAX_LINKS || left.len() > MAX_NAMES {
                    return None;
                }
            }
        }
        (links > 0).then_some(path)
    }
}

/// `path` as links are kept under; `None` for the root, and for what is no path.
fn normalized(path: &[u8]) -> Option<Vec<u8>> {
    components(path).ok().map(|components| components.join(&b'/')).filter(|path| !path.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(path: &str, kind: Kind) -> Entry {
        Entry { path: path.into(), kind, mode: 0o755, mtime: (0, 0), xattrs: Default::default() }
    }

    fn links(links: &[(&str, &str)]) -> ParentLinks {
        let mut all = ParentLinks::default();
        for (path, target) in links {
            all.apply(&mut entry(path, Kind::Symlink { target: target.as_bytes().to_vec() }));
        }
        all
    }

    #[track_caller]
    fn check(links: &mut ParentLinks, path: &str, expected: &str) {
        let mut file = entry(path, Kind::File { size: 0 });
        links.apply(&mut file);
        assert_eq!(String::from_utf8_lossy(&file.path), expected);
    }

    #[test]
    fn what_is_below_links_is_where_they_lead() {
        let mut all = links(&[("bin", "usr/bin"), ("./usr/lib64", "../lib"), ("lib", "/usr/lib"), ("deep/er", "..")]);
        for (path, expected) in [
            ("bin/sh", "usr/bin/sh"),
            ("./usr/lib64/ld.so", "usr/lib/ld.so"),
            ("/lib/x/y", "usr/lib/x/y"),
            ("deep/er/bin/x", "usr/bin/x"),
            ("deep/er/deep/er/x", "x"),
            // The link itself, and what is not below one.
            ("usr/bin/x", "usr/bin/x"),
            ("./other", "./other"),
        ] {
            check(&mut all, path, expected);
        }
        let mut hard = entry("bin/second", Kind::HardLink { target: b"bin/sh".to_vec() });
        all.apply(&mut hard);
        assert_eq!(hard.path, b"usr/bin/second");
        assert_eq!(hard.kind, Kind::HardLink { target: b"usr/bin/sh".to_vec() });
    }

    #[test]
    fn nothing_leads_out_and_loops_end() {
        let mut all = links(&[("up", "../../../etc"), ("a", "b"), ("b", "a"), ("self", "self/self")]);
        check(&mut all, "up/passwd", "etc/passwd");
        check(&mut all, "a/x", "a/x");
        check(&mut all, "self/x", "self/x");
    }

    #[test]
    fn what_replaces_a_link_counts() {
        let mut all = links(&[("a", "b")]);
        all.apply(&mut entry("a", Kind::Directory));
        check(&mut all, "a/x", "a/x");
        assert_eq!((all.bytes, all.targets.len()), (0, 0));
        let mut all = links(&[("a", "b")]);
        all.apply(&mut entry("c", Kind::HardLink { target: b"a".to_vec() }));
        check(&mut all, "c/x", "b/x");
        let mut all = links(&[("d/a", "b"), ("d/b/a", "b"), ("d.a", "b")]);
        all.apply(&mut entry("d", Kind::Device));
        check(&mut all, "d/a/x", "d/a/x");
        check(&mut all, "d.a/x", "b/x");
    }

    #[test]
    fn memory_is_bounded() {
        let target = "x".repeat(4000);
        let mut all = ParentLinks::default();
        for number in 0..8000 {
            let kind = Kind::Symlink { target: target.clone().into_bytes() };
            all.apply(&mut entry(&format!("link{number}"), kind));
        }
        assert!(all.bytes <= MAX_BYTES && all.targets.len() < 4200, "{}", all.targets.len());
    }
}
