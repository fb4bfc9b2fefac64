//! Images that are on this machine, as users type them: `dockerd://NAME` and `podman://NAME` (behaviour reference,
//! sections 3.3 and 11), and `oci:`, `oci-archive:` and `docker-archive:` with a path (containers-transports(5)).
//!
//! What pyxis takes for a registry's image stays one: `oci:latest` is Docker Hub's, `oci:5000/x` the registry `oci`'s.

#![forbid(unsafe_code)]

use crate::image::reference::{ImageReference, InvalidReference, printable};
use crate::request::{Engine, LocalForm, LocalImage};

/// Most bytes of a name in an engine's storage.
const MAX_NAME: usize = 1024;

/// Parses `text` if it names an image on this machine by a scheme; `None` if it does not. Nothing is looked up.
pub fn parse(text: &str) -> Option<Result<LocalImage, InvalidReference>> {
    for (scheme, engine) in [("dockerd://", Engine::Docker), ("podman://", Engine::Podman)] {
        if let Some(name) = text.strip_prefix(scheme) {
            let error = || InvalidReference::EngineName(printable(text));
            let valid = is_engine_name(name);
            return Some(valid.then(|| LocalImage::Engine { engine, name: name.to_owned() }).ok_or_else(error));
        }
    }
    let forms = [
        ("oci:", LocalForm::Layout),
        ("oci-archive:", LocalForm::OciArchive),
        ("docker-archive:", LocalForm::DockerArchive),
    ];
    let (rest, form) = forms.into_iter().find_map(|(scheme, form)| Some((text.strip_prefix(scheme)?, form)))?;
    if form == LocalForm::Layout && ImageReference::parse(text).is_ok_and(|reference| reference.check().is_ok()) {
        return None;
    }
    let (path, name) = rest.split_once(':').unwrap_or((rest, ""));
    if path.is_empty() || text.contains('\0') {
        return Some(Err(InvalidReference::NoPath(printable(text))));
    }
    let name = (!name.is_empty()).then(|| name.to_owned());
    Some(Ok(LocalImage::Path { path: path.into(), form: Some(form), name }))
}

/// enroot's grammar, less what an engine's command would take for an option.
fn is_engine_name(name: &str) -> bool {
    name.len() <= MAX_NAME
        && name.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._:-".contains(&byte))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn path(path: &str, form: LocalForm, name: Option<&str>) -> LocalImage {
        LocalImage::Path { path: path.into(), form: Some(form), name: name.map(str::to_owned) }
    }

    #[test]
    fn every_form() {
        use LocalForm::{DockerArchive, Layout, OciArchive};
        for (text, image) in [
            ("oci:./dir", path("./dir", Layout, None)),
            ("oci:/a/b:1.0", path("/a/b", Layout, Some("1.0"))),
            ("oci:dir/sub:latest", path("dir/sub", Layout, Some("latest"))),
            ("oci-archive:x.tar", path("x.tar", OciArchive, None)),
            ("oci-archive:/x.tar:", path("/x.tar", OciArchive, None)),
            ("docker-archive:a.tar:busybox:1", path("a.tar", DockerArchive, Some("busybox:1"))),
            ("docker-archive:a.tar:@0", path("a.tar", DockerArchive, Some("@0"))),
            ("dockerd://alpine", LocalImage::Engine { engine: Engine::Docker, name: "alpine".into() }),
            (
                "podman://localhost:5/A_b-c.d:1",
                LocalImage::Engine { engine: Engine::Podman, name: "localhost:5/A_b-c.d:1".into() },
            ),
        ] {
            assert_eq!(parse(text).unwrap().unwrap(), image, "{text}");
        }
    }

    #[test]
    fn what_is_a_registrys_stays_so() {
        for text in ["alpine", "oci:latest", "oci:5000/x", "oci/x", "docker://alpine", "dockerd:1", "podman#x", "dir:x"]
        {
            assert!(parse(text).is_none(), "{text}");
        }
    }

    #[test]
    fn names_what_is_wrong() {
        for (text, reason) in [
            ("dockerd://", "letters"),
            ("dockerd://--help", "letters"),
            ("podman://a@sha256:0", "letters"),
            ("podman://user@a", "letters"),
            ("dockerd://a\nb", "a\\nb"),
            ("oci-archive:", "path"),
            ("docker-archive::x", "path"),
            ("oci:", "path"),
        ] {
            let error = parse(text).unwrap().unwrap_err().to_string();
            assert!(error.starts_with("Invalid image reference: ") && error.contains(reason), "{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in "((oci|oci-archive|docker-archive):|(dockerd|podman)://)?.*") {
            if let Some(Ok(LocalImage::Engine { name, .. })) = parse(&text) {
                prop_assert!(!name.starts_with('-'));
            }
        }
    }
}
