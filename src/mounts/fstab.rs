//! fstab files as enroot writes and reads them: of images, of `mounts.d` and of hooks (behaviour reference, section 15).
//!
//! fstab(5) with fields that may be missing, `${NAME}` from the environment, and the sixth field as the time of the
//! mount. Where enroot silently drops what it does not understand, this says so: a line that is too long for it is an
//! error, and one for a time that never comes is a warning.

#![forbid(unsafe_code)]

use super::entry::{MountEntry, is_known_option};
use crate::enroot::substitute::{Variables, substitute};

/// Most bytes of a file.
pub const MAX_FILE: u64 = 1 << 20;
/// Most bytes of a line, after the variables have been replaced: enroot reads no further.
const MAX_LINE: usize = 4095;
/// Most lines that mount something: more are a mistake, and would take the kernel's limit of mounts from others.
const MAX_ENTRIES: usize = 10_000;

/// When a mount happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pass {
    /// -1: before the hooks.
    BeforeHooks,
    /// 0: after them.
    AfterHooks,
}

/// What a file asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fstab {
    /// The mounts in order.
    pub entries: Vec<(Pass, MountEntry)>,
    /// What is odd, one line each.
    pub warnings: Vec<String>,
}

/// A file that cannot be used, in the words of `enroot-mount`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FstabError {
    /// A line without a target.
    #[error("enroot-mount: invalid fstab entry: \"{line}\" at {file}")]
    Entry {
        /// The line, or its beginning.
        line: String,
        /// The file.
        file: String,
    },
    /// A line that enroot would not read.
    #[error("enroot-mount: invalid fstab entry: line {number} at {file} is longer than {MAX_LINE} bytes")]
    TooLong {
        /// From 1.
        number: usize,
        /// The file.
        file: String,
    },
    /// Too many lines.
    #[error("enroot-mount: invalid fstab: {file} has more than {MAX_ENTRIES} entries")]
    TooMany {
        /// The file.
        file: String,
    },
}

impl Fstab {
    /// Reads `text`, the content of `file`; `variable` is what `${NAME}` stands for, if that means anything.
    pub fn parse(text: &str, file: &str, variable: Option<Variables<'_>>) -> Result<Self, FstabError> {
        let mut fstab = Self::default();
        for (index, line) in text.lines().enumerate() {
            let line = line.trim_matches(BLANKS);
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let line = match variable {
                // A value stays on the line it is on.
                Some(variable) => {
                    let escaped = |name: &str| {
                        Some(variable(name)?.split(|&byte| byte == b'\n').collect::<Vec<_>>().join(&b"\\012"[..]))
                    };
                    String::from_utf8_lossy(&substitute(line.as_bytes(), &escaped)).into_owned()
                }
                None => line.to_owned(),
            };
            if line.len() > MAX_LINE {
                return Err(FstabError::TooLong { number: index + 1, file: file.to_owned() });
            }
            let Some(parsed) = parse_line(&line) else {
                let line = line.chars().take(200).map(|c| if c.is_control() { '?' } else { c }).collect();
                return Err(FstabError::Entry { line, file: file.to_owned() });
            };
            let place = || format!("{file}:{}", index + 1);
            for option in parsed.unused.iter().map(|option| option.escape_debug()) {
                fstab.warnings.push(format!("{}: option \"{option}\" means nothing here: ignored", place()));
            }
            let pass = match parsed.pass {
                -1 => Pass::BeforeHooks,
                0 => Pass::AfterHooks,
                other => {
                    fstab.warnings.push(format!(
                        "{}: never mounted: the last field is {other}, and only -1 (before the hooks) and 0 (after \
                         them) mean something",
                        place()
                    ));
                    continue;
                }
            };
            if fstab.entries.len() == MAX_ENTRIES {
                return Err(FstabError::TooMany { file: file.to_owned() });
            }
            fstab.entries.push((pass, parsed.entry));
        }
        Ok(fstab)
    }

    /// The mounts of one time, in order.
    pub fn of(&self, pass: Pass) -> impl Iterator<Item = &MountEntry> {
        self.entries.iter().filter(move |(of, _)| *of == pass).map(|(_, entry)| entry)
    }

    /// Appends what another file asks for.
    pub fn extend(&mut self, other: Self) {
        self.entries.extend(other.entries);
        self.warnings.extend(other.warnings);
    }
}

