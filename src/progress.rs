//! How far an import is, for people: now and then a line in a job's output, or one line on a terminal that is kept up to
//! date.
//!
//! [`Progress`] turns the events of an import into a line, and says when a line is due. [`Screen`] shows it for a command;
//! in a step the leading task does.

#![forbid(unsafe_code)]

use std::collections::{BTreeMap, VecDeque};
use std::io::{Stderr, Write};
use std::time::{Duration, Instant};

use crate::broker::import::ImportEvent;
use crate::config::ProgressSettings;
use crate::store::{count, size};
use crate::sys::terminal::LiveLine;

/// The rate is that of the last seconds.
const WINDOW: Duration = Duration::from_secs(10);
/// How often a line on a terminal changes.
const REFRESH: Duration = Duration::from_millis(250);
/// What is done sooner needs no line on a terminal.
const LIVE_AFTER: Duration = Duration::from_secs(1);

/// One import.
#[derive(Debug)]
pub struct Progress {
    image: String,
    state: State,
    /// What went wrong last, if nothing has arrived since.
    trouble: Option<String>,
    /// Bytes of the blobs so far, by layer, and of how many.
    layers: BTreeMap<usize, (u64, u64)>,
    /// When how much had arrived.
    samples: VecDeque<(Instant, u64)>,
    began: Instant,
    /// When the next line is due. `None`: never.
    due: Option<Instant>,
    interval: Duration,
    refreshed: Option<Instant>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// What the image is, is being found out.
    Asking,
    /// By another step of the user's.
    Elsewhere,
    /// Layers come.
    Downloading { layers: usize, missing: usize, bytes: u64, elsewhere: usize },
}

/// What there is to show.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// The line.
    pub line: String,
    /// Whether it is time for a line in an output that keeps every line; else it is for terminals only.
    pub due: bool,
}

impl Progress {
    /// Of the import of `image`, which begins now.
    pub fn new(image: &str, settings: &ProgressSettings) -> Self {
        Self::beginning_at(Instant::now(), image, settings)
    }

    fn beginning_at(began: Instant, image: &str, settings: &ProgressSettings) -> Self {
        let interval = Duration::from_secs(settings.interval_seconds.into());
        let due = began.checked_add(Duration::from_secs(settings.after_seconds.into()));
        Self {
            image: image.to_owned(),
            state: State::Asking,
            trouble: None,
            layers: BTreeMap::new(),
            samples: VecDeque::new(),
            began,
            due,
            interval,
            refreshed: None,
        }
    }

    /// Takes note of an event. Returns what to show, if it is time for it.
    pub fn note(&mut self, event: &ImportEvent) -> Option<Update> {
        self.note_at(Instant::now(), event)
    }

    fn note_at(&mut self, now: Instant, event: &ImportEvent) -> Option<Update> {
        match event {
            ImportEvent::Waiting => self.state = State::Elsewhere,
            ImportEvent::Resolved { layers, missing, bytes } => {
                let (layers, missing, bytes) = (*layers, *missing, *bytes);
                self.state = State::Downloading { layers, missing, bytes, elsewhere: 0 };
            }
            ImportEvent::Progress { layer, bytes, total } => {
                self.layers.insert(*layer, (*bytes, *total));
                self.trouble = None;
                self.sample(now);
            }
            ImportEvent::Trouble(message) => self.trouble = Some(message.clone()),
            ImportEvent::Tick { elsewhere: now_elsewhere } => {
                if let State::Downloading { elsewhere, .. } = &mut self.state {
                    *elsewhere = *now_elsewhere;
                }
                self.sample(now);
            }
            // Whoever is told of a process or a line has other means.
            ImportEvent::NetworkStart
            | ImportEvent::Process { .. }
            | ImportEvent::Meant(_)
            | ImportEvent::Warning(_)
            | ImportEvent::Crowded(_)
            | ImportEvent::Log(_) => return None,
        }
        if self.interval.is_zero() {
            return None;
        }
        let fresh = self.refreshed.is_some_and(|last| now.saturating_duration_since(last) < REFRESH);
        let due = self.due.is_some_and(|due| now >= due);
        if due {
            self.due = now.checked_add(self.interval);
        }
        if !due && (fresh || now.saturating_duration_since(self.began) < LIVE_AFTER) {
            return None;
        }
        self.refreshed = Some(now);
        Some(Update { line: self.line(now), due })
    }

    fn received(&self) -> u64 {
        self.layers.values().fold(0, |sum, (bytes, _)| sum.saturating_add(*bytes))
    }

    fn sample(&mut self, now: Instant) {
        self.samples.push_back((now, self.received()));
        while self.samples.front().is_some_and(|(then, _)| now.saturating_duration_since(*then) > WINDOW) {
            self.samples.pop_front();
        }
    }

    /// Bytes a second.
    fn rate(&self, now: Instant) -> f64 {
        let Some((then, before)) = self.samples.front() else { return 0.0 };
        let seconds = now.saturating_duration_since(*then).as_secs_f64();
        if seconds < 0.1 { 0.0 } else { self.received().saturating_sub(*before) as f64 / seconds }
    }

