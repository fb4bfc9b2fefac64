//! `manifest.json` of an archive that `docker save` or `podman save` wrote: which images there are, and which members of
//! the archive are their configs and layers. Described nowhere but in the programs that read and write it (moby's
//! `image/tarexport`, containers' `docker/internal/tarfile`).

#![forbid(unsafe_code)]

use serde::Deserialize;

use crate::image::manifest::{MAX_LAYERS, same_image, shown};

/// An image of the archive.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct DockerImage {
    /// Member of the archive with the image config.
    pub config: String,
    /// `NAME:TAG` each.
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    /// Members of the archive, lowest layer first; at most [`MAX_LAYERS`].
    pub layers: Vec<String>,
}

/// Why there is no image to be had from the archive.
#[derive(Debug, thiserror::Error)]
pub enum DockerArchiveError {
    /// Not JSON, or fields of the wrong type.
    #[error("malformed manifest.json: {0}")]
    Json(#[from] serde_json::Error),
    /// No image with this name.
    #[error("no image called \"{name}\": there is {offered}")]
    NoName {
        /// What was asked for.
        name: String,
        /// What there is.
        offered: String,
    },
    /// Several images.
    #[error("there are several images ({0}): say which one, as in docker-archive:PATH:NAME or docker-archive:PATH:@0")]
    Ambiguous(String),
    /// More layers than an image may have.
    #[error("the image has {0} layers, more than the {MAX_LAYERS} that overlayfs can stack")]
    TooManyLayers(usize),
    /// None at all.
    #[error("the image has no layers: there is nothing to run in it")]
    NoLayers,
}

/// The image called `name` (`NAME[:TAG]`, or `@` and a number), or the only one.
pub fn choose(manifest: &[u8], name: Option<&str>) -> Result<DockerImage, DockerArchiveError> {
    let images: Vec<DockerImage> = serde_json::from_slice(manifest)?;
    let tags = |image: &DockerImage| image.repo_tags.clone().unwrap_or_default();
    let offered = || {
        let names: Vec<String> = images.iter().flat_map(tags).take(12).map(|tag| shown(&tag)).collect();
        if names.is_empty() { format!("{} without a name", images.len()) } else { names.join(", ") }
    };
    let chosen = match name {
        None if images.len() > 1 => return Err(DockerArchiveError::Ambiguous(offered())),
        None => images.first(),
        Some(name) => match name.strip_prefix('@').and_then(|number| number.parse::<usize>().ok()) {
            Some(number) => images.get(number),
            None => images.iter().find(|image| tags(image).iter().any(|tag| same_image(tag, name))),
        },
    };
    match chosen {
        None => Err(DockerArchiveError::NoName { name: shown(name.unwrap_or_default()), offered: offered() }),
        Some(image) if image.layers.is_empty() => Err(DockerArchiveError::NoLayers),
        Some(image) if image.layers.len() > MAX_LAYERS => Err(DockerArchiveError::TooManyLayers(image.layers.len())),
        Some(image) => Ok(image.clone()),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    #[test]
    fn images_are_chosen_by_name() {
        let image =
            |config: &str, tags: serde_json::Value| json!({"Config": config, "RepoTags": tags, "Layers": ["l"]});
        let manifest = json!([
            image("a", json!(["busybox:1", "other/name:2"])),
            image("b", json!(["registry.example:5000/x:latest"])),
            image("c", json!(null)),
        ]);
        let bytes = manifest.to_string();
        for (name, config) in [
            ("busybox:1", "a"),
            ("docker.io/library/busybox:1", "a"),
            ("other/name:2", "a"),
            ("registry.example:5000/x", "b"),
            ("@2", "c"),
        ] {
            assert_eq!(choose(bytes.as_bytes(), Some(name)).unwrap().config, config, "{name}");
        }
        let error = |name| choose(bytes.as_bytes(), name).unwrap_err().to_string();
        assert!(
            error(None).starts_with("there are several images (busybox:1, other/name:2, registry"),
            "{}",
            error(None)
        );
        assert!(error(Some("busybox")).starts_with("no image called \"busybox\": there is busybox:1,"));
        assert!(error(Some("@3")).starts_with("no image called \"@3\""));
        assert_eq!(choose(json!([image("a", json!([]))]).to_string().as_bytes(), None).unwrap().config, "a");
    }

    #[test]
    fn names_what_is_wrong() {
        let layers = |layers: Vec<&str>| json!([{"Config": "a", "Layers": layers}]).to_string();
        for (manifest, expected) in [
            ("{}".to_owned(), "malformed manifest.json"),
            ("[]".into(), "no image called \"\": there is 0 without a name"),
            (layers(vec![]), "no layers"),
            (layers(vec!["x"; 501]), "501 layers"),
            (r#"[{"Config": 1, "Layers": []}]"#.into(), "malformed"),
        ] {
            let error = choose(manifest.as_bytes(), None).unwrap_err().to_string();
            assert!(error.contains(expected) && !error.contains('\n'), "{error}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(bytes in any::<Vec<u8>>()) {
            let _ = choose(&bytes, Some("x"));
        }
    }
}
