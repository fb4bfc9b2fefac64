//! The YAML that vendors' tools write: mappings and lists in blocks, scalars of one line. The general parser takes
//! milliseconds for the libraries of a driver, at each start of a container; this takes a fraction of one.
//!
//! It understands a small part of YAML, in which nothing is ambiguous, and says so of everything else: anchors, tags, flow
//! collections, text in blocks, escapes, words and numbers whose meaning depends on YAML's version, keys that come twice. All that
//! is for the general parser, and so is the error of a file that nobody understands.

#![forbid(unsafe_code)]

use serde_json::{Map, Value};

/// Longest text: the specifications of the largest nodes have a tenth.
const MAX_TEXT: usize = 1 << 20;
/// Deepest nesting: a specification has seven levels.
const MAX_DEPTH: u32 = 16;
/// Scalars that some version of YAML takes for something else than text, in lower case.
const WORDS: [&str; 13] = ["null", "~", "true", "false", "yes", "no", "on", "off", "y", "n", ".inf", ".nan", "..."];

/// The document; `None` if it has anything that is not understood here.
pub fn parse(text: &[u8]) -> Option<Value> {
    let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= MAX_TEXT)?;
    if !text.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\n')) {
        return None;
    }
    let mut lines: Vec<Line<'_>> = text.lines().filter_map(Line::new).collect();
    // The document's beginning.
    if lines.first().is_some_and(|line| *line == Line { indent: 0, text: "---" }) {
        lines.remove(0);
    }
    let mut parser = Parser { lines, at: 0 };
    let document = parser.block(MAX_DEPTH)?;
    parser.line().is_none().then_some(document)
}

/// A line with something in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Line<'a> {
    indent: usize,
    /// Without blanks at both ends.
    text: &'a str,
}

impl<'a> Line<'a> {
    /// `None` for blank lines and comments.
    fn new(line: &'a str) -> Option<Self> {
        let text = line.trim_start_matches(' ');
        let line = Self { indent: line.len() - text.len(), text: text.trim_end_matches(' ') };
        (!line.text.is_empty() && !line.text.starts_with('#')).then_some(line)
    }

    fn is_item(&self) -> bool {
        self.text == "-" || self.text.starts_with("- ")
    }

    /// What follows the `-` of a list's item, as if it were a line.
    fn item(&self) -> Option<Self> {
        let rest = self.text.strip_prefix('-').filter(|_| self.is_item())?;
        let text = rest.trim_start_matches(' ');
        Some(Self { indent: self.indent + self.text.len() - text.len(), text })
    }

    /// A key, and the value behind it, which may be empty.
    fn entry(&self) -> Option<(&'a str, &'a str)> {
        let (key, value) = match self.text.split_once(": ") {
            Some((key, value)) => (key, value.trim_start_matches(' ')),
            None => (self.text.strip_suffix(':')?, ""),
        };
        let is_plain = key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-".contains(&byte));
        (key.starts_with(|first: char| first.is_ascii_alphabetic()) && is_plain && !is_word(key))
            .then_some((key, value))
    }
}

fn is_word(text: &str) -> bool {
    WORDS.iter().any(|word| text.eq_ignore_ascii_case(word))
}

struct Parser<'a> {
    lines: Vec<Line<'a>>,
    at: usize,
}

impl<'a> Parser<'a> {
    fn line(&self) -> Option<Line<'a>> {
        self.lines.get(self.at).copied()
    }

    /// The list or mapping that begins here.
    fn block(&mut self, depth: u32) -> Option<Value> {
        let (line, depth) = (self.line()?, depth.checked_sub(1)?);
        if line.is_item() { self.list(line.indent, depth) } else { self.mapping(line.indent, depth) }
    }

    fn list(&mut self, indent: usize, depth: u32) -> Option<Value> {
        let mut list = Vec::new();
        while let Some(line) = self.line().filter(|line| line.indent == indent) {
            let Some(item) = line.item() else { break };
            list.push(if item.text.is_empty() {
                self.at += 1;
                self.deeper(indent, depth)?
            } else if item.is_item() || item.entry().is_some() {
                // Its first line begins behind the dash.
                *self.lines.get_mut(self.at)? = item;
                self.block(depth)?
            } else {
                self.at += 1;
                scalar(item.text)?
            });
            self.ends(indent)?;
        }
        Some(Value::Array(list))
    }

    fn mapping(&mut self, indent: usize, depth: u32) -> Option<Value> {
        let mut mapping = Map::new();
        while let Some(line) = self.line().filter(|line| line.indent == indent && !line.is_item()) {
            let (key, value) = line.entry()?;
            self.at += 1;
            let value = match value {
                // Lists may begin in the column of their key.
                "" if self.line().is_some_and(|next| next.indent == indent && next.is_item()) => {
                    self.list(indent, depth.checked_sub(1)?)?
                }
                "" => self.deeper(indent, depth)?,
                value => scalar(value)?,
            };
            self.ends(indent)?;
            if mapping.insert(key.to_owned(), value).is_some() {
                return None;
            }
        }
        Some(Value::Object(mapping))
    }

    /// What belongs to a line with nothing behind its key or dash.
    fn deeper(&mut self, indent: usize, depth: u32) -> Option<Value> {
        if self.line()?.indent > indent { self.block(depth) } else { None }
    }

    /// A line that is deeper than what it could belong to goes on with a scalar, or is an error.
    fn ends(&self, indent: usize) -> Option<()> {
        self.line().is_none_or(|line| line.indent <= indent).then_some(())
    }
}

