//! Lines of `enroot.conf`: `KEY VALUE`, `KEY=VALUE` or `KEY = VALUE` (behaviour reference, section 10.1).

#![forbid(unsafe_code)]

/// One line that sets something: the key, and the value before its evaluation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// A setting.
    Setting(&'a str, &'a str),
    /// Nothing: blank, or a comment.
    Nothing,
    /// Something that enroot does not know, and ignores.
    Unknown(&'a str),
}

/// Reads one line.
pub(super) fn parse(line: &str) -> Line<'_> {
    let line = line.trim_matches([' ', '\t', '\r']);
    if line.is_empty() || line.starts_with('#') {
        return Line::Nothing;
    }
    let end = line.find([' ', '\t', '=']).unwrap_or(line.len());
    let (key, rest) = line.split_at(end);
    if !is_key(key) {
        return Line::Unknown(key);
    }
    // One `=` separates, wherever blanks are.
    let rest = rest.trim_start_matches([' ', '\t']);
    let value = rest.strip_prefix('=').unwrap_or(rest).trim_start_matches([' ', '\t']);
    Line::Setting(key, without_separator(value))
}

/// What enroot takes for a key.
fn is_key(key: &str) -> bool {
    let of_enroot = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
    let of_devices =
        |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    match key {
        "SSL_CERT_DIR" | "SSL_CERT_FILE" | "all_proxy" | "no_proxy" | "http_proxy" | "https_proxy" => true,
        _ => {
            key.strip_prefix("ENROOT_").is_some_and(of_enroot)
                || ["MELLANOX_", "NVIDIA_"].iter().any(|prefix| key.strip_prefix(prefix).is_some_and(of_devices))
        }
    }
}

/// A value that is a single word loses one `=` at its end, for which `read` takes it to be a separator.
fn without_separator(value: &str) -> &str {
    match value.strip_suffix('=').map(|word| word.trim_end_matches([' ', '\t'])) {
        Some(word) if !word.contains([' ', '\t', '=']) => word,
        _ => value,
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_three_forms_and_what_is_ignored() {
        for (line, expected) in [
            ("ENROOT_A b", Line::Setting("ENROOT_A", "b")),
            ("  ENROOT_A=b", Line::Setting("ENROOT_A", "b")),
            ("ENROOT_A = b c ", Line::Setting("ENROOT_A", "b c")),
            ("ENROOT_A\tb", Line::Setting("ENROOT_A", "b")),
            ("ENROOT_A", Line::Setting("ENROOT_A", "")),
            ("ENROOT_A abc=", Line::Setting("ENROOT_A", "abc")),
            ("ENROOT_A a==", Line::Setting("ENROOT_A", "a==")),
            ("ENROOT_A a=b=c", Line::Setting("ENROOT_A", "a=b=c")),
            ("ENROOT_A = r s", Line::Setting("ENROOT_A", "r s")),
            ("ENROOT_X2 y", Line::Unknown("ENROOT_X2")),
            ("export ENROOT_A=b", Line::Unknown("export")),
            ("NVIDIA_VISIBLE_DEVICES all", Line::Setting("NVIDIA_VISIBLE_DEVICES", "all")),
            ("https_proxy http://p:1", Line::Setting("https_proxy", "http://p:1")),
            ("HTTPS_PROXY x", Line::Unknown("HTTPS_PROXY")),
            ("PATH /x", Line::Unknown("PATH")),
            ("#ENROOT_A b", Line::Nothing),
            ("  # x", Line::Nothing),
            ("", Line::Nothing),
        ] {
            assert_eq!(parse(line), expected, "{line}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(60))]

        /// enroot splits with `read`.
        #[test]
        fn splits_as_the_shell_does(value in "[ =]{1,3}[ab= \t]{0,6}") {
            let line = format!("ENROOT_A{value}");
            let output = Command::new("/bin/bash")
                .args(["-c", "IFS=$' \\t=' read -r k v <<<\"$1\"; printf %s \"$v\"", "bash", &line])
                .output()
                .unwrap();
            let expected = String::from_utf8_lossy(&output.stdout).into_owned();
            prop_assert_eq!(parse(&line), Line::Setting("ENROOT_A", &expected), "{:?}", line);
        }
    }
}
