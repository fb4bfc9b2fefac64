//! `pyxis metrics`: what starts leave behind them, as a scraper reads it.

use std::collections::BTreeMap;
use std::fs;

use crate::seed::Node;
use crate::text;

type Samples = BTreeMap<String, f64>;

/// Parses the text format as strictly as promtool does: every sample belongs to the family that was declared last, names
/// and labels are well formed, histograms are cumulative and end with `+Inf`, nothing is said twice.
fn parse(exposition: &str) -> Samples {
    let mut samples = Samples::new();
    let (mut family, mut kind, mut helped) = (String::new(), String::new(), String::new());
    let mut declared = Vec::new();
    let is_name = |name: &str| !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
    assert!(exposition.ends_with('\n'));
    for line in exposition.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').unwrap();
            assert!(is_name(name) && help.ends_with('.'), "{line}");
            helped = name.to_owned();
            continue;
        }
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, of_kind) = rest.split_once(' ').unwrap();
            assert_eq!(helped, name);
            assert!(!declared.contains(&name.to_owned()), "{line}");
            declared.push(name.to_owned());
            (family, kind) = (name.to_owned(), of_kind.to_owned());
            assert!(["counter", "gauge", "histogram"].contains(&of_kind), "{line}");
            assert_eq!(of_kind == "counter", name.ends_with("_total"), "{line}");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let name = series.split('{').next().unwrap();
        let suffix = name.strip_prefix(&family).unwrap_or_else(|| panic!("{line} is not of {family}"));
        let suffixes: &[&str] = if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
        assert!(is_name(name) && suffixes.contains(&suffix), "{line}");
        if let Some(labels) = series.strip_prefix(name).filter(|labels| !labels.is_empty()) {
            let labels = labels.strip_prefix('{').and_then(|labels| labels.strip_suffix('}')).unwrap();
            for label in labels.split(',') {
                let (label, quoted) = label.split_once('=').unwrap();
                let inner = quoted.strip_prefix('"').and_then(|rest| rest.strip_suffix('"')).unwrap();
                assert!(is_name(label) && !inner.contains(['"', '\\', '\n']), "{line}");
            }
        }
        assert!(samples.insert(series.to_owned(), value.parse().unwrap()).is_none(), "{line}");
    }
    for (series, count) in samples.iter().filter(|(series, _)| series.contains("_bucket{")) {
        let Some((before, bound)) = series.split_once("le=\"") else { panic!("{series}") };
        let all = samples[&format!("{before}le=\"+Inf\"}}")];
        assert!(count <= &all, "{series}");
        if bound == "+Inf\"}" {
            let total = before.replace("_bucket{", "_count{").trim_end_matches(',').to_owned() + "}";
            assert_eq!(samples[&total.replace("{}", "")], *count, "{series}");
        }
    }
    samples
}

fn metrics(node: &Node) -> Samples {
    let output = node.pyxis(&["metrics"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    parse(std::str::from_utf8(&output.stdout).unwrap())
}

#[test]
fn starts_are_counted_and_timed() {
    let node = Node::new();
    let before = metrics(&node);
    assert_eq!(before["pyxis_container_starts_total{result=\"started\"}"], 0.0);
    assert!(before["pyxis_store_layers"] > 0.0);
    assert!(before["pyxis_store_bytes"] > 0.0 && before["pyxis_store_available_bytes"] > 0.0);
    for _ in 0..3 {
        assert!(node.run(&[], "true").status.success());
    }
    assert!(!node.run(&["--container-mounts=/nonexistent:/x"], "true").status.success());
    let after = metrics(&node);
    for (series, count) in [
        ("pyxis_container_starts_total{result=\"started\"}", 3.0),
        ("pyxis_container_starts_total{result=\"failed\"}", 1.0),
        ("pyxis_container_start_failures_total{kind=\"container\"}", 1.0),
        ("pyxis_images_total{source=\"stored\"}", 4.0),
        ("pyxis_layers_total{source=\"stored\"}", 12.0),
        ("pyxis_layers_total{source=\"imported\"}", 0.0),
        ("pyxis_container_start_seconds_count{image=\"stored\"}", 3.0),
    ] {
        assert_eq!(after[series], count, "{series}");
    }
    assert!(after["pyxis_container_start_seconds_sum{image=\"stored\"}"] > 0.0);
    // The series are always the same.
    assert!(before.keys().eq(after.keys()));
}

#[test]
fn many_starts_at_once_are_all_counted() {
    let node = Node::new();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert!(node.run(&[], "true").status.success()));
        }
    });
    assert_eq!(metrics(&node)["pyxis_container_starts_total{result=\"started\"}"], 8.0);
}

#[test]
fn a_file_of_metrics_is_replaced_as_a_whole() {
    let node = Node::new();
    let directory = node.host_directory();
    let file = directory.join("pyxis.prom");
    fs::write(&file, "old").unwrap();
    let output = node.pyxis(&["metrics", "--output", file.to_str().unwrap()]);
    assert!(output.status.success() && output.stdout.is_empty(), "{}", text(&output.stderr));
    assert!(!parse(&fs::read_to_string(&file).unwrap()).is_empty());
    let names: Vec<_> = fs::read_dir(&directory).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert!(names.iter().filter(|name| name.to_string_lossy().contains(".prom")).count() == 1, "{names:?}");
    let failed = node.pyxis(&["metrics", "--output", "/nonexistent/pyxis.prom"]);
    assert_eq!(text(&failed.stderr), "pyxis: cannot write /nonexistent/pyxis.prom: No such file or directory");
}
