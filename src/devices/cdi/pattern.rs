//! Wildcard device nodes (CDI specification, 1.2.0): the last element of a path may be a pattern as Go's `path.Match` has
//! it, and stands for whatever device nodes of the host match.

#![forbid(unsafe_code)]

/// An absolute path whose last element is a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pattern<'a> {
    directory: &'a str,
    pattern: &'a str,
}

impl<'a> Pattern<'a> {
    /// Whether `path` has a character that makes it one.
    pub fn is_pattern(path: &str) -> bool {
        path.contains(['*', '?', '[', '\\'])
    }

    /// `None`: there is a wildcard elsewhere, a `.` or `..`, or the pattern is malformed.
    pub fn new(path: &'a str) -> Option<Self> {
        let (directory, pattern) = path.rsplit_once('/')?;
        let plain = !Self::is_pattern(directory) && !directory.split('/').any(|part| matches!(part, "." | ".."));
        let absolute = directory.is_empty() || directory.starts_with('/');
        // Any text shows whether the pattern itself is well-formed: all of it is looked at.
        (absolute && plain && !pattern.is_empty() && well_formed(pattern)).then_some(Self { directory, pattern })
    }

    /// Where to look.
    pub fn directory(self) -> &'a str {
        if self.directory.is_empty() { "/" } else { self.directory }
    }

    /// What the names there have to match.
    pub fn pattern(self) -> &'a str {
        self.pattern
    }

    /// The path of `name` in this directory.
    pub fn path_of(self, name: &str) -> String {
        format!("{}/{name}", self.directory)
    }

    /// Whether `name` matches.
    pub fn matches(self, name: &str) -> bool {
        let pattern: Vec<char> = self.pattern.chars().collect();
        let name: Vec<char> = name.chars().collect();
        // Positions of the last `*` and of what it has to leave over: it takes as little as possible, then more.
        let (mut at, mut taken) = (0, 0);
        let mut star: Option<(usize, usize)> = None;
        loop {
            if pattern.get(at) == Some(&'*') {
                at += 1;
                star = Some((at, taken));
                continue;
            }
            if at == pattern.len() && taken == name.len() {
                return true;
            }
            let step = name.get(taken).and_then(|&character| one(&pattern[at.min(pattern.len())..], character));
            if let Some(length) = step {
                at += length;
                taken += 1;
                continue;
            }
            match star {
                Some((after, from)) if from < name.len() => {
                    (at, taken) = (after, from + 1);
                    star = Some((after, from + 1));
                }
                _ => return false,
            }
        }
    }
}

/// The length of the beginning of `pattern` that matches `character`.
fn one(pattern: &[char], character: char) -> Option<usize> {
    match *pattern.first()? {
        '?' => Some(1),
        '\\' => (*pattern.get(1)? == character).then_some(2),
        '[' => {
            let Class { ranges, negated, length } = class(pattern)?;
            let within = ranges.iter().any(|&(low, high)| (low..=high).contains(&character));
            (within != negated).then_some(length)
        }
        plain => (plain == character).then_some(1),
    }
}

/// What is between brackets.
struct Class {
    ranges: Vec<(char, char)>,
    negated: bool,
    /// Of it all, with the brackets.
    length: usize,
}

fn class(pattern: &[char]) -> Option<Class> {
    let negated = pattern.get(1) == Some(&'^');
    let mut at = if negated { 2 } else { 1 };
    let mut ranges = Vec::new();
    let character = |at: &mut usize| {
        let mut found = *pattern.get(*at)?;
        if found == '\\' {
            *at += 1;
            found = *pattern.get(*at)?;
        } else if found == '-' || found == ']' {
            return None;
        }
        *at += 1;
        Some(found)
    };
    while ranges.is_empty() || pattern.get(at) != Some(&']') {
        let low = character(&mut at)?;
        let high = if pattern.get(at) == Some(&'-') {
            at += 1;
            character(&mut at)?
        } else {
            low
        };
        ranges.push((low, high));
    }
    Some(Class { ranges, negated, length: at + 1 })
}

fn well_formed(pattern: &str) -> bool {
    let pattern: Vec<char> = pattern.chars().collect();
    let mut at = 0;
    while let Some(first) = pattern.get(at) {
        at += match first {
            '\\' if at + 1 == pattern.len() => return false,
            '\\' => 2,
            '[' => match class(&pattern[at..]) {
                Some(class) => class.length,
                None => return false,
            },
            _ => 1,
        };
    }
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn matches(pattern: &str, name: &str) -> bool {
        let path = format!("/dev/{pattern}");
        Pattern::new(&path).unwrap().matches(name)
    }

    #[test]
    fn names_that_match() {
        for (pattern, name, expected) in [
            ("card*", "card0", true),
            ("card*", "card", true),
            ("card*", "scard0", false),
            ("*", "anything", true),
            ("*D*8", "renderD128", true),
            ("*D*8", "renderD129", false),
            ("mei[0-9]", "mei3", true),
            ("mei[0-9]", "mei", false),
            ("mei[^0-4x]", "mei5", true),
            ("mei[^0-4x]", "meix", false),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            (r"a\*c", "a*c", true),
            (r"a\*c", "abc", false),
            (r"[\]a]", "]", true),
            ("plain", "plain", true),
            ("plain", "plainer", false),
            ("*a*a*a*b", "aaaaaaaaaaaaaaaaaaaaaaaaaaa", false),
        ] {
            assert_eq!(matches(pattern, name), expected, "{pattern} {name}");
        }
    }

    #[test]
    fn patterns_that_are_none() {
        for path in ["/dev/*/x", "/dev/../x*", "dev/x*", "/dev/[", "/dev/[]a]", "/dev/[a-]", "/dev/x\\", "/dev/"] {
            assert_eq!(Pattern::new(path), None, "{path}");
        }
        let pattern = Pattern::new("/dev/dri/card*").unwrap();
        assert_eq!((pattern.directory(), pattern.pattern()), ("/dev/dri", "card*"));
        assert_eq!(pattern.path_of("card7"), "/dev/dri/card7");
        assert_eq!(Pattern::new("/x*").unwrap().directory(), "/");
    }

    proptest! {
        #[test]
        fn a_star_for_any_part_matches(before in "[a-z]{0,4}", middle in "[a-z]{0,4}", after in "[a-z]{0,4}") {
            let (pattern, name) = (format!("{before}*{after}"), format!("{before}{middle}{after}"));
            prop_assert!(matches(&pattern, &name));
        }

        #[test]
        fn nothing_panics(pattern in r"[a-c*?\[\]\\^-]{0,12}", name in "[a-c-]{0,12}") {
            let path = format!("/{pattern}");
            if let Some(pattern) = Pattern::new(&path) {
                pattern.matches(&name);
            }
        }
    }
}
