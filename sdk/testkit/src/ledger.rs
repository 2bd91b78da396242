//! What was lent and what came back.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts, per kind of object, how many were made and dropped, and keeps what went wrong.
#[derive(Default)]
pub(crate) struct Ledger {
    books: Mutex<Books>,
}

#[derive(Default)]
struct Books {
    alive: BTreeMap<&'static str, usize>,
    violations: Vec<String>,
}

impl Ledger {
    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn made(&self, kind: &'static str) {
        *self.books().alive.entry(kind).or_default() += 1;
    }

    pub(crate) fn dropped(&self, kind: &'static str) {
        let mut books = self.books();
        match books.alive.get_mut(kind) {
            Some(count) if *count > 0 => *count -= 1,
            _ => books.violations.push(format!("{kind}: dropped more often than owned")),
        }
    }

    pub(crate) fn violation(&self, text: String) {
        self.books().violations.push(text);
    }

    /// What went wrong so far, and, where `finished`, what was never dropped.
    pub(crate) fn violations(&self, finished: bool) -> Vec<String> {
        let books = self.books();
        let mut all = books.violations.clone();
        if finished {
            let leaked = books.alive.iter().filter(|(_, count)| **count > 0);
            all.extend(leaked.map(|(kind, count)| format!("{kind}: {count} never dropped")));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaks_and_double_drops_are_named() {
        let ledger = Ledger::default();
        ledger.made("stream");
        assert_eq!(ledger.violations(false), Vec::<String>::new());
        assert_eq!(ledger.violations(true), ["stream: 1 never dropped"]);
        ledger.dropped("stream");
        ledger.dropped("stream");
        assert_eq!(ledger.violations(true), ["stream: dropped more often than owned"]);
    }
}
