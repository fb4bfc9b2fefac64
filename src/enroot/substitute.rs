//! `${NAME}` in environ and fstab files: replaced by a variable of the host, or by nothing if that is not set. No other
//! form means anything (behaviour reference, sections 15.1 and 16.1).

#![forbid(unsafe_code)]

/// What `${NAME}` stands for; `None` if it is not set.
pub type Variables<'a> = &'a dyn Fn(&str) -> Option<Vec<u8>>;

/// Replaces each `${NAME}` of `text`.
pub fn substitute(text: &[u8], variable: Variables<'_>) -> Vec<u8> {
    let mut result = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.windows(2).position(|two| two == b"${") {
        let (before, after) = rest.split_at(at);
        result.extend(before);
        let inside = after.get(2..).unwrap_or_default();
        let name = inside.split(|&byte| byte == b'}').next().filter(|name| name.len() < inside.len());
        match name.and_then(|name| is_name(name).then(|| std::str::from_utf8(name).ok()).flatten()) {
            Some(name) => {
                result.extend(variable(name).unwrap_or_default());
                rest = inside.get(name.len() + 1..).unwrap_or_default();
            }
            None => {
                result.extend(b"${");
                rest = inside;
            }
        }
    }
    result.extend(rest);
    result
}

/// Whether `text` is a name that a variable can have.
pub fn is_name(text: &[u8]) -> bool {
    let letter = |byte: u8| byte == b'_' || byte.is_ascii_alphabetic();
    text.first().is_some_and(|&byte| letter(byte)) && text.iter().all(|&byte| letter(byte) || byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_in_braces() {
        let variable = |name: &str| (name == "A").then(|| b"1".to_vec());
        for (text, expected) in [
            ("${A}${A}x${B}y", "11xy"),
            ("$A ${A:-x} ${} ${1} ${A", "$A ${A:-x} ${} ${1} ${A"),
            ("${${A}}", "${1}"),
            ("${A }${A}", "${A }1"),
            ("$", "$"),
        ] {
            assert_eq!(substitute(text.as_bytes(), &variable), expected.as_bytes(), "{text}");
        }
    }
}
