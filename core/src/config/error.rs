//! What is wrong with a configuration: every fault with file, line, column, path and a suggestion.
//!
//! Texts never hold secrets: readers of secret values do not print them, and a snippet is left out
//! where its line may show one.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::{is_obeyed, visible};

/// Most errors kept of one file; more would not be read, and a file of garbage must not fill memory.
const ERRORS_MAX: usize = 100;

/// Longest line that a snippet shows.
const SNIPPET_COLUMNS_MAX: usize = 160;

/// Words that keep a line, and a value below it, out of snippets: it may hold a secret.
const SECRET_WORDS: [&str; 9] =
    ["token", "secret", "password", "key", "users", "$2", "authorization", "cookie", "credential"];

/// Values below these paths are never shown: a password, or a token, may stand where its hash belongs.
const SECRET_PATHS: [&str; 3] = ["basic_auth.users.", ".tokens[", ".external_account.key"];

/// Where something stands in a configuration. Lines and columns count characters from 1; line 0:
/// nowhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// Index of the file among those of a directory.
    pub file: u16,
    /// From 1; 0: unknown.
    pub line: u32,
    /// From 1, in characters.
    pub column: u32,
    /// Length in characters of what is marked; 0: unknown.
    pub len: u32,
}

/// One fault of a configuration. Its texts quote what the file says; to show them, use its [`fmt::Display`],
/// which leaves a terminal nothing to obey.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigError {
    /// The file's name.
    pub file: Arc<str>,
    /// Where.
    pub position: Position,
    /// `routes[2].tunnel`; empty: the file as a whole.
    pub path: String,
    /// What failed, the value, what is accepted, a suggestion.
    pub message: String,
    /// The line and a caret under the place.
    pub snippet: Option<String>,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place_and_path(), visible(&self.message))
    }
}

impl std::error::Error for ConfigError {}

impl ConfigError {
    /// Returns `sidecar.yaml:14:9`, or the file alone.
    #[must_use]
    pub fn place(&self) -> String {
        let file = visible(&self.file);
        match self.position {
            Position { line: 0, .. } => file.into_owned(),
            Position { line, column, .. } => format!("{file}:{line}:{column}"),
        }
    }

    /// Returns `sidecar.yaml:14:9: routes[2].tunnel`, what stands before the message.
    #[must_use]
    pub fn place_and_path(&self) -> String {
        let mut text = self.place();
        if !self.path.is_empty() {
            text.push_str(": ");
            text.push_str(&visible(&self.path));
        }
        text
    }
}

/// All faults of a configuration, in the order of their places. Never empty.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ConfigErrors {
    /// Invariant: sorted by position, not empty.
    errors: Vec<ConfigError>,
    /// Faults beyond [`ERRORS_MAX`].
    more: usize,
    files: Vec<PathBuf>,
}

impl ConfigErrors {
    pub(crate) fn new(mut errors: Vec<ConfigError>, more: usize) -> Self {
        debug_assert!(!errors.is_empty());
        errors.sort_by(|a, b| (a.position, &a.path).cmp(&(b.position, &b.path)));
        errors.dedup();
        Self { errors, more, files: Vec::new() }
    }

    /// Returns these and `others` as one, in the order of their places; `None`: there are none.
    #[must_use]
    pub fn join(these: Option<Self>, others: Vec<ConfigError>) -> Option<Self> {
        let (mut errors, more) = these.map_or_else(Default::default, |e| (e.errors, e.more));
        errors.extend(others);
        (!errors.is_empty()).then(|| Self::new(errors, more))
    }

    /// Returns the errors, sorted by position.
    #[must_use]
    pub fn errors(&self) -> &[ConfigError] {
        &self.errors
    }

    /// Returns the files that values were, or should have been, read from: what is wrong may be mended in
    /// one of them.
    #[must_use]
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    pub(crate) fn with_files(self, files: Vec<PathBuf>) -> Self {
        Self { files, ..self }
    }

