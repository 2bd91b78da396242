//! The policies of a route, from a file or from an announcement.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderName, HeaderValue};

use super::{COUNT_MAX, networks, size, timeout};
use crate::config::files::Files;
use crate::config::policy::{
    Addresses, Affinity, BasicAuth, Compression, HeaderChanges, Hsts, Policies, Rate, Redirect,
    Retries, Rewrite, RouteLimits, RouteTimeouts,
};
use crate::config::raw::{Field, Section, Value};
use crate::config::{duration_text, value};

pub(crate) const POLICY_KEYS: &[&str] = &[
    "timeouts",
    "retries",
    "request_headers",
    "response_headers",
    "rewrite",
    "redirect",
    "basic_auth",
    "addresses",
    "limits",
    "compression",
    "hsts",
    "affinity",
];
pub(crate) const TIMEOUTS_KEYS: &[&str] = &["connect", "response_head", "idle", "total"];
pub(crate) const RETRIES_KEYS: &[&str] = &["attempts", "budget", "budget_min"];
pub(crate) const HEADERS_KEYS: &[&str] = &["set", "add", "remove"];
pub(crate) const REWRITE_KEYS: &[&str] = &["host", "path_prefix"];
pub(crate) const REDIRECT_KEYS: &[&str] = &["status", "scheme", "host", "path_prefix"];
pub(crate) const BASIC_AUTH_KEYS: &[&str] = &["realm", "users", "users_file"];
pub(crate) const ADDRESSES_KEYS: &[&str] = &["allow", "deny"];
pub(crate) const LIMITS_KEYS: &[&str] = &["rate", "rate_per_client", "concurrent", "body"];
pub(crate) const RATE_KEYS: &[&str] = &["count", "per", "burst"];
pub(crate) const COMPRESSION_KEYS: &[&str] = &["level", "min_size"];
pub(crate) const AFFINITY_KEYS: &[&str] = &["cookie", "max_age"];
pub(crate) const HSTS_KEYS: &[&str] = &["max_age", "include_subdomains", "preload"];

/// Most retries of one exchange: each holds what was sent, and a service that fails so often is not
/// helped by more.
pub(crate) const ATTEMPTS_MAX: u32 = 10;
pub(crate) const ATTEMPTS: u32 = 1;
/// A fifth: a service in trouble gets at most 20 % more than it was sent anyway.
pub(crate) const BUDGET_PERCENT: u32 = 20;
/// So that a route with few exchanges may retry at all.
pub(crate) const BUDGET_MIN: u32 = 10;
const BUDGET_MIN_MAX: u32 = 10_000;

/// Most header changes of one kind: a head has 128 fields at most.
pub(crate) const HEADER_CHANGES_MAX: usize = 64;
/// Longest value of a field that is set; a head has 64 KiB at most.
pub(crate) const HEADER_VALUE_BYTES_MAX: usize = 4096;

/// Keeps the method and is not kept by browsers: the one that can be taken back.
pub(crate) const REDIRECT_STATUS: u16 = 307;
pub(crate) const REDIRECT_STATUSES: [u16; 5] = [301, 302, 303, 307, 308];

pub(crate) const REALM: &str = "restricted";
/// Longest realm; a browser shows it in one line.
const REALM_BYTES_MAX: usize = 128;
/// Most users of a route: they travel in the announcement. More need an identity provider.
pub(crate) const USERS_MAX: usize = 1024;
const USER_BYTES_MAX: usize = 255;
/// Largest users file: [`USERS_MAX`] lines of usual length, and comments.
const USERS_FILE_BYTES_MAX: u64 = 256 * 1024;
/// Dearest bcrypt hash, about a quarter of a second: anybody may ask the relay to compute it.
pub(crate) const BCRYPT_COST_MAX: u32 = 12;

/// Most networks in one list: each exchange is compared with all of them.
pub(crate) const NETWORKS_MAX: usize = 1024;

pub(crate) const COMPRESSION_LEVEL: u32 = 5;
/// Smaller bodies fit a packet or two anyway.
pub(crate) const COMPRESSION_MIN_SIZE: u64 = 1024;
const COMPRESSION_MIN_SIZE_MAX: u64 = 1 << 30;

