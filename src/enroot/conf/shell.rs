//! The part of the shell's language that administrators use in `enroot.conf`, without a shell: quotes, comments,
//! variables with defaults, and the handful of commands that say who the user is and where he runs.
//!
//! Everything else is not guessed at: [`evaluate`] says that it takes a shell (POSIX.1-2024, XCU 2).

#![forbid(unsafe_code)]

/// Most expansions inside each other.
const MAX_DEPTH: usize = 16;
/// Most bytes of a value.
const MAX_VALUE: usize = 1 << 20;

/// What expansions are replaced with.
pub(super) struct Lookup<'a> {
    /// The value of a variable; `None` if it is not set.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// The output of a command, without the last newline; `None` if it is not one that is built in.
    pub command: &'a dyn Fn(&[&str]) -> Option<String>,
}

/// What a text evaluates to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Value {
    /// The words, with one blank between them.
    Text(String),
    /// Something that only a shell can tell.
    NeedsShell,
}

/// A text that no shell would take either: what is missing at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("missing {0}")]
pub(super) struct Unbalanced(&'static str);

/// Why the evaluation stopped before the end.
enum Stop {
    Unbalanced(&'static str),
    NeedsShell,
}

/// Evaluates `text` as the words of a command.
pub(super) fn evaluate(text: &str, lookup: &Lookup<'_>) -> Result<Value, Unbalanced> {
    let mut words = Words::default();
    match expand(text, &mut words, lookup, MAX_DEPTH) {
        Ok(()) => Ok(Value::Text(words.finish())),
        Err(Stop::NeedsShell) => Ok(Value::NeedsShell),
        Err(Stop::Unbalanced(what)) => Err(Unbalanced(what)),
    }
}

/// The words of a command, as they grow.
#[derive(Default)]
struct Words {
    done: Vec<String>,
    current: Option<String>,
}

impl Words {
    fn push(&mut self, text: &str) {
        self.current.get_or_insert_default().push_str(text);
    }

    fn end_word(&mut self) {
        self.done.extend(self.current.take());
    }

    /// An expansion outside quotes: its blanks separate words.
    fn push_split(&mut self, text: &str) {
        let mut rest = text;
        while let Some(first) = rest.chars().next() {
            if first.is_ascii_whitespace() {
                self.end_word();
                rest = rest.trim_start_matches(|c: char| c.is_ascii_whitespace());
            } else {
                let end = rest.find(|c: char| c.is_ascii_whitespace()).unwrap_or(rest.len());
                let (word, after) = rest.split_at(end);
                self.push(word);
                rest = after;
            }
        }
    }

    fn length(&self) -> usize {
        self.done.iter().chain(&self.current).map(|word| word.len() + 1).sum()
    }

    fn finish(mut self) -> String {
        self.end_word();
        self.done.join(" ")
    }
}

fn expand(text: &str, words: &mut Words, lookup: &Lookup<'_>, depth: usize) -> Result<(), Stop> {
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let after = &rest[character.len_utf8()..];
        let begins_word =
            text[..text.len() - rest.len()].chars().next_back().is_none_or(|before| " \t".contains(before));
        rest = match character {
            ' ' | '\t' => {
                words.end_word();
                after
            }
            '#' if begins_word && words.current.is_none() => return Ok(()),
            '\'' => {
                let (inside, after) = after.split_once('\'').ok_or(Stop::Unbalanced("'"))?;
                words.push(inside);
                after
            }
            '"' => {
                let mut quoted = String::new();
                let after = double_quoted(after, &mut quoted, lookup, depth)?;
                words.push(&quoted);
                after
            }
            '\\' => {
                let next = after.chars().next().ok_or(Stop::NeedsShell)?;
                words.push(next.encode_utf8(&mut [0; 4]));
                &after[next.len_utf8()..]
            }
            '$' => {
                let (value, after) = dollar(after, false, lookup, depth)?;
                no_glob(&value)?;
                words.push_split(&value);
                after
            }
            '`' => {
                let (command, after) = after.split_once('`').ok_or(Stop::Unbalanced("`"))?;
                let output = run(command, lookup)?;
                no_glob(&output)?;
                words.push_split(&output);
                after
            }
            '~' if begins_word && words.current.is_none() => {
                let name = after.split([' ', '\t', '/']).next().unwrap_or_default();
                let home = (lookup.variable)("HOME").filter(|_| name.is_empty()).ok_or(Stop::NeedsShell)?;
                words.push(&home);
                after
            }
            // Operators, patterns and brace expansion.
            ';' | '&' | '|' | '<' | '>' | '(' | ')' | '*' | '?' | '[' | '{' | '\n' | '\r' => {
                return Err(Stop::NeedsShell);
            }
            other => {
                words.push(other.encode_utf8(&mut [0; 4]));
                after
            }
        };
        if words.length() > MAX_VALUE {
            return Err(Stop::NeedsShell);
        }
    }
    Ok(())
}

/// The result of an expansion outside quotes is a pattern too.
fn no_glob(text: &str) -> Result<(), Stop> {
    if text.contains(['*', '?', '[']) { Err(Stop::NeedsShell) } else { Ok(()) }
}

/// What follows a double quote: appends to `quoted`, returns what follows the closing one.
fn double_quoted<'t>(text: &'t str, quoted: &mut String, lookup: &Lookup<'_>, depth: usize) -> Result<&'t str, Stop> {
    let mut rest = text;
    while let Some(character) = rest.chars().next() {
        let after = &rest[character.len_utf8()..];
        rest = match character {
            '"' => return Ok(after),
            '\\' => match after.chars().next() {
                Some(next @ ('$' | '`' | '"' | '\\')) => {
                    quoted.push(next);
                    &after[1..]
                }
                _ => {
                    quoted.push('\\');
                    after
                }
            },
            '$' => {
                let (value, after) = dollar(after, true, lookup, depth)?;
                quoted.push_str(&value);
                after
            }
            '`' => {
                let (command, after) = after.split_once('`').ok_or(Stop::Unbalanced("`"))?;
                quoted.push_str(&run(command, lookup)?);
                after
            }
            other => {
                quoted.push(other);
                after
            }
        };
        if quoted.len() > MAX_VALUE {
            return Err(Stop::NeedsShell);
        }
    }
    Err(Stop::Unbalanced("\""))
}

/// What follows a `$`: the value, and what follows the expansion.
fn dollar<'t>(text: &'t str, quoted: bool, lookup: &Lookup<'_>, depth: usize) -> Result<(String, &'t str), Stop> {
    let depth = depth.checked_sub(1).ok_or(Stop::NeedsShell)?;
    if let Some(inside) = text.strip_prefix('(') {
        let (command, after) = inside.split_once(')').ok_or(Stop::Unbalanced(")"))?;
        return Ok((run(command, lookup)?, after));
    }
    if let Some(inside) = text.strip_prefix('{') {
        let end = closing_brace(inside)?;
        let (inside, after) = (&inside[..end], &inside[end + 1..]);
        let (name, rest) = split_name(inside);
        if name.is_empty() {
            return Err(Stop::NeedsShell);
        }
        let value = (lookup.variable)(name);
        let value = match rest {
            "" => value.unwrap_or_default(),
            _ => {
                // With a colon, an empty value counts as none.
                let (operator, given) = match rest.strip_prefix(':') {
                    Some(operator) => (operator, value.filter(|value| !value.is_empty())),
                    None => (rest, value),
                };
                match (operator.split_at_checked(1), given) {
                    (Some(("-", _)), Some(value)) => value,
                    (Some(("-", word)), None) | (Some(("+", word)), Some(_)) => {
                        alternative(word, quoted, lookup, depth)?
                    }
                    (Some(("+", _)), None) => String::new(),
                    _ => return Err(Stop::NeedsShell),
                }
            }
        };
        return Ok((value, after));
    }
    let (name, after) = split_name(text);
    match (name, text.chars().next()) {
        ("", Some('$' | '?' | '!' | '#' | '@' | '*' | '-' | '\'' | '"' | '0'..='9')) => Err(Stop::NeedsShell),
        // Outside quotes bash then does not split the whole word.
        ("", _) if !quoted => Err(Stop::NeedsShell),
        ("", _) => Ok(("$".to_owned(), text)),
        _ => Ok(((lookup.variable)(name).unwrap_or_default(), after)),
    }
}