    /// Returns how many there are beyond those that are told.
    #[must_use]
    pub fn more(&self) -> usize {
        self.more
    }

    /// Returns the errors for a terminal: each with its line and a caret.
    #[must_use]
    pub fn report(&self) -> String {
        let mut text = String::new();
        for error in &self.errors {
            text.push_str(&error.to_string());
            text.push('\n');
            if let Some(snippet) = &error.snippet {
                text.push_str(snippet);
            }
        }
        if self.more > 0 {
            text.push_str(&format!("and {} more\n", self.more));
        }
        text
    }
}

impl From<ConfigError> for ConfigErrors {
    fn from(error: ConfigError) -> Self {
        Self { errors: vec![error], more: 0, files: Vec::new() }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, error) in self.errors.iter().enumerate() {
            if index > 0 {
                f.write_str("\n")?;
            }
            error.fmt(f)?;
        }
        if self.more > 0 {
            write!(f, "\nand {} more", self.more)?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Collects errors, so that all are told at once.
pub(crate) struct Sink {
    /// By [`Position::file`]; the last is the name of all together. Never empty.
    files: Vec<Arc<str>>,
    errors: Vec<ConfigError>,
    warnings: Vec<ConfigError>,
    more: usize,
}

impl Sink {
    pub(crate) fn new(files: Vec<Arc<str>>) -> Self {
        Self { files, errors: Vec::new(), warnings: Vec::new(), more: 0 }
    }

    pub(crate) fn push(&mut self, position: Position, path: &str, message: String) {
        if self.errors.len() == ERRORS_MAX {
            self.more += 1;
            return;
        }
        self.errors.push(ConfigError {
            file: self.file(position),
            position,
            path: path.to_owned(),
            message,
            snippet: None,
        });
    }

    /// Records what is accepted and yet likely a mistake. At most [`ERRORS_MAX`] are kept.
    pub(crate) fn warn(&mut self, position: Position, path: &str, message: String) {
        if self.warnings.len() < ERRORS_MAX {
            let (file, path) = (self.file(position), path.to_owned());
            self.warnings.push(ConfigError { file, position, path, message, snippet: None });
        }
    }

    fn file(&self, position: Position) -> Arc<str> {
        self.files.get(usize::from(position.file)).cloned().unwrap_or_default()
    }

    /// Returns whether further errors are counted only, so that their texts need not be made.
    pub(crate) fn is_full(&self) -> bool {
        self.errors.len() >= ERRORS_MAX
    }

    /// Returns the file index that stands for all files together.
    pub(crate) fn whole(&self) -> u16 {
        u16::try_from(self.files.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// Returns a place for people: `sidecar.yaml:14:9`.
    pub(crate) fn place(&self, position: Position) -> String {
        format!("{}:{}:{}", self.file(position), position.line, position.column)
    }

    /// Returns whether an error stands at `path` or below it.
    pub(crate) fn has_errors_at(&self, path: &str) -> bool {
        self.errors.iter().any(|error| {
            error
                .path
                .strip_prefix(path)
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
        })
    }

    /// Returns the texts of the errors, `path: message`.
    pub(crate) fn texts(&self) -> Vec<String> {
        self.errors
            .iter()
            .map(|error| match error.path.as_str() {
                "" => error.message.clone(),
                path => format!("{path}: {}", error.message),
            })
            .collect()
    }

    /// Returns errors and warnings, in the order of their places, with snippets of the files' texts.
    pub(crate) fn into_parts(self, texts: &[&str]) -> (Option<ConfigErrors>, Vec<ConfigError>) {
        let Self { mut errors, mut warnings, more, .. } = self;
        warnings.sort_by(|a, b| (a.position, &a.path).cmp(&(b.position, &b.path)));
        for error in errors.iter_mut().chain(&mut warnings) {
            let text = texts.get(usize::from(error.position.file)).copied().unwrap_or_default();
            error.snippet = snippet(text, error);
        }
        ((!errors.is_empty()).then(|| ConfigErrors::new(errors, more)), warnings)
    }
}

/// Returns the line of an error and a caret under its place, where that shows no secret.
pub(super) fn snippet(text: &str, error: &ConfigError) -> Option<String> {
    let position = error.position;
    if SECRET_PATHS.iter().any(|path| error.path.contains(path)) {
        return None;
    }
    let at = position.line.checked_sub(1)? as usize;
    let line = text.lines().nth(at)?;
    // A value may stand below its key.
    let key = text.lines().take(at).filter(|line| !line.trim().is_empty()).last();
    let key = key.filter(|line| line.trim_end().ends_with([':', '|', '>', '-', '+']));
    let secret = [Some(line), key].into_iter().flatten().any(|line| {
        let lower = line.to_ascii_lowercase();
        SECRET_WORDS.iter().any(|word| lower.contains(word))
    });
    if secret || line.chars().count() > SNIPPET_COLUMNS_MAX {
        return None;
    }
    let column = position.column.saturating_sub(1) as usize;
    // Tabs stay tabs, so that the caret stands below its place whatever their width.
    let indent: String =
        line.chars().take(column).map(|c| if c == '\t' { '\t' } else { ' ' }).collect();
    let rest = line.chars().count().saturating_sub(column).max(1);
    let carets = "^".repeat((position.len.max(1) as usize).min(rest));
    // One for one, so that the caret stands below its place.
    let line: String =
        line.chars().map(|c| if c != '\t' && is_obeyed(c) { '?' } else { c }).collect();
    let number = position.line.to_string();
    let margin = " ".repeat(number.len());
    Some(format!(" {margin} |\n {number} | {line}\n {margin} | {indent}{carets}\n"))
}

/// Returns `; did you mean "…"?` where a candidate is near, else nothing.
pub(crate) fn did_you_mean<'a>(
    value: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> String {
    nearest(value, candidates)
        .map_or_else(String::new, |candidate| format!("; did you mean \"{candidate}\"?"))
}

/// Returns the candidate that is near enough to be meant: by a letter or two, or as the beginning of
/// it (`hostname` for `host`, `path` for `path_prefix`).
pub(crate) fn nearest<'a>(
    value: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    /// Shorter beginnings say nothing.
    const BEGINNING_MIN: usize = 4;
    /// Most candidates that are compared: a file may name tens of thousands.
    const COMPARED_MAX: usize = 4096;
    let lower = value.to_lowercase();
    let rank = |candidate: &'a str| {
        let other = candidate.to_lowercase();
        let letters = candidate.chars().count();
        let distance = if letters.abs_diff(value.chars().count()) > letters.max(3) / 3 {
            usize::MAX
        } else {
            strsim::damerau_levenshtein(&lower, &other)
        };
        // A third of the letters may be wrong: "apii" is api, "foo" is not web.
        if distance <= letters.max(3) / 3 && distance < letters {
            return Some((0, distance, candidate));
        }
        let begins =
            |whole: &str, part: &str| part.len() >= BEGINNING_MIN && whole.starts_with(part);
        (begins(&lower, &other) || begins(&other, &lower)).then_some((1, distance, candidate))
    };
    candidates
        .into_iter()
        .take(COMPARED_MAX)
        .filter_map(rank)
        .min()
        .map(|(_, _, candidate)| candidate)
}

/// Returns `a, b, c`, shortened beyond 12 items.
pub(crate) fn list<'a>(items: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN_MAX: usize = 12;
    let items: Vec<&str> = items.into_iter().collect();
    if items.is_empty() {
        return "none".to_owned();
    }
    let mut text = items[..items.len().min(SHOWN_MAX)].join(", ");
    if items.len() > SHOWN_MAX {
        text.push_str(&format!(" and {} more", items.len() - SHOWN_MAX));
    }
    text
}
