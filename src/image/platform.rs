//! Platforms: which manifest of an image index fits this machine (OCI image-spec, image-index.md, `platform`).
//!
//! Names are Go's, as the specification wants: `linux/amd64`, `linux/arm/v7`.

#![forbid(unsafe_code)]

use std::fmt;

use serde::Deserialize;

/// Operating system, CPU architecture and its variant.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
pub struct Platform {
    /// `linux`.
    #[serde(default)]
    pub os: String,
    /// `amd64`, `arm64`, …
    #[serde(default)]
    pub architecture: String,
    /// `v8`, `v3`; empty where the baseline is meant.
    #[serde(default)]
    pub variant: Option<String>,
}

impl Platform {
    /// What this machine runs.
    pub fn host() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", x86_level().map(|level| format!("v{level}"))),
            "aarch64" => ("arm64", Some("v8".to_owned())),
            "arm" => ("arm", Some("v7".to_owned())),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "powerpc64" => ("ppc64", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self { os: "linux".to_owned(), architecture: architecture.to_owned(), variant }
    }

    /// What a machine runs whose architecture is `name`: in Go's words (`arm64`), or in uname(1)'s (`aarch64`). `None` if it
    /// is neither.
    pub fn of(name: &str) -> Option<Self> {
        let architecture = match name {
            "amd64" | "x86_64" => "amd64",
            "arm64" | "aarch64" => "arm64",
            "arm" | "armhf" | "armv7l" => "arm",
            "ppc64le" | "ppc64el" => "ppc64le",
            "riscv64" | "s390x" | "386" | "loong64" => name,
            _ => return None,
        };
        let host = Self::host();
        if host.architecture == architecture {
            return Some(host);
        }
        let variant = match architecture {
            "amd64" => Some("v1"),
            "arm64" => Some("v8"),
            "arm" => Some("v7"),
            _ => None,
        };
        Some(Self { os: host.os, architecture: architecture.to_owned(), variant: variant.map(str::to_owned) })
    }

    /// How well an image for `candidate` runs here: higher is better, `None` is not at all.
    pub fn rank(&self, candidate: &Platform) -> Option<u32> {
        if candidate.os != self.os || candidate.architecture != self.architecture {
            return None;
        }
        let (mine, wanted) = (self.level()?, candidate.level()?);
        (wanted <= mine).then_some(wanted)
    }

    /// The variant as a number; an absent one is the architecture's baseline. `None` for one that is unknown.
    fn level(&self) -> Option<u32> {
        let baseline = match &*self.architecture {
            "arm64" => 8,
            "arm" => 7,
            _ => 1,
        };
        match self.variant.as_deref() {
            None | Some("") => Some(baseline),
            Some(variant) => variant.strip_prefix('v').unwrap_or(variant).parse().ok(),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let part = |text: &str| text.escape_debug().take(32).collect::<String>();
        write!(f, "{}/{}", part(&self.os), part(&self.architecture))?;
        match self.variant.as_deref() {
            None | Some("") => Ok(()),
            Some(variant) => write!(f, "/{}", part(variant)),
        }
    }
}

/// The x86-64 psABI's microarchitecture level.
#[cfg(target_arch = "x86_64")]
fn x86_level() -> Option<u32> {
    macro_rules! has {
        ($($feature:tt),*) => { $(std::arch::is_x86_feature_detected!($feature))&&* };
    }
    let v2 = has!("cmpxchg16b", "popcnt", "sse3", "sse4.1", "sse4.2", "ssse3");
    let v3 = v2 && has!("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "lzcnt", "movbe");
    let v4 = v3 && has!("avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl");
    Some(1 + u32::from(v2) + u32::from(v3) + u32::from(v4))
}

#[cfg(not(target_arch = "x86_64"))]
fn x86_level() -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform(text: &str) -> Platform {
        let mut parts = text.split('/').map(str::to_owned);
        Platform {
            os: parts.next().unwrap_or_default(),
            architecture: parts.next().unwrap_or_default(),
            variant: parts.next(),
        }
    }

    #[test]
    fn the_best_variant_that_runs_wins() {
        for (host, candidate, rank) in [
            ("linux/amd64/v3", "linux/amd64", Some(1)),
            ("linux/amd64/v3", "linux/amd64/v3", Some(3)),
            ("linux/amd64/v3", "linux/amd64/v4", None),
            ("linux/amd64/v3", "linux/amd64/", Some(1)),
            ("linux/amd64/v3", "linux/amd64/turbo", None),
            ("linux/amd64/v3", "windows/amd64", None),
            ("linux/amd64/v3", "unknown/unknown", None),
            ("linux/arm64/v8", "linux/arm64", Some(8)),
            ("linux/arm64/v8", "linux/arm64/v9", None),
            ("linux/arm/v7", "linux/arm/v6", Some(6)),
            ("linux/s390x", "linux/s390x", Some(1)),
        ] {
            assert_eq!(platform(host).rank(&platform(candidate)), rank, "{candidate} on {host}");
        }
    }

    #[test]
    fn machines_are_named_in_two_ways() {
        for (name, platform) in [
            ("arm64", Some("linux/arm64/v8")),
            ("aarch64", Some("linux/arm64/v8")),
            ("ppc64el", Some("linux/ppc64le")),
            ("sparc", None),
        ] {
            let known = Platform::of(name).filter(|platform| platform.architecture != Platform::host().architecture);
            if platform.is_none() || known.is_some() {
                assert_eq!(known.map(|platform| platform.to_string()).as_deref(), platform, "{name}");
            }
        }
        assert_eq!(Platform::of(&Platform::host().architecture), Some(Platform::host()));
    }

    #[test]
    fn the_host_runs_its_own_baseline() {
        let host = Platform::host();
        assert!(host.rank(&Platform { variant: None, ..host.clone() }).is_some(), "{host}");
        assert_eq!(platform("linux/arm/v7").to_string(), "linux/arm/v7");
        assert_eq!(platform("linux/amd64").to_string(), "linux/amd64");
    }
}
