//! What happened on this node since it was booted, as counters for Prometheus: starts of containers, imports, what they
//! failed for. `pyxis metrics` writes them in the text format (prometheus.io/docs/instrumenting/exposition_formats).
//!
//! Brokers count in `RUNTIME/metrics`, a few words that they share ([`crate::sys::counters`]), when a container is ready.
//! Labels have values from this file only: nothing that a user, an image or a registry says becomes one.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::broker::import::{AcquiredImage, ImportError, ImportEvent};
use crate::importer::protocol::FailureKind;
use crate::sys::counters::{self, Counters};

/// One word of the file. The order is the file's: new ones are added at the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Counter {
    /// Containers that could be joined.
    Started,
    /// Starts that failed.
    NotStarted,
    /// Starts whose step ended first.
    Cancelled,
    /// Starts that failed for the import of an image of a registry or an engine.
    NoImage,
    /// For an image in a file.
    NoLocalImage,
    /// For the site's importer.
    NoSiteImage,
    /// For something of this node's.
    NodeFailed,
    /// For what was asked for.
    Refused,
    /// For what container init does: mounts, hooks, devices.
    InitFailed,
    /// Images that were in the store, and used without a question.
    Stored,
    /// Images that were in the store, and that the registry was asked about.
    Confirmed,
    /// Images of which layers were imported.
    Imported,
    /// Layers that were in the store.
    LayersStored,
    /// Layers that were imported.
    LayersImported,
    /// Compressed bytes of imported layers.
    Bytes,
    /// Imports that failed: no such image.
    NotFound,
    /// The registry or a rule of the site's does not allow it.
    Denied,
    /// The registry, or the way to it.
    Unavailable,
    /// The image.
    BadImage,
    /// No space.
    NoSpace,
    /// Anything else of this node's.
    Local,
}

/// Words for [`Counter`]s, with room for more.
const COUNTERS: usize = 64;

/// How long something took.
#[derive(Debug, Clone, Copy)]
enum Histogram {
    StoredStart,
    ImportedStart,
    Import,
}

/// Upper bounds of the buckets, in seconds. There is one more, without a bound.
const BUCKETS: [f64; 15] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1200.0, 3600.0];
/// Words of a histogram: buckets, and the sum in microseconds.
const HISTOGRAM: usize = BUCKETS.len() + 2;
/// All words.
const WORDS: usize = COUNTERS + 8 * HISTOGRAM;

/// A metric that is made of counters.
struct Family {
    name: &'static str,
    help: &'static str,
    /// The label's name; the empty string for none.
    label: &'static str,
    counters: &'static [(&'static str, Counter)],
}

const FAMILIES: [Family; 6] = [
    Family {
        name: "pyxis_container_starts_total",
        help: "Starts of containers, by how they ended.",
        label: "result",
        counters: &[("started", Counter::Started), ("failed", Counter::NotStarted), ("cancelled", Counter::Cancelled)],
    },
    Family {
        name: "pyxis_container_start_failures_total",
        help: "Starts of containers that failed, by what for.",
        label: "kind",
        counters: &[
            ("image", Counter::NoImage),
            ("file", Counter::NoLocalImage),
            ("importer", Counter::NoSiteImage),
            ("node", Counter::NodeFailed),
            ("refused", Counter::Refused),
            ("container", Counter::InitFailed),
        ],
    },
    Family {
        name: "pyxis_images_total",
        help: "Images that were used, by where they were: in the store; there, with the registry asked; imported.",
        label: "source",
        counters: &[("stored", Counter::Stored), ("confirmed", Counter::Confirmed), ("imported", Counter::Imported)],
    },
    Family {
        name: "pyxis_layers_total",
        help: "Layers of images, by whether the store had them.",
        label: "source",
        counters: &[("stored", Counter::LayersStored), ("imported", Counter::LayersImported)],
    },
    Family {
        name: "pyxis_import_bytes_total",
        help: "Compressed bytes of layers that were imported.",
        label: "",
        counters: &[("", Counter::Bytes)],
    },
    Family {
        name: "pyxis_import_failures_total",
        help: "Imports that failed, by why.",
        label: "kind",
        counters: &[
            ("not_found", Counter::NotFound),
            ("denied", Counter::Denied),
            ("unavailable", Counter::Unavailable),
            ("bad_image", Counter::BadImage),
            ("no_space", Counter::NoSpace),
            ("local", Counter::Local),
        ],
    },
];

