//! What commands print: text for people or JSON for programs on stdout, remarks on stderr.

use std::io::{self, IsTerminal as _, Write as _};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

/// Where answers go, and in which form.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    /// JSON instead of text.
    pub(crate) json: bool,
}

impl Output {
    /// Prints `value` as JSON, or else what `text` makes.
    pub(crate) fn show(self, value: &impl Serialize, text: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json {
            line(&serde_json::to_string_pretty(value)?)
        } else {
            line(readable(&text(), true).trim_end_matches('\n'))
        }
    }
}

/// One line (or several) on stdout, at once. A reader that has seen enough (`| head`) is no error.
pub(crate) fn line(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

/// A remark on stderr: not part of the answer.
pub(crate) fn remark(text: &str) {
    // Nobody can be told that nobody listens.
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// What others wrote, without what a terminal would obey; lines end where they did, where there may be several.
fn readable(text: &str, lines: bool) -> String {
    let obeyed = |c: char| c.is_control() && !(lines && c == '\n');
    text.chars().map(|c| if obeyed(c) { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// Columns as wide as their widest cell; an empty table says `nothing` instead.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>], nothing: &str) -> String {
    if rows.is_empty() {
        return nothing.to_owned();
    }
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|cell| readable(cell, false)).collect()).collect();
    let width = |n: usize| {
        let cells = rows.iter().filter_map(|row| row.get(n)).map(|cell| cell.chars().count());
        cells.chain([head[n].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut text = String::new();
    let mut put = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> = cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        text.push_str(padded.join("  ").trim_end());
        text.push('\n');
    };
    put(&mut head.iter().copied());
    for row in &rows {
        put(&mut row.iter().map(String::as_str));
    }
    text
}

/// `name  value` lines; those without a value are left out.
pub(crate) fn facts(facts: &[(&str, Option<String>)]) -> String {
    let width = facts.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let told = facts.iter().filter_map(|(name, value)| Some(format!("{name:<width$}  {}\n", value.as_ref()?)));
    told.collect()
}

/// An instant for people: `2026-02-05 14:22:15 UTC`.
pub(crate) fn time(at: DateTime<Utc>) -> String {
    at.format("%Y-%m-%d %H:%M:%S UTC").to_string()
}

/// As [`time`], `-` for never.
pub(crate) fn time_or_dash(at: Option<DateTime<Utc>>) -> String {
    at.map_or_else(dash, time)
}

/// An instant for programs: `2026-02-05T14:22:15Z`.
pub(crate) fn iso(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::AutoSi, true)
}

/// An empty cell.
pub(crate) fn dash() -> String {
    "-".to_owned()
}

/// A span of time for people, two units at most: `45 s`, `3 min 10 s`, `2 h 5 min`, `3 d 4 h`.
pub(crate) fn span(seconds: u64) -> String {
    let (large, small, of, unit, rest) = match seconds {
        0..60 => return format!("{seconds} s"),
        60..3600 => (seconds / 60, seconds % 60, "min", "s", 10),
        3600..86_400 => (seconds / 3600, seconds % 3600 / 60, "h", "min", 24),
        _ => (seconds / 86_400, seconds % 86_400 / 3600, "d", "h", 10),
    };
    // 42 min 13 s pretends to know more than it does.
    if small == 0 || large >= rest { format!("{large} {of}") } else { format!("{large} {of} {small} {unit}") }
}

/// A number of something: `1 file`, `12 files`, `1 234 567 samples`.
pub(crate) fn count(number: u64, thing: &str) -> String {
    let digits = number.to_string();
    let mut grouped = String::with_capacity(digits.len() * 2);
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    format!("{grouped} {thing}{}", if number == 1 { "" } else { "s" })
}

/// A line on stderr that is written over and over, where stderr is a terminal; nothing elsewhere.
pub(crate) struct Live {
    on: bool,
    shown: String,
}

impl Live {
    pub(crate) fn new() -> Self {
        Self { on: io::stderr().is_terminal(), shown: String::new() }
    }

    /// Shows this text instead of the last one.
    pub(crate) fn set(&mut self, text: String) {
        if self.on && text != self.shown {
            // Longer lines would wrap, and the next one would not overwrite them.
            let short: String = text.chars().take(100).collect();
            let _ = write!(io::stderr().lock(), "\r\x1b[2K{short}");
            self.shown = text;
        }
    }

    /// Takes the line away.
    pub(crate) fn clear(&mut self) {
        if self.on && !self.shown.is_empty() {
            let _ = write!(io::stderr().lock(), "\r\x1b[2K");
            self.shown.clear();
        }
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        self.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_line_up_and_say_when_they_are_empty() {
        let rows = [vec!["1".to_owned(), "Zoë".to_owned(), "x".to_owned()], vec!["22".to_owned(), dash(), dash()]];
        let text = table(&["id", "name", "scope"], &rows, "nobody");
        assert_eq!(text, "id  name  scope\n1   Zoë   x\n22  -     -\n");
        assert_eq!(table(&["id"], &[], "nobody"), "nobody");
        let odd = [vec!["a\u{1b}[2Jb\nc\td\re\u{9b}f\u{7f}".to_owned(), "x".to_owned()]];
        let text = table(&["id", "name"], &odd, "nobody");
        assert_eq!(text, "id               name\na\u{fffd}[2Jb\u{fffd}c\u{fffd}d\u{fffd}e\u{fffd}f\u{fffd}  x\n");
        assert_eq!(readable("a\u{1b}[2Jb\n  c\n", true), "a\u{fffd}[2Jb\n  c\n");
        assert_eq!(
            facts(&[("id", Some("1".to_owned())), ("reason", None), ("state", Some("queued".to_owned()))]),
            "id      1\nstate   queued\n"
        );
    }

    #[test]
    fn spans_and_numbers_read_well() {
        let spans: Vec<String> = [0, 59, 60, 190, 2530, 3600, 7500, 187_200, 2_600_000].map(span).into();
        assert_eq!(spans, ["0 s", "59 s", "1 min", "3 min 10 s", "42 min", "1 h", "2 h 5 min", "2 d 4 h", "30 d"]);
        assert_eq!([count(0, "file"), count(1, "file"), count(999, "file")], ["0 files", "1 file", "999 files"]);
        assert_eq!(count(1_234_567, "sample"), "1 234 567 samples");
    }

    #[test]
    fn instants_for_people_and_for_programs() {
        let at = DateTime::from_timestamp_millis(1_770_301_335_000).unwrap();
        assert_eq!((time(at).as_str(), iso(at).as_str()), ("2026-02-05 14:22:15 UTC", "2026-02-05T14:22:15Z"));
        assert_eq!(time_or_dash(None), "-");
    }
}
