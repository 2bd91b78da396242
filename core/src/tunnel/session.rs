//! The relay's registry of sessions: who is connected, with which lanes, serving what.
//!
//! Knows bounds and who was let in; what an announcement means is the relay's business.

use std::cmp::Reverse;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use arc_swap::{ArcSwap, ArcSwapOption};
use bytes::Bytes;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use sidelane_abi::failure;
use sidelane_tunnel::dedicate::FEATURE_DEDICATED;
use sidelane_tunnel::{
    FEATURE_RESUME, Lane, LaneConfig, OpenError, ProtocolTable, RequestId, Reset, proto,
};
use subtle::ConstantTimeEq as _;

use self::dedicated::Dedicating;
use super::dedicated::Pool;
use super::{Link, RecvHalf, SendHalf};
use crate::credentials::{Authenticated, Grant, Proof};
use crate::error::bounded;
use crate::metrics::Flow;
use crate::random;

mod dedicated;

/// A session's id on the wire.
pub type SessionId = [u8; 16];

/// Bit of `features`: documents are announced (`tunnel.proto`, Hello).
pub const FEATURE_ANNOUNCE: u64 = 2;

/// Bytes of an instance's id.
const INSTANCE_BYTES: usize = 16;

/// Longest name of a sidecar, and longest word of its own, that is shown.
const NAME_BYTES_MAX: usize = 128;

/// How long a dialler is asked to wait where the relay is full.
const RETRY_AFTER_FULL_MS: u32 = 5_000;

/// What the registry is bounded by, and how lanes are set up.
#[derive(Clone)]
pub struct Settings {
    /// Sessions at once.
    pub sessions_max: usize,
    /// Sessions of one principal at once, but for those that are about to be replaced.
    pub sessions_of_principal_max: usize,
    /// Lanes of one session.
    pub lanes_max: u32,
    /// How each lane is set up, but for what the peer's hello says.
    pub lane: LaneConfig,
    /// How long a lane that has lost its connection is waited for; zero: not at all.
    pub grace: Duration,
    /// Where further lanes and those that come back dial; `None`: where the session was dialled.
    pub advertise: Option<Arc<str>>,
    /// Protocol types this relay carries.
    pub protocols: Vec<Arc<str>>,
    /// Other relays that sidecars are told of.
    pub peers: Vec<String>,
}

/// One sidecar instance connected to this relay.
pub struct Session {
    /// Its id.
    pub id: SessionId,
    /// The sidecar's instance.
    pub instance: [u8; INSTANCE_BYTES],
    /// For people.
    pub name: Arc<str>,
    /// Grows with each session of this relay; the newest of an instance wins.
    pub epoch: u64,
    /// When it began.
    pub since: Instant,
    /// Where its first lane came from.
    pub peer: SocketAddr,
    /// Who it is, by what its last hello presented.
    authenticated: ArcSwap<Authenticated>,
    revoked: AtomicBool,
    /// Credentials that it presents while it runs.
    pub(crate) renewal: Mutex<Renewal>,
    /// Documents that it announces.
    pub(crate) announcing: Mutex<Announcing>,
    /// Numbers of the protocol types that both ends carry.
    pub protocols: ProtocolTable,
    secret: [u8; 32],
    lane: LaneConfig,
    /// How long a lane that has lost its connection is waited for; zero: not at all.
    pub grace: Duration,
    lanes: ArcSwap<Vec<Arc<Link>>>,
    /// Its last lane has ended: it takes no other.
    over: AtomicBool,
    /// Serialises changes of `lanes`, `over` and `authenticated`; readers never take it.
    lanes_change: Mutex<()>,
    lanes_made: AtomicU32,
    /// Connections that wait for an exchange of its own; `None`: one of the ends has none.
    pool: Option<Arc<Pool>>,
    requests: AtomicU64,
    turn: AtomicUsize,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session")
            .field("name", &self.name)
            .field("epoch", &self.epoch)
            .finish_non_exhaustive()
    }
}

