//! How errors are told.

use std::borrow::Cow;
use std::error::Error;
use std::fmt::Write as _;

/// Returns an error and its causes in one line, outermost first.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Returns whether a terminal obeys the character instead of showing it: control characters, and those
/// that turn the direction of text or end a line.
#[must_use]
pub fn is_obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// Returns the text with `\u{1b}` for each character that a terminal would obey, line breaks too.
#[must_use]
pub fn visible(text: &str) -> Cow<'_, str> {
    if !text.contains(is_obeyed) {
        return text.into();
    }
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        if is_obeyed(c) {
            // Writing to a string does not fail.
            let _ = write!(shown, "{}", c.escape_unicode());
        } else {
            shown.push(c);
        }
    }
    shown.into()
}

/// Returns what another process says, as [`visible`] shows it, cut off at `bytes_max`.
#[must_use]
pub fn bounded(text: &str, bytes_max: usize) -> String {
    let mut shown = visible(text).into_owned();
    if shown.len() > bytes_max {
        let end = (0..=bytes_max).rev().find(|at| shown.is_char_boundary(*at));
        shown.truncate(end.unwrap_or_default());
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_terminal_would_obey_is_shown() {
        assert_eq!(visible("a \u{1b}[31mé\n\u{202e}b"), "a \\u{1b}[31mé\\u{a}\\u{202e}b");
        assert!(matches!(visible("plain…"), Cow::Borrowed(_)));
        assert_eq!(bounded("plain…", 7), "plain", "cut off between characters");
        assert_eq!(bounded("plain…", 8), "plain…");
    }
}