fn scalar(text: &str) -> Option<Value> {
    for quote in ['"', '\''] {
        if let Some(rest) = text.strip_prefix(quote) {
            let inside = rest.strip_suffix(quote)?;
            return (!inside.contains([quote, '\\'])).then(|| Value::String(inside.to_owned()));
        }
    }
    match text {
        "[]" => return Some(Value::Array(Vec::new())),
        "{}" => return Some(Value::Object(Map::new())),
        "true" => return Some(Value::Bool(true)),
        "false" => return Some(Value::Bool(false)),
        _ => {}
    }
    let is_decimal = text.len() <= 18 && text.bytes().all(|byte| byte.is_ascii_digit());
    if is_decimal && (text == "0" || !text.starts_with('0')) {
        return Some(Value::Number(text.parse::<u64>().ok()?.into()));
    }
    let mut bytes = text.bytes();
    let begins = match (bytes.next()?, bytes.next()) {
        // An option of a program.
        (b'-', Some(second)) => second.is_ascii_alphabetic() || second == b'-' && text.len() > 3,
        (first, _) => first.is_ascii_alphanumeric() || b"/._".contains(&first),
    };
    let is_plain = text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"/._-+=:,@ ".contains(&byte));
    let is_entry = text.contains(": ") || text.ends_with(':');
    (begins && is_plain && !is_entry && !is_word(text) && !is_numeric(text)).then(|| Value::String(text.to_owned()))
}

/// Whether it may be a number or a date, in some version of YAML. What has three parts is none.
fn is_numeric(text: &str) -> bool {
    let is_version = text.split('.').count() == 3
        && text.split('.').all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()));
    let may_be = |byte: u8| byte.is_ascii_hexdigit() || b"xXoO_+-.: ".contains(&byte);
    !is_version && text.starts_with(|first: char| first.is_ascii_digit() || first == '.') && text.bytes().all(may_be)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(text: &str) -> Option<Value> {
        parse(text.as_bytes())
    }

    #[test]
    fn both_ways_to_indent() {
        let expected = json!({"kind": "v/c", "devices": [
            {"name": "0", "nodes": [{"path": "/dev/a", "mode": 438}, {"path": "/dev/b"}], "gids": []},
            {"name": "GPU-1", "nodes": {}}], "args": ["hook", "--link", "a::b c", "-v", "../x"]});
        let narrow = "---\nargs:\n- hook\n- --link\n- a::b c\n- -v\n- ../x\ndevices:\n- gids: []\n  name: \"0\"\n  nodes:\n  \
                      - mode: 438\n    path: /dev/a\n  - path: /dev/b\n- name: 'GPU-1'\n  nodes: {}\nkind: v/c\n";
        let wide = "kind: v/c # not a comment of ours\n";
        assert_eq!(of(wide), None);
        let wide = "# made by a program\nkind:   v/c\n\ndevices:\n    - name: \"0\"\n      nodes:\n        - path: /dev/a\n          \
                    mode: 438\n        -\n          path: /dev/b\n      gids: []\n    -   name: GPU-1\n        nodes: {}  \n\
                    args:\n    - hook\n    - --link\n    - a::b c\n    - -v\n    - ../x";
        assert_eq!(of(narrow), Some(expected.clone()));
        assert_eq!(of(wide), Some(expected));
    }

    #[test]
    fn what_is_left_to_others() {
        for text in [
            "",
            "---\n",
            "a",
            "a:\n",
            "- a\nb: c\n",
            "a: b\n- c\n",
            "a: b\n c: d\n",
            "a: b\n  c\n",
            "a:\n    b: c\n  d: e\n",
            "a: [b]\n",
            "a: {b: c}\n",
            "a: &x b\n",
            "a: *x\n",
            "a: !!str b\n",
            "a: |\n  b\n",
            "a: >\n  b\n",
            "a: \"b\\n\"\n",
            "a: 'it''s'\n",
            "a: \"b\" # c\n",
            "a: b # c\n",
            "a: b: c\n",
            "a: b:\n",
            "? a\n: b\n",
            "\"a\": b\n",
            "a: 1\na: 2\n",
            "a: null\n",
            "a: ~\n",
            "a: Yes\n",
            "a: off\n",
            "a: 0x1f\n",
            "a: 0644\n",
            "a: 1.5\n",
            "a: -1\n",
            "a: 1e3\n",
            "a: 2001-12-14\n",
            "a: 1:20\n",
            "a: .inf\n",
            "a: TRUE\n",
            "a: 12:30:45.5\n",
            "a: 1_000\n",
            "a: ---\n",
            "true: b\n",
            "a: b\n---\nc: d\n",
            "a: b\n...\n",
            "%YAML 1.2\n---\na: b\n",
            "a:\tb\n",
            "a: b\r\n",
            "a: \u{e4}\n",
            "a: `b`\n",
            "a: %b\n",
            "a: @b\n",
            "a: b\nc\n",
            "- - -\n",
        ] {
            assert_eq!(of(text), None, "{text:?}");
        }
        assert_eq!(of(&"- ".repeat(20)), None);
        assert_eq!(of(&format!("{}a\n", "- ".repeat(20))), None);
        assert_eq!(of(&format!("a: {}\n", "b".repeat(MAX_TEXT))), None);
        assert_eq!(of("v: 0.6.0\nw: 1.2.3.4\n"), None);
        assert_eq!(of("v: 0.6.0\n"), Some(json!({"v": "0.6.0"})));
    }
}
