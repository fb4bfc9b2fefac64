//! `COMPATIBILITY.md` is complete, and every test it names exists.

#![forbid(unsafe_code)]

use std::collections::BTreeMap;
use std::path::Path;

const TABLE: &str = include_str!("COMPATIBILITY.md");

/// Rows of the table: id, verdict, what it says, tests.
fn rows() -> Vec<[&'static str; 4]> {
    TABLE
        .lines()
        .filter(|line| line.starts_with("| C"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
            <[&str; 4]>::try_from(cells).unwrap_or_else(|cells| panic!("{} cells in {line}", cells.len()))
        })
        .collect()
}

#[test]
fn every_behaviour_has_one_row() {
    let mut seen: BTreeMap<&str, usize> = BTreeMap::new();
    for [id, ..] in rows() {
        *seen.entry(id).or_default() += 1;
    }
    let expected: BTreeMap<String, usize> = (1..=126).map(|number| (format!("C{number:03}"), 1)).collect();
    let seen: BTreeMap<String, usize> = seen.into_iter().map(|(id, count)| (id.to_owned(), count)).collect();
    assert_eq!(seen, expected);
}

#[test]
fn every_verdict_is_one_of_four_and_says_why() {
    for [id, verdict, text, tests] in rows() {
        match verdict {
            "same" => assert!(!tests.is_empty(), "{id}: no test"),
            "better" => assert!(!tests.is_empty() && text.contains(':'), "{id}: no test, or not how"),
            "left out" | "not yet" => assert!(text.contains(':'), "{id}: not why"),
            other => panic!("{id}: {other}"),
        }
    }
}

/// Tests are written as `file::name`, with the file below `tests/` or `src/`.
#[test]
fn every_test_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for [id, _, _, tests] in rows() {
        for test in tests.split(", ").filter(|test| !test.is_empty()) {
            let (file, name) = test.trim_matches('`').rsplit_once("::").unwrap_or_else(|| panic!("{id}: {test}"));
            let text = std::fs::read_to_string(root.join(file)).unwrap_or_else(|error| panic!("{id}: {file}: {error}"));
            let defined = [format!("fn {name}("), format!("(\"{name}\",")].iter().any(|form| text.contains(form));
            assert!(defined, "{id}: {file} has no test {name}");
        }
    }
}