impl Session {
    /// Who the sidecar is, and what it may claim.
    #[must_use]
    pub fn grant(&self) -> Arc<Grant> {
        Arc::clone(&self.authenticated.load().grant)
    }

    /// Who it is, by what, and until when.
    #[must_use]
    pub fn authenticated(&self) -> Arc<Authenticated> {
        self.authenticated.load_full()
    }

    /// Whether what was granted is still `grant`, the same object. Takes no lock: every exchange asks.
    #[must_use]
    pub fn is_granted(&self, grant: &Arc<Grant>) -> bool {
        Arc::ptr_eq(&self.authenticated.load().grant, grant)
    }

    /// Whether its credential was withdrawn, or has expired: it ends.
    #[must_use]
    pub fn is_revoked(&self) -> bool {
        self.revoked.load(Ordering::Acquire)
    }

    /// Whether its last lane has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::Acquire)
    }

    /// Takes what `change` makes of what it was let in by. An error revokes it: from then on nothing is
    /// granted, and nothing changes that. True: it was changed.
    ///
    /// # Errors
    /// What `change` gives, the first time.
    pub fn regrant<E>(
        &self,
        change: impl FnOnce(&Authenticated) -> Result<Authenticated, E>,
    ) -> Result<(), E> {
        let _held = self.lock_changes();
        if self.is_revoked() {
            return Ok(());
        }
        let before = self.authenticated.load_full();
        match change(&before) {
            Ok(mut after) => {
                if *after.grant == *before.grant {
                    after.grant = Arc::clone(&before.grant);
                }
                self.authenticated.store(Arc::new(after));
                Ok(())
            }
            Err(error) => {
                self.revoked.store(true, Ordering::Release);
                let grant = Arc::new(before.grant.withdrawn());
                self.authenticated.store(Arc::new(Authenticated { grant, ..(*before).clone() }));
                Err(error)
            }
        }
    }

    /// Ends every lane for good: its exchanges end here and now, and the sidecar is told why as far as it
    /// listens.
    pub fn revoke_lanes(&self, detail: &str) {
        self.end_lanes(failure::FORBIDDEN, detail);
    }

    /// The same where a newer session of the instance has taken its place.
    pub fn give_way(&self) {
        self.end_lanes(failure::DRAINING, "a newer session of this sidecar has taken its place");
    }

    fn end_lanes(&self, code: u32, detail: &str) {
        self.close_pool();
        for link in self.lanes.load().iter() {
            link.revoke(code, detail, Reset::new(failure::TUNNEL_LOST));
        }
    }

    /// Ends every lane now, whatever is queued.
    pub fn sever(&self) {
        for link in self.lanes.load().iter() {
            link.sever();
        }
    }

    fn lock_changes(&self) -> std::sync::MutexGuard<'_, ()> {
        self.lanes_change.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lanes that are up.
    #[must_use]
    pub fn lanes(&self) -> Arc<Vec<Arc<Link>>> {
        self.lanes.load_full()
    }

    /// Whether a new exchange could be opened.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.lanes.load().iter().any(|link| link.is_open())
    }

    /// Whether its lanes have lost their connections, and may take new exchanges once they have others.
    #[must_use]
    pub fn is_suspended(&self) -> bool {
        !self.is_open() && self.lanes.load().iter().any(|link| link.is_suspended())
    }

    /// Opens an exchange on the lane of thread `shard`, or on the least busy one; on one whose peer is
    /// silent only where there is no other. The boolean says that it crosses threads.
    ///
    /// # Errors
    /// Where no lane can take it.
    pub fn open(
        &self,
        shard: Option<usize>,
        protocol_type: u32,
        mut open: proto::Open,
        flow: Arc<Flow>,
    ) -> Result<(RequestId, SendHalf, RecvHalf, bool), OpenError> {
        let lanes = self.lanes.load();
        // Each lane holds the limit too; of several lanes the sum counts.
        if lanes.len() > 1
            && lanes.iter().map(|link| link.load()).sum::<usize>() >= self.lane.exchanges_max
        {
            return Err(OpenError::Overloaded);
        }
        let is_any_sure = lanes.iter().any(|link| link.is_open() && !link.is_suspect());
        let open_lanes =
            || lanes.iter().filter(|link| link.is_open() && !(is_any_sure && link.is_suspect()));
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        // At most once per lane: one that is leaving is not open any more.
        loop {
            let own = open_lanes().filter(|link| Some(link.shard) == shard);
            let own_count = own.clone().count();
            // Several lanes on this thread take turns.
            let own = turn.checked_rem(own_count).and_then(|turn| own.clone().nth(turn));
            let link = own.or_else(|| open_lanes().min_by_key(|link| link.load()));
            let Some(link) = link else { return Err(OpenError::Closed) };
            match link.open(|| self.request_id(), protocol_type, &mut open) {
                Ok((id, key)) => {
                    let (send, recv) = link.halves(key, flow);
                    return Ok((id, send, recv, Some(link.shard) != shard));
                }
                // Its driver has heard so, and has not said so yet; another lane takes the exchange.
                Err(OpenError::GoingAway) => link.leave(),
                Err(error) => return Err(error),
            }
        }
    }

    /// The relay makes odd numbers, from 1.
    fn request_id(&self) -> RequestId {
        RequestId(self.requests.fetch_add(1, Ordering::Relaxed) * 2 + 1)
    }

    /// Sends the answer to an announcement on any lane.
    pub fn answer(&self, announced: proto::Announced) {
        if let Some(link) = surest(&self.lanes.load()) {
            link.with(|lane| lane.announced(announced));
        }
    }

    /// Sends the answer to a credential on any lane.
    pub fn answer_credential(&self, authenticated: proto::Authenticated) {
        if let Some(link) = surest(&self.lanes.load()) {
            link.with(|lane| lane.authenticated(authenticated));
        }
    }

    /// Why the credential that it presented last while it runs was refused; `None`: it was not.
    #[must_use]
    pub fn refused_credential(&self) -> Option<String> {
        let renewal = self.renewal.lock().unwrap_or_else(PoisonError::into_inner);
        renewal.refused.as_ref().map(|refused| refused.why.clone())
    }

    /// Ends every lane once what is queued has been written.
    pub fn close(&self) {
        for link in self.lanes.load().iter() {
            link.close();
        }
    }

    /// Ends every lane for good once what is queued has been written.
    pub fn end(&self, detail: &str) {
        for link in self.lanes.load().iter() {
            link.end(failure::DRAINING, detail);
        }
    }

    /// Tells the sidecar that this relay goes soon; exchanges are opened all the same.
    pub fn foretell(&self, detail: &str) {
        for link in self.lanes.load().iter() {
            link.foretell(failure::DRAINING, detail);
        }
    }

    fn change_lanes(&self, change: impl FnOnce(&mut Vec<Arc<Link>>)) -> usize {
        let _held = self.lock_changes();
        let mut lanes = Vec::clone(&self.lanes.load());
        change(&mut lanes);
        let count = lanes.len();
        self.lanes.store(Arc::new(lanes));
        count
    }
}

