//! What image names without a registry mean, by the administrator: `[short_names]`, and the `[aliases]` and
//! `unqualified-search-registries` of containers-registries.conf(5). Docker Hub, where nothing is said.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::image::reference::{ImageReference, is_docker_hub};

/// `[short_names]`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ShortNames {
    /// `search`: the registries, `HOST[:PORT][/PATH]`, that are asked one after the other; the next one only if a registry
    /// has no such image, or none for this user.
    pub search: Vec<String>,
    /// `aliases`: the whole name, without a tag, for a short one.
    pub aliases: BTreeMap<String, String>,
}

impl ShortNames {
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), String> {
        for (name, target) in &self.aliases {
            if whole(target).is_none() {
                return Err(format!("aliases.\"{}\": expected HOST/IMAGE without a tag", name.escape_debug()));
            }
        }
        match self.search.iter().find(|registry| whole(&format!("{registry}/x")).is_none()) {
            Some(registry) => Err(format!("search: \"{}\": expected HOST[:PORT][/PATH]", registry.escape_debug())),
            None => Ok(()),
        }
    }

    /// The images that `reference` may mean, in order.
    pub fn candidates(&self, reference: &ImageReference) -> Vec<ImageReference> {
        let itself = ImageReference { is_short: false, ..reference.clone() };
        if !reference.is_short {
            return vec![itself];
        }
        let name = reference.repository.strip_prefix("library/").unwrap_or(&reference.repository);
        let of = |found: ImageReference| ImageReference {
            user: reference.user.clone(),
            tag_or_digest: reference.tag_or_digest.clone(),
            is_short: false,
            ..found
        };
        if let Some(target) = self.aliases.get(name).and_then(|target| whole(target)) {
            return vec![of(target)];
        }
        let searched = self.search.iter().filter_map(|registry| match is_docker_hub(registry) {
            true => Some(itself.clone()),
            false => whole(&format!("{registry}/{name}")).map(of),
        });
        let found: Vec<_> = searched.collect();
        if found.is_empty() { vec![itself] } else { found }
    }
}

/// A name with a registry and without a tag.
fn whole(text: &str) -> Option<ImageReference> {
    let reference = ImageReference::parse(text).ok().or_else(|| {
        // `localhost/x` names a registry here.
        ImageReference::parse(&text.replacen('/', "#", 1)).ok()
    })?;
    let plain = reference.tag_or_digest == "latest" && !text.ends_with(":latest") && reference.user.is_none();
    (plain && !reference.is_short && reference.check().is_ok()).then_some(reference)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &ShortNames, typed: &str) -> Vec<String> {
        names.check().unwrap();
        let candidates = names.candidates(&ImageReference::parse(typed).unwrap());
        assert!(candidates.iter().all(|candidate| !candidate.is_short));
        candidates.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn short_names_mean_what_the_administrator_says() {
        let none = ShortNames::default();
        assert_eq!(names(&none, "ubuntu:24.04"), ["docker.io/library/ubuntu:24.04"]);
        let some: ShortNames = toml::from_str(
            "search = [\"docker.io\", \"quay.io/hub\", \"reg.example:5000\"]\n[aliases]\nfedora = \"registry.example/f/fedora\"\n",
        )
        .unwrap();
        assert_eq!(names(&some, "fedora:41"), ["registry.example/f/fedora:41"]);
        assert_eq!(
            names(&some, "nvidia/cuda:1"),
            ["docker.io/nvidia/cuda:1", "quay.io/hub/nvidia/cuda:1", "reg.example:5000/nvidia/cuda:1"]
        );
        assert_eq!(names(&some, "ubuntu")[1], "quay.io/hub/ubuntu:latest");
        // Whoever names a registry means it.
        for typed in ["docker.io/ubuntu", "docker.io#ubuntu", "docker.io/library/ubuntu"] {
            assert_eq!(names(&some, typed), ["docker.io/library/ubuntu:latest"], "{typed}");
        }
        assert_eq!(names(&some, "quay.io/fedora"), ["quay.io/fedora:latest"]);
    }

    #[test]
    fn nonsense_is_named() {
        for (text, message) in [
            ("search = [\"https://x\"]", "search: \"https://x\""),
            ("aliases = { x = \"y\" }", "aliases.\"x\""),
            ("aliases = { x = \"y.io/z:1\" }", "aliases.\"x\""),
        ] {
            let error = toml::from_str::<ShortNames>(text).unwrap().check().unwrap_err();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