const BLANKS: [char; 3] = [' ', '\t', '\r'];

struct Parsed {
    pass: i64,
    entry: MountEntry,
    unused: Vec<String>,
}

/// One line, not blank and not a comment. `None`: it has no target.
fn parse_line(line: &str) -> Option<Parsed> {
    let mut fields: Vec<String> = line.split(BLANKS).filter(|field| !field.is_empty()).map(unescape).collect();
    let is_options = |fields: &[String], at: usize| {
        fields.get(at).is_some_and(|text| is_known_option(text) || text.contains(',') && !text.starts_with(['/', '.']))
    };
    // What is missing before the options is put there; then the options and what follows are where they belong.
    if fields.len() == 1 {
        let target = fields.first().filter(|source| *source != "tmpfs")?.clone();
        fields.push(target);
    }
    if is_options(&fields, 1) {
        fields.insert(1, "none".to_owned());
    }
    if is_options(&fields, 2) {
        fields.insert(2, "none".to_owned());
    }
    let field = |at: usize| fields.get(at).map(String::as_str);
    let (source, target) = (field(0)?, field(1)?);
    let target = if target == "none" { source } else { target };
    let (kind, options) = match field(2) {
        Some(kind) => (kind, field(3).unwrap_or_default()),
        None if source == "tmpfs" => ("tmpfs", ""),
        None => ("none", IMPLIED),
    };
    let number = |at: usize| field(at).and_then(|text| text.parse::<i64>().ok()).unwrap_or(0);
    let pass = match number(5) {
        0 => number(4),
        pass => pass,
    };
    let (entry, unused) = MountEntry::of_type(kind, source, target, options.split(','));
    Some(Parsed { pass, entry, unused })
}

/// What a line with nothing but paths means.
const IMPLIED: &str = "rbind,x-create=auto";

