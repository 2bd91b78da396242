//! Who may come in by user name and password (RFC 7617).
//!
//! A password is checked by bcrypt, slow on purpose and so never on a data-path thread. A user who was
//! let in costs a hash from then on. Guessing is bounded: by attempts of one client in a time, by
//! checks at once in the process. Neither names nor passwords are logged.

use std::net::IpAddr;
use std::num::NonZero;
use std::sync::{Arc, LazyLock, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue};
use sha2::{Digest as _, Sha256};
use tokio::sync::Semaphore;

use super::rate::{self, ClientBuckets};
use crate::config::policy::{BasicAuth, Rate};

/// Attempts of one client's address that are checked: people and their browsers need one, or some at
/// once after a start; a guesser gets 10 a second.
const ATTEMPTS: Rate = Rate { count: 10, per: Duration::from_secs(1), burst: 50 };

/// Checks at once in the process, and no more than half of the cores. Each keeps a core busy for
/// milliseconds to a second; those cores serve everyone.
const CHECKS_MAX: usize = 2;

/// Checks that wait for their turn; beyond, clients are told to come back. With the usual cost (some
/// milliseconds) the last one waits for less than a second.
const WAITING_MAX: usize = 64;

/// Checks of one client's address that wait. A guesser's do not take the places of all others; a
/// household or an office comes in at once after a start.
const WAITING_PER_CLIENT_MAX: usize = 16;

/// When a client comes back that has that many.
const WAITING_RETRY: Duration = Duration::from_secs(1);

/// Longest password: bcrypt does not look at what follows, so two that differ there would be one.
const PASSWORD_BYTES_MAX: usize = 72;

/// Longest credentials that are looked at, in base64: a name and a password have room many times over.
const CREDENTIALS_BYTES_MAX: usize = 1024;

static CHECKS: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, NonZero::get);
    Semaphore::new((cores / 2).clamp(1, CHECKS_MAX))
});
/// Who waits, the same client once for each check.
static WAITING: Mutex<Vec<u128>> = Mutex::new(Vec::new());

/// Makes what is remembered of a password worthless outside of this process.
static KEY: LazyLock<[u8; 32]> = LazyLock::new(crate::random::bytes);

/// Decides who comes in by one route.
pub(super) struct Authenticator {
    challenge: HeaderValue,
    /// Sorted by name.
    users: Vec<User>,
    attempts: ClientBuckets,
}

struct User {
    name: Arc<str>,
    hash: Arc<str>,
    /// Keyed digest of the password that bcrypt has taken. A user has one.
    verified: OnceLock<[u8; 32]>,
}

/// What is known of a request at once.
pub(in crate::relay) enum Verdict {
    /// Comes in.
    Known,
    /// Must say who it is, or was wrong.
    Unknown,
    /// Too many attempts; how long none is looked at.
    Limited(Duration),
    /// Bcrypt has to say.
    Ask(Question),
}

/// A check that is to be made.
pub(in crate::relay) struct Question {
    authenticator: Arc<Authenticator>,
    client: IpAddr,
    /// `None`: no such user; the check takes as long.
    user: Option<usize>,
    password: Vec<u8>,
    digest: [u8; 32],
}

/// What became of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::relay) enum Checked {
    /// Comes in.
    Known,
    /// Was wrong.
    Unknown,
    /// Too many checks wait.
    Overloaded,
    /// Too many of this client's wait; how long until it may come back.
    Limited(Duration),
}

impl Authenticator {
    pub(super) fn new(config: &BasicAuth) -> Self {
        let mut users: Vec<User> = config
            .users
            .iter()
            .map(|(name, hash)| User {
                name: Arc::clone(name),
                hash: Arc::clone(hash),
                verified: OnceLock::new(),
            })
            .collect();
        users.sort_by(|a, b| a.name.cmp(&b.name));
        let attempts = ClientBuckets::new(&ATTEMPTS);
        Self { challenge: challenge(&config.realm), users, attempts }
    }

    /// `WWW-Authenticate`.
    pub(super) fn challenge(&self) -> HeaderValue {
        self.challenge.clone()
    }

    /// Looks at a request's credentials.
    pub(super) fn look(self: &Arc<Self>, headers: &HeaderMap, client: IpAddr, now: u64) -> Verdict {
        let Some((name, password)) = credentials(headers) else { return Verdict::Unknown };
        if password.len() > PASSWORD_BYTES_MAX {
            return Verdict::Unknown;
        }
        let user = std::str::from_utf8(&name)
            .ok()
            .and_then(|name| self.users.binary_search_by(|user| (*user.name).cmp(name)).ok());
        let digest = digest(&name, &password);
        if user.is_some_and(|user| self.remembers(user, &digest)) {
            return Verdict::Known;
        }
        if let Err(wait) = self.attempts.take(client, now) {
            return Verdict::Limited(wait);
        }
        Verdict::Ask(Question { authenticator: Arc::clone(self), client, user, password, digest })
    }

