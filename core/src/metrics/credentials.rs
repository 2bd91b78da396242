//! What is counted of sidecars' credentials. Labels are causes and the names of issuers, of which the
//! configuration has few.

use std::sync::Arc;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use crate::credentials::AuthError;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ReasonLabel {
    reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabel {
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct IssuerLabel {
    issuer: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FetchLabels {
    issuer: Arc<str>,
    result: &'static str,
}

/// Counters of credentials.
#[derive(Default)]
pub struct CredentialMetrics {
    refused: Family<ReasonLabel, Counter>,
    renewed: Family<ResultLabel, Counter>,
    ended: Family<ReasonLabel, Counter>,
    forbidden: Gauge,
    fetches: Family<FetchLabels, Counter>,
    keys: Family<IssuerLabel, Gauge>,
}

impl CredentialMetrics {
    pub(super) fn register(&self, r: &mut Registry) {
        r.register(
            "credentials_refused",
            "Credentials of sidecars that were not accepted",
            self.refused.clone(),
        );
        r.register(
            "credentials_renewed",
            "Credentials presented in a running session, by what became of them",
            self.renewed.clone(),
        );
        r.register(
            "sessions_revoked",
            "Sessions that were ended because their credential was withdrawn or has expired",
            self.ended.clone(),
        );
        r.register(
            "announcements_forbidden",
            "Documents that are not in force because they claim what their principal may not",
            self.forbidden.clone(),
        );
        r.register(
            "issuer_key_fetches",
            "Times that the keys of an issuer of tokens were fetched",
            self.fetches.clone(),
        );
        r.register("issuer_keys", "Keys of an issuer that are known", self.keys.clone());
    }

    /// The process is a relay: its rows stand from here on.
    pub(super) fn begin(&self) {
        for reason in AuthError::LABELS {
            drop(self.refused.get_or_create(&ReasonLabel { reason }));
        }
        for reason in ["withdrawn", "expired"] {
            drop(self.ended.get_or_create(&ReasonLabel { reason }));
        }
        for result in ["accepted", "refused"] {
            drop(self.renewed.get_or_create(&ResultLabel { result }));
        }
    }

    /// A credential was not accepted.
    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// A credential was presented in a running session.
    pub fn renewed(&self, is_accepted: bool) {
        let result = if is_accepted { "accepted" } else { "refused" };
        self.renewed.get_or_create(&ResultLabel { result }).inc();
    }

    /// A session's credential is worth nothing any more.
    pub fn session_revoked(&self, is_expired: bool) {
        let reason = if is_expired { "expired" } else { "withdrawn" };
        self.ended.get_or_create(&ReasonLabel { reason }).inc();
    }

    /// How many documents claim what they may not.
    pub fn set_forbidden(&self, count: usize) {
        self.forbidden.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// An issuer's keys were fetched, or could not be.
    pub fn fetched(&self, issuer: &Arc<str>, is_good: bool) {
        let result = if is_good { "success" } else { "failure" };
        self.fetches.get_or_create(&FetchLabels { issuer: Arc::clone(issuer), result }).inc();
    }

    /// The configuration knows the issuer no more.
    pub fn forget_issuer(&self, issuer: &Arc<str>) {
        self.keys.remove(&IssuerLabel { issuer: Arc::clone(issuer) });
        for result in ["success", "failure"] {
            self.fetches.remove(&FetchLabels { issuer: Arc::clone(issuer), result });
        }
    }

    /// How many keys of an issuer are known.
    pub fn set_keys(&self, issuer: &Arc<str>, count: usize) {
        let label = IssuerLabel { issuer: Arc::clone(issuer) };
        self.keys.get_or_create(&label).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
}