/// The word of `${NAME:-word}`. Outside quotes, quotes of its own would keep blanks together: left to a shell.
fn alternative(word: &str, quoted: bool, lookup: &Lookup<'_>, depth: usize) -> Result<String, Stop> {
    if word.contains(['"', '\'', '\\', '`', '~', '#']) {
        return Err(Stop::NeedsShell);
    }
    let mut value = String::new();
    let mut rest = word;
    while let Some((before, after)) = rest.split_once('$') {
        value.push_str(before);
        let (inside, after) = dollar(after, quoted, lookup, depth)?;
        value.push_str(&inside);
        rest = after;
    }
    value.push_str(rest);
    Ok(value)
}

/// Where the brace that closes an expansion is.
fn closing_brace(text: &str) -> Result<usize, Stop> {
    let mut open = 0_usize;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'{' => open += 1,
            b'}' if open == 0 => return Ok(at),
            b'}' => open -= 1,
            // Quoting changes what closes.
            b'"' | b'\'' | b'\\' | b'`' => return Err(Stop::NeedsShell),
            _ => {}
        }
    }
    Err(Stop::Unbalanced("}"))
}

fn split_name(text: &str) -> (&str, &str) {
    let first = text.bytes().next().is_some_and(|byte| byte.is_ascii_alphabetic() || byte == b'_');
    let end = text.bytes().position(|byte| !(byte.is_ascii_alphanumeric() || byte == b'_')).unwrap_or(text.len());
    text.split_at(if first { end } else { 0 })
}

