//! The image config (OCI image-spec, config.md; Docker's is the same document): diffIDs, and what a container of the
//! image starts with.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::fmt;

use serde::de::value::SeqAccessDeserializer;
use serde::de::{self, IgnoredAny, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use crate::image::digest::{Digest, InvalidDigest};
use crate::image::manifest::MAX_LAYERS;

/// Most bytes of an image config.
pub const MAX_CONFIG_BYTES: u64 = 8 * 1024 * 1024;

/// What a container of an image starts with. Every text is free of NUL bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ImageConfig {
    /// CPU architecture, in Go's names; empty if the config has none.
    pub architecture: String,
    /// Operating system; empty if the config has none.
    pub os: String,
    /// Digests of the uncompressed layers, lowest first.
    pub diff_ids: Vec<Digest>,
    /// `User`; empty if none.
    pub user: String,
    /// `Env`: `NAME=VALUE`, in order.
    pub env: Vec<String>,
    /// `Entrypoint`.
    pub entrypoint: Vec<String>,
    /// `Cmd`.
    pub cmd: Vec<String>,
    /// `WorkingDir`; empty if none.
    pub working_dir: String,
    /// `Volumes`: paths, sorted.
    pub volumes: Vec<String>,
    /// `Labels`.
    pub labels: BTreeMap<String, String>,
}

/// Why bytes are no image config.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// Longer than [`MAX_CONFIG_BYTES`].
    #[error("image config of {0} bytes: the limit is {MAX_CONFIG_BYTES}")]
    TooLarge(usize),
    /// Not JSON, or fields of the wrong type.
    #[error("malformed image config: {0}")]
    Json(#[from] serde_json::Error),
    /// A diffID of the wrong form.
    #[error("malformed image config: {0}")]
    DiffId(#[from] InvalidDigest),
    /// More diffIDs than an image may have layers.
    #[error("malformed image config: {0} diffIDs")]
    TooManyLayers(usize),
    /// A NUL byte, which no environment, argument or path can hold.
    #[error("malformed image config: NUL byte in {0}")]
    Nul(&'static str),
}

#[derive(Deserialize)]
struct Raw {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
    #[serde(default)]
    config: Option<RawRun>,
    rootfs: RawRootfs,
}

#[derive(Deserialize)]
struct RawRootfs {
    #[serde(default)]
    diff_ids: Option<Vec<String>>,
}

/// Absent, `null` and empty are the same thing here: builders write all three.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default)]
struct RawRun {
    user: Option<String>,
    env: Option<Vec<String>>,
    entrypoint: Option<Words>,
    cmd: Option<Words>,
    working_dir: Option<String>,
    volumes: Option<BTreeMap<String, IgnoredAny>>,
    labels: Option<BTreeMap<String, Option<String>>>,
}

/// A command: a list, or in old images one word. Read without the copy in memory that serde's untagged enums make, which
/// is many times the size of the document.
#[derive(Default)]
struct Words(Vec<String>);

impl<'de> Deserialize<'de> for Words {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct WordsVisitor;

        impl<'de> Visitor<'de> for WordsVisitor {
            type Value = Words;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of words")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<Words, E> {
                Ok(Words(vec![word.to_owned()]))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, words: A) -> Result<Words, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(words)).map(Words)
            }
        }

        deserializer.deserialize_any(WordsVisitor)
    }
}

impl ImageConfig {
    /// The config of a root filesystem: nothing but defaults if it has none, as one that enroot made, whose own files say
    /// what there is to know.
    pub fn of_root(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.is_empty() { Ok(Self::default()) } else { Self::parse(bytes) }
    }