/// Returns the lane on which a word is likeliest to arrive soon: one with a connection, if any.
#[must_use]
pub fn surest(lanes: &[Arc<Link>]) -> Option<&Arc<Link>> {
    lanes.iter().max_by_key(|link| {
        // Of equal ones the last is taken.
        (link.is_attached() && !link.is_suspect(), link.is_attached(), Reverse(link.number))
    })
}

/// Credentials that a session presents while it runs: one at a time is looked at, of further ones the
/// last is kept.
#[derive(Default)]
pub(crate) struct Renewal {
    pub(crate) is_running: bool,
    pub(crate) next: Option<Bytes>,
    /// The last one, where it was refused.
    pub(crate) refused: Option<RefusedRenewal>,
}

/// A credential that was presented in a running session, and was refused.
pub(crate) struct RefusedRenewal {
    pub(crate) why: String,
    /// To look again, where that can be.
    pub(crate) proof: Option<Proof>,
}

/// Documents that a session announces: one at a time is looked at, of further ones the last is kept.
#[derive(Default)]
pub(crate) struct Announcing {
    pub(crate) is_running: bool,
    pub(crate) next: Option<proto::Announce>,
    /// The greatest version that has come.
    pub(crate) newest: u64,
}

/// All sessions of this relay.
pub struct Sessions {
    /// This relay's instance.
    pub instance: [u8; INSTANCE_BYTES],
    settings: ArcSwap<Settings>,
    by_id: DashMap<SessionId, Arc<Session>>,
    by_instance: DashMap<[u8; INSTANCE_BYTES], SessionId>,
    epochs: AtomicU64,
    /// Unset: no session has dedicated connections.
    dedicating: ArcSwapOption<Dedicating>,
}