/// A year: the shortest that browsers' lists take.
pub(crate) const HSTS_MAX_AGE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Ten years. Longer ones are a mistaken unit.
pub(crate) const HSTS_MAX_AGE_MAX: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// Longest name of a cookie: it comes with every request.
pub(crate) const COOKIE_BYTES_MAX: usize = 64;
/// Browsers cut what is longer (RFC 6265bis §5.5: 400 days).
pub(crate) const COOKIE_AGE_MAX: Duration = Duration::from_secs(400 * 24 * 3600);

/// Fields that belong to the connection, to the framing of a message or to Sidelane.
const FIELDS_NOT_CHANGED: [&str; 18] = [
    "connection",
    "content-length",
    "expect",
    "host",
    "http2-settings",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "sec-websocket-accept",
    "sec-websocket-extensions",
    "sec-websocket-key",
    "sec-websocket-version",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "x-sidelane-error",
];

/// Reads the policies' keys of a section. `files` is `None` where none may be read: what another
/// machine sends does not name files of this one.
pub(super) fn policies(section: &Section<'_>, files: Option<&mut Files<'_>>) -> Policies {
    let mut policies = Policies::default();
    section.set("timeouts", &mut policies.timeouts, timeouts);
    section.set("retries", &mut policies.retries, |field| retries(field).map(Some));
    section.set("request_headers", &mut policies.request_headers, headers);
    section.set("response_headers", &mut policies.response_headers, headers);
    section.set("rewrite", &mut policies.rewrite, rewrite);
    section.set("redirect", &mut policies.redirect, |field| redirect(field).map(Some));
    section.set("basic_auth", &mut policies.basic_auth, |field| basic_auth(field, files).map(Some));
    section.set("addresses", &mut policies.addresses, addresses);
    section.set("limits", &mut policies.limits, limits);
    section.set("compression", &mut policies.compression, |field| compression(field).map(Some));
    section.set("hsts", &mut policies.hsts, |field| hsts(field).map(Some));
    section.set("affinity", &mut policies.affinity, |field| affinity(field).map(Some));
    policies
}

/// The shortest timeout that means anything: that of the clock's tick.
const TIMEOUT_MIN: Duration = Duration::from_millis(1);

fn timeouts(field: &Field<'_>) -> Option<RouteTimeouts> {
    let section = field.section(TIMEOUTS_KEYS)?;
    let mut timeouts = RouteTimeouts::default();
    let read = |field: &Field<'_>| timeout(field, TIMEOUT_MIN).map(Some);
    section.set("connect", &mut timeouts.connect, read);
    section.set("response_head", &mut timeouts.response_head, read);
    section.set("idle", &mut timeouts.idle, read);
    section.set("total", &mut timeouts.total, read);
    if let Some(total) = timeouts.total {
        let parts = [
            ("connect", timeouts.connect),
            ("response_head", timeouts.response_head),
            ("idle", timeouts.idle),
        ];
        for (key, part) in parts {
            if part.is_some_and(|part| part >= total)
                && let Some(field) = section.field(key)
            {
                field.warn("has no effect: `total` is not longer and ends the exchange first");
            }
        }
    }
    Some(timeouts)
}

fn retries(field: &Field<'_>) -> Option<Retries> {
    let section = field.section(RETRIES_KEYS)?;
    let mut retries =
        Retries { attempts: ATTEMPTS, budget_percent: BUDGET_PERCENT, budget_min: BUDGET_MIN };
    section.set("attempts", &mut retries.attempts, |field| field.integer(1, ATTEMPTS_MAX));
    section.set("budget", &mut retries.budget_percent, |field| field.parse(value::percent));
    section.set("budget_min", &mut retries.budget_min, |field| field.integer(0, BUDGET_MIN_MAX));
    Some(retries)
}

