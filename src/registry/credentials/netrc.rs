//! enroot's `.credentials`: netrc with each entry on one line, `machine HOST login USER password SECRET` (behaviour
//! reference, section 12.2).
//!
//! A SECRET that begins with `$` is words of a shell: `$VAR`, `${VAR}`, `$(command)`. Only the one that is wanted is
//! evaluated, as the user whose file it is.
//!
//! HOST may be the registry's token server, whose entry then goes before the registry's own. It is presented only if the
//! two belong together: otherwise any registry could have a token for somebody else's made for itself.

use super::{Answer, Credential, Query, helper, hosts};
use crate::request::Environment;

/// A line of the file.
struct Entry<'a> {
    host: &'a str,
    user: &'a str,
    /// With the words behind it: a command has several.
    secret: Vec<&'a str>,
    line: usize,
}

/// Looks for `query` in `text`, the content of `file`. Without an environment secrets are taken as they are.
pub(super) fn find(file: &str, text: &str, query: &Query, environment: Option<&Environment>, answer: &mut Answer) {
    let entries: Vec<Entry<'_>> = entries(text).collect();
    let Some(entry) = choose(&entries, query) else { return };
    let Entry { host, user, line, .. } = entry;
    match entry.secret(environment) {
        Ok(secret) => answer.credential = Some(Credential::password(user, secret, file)),
        Err(reason) => {
            let host: String = host.escape_debug().take(100).collect();
            answer.warnings.push(format!("{file}, line {line}: password of {host}: {reason}"));
        }
    }
}

fn entries(text: &str) -> impl Iterator<Item = Entry<'_>> {
    text.lines().enumerate().filter_map(|(number, line)| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let ["machine", host, "login", user, "password", ref secret @ ..] = words[..] else { return None };
        (!secret.is_empty()).then(|| Entry { host, user, secret: secret.to_vec(), line: number + 1 })
    })
}

fn choose<'e, 't>(entries: &'e [Entry<'t>], query: &Query) -> Option<&'e Entry<'t>> {
    let at = |host: &str, user: Option<&str>| {
        let fitting = entries.iter().filter(|entry| user.is_none_or(|user| user == entry.user));
        // Of several that fit equally well the first.
        let ranked = fitting.filter_map(|entry| Some((hosts::fit(entry.host, host)?, entry)));
        ranked.rev().max_by_key(|(rank, _)| *rank).map(|(_, entry)| entry)
    };
    let of_registry = at(&query.registry, query.user.as_deref());
    let of_realm = if hosts::belong_together(&query.registry, &query.realm) {
        at(&query.realm, query.user.as_deref())
    } else if hosts::are_neighbours(&query.registry, &query.realm) {
        of_registry.and_then(|entry| at(&query.realm, Some(entry.user)))
    } else {
        None
    };
    of_realm.or(of_registry)
}

impl Entry<'_> {
    fn secret(&self, environment: Option<&Environment>) -> Result<String, String> {
        let first = self.secret.first().copied().unwrap_or_default();
        let Some(environment) = environment.filter(|_| first.starts_with('$')) else {
            // curl takes a quoted secret without its quotes.
            let plain = first.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
            return Ok(plain.unwrap_or(first).to_owned());
        };
        let text = self.secret.join(" ");
        let secret = match expand(&text, |name| environment.get_str(name).map(str::to_owned)) {
            Some(expanded) => expanded?,
            None => helper::shell(&text, environment)?,
        };
        if secret.is_empty() { Err("it is empty".to_owned()) } else { Ok(secret) }
    }
}

/// `text` with `$NAME` and `${NAME}` replaced; none if it takes a shell to tell.
fn expand(text: &str, variable: impl Fn(&str) -> Option<String>) -> Option<Result<String, String>> {
    if text.contains(['`', '\\', '\'', '"', ';', '&', '|', '<', '>', '#']) {
        return None;
    }
    let mut expanded = String::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('$') {
        expanded.push_str(before);
        let (name, behind) = match after.strip_prefix('{') {
            Some(braced) => braced.split_once('}')?,
            None => after.split_at(after.find(|c: char| !is_name_character(c)).unwrap_or(after.len())),
        };
        if name.is_empty() || !name.chars().all(is_name_character) || name.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        match variable(name) {
            Some(value) => expanded.push_str(&value),
            None => return Some(Err(format!("the variable {name} is not set"))),
        }
        rest = behind;
    }
    expanded.push_str(rest);
    Some(Ok(expanded))
}

