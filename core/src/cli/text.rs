//! Text for people: tables, and what others wrote made harmless.

use std::fmt::Write as _;

use crate::error::is_obeyed;

/// Narrowest that a column becomes where a terminal has no room.
const COLUMN_WIDTH_MIN: usize = 8;

/// Between two columns.
const GAP: &str = "  ";

/// A table; columns are as wide as they must be.
pub(super) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    /// Adds a row; cells are made harmless, and empty ones are shown as `-`.
    pub(super) fn row<const N: usize>(&mut self, cells: [String; N]) {
        debug_assert_eq!(self.header.len(), N);
        let cell = |cell: String| if cell.is_empty() { "-".to_owned() } else { printable(&cell) };
        self.rows.push(cells.into_iter().map(cell).collect());
    }

    /// Returns the table; with a width its lines are no longer, as far as columns can be narrowed, and
    /// what is cut ends in `…`.
    pub(super) fn render(&self, width: Option<usize>) -> String {
        let widths = self.widths(width);
        let mut text = String::new();
        let header: Vec<String> = self.header.iter().map(|name| (*name).to_owned()).collect();
        for row in std::iter::once(&header).chain(&self.rows) {
            let mut line = String::new();
            for (index, (cell, width)) in row.iter().zip(&widths).enumerate() {
                if index > 0 {
                    line.push_str(GAP);
                }
                let cell = cut(cell, *width);
                // Writing to a string does not fail.
                let _ = write!(line, "{cell:<width$}");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn widths(&self, width: Option<usize>) -> Vec<usize> {
        let widest = |index: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(index));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let mut widths: Vec<usize> = self
            .header
            .iter()
            .enumerate()
            .map(|(index, name)| name.chars().count().max(widest(index)))
            .collect();
        let Some(width) = width else { return widths };
        let gaps = GAP.len() * widths.len().saturating_sub(1);
        // The widest gives way first: names stay whole for longest.
        while widths.iter().sum::<usize>() + gaps > width {
            let Some(widest) = widths.iter_mut().max().filter(|w| **w > COLUMN_WIDTH_MIN) else {
                break;
            };
            *widest -= 1;
        }
        widths
    }
}

/// Returns the text, or its beginning and `…`.
fn cut(text: &str, width: usize) -> String {
    if text.chars().count() <= width {
        return text.to_owned();
    }
    text.chars().take(width.saturating_sub(1)).chain(['…']).collect()
}

/// Returns the text with `?` for what a terminal obeys: names, paths and reasons come from others.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if is_obeyed(c) { '?' } else { c }).collect()
}

/// Returns seconds as `12s`, `5m10s`, `3h2m`, `4d5h`.
pub(super) fn age(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3_600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, ..) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Returns bytes as `0B`, `1.2KiB`, `34MiB`.
pub(super) fn bytes(count: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut tenths = count.saturating_mul(10);
    let mut unit = "B";
    for next in UNITS {
        if tenths < 10_240 {
            break;
        }
        tenths /= 1024;
        unit = next;
    }
    if unit == "B" || tenths >= 100 {
        format!("{}{unit}", tenths / 10)
    } else {
        format!("{}.{}{unit}", tenths / 10, tenths % 10)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let mut table = Table::new(&["NAME", "MATCH", "STATE"]);
        table.row(["a".into(), "http://a.localhost:9080/".into(), "in force".into()]);
        table.row(["longer".into(), String::new(), "x\x1b[31\n\u{202e}y".into()]);
        table
    }

    #[test]
    fn columns_are_aligned_and_harmless() {
        insta::assert_snapshot!(table().render(None), @r#"
        NAME    MATCH                     STATE
        a       http://a.localhost:9080/  in force
        longer  -                         x?[31??y
        "#);
    }

    #[test]
    fn a_narrow_terminal_cuts_the_widest_column() {
        let text = table().render(Some(36));
        assert!(text.lines().all(|line| line.chars().count() <= 36), "{text}");
        assert!(text.contains("http://a.localhos…"), "{text}");
        // Narrower than columns can be: lines are as long as they must be.
        assert!(table().render(Some(3)).contains("http://…"));
    }

    #[test]
    fn ages_and_sizes_are_short() {
        for (seconds, expected) in
            [(0, "0s"), (59, "59s"), (70, "1m10s"), (3_720, "1h2m"), (93_600, "1d2h")]
        {
            assert_eq!(age(seconds), expected);
        }
        for (count, expected) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1.0KiB"),
            (1230, "1.2KiB"),
            (20 << 20, "20MiB"),
            (u64::MAX, "1677721TiB"),
        ] {
            assert_eq!(bytes(count), expected);
        }
    }
}