/// A lane that was let in.
#[derive(Debug)]
pub struct Admitted {
    /// Its session.
    pub session: Arc<Session>,
    /// The lane, not driven yet.
    pub link: Arc<Link>,
    /// What the dialler is told.
    pub welcome: proto::Welcome,
    /// An older session of the same instance, which this one replaces.
    pub replaced: Option<Arc<Session>>,
    /// The session is new.
    pub is_first: bool,
}

impl Sessions {
    /// Returns an empty registry.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        Self {
            instance: random::bytes(),
            settings: ArcSwap::from_pointee(settings),
            by_id: DashMap::new(),
            by_instance: DashMap::new(),
            epochs: AtomicU64::new(0),
            dedicating: ArcSwapOption::empty(),
        }
    }

    /// Carries these protocol types from here on; running sessions keep theirs.
    pub fn carry(&self, protocols: &[Arc<str>]) {
        self.settings.rcu(|settings| Settings {
            protocols: protocols.to_vec(),
            ..Settings::clone(settings)
        });
    }

    /// Takes other settings: for sessions that begin from here on.
    pub fn set(&self, settings: Settings) {
        self.settings.store(Arc::new(settings));
    }

    /// Sessions with at least one lane.
    #[must_use]
    pub fn len(&self) -> usize {
        self.by_id.len()
    }

    /// Whether nobody is connected.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.by_id.is_empty()
    }

    /// All of them, in no order.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Session>> {
        self.by_id.iter().map(|entry| Arc::clone(&entry)).collect()
    }

    /// Decides on the hello of a sidecar that is known. `shard_of` says which thread drives the given lane number.
    ///
    /// # Errors
    /// The refusal to send.
    pub fn admit(
        &self,
        hello: &proto::Hello,
        authenticated: Authenticated,
        peer: SocketAddr,
        shard_of: impl FnOnce(&SessionId, u32) -> usize,
    ) -> Result<Admitted, proto::Refuse> {
        let settings = self.settings.load();
        if hello.session.is_empty() {
            self.begin(&settings, hello, authenticated, peer, shard_of)
        } else {
            self.join(&settings, hello, authenticated, shard_of)
        }
    }

    fn begin(
        &self,
        settings: &Settings,
        hello: &proto::Hello,
        authenticated: Authenticated,
        peer: SocketAddr,
        shard_of: impl FnOnce(&SessionId, u32) -> usize,
    ) -> Result<Admitted, proto::Refuse> {
        if self.by_id.len() >= settings.sessions_max {
            return Err(refuse(
                proto::RefuseReason::Overloaded,
                format!("this relay has {} sessions, its limit", settings.sessions_max),
                RETRY_AFTER_FULL_MS,
            ));
        }
        let instance: [u8; INSTANCE_BYTES] = hello.instance.as_ref().try_into().map_err(|_| {
            refuse(
                proto::RefuseReason::Malformed,
                format!(
                    "hello.instance has {} bytes, {INSTANCE_BYTES} are accepted",
                    hello.instance.len()
                ),
                0,
            )
        })?;
        let principal = &authenticated.grant.principal;
        let of_principal = self.by_id.iter().filter(|other| {
            other.instance != instance
                && !other.is_revoked()
                && other.grant().principal == *principal
        });
        let count = of_principal.count();
        if count >= settings.sessions_of_principal_max {
            return Err(refuse(
                proto::RefuseReason::Overloaded,
                format!("principal {principal} has {count} sessions, the limit of one"),
                RETRY_AFTER_FULL_MS,
            ));
        }
        let id: SessionId = random::bytes();
        let mut lane = settings.lane.clone().with_peer(hello.window, hello.message_bytes_max);
        let comes_back = hello.features & FEATURE_RESUME != 0 && lane.replay_bytes_max > 0;
        let grace = if comes_back { settings.grace } else { Duration::ZERO };
        if grace.is_zero() {
            lane.replay_bytes_max = 0;
        }
        let session = Arc::new(Session {
            id,
            instance,
            name: shown_name(&hello.name),
            epoch: self.epochs.fetch_add(1, Ordering::Relaxed) + 1,
            since: Instant::now(),
            peer,
            authenticated: ArcSwap::from_pointee(authenticated),
            revoked: AtomicBool::new(false),
            renewal: Mutex::default(),
            announcing: Mutex::default(),
            protocols: ProtocolTable::parse(&hello.protocols)
                .map_err(|error| refuse(proto::RefuseReason::Malformed, error.to_string(), 0))?,
            secret: random::bytes(),
            lane,
            grace,
            lanes: ArcSwap::default(),
            over: AtomicBool::new(false),
            lanes_change: Mutex::new(()),
            lanes_made: AtomicU32::new(0),
            pool: self.pool(hello),
            requests: AtomicU64::new(0),
            turn: AtomicUsize::new(0),
        });
        // All that can be refused comes before the registry knows of the session.
        let protocols = answer_protocols(settings, &session)?;
        let link = self.add_lane(settings, &session, shard_of)?;
        let replaced = match self.by_instance.entry(instance) {
            Entry::Occupied(mut entry) => {
                let old = self.by_id.get(entry.get()).map(|old| Arc::clone(&old));
                let principal = &session.grant().principal;
                // An instance is its principal's: whoever else knows the id does not end its session.
                if old
                    .as_ref()
                    .is_some_and(|old| !old.is_revoked() && old.grant().principal != *principal)
                {
                    return Err(refuse(
                        proto::RefuseReason::Credential,
                        "another principal's session has this instance; the same instance is \
                         accepted by the same principal, or once that session has ended"
                            .to_owned(),
                        RETRY_AFTER_FULL_MS,
                    ));
                }
                let is_there = old.as_ref().is_some_and(|old| !old.is_revoked() && !old.is_over());
                if is_there && hello.held.iter().any(|held| *held == self.instance[..]) {
                    return Err(self.held());
                }
                self.by_id.insert(id, Arc::clone(&session));
                entry.insert(id);
                old
            }
            Entry::Vacant(entry) => {
                self.by_id.insert(id, Arc::clone(&session));
                entry.insert(id);
                None
            }
        };
        let welcome = self.welcome(settings, &session, &link, &protocols);
        Ok(Admitted { session, link, welcome, replaced, is_first: true })
    }

    fn join(
        &self,
        settings: &Settings,
        hello: &proto::Hello,
        authenticated: Authenticated,
        shard_of: impl FnOnce(&SessionId, u32) -> usize,
    ) -> Result<Admitted, proto::Refuse> {
        self.is_ours(&hello.relay_instance)?;
        let session = self.find(&hello.session, &hello.secret)?;
        if session.grant().principal != authenticated.grant.principal {
            return Err(unknown());
        }
        let before = session.authenticated();
        let is_same = before.credential() == authenticated.credential();
        if !is_same || before.expires != authenticated.expires {
            // What it presents now counts, whatever was refused before.
            session.renewal.lock().unwrap_or_else(PoisonError::into_inner).refused = None;
        }
        let Ok(()) = session.regrant(|_| Ok::<_, Infallible>(authenticated));
        let protocols = answer_protocols(settings, &session)?;
        let link = self.add_lane(settings, &session, shard_of)?;
        let welcome = self.welcome(settings, &session, &link, &protocols);
        Ok(Admitted { session, link, welcome, replaced: None, is_first: false })
    }

    /// What a dialler is told that came here for another relay, or by another way.
    fn held(&self) -> proto::Refuse {
        let detail = "this instance has a session with this relay already, which stays".to_owned();
        proto::Refuse {
            relay_instance: self.instance.to_vec().into(),
            ..refuse(proto::RefuseReason::Held, detail, 0)
        }
    }

    /// Whether a dialler means this relay; where it does not say, it does.
    fn is_ours(&self, instance: &[u8]) -> Result<(), proto::Refuse> {
        if instance.is_empty() || *instance == self.instance {
            return Ok(());
        }
        Err(refuse(
            proto::RefuseReason::WrongRelay,
            "the session is another relay's; dial that one, or begin a new session".to_owned(),
            0,
        ))
    }

    /// The session that this secret is of.
    fn find(&self, id: &[u8], secret: &[u8]) -> Result<Arc<Session>, proto::Refuse> {
        let id: SessionId = id.try_into().map_err(|_| unknown())?;
        let session = self.by_id.get(&id).map(|session| Arc::clone(&session));
        let is_its = |session: &Arc<Session>| {
            same_secret(&session.secret, secret) && !session.is_revoked() && !session.is_over()
        };
        session.filter(is_its).ok_or_else(unknown)
    }

    /// Whether a session is named that is here, by a secret that is not its own.
    #[must_use]
    pub fn is_wrong_secret(&self, resume: &proto::Resume) -> bool {
        let id = SessionId::try_from(&*resume.session).ok();
        let session = id.and_then(|id| self.by_id.get(&id).map(|session| Arc::clone(&session)));
        session.is_some_and(|session| !same_secret(&session.secret, &resume.secret))
    }

    /// Returns the session and the lane that are to come back.
    ///
    /// # Errors
    /// The refusal to send.
    pub fn find_lane(
        &self,
        resume: &proto::Resume,
    ) -> Result<(Arc<Session>, Arc<Link>), proto::Refuse> {
        self.is_ours(&resume.relay_instance)?;
        let session = self.find(&resume.session, &resume.secret)?;
        let lanes = session.lanes();
        let link = lanes.iter().find(|link| link.number == resume.lane).ok_or_else(unknown_lane)?;
        let link = Arc::clone(link);
        Ok((session, link))
    }

    fn add_lane(
        &self,
        settings: &Settings,
        session: &Arc<Session>,
        shard_of: impl FnOnce(&SessionId, u32) -> usize,
    ) -> Result<Arc<Link>, proto::Refuse> {
        let lanes_max = settings.lanes_max as usize;
        let number = session.lanes_made.fetch_add(1, Ordering::Relaxed);
        let shard = shard_of(&session.id, number);
        let link = Link::new(number, shard, Lane::new(session.lane.clone(), Instant::now()));
        session.dedicates(&link);
        let (mut is_full, mut is_over) = (false, false);
        session.change_lanes(|lanes| {
            is_full = lanes.len() >= lanes_max;
            // The registry does not have it any more, so that nobody would end it.
            is_over = session.is_over();
            if !is_full && !is_over {
                lanes.push(Arc::clone(&link));
            }
        });
        if is_over {
            return Err(unknown());
        }
        if is_full {
            return Err(refuse(
                proto::RefuseReason::Overloaded,
                format!("the session has {lanes_max} lanes, the relay's limit"),
                RETRY_AFTER_FULL_MS,
            ));
        }
        Ok(link)
    }

    fn welcome(
        &self,
        settings: &Settings,
        session: &Session,
        link: &Link,
        protocols: &ProtocolTable,
    ) -> proto::Welcome {
        proto::Welcome {
            version: sidelane_tunnel::VERSION,
            features: FEATURE_ANNOUNCE
                | if session.grace.is_zero() { 0 } else { FEATURE_RESUME }
                | if session.pool.is_some() { FEATURE_DEDICATED } else { 0 },
            session: session.id.to_vec().into(),
            secret: session.secret.to_vec().into(),
            epoch: session.epoch,
            lane: link.number,
            grace_ms: u32::try_from(session.grace.as_millis()).unwrap_or(u32::MAX),
            relay_instance: self.instance.to_vec().into(),
            advertise_address: settings.advertise.as_deref().unwrap_or_default().to_owned(),
            // The relay itself is reached already.
            peers: settings
                .peers
                .iter()
                .filter(|peer| Some(&***peer) != settings.advertise.as_deref())
                .cloned()
                .collect(),
            protocols: protocols.to_wire(),
            window: settings.lane.receive_window,
            message_bytes_max: settings.lane.message_bytes_max,
            replay_bytes_max: session.lane.replay_bytes_max,
            lanes_max: settings.lanes_max,
        }
    }

    /// Takes a lane out; true where it was the session's last, which is over then.
    pub fn lane_ended(&self, session: &Arc<Session>, link: &Arc<Link>) -> bool {
        let left = session.change_lanes(|lanes| {
            lanes.retain(|other| !Arc::ptr_eq(other, link));
            session.over.store(lanes.is_empty(), Ordering::Release);
        });
        if left > 0 {
            return false;
        }
        session.close_pool();
        let was_known = self.by_id.remove(&session.id).is_some();
        self.by_instance.remove_if(&session.instance, |_, current| *current == session.id);
        was_known
    }
}