/// getmntent(3): blanks and backslashes in a field are written in octal.
fn unescape(field: &str) -> String {
    let mut result = String::new();
    let mut rest = field;
    while let Some((before, after)) = rest.split_once('\\') {
        result.push_str(before);
        let escaped = [("040", ' '), ("011", '\t'), ("012", '\n'), ("134", '\\'), ("\\", '\\')];
        let found = escaped.iter().find_map(|(code, meaning)| Some((after.strip_prefix(code)?, *meaning)));
        let (after, meaning) = found.unwrap_or((after, '\\'));
        result.push(meaning);
        rest = after;
    }
    result + rest
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::mounts::entry::{Action, Create};

    fn variable(name: &str) -> Option<Vec<u8>> {
        [("HOME", "/h"), ("EMPTY", ""), ("LINES", "a\nb"), ("BLANK", "a b"), ("ENROOT_ROOTFS", "/root")]
            .iter()
            .find(|(key, _)| *key == name)
            .map(|(_, value)| value.as_bytes().to_owned())
    }

    fn parse(text: &str) -> Result<Fstab, String> {
        Fstab::parse(text, "/f", Some(&variable)).map_err(|error| error.to_string())
    }

    fn one(line: &str) -> (Pass, MountEntry) {
        let fstab = parse(line).unwrap();
        assert_eq!((fstab.entries.len(), fstab.warnings.len()), (1, 0), "{line}: {fstab:?}");
        fstab.entries[0].clone()
    }

    fn full(kind: &str, source: &str, target: &str, options: &str) -> (Pass, MountEntry) {
        (Pass::AfterHooks, MountEntry::of_type(kind, source, target, options.split(',')).0)
    }

    #[test]
    fn short_forms() {
        for (line, expected) in [
            ("tmpfs /t", full("tmpfs", "tmpfs", "/t", "")),
            ("/s", full("none", "/s", "/s", "rbind,x-create=auto")),
            ("/s rbind", full("none", "/s", "/s", "rbind")),
            ("/s ro,bind", full("none", "/s", "/s", "ro,bind")),
            ("/s /d", full("none", "/s", "/d", "rbind,x-create=auto")),
            ("/s /d x-create=dir,bind", full("none", "/s", "/d", "x-create=dir,bind")),
            ("none /d proc", full("proc", "none", "/d", "")),
            ("/s none bind,ro", full("none", "/s", "/s", "bind,ro")),
            ("tmpfs /d x-create=dir,size=1m", full("tmpfs", "tmpfs", "/d", "x-create=dir,size=1m")),
            ("umount /d x-detach", full("none", "umount", "/d", "x-detach")),
            ("none /d none slave", full("none", "none", "/d", "slave")),
            ("/s /d none bind 0 0", full("none", "/s", "/d", "bind")),
            ("\t /s\t \t/d none bind # a remark", full("none", "/s", "/d", "bind")),
        ] {
            assert_eq!(one(line), expected, "{line}");
        }
        assert_eq!(parse("tmpfs").unwrap_err(), "enroot-mount: invalid fstab entry: \"tmpfs\" at /f");
        assert_eq!(parse("# x\n\n  #y\n"), Ok(Fstab::default()));
    }

    #[test]
    fn variables_and_escapes() {
        for (line, source, target) in [
            ("${HOME}/x /d none bind", "/h/x", "/d"),
            ("$HOME ${HOME:-x} none bind", "$HOME", "${HOME:-x}"),
            ("/s${EMPTY}${NONE} /d none bind", "/s", "/d"),
            ("/a\\040b /c\\011\\134\\012 none bind", "/a b", "/c\t\\\n"),
            ("/a\\041 /b\\ none bind", "/a\\041", "/b\\"),
            ("/a${LINES} /d none bind", "/aa\nb", "/d"),
            ("${BLANK} none bind", "a", "b"),
            ("${ENROOT_ROOTFS}/data /data none x-create=dir,bind,rw,nosuid,nodev", "/root/data", "/data"),
        ] {
            let (_, entry) = parse(line).unwrap().entries[0].clone();
            assert_eq!((&*entry.source, &*entry.target), (source, target), "{line}");
        }
    }

    #[test]
    fn passes() {
        assert_eq!(one("/s /d none bind 0 -1").0, Pass::BeforeHooks);
        assert_eq!(one("/s /d none bind -1").0, Pass::BeforeHooks);
        assert_eq!(one("/s /d none bind -1 0").0, Pass::BeforeHooks);
        assert_eq!(one("/s /d none bind 7 -1").0, Pass::BeforeHooks);
        assert_eq!(one("/s /d rbind,ro 0 -1").0, Pass::BeforeHooks);
        assert_eq!(one("/s rbind 0 -1").0, Pass::BeforeHooks);
        let fstab = parse("/s /d none bind 0 2\n/s /d none bind 1 0\n/a /b none bind").unwrap();
        assert_eq!(fstab.entries.len(), 1);
        assert!(fstab.warnings[0].starts_with("/f:1: never mounted: the last field is 2"), "{:?}", fstab.warnings);
        assert_eq!(fstab.warnings.len(), 2);
    }

    #[test]
    fn what_enroot_drops_silently_is_told() {
        let long = format!("/ok\n/{} /d none bind\n", "x".repeat(5000));
        assert_eq!(
            parse(&long).unwrap_err(),
            "enroot-mount: invalid fstab entry: line 2 at /f is longer than 4095 bytes"
        );
        assert_eq!(parse(&format!("#{}\n/s", "x".repeat(5000))).unwrap().entries.len(), 1);
        let odd = parse("/s /d none bind,x-systemd.automount").unwrap();
        assert_eq!(odd.warnings, ["/f:1: option \"x-systemd.automount\" means nothing here: ignored"]);
        let line_break = parse("/a /b none bind,x-a\\012b").unwrap();
        assert_eq!(line_break.warnings, [r#"/f:1: option "x-a\nb" means nothing here: ignored"#]);
        assert_eq!(odd.entries[0].1.action, Action::Bind { recursive: false });
        assert_eq!(odd.entries[0].1.create, Create::No);
    }

    proptest! {
        #[test]
        fn any_text_is_judged(text in "(?s).*") {
            if let Err(error) = Fstab::parse(&text, "/f", Some(&variable)) {
                prop_assert!(!error.to_string().contains('\n'));
            }
        }

        #[test]
        fn escaped_fields_read_back(source in "/[ -~\t\n]{0,9}", target in "/[ -~\t\n]{0,9}") {
            let escape = |text: &str| {
                text.replace('\\', "\\134").replace(' ', "\\040").replace('\t', "\\011").replace('\n', "\\012")
            };
            let line = format!("{} {} none bind 0 -1", escape(&source), escape(&target));
            prop_assume!(!line.contains("${"));
            let (pass, entry) = one(&line);
            prop_assert_eq!((pass, entry.source, entry.target), (Pass::BeforeHooks, source, target));
        }
    }
}