    fn line(&self, now: Instant) -> String {
        let mut line = format!("{}: ", self.image);
        line += &match self.state {
            State::Asking => "waiting for the registry".to_owned(),
            State::Elsewhere => "waiting for another step that imports it".to_owned(),
            State::Downloading { .. } if self.received() == 0 && self.layers.is_empty() => {
                "waiting for the registry".to_owned()
            }
            State::Downloading { bytes, .. } => self.download(bytes, now),
        };
        if let State::Downloading { layers, missing, elsewhere, .. } = self.state {
            let done = self.layers.values().filter(|(bytes, total)| bytes == total).count();
            line += &format!(", {done} of {}", count(missing, "layer"));
            if layers > missing {
                line += &format!(", {} in the store", layers - missing);
            }
            if elsewhere > 0 {
                line += &format!(", {elsewhere} imported by other steps");
            }
        }
        if let Some(trouble) = &self.trouble {
            line += &format!("; {trouble}");
        }
        line
    }

    fn download(&self, bytes: u64, now: Instant) -> String {
        let received = self.received();
        let rate = self.rate(now);
        let mut text = format!("{} of {}", size(received), size(bytes));
        // Saturates at the bounds of u64.
        text += &format!(", {}/s", size(rate as u64));
        let left = bytes.saturating_sub(received);
        if left > 0 && rate >= 1.0 {
            text += &format!(", {} left", duration((left as f64 / rate).ceil() as u64));
        }
        text
    }
}

/// Seconds for people: `45 s`, `12 min`, `3 h 20 min`.
fn duration(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds.div_ceil(60)),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}

/// Where a command shows the progress of its imports: one line that changes on a terminal, else those that are due.
#[derive(Debug)]
pub struct Screen<W: Write> {
    line: LiveLine<W>,
}

impl Screen<Stderr> {
    /// Standard error.
    pub fn stderr() -> Self {
        Self { line: LiveLine::stderr() }
    }
}

impl<W: Write> Screen<W> {
    /// Shows an update.
    pub fn show(&mut self, update: &Update) {
        if self.line.is_live() {
            self.line.show(&update.line);
        } else if update.due {
            self.line.print(&format!("pyxis: {}", update.line));
        }
    }

    /// Takes the line away, before something else is written. Dropping it does, too.
    pub fn clear(&mut self) {
        self.line.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: ProgressSettings = ProgressSettings { after_seconds: 10, interval_seconds: 30 };

    fn seconds(began: Instant, seconds: f64) -> Instant {
        began + Duration::from_secs_f64(seconds)
    }

    #[test]
    fn lines_are_few_and_say_everything() {
        let began = Instant::now();
        let mut progress = Progress::beginning_at(began, "alpine:latest", &SETTINGS);
        let mut lines = Vec::new();
        let mut note = |at: f64, event: ImportEvent| {
            if let Some(Update { line, due: true }) = progress.note_at(seconds(began, at), &event) {
                lines.push(format!("{at}: {line}"));
            }
        };
        note(0.1, ImportEvent::NetworkStart);
        note(11.0, ImportEvent::Trouble("reg.io answers 503 Service Unavailable: trying again in 20 s".into()));
        note(31.0, ImportEvent::Resolved { layers: 5, missing: 2, bytes: 100 << 20 });
        for step in 0..=30_u64 {
            let at = 31.0 + step as f64;
            note(at, ImportEvent::Progress { layer: 0, bytes: step << 20, total: 40 << 20 });
            note(at, ImportEvent::Tick { elsewhere: 1 });
        }
        note(72.0, ImportEvent::Progress { layer: 0, bytes: 40 << 20, total: 40 << 20 });
        note(73.0, ImportEvent::Trouble("reg.io: the connection broke: reset: trying again".into()));
        assert_eq!(
            lines,
            [
                "11: alpine:latest: waiting for the registry; reg.io answers 503 Service Unavailable: trying again in 20 s",
                "41: alpine:latest: 10.0 MiB of 100.0 MiB, 1.0 MiB/s, 90 s left, 0 of 2 layers, 3 in the store, 1 imported by \
                 other steps",
                "72: alpine:latest: 40.0 MiB of 100.0 MiB, 0 B/s, 1 of 2 layers, 3 in the store, 1 imported by other steps",
            ]
        );
    }

    #[test]
    fn a_quick_import_shows_nothing_and_a_quiet_one_neither() {
        let began = Instant::now();
        let tick = ImportEvent::Tick { elsewhere: 0 };
        let mut progress = Progress::beginning_at(began, "x", &SETTINGS);
        assert_eq!(progress.note_at(seconds(began, 0.9), &tick), None);
        // Later, for terminals; not all the time.
        assert!(!progress.note_at(seconds(began, 1.5), &tick).unwrap().due);
        assert_eq!(progress.note_at(seconds(began, 1.6), &tick), None);
        let quiet = ProgressSettings { interval_seconds: 0, ..SETTINGS };
        let mut progress = Progress::beginning_at(began, "x", &quiet);
        assert_eq!(progress.note_at(seconds(began, 1000.0), &tick), None);
    }

    #[test]
    fn durations_are_for_people() {
        for (seconds, text) in [(0, "0 s"), (119, "119 s"), (121, "3 min"), (7260, "2 h 1 min")] {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn what_is_no_terminal_gets_lines_that_are_due() {
        let mut bytes = Vec::new();
        let mut screen = Screen { line: LiveLine::new(&mut bytes, false) };
        screen.show(&Update { line: "too soon".into(), due: false });
        screen.show(&Update { line: "x: 1 of 2".into(), due: true });
        drop(screen);
        assert_eq!(String::from_utf8(bytes).unwrap(), "pyxis: x: 1 of 2\n");
    }
}
