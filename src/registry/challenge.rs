//! `WWW-Authenticate` (RFC 9110, section 11.6.1): what a registry wants to see before it answers.
//!
//! Real registries send several challenges in one header or several headers, blanks after commas, commas inside quoted
//! scopes, and unquoted values with characters that the grammar forbids; all of it is read.

#![forbid(unsafe_code)]

/// One challenge.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Authentication scheme in lower case: `bearer`, `basic`.
    pub scheme: String,
    parameters: Vec<(String, String)>,
}

impl Challenge {
    /// The value of the parameter `name` (lower case).
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }
}

/// The challenges of one header value, in order. What cannot be read is left out.
pub fn parse(header: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let Some(first) = rest.chars().next() else { return challenges };
        let (word, after) = take(rest, is_token);
        if word.is_empty() {
            rest = &rest[first.len_utf8()..];
            continue;
        }
        let behind = after.trim_start_matches([' ', '\t']);
        match (behind.strip_prefix('='), challenges.last_mut()) {
            (Some(value), Some(challenge)) => {
                let (value, after) = take_value(value.trim_start_matches([' ', '\t']));
                challenge.parameters.push((word.to_ascii_lowercase(), value));
                rest = after;
            }
            // A parameter of nothing.
            (Some(value), None) => rest = take_value(value).1,
            (None, _) => {
                challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: Vec::new() });
                rest = skip_token68(behind);
            }
        }
    }
}

/// Skips the credentials-like text that may follow a scheme (`Negotiate YII=`): it reads to a comma or the end.
fn skip_token68(text: &str) -> &str {
    let (word, after) = take(text, |c| is_token(c) || c == '/');
    let padded = after.trim_start_matches('=');
    let end = padded.trim_start_matches([' ', '\t']);
    let is_token68 = !word.is_empty() && (end.is_empty() || end.starts_with(','));
    // Without padding it could as well be the next scheme, but only behind a comma, which is not where we are.
    if is_token68 { padded } else { text }
}

/// A quoted string, or everything up to a blank or a comma.
fn take_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let (value, rest) = take(text, |c| !matches!(c, ' ' | '\t' | ','));
        return (value.to_owned(), rest);
    };
    let mut value = String::new();
    let mut characters = quoted.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(characters.next().map(|(_, escaped)| escaped)),
            _ => value.push(character),
        }
    }
    (value, "")
}

fn take(text: &str, accepts: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !accepts(c)).unwrap_or(text.len()))
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn flat(header: &str) -> Vec<(String, Vec<(String, String)>)> {
        parse(header).into_iter().map(|challenge| (challenge.scheme, challenge.parameters)).collect()
    }

    fn expected(challenges: &[(&str, &[(&str, &str)])]) -> Vec<(String, Vec<(String, String)>)> {
        let owned = |text: &str| text.to_owned();
        let pairs = |list: &[(&str, &str)]| list.iter().map(|(key, value)| (owned(key), owned(value))).collect();
        challenges.iter().map(|(scheme, list)| (owned(scheme), pairs(list))).collect()
    }

    #[test]
    fn reads_what_registries_send() {
        let hub: &[_] = &[
            ("realm", "https://auth.docker.io/token"),
            ("service", "registry.docker.io"),
            ("scope", "repository:library/ubuntu:pull"),
        ];
        for (header, challenges) in [
            (
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:library/ubuntu:pull""#,
                &[("bearer", hub)][..],
            ),
            (
                r#"bearer  Realm = "https://auth.docker.io/token" , service=registry.docker.io, scope=repository:library/ubuntu:pull"#,
                &[("bearer", hub)],
            ),
            (
                r#"Bearer realm="https://x/t",scope="repository:a:pull,push repository:b:pull",error="invalid \"token\"""#,
                &[(
                    "bearer",
                    &[
                        ("realm", "https://x/t"),
                        ("scope", "repository:a:pull,push repository:b:pull"),
                        ("error", "invalid \"token\""),
                    ],
                )],
            ),
            (r#"Basic realm="Registry Realm""#, &[("basic", &[("realm", "Registry Realm")])]),
            ("Basic", &[("basic", &[])]),
            (
                r#"Negotiate, Basic realm="a, b", Bearer realm="https://x/t""#,
                &[("negotiate", &[]), ("basic", &[("realm", "a, b")]), ("bearer", &[("realm", "https://x/t")])],
            ),
            ("Negotiate YIIabc/+==, Basic realm=x", &[("negotiate", &[]), ("basic", &[("realm", "x")])]),
            ("", &[]),
            (" ,, ", &[]),
            (r#"realm="x", Basic realm="y""#, &[("basic", &[("realm", "y")])]),
            (r#"Bearer realm="unterminated"#, &[("bearer", &[("realm", "unterminated")])]),
            ("Bearer realm=", &[("bearer", &[])]),
        ] {
            assert_eq!(flat(header), expected(challenges), "{header}");
        }
    }

    proptest! {
        #[test]
        fn never_panics(header in any::<String>()) {
            let _ = parse(&header);
        }

        #[test]
        fn never_panics_on_likely_text(header in r#"([a-zA-Z]{1,3}|[ ,="\\/é]){0,40}"#) {
            let _ = parse(&header);
        }

        #[test]
        fn a_quoted_value_round_trips(value in any::<String>()) {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let parsed = parse(&format!("Bearer realm=\"{quoted}\", service=x"));
            prop_assert_eq!(parsed[0].parameter("realm"), Some(value.as_str()));
            prop_assert_eq!(parsed[0].parameter("service"), Some("x"));
        }
    }
}