fn headers(field: &Field<'_>) -> Option<HeaderChanges> {
    let section = field.section(HEADERS_KEYS)?;
    let mut changes = HeaderChanges::default();
    if let Some(field) = section.field("remove")
        && let Some(names) = field.list_of(|item| item.parse(field_name))
    {
        bounded(&field, names.len());
        changes.remove = names;
    }
    for (name, mut values) in section.field("set").map(|f| named_values(&f)).unwrap_or_default() {
        // The first takes the place of what is there, the others follow it.
        let rest = values.split_off(values.len().min(1));
        changes.set.extend(values.into_iter().map(|value| (name.clone(), value)));
        changes.add.extend(rest.into_iter().map(|value| (name.clone(), value)));
    }
    for (name, values) in section.field("add").map(|f| named_values(&f)).unwrap_or_default() {
        changes.add.extend(values.into_iter().map(|value| (name.clone(), value)));
    }
    // The order of fields of one name counts, that of names does not: JSON does not keep it.
    changes.set.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
    changes.add.sort_by(|(a, _), (b, _)| a.as_str().cmp(b.as_str()));
    if let Some(field) = section.field("remove") {
        let set = |name: &&HeaderName| changes.set.iter().any(|(set, _)| set == *name);
        if let Some(name) = changes.remove.iter().find(set) {
            field.warn(format!("\"{name}\" is set as well, which replaces it in any case"));
        }
    }
    Some(changes)
}

fn bounded(field: &Field<'_>, count: usize) -> bool {
    if count > HEADER_CHANGES_MAX {
        field.fail(format!("has {count} fields (accepted: at most {HEADER_CHANGES_MAX})"));
    }
    count <= HEADER_CHANGES_MAX
}

/// Reads a mapping of fields' names to a value or a list of values.
fn named_values(field: &Field<'_>) -> Vec<(HeaderName, Vec<HeaderValue>)> {
    let mut named: Vec<(HeaderName, Vec<HeaderValue>)> = Vec::new();
    for (entry, field) in field.entries().unwrap_or_default() {
        let name = entry.key.as_str();
        let values = match &field.node().value {
            Value::List(_) if field.is_empty() => {
                field.fail("is empty (accepted: text, or a list of texts)");
                continue;
            }
            Value::List(_) => field.list_of(|item| field_value_of(name, item)),
            _ => field_value_of(name, &field).map(|value| vec![value]),
        };
        match field_name(&entry.key) {
            Err(message) => field.fail_key(entry, message),
            Ok(name) if named.iter().any(|(other, _)| *other == name) => {
                field.fail_key(entry, format!("\"{name}\" stands here twice, case aside"));
            }
            Ok(name) => named.push((name, values.unwrap_or_default())),
        }
    }
    if !bounded(field, named.iter().map(|(_, values)| values.len()).sum()) {
        named.clear();
    }
    named
}

fn field_name(text: &str) -> Result<HeaderName, String> {
    let name = HeaderName::from_bytes(text.as_bytes()).map_err(|_| {
        let hint = if text.starts_with(':') { "; leave pseudo-fields to Sidelane" } else { "" };
        format!(
            "\"{text}\" is not a field's name (accepted: letters, digits and !#$%&'*+-.^_`|~){hint}"
        )
    })?;
    if FIELDS_NOT_CHANGED.contains(&name.as_str()) {
        let hint = if name == http::header::HOST { "; use rewrite.host" } else { "" };
        return Err(format!(
            "\"{name}\" belongs to the connection or the message's framing, which no route changes \
             (accepted: other fields){hint}"
        ));
    }
    Ok(name)
}

/// Words in a field's name whose value is a secret.
const SECRET_FIELD_WORDS: [&str; 7] =
    ["authorization", "cookie", "credential", "key", "password", "secret", "token"];

/// Reads a value; a secret is marked as sensitive, so that nothing prints it.
fn field_value_of(name: &str, field: &Field<'_>) -> Option<HeaderValue> {
    let name = name.to_ascii_lowercase();
    let secret = SECRET_FIELD_WORDS.iter().any(|word| name.contains(word));
    let mut value = if secret {
        let text = field.secret()?;
        field_value(text).map_err(|message| field.fail_hidden(message)).ok()?
    } else {
        field.parse(field_value)?
    };
    value.set_sensitive(secret || field.is_hidden());
    Some(value)
}

