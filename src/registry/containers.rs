//! A site's `registries.conf` (containers-registries.conf(5), version 2), for administrators who have one already:
//! `[[registry]]` with mirrors, short names and aliases. What is about podman's own ways is passed over.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Deserialize;

use super::config::{Mirror, PullFromMirror, RegistryEntry};
use super::names::ShortNames;

/// What one file says.
#[derive(Debug, Default)]
pub struct Registries {
    /// Tables by prefix.
    pub registry: BTreeMap<String, RegistryEntry>,
    /// Short names.
    pub short_names: ShortNames,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct File {
    #[serde(default)]
    unqualified_search_registries: Option<Vec<String>>,
    #[serde(default)]
    registry: Vec<Table>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    /// Version 1.
    registries: Option<toml::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Table {
    prefix: Option<String>,
    location: Option<String>,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
    #[serde(default)]
    mirror_by_digest_only: bool,
    #[serde(default)]
    mirror: Vec<Place>,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Place {
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    pull_from_mirror: PullFromMirror,
}

impl Registries {
    /// Adds what `text` says, which goes before what was there: files are read in order. The error is one line.
    pub fn add(&mut self, text: &str) -> Result<(), String> {
        let file: File = toml::from_str(text).map_err(|error| {
            let line = text[..error.span().map_or(0, |span| span.start.min(text.len()))].matches('\n').count() + 1;
            format!("line {line}: {}", error.message().replace('\n', " "))
        })?;
        if file.registries.is_some() {
            return Err("this is version 1 of the format: rewrite it with [[registry]] tables".into());
        }
        for table in file.registry {
            let prefix = table.prefix.or_else(|| table.location.clone());
            let name = prefix.ok_or("a [[registry]] has neither prefix nor location")?;
            let mirrors = table.mirror.into_iter().map(|place| Mirror {
                location: place.location,
                insecure: place.insecure,
                pull_from_mirror: if table.mirror_by_digest_only {
                    PullFromMirror::DigestOnly
                } else {
                    place.pull_from_mirror
                },
            });
            let entry = RegistryEntry {
                insecure: table.insecure,
                blocked: table.blocked,
                location: table.location.filter(|location| *location != name),
                mirrors: mirrors.collect(),
                ..RegistryEntry::default()
            };
            self.registry.insert(name, entry);
        }
        if let Some(search) = file.unqualified_search_registries {
            self.short_names.search = search;
        }
        // An alias that is empty takes an earlier one away.
        self.short_names.aliases.extend(file.aliases);
        self.short_names.aliases.retain(|_, target| !target.is_empty());
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_podman_reads() {
        let mut all = Registries::default();
        all.add(
            r#"
            unqualified-search-registries = ["registry.fedoraproject.org", "docker.io"]
            short-name-mode = "enforcing"
            credential-helpers = ["containers-auth.json"]
            [[registry]]
            prefix = "example.com/foo"
            location = "internal.example/bar"
            insecure = true
            [[registry.mirror]]
            location = "mirror.example"
            pull-from-mirror = "tag-only"
            [[registry]]
            location = "docker.io"
            mirror-by-digest-only = true
            [[registry.mirror]]
            location = "hub.example"
            insecure = true
            [aliases]
            "fedora" = "registry.fedoraproject.org/fedora"
            "gone" = "x.example/gone"
            "#,
        )
        .unwrap();
        all.add("[[registry]]\nprefix = \"bad.example\"\nblocked = true\n[aliases]\n\"gone\" = \"\"\n").unwrap();
        let foo = &all.registry["example.com/foo"];
        assert_eq!((foo.location.as_deref(), foo.insecure), (Some("internal.example/bar"), true));
        assert_eq!(foo.mirrors[0].pull_from_mirror, PullFromMirror::TagOnly);
        let hub = &all.registry["docker.io"];
        assert!(hub.location.is_none() && hub.mirrors[0].insecure);
        assert_eq!(hub.mirrors[0].pull_from_mirror, PullFromMirror::DigestOnly);
        assert!(all.registry["bad.example"].blocked);
        assert_eq!(all.short_names.search.len(), 2);
        assert_eq!(all.short_names.aliases.keys().collect::<Vec<_>>(), ["fedora"]);
    }

    #[test]
    fn says_what_is_wrong() {
        for (text, message) in [
            ("x", "line 1: "),
            ("\n[[registry]]\ninsecure = 1\n", "line 3: "),
            ("[[registry]]\n", "neither prefix nor location"),
            ("[registries.search]\nregistries = []\n", "version 1"),
        ] {
            let error = Registries::default().add(text).unwrap_err();
            assert!(error.contains(message) && !error.contains('\n'), "{error}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in any::<String>()) {
            let _ = Registries::default().add(&text);
        }
    }
}