    fn remembers(&self, user: usize, digest: &[u8; 32]) -> bool {
        self.users[user].verified.get().is_some_and(|known| is_same(known, digest))
    }
}

impl Question {
    /// Makes the check, on a thread that no exchange waits for.
    pub(in crate::relay) async fn ask(self) -> Checked {
        let permit = match CHECKS.try_acquire() {
            Ok(permit) => permit,
            Err(_) => {
                let _waits = match Waits::begin(&WAITING, self.client) {
                    Ok(waits) => waits,
                    Err(refused) => return refused,
                };
                match CHECKS.acquire().await {
                    Ok(permit) => permit,
                    // The semaphore is never closed.
                    Err(_) => return Checked::Overloaded,
                }
            }
        };
        // Of requests that came together the first has answered for all.
        if self.user.is_some_and(|user| self.authenticator.remembers(user, &self.digest)) {
            return Checked::Known;
        }
        // The permit goes with the check: a client that leaves does not end it.
        let check = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            self.check()
        });
        check.await.unwrap_or(Checked::Unknown)
    }

    fn check(self) -> Checked {
        let users = &self.authenticator.users;
        let Some(hash) = self.user.or(Some(0)).and_then(|user| users.get(user)) else {
            return Checked::Unknown;
        };
        // Of an unknown user any hash is asked, for the time it takes.
        let is_right = bcrypt::verify(&self.password, &hash.hash).unwrap_or(false);
        if !is_right || self.user.is_none() {
            return Checked::Unknown;
        }
        // Another thread may have been first; the password is the same.
        let _ = hash.verified.set(self.digest);
        Checked::Known
    }
}

/// A check that waits, counted until dropped.
struct Waits<'a> {
    waiting: &'a Mutex<Vec<u128>>,
    client: u128,
}

impl<'a> Waits<'a> {
    /// Takes a place; the error is what becomes of the check without.
    fn begin(waiting: &'a Mutex<Vec<u128>>, client: IpAddr) -> Result<Self, Checked> {
        let client = rate::key(client);
        let mut all = waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if all.iter().filter(|other| **other == client).count() >= WAITING_PER_CLIENT_MAX {
            return Err(Checked::Limited(WAITING_RETRY));
        }
        if all.len() >= WAITING_MAX {
            return Err(Checked::Overloaded);
        }
        all.push(client);
        Ok(Self { waiting, client })
    }
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        let mut all = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(at) = all.iter().position(|client| *client == self.client) {
            all.swap_remove(at);
        }
    }
}

fn challenge(realm: &str) -> HeaderValue {
    let mut quoted = String::with_capacity(realm.len() + 2);
    for char in realm.chars().filter(|char| !char.is_control()) {
        if matches!(char, '"' | '\\') {
            quoted.push('\\');
        }
        quoted.push(char);
    }
    let text = format!("Basic realm=\"{quoted}\", charset=\"UTF-8\"");
    HeaderValue::from_bytes(text.as_bytes())
        .unwrap_or_else(|_| HeaderValue::from_static("Basic realm=\"\", charset=\"UTF-8\""))
}

/// Reads the credentials of a request that has just one `Authorization`: name and password.
fn credentials(headers: &HeaderMap) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let value = values.next().filter(|_| values.next().is_none())?.as_bytes();
    let (scheme, rest) = value.split_at_checked(6)?;
    if !scheme.eq_ignore_ascii_case(b"Basic ") || rest.len() > CREDENTIALS_BYTES_MAX {
        return None;
    }
    let mut name = STANDARD.decode(rest.trim_ascii()).ok()?;
    let colon = name.iter().position(|byte| *byte == b':')?;
    let password = name.split_off(colon + 1);
    name.truncate(colon);
    Some((name, password))
}

fn digest(name: &[u8], password: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(*KEY);
    hash.update(name.len().to_le_bytes());
    hash.update(name);
    hash.update(password);
    hash.finalize().into()
}

