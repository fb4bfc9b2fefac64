//! What the documents say about the program is true of its sources.

use std::fs;
use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn files(directory: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).unwrap().flatten() {
        match entry.path() {
            path if path.is_dir() => found.extend(files(&path, extension)),
            path if path.extension().is_some_and(|found| found == extension) => found.push(path),
            _ => {}
        }
    }
    found
}

/// The sources as the compiler sees their strings: a backslash at the end of a line joins it with the next, and a quote is
/// one.
fn sources() -> String {
    let mut all = String::new();
    for path in files(&root().join("src"), "rs") {
        let text = read(&path);
        let mut parts = text.split("\\\n");
        all.push_str(parts.next().unwrap_or_default());
        parts.for_each(|part| all.push_str(part.trim_start()));
    }
    all.replace("\\\"", "\"").replace('`', "")
}

/// The first placeholder in `text`, if there is one: `{}`, `{name}`, `{error:?}`, as format strings have them.
fn placeholder(text: &str) -> Option<(usize, usize)> {
    let start = text.find('{')?;
    Some((start, start + text[start..].find('}')? + 1))
}

/// Whether `source` begins with `wanted`, in which `…` stands for one or more placeholders.
fn begins_with(source: &str, wanted: &str) -> bool {
    let Some((before, after)) = wanted.split_once('…') else { return source.starts_with(wanted) };
    let Some(mut rest) = source.strip_prefix(before) else { return false };
    while let Some((0, end)) = placeholder(rest) {
        rest = &rest[end..];
        if begins_with(rest, after) {
            return true;
        }
    }
    false
}

#[test]
fn every_message_in_troubleshooting_is_one() {
    let (sources, text) = (sources(), read("docs/troubleshooting.md"));
    let headings: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert!(headings.len() > 30);
    for heading in headings {
        let message = heading.strip_prefix('`').and_then(|rest| rest.strip_suffix('`')).expect(heading);
        // At the beginning and the end anything may differ.
        let wanted = message.trim_start_matches('…').trim_end_matches('…');
        // From a literal piece on: placeholders are what lies between.
        let literal = wanted.split('…').next().unwrap();
        let found = sources.match_indices(literal).any(|(at, _)| begins_with(&sources[at..], wanted));
        assert!(found, "no source says {message}");
    }
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut documents = files(&root().join("docs"), "md");
    documents.extend(["README.md", "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md"].map(|name| root().join(name)));
    let mut count = 0;
    for document in &documents {
        let text = read(document);
        for target in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if target.contains("://") {
                continue;
            }
            let (path, anchor) = target.split_once('#').map_or((target, None), |(path, anchor)| (path, Some(anchor)));
            let linked = match path {
                "" => document.clone(),
                path => document.parent().unwrap().join(path),
            };
            assert!(linked.exists(), "{}: {target}", document.display());
            if let Some(anchor) = anchor {
                let linked = read(&linked);
                let is_heading = |line: &str| line.starts_with('#') && slug(line) == anchor;
                assert!(linked.lines().any(is_heading), "{}: {target}", document.display());
            }
            count += 1;
        }
    }
    assert!(count > 10);
}

/// The anchor of a heading.
fn slug(heading: &str) -> String {
    let text = heading.trim_start_matches('#').trim().to_lowercase();
    let kept = text.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}