/// Where the counters are. What cannot be counted is not: no container fails for that.
#[derive(Debug)]
pub struct Metrics {
    counters: Option<Counters>,
}

impl Metrics {
    /// Those of the node whose runtime directory this is.
    pub fn open(runtime: &Path) -> Self {
        Self { counters: Counters::open(&file(runtime), WORDS).ok() }
    }

    /// One more of these.
    pub fn count(&self, counter: Counter) {
        self.add(counter, 1);
    }

    fn add(&self, counter: Counter, value: u64) {
        if let Some(counters) = &self.counters {
            counters.add(counter as usize, value);
        }
    }

    fn took(&self, histogram: Histogram, time: Duration) {
        let Some(counters) = &self.counters else { return };
        let first = COUNTERS + histogram as usize * HISTOGRAM;
        let bucket = BUCKETS.partition_point(|bound| *bound < time.as_secs_f64());
        counters.add(first + bucket, 1);
        counters.add(first + HISTOGRAM - 1, u64::try_from(time.as_micros()).unwrap_or(u64::MAX));
    }

    /// A container can be joined. `imported`: its image was not in the store.
    pub fn started(&self, time: Duration, imported: bool) {
        self.count(Counter::Started);
        self.took(if imported { Histogram::ImportedStart } else { Histogram::StoredStart }, time);
    }

    /// There is an image; `meter` has seen how.
    pub fn acquired(&self, image: &AcquiredImage, meter: &Meter) {
        let imported = meter.missing.min(image.layers.len());
        self.count(match (meter.imported(), image.from_network) {
            (true, _) => Counter::Imported,
            (false, true) => Counter::Confirmed,
            (false, false) => Counter::Stored,
        });
        self.add(Counter::LayersImported, imported as u64);
        self.add(Counter::LayersStored, (image.layers.len() - imported) as u64);
        self.add(Counter::Bytes, meter.bytes());
        if let (Some(began), true) = (meter.began, meter.imported()) {
            self.took(Histogram::Import, began.elapsed());
        }
    }

    /// There is none.
    pub fn not_acquired(&self, error: &ImportError, meter: &Meter) {
        self.add(Counter::Bytes, meter.bytes());
        self.count(match error {
            ImportError::Cancelled { .. } => return,
            ImportError::Refused { kind: FailureKind::NotFound, .. } => Counter::NotFound,
            ImportError::Refused { kind: FailureKind::Denied, .. } => Counter::Denied,
            ImportError::Policy(_) | ImportError::NotAsked { .. } => Counter::Denied,
            ImportError::Refused { kind: FailureKind::Unavailable, .. } => Counter::Unavailable,
            ImportError::Refused { kind: FailureKind::BadImage, .. } | ImportError::Mismatch { .. } => {
                Counter::BadImage
            }
            ImportError::NoSpace { .. } => Counter::NoSpace,
            _ => Counter::Local,
        });
    }
}

fn file(runtime: &Path) -> PathBuf {
    runtime.join("metrics")
}

/// What happens in one import, as far as it is counted.
#[derive(Debug, Default)]
pub struct Meter {
    began: Option<Instant>,
    missing: usize,
    /// By layer.
    received: HashMap<usize, u64>,
}

impl Meter {
    /// Takes note of an event.
    pub fn note(&mut self, event: &ImportEvent) {
        match event {
            ImportEvent::NetworkStart => self.began = self.began.or_else(|| Some(Instant::now())),
            ImportEvent::Resolved { missing, .. } => {
                self.began = self.began.or_else(|| Some(Instant::now()));
                self.missing = *missing;
            }
            ImportEvent::Progress { layer, bytes, .. } => {
                self.received.insert(*layer, *bytes);
            }
            _ => {}
        }
    }

    /// Whether something was not in the store.
    pub fn imported(&self) -> bool {
        self.missing > 0 || !self.received.is_empty()
    }

    fn bytes(&self) -> u64 {
        self.received.values().fold(0, |sum, bytes| sum.saturating_add(*bytes))
    }
}

/// A value that is measured when it is asked for.
#[derive(Debug)]
pub struct Gauge {
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub help: &'static str,
    /// Its value.
    pub value: u64,
}

