//! `--container-mounts`: `SRC[:DST[:FLAGS]][,…]` (behaviour reference, section 3.4). A pure parser: nothing is looked up.
//!
//! There is no escaping: paths hold neither `,` nor `:`, flags neither `,` nor `+` (which stands for the comma of an
//! fstab line).

#![forbid(unsafe_code)]

use serde::{Deserialize, Serialize};

/// One mount as the user asked for it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountSpec {
    /// A path that begins with `.` or `/`, `tmpfs` or `umount`.
    pub source: String,
    /// A path that begins with `.` or `/`, inside the container.
    pub target: String,
    /// fstab options in order, defaults first: `x-create=auto`, `rbind`, `ro`, …
    pub options: Vec<String>,
}

/// Why a text is no list of mounts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidMounts {
    /// An item is empty or lacks its source or target.
    #[error("--container-mounts: invalid format: {0}")]
    Format(String),
    /// The source of one item is neither a path nor one of the two words.
    #[error(
        "mount source must be a relative path, an absolute path, \"tmpfs\" or \"umount\": \
         could not add mount entry: {from}:{to}"
    )]
    Source {
        /// The item's source.
        from: String,
        /// The item's target.
        to: String,
    },
    /// The target of one item is no path.
    #[error("mount target must be a relative path or an absolute path: could not add mount entry: {from}:{to}")]
    Target {
        /// The item's source.
        from: String,
        /// The item's target.
        to: String,
    },
}

impl MountSpec {
    /// Parses a whole `--container-mounts` argument. Of identical items one is kept.
    pub fn parse_list(text: &str) -> Result<Vec<Self>, InvalidMounts> {
        let mut mounts = Vec::new();
        for item in text.split(',') {
            let mount = Self::parse(item, text)?;
            if !mounts.contains(&mount) {
                mounts.push(mount);
            }
        }
        Ok(mounts)
    }

    fn parse(item: &str, list: &str) -> Result<Self, InvalidMounts> {
        let mut parts = item.splitn(3, ':');
        let source = parts.next().unwrap_or_default();
        let target = parts.next().unwrap_or(source);
        if source.is_empty() || target.is_empty() {
            return Err(InvalidMounts::Format(list.to_owned()));
        }
        let defaults: &[&str] = match source {
            _ if is_path(source) => &["x-create=auto", "rbind"],
            "tmpfs" => &["x-create=dir"],
            "umount" => &["x-detach"],
            _ => return Err(InvalidMounts::Source { from: source.to_owned(), to: target.to_owned() }),
        };
        if !is_path(target) {
            return Err(InvalidMounts::Target { from: source.to_owned(), to: target.to_owned() });
        }
        let flags = parts.next().unwrap_or_default().split('+').filter(|flag| !flag.is_empty());
        let options = defaults.iter().copied().chain(flags).map(str::to_owned).collect();
        Ok(Self { source: source.to_owned(), target: target.to_owned(), options })
    }
}

fn is_path(text: &str) -> bool {
    text.starts_with(['/', '.'])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mount(source: &str, target: &str, options: &[&str]) -> MountSpec {
        MountSpec {
            source: source.into(),
            target: target.into(),
            options: options.iter().map(|&option| option.into()).collect(),
        }
    }

    #[test]
    fn items_and_their_defaults() {
        let bind = &["x-create=auto", "rbind"][..];
        for (text, expected) in [
            ("/a", mount("/a", "/a", bind)),
            ("/a:/b", mount("/a", "/b", bind)),
            ("/a:/b:", mount("/a", "/b", bind)),
            ("./a:/b:ro", mount("./a", "/b", &["x-create=auto", "rbind", "ro"])),
            ("/a:/b:ro+nosuid", mount("/a", "/b", &["x-create=auto", "rbind", "ro", "nosuid"])),
            ("/a:/b:x-create=dir:z", mount("/a", "/b", &["x-create=auto", "rbind", "x-create=dir:z"])),
            ("./", mount("./", "./", bind)),
            ("../a:../b", mount("../a", "../b", bind)),
            ("tmpfs:/scratch:size=1G+mode=700", mount("tmpfs", "/scratch", &["x-create=dir", "size=1G", "mode=700"])),
            ("umount:/mnt", mount("umount", "/mnt", &["x-detach"])),
            ("/with blank\t:/x y", mount("/with blank\t", "/x y", bind)),
        ] {
            assert_eq!(MountSpec::parse_list(text), Ok(vec![expected]), "{text}");
        }
    }

    #[test]
    fn lists_keep_their_order_and_drop_identical_items() {
        let mounts = MountSpec::parse_list("/b:/x,/a:/x,/b:/x,/b:/x:ro").unwrap();
        let shown: Vec<_> = mounts.iter().map(|mount| (&*mount.source, mount.options.len())).collect();
        assert_eq!(shown, [("/b", 2), ("/a", 2), ("/b", 3)]);
    }

    #[test]
    fn malformed_items_are_named() {
        for text in ["", ",", "/a,", ",/a", ":", ":x", ":/x", "/tmp:", "/tmp::ro", "/a:/b,,/c"] {
            assert_eq!(MountSpec::parse_list(text), Err(InvalidMounts::Format(text.into())), "{text}");
        }
        for (text, expected) in [
            (
                "devpts:/x",
                "mount source must be a relative path, an absolute path, \"tmpfs\" or \"umount\": \
                 could not add mount entry: devpts:/x",
            ),
            (
                "/ok,a",
                "mount source must be a relative path, an absolute path, \"tmpfs\" or \"umount\": \
                 could not add mount entry: a:a",
            ),
            ("/a:b:ro", "mount target must be a relative path or an absolute path: could not add mount entry: /a:b"),
            (
                "tmpfs",
                "mount target must be a relative path or an absolute path: could not add mount entry: tmpfs:tmpfs",
            ),
        ] {
            assert_eq!(MountSpec::parse_list(text).unwrap_err().to_string(), expected);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in ".*") {
            if let Ok(mounts) = MountSpec::parse_list(&text) {
                for mount in mounts {
                    prop_assert!(is_path(&mount.target));
                    prop_assert!(is_path(&mount.source) || ["tmpfs", "umount"].contains(&&*mount.source));
                }
            }
        }

        #[test]
        fn what_is_written_is_read(
            items in proptest::collection::vec(("[./][a-z ]{0,9}", "[./][a-z]{0,9}", "[a-z=]{1,9}"), 1..5),
        ) {
            let text = items.iter().map(|(s, t, o)| format!("{s}:{t}:{o}")).collect::<Vec<_>>().join(",");
            let mut expected: Vec<MountSpec> = Vec::new();
            for (source, target, option) in &items {
                let mount = mount(source, target, &["x-create=auto", "rbind", option]);
                if !expected.contains(&mount) {
                    expected.push(mount);
                }
            }
            prop_assert_eq!(MountSpec::parse_list(&text), Ok(expected));
        }
    }
}