/// Compares in a time that does not depend on where they differ.
fn is_same(a: &[u8; 32], b: &[u8; 32]) -> bool {
    std::hint::black_box(a.iter().zip(b).fold(0, |differs, (a, b)| differs | (a ^ b))) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cost 4, the least there is: the tests are about what surrounds it.
    fn authenticator(users: &[(&str, &str)]) -> Arc<Authenticator> {
        let users = users
            .iter()
            .map(|(name, password)| ((*name).into(), bcrypt::hash(password, 4).unwrap().into()))
            .collect();
        Arc::new(Authenticator::new(&BasicAuth { realm: "Shop".into(), users }))
    }

    fn headers(values: &[&str]) -> HeaderMap {
        let field = |value: &&str| (AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        values.iter().map(field).collect()
    }

    fn basic(name: &str, password: &str) -> HeaderMap {
        headers(&[&format!("Basic {}", STANDARD.encode(format!("{name}:{password}")))])
    }

    const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));

    fn ask(authenticator: &Arc<Authenticator>, headers: &HeaderMap) -> Checked {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        match authenticator.look(headers, CLIENT, 1) {
            Verdict::Known => Checked::Known,
            Verdict::Unknown => Checked::Unknown,
            Verdict::Limited(_) => Checked::Overloaded,
            Verdict::Ask(question) => runtime.block_on(question.ask()),
        }
    }

    #[test]
    fn the_right_password_comes_in_and_is_remembered() {
        let authenticator = authenticator(&[("zoë", "geheim"), ("alice", "pass:word")]);
        for (name, password) in [("alice", "pass:word"), ("zoë", "geheim")] {
            let headers = basic(name, password);
            let first = authenticator.look(&headers, CLIENT, 1);
            assert!(matches!(first, Verdict::Ask(_)), "{name} is not known yet");
            assert_eq!(ask(&authenticator, &headers), Checked::Known, "{name}");
            let again = authenticator.look(&headers, CLIENT, 1);
            assert!(matches!(again, Verdict::Known), "{name} is known");
        }
    }

    #[test]
    fn everything_else_stays_out() {
        let long = "x".repeat(PASSWORD_BYTES_MAX);
        let authenticator = authenticator(&[("alice", "secret"), ("long", &long)]);
        assert_eq!(ask(&authenticator, &basic("alice", "secret")), Checked::Known);
        let table = [
            ("no field", headers(&[])),
            ("another password", basic("alice", "Secret")),
            ("an empty password", basic("alice", "")),
            ("another user", basic("bob", "secret")),
            ("an empty user", basic("", "")),
            ("another user's password", basic("long", "secret")),
            ("longer than bcrypt looks", basic("long", &format!("{long}y"))),
            ("two fields", headers(&["Basic YWxpY2U6c2VjcmV0", "Basic YWxpY2U6c2VjcmV0"])),
            ("another scheme", headers(&["Bearer YWxpY2U6c2VjcmV0"])),
            ("no base64", headers(&["Basic ***"])),
            ("no colon", headers(&[&format!("Basic {}", STANDARD.encode("alice"))])),
            ("a scheme alone", headers(&["Basic"])),
            ("nothing behind it", headers(&["Basic "])),
            ("endless", headers(&[&format!("Basic {}", "A".repeat(5000))])),
        ];
        assert!(!table.is_empty());
        for (name, headers) in table {
            assert_eq!(ask(&authenticator, &headers), Checked::Unknown, "{name}");
        }
        assert_eq!(ask(&authenticator, &basic("long", &long)), Checked::Known);
        let lower = headers(&["bAsIc YWxpY2U6c2VjcmV0"]);
        assert_eq!(ask(&authenticator, &lower), Checked::Known, "schemes have no case");
    }

    #[test]
    fn guessing_is_limited_by_the_clients_address() {
        let authenticator = authenticator(&[("alice", "secret")]);
        let guess = |now| authenticator.look(&basic("alice", "guess"), CLIENT, now);
        for _ in 0..ATTEMPTS.burst {
            assert!(matches!(guess(1), Verdict::Ask(_)));
        }
        let Verdict::Limited(wait) = guess(1) else { panic!("not limited") };
        assert!(wait <= Duration::from_millis(100), "{wait:?}");
        let other = IpAddr::from([192, 0, 2, 2]);
        let elsewhere = authenticator.look(&basic("alice", "secret"), other, 1);
        assert!(matches!(elsewhere, Verdict::Ask(_)), "others are not held up");
        assert!(matches!(guess(1_000_000_000), Verdict::Ask(_)), "it passes");
    }

    #[test]
    fn one_client_does_not_take_all_places() {
        let waiting = Mutex::default();
        let client = |number: u8| IpAddr::from([192, 0, 2, number]);
        let mut waits = Vec::new();
        for _ in 0..WAITING_PER_CLIENT_MAX {
            waits.push(Waits::begin(&waiting, client(1)).map_err(|_| ()).expect("a place"));
        }
        let refused = Waits::begin(&waiting, client(1)).err();
        assert_eq!(refused, Some(Checked::Limited(WAITING_RETRY)));
        let others = (2..).map_while(|number| Waits::begin(&waiting, client(number)).ok());
        waits.extend(others.take(WAITING_MAX));
        assert_eq!(waits.len(), WAITING_MAX, "others have what is left");
        assert_eq!(Waits::begin(&waiting, client(250)).err(), Some(Checked::Overloaded));
        waits.remove(0);
        assert!(Waits::begin(&waiting, client(1)).is_ok());
        drop(waits);
        assert!(waiting.lock().unwrap().is_empty());
    }

    #[test]
    fn a_realm_is_quoted() {
        assert_eq!(challenge("Shop"), "Basic realm=\"Shop\", charset=\"UTF-8\"");
        assert_eq!(challenge("a\"b\\c\n"), "Basic realm=\"a\\\"b\\\\c\", charset=\"UTF-8\"");
        let other = challenge("Büro");
        assert_eq!(other.as_bytes(), "Basic realm=\"Büro\", charset=\"UTF-8\"".as_bytes());
    }
}
