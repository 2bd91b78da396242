//! Why there is no certificate: what the log says of it, and who has to wait for it.

use std::fmt;
use std::time::SystemTime;

use instant_acme::{Error, Problem};

use super::storage::StorageError;
use crate::error::{chain, visible};

/// Most characters of an authority's text that are shown.
const REASON_CHARS_MAX: usize = 500;

/// How far an order came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Reading or writing what is kept.
    Storage,
    /// Finding the authority, and the account there.
    Account,
    /// Asking for a certificate.
    Order,
    /// Proving the name.
    Challenge,
    /// Fetching the certificate of a name that is proved.
    Certificate,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Storage => "storage",
            Self::Account => "account",
            Self::Order => "order",
            Self::Challenge => "challenge",
            Self::Certificate => "certificate",
        })
    }
}

/// An order that failed.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) step: Step,
    /// What the authority said, or what is wrong here.
    pub(super) reason: String,
    /// The authority fails whatever is asked of it: other names need not try.
    pub(super) is_of_authority: bool,
    /// The authority knows no such account (any more).
    pub(super) is_account_unknown: bool,
    /// When the authority wants to be asked again.
    pub(super) retry_after: Option<SystemTime>,
}

impl Failure {
    /// A failure of our own, or one that concerns this name alone.
    pub(super) fn new(step: Step, reason: impl Into<String>) -> Self {
        Self {
            step,
            reason: shown(&reason.into()),
            is_of_authority: false,
            is_account_unknown: false,
            retry_after: None,
        }
    }

    /// What a call of the authority ended with.
    pub(super) fn of(step: Step, error: &Error) -> Self {
        let is_of_authority = match error {
            Error::Api(problem) => step == Step::Account || is(problem, "serverInternal"),
            Error::Timeout(_) => false,
            _ => true,
        };
        let reason = match error {
            Error::Api(problem) => said(problem),
            error => chain(error),
        };
        Self {
            is_of_authority,
            is_account_unknown: matches!(error, Error::Api(problem) if is(problem, "accountDoesNotExist")),
            ..Self::new(step, reason)
        }
    }
}

impl From<StorageError> for Failure {
    fn from(error: StorageError) -> Self {
        Self::new(Step::Storage, chain(&error))
    }
}

fn is(problem: &Problem, kind: &str) -> bool {
    let prefix = "urn:ietf:params:acme:error:";
    problem.r#type.as_deref().and_then(|kind| kind.strip_prefix(prefix)) == Some(kind)
}

/// Returns a problem as the authority said it.
pub(super) fn said(problem: &Problem) -> String {
    let problem = problem.to_string();
    // The library's own word before it says nothing.
    problem.strip_prefix("API error: ").unwrap_or(&problem).to_owned()
}

/// Bounds a text of somebody else's, and shows what a terminal would obey.
fn shown(text: &str) -> String {
    let mut chars = text.chars();
    let mut bounded: String = chars.by_ref().take(REASON_CHARS_MAX).collect();
    if chars.next().is_some() {
        bounded.push('…');
    }
    visible(&bounded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(kind: &str, detail: &str) -> Error {
        let kind = format!("urn:ietf:params:acme:error:{kind}");
        let problem = serde_json::json!({ "type": kind, "detail": detail });
        Error::Api(serde_json::from_value(problem).unwrap())
    }

    #[test]
    fn what_concerns_a_name_stops_no_other() {
        let cases = [
            (Step::Order, problem("rejectedIdentifier", "no"), false),
            (Step::Order, problem("rateLimited", "later"), false),
            (Step::Challenge, Error::Timeout(None), false),
            (Step::Order, problem("serverInternal", "oops"), true),
            (Step::Account, problem("externalAccountRequired", "who?"), true),
            (Step::Order, Error::Str("nothing"), true),
        ];
        for (step, error, expected) in cases {
            assert_eq!(Failure::of(step, &error).is_of_authority, expected, "{step} {error}");
        }
        assert!(Failure::of(Step::Order, &problem("accountDoesNotExist", "")).is_account_unknown);
    }

    #[test]
    fn an_authority_s_words_are_bounded_and_harmless() {
        let failure = Failure::of(Step::Order, &problem("malformed", "\u{1b}[31m no"));
        assert_eq!(failure.reason, "\\u{1b}[31m no (urn:ietf:params:acme:error:malformed)");
        assert_eq!(Failure::new(Step::Order, "x".repeat(9999)).reason.chars().count(), 501);
    }
}
