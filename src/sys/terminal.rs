//! One line on a terminal that is kept up to date, and goes away.

#![forbid(unsafe_code)]

use std::io::{self, IsTerminal, Stderr, Write};

/// A line on a terminal of unknown width has no more characters than this.
const WIDTH: usize = 80;
/// Clears the line that the cursor is in.
const CLEAR: &str = "\r\x1b[K";

/// The line, if the output is a terminal. Whoever does not listen is not missing it: nothing here fails.
#[derive(Debug)]
pub struct LiveLine<W: Write> {
    out: W,
    is_terminal: bool,
    shown: bool,
}

impl LiveLine<Stderr> {
    /// On standard error.
    pub fn stderr() -> Self {
        Self::new(io::stderr(), io::stderr().is_terminal())
    }
}

impl<W: Write> LiveLine<W> {
    /// On an output.
    pub fn new(out: W, is_terminal: bool) -> Self {
        Self { out, is_terminal, shown: false }
    }

    /// Whether there is a terminal to show it on.
    pub fn is_live(&self) -> bool {
        self.is_terminal
    }

    /// Replaces what is shown.
    pub fn show(&mut self, text: &str) {
        if self.is_terminal {
            self.shown = true;
            let width = rustix::termios::tcgetwinsize(io::stderr()).ok().map(|size| size.ws_col);
            let line = format!("{CLEAR}{}", fitting(text, width.unwrap_or_default()));
            let _ = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
        }
    }

    /// Takes the line away.
    pub fn clear(&mut self) {
        if std::mem::take(&mut self.shown) {
            let _ = self.out.write_all(CLEAR.as_bytes()).and_then(|()| self.out.flush());
        }
    }

    /// A line that stays.
    pub fn print(&mut self, text: &str) {
        self.clear();
        let _ = writeln!(self.out, "{text}");
    }
}

impl<W: Write> Drop for LiveLine<W> {
    fn drop(&mut self) {
        self.clear();
    }
}

/// What fits into a line of a terminal that is `width` wide; 0 if nobody knows.
fn fitting(text: &str, width: u16) -> String {
    let width = if width == 0 { WIDTH } else { usize::from(width) };
    // One character less than there is room for: some terminals begin a new line with the last.
    text.chars().filter(|character| !character.is_control()).take(width.saturating_sub(1)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_changes_and_goes_away() {
        let mut bytes = Vec::new();
        let mut line = LiveLine::new(&mut bytes, true);
        line.clear();
        line.show("a\nb");
        line.print("c");
        line.show("d");
        drop(line);
        assert_eq!(String::from_utf8(bytes).unwrap(), "\r\x1b[Kab\r\x1b[Kc\n\r\x1b[Kd\r\x1b[K");
        assert_eq!((fitting("12345", 4), fitting(&"x".repeat(100), 0).len()), ("123".into(), 79));
    }

    #[test]
    fn nothing_where_there_is_no_terminal() {
        let mut bytes = Vec::new();
        let mut line = LiveLine::new(&mut bytes, false);
        line.show("a");
        drop(line);
        assert!(bytes.is_empty());
    }
}