fn field_value(text: &str) -> Result<HeaderValue, String> {
    let bad = |what: &str| {
        format!(
            "{what} (accepted: at most {HEADER_VALUE_BYTES_MAX} visible ASCII characters, spaces \
             and tabs, none of these at an end)"
        )
    };
    if text.len() > HEADER_VALUE_BYTES_MAX {
        return Err(bad(&format!("is {} bytes long", text.len())));
    }
    if text.trim_matches([' ', '\t']).len() < text.len() {
        return Err(bad(&format!("\"{text}\" begins or ends with white space")));
    }
    // The crate takes more than it gives back as text.
    Some(text)
        .filter(|text| text.bytes().all(|byte| byte == b'\t' || matches!(byte, b' '..=b'~')))
        .and_then(|text| HeaderValue::from_str(text).ok())
        .ok_or_else(|| bad(&format!("{text:?} holds what a field's value does not")))
}

fn rewrite(field: &Field<'_>) -> Option<Rewrite> {
    let section = field.section(REWRITE_KEYS)?;
    let mut rewrite = Rewrite::default();
    section.set("host", &mut rewrite.host, |f| f.parse(value::authority).map(Some));
    section.set("path_prefix", &mut rewrite.path_prefix, |f| f.parse(value::path_prefix).map(Some));
    Some(rewrite)
}

fn redirect(field: &Field<'_>) -> Option<Redirect> {
    let section = field.section(REDIRECT_KEYS)?;
    let mut redirect =
        Redirect { status: REDIRECT_STATUS, scheme: None, host: None, path_prefix: None };
    let statuses = REDIRECT_STATUSES.map(|status| (status.to_string(), status));
    let statuses = statuses.each_ref().map(|(text, status)| (text.as_str(), *status));
    section.set("status", &mut redirect.status, |f| f.one_of(&statuses));
    section.set("scheme", &mut redirect.scheme, |f| {
        f.one_of(&[("http", "http"), ("https", "https")]).map(|scheme| Some(scheme.into()))
    });
    section.set("host", &mut redirect.host, |f| f.parse(value::authority).map(Some));
    section
        .set("path_prefix", &mut redirect.path_prefix, |f| f.parse(value::path_prefix).map(Some));
    if REDIRECT_KEYS[1..].iter().all(|key| section.field(key).is_none()) && !section.has_unknown() {
        section.fail(
            "sends clients to where they came from (accepted: at least one of scheme, host, \
             path_prefix)",
        );
    }
    Some(redirect)
}

fn basic_auth(field: &Field<'_>, files: Option<&mut Files<'_>>) -> Option<BasicAuth> {
    let section = field.section(BASIC_AUTH_KEYS)?;
    let mut realm: Arc<str> = REALM.into();
    section.set("realm", &mut realm, |field| field.parse(self::realm));
    let users = match (section.field("users"), section.field("users_file")) {
        (Some(_), Some(_)) => {
            section.fail("has users and users_file at once (accepted: one of them)");
            return None;
        }
        (Some(field), None) => users(&field)?,
        (None, Some(field)) => match files {
            Some(files) => users_file(&field, files)?,
            None => {
                field.fail("names a file of another machine (accepted: users)");
                return None;
            }
        },
        (None, None) => {
            if !section.has_unknown() {
                section.fail("lets nobody in (accepted: one of users, users_file)");
            }
            return None;
        }
    };
    let users = users.into_iter().collect();
    Some(BasicAuth { realm, users })
}

fn realm(text: &str) -> Result<Arc<str>, String> {
    let good = (1..=REALM_BYTES_MAX).contains(&text.len())
        && text.bytes().all(|b| matches!(b, b' '..=b'~') && !matches!(b, b'"' | b'\\'));
    if good {
        Ok(text.into())
    } else {
        Err(format!(
            "{text:?} is not a realm (accepted: 1 to {REALM_BYTES_MAX} visible ASCII characters \
             and spaces, no '\"' and '\\')"
        ))
    }
}

/// Users and their hashes, sorted by name.
type Users = BTreeMap<Arc<str>, Arc<str>>;