fn is_name_character(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn query(registry: &str, realm: &str, user: Option<&str>) -> Query {
        let owned = str::to_owned;
        Query { registry: owned(registry), repository: "a/b".into(), realm: owned(realm), user: user.map(owned) }
    }

    fn secret_of(secret: &str) -> Result<String, String> {
        let environment: Environment = ["HOME=/h", "KEY_1=k$HOME", "PATH=/usr/bin:/bin", "LANG=C"].iter().collect();
        let mut answer = Answer::default();
        let text = format!("\n  machine h.io login $oauthtoken password {secret}\n");
        find("F", &text, &query("h.io", "h.io", None), Some(&environment), &mut answer);
        match answer.credential {
            Some(entry) => {
                assert_eq!((&*entry.user, &*entry.source), ("$oauthtoken", "F"));
                Ok(entry.secret.reveal().to_owned())
            }
            None => Err(answer.warnings.pop().unwrap_or_default()),
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
            ("$(echo hi   there)", "hi there"),
            ("$HOME$(printf '%s\\n' x y)", "/hx y"),
            ("${HOME:-x}", "/h"),
            ("${NONE:-x}", "x"),
            ("$(echo '*')", "*"),
            ("$(echo \"a  b\")", "a b"),
        ] {
            assert_eq!(secret_of(secret).as_deref(), Ok(expanded), "{secret}");
        }
        for (secret, reason) in [
            ("$MISSING", "F, line 2: password of h.io: the variable MISSING is not set"),
            ("$(exit 3)", "its command prints nothing"),
            ("$(cat)", "its command prints nothing"),
            ("$(", "the shell refuses it (exit status 2)"),
        ] {
            let warning = secret_of(secret).unwrap_err();
            assert!(warning.contains(reason), "{secret}: {warning}");
        }
    }

    #[test]
    fn only_what_is_wanted_is_evaluated() {
        let marker = tempfile::NamedTempFile::new().unwrap();
        let path = marker.path().display().to_string();
        let text = format!(
            "machine a.io login u password $(rm {path})\nmachine b.io login u password p\n\
             machine auth.b.io login u password $(rm {path})\n"
        );
        let mut answer = Answer::default();
        find("F", &text, &query("b.io", "elsewhere.io", None), Some(&Environment::default()), &mut answer);
        assert_eq!(answer.credential.unwrap().secret.reveal(), "p");
        assert!(marker.path().exists());
        // A file of the site's is no program.
        let mut answer = Answer::default();
        find("F", &text, &query("a.io", "a.io", None), None, &mut answer);
        assert_eq!(answer.credential.unwrap().secret.reveal(), "$(rm");
        assert!(marker.path().exists());
    }

    #[test]
    fn finds_the_entry_that_is_meant() {
        for (entries, registry, realm, user, found) in [
            (&[("reg.io", "a")][..], "reg.io", "reg.io", None, Some(("reg.io", "a"))),
            (&[("reg.io", "a")], "reg.io:5000", "reg.io:5000", None, Some(("reg.io", "a"))),
            (&[("reg.io", "a"), ("reg.io:5000", "b")], "reg.io:5000", "x", None, Some(("reg.io:5000", "b"))),
            (&[("reg.io:5001", "a")], "reg.io:5000", "reg.io:5000", None, None),
            (&[("reg.io", "a"), ("reg.io", "b")], "reg.io", "reg.io", None, Some(("reg.io", "a"))),
            (&[("reg.io", "a"), ("reg.io", "b")], "reg.io", "reg.io", Some("b"), Some(("reg.io", "b"))),
            (&[("reg.io", "a")], "reg.io", "reg.io", Some("b"), None),
            (&[("docker.io", "a")], "registry-1.docker.io", "auth.docker.io", None, Some(("docker.io", "a"))),
            (&[("auth.docker.io", "a")], "registry-1.docker.io", "auth.docker.io", None, Some(("auth.docker.io", "a"))),
            (
                &[("nvcr.io", "a"), ("authn.nvidia.com", "b")],
                "nvcr.io",
                "authn.nvidia.com",
                None,
                Some(("authn.nvidia.com", "b")),
            ),
            (&[("gitlab.com", "a")], "registry.gitlab.com", "gitlab.com", None, Some(("gitlab.com", "a"))),
            // Neighbours only under the same name.
            (&[("r.x.org", "a"), ("g.x.org", "a")], "r.x.org", "g.x.org", None, Some(("g.x.org", "a"))),
            (&[("r.x.org", "a"), ("g.x.org", "b")], "r.x.org", "g.x.org", None, Some(("r.x.org", "a"))),
            (&[("g.x.org", "a")], "r.x.org", "g.x.org", None, None),
            // A registry cannot have a token of Docker Hub's made for itself.
            (&[("auth.docker.io", "a")], "evil.io", "auth.docker.io", None, None),
            (&[("auth.docker.io", "a"), ("evil.io", "a")], "evil.io", "auth.docker.io", None, Some(("evil.io", "a"))),
        ] {
            let text: String =
                entries.iter().map(|(host, user)| format!("machine {host} login {user} password {host}\n")).collect();
            let mut answer = Answer::default();
            find("F", &text, &query(registry, realm, user), None, &mut answer);
            let named = answer.credential.as_ref().map(|entry| (entry.secret.reveal(), &*entry.user));
            assert_eq!(named, found, "{registry} {realm} {user:?}");
        }
    }

    #[test]
    fn only_whole_lines_are_entries() {
        let text = "machine a\nlogin b password c\nmachine a login b\n# machine a login b password c\nmachine a login b password";
        let mut answer = Answer::default();
        find("F", text, &query("a", "a", None), None, &mut answer);
        assert_eq!(answer, Answer::default());
    }

    proptest! {
        #[test]
        fn never_panics(text in r"(machine|login|password|\$[A-Z{]{0,3}|\PC| |\n){0,30}") {
            let _ = expand(&text, |_| Some("x".to_owned()));
            find("F", &text, &query("a", "a", None), None, &mut Answer::default());
        }
    }
}
