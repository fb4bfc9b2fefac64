//! Patterns for the names of registries and repositories: `*` stands for any characters of one part of a path, `**` for any
//! characters at all, everything else for itself.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Longest pattern.
const MAX_LENGTH: usize = 512;

/// A pattern.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(String);

/// Why a text is no pattern.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("invalid pattern \"{0}\": expected a name in lower case, in which * and ** stand for any characters")]
pub struct InvalidPattern(String);

impl Pattern {
    /// Parses a pattern.
    pub fn parse(text: &str) -> Result<Self, InvalidPattern> {
        let is_valid = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-/:*[]".contains(&byte);
        if text.is_empty() || text.len() > MAX_LENGTH || !text.bytes().all(is_valid) {
            return Err(InvalidPattern(text.chars().take(100).flat_map(char::escape_debug).collect()));
        }
        Ok(Self(text.to_owned()))
    }

    /// Whether all of `text` fits. Takes time in proportion to the product of the lengths, whatever they contain.
    pub fn matches(&self, text: &str) -> bool {
        let text = text.as_bytes();
        // Which ends of beginnings of the text the pattern so far fits.
        let mut fits = vec![false; text.len() + 1];
        fits[0] = true;
        let mut rest = self.0.as_bytes();
        while let Some((&first, behind)) = rest.split_first() {
            rest = behind;
            if first != b'*' {
                for end in (0..text.len()).rev() {
                    fits[end + 1] = fits[end] && text[end] == first;
                }
                fits[0] = false;
                continue;
            }
            let across = rest.first() == Some(&b'*');
            while let Some((b'*', behind)) = rest.split_first() {
                rest = behind;
            }
            for end in 0..text.len() {
                fits[end + 1] |= fits[end] && (across || text[end] != b'/');
            }
        }
        fits[text.len()]
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn stars_stop_at_slashes_and_double_stars_do_not() {
        for (pattern, text, fits) in [
            ("nvidia/*", "nvidia/cuda", true),
            ("nvidia/*", "nvidia/a/b", false),
            ("nvidia/**", "nvidia/a/b", true),
            ("nvidia/**", "nvidia", false),
            ("*.example.com", "reg.example.com", true),
            ("*.example.com", "example.com", false),
            ("**", "", true),
            ("*", "a/b", false),
            ("***", "a/b", true),
            ("a*b*c", "axxbyyc", true),
            ("a*b*c", "axxbyy", false),
            ("library/alpine", "library/alpine", true),
            ("library/alpine", "library/alpine2", false),
            ("*/alpine", "library/alpine", true),
            ("localhost:5000", "localhost:5000", true),
        ] {
            assert_eq!(Pattern::parse(pattern).unwrap().matches(text), fits, "{pattern} {text}");
        }
        for text in ["", "A", "a b", "a\n", &"a".repeat(513)] {
            assert!(Pattern::parse(text).is_err(), "{text}");
        }
        let hard = Pattern::parse(&"*a".repeat(256)).unwrap();
        assert!(!hard.matches(&"a".repeat(255)));
    }

    /// The obvious way, which may take for ever.
    fn judge(pattern: &[u8], text: &[u8]) -> bool {
        match pattern {
            [] => text.is_empty(),
            [b'*', b'*', rest @ ..] => (0..=text.len()).any(|at| judge(rest, &text[at..])),
            [b'*', rest @ ..] => {
                let end = text.iter().position(|&byte| byte == b'/').unwrap_or(text.len());
                (0..=end).any(|at| judge(rest, &text[at..]))
            }
            [first, rest @ ..] => text.first() == Some(first) && judge(rest, &text[1..]),
        }
    }

    proptest! {
        #[test]
        fn fits_what_the_obvious_way_fits(pattern in "[a/*]{1,7}", text in "[a/]{0,8}") {
            // Three stars are two for us; the judge reads them as two and one.
            prop_assume!(!pattern.contains("***"));
            let ours = Pattern::parse(&pattern).unwrap().matches(&text);
            prop_assert_eq!(ours, judge(pattern.as_bytes(), text.as_bytes()));
        }

        #[test]
        fn a_name_fits_itself(name in "[a-z0-9./:_-]{1,40}") {
            prop_assert!(Pattern::parse(&name).unwrap().matches(&name));
        }
    }
}