fn users(field: &Field<'_>) -> Option<Users> {
    let entries = field.entries()?;
    if entries.is_empty() {
        field.fail("is empty and lets nobody in (accepted: at least one user)");
    }
    let mut users = Users::new();
    let mut good = !entries.is_empty();
    for (entry, field) in entries {
        let name = user(&entry.key).map_err(|message| field.fail_key(entry, message));
        let hash =
            field.secret().and_then(|text| hash(text).map_err(|message| field.fail(message)).ok());
        match (name, hash) {
            (Ok(name), Some(hash)) => drop(users.insert(name, hash)),
            _ => good = false,
        }
    }
    (good && not_too_many(field, &users)).then_some(users)
}

fn not_too_many(field: &Field<'_>, users: &Users) -> bool {
    if users.len() > USERS_MAX {
        field.fail(format!("has {} users (accepted: at most {USERS_MAX})", users.len()));
    }
    users.len() <= USERS_MAX
}

/// Reads lines of `name:hash`, as `htpasswd -B` writes them.
fn users_file(field: &Field<'_>, files: &mut Files<'_>) -> Option<Users> {
    let path = field.text()?;
    let text = files.read_file(path, USERS_FILE_BYTES_MAX);
    let text = text.map_err(|message| field.fail(message)).ok()?;
    let mut users = Users::new();
    let mut good = true;
    for (index, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let parsed = match line.split_once(':') {
            Some((name, text)) => user(name).and_then(|name| Ok((name, hash(text)?))),
            None => Err("has no ':' (accepted: name:hash)".to_owned()),
        };
        let result = parsed.and_then(|(name, hash)| match users.insert(name.clone(), hash) {
            Some(_) => Err(format!("user \"{name}\" stands in the file twice")),
            None => Ok(()),
        });
        if let Err(message) = result {
            field.fail(format!("{path}, line {}: {message}", index + 1));
            good = false;
        }
    }
    if good && users.is_empty() {
        field.fail(format!("{path} lets nobody in (accepted: lines of name:hash)"));
        return None;
    }
    (good && not_too_many(field, &users)).then_some(users)
}

fn user(text: &str) -> Result<Arc<str>, String> {
    let good = (1..=USER_BYTES_MAX).contains(&text.len())
        && !text.chars().any(|c| c == ':' || c.is_control());
    if good {
        Ok(text.into())
    } else {
        Err(format!(
            "{text:?} is not a user's name (accepted: 1 to {USER_BYTES_MAX} bytes without ':' and \
             control characters)"
        ))
    }
}

/// Texts never hold the hash: a password may stand in its place.
fn hash(text: &str) -> Result<Arc<str>, String> {
    let parts: bcrypt::HashParts = text.parse().map_err(|_| {
        "is not a bcrypt hash of a password (accepted: $2y$… as `htpasswd -nbB NAME PASSWORD` \
         prints it)"
            .to_owned()
    })?;
    if !(4..=BCRYPT_COST_MAX).contains(&parts.get_cost()) {
        return Err(format!(
            "is a bcrypt hash of cost {} (accepted: 4 to {BCRYPT_COST_MAX}; the relay computes it \
             for whoever asks)",
            parts.get_cost()
        ));
    }
    Ok(text.into())
}

fn addresses(field: &Field<'_>) -> Option<Addresses> {
    let section = field.section(ADDRESSES_KEYS)?;
    let mut addresses = Addresses::default();
    section.set("allow", &mut addresses.allow, |field| {
        if field.is_empty() {
            field.fail("is empty (accepted: at least one network; without the key: all)");
            return None;
        }
        networks(field, NETWORKS_MAX)
    });
    section.set("deny", &mut addresses.deny, |field| networks(field, NETWORKS_MAX));
    for network in &addresses.allow {
        if let (Some(field), Some(by)) =
            (section.field("allow"), addresses.deny.iter().find(|denied| denied.contains(network)))
        {
            field.warn(format!("{network} lets nobody in: `deny` has {by}"));
        }
    }
    Some(addresses)
}