    /// Reads an image config.
    pub fn parse(bytes: &[u8]) -> Result<Self, ConfigError> {
        if bytes.len() as u64 > MAX_CONFIG_BYTES {
            return Err(ConfigError::TooLarge(bytes.len()));
        }
        let raw: Raw = serde_json::from_slice(bytes)?;
        let diff_ids = raw.rootfs.diff_ids.unwrap_or_default();
        if diff_ids.len() > MAX_LAYERS {
            return Err(ConfigError::TooManyLayers(diff_ids.len()));
        }
        let run = raw.config.unwrap_or_default();
        let config = Self {
            architecture: raw.architecture.unwrap_or_default(),
            os: raw.os.unwrap_or_default(),
            diff_ids: diff_ids.iter().map(|text| text.parse()).collect::<Result<_, _>>()?,
            user: run.user.unwrap_or_default(),
            env: run.env.unwrap_or_default(),
            entrypoint: run.entrypoint.unwrap_or_default().0,
            cmd: run.cmd.unwrap_or_default().0,
            working_dir: run.working_dir.unwrap_or_default(),
            volumes: run.volumes.unwrap_or_default().into_keys().collect(),
            labels: run
                .labels
                .unwrap_or_default()
                .into_iter()
                .map(|(key, value)| (key, value.unwrap_or_default()))
                .collect(),
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let one = |name, text: &str| if text.contains('\0') { Err(ConfigError::Nul(name)) } else { Ok(()) };
        let all = |name, texts: &[String]| texts.iter().try_for_each(|text| one(name, text));
        one("architecture", &self.architecture)?;
        one("os", &self.os)?;
        one("User", &self.user)?;
        all("Env", &self.env)?;
        all("Entrypoint", &self.entrypoint)?;
        all("Cmd", &self.cmd)?;
        one("WorkingDir", &self.working_dir)?;
        all("Volumes", &self.volumes)?;
        self.labels.iter().try_for_each(|(key, value)| one("Labels", key).and_then(|()| one("Labels", value)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn parse(value: &Value) -> Result<ImageConfig, ConfigError> {
        ImageConfig::parse(value.to_string().as_bytes())
    }

    fn full() -> Value {
        json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "User": "1000:1000",
                "Env": ["PATH=/bin", "A=b=c", "MULTI=line\nbreak"],
                "Entrypoint": ["/bin/sh", "-c"],
                "Cmd": "top",
                "WorkingDir": "/work",
                "Volumes": {"/b": {}, "/a": null},
                "Labels": {"x": "y", "empty": null},
                "ExposedPorts": {"80/tcp": {}},
                "OnBuild": null
            },
            "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{}", "0".repeat(64))]},
            "history": [{"created_by": "x", "empty_layer": true}]
        })
    }

    /// oci-spec is strict; real configs have `null` and a string where the specification has a list.
    #[test]
    fn reads_what_oci_spec_reads() {
        let mut strict = full();
        strict["config"]["Cmd"] = json!(["top"]);
        strict["config"]["Volumes"] = json!({"/b": {}, "/a": {}});
        strict["config"]["Labels"] = json!({"x": "y"});
        let judge: oci_spec::image::ImageConfiguration = serde_json::from_value(strict.clone()).unwrap();
        let ours = parse(&strict).unwrap();
        let judged = judge.config().clone().unwrap();
        assert_eq!(ours.architecture, judge.architecture().to_string());
        assert_eq!(ours.os, judge.os().to_string());
        assert_eq!(Some(&ours.env), judged.env().as_ref());
        assert_eq!(Some(&ours.entrypoint), judged.entrypoint().as_ref());
        assert_eq!(Some(&ours.cmd), judged.cmd().as_ref());
        assert_eq!(Some(&ours.working_dir), judged.working_dir().as_ref());
        assert_eq!(Some(&ours.user), judged.user().as_ref());
        let diff_ids: Vec<_> = ours.diff_ids.iter().map(Digest::to_string).collect();
        assert_eq!(&diff_ids, judge.rootfs().diff_ids());
    }

    #[test]
    fn reads_what_a_container_needs() {
        let config = parse(&full()).unwrap();
        assert_eq!(config.architecture, "amd64");
        assert_eq!(config.user, "1000:1000");
        assert_eq!(config.env, ["PATH=/bin", "A=b=c", "MULTI=line\nbreak"]);
        assert_eq!(config.entrypoint, ["/bin/sh", "-c"]);
        assert_eq!(config.cmd, ["top"]);
        assert_eq!(config.working_dir, "/work");
        assert_eq!(config.volumes, ["/a", "/b"]);
        assert_eq!(config.labels["x"], "y");
        assert_eq!(config.labels["empty"], "");
        assert_eq!(config.diff_ids.len(), 1);
    }

    #[test]
    fn absent_null_and_empty_are_the_same() {
        let rootfs = json!({"diff_ids": []});
        let expected = parse(&json!({"rootfs": rootfs})).unwrap();
        assert_eq!(expected, ImageConfig::default());
        for config in [
            json!(null),
            json!({}),
            json!({"Env": null, "Cmd": null, "Volumes": null, "User": null, "Labels": null}),
            json!({"Env": [], "Cmd": [], "Volumes": {}, "User": "", "Labels": {}}),
        ] {
            assert_eq!(parse(&json!({"rootfs": rootfs, "config": config})).unwrap(), expected, "{config}");
        }
    }

    #[test]
    fn names_what_is_wrong() {
        let mut nul = full();
        nul["config"]["Env"][0] = "A=\0".into();
        let mut number = full();
        number["config"]["Env"][0] = 7.into();
        let mut command = full();
        command["config"]["Cmd"] = json!({"a": "b"});
        let mut short = full();
        short["rootfs"]["diff_ids"][0] = "sha256:ab".into();
        let mut many = full();
        many["rootfs"]["diff_ids"] = vec![full()["rootfs"]["diff_ids"][0].clone(); 501].into();
        for (value, message) in [
            (nul, "NUL byte in Env"),
            (number, "invalid type: integer"),
            (command, "expected a list of words"),
            (short, "invalid digest"),
            (many, "501 diffIDs"),
            (json!({}), "missing field `rootfs`"),
            (json!(null), "malformed image config"),
        ] {
            let error = parse(&value).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
        let large = vec![b' '; MAX_CONFIG_BYTES as usize + 1];
        assert!(matches!(ImageConfig::parse(&large), Err(ConfigError::TooLarge(_))));
    }

    proptest! {
        #[test]
        fn never_panics(bytes in any::<Vec<u8>>()) {
            let _ = ImageConfig::parse(&bytes);
        }

        #[test]
        fn survives_damage(at in 0usize..600, byte in any::<u8>()) {
            let mut bytes = full().to_string().into_bytes();
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = ImageConfig::parse(&bytes);
        }
    }
}
