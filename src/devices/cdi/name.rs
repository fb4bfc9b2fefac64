//! Names of CDI devices, `VENDOR/CLASS=NAME`, and the kinds they belong to, `VENDOR/CLASS` (CDI specification, "Kind" and
//! "CDI Devices"). The plugin reads them as well: it judges `--container-device`.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest vendor: a DNS subdomain.
const MAX_VENDOR: usize = 253;
/// Longest class: the name segment of a kind.
const MAX_CLASS: usize = 63;
/// Longest device name. The specification has no limit.
const MAX_NAME: usize = 253;

/// `VENDOR/CLASS`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Kind {
    vendor: String,
    class: String,
}

/// `VENDOR/CLASS=NAME`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct QualifiedName {
    /// What is before the `=`.
    pub kind: Kind,
    name: String,
}

/// A text that names no device or kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// It has not the parts.
    #[error("{0:?} is no device name: it must be VENDOR/CLASS=NAME, as in nvidia.com/gpu=0")]
    Form(String),
    /// It has not the parts.
    #[error("{0:?} is no kind of devices: it must be VENDOR/CLASS, as in nvidia.com/gpu")]
    Kind(String),
    /// A part with a character that it must not have.
    #[error("{text:?}: the {part} {value:?} {problem}")]
    Part {
        /// The whole.
        text: String,
        /// `vendor`, `class`, `device name`.
        part: &'static str,
        /// The part.
        value: String,
        /// What is wrong.
        problem: &'static str,
    },
}

impl Kind {
    /// Before the slash.
    pub fn vendor(&self) -> &str {
        &self.vendor
    }

    /// Its class may have dots since version 0.6.0.
    pub fn class(&self) -> &str {
        &self.class
    }
}

impl QualifiedName {
    /// The device `name` of `kind`.
    pub fn new(kind: Kind, name: &str) -> Result<Self, InvalidName> {
        match problem_of_device(name) {
            None => Ok(Self { kind, name: name.to_owned() }),
            Some(problem) => {
                let text = format!("{kind}={name}");
                Err(InvalidName::Part { text, part: "device name", value: name.to_owned(), problem })
            }
        }
    }

    /// What is behind the `=`.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FromStr for Kind {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let (vendor, class) = text.split_once('/').ok_or_else(|| InvalidName::Kind(text.to_owned()))?;
        if vendor.is_empty() || class.is_empty() {
            return Err(InvalidName::Kind(text.to_owned()));
        }
        for (part, value, limit) in [("vendor", vendor, MAX_VENDOR), ("class", class, MAX_CLASS)] {
            if let Some(problem) = problem(value, limit, u8::is_ascii_alphabetic, b"_-.") {
                return Err(InvalidName::Part { text: text.to_owned(), part, value: value.to_owned(), problem });
            }
        }
        Ok(Self { vendor: vendor.to_owned(), class: class.to_owned() })
    }
}

impl FromStr for QualifiedName {
    type Err = InvalidName;

    fn from_str(text: &str) -> Result<Self, InvalidName> {
        let form = || InvalidName::Form(text.to_owned());
        let (kind, name) = text.split_once('=').filter(|(_, name)| !name.is_empty()).ok_or_else(form)?;
        let kind = kind.parse().map_err(|error| match error {
            InvalidName::Part { part, value, problem, .. } => {
                InvalidName::Part { text: text.to_owned(), part, value, problem }
            }
            _ => form(),
        })?;
        Self::new(kind, name)
    }
}

/// What is wrong with the device name `name`: it may begin with a digit, since version 0.5.0, and have colons.
pub(super) fn problem_of_device(name: &str) -> Option<&'static str> {
    problem(name, MAX_NAME, u8::is_ascii_alphanumeric, b"_-.:")
}

