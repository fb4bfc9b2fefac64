//! enroot's `.credentials`: netrc with each entry on one line, `machine HOST login USER password SECRET` (behaviour
//! reference, section 12.2).
//!
//! A SECRET that begins with `$` is a shell word to enroot. Here variables are replaced and nothing is run.

use super::{Credential, CredentialSet};

/// Adds the entries of `text`. `variable` looks a variable up in the user's environment.
pub(super) fn parse(text: &str, file: &str, variable: impl Fn(&str) -> Option<String>, set: &mut CredentialSet) {
    for (number, line) in text.lines().enumerate() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["machine", host, "login", user, "password", secret, ..] = words[..] else { continue };
        let secret = if secret.starts_with('$') {
            expand(&words[5..].join(" "), &variable)
        } else {
            // curl takes a quoted secret without its quotes.
            Ok(secret.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap_or(secret).to_owned())
        };
        match secret {
            Ok(secret) => set.entries.push(Credential {
                host: host.to_owned(),
                user: user.to_owned(),
                secret,
                file: file.to_owned(),
            }),
            Err(reason) => set.warnings.push(format!("{file}, line {}: password of {host}: {reason}", number + 1)),
        }
    }
}

/// `word` with `$NAME` and `${NAME}` replaced.
fn expand(word: &str, variable: &impl Fn(&str) -> Option<String>) -> Result<String, String> {
    let mut expanded = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, behind) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(after.find(|c: char| !is_name_character(c)).unwrap_or(after.len())),
        };
        if after.starts_with('(') {
            return Err("commands are not run in this version, only variables are replaced".to_owned());
        }
        if name.is_empty() || !name.chars().all(is_name_character) || name.starts_with(|c: char| c.is_ascii_digit()) {
            return Err("only $NAME and ${NAME} are replaced in this version".to_owned());
        }
        expanded.push_str(&variable(name).ok_or_else(|| format!("the variable {name} is not set"))?);
        rest = behind;
    }
    expanded.push_str(rest);
    Ok(expanded)
}

fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn secret_of(secret: &str) -> Result<String, String> {
        let mut set = CredentialSet::default();
        let variable = |name: &str| match name {
            "HOME" => Some("/h".to_owned()),
            "KEY_1" => Some("k$HOME".to_owned()),
            _ => None,
        };
        parse(&format!("\n  machine h.io login $oauthtoken password {secret}\n"), "F", variable, &mut set);
        match set.entries.pop() {
            Some(entry) => {
                assert_eq!((&*entry.host, &*entry.user, &*entry.file), ("h.io", "$oauthtoken", "F"));
                Ok(entry.secret)
            }
            None => Err(set.warnings.pop().unwrap_or_default()),
        }
    }

    #[test]
    fn secrets_are_expanded_as_enroot_did() {
        for (secret, expanded) in [
            ("plain", "plain"),
            ("pl$HOME", "pl$HOME"),
            ("$HOME", "/h"),
            ("${HOME}", "/h"),
            ("$HOME trailing  words", "/h trailing words"),
            ("$HOME-${KEY_1}x", "/h-k$HOMEx"),
            ("\"$HOME\"", "$HOME"),
            ("word # comment", "word"),
        ] {
            assert_eq!(secret_of(secret).as_deref(), Ok(expanded), "{secret}");
        }
        for (secret, reason) in [
            ("$(echo hi there)", "F, line 2: password of h.io: commands are not run in this version"),
            ("$HOME$(x)", "commands are not run"),
            ("$MISSING", "the variable MISSING is not set"),
            ("${HOME:-x}", "only $NAME"),
            ("$", "only $NAME"),
            ("$1", "only $NAME"),
            ("${HOME", "only $NAME"),
            ("${}", "only $NAME"),
        ] {
            let warning = secret_of(secret).unwrap_err();
            assert!(warning.contains(reason), "{secret}: {warning}");
        }
    }

    #[test]
    fn only_whole_lines_are_entries() {
        let mut set = CredentialSet::default();
        let text = "machine a\nlogin b password c\nmachine a login b\n# machine a login b password c\nmachine";
        parse(text, "F", |_| None, &mut set);
        assert_eq!(set, CredentialSet::default());
    }

    proptest! {
        #[test]
        fn never_panics(text in r"(machine|login|password|\$[A-Z(){]{0,3}|\PC| |\n){0,30}") {
            parse(&text, "F", |_| Some("x".to_owned()), &mut CredentialSet::default());
            let _ = secret_of(&text);
        }
    }
}