fn limits(field: &Field<'_>) -> Option<RouteLimits> {
    let section = field.section(LIMITS_KEYS)?;
    let mut limits = RouteLimits::default();
    section.set("rate", &mut limits.rate, |field| rate(field).map(Some));
    section.set("rate_per_client", &mut limits.rate_per_client, |field| rate(field).map(Some));
    section.set("concurrent", &mut limits.concurrent, |f| f.integer(1, COUNT_MAX).map(Some));
    section.set("body", &mut limits.body, |field| size(field, 0, 1 << 40).map(Some));
    Some(limits)
}

fn rate(field: &Field<'_>) -> Option<Rate> {
    let section = field.section(RATE_KEYS)?;
    let count = section
        .require("count", "a number of exchanges")
        .and_then(|field| field.integer(1, COUNT_MAX));
    let mut per = Duration::from_secs(1);
    section.set("per", &mut per, |field| timeout(field, TIMEOUT_MIN));
    let mut burst = None;
    section.set("burst", &mut burst, |field| field.integer(1, COUNT_MAX).map(Some));
    let count = count?;
    Some(Rate { count, per, burst: burst.unwrap_or(count) })
}

fn compression(field: &Field<'_>) -> Option<Compression> {
    let section = field.section(COMPRESSION_KEYS)?;
    let mut compression = Compression { level: COMPRESSION_LEVEL, min_size: COMPRESSION_MIN_SIZE };
    section.set("level", &mut compression.level, |field| field.integer(1, 9));
    section.set("min_size", &mut compression.min_size, |field| {
        size(field, 0, COMPRESSION_MIN_SIZE_MAX)
    });
    Some(compression)
}

fn affinity(field: &Field<'_>) -> Option<Affinity> {
    let section = field.section(AFFINITY_KEYS)?;
    let cookie = section.require("cookie", "the cookie's name, as in sidelane-affinity");
    let cookie = cookie.and_then(|field| field.parse(cookie_name));
    let mut max_age = Duration::ZERO;
    section.set("max_age", &mut max_age, |field| {
        field.parse(|text| whole_seconds(text, COOKIE_AGE_MAX))
    });
    Some(Affinity { cookie: cookie?, max_age })
}

/// A token (RFC 6265 §4.1.1) without the prefixes that bind a cookie to what is not said of this one.
fn cookie_name(text: &str) -> Result<Arc<str>, String> {
    let is_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    let is_good = (1..=COOKIE_BYTES_MAX).contains(&text.len()) && text.bytes().all(is_token);
    if is_good && !text.starts_with("__") {
        return Ok(text.into());
    }
    Err(format!(
        "{text:?} is not a name of a cookie (accepted: 1 to {COOKIE_BYTES_MAX} letters, digits and \
         !#$%&'*+-.^_`|~, not beginning with __)"
    ))
}

fn whole_seconds(text: &str, max: Duration) -> Result<Duration, String> {
    let value = value::duration(text)?;
    if value <= max && value.subsec_nanos() == 0 {
        return Ok(value);
    }
    let max = duration_text(max);
    Err(format!("{text} is out of bounds (accepted: whole seconds, 0s to {max})"))
}

fn hsts(field: &Field<'_>) -> Option<Hsts> {
    let section = field.section(HSTS_KEYS)?;
    let mut hsts = Hsts { max_age: HSTS_MAX_AGE, include_subdomains: false, preload: false };
    section.set("max_age", &mut hsts.max_age, |field| {
        field.parse(|text| whole_seconds(text, HSTS_MAX_AGE_MAX))
    });
    section.set("include_subdomains", &mut hsts.include_subdomains, Field::boolean);
    section.set("preload", &mut hsts.preload, Field::boolean);
    if let Some(field) = section.field("preload").filter(|_| hsts.preload)
        && !(hsts.include_subdomains && hsts.max_age >= HSTS_MAX_AGE)
    {
        let year = duration_text(HSTS_MAX_AGE);
        field.fail(format!(
            "browsers' lists take no less than all subdomains for a year (accepted: with \
             include_subdomains: true, and max_age of {year} or more)"
        ));
    }
    Some(hsts)
}