fn refuse(reason: proto::RefuseReason, detail: String, retry_after_ms: u32) -> proto::Refuse {
    proto::Refuse { reason: reason.into(), detail, retry_after_ms, ..proto::Refuse::default() }
}

/// What a dialler is told whose session is not known here.
#[must_use]
pub fn unknown() -> proto::Refuse {
    refuse(
        proto::RefuseReason::UnknownSession,
        "this relay does not know the session; begin a new one".to_owned(),
        0,
    )
}

/// What a dialler is told whose lane has ended here.
#[must_use]
pub fn unknown_lane() -> proto::Refuse {
    refuse(
        proto::RefuseReason::UnknownLane,
        "the session has no such lane any more; dial a new one".to_owned(),
        0,
    )
}

/// What a dialler is told that a newer one of the same lane has overtaken.
#[must_use]
pub fn stale() -> proto::Refuse {
    refuse(
        proto::RefuseReason::Stale,
        "a newer attempt of the lane came before; each attempt needs a greater number".to_owned(),
        0,
    )
}

/// What a dialler is told whose lane cannot come back.
#[must_use]
pub fn gap(detail: String) -> proto::Refuse {
    refuse(proto::RefuseReason::Gap, detail, 0)
}

fn answer_protocols(
    settings: &Settings,
    session: &Session,
) -> Result<ProtocolTable, proto::Refuse> {
    session
        .protocols
        .answer(settings.protocols.iter().map(AsRef::as_ref))
        .map_err(|error| refuse(proto::RefuseReason::Malformed, error.to_string(), 0))
}

/// In a time that says nothing of where the two differ.
fn same_secret(ours: &[u8], theirs: &[u8]) -> bool {
    ours.ct_eq(theirs).into()
}

/// A sidecar's name as logs and pages show it: on one line, and not long.
#[must_use]
pub fn shown_name(name: &str) -> Arc<str> {
    // Pages say `file` of what is the relay's own.
    shown(if name == "file" { "sidecar file" } else { name }).into()
}

/// What a sidecar says for people, on one line, and not long.
#[must_use]
pub fn shown(text: &str) -> String {
    bounded(text, NAME_BYTES_MAX)
}

#[cfg(test)]
mod tests;