fn problem(value: &str, limit: usize, first: fn(&u8) -> bool, inner: &[u8]) -> Option<&'static str> {
    let bytes = value.as_bytes();
    let alphanumeric = u8::is_ascii_alphanumeric;
    if bytes.len() > limit {
        Some("is too long")
    } else if !bytes.first().is_some_and(first) {
        Some(if first(&b'0') { "must begin with a letter or digit" } else { "must begin with a letter" })
    } else if !bytes.last().is_some_and(alphanumeric) {
        Some("must end with a letter or digit")
    } else if !bytes.iter().all(|byte| alphanumeric(byte) || inner.contains(byte)) {
        Some(if inner.contains(&b':') {
            "has a character other than letters, digits, '_', '-', '.' and ':'"
        } else {
            "has a character other than letters, digits, '_', '-' and '.'"
        })
    } else {
        None
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", self.vendor, self.class)
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}={}", self.kind, self.name)
    }
}

impl TryFrom<String> for Kind {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl TryFrom<String> for QualifiedName {
    type Error = InvalidName;

    fn try_from(text: String) -> Result<Self, InvalidName> {
        text.parse()
    }
}

impl From<Kind> for String {
    fn from(kind: Kind) -> Self {
        kind.to_string()
    }
}

impl From<QualifiedName> for String {
    fn from(name: QualifiedName) -> Self {
        name.to_string()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_devices() {
        for valid in [
            "vendor.com/class=dev",
            "a/b=c",
            "aa/b=cc",
            "a/bb=0",
            "v1.example/class.sub=d1",
            "other-v1.com/class_1=dev_1",
            "yet_another-v2.com/c-lass_2=dev_1:2.3",
            "nvidia.com/gpu=GPU-0f4f8a83-9d5c-1f1f-7f42-0a4f6a2c8e11",
            "nvidia.com/gpu=0:1",
        ] {
            let name: QualifiedName = valid.parse().unwrap();
            assert_eq!(name.to_string(), valid);
        }
        for (invalid, part) in [
            ("_x.com/class=dev", "vendor"),
            ("x.com-/class=dev", "vendor"),
            ("x.com/_class=dev", "class"),
            ("x.com/class_=dev", "class"),
            ("x.com/class=-dev", "device name"),
            ("x.com/class=dev:", "device name"),
            ("x.com/class=a b", "device name"),
            ("x.com/class=a=b", "device name"),
            ("x.com/cl/ass=dev", "class"),
            ("*.com/*dev=*gpu*", "vendor"),
            ("x.com/class=d\u{e9}v", "device name"),
            ("1x.com/class=dev", "vendor"),
        ] {
            match invalid.parse::<QualifiedName>() {
                Err(InvalidName::Part { part: named, text, .. }) => assert_eq!((named, &*text), (part, invalid)),
                other => panic!("{invalid}: {other:?}"),
            }
        }
        for invalid in ["", "dev", "x.com/class", "x.com/class=", "/class=dev", "x.com/=dev", "class=dev", "/dev/null"]
        {
            assert_eq!(invalid.parse::<QualifiedName>(), Err(InvalidName::Form(invalid.into())));
        }
        let long = format!("x.com/{}=d", "c".repeat(64));
        assert!(long.parse::<QualifiedName>().unwrap_err().to_string().ends_with("is too long"));
    }

    #[test]
    fn errors_are_one_line_and_say_the_form() {
        let error = "gpu\n0".parse::<QualifiedName>().unwrap_err().to_string();
        assert_eq!(error, "\"gpu\\n0\" is no device name: it must be VENDOR/CLASS=NAME, as in nvidia.com/gpu=0");
        let error = "x.com/gpu=-0".parse::<QualifiedName>().unwrap_err().to_string();
        assert_eq!(error, "\"x.com/gpu=-0\": the device name \"-0\" must begin with a letter or digit");
    }

    proptest! {
        #[test]
        fn what_is_accepted_is_what_is_shown(text in "[a-z/=:._0-9-]{0,24}") {
            if let Ok(name) = text.parse::<QualifiedName>() {
                prop_assert_eq!(name.to_string(), text);
            }
        }
    }
}