fn run(command: &str, lookup: &Lookup<'_>) -> Result<String, Stop> {
    let words: Vec<&str> = command.split_ascii_whitespace().collect();
    (lookup.command)(&words).ok_or(Stop::NeedsShell)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use proptest::prelude::*;

    use super::*;

    fn variable(name: &str) -> Option<String> {
        [("HOME", "/h"), ("EMPTY", ""), ("BLANKS", "a  b"), ("UID", "1000")]
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| (*value).to_owned())
    }

    fn evaluated(text: &str) -> Result<Value, Unbalanced> {
        let command = |words: &[&str]| (words == ["id", "-u"]).then(|| "1000".to_owned());
        evaluate(text, &Lookup { variable: &variable, command: &command })
    }

    #[test]
    fn what_administrators_write() {
        for (text, expected) in [
            ("/a/$(id -u)", "/a/1000"),
            ("/a/`id -u`/b", "/a/1000/b"),
            ("/a/$( id  -u )", "/a/1000"),
            ("${HOME}/x", "/h/x"),
            ("$HOME/x", "/h/x"),
            ("~/x", "/h/x"),
            ("~", "/h"),
            ("a~", "a~"),
            ("user-${UID}", "user-1000"),
            ("${XDG_DATA_HOME:-${HOME}/.local}/enroot", "/h/.local/enroot"),
            ("${EMPTY:-x}${EMPTY-y}${HOME:+z}${NONE+w}", "xz"),
            ("\"a  b\"", "a  b"),
            ("'$HOME'", "$HOME"),
            ("\"$HOME\\$\"", "/h$"),
            ("-comp lzo   -noD", "-comp lzo -noD"),
            ("x # note", "x"),
            ("x#y", "x#y"),
            ("\"\"", ""),
            ("a\"\"b ''", "ab "),
            ("$BLANKS", "a b"),
            ("\"$BLANKS\"", "a  b"),
            ("a\\ \\ b", "a  b"),
            ("\"$ a\"", "$ a"),
            ("100%", "100%"),
            ("", ""),
        ] {
            assert_eq!(evaluated(text), Ok(Value::Text(expected.into())), "{text}");
        }
    }

    #[test]
    fn what_takes_a_shell_and_what_even_that_refuses() {
        for text in
            ["$(date)", "a;b", "*", "{a,b}", "${HOME%/x}", "$1", "$$", "~root/x", "${X:-\"a\"}", "a\\", "$(a \"b)\")"]
        {
            assert_eq!(evaluated(text), Ok(Value::NeedsShell), "{text}");
        }
        for (text, missing) in [("'a", "'"), ("\"a", "\""), ("${HOME", "}"), ("$(id", ")"), ("`id", "`")] {
            assert_eq!(evaluated(text), Err(Unbalanced(missing)), "{text}");
        }
    }

    /// What a shell makes of `text`; `None` if it refuses it.
    fn bash(text: &str) -> Option<String> {
        let output = Command::new("/bin/bash")
            .args(["-c", "id() { echo 1000; }; eval \"set -- $1\" && printf %s \"$*\"", "bash", text])
            .env_clear()
            .envs([("HOME", "/h"), ("EMPTY", ""), ("BLANKS", "a  b")])
            .output()
            .unwrap();
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(150))]

        #[test]
        fn a_shell_says_the_same(
            parts in proptest::collection::vec(
                prop_oneof![
                    Just("$HOME"), Just("${EMPTY:-x}"), Just("\""), Just("'"), Just(" "), Just("$BLANKS"), Just("a"),
                    Just("\\"), Just("$(id -u)"), Just("#"), Just("${NONE:-${HOME}}"), Just("~"), Just("/"), Just("$"),
                    Just("`id -u`"), Just("}"), Just("="), Just("%"), Just("${HOME:+\"q\"}"), Just("{"), Just("-"),
                ],
                0..7,
            ),
        ) {
            let text = parts.concat();
            match evaluated(&text) {
                Ok(Value::Text(value)) => prop_assert_eq!(bash(&text), Some(value), "{}", text),
                Ok(Value::NeedsShell) => {}
                Err(_) => prop_assert_eq!(bash(&text), None, "{}", text),
            }
        }

        #[test]
        fn any_text_is_judged(text in ".*") {
            let _ = evaluated(&text);
        }
    }
}
