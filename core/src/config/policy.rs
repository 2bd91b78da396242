//! What a route asks for beyond its tunnel: timeouts, retries, limits, who may come, and what is
//! changed in heads. Data alone; `relay::policy` and the sidecar carry it out.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};
use ipnet::IpNet;

/// Policies of a route. The default asks for nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Policies {
    /// Timeouts.
    pub timeouts: RouteTimeouts,
    /// Sending again what a service did not process; `None`: only what is safe in any case.
    pub retries: Option<Retries>,
    /// Changes of the request's fields, HTTP-born protocols only.
    pub request_headers: HeaderChanges,
    /// Changes of the response's fields, HTTP-born protocols only.
    pub response_headers: HeaderChanges,
    /// What the service sees instead of what the client asked for, HTTP-born protocols only.
    pub rewrite: Rewrite,
    /// Where the client is sent instead; the route has no tunnel then.
    pub redirect: Option<Redirect>,
    /// Who may come in.
    pub basic_auth: Option<BasicAuth>,
    /// From where.
    pub addresses: Addresses,
    /// How much.
    pub limits: RouteLimits,
    /// Compression of responses; `None`: they pass as they are.
    pub compression: Option<Compression>,
    /// Clients are told to come by TLS only; `None`: they are not.
    pub hsts: Option<Hsts>,
    /// A client's exchanges go to one sidecar as long as that serves; `None`: to any. HTTP-born protocols
    /// only.
    pub affinity: Option<Affinity>,
}

/// A cookie that names the sidecar which a client's exchanges go to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Affinity {
    /// Its name (RFC 6265 §4.1.1).
    pub cookie: Arc<str>,
    /// How long a client keeps it; zero: until it ends (a session cookie).
    pub max_age: Duration,
}

/// `Strict-Transport-Security` (RFC 6797), on responses over TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hsts {
    /// For how long a client remembers it; zero: it forgets.
    pub max_age: Duration,
    /// Subdomains too.
    pub include_subdomains: bool,
    /// It may be put on the lists that come with browsers.
    pub preload: bool,
}

impl Policies {
    /// Returns whether nothing is asked for.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Reads policies as an announcement carries them: a JSON object with the keys of a route in a
    /// file, checked by the same rules. Which values of fields are secrets is not known of them, so
    /// none is shown.
    ///
    /// # Errors
    /// Each fault, as `path: what is wrong`.
    pub fn parse_json(json: &str) -> Result<Self, Vec<String>> {
        super::read::read_policies(json)
    }

    /// Returns what [`Self::parse_json`] reads, hashes of passwords and secrets included.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        super::show::policies(self, super::show::Secrets::Shown).into()
    }
}

/// Timeouts of a route; `None`: the plugin's, or none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteTimeouts {
    /// For a connection to the service, instead of the tunnel's.
    pub connect: Option<Duration>,
    /// From the request's dispatch to the service's response head, instead of the plugin's.
    pub response_head: Option<Duration>,
    /// Nothing passes in either direction.
    pub idle: Option<Duration>,
    /// For the whole exchange.
    pub total: Option<Duration>,
}

/// Sending again what a service did not process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retries {
    /// Most times that one exchange is sent again, from 1.
    pub attempts: u32,
    /// Retries may be this share of the route's exchanges, in percent, from 1 to 100.
    pub budget_percent: u32,
    /// Retries per second that the budget allows in any case.
    pub budget_min: u32,
}

/// Changes of a head's fields, in this order: remove, set, add. Sorted by name; those to add of one
/// name keep their order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HeaderChanges {
    /// Replaces all fields of that name; names are unique.
    pub set: Vec<(HeaderName, HeaderValue)>,
    /// Adds a field.
    pub add: Vec<(HeaderName, HeaderValue)>,
    /// Removes all fields of that name.
    pub remove: Vec<HeaderName>,
}

impl HeaderChanges {
    /// Returns whether nothing changes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.set.is_empty() && self.add.is_empty() && self.remove.is_empty()
    }
}

/// What the service sees instead.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rewrite {
    /// Authority: `host` or `host:port`.
    pub host: Option<Arc<str>>,
    /// What stands in place of the route's `path_prefix`; empty: nothing, so `/api/x` becomes `/x`.
    pub path_prefix: Option<Arc<str>>,
}

/// Where the client is sent. What is not given stays as the client asked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// 301, 302, 303, 307 or 308.
    pub status: u16,
    /// `http` or `https`.
    pub scheme: Option<Arc<str>>,
    /// `host` or `host:port`.
    pub host: Option<Arc<str>>,
    /// In place of the route's `path_prefix`.
    pub path_prefix: Option<Arc<str>>,
}

/// Who may come in (RFC 7617).
#[derive(Clone, PartialEq, Eq)]
pub struct BasicAuth {
    /// What a browser shows.
    pub realm: Arc<str>,
    /// Names and bcrypt hashes of passwords, `$2y$…` as `htpasswd -nbB` writes them; sorted by name.
    pub users: Vec<(Arc<str>, Arc<str>)>,
}

/// Hashes are no secrets that open a door, but a guesser's start.
impl fmt::Debug for BasicAuth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.users.iter().map(|(name, _)| &**name).collect();
        f.debug_struct("BasicAuth").field("realm", &self.realm).field("users", &names).finish()
    }
}

/// From where clients may come: not from `deny`, and from `allow` where it is not empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Addresses {
    /// Only these.
    pub allow: Vec<IpNet>,
    /// Not these, whatever `allow` says.
    pub deny: Vec<IpNet>,
}

impl Addresses {
    /// Returns whether every address may come.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.allow.is_empty() && self.deny.is_empty()
    }
}

/// How much a route takes, at each relay.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RouteLimits {
    /// Exchanges of all clients; beyond: 429.
    pub rate: Option<Rate>,
    /// Exchanges of one client's address (IPv6: its /64); beyond: 429.
    pub rate_per_client: Option<Rate>,
    /// Exchanges at once; beyond: 503.
    pub concurrent: Option<u32>,
    /// Bytes of a request's body; beyond: 413.
    pub body: Option<u64>,
}

/// A rate with a burst: a bucket of `burst` tokens that fills by `count` in each `per`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Exchanges …
    pub count: u32,
    /// … in this time.
    pub per: Duration,
    /// At once after a rest; `count` where the file says nothing.
    pub burst: u32,
}

/// Compression of responses by gzip, where the client takes it and the service did not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compression {
    /// Level, 1 (fast) to 9 (small).
    pub level: u32,
    /// Bodies of a known length below this pass as they are.
    pub min_size: u64,
}