/// Everything, in the text format.
pub fn render(runtime: &Path, gauges: &[Gauge]) -> io::Result<String> {
    let words = counters::read(&file(runtime), WORDS)?;
    let word = |index: usize| words.get(index).copied().unwrap_or_default();
    let mut text = String::new();
    let mut line = |parts: std::fmt::Arguments<'_>| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "{parts}");
    };
    let head = |line: &mut dyn FnMut(std::fmt::Arguments<'_>), name: &str, help: &str, kind: &str| {
        line(format_args!("# HELP {name} {help}"));
        line(format_args!("# TYPE {name} {kind}"));
    };
    head(&mut line, "pyxis_build_info", "The release of Pyxis.", "gauge");
    line(format_args!("pyxis_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")));
    for Family { name, help, label, counters } in FAMILIES {
        head(&mut line, name, help, "counter");
        for (value, counter) in counters {
            let count = word(*counter as usize);
            match label {
                "" => line(format_args!("{name} {count}")),
                _ => line(format_args!("{name}{{{label}=\"{value}\"}} {count}")),
            }
        }
    }
    let start = "pyxis_container_start_seconds";
    let histogram = |line: &mut dyn FnMut(std::fmt::Arguments<'_>), name: &str, label: &str, which: Histogram| {
        let first = COUNTERS + which as usize * HISTOGRAM;
        let comma = if label.is_empty() { "" } else { "," };
        let mut count = 0;
        for (index, bound) in BUCKETS.iter().enumerate() {
            count += word(first + index);
            line(format_args!("{name}_bucket{{{label}{comma}le=\"{bound}\"}} {count}"));
        }
        count += word(first + BUCKETS.len());
        line(format_args!("{name}_bucket{{{label}{comma}le=\"+Inf\"}} {count}"));
        let label = if label.is_empty() { String::new() } else { format!("{{{label}}}") };
        let micros = word(first + HISTOGRAM - 1);
        line(format_args!("{name}_sum{label} {}.{:06}", micros / 1_000_000, micros % 1_000_000));
        line(format_args!("{name}_count{label} {count}"));
    };
    head(
        &mut line,
        start,
        "Time until a container could be joined, by whether its image was in the store.",
        "histogram",
    );
    histogram(&mut line, start, "image=\"stored\"", Histogram::StoredStart);
    histogram(&mut line, start, "image=\"imported\"", Histogram::ImportedStart);
    head(&mut line, "pyxis_import_seconds", "Time of imports that brought layers.", "histogram");
    histogram(&mut line, "pyxis_import_seconds", "", Histogram::Import);
    for Gauge { name, help, value } in gauges {
        head(&mut line, name, help, "gauge");
        line(format_args!("{name} {value}"));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_is_shown_once() {
        let all: Vec<usize> =
            FAMILIES.iter().flat_map(|family| family.counters).map(|(_, counter)| *counter as usize).collect();
        let mut sorted = all.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted, (0..all.len()).collect::<Vec<_>>());
        assert!(all.len() <= COUNTERS);
    }

    #[test]
    fn times_go_into_their_buckets() {
        let directory = tempfile::tempdir().unwrap();
        let metrics = Metrics::open(directory.path());
        for millis in [3, 5, 7, 4_000_000] {
            metrics.started(Duration::from_millis(millis), false);
        }
        let text = render(directory.path(), &[]).unwrap();
        for line in [
            "pyxis_container_starts_total{result=\"started\"} 4",
            "pyxis_container_start_seconds_bucket{image=\"stored\",le=\"0.005\"} 2",
            "pyxis_container_start_seconds_bucket{image=\"stored\",le=\"0.01\"} 3",
            "pyxis_container_start_seconds_bucket{image=\"stored\",le=\"3600\"} 3",
            "pyxis_container_start_seconds_bucket{image=\"stored\",le=\"+Inf\"} 4",
            "pyxis_container_start_seconds_sum{image=\"stored\"} 4000.015000",
            "pyxis_container_start_seconds_count{image=\"imported\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }

    #[test]
    fn a_node_that_has_done_nothing_has_metrics() {
        let text = render(Path::new("/nonexistent"), &[Gauge { name: "g", help: "h", value: 7 }]).unwrap();
        assert!(text.ends_with("# HELP g h\n# TYPE g gauge\ng 7\n"), "{text}");
        assert!(text.contains("pyxis_import_bytes_total 0\n"), "{text}");
        // And one whose directory is missing is not kept from working.
        Metrics::open(Path::new("/nonexistent")).count(Counter::Started);
    }
}
